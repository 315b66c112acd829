//! The log decay from the logit that the model projects: `w = -exp(-1/2) sigmoid(x)`, which lies in (-0.6065, 0).

use num_traits::Float;

use crate::check;
use crate::maps::{number, sigmoid};

/// exp(-1/2), the bound of the log decay.
const BOUND: f64 = 0.606_530_659_712_633_4;

/// The log decays of logits of any shape: `w = -exp(-1/2) sigmoid(x)`.
pub fn log_decay_fwd<F: Float>(x: &[F]) -> Vec<F> {
    x.iter().map(|&x| -number::<F>(BOUND) * sigmoid(x)).collect()
}

/// Gradients of [`log_decay_fwd`] from `dw`: `dx = -exp(-1/2) sigmoid(x) sigmoid(-x) dw`.
///
/// # Panics
///
/// When the lengths differ.
pub fn log_decay_bwd<F: Float>(x: &[F], dw: &[F]) -> Vec<F> {
    check::len("dw", dw, &[x.len()]);
    x.iter().zip(dw).map(|(&x, &dw)| -number::<F>(BOUND) * sigmoid(x) * sigmoid(-x) * dw).collect()
}
