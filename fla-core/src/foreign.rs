//! Device memory that somebody else owns: another framework's tensor, by pointer and length.

use std::marker::PhantomData;
use std::sync::Arc;

use cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut, DeviceSlice, SyncOnDrop, sys};

/// Borrowed device memory of `len` elements. Nothing is freed and no event is recorded.
///
/// ```no_run
/// # fn f(pointer: u64, stream: &std::sync::Arc<fla_core::cudarc::driver::CudaStream>) {
/// // SAFETY: the tensor behind `pointer` has 4096 elements and outlives `k`.
/// let k = unsafe { fla_core::RawSlice::<half::bf16>::new(pointer, 4096, stream) };
/// # }
/// ```
#[derive(Debug)]
pub struct RawSlice<'a, T> {
    ptr: sys::CUdeviceptr,
    len: usize,
    stream: &'a Arc<CudaStream>,
    memory: PhantomData<&'a mut [T]>,
}

impl<'a, T> RawSlice<'a, T> {
    /// Borrows `len` elements at `ptr`.
    ///
    /// # Safety
    ///
    /// For as long as `'a`: `ptr` holds `len` elements of `T` in the context of `stream`; whatever writes or frees
    /// them is ordered against `stream`; and when the slice is passed as an output, nobody else reads or writes
    /// them.
    pub unsafe fn new(ptr: sys::CUdeviceptr, len: usize, stream: &'a Arc<CudaStream>) -> Self {
        Self { ptr, len, stream, memory: PhantomData }
    }
}

impl<T> DeviceSlice<T> for RawSlice<'_, T> {
    fn len(&self) -> usize {
        self.len
    }

    fn stream(&self) -> &Arc<CudaStream> {
        self.stream
    }
}

impl<T> DevicePtr<T> for RawSlice<'_, T> {
    fn device_ptr<'a>(&'a self, _: &'a CudaStream) -> (sys::CUdeviceptr, SyncOnDrop<'a>) {
        (self.ptr, SyncOnDrop::Sync(None))
    }
}

impl<T> DevicePtrMut<T> for RawSlice<'_, T> {
    fn device_ptr_mut<'a>(&'a mut self, _: &'a CudaStream) -> (sys::CUdeviceptr, SyncOnDrop<'a>) {
        (self.ptr, SyncOnDrop::Sync(None))
    }
}
