//! Matrix products by cuBLAS, which is opened when a plan first needs it.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::fmt;
use std::path::PathBuf;
use std::ptr;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use cudarc::driver::{CudaContext, CudaStream, DevicePtr, DevicePtrMut, DriverError, result, sys};
use libloading::Library;

use crate::{DType, Element, Error, check_len, library};

type Handle = *mut c_void;
type Status = c_int;

/// cuBLAS in one context.
///
/// Bound here and not through cudarc, for the reasons that NVRTC is: cudarc opens the first library that the loader
/// knows and panics where there is none, and its feature would make who links CUDA dynamically link cuBLAS too. Seven
/// functions are needed.
pub struct Cublas {
    functions: &'static Functions,
    /// A handle works for one thread at a time.
    handle: Mutex<OwnedHandle>,
    context: Arc<CudaContext>,
}

impl fmt::Debug for Cublas {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cublas").field("path", &self.functions.path).finish_non_exhaustive()
    }
}

/// One factor of a product, as it lies in memory.
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub enum Factor<'a, T> {
    /// Row-major.
    Plain(&'a dyn DevicePtr<T>),
    /// The transpose lies row-major.
    Transposed(&'a dyn DevicePtr<T>),
}

/// `[m, k]` times `[k, n]`, which gives `[m, n]`, row-major. Any may be 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Product {
    /// Rows of the first factor.
    pub m: usize,
    /// Columns of the second.
    pub n: usize,
    /// What is summed over.
    pub k: usize,
}

impl Cublas {
    /// Device memory that a product wants to have, in bytes: what NVIDIA recommends for Hopper, and more than for others.
    pub const WORKSPACE_BYTES: usize = 32 << 20;

    pub(crate) fn new(context: &Arc<CudaContext>) -> Result<Self, Error> {
        let functions = Functions::get()?;
        context.bind_to_thread().map_err(|error| Error::driver("the start of cuBLAS", error))?;
        let mut handle: Handle = ptr::null_mut();
        // SAFETY: `handle` outlives the call, and the context is current.
        functions.check(unsafe { (functions.create)(&raw mut handle) }, "its start")?;
        let handle = OwnedHandle { functions, handle, context: context.clone() };
        // Sums of 16-bit products stay in f32 also where a product is cut along k; f32 products use no TF32.
        // SAFETY: the handle is live.
        let status = unsafe { (functions.set_math_mode)(handle.handle, NO_REDUCED_PRECISION_SUMS) };
        functions.check(status, "its start")?;
        Ok(Self { functions, handle: Mutex::new(handle), context: context.clone() })
    }

    /// Queues a product on `stream`: sums in f32, rounded once to `U`. Allocates nothing and never waits.
    ///
    /// The first product of a shape loads cuBLAS's own kernel, which the driver refuses inside a graph capture: run once
    /// before capturing. The same inputs give the same bits on the same GPU.
    ///
    /// # Errors
    ///
    /// [`Error::Len`] when a tensor does not hold its matrix; [`Error::Context`]; [`Error::Cublas`] or
    /// [`Error::Driver`] when the product is refused.
    pub fn multiply<T: Element, U: Element>(
        &self,
        stream: &CudaStream,
        product: Product,
        [a, b]: [Factor<'_, T>; 2],
        out: (&mut dyn DevicePtrMut<U>, &mut dyn DevicePtrMut<u8>),
    ) -> Result<(), Error> {
        let Product { m, n, k } = product;
        let (out, workspace) = out;
        if stream.context().cu_ctx() != self.context.cu_ctx() {
            return Err(Error::Context { what: "the stream" });
        }
        check_len("the first factor", "[m, k]", m.saturating_mul(k), a.tensor().len())?;
        check_len("the second factor", "[k, n]", k.saturating_mul(n), b.tensor().len())?;
        check_len("the product", "[m, n]", m.saturating_mul(n), out.len())?;
        let driver = |error: DriverError| Error::driver("a matrix product", error);
        stream.context().bind_to_thread().map_err(driver)?;
        if m == 0 || n == 0 {
            return Ok(());
        }
        let out_bytes = out.len() * size_of::<U>();
        let workspace_bytes = workspace.len();
        let (out_ptr, _out_guard) = out.device_ptr_mut(stream);
        if k == 0 {
            // SAFETY: the tensor has that many bytes, and the guard orders its other uses.
            return unsafe { result::memset_d8_async(out_ptr, 0, out_bytes, stream.cu_stream()) }
                .map_err(driver);
        }
        let (a_ptr, _a_guard) = a.tensor().device_ptr(stream);
        let (b_ptr, _b_guard) = b.tensor().device_ptr(stream);
        let (workspace_ptr, _workspace_guard) = workspace.device_ptr_mut(stream);
        let (one, zero) = (1.0_f32, 0.0_f32);
        let f = self.functions;
        // A panic while it was held cannot have left the handle half changed: every call sets stream and workspace anew.
        let handle = self.handle.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the handle is live and locked, and the context current. Lengths were checked above, so every matrix
        // lies inside its tensor; the guards order the tensors' other uses until the work is queued; both factors
        // outlive the call, which reads them on the host. Row-major matrices are the transposes of column-major ones,
        // so the second factor goes first.
        unsafe {
            f.check((f.set_stream)(handle.handle, stream.cu_stream()), "the choice of a stream")?;
            // A new stream takes the workspace away.
            let status = (f.set_workspace)(handle.handle, workspace_ptr as *mut c_void, workspace_bytes);
            f.check(status, "the choice of a workspace")?;
            let status = (f.gemm_ex)(
                handle.handle,
                b.operation(),
                a.operation(),
                n as i64,
                m as i64,
                k as i64,
                (&raw const one).cast(),
                b_ptr as *const c_void,
                data_type(T::DTYPE),
                b.leading(k, n) as i64,
                a_ptr as *const c_void,
                data_type(T::DTYPE),
                a.leading(m, k) as i64,
                (&raw const zero).cast(),
                out_ptr as *mut c_void,
                data_type(U::DTYPE),
                n as i64,
                COMPUTE_32F,
                DEFAULT_ALGORITHM,
            );
            f.check(status, "a matrix product")
        }
    }
}

impl<T> Factor<'_, T> {
    fn tensor(&self) -> &dyn DevicePtr<T> {
        match self {
            Self::Plain(tensor) | Self::Transposed(tensor) => *tensor,
        }
    }

    fn operation(&self) -> c_int {
        c_int::from(matches!(self, Self::Transposed(_)))
    }

    /// Elements from one row in memory to the next, of a factor that is `rows` by `cols` in the product.
    fn leading(&self, rows: usize, cols: usize) -> usize {
        match self {
            Self::Plain(_) => cols,
            Self::Transposed(_) => rows,
        }
    }
}

// Of library_types.h and cublas_api.h.
const NO_REDUCED_PRECISION_SUMS: c_int = 16;
const COMPUTE_32F: c_int = 68;
const DEFAULT_ALGORITHM: c_int = -1;

const fn data_type(dtype: DType) -> c_int {
    match dtype {
        DType::F32 => 0,
        DType::F16 => 2,
        DType::Bf16 => 14,
    }
}

struct OwnedHandle {
    functions: &'static Functions,
    handle: Handle,
    context: Arc<CudaContext>,
}

// SAFETY: a handle may be used from any thread, by one at a time, which the mutex around it sees to.
unsafe impl Send for OwnedHandle {}

impl Drop for OwnedHandle {
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: the handle is live, nobody else has it, and its context is current.
            let status = unsafe { (self.functions.destroy)(self.handle) };
            if status != 0 {
                tracing::warn!(status, "cuBLAS does not let go of its handle");
            }
        }
    }
}

/// What is called of cuBLAS, opened once per process.
struct Functions {
    path: PathBuf,
    create: unsafe extern "C" fn(*mut Handle) -> Status,
    destroy: unsafe extern "C" fn(Handle) -> Status,
    set_stream: unsafe extern "C" fn(Handle, sys::CUstream) -> Status,
    set_workspace: unsafe extern "C" fn(Handle, *mut c_void, usize) -> Status,
    set_math_mode: unsafe extern "C" fn(Handle, c_int) -> Status,
    gemm_ex: GemmEx,
    status_name: unsafe extern "C" fn(Status) -> *const c_char,
}

type GemmEx = unsafe extern "C" fn(
    Handle,
    c_int,
    c_int,
    i64,
    i64,
    i64,
    *const c_void,
    *const c_void,
    c_int,
    i64,
    *const c_void,
    c_int,
    i64,
    *const c_void,
    *mut c_void,
    c_int,
    i64,
    c_int,
    c_int,
) -> Status;

impl Functions {
    fn get() -> Result<&'static Self, Error> {
        static FUNCTIONS: OnceLock<Result<Functions, Vec<String>>> = OnceLock::new();
        let opened = FUNCTIONS.get_or_init(|| Self::open_first(library::cublas_candidates()));
        opened.as_ref().map_err(|tried| Error::NoCublas { tried: tried.clone() })
    }

    fn open_first(candidates: Vec<PathBuf>) -> Result<Self, Vec<String>> {
        let mut tried = Vec::new();
        for path in candidates {
            match Self::open(path.clone()) {
                Ok(functions) => {
                    tracing::debug!(path = %functions.path.display(), "opened cuBLAS");
                    return Ok(functions);
                }
                Err(reason) => tried.push(format!("{} ({reason})", path.display())),
            }
        }
        tried.push(library::described_places());
        Err(tried)
    }

    fn open(path: PathBuf) -> Result<Self, String> {
        // SAFETY: opening a library runs its initialisers; those of cuBLAS are meant to run this way.
        let library = unsafe { Library::new(&path) }.map_err(|error| library::why(&error))?;
        // The functions are kept for as long as the process runs, and so is the library.
        let library: &'static Library = Box::leak(Box::new(library));
        // SAFETY: the signatures are those of cublas_api.h, where they have not changed since CUDA 12.0.
        unsafe {
            Ok(Self {
                create: symbol(library, b"cublasCreate_v2")?,
                destroy: symbol(library, b"cublasDestroy_v2")?,
                set_stream: symbol(library, b"cublasSetStream_v2")?,
                set_workspace: symbol(library, b"cublasSetWorkspace_v2")?,
                set_math_mode: symbol(library, b"cublasSetMathMode")?,
                gemm_ex: symbol(library, b"cublasGemmEx_64")?,
                status_name: symbol(library, b"cublasGetStatusName")?,
                path,
            })
        }
    }

    fn check(&self, status: Status, during: &'static str) -> Result<(), Error> {
        if status == 0 {
            return Ok(());
        }
        // SAFETY: the function takes any number and returns a constant of the library, or null.
        let name = unsafe { (self.status_name)(status) };
        let status = if name.is_null() {
            status.to_string()
        } else {
            // SAFETY: it is not null, and ends with NUL.
            unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()
        };
        Err(Error::Cublas { during, status })
    }
}

/// A function of the library.
///
/// # Safety
///
/// `F` is the type of the function of that name.
unsafe fn symbol<F: Copy>(library: &'static Library, name: &[u8]) -> Result<F, String> {
    // SAFETY: the caller knows the type.
    unsafe { library.get::<F>(name) }.map(|symbol| *symbol).map_err(|error| library::why(&error))
}

#[cfg(test)]
mod tests {
    use super::{Error, Functions};

    #[test]
    fn a_missing_cublas_is_an_error_that_lists_what_was_tried() {
        let tried =
            Functions::open_first(vec!["/nowhere/libcublas.so.13".into()]).err().expect("it is not there");
        let text = Error::NoCublas { tried }.to_string();
        for part in ["/nowhere/libcublas.so.13 (", "nvidia-cublas", "FLA_CUDA_LIB_DIR"] {
            assert!(text.contains(part), "{part} is not in: {text}");
        }
    }

    #[test]
    fn a_library_without_the_needed_functions_is_not_cublas() {
        // The C library is on the loader's path of every Linux, and has none of them.
        let tried = Functions::open_first(vec!["libc.so.6".into()]).err().expect("it is another library");
        assert!(tried[0].contains("cublasCreate_v2"), "{tried:?}");
    }
}
