//! What the transition of the state needs of a key, together: the unit key, the updated key, and `b = kk * a`.

use num_traits::Float;

use super::{
    KUpdateInputs, KUpdateShape, KkNormInputs, KkNormShape, k_update_bwd, k_update_fwd, kk_norm_bwd,
    kk_norm_fwd,
};
use crate::check;
use crate::matrix::{axpy, axpy2};

/// Tensors of the forward pass.
#[derive(Clone, Copy, Debug)]
pub struct KkNormKUpdateInputs<'a, F> {
    /// `[B, T, H, K]`  keys
    pub k: &'a [F],
    /// `[B, T, H, K]`  rates
    pub a: &'a [F],
    /// `[H, K]`  factor of each channel
    pub k_k: &'a [F],
    /// `[H, K]`  how far a rate below 1 shrinks the key
    pub ka: &'a [F],
}

/// Results of the forward pass.
#[derive(Clone, Debug, PartialEq)]
pub struct KkNormKUpdateOutputs<F> {
    /// `[B, T, H, K]`  keys after their rates
    pub k_updated: Vec<F>,
    /// `[B, T, H, K]`  unit keys
    pub kk: Vec<F>,
    /// `[B, T, H, K]`  unit keys times rates
    pub b: Vec<F>,
}

/// Gradients of the results.
#[derive(Clone, Copy, Debug)]
pub struct KkNormKUpdateOutputGrads<'a, F> {
    /// `[B, T, H, K]`
    pub d_k_updated: &'a [F],
    /// `[B, T, H, K]`  less the gradient of the negative of `kk`, where that is used
    pub d_kk: &'a [F],
    /// `[B, T, H, K]`
    pub d_b: &'a [F],
}

/// Gradients of the inputs.
#[derive(Clone, Debug, PartialEq)]
pub struct KkNormKUpdateGrads<F> {
    /// `[B, T, H, K]`
    pub dk: Vec<F>,
    /// `[B, T, H, K]`
    pub da: Vec<F>,
    /// `[H, K]`
    pub dk_k: Vec<F>,
    /// `[H, K]`
    pub dka: Vec<F>,
}

/// Normalises and updates.
///
/// ```text
/// kk = x / sqrt(sum x^2 + 1e-6), x = k * k_k        k_updated = k * (1 + (a - 1) * ka)        b = kk * a
/// ```
///
/// # Panics
///
/// When the length of a tensor does not fit the shape.
pub fn kk_norm_k_update_fwd<F: Float>(
    shape: &KkNormShape,
    x: &KkNormKUpdateInputs<F>,
) -> KkNormKUpdateOutputs<F> {
    let kk = kk_norm_fwd(shape, &KkNormInputs { k: x.k, k_k: x.k_k });
    let k_updated = k_update_fwd(&rows(shape), &KUpdateInputs { k: x.k, a: x.a, ka: x.ka });
    let b = kk.iter().zip(x.a).map(|(&kk, &a)| kk * a).collect();
    KkNormKUpdateOutputs { k_updated, kk, b }
}

/// Gradients of [`kk_norm_k_update_fwd`].
///
/// # Panics
///
/// When the length of a tensor does not fit the shape.
pub fn kk_norm_k_update_bwd<F: Float>(
    shape: &KkNormShape,
    x: &KkNormKUpdateInputs<F>,
    dy: &KkNormKUpdateOutputGrads<F>,
) -> KkNormKUpdateGrads<F> {
    check::len("d_b", dy.d_b, &[shape.tokens, shape.h, shape.k]);
    let norm = KkNormInputs { k: x.k, k_k: x.k_k };
    let kk = kk_norm_fwd(shape, &norm);
    let mut d_kk = dy.d_kk.to_vec();
    axpy2(&mut d_kk, F::one(), dy.d_b, x.a);
    let norm = kk_norm_bwd(shape, &norm, &d_kk);
    let update = k_update_bwd(&rows(shape), &KUpdateInputs { k: x.k, a: x.a, ka: x.ka }, dy.d_k_updated);
    let (mut dk, mut da) = (update.dk, update.da);
    axpy(&mut dk, F::one(), &norm.dk);
    axpy2(&mut da, F::one(), dy.d_b, &kk);
    KkNormKUpdateGrads { dk, da, dk_k: norm.dk_k, dka: update.dka }
}

fn rows(shape: &KkNormShape) -> KUpdateShape {
    KUpdateShape { tokens: shape.tokens, d: shape.h * shape.k }
}
