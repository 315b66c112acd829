//! RWKV-7 from the unit key and its rate, as decoding calls it: `a = -kk` and `b = kk * rate` are formed inside.

use num_traits::Float;

use super::{Options, OutputGrads, Outputs};
use crate::Shape;

/// Tensors of a pass.
#[derive(Clone, Copy, Debug)]
pub struct FusedMulInputs<'a, F> {
    /// `[B, T, H, K]`  receptance: the query
    pub r: &'a [F],
    /// `[B, T, H, K]`  log decay, natural base
    pub w: &'a [F],
    /// `[B, T, H, K]`  keys
    pub k: &'a [F],
    /// `[B, T, H, V]`  values
    pub v: &'a [F],
    /// `[B, T, H, K]`  unit keys
    pub kk: &'a [F],
    /// `[B, T, H, K]`  rates, in [0, 1]
    pub a: &'a [F],
    /// `[N, H, K, V]`  state before the first token; zero when absent
    pub initial_state: Option<&'a [F]>,
}

/// Gradients of the loss with respect to the inputs.
#[derive(Clone, Debug, PartialEq)]
pub struct FusedMulGrads<F> {
    /// `[B, T, H, K]`
    pub dr: Vec<F>,
    /// `[B, T, H, K]`  with respect to the log decay
    pub dw: Vec<F>,
    /// `[B, T, H, K]`
    pub dk: Vec<F>,
    /// `[B, T, H, V]`
    pub dv: Vec<F>,
    /// `[B, T, H, K]`
    pub dkk: Vec<F>,
    /// `[B, T, H, K]`  with respect to the rate
    pub da: Vec<F>,
    /// `[N, H, K, V]`  also when there was no initial state: the gradient at zero
    pub d_initial_state: Vec<F>,
}

/// The recurrence, token by token.
pub fn fused_mul_recurrent_fwd<F: Float>(
    shape: &Shape,
    x: &FusedMulInputs<F>,
    options: &Options<F>,
) -> Outputs<F> {
    unimplemented!()
}

/// Reverse-mode differentiation of the recurrence, token by token.
pub fn fused_mul_recurrent_bwd<F: Float>(
    shape: &Shape,
    x: &FusedMulInputs<F>,
    dy: &OutputGrads<F>,
    options: &Options<F>,
) -> FusedMulGrads<F> {
    unimplemented!()
}

/// The chunk form.
pub fn fused_mul_chunk_fwd<F: Float>(
    shape: &Shape,
    x: &FusedMulInputs<F>,
    options: &Options<F>,
) -> Outputs<F> {
    unimplemented!()
}

/// Gradients of the chunk form.
pub fn fused_mul_chunk_bwd<F: Float>(
    shape: &Shape,
    x: &FusedMulInputs<F>,
    dy: &OutputGrads<F>,
    options: &Options<F>,
) -> FusedMulGrads<F> {
    unimplemented!()
}
