#![doc = include_str!("../README.md")]

mod arch;
mod dtype;
mod shape;

mod chunks;
mod foreign;
mod workspace;

mod device;
mod error;
mod library;

mod cache;
pub mod compile;
mod params;
mod unit;

mod cublas;
mod kernel;
mod recurrent;
mod smem;
mod state;
mod tma;

#[cfg(feature = "testing")]
pub mod testing;

pub use cudarc;

pub use crate::arch::Arch;
pub use crate::cache::Cache;
pub use crate::chunks::{ChunkCut, Chunks, HeadShares};
pub use crate::cublas::{Cublas, Factor, Product};
pub use crate::device::Device;
pub use crate::dtype::{DType, Element};
pub use crate::error::Error;
pub use crate::foreign::RawSlice;
pub use crate::kernel::{ALIGN_BYTES, Binder, Grid, Kernel, check_align, check_len};
pub use crate::params::{Field, Params, Ptr, PtrMut};
pub use crate::recurrent::{StateStream, StateTile, WalkBack};
pub use crate::shape::{SeqLens, Shape};
pub use crate::smem::SmemLayout;
pub use crate::state::{
    FinalState, SavedStates, StateDims, StateElement, StatePool, StateShape, StateTensors, States,
    check_slots,
};
pub use crate::tma::{Matrix, Swizzle, TensorMap};
pub use crate::unit::{Constant, Source, Unit};
pub use crate::workspace::{Intermediate, Workspace};

/// The CUDA building blocks that kernels of every crate may include.
pub const HEADERS: &[Source] = &[
    Source { name: "fla/core/prelude.cuh", text: include_str!("../kernels/prelude.cuh") },
    Source { name: "fla/core/math.cuh", text: include_str!("../kernels/math.cuh") },
    Source { name: "fla/core/warp.cuh", text: include_str!("../kernels/warp.cuh") },
    Source { name: "fla/core/copy.cuh", text: include_str!("../kernels/copy.cuh") },
    Source { name: "fla/core/barrier.cuh", text: include_str!("../kernels/barrier.cuh") },
    Source { name: "fla/core/tma.cuh", text: include_str!("../kernels/tma.cuh") },
    Source { name: "fla/core/mma.cuh", text: include_str!("../kernels/mma.cuh") },
    Source { name: "fla/core/wgmma.cuh", text: include_str!("../kernels/wgmma.cuh") },
    Source { name: "fla/core/tile.cuh", text: include_str!("../kernels/tile.cuh") },
    Source { name: "fla/core/blocks.cuh", text: include_str!("../kernels/blocks.cuh") },
    Source { name: "fla/core/chunk.cuh", text: include_str!("../kernels/chunk.cuh") },
    Source { name: "fla/core/decay.cuh", text: include_str!("../kernels/decay.cuh") },
    Source { name: "fla/core/scan.cuh", text: include_str!("../kernels/scan.cuh") },
    Source { name: "fla/core/states.cuh", text: include_str!("../kernels/states.cuh") },
    Source { name: "fla/core/recurrent.cuh", text: include_str!("../kernels/recurrent.cuh") },
    Source { name: "fla/core/token_ring.cuh", text: include_str!("../kernels/token_ring.cuh") },
    Source { name: "fla/core/recurrent_bwd.cuh", text: include_str!("../kernels/recurrent_bwd.cuh") },
    Source { name: "fla/core/recurrent_stream.cuh", text: include_str!("../kernels/recurrent_stream.cuh") },
    Source { name: "fla/core/operand.cuh", text: include_str!("../kernels/operand.cuh") },
    Source { name: "fla/core/tri_inverse.cuh", text: include_str!("../kernels/tri_inverse.cuh") },
];
