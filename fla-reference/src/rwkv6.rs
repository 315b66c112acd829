//! RWKV-6: per-channel decay, and a bonus for the current token that the state never sees.

use num_traits::Float;

use crate::Shape;
pub use crate::outputs::{OutputGrads, Outputs};

/// Tensors of a pass.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a, F> {
    /// `[B, T, H, K]`  receptance: the query
    pub r: &'a [F],
    /// `[B, T, H, K]`  keys
    pub k: &'a [F],
    /// `[B, T, H, V]`  values
    pub v: &'a [F],
    /// `[B, T, H, K]`  log decay, natural base, at most 0
    pub w: &'a [F],
    /// `[H, K]`  bonus of the current token
    pub u: &'a [F],
    /// `[N, H, K, V]`  state before the first token; zero when absent
    pub initial_state: Option<&'a [F]>,
}

/// Which end of each sequence is visited first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the first token to the last.
    Forward,
    /// From the last token to the first: the initial state precedes the last token.
    Reverse,
}

/// What a pass needs to know besides its tensors.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Options<F> {
    /// Factor of the readout.
    pub scale: F,
    /// Rows of a chunk (C), at least 1; read by the chunk passes only.
    pub chunk: usize,
    /// Order in which the tokens of a sequence are visited.
    pub direction: Direction,
}

impl<F> Options<F> {
    /// Options with the given scale, chunks of 64 rows, and tokens visited from first to last.
    pub fn new(scale: F) -> Options<F> {
        Options { scale, chunk: 64, direction: Direction::Forward }
    }

    /// The same with chunks of `chunk` rows.
    pub fn with_chunk(self, chunk: usize) -> Options<F> {
        Options { chunk, ..self }
    }

    /// The same with the given order of tokens.
    pub fn with_direction(self, direction: Direction) -> Options<F> {
        Options { direction, ..self }
    }
}

/// Gradients of the loss with respect to the inputs.
#[derive(Clone, Debug, PartialEq)]
pub struct Grads<F> {
    /// `[B, T, H, K]`
    pub dr: Vec<F>,
    /// `[B, T, H, K]`
    pub dk: Vec<F>,
    /// `[B, T, H, V]`
    pub dv: Vec<F>,
    /// `[B, T, H, K]`  with respect to the log decay
    pub dw: Vec<F>,
    /// `[H, K]`
    pub du: Vec<F>,
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

/// The chunk form.
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
