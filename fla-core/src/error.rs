//! What can go wrong, said so that the reader knows what to do next.

use std::fmt;
use std::path::PathBuf;

use cudarc::driver::DriverError;
use cudarc::driver::sys::CUresult;

use crate::Arch;

/// Every error of this workspace's crates.
///
/// Nothing has been launched, and no output written, when one is returned before a launch; the variants
/// that can come later say so.
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// No CUDA driver library could be opened.
    NoDriver {
        /// Every name and folder that was tried.
        tried: Vec<String>,
    },
    /// The driver is older than the CUDA version that the bindings were built for.
    OldDriver {
        /// CUDA version that the driver supports, as `1000 * major + 10 * minor`; 0 when it could not be asked.
        found: u32,
        /// CUDA version of the bindings, in the same form.
        wanted: u32,
        /// A function that the driver lacks, when that is how it showed.
        missing: Option<&'static str>,
    },
    /// The driver works but there is no such device.
    NoDevice {
        /// The ordinal that was asked for.
        ordinal: usize,
        /// How many devices the driver shows.
        found: usize,
        /// What the driver said when it was started.
        reason: String,
    },
    /// The device is older than sm_80.
    Unsupported {
        /// The device's architecture.
        arch: Arch,
        /// What is not supported there.
        what: &'static str,
    },
    /// NVRTC, which compiles kernels at first use, could not be opened.
    NoNvrtc {
        /// Every name and folder that was tried, with the loader's reason.
        tried: Vec<String>,
    },
    /// cuBLAS, which some passes take their matrix products from, could not be opened.
    NoCublas {
        /// Every name and folder that was tried, with the loader's reason.
        tried: Vec<String>,
    },
    /// cuBLAS refused a call.
    Cublas {
        /// What was being done.
        during: &'static str,
        /// Its status, by name where it tells.
        status: String,
    },
    /// NVRTC refused a kernel, or its result failed a check.
    Compile {
        /// Symbol of the kernel.
        kernel: String,
        /// The named constants that it was compiled with.
        constants: String,
        /// The architecture that it was compiled for.
        arch: Arch,
        /// Which check failed.
        reason: String,
        /// NVRTC's log, verbatim.
        log: String,
    },
    /// The driver refused a call.
    Driver {
        /// What was being done.
        during: &'static str,
        /// The driver's name for the error.
        code: CUresult,
        /// The driver's own words.
        reason: String,
    },
    /// The device has not enough free memory.
    OutOfMemory {
        /// What was being allocated.
        during: &'static str,
        /// Bytes asked for.
        bytes: usize,
    },
    /// A tensor has another number of elements than its shape.
    Len {
        /// Name of the tensor.
        tensor: &'static str,
        /// Its dims, such as `[B, T, H, K]`.
        dims: &'static str,
        /// Elements that the shape asks for.
        wanted: usize,
        /// Elements that were given.
        got: usize,
    },
    /// A tensor does not lie where the vector loads of the kernels need it.
    Align {
        /// Name of the tensor.
        tensor: &'static str,
        /// Bytes that its address must be a multiple of.
        wanted: usize,
        /// The address.
        got: u64,
    },
    /// A tensor or stream belongs to another context than the plan.
    Context {
        /// Which one.
        what: &'static str,
    },
    /// A dim has a value that the operator does not take.
    Dim {
        /// Name of the dim.
        dim: &'static str,
        /// What is taken.
        wanted: String,
        /// What was given.
        got: usize,
    },
    /// A tensor is there and must not be, or the other way round.
    Presence {
        /// Name of the tensor.
        tensor: &'static str,
        /// What it must be, and why.
        wanted: &'static str,
    },
    /// A table of slots does not give each sequence its own states of the pool.
    Slots {
        /// What is wrong, with position and values.
        reason: String,
    },
    /// `cu_seqlens` does not describe packed sequences.
    SeqLens {
        /// What is wrong, with position and values.
        reason: String,
    },
    /// An option has a value that the operator does not take.
    Option {
        /// Name of the option.
        option: &'static str,
        /// What is taken.
        wanted: &'static str,
        /// What was given.
        got: String,
    },
    /// Compiled kernels could not be written where the caller asked for them.
    Cache {
        /// The folder or file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

impl Error {
    /// A driver error, with out of memory told apart.
    pub(crate) fn driver(during: &'static str, source: DriverError) -> Self {
        if source.0 == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            return Self::OutOfMemory { during, bytes: 0 };
        }
        // The driver is loaded whenever a call of it has failed, so its text can be asked for.
        Self::Driver { during, code: source.0, reason: source.to_string() }
    }
}

fn version(v: u32) -> String {
    format!("{}.{}", v / 1000, v % 1000 / 10)
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoDriver { tried } => write!(
                f,
                "no CUDA driver was found: install NVIDIA's driver (580 or later), or put the folder of \
                 libcuda.so.1 on LD_LIBRARY_PATH or into FLA_CUDA_LIB_DIR; tried {}",
                tried.join(", ")
            ),
            Self::OldDriver { found, wanted, missing } => {
                write!(f, "the CUDA driver is too old: it supports CUDA {}", version(*found))?;
                if let Some(name) = missing {
                    write!(f, " and lacks `{name}`")?;
                }
                write!(
                    f,
                    ", the bindings are for CUDA {}; update the driver (580 or later for CUDA 13), or build with a \
                     `cuda-` feature of cudarc that it supports",
                    version(*wanted)
                )
            }
            Self::NoDevice { ordinal, found, reason } => write!(
                f,
                "there is no CUDA device {ordinal}: the driver shows {found} ({reason}); check `nvidia-smi` and \
                 CUDA_VISIBLE_DEVICES"
            ),
            Self::Unsupported { arch, what } => {
                write!(f, "{what} needs another GPU than {arch}: sm_80 (Ampere, 2020) or later is supported")
            }
            Self::NoNvrtc { tried } => write!(
                f,
                "NVRTC, which compiles kernels at first use, was not found: install the CUDA toolkit 12.9 or later or \
                 the Python package nvidia-cuda-nvrtc, and name the folder of libnvrtc.so in FLA_CUDA_LIB_DIR; or \
                 ship a filled kernel cache and name it in FLA_CACHE_DIR; tried {}",
                tried.join(", ")
            ),
            Self::NoCublas { tried } => write!(
                f,
                "cuBLAS, which does this pass's matrix products, was not found: install the CUDA toolkit 12.0 or later \
                 or the Python package nvidia-cublas, and name the folder of libcublas.so in FLA_CUDA_LIB_DIR; tried {}",
                tried.join(", ")
            ),
            Self::Cublas { during, status } => write!(f, "cuBLAS failed during {during}: {status}"),
            Self::Compile { kernel, constants, arch, reason, log } => {
                write!(f, "`{kernel}` ({constants}) does not compile for {arch}: {reason}\n{log}")
            }
            Self::Driver { during, code, reason } => {
                write!(f, "the CUDA driver failed during {during}: {code:?}, {reason}")
            }
            Self::OutOfMemory { during, bytes } => {
                write!(f, "the device is out of memory during {during}")?;
                if *bytes > 0 {
                    write!(f, " of {bytes} bytes")?;
                }
                write!(f, "; free some, or use smaller batches")
            }
            Self::Len { tensor, dims, wanted, got } => {
                write!(f, "`{tensor}` is {dims}, which is {wanted} elements here, but holds {got}")
            }
            Self::Align { tensor, wanted, got } => {
                write!(f, "`{tensor}` must lie at a multiple of {wanted} bytes, but lies at {got:#x}")
            }
            Self::Context { what } => {
                write!(f, "{what} belongs to another CUDA context than the device of the plan")
            }
            Self::Presence { tensor, wanted } => write!(f, "`{tensor}` {wanted}"),
            Self::Slots { reason } => write!(f, "`slots` is not valid: {reason}"),
            Self::Dim { dim, wanted, got } => write!(f, "{dim} must be {wanted}, but is {got}"),
            Self::SeqLens { reason } => write!(f, "`cu_seqlens` is not valid: {reason}"),
            Self::Option { option, wanted, got } => {
                write!(f, "option `{option}` must be {wanted}, but is {got}")
            }
            Self::Cache { path, source } => write!(f, "cannot write {}: {source}", path.display()),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Cache { source, .. } => Some(source),
            _ => None,
        }
    }
}
