//! A GPU as this workspace's operators see it: context, architecture, limits, and its kernels.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use cudarc::driver::sys::{CUdevice_attribute as Attribute, CUfunction_attribute, CUresult};
use cudarc::driver::{
    CudaContext, CudaFunction, CudaSlice, CudaStream, DeviceRepr, DriverError, result, sys,
};
use cudarc::nvrtc::Ptx;

use crate::cache::Origin;
use crate::{Arch, Cache, Cublas, Error, Kernel, Params, Shape, Unit, library};

/// A GPU: its context, what it can do, and the kernels that were loaded for it.
///
/// Cheap to clone; clones share the kernels. Every operator's plan is made from one.
#[derive(Clone, Debug)]
pub struct Device {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    context: Arc<CudaContext>,
    arch: Arch,
    sm_count: u32,
    smem_bytes: u32,
    l2_bytes: usize,
    cache: Cache,
    /// By symbol and text of the unit. The inner lock lets one thread compile while others take other kernels.
    kernels: Mutex<HashMap<String, Arc<Mutex<Option<CudaFunction>>>>>,
    cublas: Mutex<Option<Arc<Cublas>>>,
}

impl Device {
    /// Opens the device with this ordinal, on its primary context, which other libraries of the process share.
    ///
    /// # Errors
    ///
    /// [`Error::NoDriver`], [`Error::OldDriver`], [`Error::NoDevice`], [`Error::Unsupported`] below sm_80;
    /// [`Error::Driver`] for anything else that the driver says.
    pub fn new(ordinal: usize) -> Result<Self, Error> {
        library::probe_driver()?;
        let no_device = |found: usize, source: DriverError| Error::NoDevice {
            ordinal,
            found,
            reason: source.error_string().map_or_else(
                |_| format!("{:?}", source.0),
                |text| format!("{:?}: {}", source.0, text.to_string_lossy()),
            ),
        };
        // cuInit fails without a device, and every later call fails without cuInit.
        result::init().map_err(|error| no_device(0, error))?;
        let count =
            result::device::get_count().map_err(|error| Error::driver("a count of devices", error))?;
        let found = usize::try_from(count).unwrap_or(0);
        if ordinal >= found {
            return Err(no_device(found, DriverError(CUresult::CUDA_ERROR_INVALID_DEVICE)));
        }
        let context =
            CudaContext::new(ordinal).map_err(|error| Error::driver("the start of a context", error))?;
        Self::from_context(context)
    }

    /// Opens the device of a context that the caller already has.
    ///
    /// # Errors
    ///
    /// As [`Device::new`].
    pub fn from_context(context: Arc<CudaContext>) -> Result<Self, Error> {
        library::probe_driver()?;
        let attribute = |which: Attribute| -> Result<u32, Error> {
            let value =
                context.attribute(which).map_err(|error| Error::driver("a query of the device", error))?;
            Ok(u32::try_from(value).unwrap_or(0))
        };
        let arch = Arch::new(
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        if !arch.is_supported() {
            return Err(Error::Unsupported { arch, what: "this library" });
        }
        let inner = Inner {
            arch,
            sm_count: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            smem_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
            l2_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)? as usize,
            context,
            cache: Cache::from_env(),
            kernels: Mutex::default(),
            cublas: Mutex::default(),
        };
        tracing::debug!(arch = %inner.arch, sm_count = inner.sm_count, "opened a device");
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The same device with another cache of compiled kernels, and none loaded yet.
    #[must_use]
    pub fn with_cache(&self, cache: Cache) -> Self {
        let Inner { context, arch, sm_count, smem_bytes, l2_bytes, .. } = &*self.inner;
        let inner = Inner {
            context: context.clone(),
            arch: *arch,
            sm_count: *sm_count,
            smem_bytes: *smem_bytes,
            l2_bytes: *l2_bytes,
            cache,
            kernels: Mutex::default(),
            cublas: Mutex::default(),
        };
        Self { inner: Arc::new(inner) }
    }

    /// The context, for streams and memory.
    #[must_use]
    pub fn context(&self) -> &Arc<CudaContext> {
        &self.inner.context
    }

    /// The architecture that kernels are compiled for.
    #[must_use]
    pub fn arch(&self) -> Arch {
        self.inner.arch
    }

    /// Multiprocessors.
    #[must_use]
    pub fn sm_count(&self) -> u32 {
        self.inner.sm_count
    }

    /// Refuses a head for which a block needs more shared memory than it has, however the work is cut.
    ///
    /// # Errors
    ///
    /// [`Error::Dim`], of K.
    pub fn check_smem(&self, shape: &Shape, needed: usize) -> Result<(), Error> {
        let smem_bytes = self.smem_bytes() as usize;
        if needed <= smem_bytes {
            return Ok(());
        }
        let wanted = format!(
            "less in this type, for which a block needs {needed} bytes of shared memory and has {smem_bytes}"
        );
        Err(Error::Dim { dim: "K", wanted, got: shape.k })
    }

    /// Shared memory that one block can ask for, in bytes.
    #[must_use]
    pub fn smem_bytes(&self) -> u32 {
        self.inner.smem_bytes
    }

    /// Second-level cache, in bytes.
    #[must_use]
    pub fn l2_bytes(&self) -> usize {
        self.inner.l2_bytes
    }

    /// CUDA version that the driver supports, as `1000 * major + 10 * minor`; 0 when it does not say.
    #[must_use]
    pub fn driver_version(&self) -> u32 {
        let mut version = 0;
        // SAFETY: the driver is loaded, since this device is open, and `version` outlives the call.
        let status = unsafe { sys::cuDriverGetVersion(&raw mut version) };
        if status == CUresult::CUDA_SUCCESS { u32::try_from(version).unwrap_or(0) } else { 0 }
    }

    /// Where compiled kernels are kept.
    #[must_use]
    pub fn cache(&self) -> &Cache {
        &self.inner.cache
    }

    /// A unit as a kernel of this device: from memory, else from disk, else compiled.
    ///
    /// # Errors
    ///
    /// [`Error::NoNvrtc`] and [`Error::Compile`] when it has to be compiled and cannot be; [`Error::Driver`] when
    /// the driver refuses the result; [`Error::Option`] when `P` is not the unit's parameter struct.
    pub fn kernel<P: Params>(&self, unit: &Unit) -> Result<Kernel<P>, Error> {
        if unit.layout() != crate::params::Layout::of::<P>() {
            let got = unit.layout().cuda_type.to_owned();
            return Err(Error::Option { option: "P", wanted: P::CUDA_TYPE, got });
        }
        let text = unit.text();
        let slot = {
            // A panic while the map was held cannot have left it half changed.
            let mut kernels = self.inner.kernels.lock().unwrap_or_else(PoisonError::into_inner);
            kernels.entry(text).or_default().clone()
        };
        let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
        let function = match &*slot {
            Some(function) => function.clone(),
            None => slot.insert(self.load(unit)?).clone(),
        };
        Ok(Kernel::new(function, self.context().clone(), unit.threads(), unit.smem_bytes()))
    }

    fn load(&self, unit: &Unit) -> Result<CudaFunction, Error> {
        let Inner { cache, arch, .. } = &*self.inner;
        let start = Instant::now();
        let span = tracing::debug_span!("fla.load", kernel = %unit.symbol(), arch = %arch);
        let _entered = span.enter();
        let cubin = cache.get(unit, *arch)?;
        let origin = cubin.origin;
        let function = match self.load_cubin(unit, cubin.bytes) {
            Err(error) if origin == Origin::Disk => {
                tracing::warn!(%error, "the driver refuses a kernel from the cache; it will be compiled again");
                cache.remove(unit, *arch);
                self.load_cubin(unit, cache.get(unit, *arch)?.bytes)?
            }
            other => other?,
        };
        tracing::debug!(?origin, ms = start.elapsed().as_secs_f64() * 1e3, "loaded");
        Ok(function)
    }

    fn load_cubin(&self, unit: &Unit, cubin: Vec<u8>) -> Result<CudaFunction, Error> {
        let driver = |error| Error::driver("the load of a kernel", error);
        let module = self.context().load_module(Ptx::from_binary(cubin)).map_err(driver)?;
        let function = module.load_function(&unit.symbol()).map_err(driver)?;
        if unit.smem_bytes() > 0 {
            let bytes = i32::try_from(unit.smem_bytes()).unwrap_or(i32::MAX);
            let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            function.set_attribute(attribute, bytes).map_err(driver)?;
        }
        // Functions load lazily; asking for a property loads this one now and not inside a graph capture.
        function.num_regs().map_err(driver)?;
        Ok(function)
    }

    /// cuBLAS on this device; one handle, which the device keeps.
    ///
    /// # Errors
    ///
    /// [`Error::NoCublas`] when there is none; [`Error::Cublas`] when it does not start.
    pub fn cublas(&self) -> Result<Arc<Cublas>, Error> {
        // A panic while it was held cannot have left it half changed.
        let mut cublas = self.inner.cublas.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(cublas) = &*cublas {
            return Ok(cublas.clone());
        }
        Ok(cublas.insert(Arc::new(Cublas::new(self.context())?)).clone())
    }

    /// Device memory for `len` elements with undefined contents, for outputs that a pass writes whole.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`] with the number of bytes; [`Error::Driver`].
    pub fn alloc<T: DeviceRepr>(&self, stream: &Arc<CudaStream>, len: usize) -> Result<CudaSlice<T>, Error> {
        let bytes = len.saturating_mul(size_of::<T>());
        if isize::try_from(bytes).is_err() {
            // No memory holds it, and cudarc's product of both would wrap.
            return Err(Error::OutOfMemory { during: "an allocation", bytes });
        }
        // SAFETY: callers pass the memory to a kernel that writes all of it before anybody reads.
        let slice = unsafe { stream.alloc::<T>(len) };
        slice.map_err(|error| match Error::driver("an allocation", error) {
            Error::OutOfMemory { during, .. } => Error::OutOfMemory { during, bytes },
            other => other,
        })
    }

    /// Offsets of packed sequences on the device, for kernels: `[N + 1]`, i64.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`] or [`Error::Driver`].
    pub fn upload_offsets(&self, offsets: &[usize]) -> Result<CudaSlice<i64>, Error> {
        let offsets: Vec<i64> = offsets.iter().map(|offset| *offset as i64).collect();
        self.upload("the upload of cu_seqlens", &offsets)
    }

    /// A copy of what a plan holds, on the default stream.
    pub(crate) fn upload<T: DeviceRepr + Clone>(
        &self,
        during: &'static str,
        values: &[T],
    ) -> Result<CudaSlice<T>, Error> {
        let driver = |error| Error::driver(during, error);
        let stream = self.context().default_stream();
        let slice = stream.clone_htod(values).map_err(driver)?;
        // Plans run on any stream, so the copy must have ended before the plan is handed out.
        stream.synchronize().map_err(driver)?;
        Ok(slice)
    }
}
