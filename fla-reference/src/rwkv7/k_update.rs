//! The key after its rate: `out = k * (1 + (a - 1) * ka)`.

use num_traits::Float;

/// Dimensions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KUpdateShape {
    /// Rows (B * T).
    pub tokens: usize,
    /// Channels of a row (D).
    pub d: usize,
}

/// Tensors of the forward pass.
#[derive(Clone, Copy, Debug)]
pub struct KUpdateInputs<'a, F> {
    /// `[B, T, D]`  keys
    pub k: &'a [F],
    /// `[B, T, D]`  rates
    pub a: &'a [F],
    /// `[D]`  how far a rate below 1 shrinks the key
    pub ka: &'a [F],
}

/// Gradients of the inputs.
#[derive(Clone, Debug, PartialEq)]
pub struct KUpdateGrads<F> {
    /// `[B, T, D]`
    pub dk: Vec<F>,
    /// `[B, T, D]`
    pub da: Vec<F>,
    /// `[D]`
    pub dka: Vec<F>,
}

/// The updated keys, `[B, T, D]`.
pub fn k_update_fwd<F: Float>(shape: &KUpdateShape, x: &KUpdateInputs<F>) -> Vec<F> {
    unimplemented!()
}

/// Gradients of [`k_update_fwd`] from `d_out`, `[B, T, D]`.
pub fn k_update_bwd<F: Float>(shape: &KUpdateShape, x: &KUpdateInputs<F>, d_out: &[F]) -> KUpdateGrads<F> {
    unimplemented!()
}
