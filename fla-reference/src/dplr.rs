//! Diagonal plus low rank: the state is decayed per key channel and moved along one direction per token.

use num_traits::Float;

use crate::Shape;
pub use crate::outputs::{OutputGrads, Outputs};

/// Tensors of a pass.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a, F> {
    /// `[B, T, H, K]`  queries
    pub q: &'a [F],
    /// `[B, T, H, K]`  keys
    pub k: &'a [F],
    /// `[B, T, H, V]`  values
    pub v: &'a [F],
    /// `[B, T, H, K]`  direction that is read from the state before it decays
    pub a: &'a [F],
    /// `[B, T, H, K]`  direction that what was read is written to
    pub b: &'a [F],
    /// `[B, T, H, K]`  log decay, natural base, at most 0
    pub g: &'a [F],
    /// `[N, H, K, V]`  state before the first token; zero when absent
    pub initial_state: Option<&'a [F]>,
}

/// What a pass needs to know besides its tensors.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Options<F> {
    /// Factor of the readout.
    pub scale: F,
    /// Rows of a chunk (C), at least 1; read by the chunk passes only.
    pub chunk: usize,
}

impl<F> Options<F> {
    /// Options with the given scale and chunks of 64 rows.
    pub fn new(scale: F) -> Options<F> {
        Options { scale, chunk: 64 }
    }

    /// The same with chunks of `chunk` rows.
    pub fn with_chunk(self, chunk: usize) -> Options<F> {
        Options { chunk, ..self }
    }
}

/// Gradients of the loss with respect to the inputs.
#[derive(Clone, Debug, PartialEq)]
pub struct Grads<F> {
    /// `[B, T, H, K]`
    pub dq: Vec<F>,
    /// `[B, T, H, K]`
    pub dk: Vec<F>,
    /// `[B, T, H, V]`
    pub dv: Vec<F>,
    /// `[B, T, H, K]`
    pub da: Vec<F>,
    /// `[B, T, H, K]`
    pub db: Vec<F>,
    /// `[B, T, H, K]`  with respect to the log decay
    pub dg: Vec<F>,
    /// `[N, H, K, V]`  also when there was no initial state: the gradient at zero
    pub d_initial_state: Vec<F>,
}

/// The recurrence, token by token.
pub fn recurrent_fwd<F: Float>(shape: &Shape, x: &Inputs<F>, options: &Options<F>) -> Outputs<F> {
    unimplemented!()
}

/// Reverse-mode differentiation of the recurrence, token by token.
pub fn recurrent_bwd<F: Float>(
    shape: &Shape,
    x: &Inputs<F>,
    dy: &OutputGrads<F>,
    options: &Options<F>,
) -> Grads<F> {
    unimplemented!()
}

/// The chunk form: one triangular inverse and a few matrix products per chunk.
pub fn chunk_fwd<F: Float>(shape: &Shape, x: &Inputs<F>, options: &Options<F>) -> Outputs<F> {
    unimplemented!()
}

/// Gradients of the chunk form.
pub fn chunk_bwd<F: Float>(
    shape: &Shape,
    x: &Inputs<F>,
    dy: &OutputGrads<F>,
    options: &Options<F>,
) -> Grads<F> {
    unimplemented!()
}
