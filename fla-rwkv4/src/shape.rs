//! Sizes of the tensors: sequences and channels.

use fla_core::cudarc::driver::CudaSlice;
use fla_core::{Chunks, Device, Error, SeqLens, StateDims, StateShape};

/// Tokens between two of the states that [`crate::chunk_fwd`] keeps for the gradients.
pub const CHUNK: usize = 16;

/// Most channels: more than any model has, and few enough for every count inside the kernels.
const MAX_C: usize = 1 << 20;

/// Dims of the operator: sequences and channels. There are no heads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    /// `B`, `T` and `N`.
    pub seqs: SeqLens,
    /// Channels.
    pub c: usize,
}

impl Shape {
    /// Elements of a `[B, T, C]` tensor. Saturates, so that a product that no memory holds fits no tensor.
    #[must_use]
    pub fn token_len(&self) -> usize {
        self.seqs.b().saturating_mul(self.seqs.t()).saturating_mul(self.c)
    }

    /// Elements of a `[N, 3, 1, C]` state.
    #[must_use]
    pub fn state_len(&self) -> usize {
        self.seqs.n().saturating_mul(3).saturating_mul(self.c)
    }

    /// What the states of these sequences are.
    #[must_use]
    pub fn state_shape(&self) -> StateShape {
        StateShape {
            n: self.seqs.n(),
            rows: self.seqs.b().saturating_mul(self.seqs.t()),
            elems: self.c.saturating_mul(3),
            dims: StateDims::Channels,
        }
    }

    /// Chunks of all sequences, `NT`: every sequence starts a new one. None where only the device knows the lengths.
    #[must_use]
    pub fn chunks(&self) -> usize {
        match self.seqs.cu_seqlens() {
            Some(offsets) => offsets.windows(2).map(|pair| (pair[1] - pair[0]).div_ceil(CHUNK)).sum(),
            None if self.seqs.is_dense() => self.seqs.b().saturating_mul(self.seqs.t().div_ceil(CHUNK)),
            None => 0,
        }
    }

    /// Elements of `states`, `[NT, 3, 1, C]`.
    #[must_use]
    pub fn states_len(&self) -> usize {
        self.chunks().saturating_mul(3).saturating_mul(self.c)
    }

    pub(crate) fn check(&self) -> Result<(), Error> {
        if (1..=MAX_C).contains(&self.c) {
            return Ok(());
        }
        Err(Error::Dim { dim: "C", wanted: format!("from 1 to {MAX_C}"), got: self.c })
    }

    /// Mean tokens of a sequence, rounded up.
    pub(crate) fn mean_tokens(&self) -> usize {
        if self.seqs.is_dense() { self.seqs.t() } else { self.seqs.t().div_ceil(self.seqs.n().max(1)) }
    }
}

/// What kernels have to know of packed sequences, on the device.
#[derive(Debug)]
pub(crate) struct Offsets {
    /// Tokens before each sequence: `[N + 1]`.
    pub(crate) cu_seqlens: CudaSlice<i64>,
    /// Chunks before each sequence: `[N + 1]`.
    pub(crate) chunks: CudaSlice<i64>,
}

impl Offsets {
    /// Uploads them; none for dense sequences.
    pub(crate) fn new(device: &Device, seqs: &SeqLens) -> Result<Option<Self>, Error> {
        if seqs.is_dense() {
            return Ok(None);
        }
        // Refuses lengths that only the device knows.
        let chunks = Chunks::new(seqs, CHUNK)?;
        Ok(Some(Self {
            cu_seqlens: device.upload_offsets(seqs.cu_seqlens().unwrap_or_default())?,
            chunks: device.upload_offsets(chunks.offsets())?,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::{CHUNK, SeqLens, Shape};

    #[test]
    fn chunks_restart_at_every_sequence() {
        let packed = |offsets: &[usize]| SeqLens::packed(offsets, offsets[offsets.len() - 1]).expect("valid");
        for (seqs, chunks) in [
            (SeqLens::dense(3, CHUNK), 3),
            (SeqLens::dense(2, CHUNK + 1), 4),
            (SeqLens::dense(5, 0), 0),
            (packed(&[0, 0, 1, CHUNK, 2 * CHUNK + 1]), 4),
        ] {
            assert_eq!(Shape { seqs: seqs.clone(), c: 7 }.chunks(), chunks, "{seqs:?}");
        }
    }

    #[test]
    fn the_kernels_have_the_same_chunks() {
        let text = include_str!("../kernels/average.cuh");
        assert!(text.contains(&format!("inline constexpr int CHUNK = {CHUNK};")));
    }
}
