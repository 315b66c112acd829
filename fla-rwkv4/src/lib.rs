#![doc = include_str!("../README.md")]

mod shape;

mod chunk_fwd;

mod chunk_bwd;

mod recurrent_fwd;

mod recurrent_bwd;

mod config;

pub use fla_core::{
    Arch, Cache, Device, Element, Error, FinalState, RawSlice, SeqLens, StatePool, check_slots, cudarc,
};

pub use crate::chunk_bwd::{
    ChunkBwd, ChunkBwdInputs, ChunkBwdOptions, ChunkBwdOutputs, ChunkBwdResult, chunk_bwd,
};
pub use crate::chunk_fwd::{
    ChunkFwd, ChunkFwdInputs, ChunkFwdOptions, ChunkFwdOutputs, ChunkFwdResult, chunk_fwd,
};
pub use crate::recurrent_bwd::{
    RecurrentBwd, RecurrentBwdInputs, RecurrentBwdOptions, RecurrentBwdOutputs, RecurrentBwdResult,
    recurrent_bwd,
};
pub use crate::recurrent_fwd::{
    RecurrentFwd, RecurrentFwdInputs, RecurrentFwdOptions, RecurrentFwdOutputs, RecurrentFwdResult,
    recurrent_fwd,
};
pub use crate::shape::{CHUNK, Shape};

/// The kernels that most users run, for compiling ahead with [`Cache::warm`] and for checks: every pass with the
/// channels of RWKV-4's models in every dtype, and some uneven counts.
#[must_use]
pub fn units(arch: Arch) -> Vec<fla_core::Unit> {
    let mut out = chunk_fwd::units(arch);
    out.extend(chunk_bwd::units(arch));
    out.extend(recurrent_fwd::units(arch));
    out.extend(recurrent_bwd::units(arch));
    out
}
