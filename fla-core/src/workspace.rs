//! Device memory that several launches of one run share: a buffer of the caller cut into parts, and outputs read again.

use std::cell::Cell;
use std::marker::PhantomData;
use std::sync::Arc;

use cudarc::driver::{CudaStream, DevicePtrMut, SyncOnDrop};

use crate::{Error, RawSlice, check_align, check_len};

/// Every part starts at a multiple of this many bytes: what bulk copies, cuBLAS and whole cache lines like.
const PART_BYTES: usize = 256;

/// One buffer of the caller, from which a run takes its parts in order.
#[derive(Debug)]
pub struct Workspace<'a> {
    ptr: u64,
    bytes: usize,
    taken: Cell<usize>,
    stream: Arc<CudaStream>,
    /// Ends the use of the buffer for cudarc's event tracking when the run has been queued.
    _guard: SyncOnDrop<'a>,
}

impl<'a> Workspace<'a> {
    /// Bytes of a buffer with parts of these many bytes; saturates, so that a sum that no memory holds fits none.
    #[must_use]
    pub fn bytes(parts: &[usize]) -> usize {
        parts.iter().fold(0, |sum, part| {
            sum.saturating_add(part.checked_next_multiple_of(PART_BYTES).unwrap_or(usize::MAX))
        })
    }

    /// Takes the caller's buffer, which has `wanted` bytes, for work on `stream`.
    ///
    /// # Errors
    ///
    /// [`Error::Len`] when it has another length; [`Error::Align`] when it does not start at a multiple of 256 bytes.
    pub fn new(
        stream: &'a CudaStream,
        buffer: &'a mut dyn DevicePtrMut<u8>,
        wanted: usize,
    ) -> Result<Self, Error> {
        check_len("workspace", "workspace_bytes() of the plan", wanted, buffer.len())?;
        let owner = buffer.stream().clone();
        let (ptr, guard) = buffer.device_ptr_mut(stream);
        if !ptr.is_multiple_of(PART_BYTES as u64) {
            return Err(Error::Align { tensor: "workspace", wanted: PART_BYTES, got: ptr });
        }
        Ok(Self { ptr, bytes: wanted, taken: Cell::new(0), stream: owner, _guard: guard })
    }

    /// The next part, with undefined contents.
    ///
    /// # Errors
    ///
    /// [`Error::Len`] when the parts are more than the buffer holds.
    pub fn take<T>(&self, len: usize) -> Result<RawSlice<'_, T>, Error> {
        let start = self.taken.get();
        let end = start.saturating_add(Self::bytes(&[len.saturating_mul(size_of::<T>())]));
        if end > self.bytes {
            check_len("workspace", "the parts of the plan", end, self.bytes)?;
        }
        self.taken.set(end);
        // SAFETY: `start..end` lies inside the buffer, which this borrows mutably for longer than the slice lives; no
        // other part overlaps it; the guard orders the buffer's other uses against the stream of the run.
        Ok(unsafe { RawSlice::new(self.ptr + start as u64, len, &self.stream) })
    }
}

/// An output of the caller that a later launch of the same run reads.
#[derive(Debug)]
pub struct Intermediate<'a, T> {
    ptr: u64,
    len: usize,
    stream: Arc<CudaStream>,
    /// Ends the use of the tensor for cudarc's event tracking when the run has been queued.
    _guard: SyncOnDrop<'a>,
    elements: PhantomData<T>,
}

impl<'a, T> Intermediate<'a, T> {
    /// Takes the output for work on `stream`; `name` is for errors.
    ///
    /// # Errors
    ///
    /// [`Error::Align`] when it does not start at a multiple of 16 bytes.
    pub fn new(
        stream: &'a CudaStream,
        name: &'static str,
        tensor: &'a mut dyn DevicePtrMut<T>,
    ) -> Result<Self, Error> {
        let (owner, len) = (tensor.stream().clone(), tensor.len());
        let (ptr, guard) = tensor.device_ptr_mut(stream);
        check_align(name, ptr)?;
        Ok(Self { ptr, len, stream: owner, _guard: guard, elements: PhantomData })
    }

    /// The tensor, to be written and then read.
    pub fn slice(&mut self) -> RawSlice<'_, T> {
        // SAFETY: the tensor is borrowed mutably for longer than the slice lives, and the guard orders its other uses
        // against the stream of the run.
        unsafe { RawSlice::new(self.ptr, self.len, &self.stream) }
    }
}

#[cfg(test)]
mod tests {
    use super::Workspace;

    #[test]
    fn parts_start_at_multiples_of_256_bytes() {
        assert_eq!(Workspace::bytes(&[]), 0);
        assert_eq!(Workspace::bytes(&[1, 256, 257]), 256 + 256 + 512);
        assert_eq!(Workspace::bytes(&[usize::MAX, 1]), usize::MAX);
    }
}
