#![doc = include_str!("../README.md")]

mod chunk_tiles;
mod gates;
mod shape;

mod chunk_bwd;
mod chunk_bwd_sm90;
mod chunk_fwd;
mod chunk_fwd_sm90;

mod recurrent_bwd;
mod recurrent_fwd;

mod config;

pub use fla_core::{
    Arch, Cache, Device, Element, Error, FinalState, RawSlice, SeqLens, StateElement, StatePool, check_slots,
    cudarc,
};

pub use crate::chunk_bwd::{ChunkBwd, ChunkBwdInputs, ChunkBwdOutputs, ChunkBwdResult, chunk_bwd};
pub use crate::chunk_fwd::{
    ChunkFwd, ChunkFwdInputs, ChunkFwdOptions, ChunkFwdOutputs, ChunkFwdResult, chunk_fwd,
};
pub use crate::gates::{Beta, BetaForm, BetaMap, ChannelGates, Gate, GateForm, QkNorm, StateLayout};
pub use crate::recurrent_bwd::{
    GateGrads, RecurrentBwd, RecurrentBwdInputs, RecurrentBwdOutputs, RecurrentBwdResult, recurrent_bwd,
};
pub use crate::recurrent_fwd::{
    RecurrentFwd, RecurrentFwdInputs, RecurrentFwdOptions, RecurrentFwdOutputs, RecurrentFwdResult,
    recurrent_fwd,
};
pub use crate::shape::Shape;

/// The kernels that most users run, for compiling ahead with [`Cache::warm`] and for checks: every pass with
/// heads of 64 and 128 channels in every dtype, some uneven shapes, and every option.
#[must_use]
pub fn units(arch: Arch) -> Vec<fla_core::Unit> {
    let mut units = recurrent_fwd::units(arch);
    units.extend(recurrent_bwd::units(arch));
    units.extend(chunk_fwd::units(arch));
    units.extend(chunk_bwd::units(arch));
    units
}
