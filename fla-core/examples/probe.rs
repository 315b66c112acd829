//! Prints what this machine has for the operators: driver, device, NVRTC, kernel cache; or what is missing.
//!
//! ```sh
//! cargo run --example probe
//! ```

use fla_core::{Cache, Device, Error, compile};

fn main() {
    match Device::new(0).and_then(|device| describe(&device)) {
        Ok(text) => println!("{text}"),
        Err(error) => println!("device        none: {error}"),
    }
    match (compile::nvrtc_version(), compile::nvrtc_path()) {
        (Ok(version), Ok(path)) => println!("NVRTC         {version} at {}", path.display()),
        (Err(error), _) | (_, Err(error)) => println!("NVRTC         none: {error}"),
    }
    match Cache::from_env().dir() {
        Some(dir) => println!("kernel cache  {}", dir.display()),
        None => println!(
            "kernel cache  none: every process compiles what it uses; name a folder in FLA_CACHE_DIR"
        ),
    }
}

fn describe(device: &Device) -> Result<String, Error> {
    let driver = device.driver_version();
    let name = device.context().name().unwrap_or_else(|_| "a device without a name".into());
    Ok(format!(
        "driver        for CUDA {}.{}\ndevice        {name}, {}, {} multiprocessors\nshared memory {} bytes of a block\nL2            {} bytes",
        driver / 1000,
        driver % 1000 / 10,
        device.arch(),
        device.sm_count(),
        device.smem_bytes(),
        device.l2_bytes(),
    ))
}
