#![doc = include_str!("../README.md")]

/// Compiles the example of the workspace's front page; outside of this package, so only in a checkout.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct FrontPage;

mod fused_mul_recurrent_bwd;
mod fused_mul_recurrent_fwd;
mod recurrent_bwd;
mod recurrent_fwd;

pub use fla_core::{
    Arch, Cache, Device, Element, Error, FinalState, RawSlice, SeqLens, Shape, StateElement, StatePool,
    check_slots, cudarc,
};

pub use crate::fused_mul_recurrent_bwd::{
    FusedMulRecurrentBwd, FusedMulRecurrentBwdInputs, FusedMulRecurrentBwdOutputs,
    FusedMulRecurrentBwdResult, fused_mul_recurrent_bwd,
};
pub use crate::fused_mul_recurrent_fwd::{
    FusedMulRecurrentFwd, FusedMulRecurrentFwdInputs, fused_mul_recurrent_fwd,
};
pub use crate::recurrent_bwd::{
    RecurrentBwd, RecurrentBwdInputs, RecurrentBwdOutputs, RecurrentBwdResult, recurrent_bwd,
};
pub use crate::recurrent_fwd::{
    RecurrentFwd, RecurrentFwdInputs, RecurrentFwdOptions, RecurrentFwdOutputs, RecurrentFwdResult,
    recurrent_fwd,
};

/// The kernels that most users run, for compiling ahead with [`Cache::warm`]: those of `fla-dplr`.
#[must_use]
pub fn units(arch: Arch) -> Vec<fla_core::Unit> {
    fla_dplr::units(arch)
}
