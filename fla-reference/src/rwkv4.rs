//! RWKV-4: an exponential average per channel, kept as numerator, denominator and running exponent.

use num_traits::Float;

use crate::SeqLens;

/// Dimensions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Sequences and their tokens.
    pub seqs: SeqLens,
    /// Channels (C of the model, not of a chunk).
    pub c: usize,
}

/// Tensors of a pass.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a, F> {
    /// `[C]`  raw decay: a step multiplies the average by `exp(-exp(w))`
    pub w: &'a [F],
    /// `[C]`  bonus of the current token, in log space
    pub u: &'a [F],
    /// `[B, T, C]`  keys: log weights
    pub k: &'a [F],
    /// `[B, T, C]`  values
    pub v: &'a [F],
    /// `[N, 3, 1, C]`  numerator, denominator, running exponent; the fresh state (0, 0, -1e38) when absent
    pub initial_state: Option<&'a [F]>,
}

/// What a pass needs to know besides its tensors.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Options {
    /// Rows of a chunk, at least 1; read by the chunk passes only.
    pub chunk: usize,
}

impl Options {
    /// Options with chunks of 64 rows.
    #[allow(clippy::new_without_default)] // Options have no default: what has no safe value is asked for.
    pub fn new() -> Options {
        Options { chunk: 64 }
    }

    /// The same with chunks of `chunk` rows.
    pub fn with_chunk(self, chunk: usize) -> Options {
        Options { chunk, ..self }
    }
}

/// Outputs of a forward pass.
#[derive(Clone, Debug, PartialEq)]
pub struct Outputs<F> {
    /// `[B, T, C]`  weighted averages of the values
    pub o: Vec<F>,
    /// `[N, 3, 1, C]`  numerator, denominator, running exponent
    pub final_state: Vec<F>,
}

/// Gradients of the loss with respect to the outputs.
#[derive(Clone, Copy, Debug)]
pub struct OutputGrads<'a, F> {
    /// `[B, T, C]`  gradient of `o`
    pub d_o: &'a [F],
    /// `[N, 3, 1, C]`  gradient of the final triple; zero when absent
    pub d_final_state: Option<&'a [F]>,
}

/// Gradients of the loss with respect to the inputs.
#[derive(Clone, Debug, PartialEq)]
pub struct Grads<F> {
    /// `[C]`  with respect to the raw decay
    pub dw: Vec<F>,
    /// `[C]`
    pub du: Vec<F>,
    /// `[B, T, C]`
    pub dk: Vec<F>,
    /// `[B, T, C]`
    pub dv: Vec<F>,
    /// `[N, 3, 1, C]`  also when there was no initial state: the gradient at the fresh one
    pub d_initial_state: Vec<F>,
}

/// The recurrence, token by token.
pub fn recurrent_fwd<F: Float>(shape: &Shape, x: &Inputs<F>, options: &Options) -> Outputs<F> {
    unimplemented!()
}

/// Reverse-mode differentiation of the recurrence, token by token.
pub fn recurrent_bwd<F: Float>(
    shape: &Shape,
    x: &Inputs<F>,
    dy: &OutputGrads<F>,
    options: &Options,
) -> Grads<F> {
    unimplemented!()
}

/// The chunk form: a scan over chunk summaries, then every chunk from its own start.
pub fn chunk_fwd<F: Float>(shape: &Shape, x: &Inputs<F>, options: &Options) -> Outputs<F> {
    unimplemented!()
}

/// Gradients of the chunk form.
pub fn chunk_bwd<F: Float>(shape: &Shape, x: &Inputs<F>, dy: &OutputGrads<F>, options: &Options) -> Grads<F> {
    unimplemented!()
}
