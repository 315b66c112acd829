//! The difference of each token to the one before it: `y_t = x_{t-1} - x_t`.

use num_traits::Float;

use crate::SeqLens;

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
pub fn fwd<F: Float>(shape: &Shape, x: &Inputs<F>) -> Outputs<F> {
    unimplemented!()
}

/// Gradients of [`fwd`].
pub fn bwd<F: Float>(shape: &Shape, x: &Inputs<F>, dy: &OutputGrads<F>) -> Grads<F> {
    unimplemented!()
}
