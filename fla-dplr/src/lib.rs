#![doc = include_str!("../README.md")]

mod chunk_bwd;
mod chunk_fwd;
mod recurrent_bwd;
mod recurrent_fwd;

mod config;
mod segments;

pub use fla_core::{
    Arch, Cache, Device, Element, Error, FinalState, RawSlice, SavedStates, SeqLens, Shape, StateElement,
    StatePool, check_slots, cudarc,
};

pub use crate::chunk_bwd::{ChunkBwd, ChunkBwdInputs, ChunkBwdOutputs, ChunkBwdResult, chunk_bwd};
pub use crate::chunk_fwd::{
    ChunkFwd, ChunkFwdInputs, ChunkFwdOptions, ChunkFwdOutputs, ChunkFwdResult, Decay, chunk_fwd,
};
pub use crate::recurrent_bwd::{
    RecurrentBwd, RecurrentBwdInputs, RecurrentBwdOutputs, RecurrentBwdResult, recurrent_bwd,
};
pub use crate::recurrent_fwd::{
    RecurrentFwd, RecurrentFwdInputs, RecurrentFwdOptions, RecurrentFwdOutputs, RecurrentFwdResult,
    Transition, recurrent_fwd,
};

/// The kernels that most users run, for compiling ahead with [`Cache::warm`] and for checks: every pass with
/// heads of 64 and 128 channels in every dtype, and some uneven shapes.
#[must_use]
pub fn units(arch: Arch) -> Vec<fla_core::Unit> {
    let mut units = chunk_fwd::units(arch);
    units.extend(chunk_bwd::units(arch));
    units.extend(segments::units());
    units.extend(recurrent_fwd::units(arch));
    units.extend(recurrent_bwd::units(arch));
    units
}
