//! Which token rows belong to which sequence, and the dimensions that the matrix-state operators share.

use std::ops::Range;

/// How the rows of a token axis are divided into sequences.
///
/// Tokens of all sequences lie on one flattened axis of [`SeqLens::tokens`] rows. A sequence may be empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SeqLens {
    /// `b` sequences of `t` tokens each, one after the other.
    Dense {
        /// Number of sequences (B).
        b: usize,
        /// Tokens of each (T).
        t: usize,
    },
    /// Packed sequences: sequence n owns the rows `cu_seqlens[n]..cu_seqlens[n + 1]`.
    Packed {
        /// N + 1 offsets that start at 0 and never decrease.
        cu_seqlens: Vec<usize>,
    },
}

impl SeqLens {
    /// Number of sequences (N).
    pub fn n(&self) -> usize {
        match self {
            SeqLens::Dense { b, .. } => *b,
            SeqLens::Packed { cu_seqlens } => cu_seqlens.len().saturating_sub(1),
        }
    }

    /// Number of rows of the flattened token axis (B * T, or the sum of the packed lengths).
    pub fn tokens(&self) -> usize {
        match self {
            SeqLens::Dense { b, t } => b * t,
            SeqLens::Packed { cu_seqlens } => cu_seqlens.last().copied().unwrap_or(0),
        }
    }

    /// The rows of sequence `i_n`.
    ///
    /// # Panics
    ///
    /// When there is no such sequence.
    pub fn range(&self, i_n: usize) -> Range<usize> {
        assert!(i_n < self.n(), "sequence {i_n} of {}", self.n());
        match self {
            SeqLens::Dense { t, .. } => i_n * t..(i_n + 1) * t,
            SeqLens::Packed { cu_seqlens } => cu_seqlens[i_n]..cu_seqlens[i_n + 1],
        }
    }

    /// Panics unless the offsets of a packed axis start at 0 and never decrease.
    pub(crate) fn check(&self) {
        if let SeqLens::Packed { cu_seqlens } = self {
            assert_eq!(cu_seqlens.first(), Some(&0), "`cu_seqlens` starts at 0");
            assert!(cu_seqlens.is_sorted(), "`cu_seqlens` never decreases: {cu_seqlens:?}");
        }
    }
}

/// Dimensions of an operator with a matrix state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Sequences and their tokens.
    pub seqs: SeqLens,
    /// Query and key heads (H).
    pub h: usize,
    /// Key channels of a head (K).
    pub k: usize,
    /// Value channels of a head (V).
    pub v: usize,
}

impl Shape {
    /// Panics unless a state has elements.
    pub(crate) fn check(&self) {
        self.seqs.check();
        let Shape { h, k, v, .. } = self;
        assert!(*h > 0 && *k > 0 && *v > 0, "h = {h}, k = {k} and v = {v} are at least 1");
    }
}
