//! The unit key of the state transition: `kk = x / sqrt(sum x^2 + 1e-6)` per head, with `x = k * k_k`.

use num_traits::Float;

/// Dimensions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KkNormShape {
    /// Rows (B * T).
    pub tokens: usize,
    /// Heads (H).
    pub h: usize,
    /// Channels of a head (K).
    pub k: usize,
}

/// Tensors of the forward pass.
#[derive(Clone, Copy, Debug)]
pub struct KkNormInputs<'a, F> {
    /// `[B, T, H, K]`  keys
    pub k: &'a [F],
    /// `[H, K]`  factor of each channel
    pub k_k: &'a [F],
}

/// Gradients of the inputs.
#[derive(Clone, Debug, PartialEq)]
pub struct KkNormGrads<F> {
    /// `[B, T, H, K]`
    pub dk: Vec<F>,
    /// `[H, K]`
    pub dk_k: Vec<F>,
}

/// The unit keys, `[B, T, H, K]`.
pub fn kk_norm_fwd<F: Float>(shape: &KkNormShape, x: &KkNormInputs<F>) -> Vec<F> {
    unimplemented!()
}

/// Gradients of [`kk_norm_fwd`] from `d_kk`, `[B, T, H, K]`.
pub fn kk_norm_bwd<F: Float>(shape: &KkNormShape, x: &KkNormInputs<F>, d_kk: &[F]) -> KkNormGrads<F> {
    unimplemented!()
}
