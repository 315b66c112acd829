//! RWKV-7: the diagonal plus low rank operator under RWKV's names, its fused form, and the small functions around it.

mod addcmul;
mod channel_mixing;
mod fused_mul;
mod gate_output_correction;
mod k_update;
mod kk_norm;
mod kk_norm_k_update;
mod log_decay;
mod token_shift_addcmul;

use num_traits::Float;

use crate::{Shape, dplr};

pub use crate::dplr::Options;
pub use crate::outputs::{OutputGrads, Outputs};

pub use addcmul::{
    AddcmulGrads, AddcmulInputs, AddcmulOutputGrads, AddcmulOutputs, AddcmulShape, addcmul_bwd, addcmul_fwd,
};
pub use channel_mixing::{
    ChannelMixingGrads, ChannelMixingInputs, ChannelMixingOutputGrads, ChannelMixingOutputs,
    ChannelMixingShape, channel_mixing_bwd, channel_mixing_fwd,
};
pub use fused_mul::{
    FusedMulGrads, FusedMulInputs, fused_mul_chunk_bwd, fused_mul_chunk_fwd, fused_mul_recurrent_bwd,
    fused_mul_recurrent_fwd,
};
pub use gate_output_correction::{
    GateOutputCorrectionGrads, GateOutputCorrectionInputs, GateOutputCorrectionShape,
    gate_output_correction_bwd, gate_output_correction_fwd,
};
pub use k_update::{KUpdateGrads, KUpdateInputs, KUpdateShape, k_update_bwd, k_update_fwd};
pub use kk_norm::{KkNormGrads, KkNormInputs, KkNormShape, kk_norm_bwd, kk_norm_fwd};
pub use kk_norm_k_update::{
    KkNormKUpdateGrads, KkNormKUpdateInputs, KkNormKUpdateOutputGrads, KkNormKUpdateOutputs,
    kk_norm_k_update_bwd, kk_norm_k_update_fwd,
};
pub use log_decay::{log_decay_bwd, log_decay_fwd};
pub use token_shift_addcmul::{
    TokenShiftAddcmulGrads, TokenShiftAddcmulInputs, TokenShiftAddcmulOutputs, token_shift_addcmul_bwd,
    token_shift_addcmul_fwd,
};

/// Tensors of a pass.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a, F> {
    /// `[B, T, H, K]`  receptance: the query
    pub r: &'a [F],
    /// `[B, T, H, K]`  log decay, natural base; in [-0.6065, 0) for RWKV-7 models
    pub w: &'a [F],
    /// `[B, T, H, K]`  keys
    pub k: &'a [F],
    /// `[B, T, H, V]`  values
    pub v: &'a [F],
    /// `[B, T, H, K]`  direction that is read: the negative unit key
    pub a: &'a [F],
    /// `[B, T, H, K]`  direction that is written: the unit key times its rate
    pub b: &'a [F],
    /// `[N, H, K, V]`  state before the first token; zero when absent
    pub initial_state: Option<&'a [F]>,
}

/// Gradients of the loss with respect to the inputs.
#[derive(Clone, Debug, PartialEq)]
pub struct Grads<F> {
    /// `[B, T, H, K]`
    pub dr: Vec<F>,
    /// `[B, T, H, K]`  with respect to the log decay
    pub dw: Vec<F>,
    /// `[B, T, H, K]`
    pub dk: Vec<F>,
    /// `[B, T, H, V]`
    pub dv: Vec<F>,
    /// `[B, T, H, K]`
    pub da: Vec<F>,
    /// `[B, T, H, K]`
    pub db: Vec<F>,
    /// `[N, H, K, V]`  also when there was no initial state: the gradient at zero
    pub d_initial_state: Vec<F>,
}

/// The recurrence, token by token: [`dplr::recurrent_fwd`] with `q = r` and `g = w`.
///
/// ```text
/// S_t = diag(exp(w_t)) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T        o_t = scale S_t^T r_t
/// ```
///
/// # Panics
///
/// When the length of a tensor does not fit the shape.
pub fn recurrent_fwd<F: Float>(shape: &Shape, x: &Inputs<F>, options: &Options<F>) -> Outputs<F> {
    dplr::recurrent_fwd(shape, &x.as_dplr(), options)
}

/// Gradients of the recurrence: [`dplr::recurrent_bwd`].
///
/// # Panics
///
/// When the length of a tensor does not fit the shape.
pub fn recurrent_bwd<F: Float>(
    shape: &Shape,
    x: &Inputs<F>,
    dy: &OutputGrads<F>,
    options: &Options<F>,
) -> Grads<F> {
    Grads::from_dplr(dplr::recurrent_bwd(shape, &x.as_dplr(), dy, options))
}

/// The chunk form: [`dplr::chunk_fwd`].
///
/// # Panics
///
/// When the length of a tensor does not fit the shape, or the chunk has no rows.
pub fn chunk_fwd<F: Float>(shape: &Shape, x: &Inputs<F>, options: &Options<F>) -> Outputs<F> {
    dplr::chunk_fwd(shape, &x.as_dplr(), options)
}

/// Gradients of the chunk form: [`dplr::chunk_bwd`].
///
/// # Panics
///
/// When the length of a tensor does not fit the shape, or the chunk has no rows.
pub fn chunk_bwd<F: Float>(
    shape: &Shape,
    x: &Inputs<F>,
    dy: &OutputGrads<F>,
    options: &Options<F>,
) -> Grads<F> {
    Grads::from_dplr(dplr::chunk_bwd(shape, &x.as_dplr(), dy, options))
}

impl<'a, F> Inputs<'a, F> {
    fn as_dplr(&self) -> dplr::Inputs<'a, F> {
        let Inputs { r, w, k, v, a, b, initial_state } = *self;
        dplr::Inputs { q: r, k, v, a, b, g: w, initial_state }
    }
}

impl<F> Grads<F> {
    fn from_dplr(grads: dplr::Grads<F>) -> Grads<F> {
        let dplr::Grads { dq, dk, dv, da, db, dg, d_initial_state } = grads;
        Grads { dr: dq, dw: dg, dk, dv, da, db, d_initial_state }
    }
}
