//! Is there a driver, an NVRTC, a cuBLAS: asked before any call that would panic without one.

use std::env;
use std::ffi::c_int;
use std::fs;
use std::path::{Path, PathBuf};

use cudarc::driver::sys;
use libloading::Library;

use crate::Error;

/// The user's folder of CUDA libraries, which comes before the loader's own path.
fn lib_dir() -> Option<PathBuf> {
    env::var_os("FLA_CUDA_LIB_DIR").filter(|dir| !dir.is_empty()).map(PathBuf::from)
}

/// Driver functions that this crate and cudarc's safe layer call and that older drivers lack.
const NEEDED: &[&str] = &["cuLaunchKernelEx", "cuMemAllocAsync", "cuEventElapsedTime"];

/// Opens the driver library if there is one and it is new enough; every later call of cudarc finds it loaded.
pub(crate) fn probe_driver() -> Result<(), Error> {
    probe_driver_among(&driver_candidates())
}

fn driver_candidates() -> Vec<PathBuf> {
    let mut candidates = Vec::new();
    if let Some(dir) = lib_dir() {
        for name in ["libcuda.so.1", "libcuda.so"] {
            candidates.push(dir.join(name));
        }
    }
    // The order in which cudarc looks, so that both see the same library.
    let names: &[&str] = if cfg!(windows) { &["nvcuda.dll"] } else { &["libcuda.so", "libcuda.so.1"] };
    candidates.extend(names.iter().map(PathBuf::from));
    candidates
}

fn probe_driver_among(candidates: &[PathBuf]) -> Result<(), Error> {
    let mut tried = Vec::new();
    let library = candidates.iter().find_map(|path| {
        // SAFETY: opening a library runs its initialisers; the CUDA driver is meant to be opened this way.
        match unsafe { Library::new(path) } {
            Ok(library) => Some(library),
            Err(error) => {
                tried.push(format!("{} ({})", path.display(), why(&error)));
                None
            }
        }
    });
    let Some(library) = library else { return Err(Error::NoDriver { tried }) };

    let missing = NEEDED.iter().copied().find(|name| {
        // SAFETY: the symbol is only looked up, never called through this type.
        unsafe { library.get::<unsafe extern "C" fn()>(name.as_bytes()) }.is_err()
    });
    let mut found: c_int = 0;
    type Version = unsafe extern "C" fn(*mut c_int) -> c_int;
    // SAFETY: the signature is the driver's.
    if let Ok(version) = unsafe { library.get::<Version>(b"cuDriverGetVersion") } {
        // SAFETY: the function may be called before `cuInit`, and `found` outlives the call.
        let status = unsafe { version(&raw mut found) };
        if status != 0 {
            found = 0;
        }
    }
    let found = u32::try_from(found).unwrap_or(0);
    // Within a major version bindings and driver may differ by minor versions, either way round.
    let old = found / 1000 < sys::CUDA_VERSION / 1000;
    // cudarc opens the library again by name, and the loader hands out the one that is loaded.
    std::mem::forget(library);
    if missing.is_some() || old {
        return Err(Error::OldDriver { found, wanted: sys::CUDA_VERSION, missing });
    }
    Ok(())
}

/// The loader's own words, which libloading keeps one level down.
pub(crate) fn why(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}

/// Where NVRTC may lie, in order: the user's folder, the loader's path, toolkits, Python's wheels.
pub(crate) fn nvrtc_candidates() -> Vec<PathBuf> {
    candidates(if cfg!(windows) {
        &["nvrtc64_130_0.dll", "nvrtc64_120_0.dll"]
    } else {
        &["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"]
    })
}

/// Where cuBLAS may lie, in the same order.
pub(crate) fn cublas_candidates() -> Vec<PathBuf> {
    candidates(if cfg!(windows) {
        &["cublas64_13.dll", "cublas64_12.dll"]
    } else {
        &["libcublas.so.13", "libcublas.so.12", "libcublas.so"]
    })
}

fn candidates(names: &[&str]) -> Vec<PathBuf> {
    let mut out = Vec::new();
    if let Some(dir) = lib_dir() {
        out.extend(names.iter().map(|name| dir.join(name)));
    }
    out.extend(names.iter().map(PathBuf::from));
    for dir in toolkit_dirs().into_iter().chain(wheel_dirs()) {
        // Folders that do not exist are not worth a line in an error.
        out.extend(names.iter().map(|name| dir.join(name)).filter(|path| path.exists()));
    }
    out
}

/// Where toolkits are installed, for messages.
pub(crate) fn described_places() -> String {
    let mut places: Vec<String> =
        ["CUDA_HOME", "CUDA_PATH", "/usr/local/cuda*", "/opt/cuda"].map(String::from).into();
    places.push(
        "nvidia/cu13/lib, nvidia/cuda_nvrtc/lib and nvidia/cublas/lib of VIRTUAL_ENV, CONDA_PREFIX and python3 on PATH"
            .into(),
    );
    places.join(", ")
}

fn toolkit_dirs() -> Vec<PathBuf> {
    let mut roots: Vec<PathBuf> =
        ["CUDA_HOME", "CUDA_PATH"].iter().filter_map(env::var_os).map(PathBuf::from).collect();
    roots.push("/usr/local/cuda".into());
    roots.extend(children(Path::new("/usr/local"), |name| name.starts_with("cuda-")));
    roots.push("/opt/cuda".into());
    roots.iter().flat_map(|root| [root.join("lib64"), root.join("lib"), root.join("bin")]).collect()
}

/// The library folders of NVIDIA's wheels in every Python that is active: a virtual environment, a conda one, or
/// the `python3` that PATH finds.
fn wheel_dirs() -> Vec<PathBuf> {
    let mut prefixes: Vec<PathBuf> =
        ["VIRTUAL_ENV", "CONDA_PREFIX"].iter().filter_map(env::var_os).map(PathBuf::from).collect();
    if let Some(path) = env::var_os("PATH") {
        prefixes.extend(
            env::split_paths(&path)
                .filter(|dir| dir.join("python3").exists())
                .filter_map(|dir| dir.parent().map(Path::to_path_buf)),
        );
    }
    let mut out = Vec::new();
    for prefix in prefixes {
        for python in children(&prefix.join("lib"), |name| name.starts_with("python3")) {
            for packages in ["site-packages", "dist-packages"] {
                for wheel in ["nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib", "nvidia/cublas/lib"] {
                    out.push(python.join(packages).join(wheel));
                }
            }
        }
    }
    out
}

/// Entries of a folder by name, last (newest version) first; empty when it cannot be read.
fn children(dir: &Path, wanted: impl Fn(&str) -> bool) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    let mut out: Vec<PathBuf> = entries
        .flatten()
        .filter(|entry| entry.file_name().to_str().is_some_and(&wanted))
        .map(|entry| entry.path())
        .collect();
    out.sort();
    out.reverse();
    out
}

#[cfg(test)]
mod tests {
    use super::{Error, probe_driver_among};

    #[test]
    fn a_missing_driver_is_an_error_that_lists_what_was_tried() {
        let error = probe_driver_among(&["/nowhere/libcuda.so.1".into(), "libnot-cuda.so".into()])
            .expect_err("neither is there");
        let text = error.to_string();
        for part in ["/nowhere/libcuda.so.1 (", "libnot-cuda.so (", "install NVIDIA's driver"] {
            assert!(text.contains(part), "{part} is not in: {text}");
        }
    }

    #[test]
    fn a_library_without_the_needed_functions_is_too_old() {
        // The C library is on the loader's path of every Linux, and has none of them.
        let error = probe_driver_among(&["libc.so.6".into()]).expect_err("it is another library");
        assert!(
            matches!(error, Error::OldDriver { found: 0, missing: Some("cuLaunchKernelEx"), .. }),
            "{error}"
        );
    }
}
