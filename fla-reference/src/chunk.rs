//! What the chunk forms share: chunk-local sums, and the inverse of a unit lower triangular matrix.

use num_traits::Float;

use crate::SeqLens;

/// Which way a sum inside a chunk runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sum {
    /// Row t holds the sum of the rows up to and including t.
    Prefix,
    /// Row t holds the sum of the rows from t to the end of the chunk.
    Suffix,
}

/// Rows, channels and chunks of [`cumsum`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CumsumShape {
    /// Sequences and their tokens; chunks start anew with each sequence.
    pub seqs: SeqLens,
    /// Channels of a token: H, or H * K.
    pub d: usize,
    /// Rows of a chunk (C), at least 1.
    pub chunk: usize,
}

/// Sums `x`, `[B, T, D]`, inside each chunk of each sequence.
pub fn cumsum<F: Float>(shape: &CumsumShape, x: &[F], sum: Sum) -> Vec<F> {
    unimplemented!()
}

/// `(I + L)^-1` for a strictly lower triangular `l`, `[n, n]`; what lies on and above the diagonal is ignored.
pub fn unit_lower_inverse<F: Float>(l: &[F], n: usize) -> Vec<F> {
    unimplemented!()
}
