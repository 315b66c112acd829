//! Tensor maps: how the bulk copy engine walks a matrix in global memory.

use std::ffi::c_void;
use std::mem::MaybeUninit;

use cudarc::driver::{CudaStream, DevicePtr, SyncOnDrop, sys};

use crate::{DType, Element, Error};

/// A descriptor for bulk tensor copies, passed by value inside a parameter struct.
///
/// Twin of `fla::TensorMap`. cudarc's own type has another alignment and would not match there.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug)]
pub struct TensorMap([u64; 16]);

/// How rows of a tile are permuted in shared memory so that columns can be read without bank conflicts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Swizzle {
    /// Rows lie one after the other.
    None,
    /// Within 128 bytes, as `wgmma` and `ldmatrix` read them.
    Bytes128,
}

/// A row-major matrix, seen by the copy engine, and the tile that one copy moves.
#[derive(Clone, Copy, Debug)]
pub struct Matrix {
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// Elements from one row to the next; a multiple of 16 bytes.
    pub row_stride: usize,
    /// Rows of a tile, at most 256.
    pub tile_rows: usize,
    /// Columns of a tile; with [`Swizzle::Bytes128`] exactly 128 bytes.
    pub tile_cols: usize,
    /// Order within shared memory.
    pub swizzle: Swizzle,
}

impl TensorMap {
    /// Describes `tensor` as a matrix. Elements past its edge are read as 0 and not written.
    ///
    /// The map holds the address, so the tensor must outlive the launches that use it; the guard that comes with
    /// it belongs in scope until they are queued.
    ///
    /// # Errors
    ///
    /// [`Error::Len`] when the tensor is shorter than the matrix; [`Error::Driver`] when the driver refuses the
    /// sizes.
    pub fn new<'a, T: Element>(
        stream: &'a CudaStream,
        tensor: &'a (impl DevicePtr<T> + ?Sized),
        matrix: &Matrix,
    ) -> Result<(Self, SyncOnDrop<'a>), Error> {
        let wanted = match matrix.rows {
            0 => 0,
            rows => (rows - 1).saturating_mul(matrix.row_stride).saturating_add(matrix.cols),
        };
        if tensor.len() < wanted {
            return Err(Error::Len { tensor: "matrix", dims: "[rows, cols]", wanted, got: tensor.len() });
        }
        let kind = match T::DTYPE {
            DType::F32 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
            DType::Bf16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            DType::F16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        };
        let swizzle = match matrix.swizzle {
            Swizzle::None => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_NONE,
            Swizzle::Bytes128 => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
        };
        let dims = [matrix.cols as u64, matrix.rows as u64];
        let strides = [(matrix.row_stride * size_of::<T>()) as u64];
        let tile = [narrow(matrix.tile_cols), narrow(matrix.tile_rows)];
        let steps = [1u32, 1];
        let (address, guard) = tensor.device_ptr(stream);
        let mut map = MaybeUninit::<sys::CUtensorMap>::uninit();
        // SAFETY: the arrays have the two (and one) entries that rank 2 asks for and outlive the call, which only
        // computes the descriptor; on success it is fully written.
        let words = unsafe {
            sys::cuTensorMapEncodeTiled(
                map.as_mut_ptr(),
                kind,
                2,
                address as *mut c_void,
                dims.as_ptr(),
                strides.as_ptr(),
                tile.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
            .result()
            .map_err(|error| Error::driver("the encoding of a tensor map", error))?;
            map.assume_init().opaque
        };
        Ok((Self(words), guard))
    }
}

/// A size that does not fit is refused by the driver like any other that is too large.
fn narrow(x: usize) -> u32 {
    u32::try_from(x).unwrap_or(u32::MAX)
}
