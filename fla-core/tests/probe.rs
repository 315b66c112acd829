//! What a user sees without a driver, with an old one, without a device, and when the driver refuses: by a fake
//! driver in child processes, since a library is opened once per process.

use std::fs;
use std::mem::offset_of;
use std::path::PathBuf;
use std::process::Command;

use fla_core::testing::{gpu, nvrtc};
use fla_core::{
    Arch, Cache, Device, Error, Field, Grid, Params, Ptr, PtrMut, RawSlice, Source, Unit, check_len,
};

#[repr(C)]
#[derive(Clone, Copy)]
struct DoubleParams {
    x: Ptr<f32>,
    y: PtrMut<f32>,
    n: i32,
}

// SAFETY: `#[repr(C)]`, and the fields are listed in order.
unsafe impl Params for DoubleParams {
    const CUDA_TYPE: &'static str = "fla::probe::DoubleParams";
    const FIELDS: &'static [Field] = &[
        Field::new("x", "const float*", offset_of!(Self, x)),
        Field::new("y", "float*", offset_of!(Self, y)),
        Field::new("n", "fla::i32", offset_of!(Self, n)),
    ];
}

fn unit() -> Unit {
    let text = "#include <fla/core/prelude.cuh>\n\
                namespace fla::probe {\n\
                struct DoubleParams { const float* x; float* y; i32 n; };\n\
                template <class Cfg> __device__ void twice(const DoubleParams& p) {\n\
                    const int i = blockIdx.x * Cfg::THREADS + threadIdx.x;\n\
                    if (i < p.n) p.y[i] = 2.0f * p.x[i];\n\
                }\n\
                }\n";
    Unit::new::<DoubleParams>("probe", "twice", Source { name: "fla/probe/twice.cu", text }, 64)
        .with("THREADS", 64)
}

/// The library that cargo builds beside the tests; a copied test executable does not have it.
fn fake_driver() -> Option<PathBuf> {
    let deps = std::env::current_exe().ok()?.parent()?.to_path_buf();
    let library = deps.parent()?.join("examples/libfake_driver.so");
    if library.exists() {
        return Some(library);
    }
    eprintln!("skipped: {} is not there; `cargo test` builds it", library.display());
    None
}

struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("fla-probe-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).expect("the temporary folder is writable");
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Runs `role` in a child that finds the fake driver first, and returns what it printed after `answer: `.
fn child(name: &str, role: &str, variables: &[(&str, &str)]) -> Option<String> {
    let folder = Folder::new(name);
    let library = fake_driver()?;
    for file in ["libcuda.so", "libcuda.so.1"] {
        fs::copy(&library, folder.0.join(file)).expect("the temporary folder is writable");
    }
    let mut path = folder.0.clone().into_os_string();
    if let Some(more) = std::env::var_os("LD_LIBRARY_PATH") {
        path.push(":");
        path.push(more);
    }
    let output = Command::new(std::env::current_exe().expect("the test executable"))
        .args(["--exact", "child_process", "--nocapture"])
        .env("PROBE_ROLE", role)
        .env("LD_LIBRARY_PATH", path)
        .env("FLA_CACHE_DIR", folder.0.join("cache"))
        .envs(variables.iter().copied())
        .output()
        .expect("the test executable runs");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "the child failed: {text}{}", String::from_utf8_lossy(&output.stderr));
    let answer =
        text.lines().find_map(|line| line.split_once("answer: ")).map(|(_, answer)| answer.to_owned());
    Some(answer.unwrap_or_else(|| panic!("the child gave no answer: {text}")))
}

/// Not a test of its own: what the children run.
#[test]
fn child_process() {
    let Ok(role) = std::env::var("PROBE_ROLE") else { return };
    let answer = match role.as_str() {
        "open" => Device::new(0).map(|device| format!("opened {}", device.arch())),
        "load" => Device::new(0)
            .and_then(|device| device.kernel::<DoubleParams>(&unit()))
            .map(|_| "loaded".to_owned()),
        "allocate too much" => Device::new(0)
            .and_then(|device| device.alloc::<f32>(&device.context().default_stream(), usize::MAX / 4 + 2))
            .map(|x| format!("allocated {}", x.len())),
        "allocate" => Device::new(0)
            .and_then(|device| device.alloc::<f32>(&device.context().default_stream(), 1 << 20))
            .map(|x| format!("allocated {}", x.len())),
        other => panic!("no role {other}"),
    };
    println!("answer: {}", answer.unwrap_or_else(|error| error.to_string()));
}

fn expect(name: &str, role: &str, variables: &[(&str, &str)], wanted: &[&str]) {
    let Some(answer) = child(name, role, variables) else { return };
    for part in wanted {
        assert!(answer.contains(part), "`{part}` is not in: {answer}");
    }
}

#[test]
fn a_device_opens() {
    expect("opens", "open", &[], &["opened sm_90a"]);
}

#[test]
fn a_driver_of_another_minor_version_is_fine() {
    expect("minor", "open", &[("FAKE_VERSION", "13000")], &["opened sm_90a"]);
}

#[test]
fn an_old_driver_is_refused_with_both_versions() {
    let wanted = ["too old", "supports CUDA 11.8", "update the driver"];
    expect("old", "open", &[("FAKE_VERSION", "11080")], &wanted);
}

#[test]
fn no_device_is_told_from_no_driver() {
    let wanted = ["there is no CUDA device 0", "CUDA_ERROR_NO_DEVICE", "nvidia-smi"];
    expect("no-device", "open", &[("FAKE_INIT", "100")], &wanted);
    expect(
        "no-devices",
        "open",
        &[("FAKE_DEVICES", "0")],
        &["there is no CUDA device 0", "the driver shows 0"],
    );
}

#[test]
fn an_old_gpu_is_refused() {
    expect("old-gpu", "open", &[("FAKE_CAPABILITY", "75")], &["another GPU than sm_75", "sm_80"]);
}

#[test]
fn out_of_memory_names_the_bytes() {
    let wanted = ["out of memory during an allocation of 4194304 bytes"];
    expect("memory", "allocate", &[("FAKE_FREE_BYTES", "1000000")], &wanted);
    expect("wraps", "allocate too much", &[], &["out of memory during an allocation of"]);
    expect("enough", "allocate", &[("FAKE_FREE_BYTES", "9000000")], &["allocated 1048576"]);
}

#[test]
fn a_cubin_that_the_driver_refuses_is_compiled_again_once() {
    if !nvrtc("a_cubin_that_the_driver_refuses_is_compiled_again_once") {
        return;
    }
    let shared = Folder::new("shared-cache");
    let cache = shared.0.to_str().expect("a plain path");
    expect("first", "load", &[("FLA_CACHE_DIR", cache)], &["loaded"]);
    // The entry is there now, and the driver refuses it: it is compiled again, which the driver takes.
    expect("again", "load", &[("FLA_CACHE_DIR", cache), ("FAKE_REFUSED_LOADS", "1")], &["loaded"]);
    // A driver that refuses what was just compiled is an error, not a loop.
    expect(
        "never",
        "load",
        &[("FLA_CACHE_DIR", cache), ("FAKE_REFUSED_LOADS", "9")],
        &["load of a kernel", "INVALID_IMAGE"],
    );
}

#[test]
fn a_warmed_folder_holds_the_entry_and_a_file_in_its_place_is_an_error() {
    if !nvrtc("a_warmed_folder_holds_the_entry_and_a_file_in_its_place_is_an_error") {
        return;
    }
    let folder = Folder::new("warm");
    let dir = folder.0.join("kernels");
    Cache::at(&dir).warm(&[unit()], Arch::SM_90).expect("compiles and writes");
    let names: Vec<String> = fs::read_dir(&dir)
        .expect("was made")
        .flatten()
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .collect();
    assert!(
        names.iter().any(|n| n.starts_with("probe_twice-sm_90a-nvrtc") && n.ends_with(".cubin")),
        "{names:?}"
    );
    let file = folder.0.join("file");
    fs::write(&file, b"").expect("the temporary folder is writable");
    let error = Cache::at(file.join("under")).warm(&[unit()], Arch::SM_90).expect_err("cannot be written");
    assert!(matches!(error, Error::Cache { .. }), "{error}");
}

#[test]
fn without_a_driver_opening_is_an_error_and_never_a_panic() {
    if let Err(error) = Device::new(0) {
        let text = error.to_string();
        assert!(
            ["install", "update", "check"].iter().any(|remedy| text.contains(remedy)),
            "no remedy in: {text}"
        );
    }
}

#[test]
fn lengths_are_checked_by_name() {
    let error = check_len("beta", "[B, T, H]", 8192, 4096).expect_err("differs");
    assert_eq!(error.to_string(), "`beta` is [B, T, H], which is 8192 elements here, but holds 4096");
    assert!(check_len("beta", "[B, T, H]", 7, 7).is_ok());
}

/// Slices, views and foreign memory on the GPU, through the same launch.
#[test]
fn every_kind_of_tensor_can_be_launched_on() {
    let Some((device, stream)) = gpu("every_kind_of_tensor_can_be_launched_on") else {
        return;
    };
    let kernel = device.kernel::<DoubleParams>(&unit()).expect("compiles");
    let x = stream.clone_htod(&[1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]).expect("fits");
    let mut y = stream.alloc_zeros::<f32>(12).expect("fits");
    let foreign = {
        use fla_core::cudarc::driver::DevicePtr;
        let (pointer, _guard) = x.device_ptr(&stream);
        // SAFETY: `x` outlives the slice and nobody writes it.
        unsafe { RawSlice::<f32>::new(pointer, 8, &stream) }
    };
    for i in 0..3 {
        let mut out = y.slice_mut(4 * i..4 * i + 4);
        let bound =
            kernel.launch(&stream, Grid::x(1).with_dependent_launch(device.arch().has_tma()), |bind| {
                DoubleParams {
                    x: match i {
                        0 => bind.read("x", &x),
                        1 => bind.read("x", &foreign),
                        _ => Ptr::NULL,
                    },
                    y: bind.write("y", &mut out),
                    n: if i == 2 { 0 } else { 4 },
                }
            });
        bound.expect("launches");
    }
    let y = stream.clone_dtoh(&y).expect("copies");
    assert_eq!(y, [2.0, 4.0, 6.0, 8.0, 2.0, 4.0, 6.0, 8.0, 0.0, 0.0, 0.0, 0.0]);
}
