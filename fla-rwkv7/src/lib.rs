#![doc = include_str!("../README.md")]

/// Compiles the example of the workspace's front page; outside of this package, so only in a checkout.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct FrontPage;

mod chunk_bwd;
mod chunk_fwd;
mod fused;
mod fused_mul_chunk_bwd;
mod fused_mul_chunk_fwd;
mod fused_mul_recurrent_bwd;
mod fused_mul_recurrent_fwd;
mod recurrent_bwd;
mod recurrent_fwd;

mod config;

pub use fla_core::{
    Arch, Cache, Device, Element, Error, FinalState, RawSlice, SeqLens, Shape, StateElement, StatePool,
    check_slots, cudarc,
};
pub use fla_dplr::{Decay, SavedStates};

pub use crate::chunk_bwd::{ChunkBwd, ChunkBwdInputs, ChunkBwdOutputs, ChunkBwdResult, chunk_bwd};
pub use crate::chunk_fwd::{
    ChunkFwd, ChunkFwdInputs, ChunkFwdOptions, ChunkFwdOutputs, ChunkFwdResult, chunk_fwd,
};
pub use crate::fused::{
    ChannelMixingShape, ChannelShape, FusedAddcmul, FusedAddcmulBwd, FusedAddcmulBwdInputs,
    FusedAddcmulBwdOutputs, FusedAddcmulBwdResult, FusedAddcmulInputs, FusedAddcmulOutputs,
    FusedAddcmulResult, FusedChannelMixing, FusedChannelMixingBwd, FusedChannelMixingBwdInputs,
    FusedChannelMixingBwdOutputs, FusedChannelMixingBwdResult, FusedChannelMixingInputs,
    FusedChannelMixingOutputs, FusedChannelMixingResult, FusedGateOutputCorrection,
    FusedGateOutputCorrectionBwd, FusedGateOutputCorrectionBwdInputs, FusedGateOutputCorrectionBwdOutputs,
    FusedGateOutputCorrectionBwdResult, FusedGateOutputCorrectionInputs, FusedGateOutputCorrectionOutputs,
    FusedKUpdate, FusedKUpdateBwd, FusedKUpdateBwdInputs, FusedKUpdateBwdOutputs, FusedKUpdateBwdResult,
    FusedKUpdateInputs, FusedKUpdateOutputs, FusedKkNorm, FusedKkNormBwd, FusedKkNormBwdInputs,
    FusedKkNormBwdOutputs, FusedKkNormBwdResult, FusedKkNormInputs, FusedKkNormKUpdate,
    FusedKkNormKUpdateBwd, FusedKkNormKUpdateBwdInputs, FusedKkNormKUpdateBwdOutputs,
    FusedKkNormKUpdateBwdResult, FusedKkNormKUpdateInputs, FusedKkNormKUpdateOutputs,
    FusedKkNormKUpdateResult, FusedKkNormOutputs, FusedTokenShift, FusedTokenShiftAddcmul,
    FusedTokenShiftAddcmulBwd, FusedTokenShiftAddcmulBwdInputs, FusedTokenShiftAddcmulBwdOutputs,
    FusedTokenShiftAddcmulBwdResult, FusedTokenShiftAddcmulInputs, FusedTokenShiftAddcmulOutputs,
    FusedTokenShiftAddcmulResult, FusedTokenShiftBwd, FusedTokenShiftBwdInputs, FusedTokenShiftBwdOutputs,
    FusedTokenShiftBwdResult, FusedTokenShiftInputs, FusedTokenShiftOutputs, FusedTokenShiftResult,
    HeadShape, Mixes, fused_addcmul, fused_addcmul_bwd, fused_channel_mixing, fused_channel_mixing_bwd,
    fused_gate_output_correction, fused_gate_output_correction_bwd, fused_k_update, fused_k_update_bwd,
    fused_kk_norm, fused_kk_norm_bwd, fused_kk_norm_k_update, fused_kk_norm_k_update_bwd, fused_token_shift,
    fused_token_shift_addcmul, fused_token_shift_addcmul_bwd, fused_token_shift_bwd,
};
pub use crate::fused_mul_chunk_bwd::{
    FusedMulChunkBwd, FusedMulChunkBwdInputs, FusedMulChunkBwdOutputs, FusedMulChunkBwdResult,
    fused_mul_chunk_bwd,
};
pub use crate::fused_mul_chunk_fwd::{FusedMulChunkFwd, FusedMulChunkFwdInputs, fused_mul_chunk_fwd};
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

/// The kernels that most users run, for compiling ahead with [`Cache::warm`]: those of `fla-dplr`, and the elementwise
/// functions for some widths and heads in every dtype.
#[must_use]
pub fn units(arch: Arch) -> Vec<fla_core::Unit> {
    let mut out = fla_dplr::units(arch);
    out.extend(fused::units());
    out
}
