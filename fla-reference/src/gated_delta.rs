//! The gated delta rule: decay the state, then correct what it returns for the key.

use num_traits::Float;

use crate::Shape;
pub use crate::outputs::{OutputGrads, Outputs};

/// Where the scalar log decay of a value head comes from.
#[derive(Clone, Copy, Debug)]
pub enum Gate<'a, F> {
    /// No scalar decay.
    None,
    /// `[B, T, HV]`  log decay, natural base, at most 0.
    Log(&'a [F]),
    /// Log decay `-exp(a_log) * softplus(g + dt_bias)`, formed inside.
    Raw {
        /// `[B, T, HV]`  logits.
        g: &'a [F],
        /// `[HV]`  logarithm of the rate.
        a_log: &'a [F],
        /// `[HV]`  added to the logits; zero when absent.
        dt_bias: Option<&'a [F]>,
    },
}

/// How strongly each token is written.
#[derive(Clone, Copy, Debug)]
pub enum Beta<'a, F> {
    /// 1 everywhere.
    One,
    /// `[B, T, HV]`  one strength per value head.
    PerHead(&'a [F]),
    /// `[B, T, HV, V]`  one strength per value channel; recurrent passes only.
    PerChannel(&'a [F]),
}

/// Tensors of a pass.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a, F> {
    /// `[B, T, H, K]`  queries
    pub q: &'a [F],
    /// `[B, T, H, K]`  keys; of unit length unless normalised inside
    pub k: &'a [F],
    /// `[B, T, HV, V]`  values
    pub v: &'a [F],
    /// `[B, T, HV]`  scalar decay
    pub g: Gate<'a, F>,
    /// `[B, T, HV, K]`  log decay of each key row, if any; recurrent passes only
    pub gk: Option<&'a [F]>,
    /// `[B, T, HV, V]`  log decay of each value column, if any; recurrent passes only
    pub gv: Option<&'a [F]>,
    /// Write strength
    pub beta: Beta<'a, F>,
    /// `[N, HV, K, V]`  state before the first token; zero when absent
    pub initial_state: Option<&'a [F]>,
}

/// What is done to queries and keys first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkNorm {
    /// Nothing.
    AsGiven,
    /// Each is divided by `sqrt(sum x^2 + 1e-6)` over its head.
    L2,
}

/// What is done to the write strength first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BetaMap {
    /// Nothing.
    AsGiven,
    /// `sigmoid(beta)`: strengths in (0, 1).
    Sigmoid,
    /// `2 sigmoid(beta)`: strengths in (0, 2), so the transition may have negative eigenvalues.
    TwiceSigmoid,
}

/// What a pass needs to know besides its tensors.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Options<F> {
    /// Value heads (HV), a multiple of the query heads; value head j reads query head `j * H / HV`.
    pub hv: usize,
    /// Factor of the readout.
    pub scale: F,
    /// Rows of a chunk (C), at least 1; read by the chunk passes only.
    pub chunk: usize,
    /// Normalisation of queries and keys.
    pub qk_norm: QkNorm,
    /// Map of the write strength.
    pub beta_map: BetaMap,
}

impl<F> Options<F> {
    /// Options for `hv` value heads with the given scale, chunks of 64 rows, and tensors taken as given.
    pub fn new(hv: usize, scale: F) -> Options<F> {
        Options { hv, scale, chunk: 64, qk_norm: QkNorm::AsGiven, beta_map: BetaMap::AsGiven }
    }

    /// The same with chunks of `chunk` rows.
    pub fn with_chunk(self, chunk: usize) -> Options<F> {
        Options { chunk, ..self }
    }

    /// The same with the given normalisation of queries and keys.
    pub fn with_qk_norm(self, qk_norm: QkNorm) -> Options<F> {
        Options { qk_norm, ..self }
    }

    /// The same with the given map of the write strength.
    pub fn with_beta_map(self, beta_map: BetaMap) -> Options<F> {
        Options { beta_map, ..self }
    }
}

/// Gradients of the loss with respect to the inputs as they were given, before any map or norm.
#[derive(Clone, Debug, PartialEq)]
pub struct Grads<F> {
    /// `[B, T, H, K]`  summed over the value heads of the group
    pub dq: Vec<F>,
    /// `[B, T, H, K]`  summed over the value heads of the group
    pub dk: Vec<F>,
    /// `[B, T, HV, V]`
    pub dv: Vec<F>,
    /// `[B, T, HV]`  with respect to the log decay or the logits; present when there was a gate
    pub dg: Option<Vec<F>>,
    /// `[HV]`  present when the gate was formed inside
    pub d_a_log: Option<Vec<F>>,
    /// `[HV]`  present when there was a bias
    pub d_dt_bias: Option<Vec<F>>,
    /// `[B, T, HV, K]`  present when `gk` was
    pub dgk: Option<Vec<F>>,
    /// `[B, T, HV, V]`  present when `gv` was
    pub dgv: Option<Vec<F>>,
    /// `[B, T, HV]` or `[B, T, HV, V]`, like the strength; present unless it was 1 everywhere
    pub dbeta: Option<Vec<F>>,
    /// `[N, HV, K, V]`  also when there was no initial state: the gradient at zero
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
///
/// # Panics
///
/// Besides wrong lengths: when `gk` or `gv` is given, or a strength per channel. There is no chunk form for them.
pub fn chunk_fwd<F: Float>(shape: &Shape, x: &Inputs<F>, options: &Options<F>) -> Outputs<F> {
    unimplemented!()
}

/// Gradients of the chunk form.
///
/// # Panics
///
/// As [`chunk_fwd`].
pub fn chunk_bwd<F: Float>(
    shape: &Shape,
    x: &Inputs<F>,
    dy: &OutputGrads<F>,
    options: &Options<F>,
) -> Grads<F> {
    unimplemented!()
}
