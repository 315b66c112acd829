//! A compiled kernel, and the one place that launches.

use std::ffi::c_void;
use std::marker::PhantomData;
use std::mem::zeroed;
use std::ptr;
use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaFunction, CudaStream, DevicePtr, DevicePtrMut, SyncOnDrop, sys};

use crate::{Error, Params, Ptr, PtrMut, Shape};

/// Every tensor starts at a multiple of this many bytes, which is what the widest loads need.
pub const ALIGN_BYTES: usize = 16;

/// How many blocks a launch has, and how they relate to each other and to the launch before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    blocks: [u32; 3],
    cluster: u32,
    dependent: bool,
}

impl Grid {
    /// `blocks` blocks along x, which takes up to `2^31 - 1`; y and z end at 65535, so no size that a user
    /// chooses belongs there.
    #[must_use]
    pub const fn x(blocks: u32) -> Self {
        Self::xyz([blocks, 1, 1])
    }

    /// `blocks` blocks along x for each head of each sequence; none when that makes no block.
    ///
    /// # Errors
    ///
    /// [`Error::Dim`] when they are more than a launch has.
    pub fn of_heads(shape: &Shape, blocks: usize) -> Result<Option<Self>, Error> {
        let heads = shape.seqs.n().saturating_mul(shape.h);
        match i32::try_from(heads.saturating_mul(blocks)) {
            Ok(0) => Ok(None),
            Ok(all) => Ok(Some(Self::x(all as u32))),
            Err(_) => {
                let wanted = format!("at most {}", i32::MAX as usize / blocks);
                Err(Error::Dim { dim: "N * H", wanted, got: heads })
            }
        }
    }

    /// Blocks along three axes; y and z for small counts that the kernel fixes.
    #[must_use]
    pub const fn xyz(blocks: [u32; 3]) -> Self {
        Self { blocks, cluster: 1, dependent: false }
    }

    /// Groups this many neighbours along x into a cluster (sm_90 and later; up to 8 everywhere).
    #[must_use]
    pub const fn with_cluster(mut self, blocks: u32) -> Self {
        self.cluster = blocks;
        self
    }

    /// Lets the launch start while the one before it in the stream still runs (sm_90 and later).
    ///
    /// Only for kernels that call `griddepcontrol_wait` before they touch memory: that waits until the launch
    /// before has ended and its writes are visible, so results do not change.
    #[must_use]
    pub const fn with_dependent_launch(mut self, allowed: bool) -> Self {
        self.dependent = allowed;
        self
    }
}

/// A kernel of a device, which takes `P` and nothing else.
#[derive(Clone, Debug)]
pub struct Kernel<P> {
    function: CudaFunction,
    context: Arc<CudaContext>,
    threads: u32,
    smem_bytes: u32,
    params: PhantomData<fn(P)>,
}

impl<P: Params> Kernel<P> {
    pub(crate) fn new(
        function: CudaFunction,
        context: Arc<CudaContext>,
        threads: u32,
        smem_bytes: u32,
    ) -> Self {
        Self { function, context, threads, smem_bytes, params: PhantomData }
    }

    /// Registers of a thread, as the driver reports them.
    ///
    /// # Errors
    ///
    /// [`Error::Driver`].
    pub fn registers(&self) -> Result<u32, Error> {
        let registers =
            self.function.num_regs().map_err(|error| Error::driver("a query of registers", error))?;
        Ok(u32::try_from(registers).unwrap_or(0))
    }

    /// Blocks that run on one multiprocessor at a time.
    ///
    /// # Errors
    ///
    /// [`Error::Driver`].
    pub fn blocks_per_sm(&self) -> Result<u32, Error> {
        self.function
            .occupancy_max_active_blocks_per_multiprocessor(self.threads, self.smem_bytes as usize, None)
            .map_err(|error| Error::driver("a query of occupancy", error))
    }

    /// Queues a launch on `stream`.
    ///
    /// `bind` builds the parameters; the tensors that it names stay borrowed, and their reads and writes are
    /// recorded for cudarc's event tracking, until the launch is queued. Nothing is allocated on the device and
    /// nothing synchronises, so the launch can be captured in a graph.
    ///
    /// # Errors
    ///
    /// [`Error::Context`] when `stream` belongs to another context; [`Error::Align`] when a tensor does not start
    /// at a multiple of [`ALIGN_BYTES`]; [`Error::Driver`] when the launch is refused. Nothing has been launched
    /// then.
    pub fn launch<'a>(
        &self,
        stream: &'a CudaStream,
        grid: Grid,
        bind: impl FnOnce(&mut Binder<'a>) -> P,
    ) -> Result<(), Error> {
        if stream.context().cu_ctx() != self.context.cu_ctx() {
            return Err(Error::Context { what: "the stream" });
        }
        stream.context().bind_to_thread().map_err(|error| Error::driver("a launch", error))?;
        let mut binder = Binder { stream, guards: Vec::with_capacity(16), misaligned: None };
        let mut params = bind(&mut binder);
        if let Some(error) = binder.misaligned.take() {
            return Err(error);
        }
        let (mut attributes, mut count) = ([no_attribute(); 2], 0);
        if grid.cluster > 1 {
            attributes[count].id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
            attributes[count].value.clusterDim =
                sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x: grid.cluster, y: 1, z: 1 };
            count += 1;
        }
        if grid.dependent {
            attributes[count].id =
                sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
            attributes[count].value.programmaticStreamSerializationAllowed = 1;
            count += 1;
        }
        let config = sys::CUlaunchConfig {
            gridDimX: grid.blocks[0],
            gridDimY: grid.blocks[1],
            gridDimZ: grid.blocks[2],
            blockDimX: self.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: self.smem_bytes,
            hStream: stream.cu_stream(),
            attrs: attributes.as_mut_ptr(),
            numAttrs: count as u32,
        };
        let mut arguments: [*mut c_void; 1] = [(&raw mut params).cast()];
        // SAFETY: the unit asserted, while it was compiled, that `P` is the kernel's only parameter, field by
        // field; `config`, `attributes` and `params` outlive the call, which copies them; the function belongs
        // to the current context; `binder` keeps every tensor borrowed until the launch is queued. What the
        // kernel does with the pointers is checked by the plan that made `params`.
        let status = unsafe {
            sys::cuLaunchKernelEx(
                &raw const config,
                self.function.cu_function(),
                arguments.as_mut_ptr(),
                ptr::null_mut(),
            )
        };
        let launched = status.result().map_err(|error| Error::driver("a launch", error));
        drop(binder);
        launched
    }
}

fn no_attribute() -> sys::CUlaunchAttribute {
    // SAFETY: the struct is plain C data, a tag and a union, for which zero is a value ("ignore").
    unsafe { zeroed() }
}

/// Takes the device pointers of tensors for one launch and holds the tensors until it is queued.
#[derive(Debug)]
pub struct Binder<'a> {
    stream: &'a CudaStream,
    guards: Vec<SyncOnDrop<'a>>,
    misaligned: Option<Error>,
}

impl<'a> Binder<'a> {
    /// A tensor that the kernel reads; `name` is for errors.
    pub fn read<T>(&mut self, name: &'static str, tensor: &'a (impl DevicePtr<T> + ?Sized)) -> Ptr<T> {
        let (ptr, guard) = tensor.device_ptr(self.stream);
        self.guards.push(guard);
        self.check(name, ptr);
        Ptr(ptr, PhantomData)
    }

    /// The same; null when absent.
    pub fn read_opt<T>(
        &mut self,
        name: &'static str,
        tensor: Option<&'a (impl DevicePtr<T> + ?Sized)>,
    ) -> Ptr<T> {
        tensor.map_or(Ptr::NULL, |tensor| self.read(name, tensor))
    }

    /// A tensor that the kernel writes, or reads and writes.
    pub fn write<T>(
        &mut self,
        name: &'static str,
        tensor: &'a mut (impl DevicePtrMut<T> + ?Sized),
    ) -> PtrMut<T> {
        let (ptr, guard) = tensor.device_ptr_mut(self.stream);
        self.guards.push(guard);
        self.check(name, ptr);
        PtrMut(ptr, PhantomData)
    }

    /// The same; null when absent.
    pub fn write_opt<T>(
        &mut self,
        name: &'static str,
        tensor: Option<&'a mut (impl DevicePtrMut<T> + ?Sized)>,
    ) -> PtrMut<T> {
        match tensor {
            Some(tensor) => self.write(name, tensor),
            None => PtrMut::NULL,
        }
    }

    fn check(&mut self, tensor: &'static str, ptr: u64) {
        if let (Err(error), None) = (check_align(tensor, ptr), &self.misaligned) {
            self.misaligned = Some(error);
        }
    }
}

/// Checks that a tensor starts where the vector loads of the kernels need it. Launches do so themselves; this is for
/// passes of several launches, which check everything before the first.
///
/// # Errors
///
/// [`Error::Align`], which names the tensor.
pub fn check_align(tensor: &'static str, ptr: u64) -> Result<(), Error> {
    if ptr.is_multiple_of(ALIGN_BYTES as u64) {
        return Ok(());
    }
    Err(Error::Align { tensor, wanted: ALIGN_BYTES, got: ptr })
}

/// Checks that a tensor has as many elements as its dims say.
///
/// # Errors
///
/// [`Error::Len`], which names the tensor and both counts.
pub fn check_len(tensor: &'static str, dims: &'static str, wanted: usize, got: usize) -> Result<(), Error> {
    if wanted == got { Ok(()) } else { Err(Error::Len { tensor, dims, wanted, got }) }
}
