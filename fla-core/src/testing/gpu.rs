//! Opens the GPU or finds NVRTC for a test, or says why the test did not run.

use std::sync::{Arc, OnceLock};

use cudarc::driver::CudaStream;

use crate::{Device, Error, compile};

/// Whether a missing GPU is an error: `FLA_REQUIRE_GPU=1`, which `cargo xtask test-gpu` sets.
#[must_use]
pub fn gpu_is_required() -> bool {
    std::env::var_os("FLA_REQUIRE_GPU").is_some_and(|value| value == "1")
}

/// The first GPU with a stream of its own, or none when there is no GPU, which is then printed.
///
/// ```no_run
/// let Some((device, stream)) = fla_core::testing::gpu("chunk_fwd_matches_reference") else { return };
/// ```
///
/// # Panics
///
/// When there is no GPU although one is required; see [`gpu_is_required`].
#[must_use]
pub fn gpu(test: &str) -> Option<(Device, Arc<CudaStream>)> {
    static DEVICE: OnceLock<Result<Device, Error>> = OnceLock::new();
    match DEVICE.get_or_init(|| Device::new(0)) {
        Ok(device) => {
            let stream = device.context().new_stream();
            Some((device.clone(), stream.expect("a stream on a device that has just been opened")))
        }
        Err(error) => {
            assert!(!gpu_is_required(), "{test} needs a GPU, and FLA_REQUIRE_GPU is set: {error}");
            eprintln!("{test}: skipped, there is no GPU ({error})");
            None
        }
    }
}

/// Whether NVRTC is there, for tests that compile but need no GPU; when it is not, that is printed.
///
/// # Panics
///
/// When there is none although one is required: `FLA_REQUIRE_NVRTC=1`, which `cargo xtask test` sets.
#[must_use]
pub fn nvrtc(test: &str) -> bool {
    match compile::nvrtc_version() {
        Ok(_) => true,
        Err(error) => {
            let required = std::env::var_os("FLA_REQUIRE_NVRTC").is_some_and(|value| value == "1");
            assert!(!required, "{test} needs NVRTC, and FLA_REQUIRE_NVRTC is set: {error}");
            eprintln!("{test}: skipped, there is no NVRTC");
            false
        }
    }
}
