//! The difference of each token to the one before it: `y_t = x_{t-1} - x_t`.

use num_traits::Float;

use crate::heads::{or_zeros, state, state_mut};
use crate::matrix::axpy;
use crate::{SeqLens, check};

/// Dimensions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Sequences and their tokens.
    pub seqs: SeqLens,
    /// Channels of a token (D).
    pub d: usize,
}

/// Tensors of the forward pass.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a, F> {
    /// `[B, T, D]`  tokens
    pub x: &'a [F],
    /// `[N, D]`  token before the first of each sequence; zero when absent
    pub cache: Option<&'a [F]>,
}

/// Results of the forward pass.
#[derive(Clone, Debug, PartialEq)]
pub struct Outputs<F> {
    /// `[B, T, D]`  differences
    pub y: Vec<F>,
    /// `[N, D]`  last token of each sequence; an empty sequence hands its cache row through
    pub cache_out: Vec<F>,
}

/// Gradients of the results.
#[derive(Clone, Copy, Debug)]
pub struct OutputGrads<'a, F> {
    /// `[B, T, D]`
    pub dy: &'a [F],
    /// `[N, D]`  zero when absent
    pub d_cache_out: Option<&'a [F]>,
}

/// Gradients of the inputs.
#[derive(Clone, Debug, PartialEq)]
pub struct Grads<F> {
    /// `[B, T, D]`
    pub dx: Vec<F>,
    /// `[N, D]`  also when there was no cache: the gradient at zero
    pub d_cache: Vec<F>,
}

/// The differences.
///
/// ```text
/// y_t = x_{t-1} - x_t        x_{-1} = cache
/// ```
///
/// # Panics
///
/// When the length of a tensor does not fit the shape.
pub fn fwd<F: Float>(shape: &Shape, x: &Inputs<F>) -> Outputs<F> {
    x.check(shape);
    let d = shape.d;
    let mut y =
        Outputs { y: x.x.iter().map(|&x| -x).collect(), cache_out: or_zeros(x.cache, shape.seqs.n() * d) };
    for i_n in 0..shape.seqs.n() {
        let last = state_mut(&mut y.cache_out, i_n, d);
        for i_t in shape.seqs.range(i_n) {
            axpy(state_mut(&mut y.y, i_t, d), F::one(), last);
            last.copy_from_slice(state(x.x, i_t, d));
        }
    }
    y
}

/// Gradients of [`fwd`].
///
/// ```text
/// dx_t = dy_{t+1} - dy_t        the last token has the gradient of the cache in place of dy_{t+1}
/// d_cache = dy_0
/// ```
///
/// # Panics
///
/// When the length of a tensor does not fit the shape.
pub fn bwd<F: Float>(shape: &Shape, x: &Inputs<F>, dy: &OutputGrads<F>) -> Grads<F> {
    x.check(shape);
    let d = shape.d;
    check::len("dy", dy.dy, &[shape.seqs.tokens(), d]);
    check::len_opt("d_cache_out", dy.d_cache_out, &[shape.seqs.n(), d]);
    let mut dx = Grads {
        dx: dy.dy.iter().map(|&dy| -dy).collect(),
        d_cache: or_zeros(dy.d_cache_out, shape.seqs.n() * d),
    };
    for i_n in 0..shape.seqs.n() {
        let next = state_mut(&mut dx.d_cache, i_n, d);
        for i_t in shape.seqs.range(i_n).rev() {
            axpy(state_mut(&mut dx.dx, i_t, d), F::one(), next);
            next.copy_from_slice(state(dy.dy, i_t, d));
        }
    }
    dx
}

impl<F> Inputs<'_, F> {
    #[track_caller]
    fn check(&self, shape: &Shape) {
        shape.seqs.check();
        check::len("x", self.x, &[shape.seqs.tokens(), shape.d]);
        check::len_opt("cache", self.cache, &[shape.seqs.n(), shape.d]);
    }
}
