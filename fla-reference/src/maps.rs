//! Functions that operators apply to their inputs first, each with its gradient.

use num_traits::Float;

use crate::matrix::{axpy, dot};

/// A double in the format of the computation; only a type without floating point numbers could refuse it.
pub(crate) fn number<F: Float>(x: f64) -> F {
    F::from(x).unwrap_or_else(F::nan)
}

/// Divides each row of `width` elements by `sqrt(sum x^2 + 1e-6)`.
pub(crate) fn l2_norm_fwd<F: Float>(x: &[F], width: usize) -> Vec<F> {
    let mut y = Vec::with_capacity(x.len());
    for x in x.chunks(width) {
        let inverse_norm = inverse_norm(x);
        y.extend(x.iter().map(|&x| x * inverse_norm));
    }
    y
}

/// Gradient of [`l2_norm_fwd`]: `dx = (dy - y (y . dy)) / sqrt(sum x^2 + 1e-6)`.
pub(crate) fn l2_norm_bwd<F: Float>(x: &[F], dy: &[F], width: usize) -> Vec<F> {
    let mut dx = Vec::with_capacity(x.len());
    for (x, dy) in x.chunks(width).zip(dy.chunks(width)) {
        let inverse_norm = inverse_norm(x);
        let mut row = dy.to_vec();
        axpy(&mut row, -dot(x, dy) * inverse_norm * inverse_norm, x);
        dx.extend(row.iter().map(|&x| x * inverse_norm));
    }
    dx
}

fn inverse_norm<F: Float>(x: &[F]) -> F {
    (dot(x, x) + number(1e-6)).sqrt().recip()
}

/// `1 / (1 + exp(-x))`, without overflow on either side.
pub(crate) fn sigmoid<F: Float>(x: F) -> F {
    let small = (-x.abs()).exp();
    let tail = small / (F::one() + small);
    if x < F::zero() { tail } else { (F::one() + small).recip() }
}

/// `ln(1 + exp(x))`, exact on both sides; its derivative is [`sigmoid`].
pub(crate) fn softplus<F: Float>(x: F) -> F {
    x.max(F::zero()) + (-x.abs()).exp().ln_1p()
}
