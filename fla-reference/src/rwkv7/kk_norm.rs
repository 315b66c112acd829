//! The unit key of the state transition: `kk = x / sqrt(sum x^2 + 1e-6)` per head, with `x = k * k_k`.

use num_traits::Float;

use crate::check;
use crate::maps::{l2_norm_bwd, l2_norm_fwd};
use crate::matrix::axpy2;

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
///
/// # Panics
///
/// When the length of a tensor does not fit the shape.
pub fn kk_norm_fwd<F: Float>(shape: &KkNormShape, x: &KkNormInputs<F>) -> Vec<F> {
    l2_norm_fwd(&x.products(shape), shape.k)
}

/// Gradients of [`kk_norm_fwd`] from `d_kk`, `[B, T, H, K]`.
///
/// ```text
/// d(k * k_k) = (d_kk - kk (kk . d_kk)) / sqrt(sum x^2 + 1e-6)
/// ```
///
/// # Panics
///
/// When the length of a tensor does not fit the shape.
pub fn kk_norm_bwd<F: Float>(shape: &KkNormShape, x: &KkNormInputs<F>, d_kk: &[F]) -> KkNormGrads<F> {
    let products = x.products(shape);
    check::len("d_kk", d_kk, &[shape.tokens, shape.h, shape.k]);
    let d_products = l2_norm_bwd(&products, d_kk, shape.k);
    let mut dx = KkNormGrads { dk: d_products.clone(), dk_k: vec![F::zero(); x.k_k.len()] };
    let rows = dx.dk.chunks_mut(x.k_k.len()).zip(d_products.chunks(x.k_k.len())).zip(x.k.chunks(x.k_k.len()));
    for ((dk, d_product), k) in rows {
        dk.fill(F::zero());
        axpy2(dk, F::one(), d_product, x.k_k);
        axpy2(&mut dx.dk_k, F::one(), d_product, k);
    }
    dx
}

impl<F: Float> KkNormInputs<'_, F> {
    /// `[B, T, H, K]`  k * k_k
    #[track_caller]
    fn products(&self, shape: &KkNormShape) -> Vec<F> {
        let KkNormShape { tokens, h, k } = *shape;
        assert!(h > 0 && k > 0, "there is at least 1 head with 1 channel");
        check::len("k", self.k, &[tokens, h, k]);
        check::len("k_k", self.k_k, &[h, k]);
        self.k.iter().zip(self.k_k.iter().cycle()).map(|(&k, &k_k)| k * k_k).collect()
    }
}
