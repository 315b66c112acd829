//! The chunk table: which sequence a chunk belongs to, and which of its chunks it is.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream};

use crate::{Device, Error, SeqLens};

/// Chunks of `C` tokens, restarted at every sequence; the last of a sequence may be short.
///
/// Built on the host, where the lengths are known, and copied up once; nothing is ever read back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunks {
    c: usize,
    /// Sequence and number in the sequence of each chunk, as the device holds it: `[NT, 2]`.
    table: Vec<i32>,
    /// Chunks before each sequence: `[N + 1]`.
    offsets: Vec<usize>,
}

impl Chunks {
    /// The chunks of `c` tokens of every sequence.
    ///
    /// # Errors
    ///
    /// [`Error::Dim`] when `c` is 0, or there are more than `i32::MAX` sequences or chunks in one of them;
    /// [`Error::SeqLens`] when only the device knows the lengths.
    pub fn new(seqs: &SeqLens, c: usize) -> Result<Self, Error> {
        if c == 0 {
            return Err(Error::Dim { dim: "C", wanted: "at least 1".into(), got: 0 });
        }
        let index = |dim, got: usize| {
            i32::try_from(got).map_err(|_| Error::Dim { dim, wanted: format!("at most {}", i32::MAX), got })
        };
        let mut table = Vec::new();
        let mut offsets = vec![0];
        for i_n in 0..seqs.n() {
            let Some(len) = seqs.len(i_n) else {
                let reason = "its offsets are only on the device, but chunks are cut on the host";
                return Err(Error::SeqLens { reason: reason.into() });
            };
            let chunks = len.div_ceil(c);
            index("NT", chunks)?;
            let i_n = index("N", i_n)?;
            for i_c in 0..chunks {
                table.extend([i_n, index("NT", i_c)?]);
            }
            offsets.push(table.len() / 2);
        }
        Ok(Self { c, table, offsets })
    }

    /// Tokens of a whole chunk.
    #[must_use]
    pub const fn c(&self) -> usize {
        self.c
    }

    /// Chunks of all sequences.
    #[must_use]
    pub fn len(&self) -> usize {
        self.table.len() / 2
    }

    /// Whether there is no chunk.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.table.is_empty()
    }

    /// Chunks before each sequence, `[N + 1]`.
    #[must_use]
    pub fn offsets(&self) -> &[usize] {
        &self.offsets
    }

    /// The table on the device: `[NT, 2]` of sequence and number in the sequence.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`] or [`Error::Driver`].
    pub fn upload(&self, stream: &Arc<CudaStream>) -> Result<CudaSlice<i32>, Error> {
        stream.clone_htod(&self.table).map_err(|error| Error::driver("the copy of a chunk table", error))
    }
}

/// What the kernels of a pass have to know of chunks when each block walks a sequence: nothing more than lengths when
/// sequences are dense.
#[derive(Debug)]
pub struct ChunkCut {
    /// Chunks of all sequences, `NT`.
    pub nt: usize,
    /// Chunks of the longest sequence.
    pub longest: usize,
    /// Tokens before each sequence, on the device: `[N + 1]`; none when sequences are dense.
    pub cu_seqlens: Option<CudaSlice<i64>>,
    /// Chunks before each sequence, on the device: `[N + 1]`; none when sequences are dense.
    pub chunk_offsets: Option<CudaSlice<i64>>,
}

impl ChunkCut {
    /// Cuts every sequence into chunks of `c` tokens, and uploads what packed ones need.
    ///
    /// # Errors
    ///
    /// As [`Chunks::new`], of dense sequences too; [`Error::OutOfMemory`] or [`Error::Driver`].
    pub fn new(device: &Device, seqs: &SeqLens, c: usize) -> Result<Self, Error> {
        if seqs.is_dense() {
            let longest = seqs.t().div_ceil(c);
            let max = i32::MAX as usize;
            if longest > max {
                let wanted = format!("at most {}", max * c);
                return Err(Error::Dim { dim: "T", wanted, got: seqs.t() });
            }
            let nt = seqs.n().saturating_mul(longest);
            return Ok(Self { nt, longest, cu_seqlens: None, chunk_offsets: None });
        }
        let chunks = Chunks::new(seqs, c)?;
        let longest = chunks.offsets().windows(2).map(|pair| pair[1] - pair[0]).max();
        Ok(Self {
            nt: chunks.len(),
            longest: longest.unwrap_or(0),
            cu_seqlens: seqs.cu_seqlens().map(|offsets| device.upload_offsets(offsets)).transpose()?,
            chunk_offsets: Some(device.upload_offsets(chunks.offsets())?),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::{Chunks, SeqLens};

    #[test]
    fn chunks_restart_at_every_sequence() {
        let seqs = SeqLens::packed(&[0, 0, 16, 33, 34, 34], 34).expect("valid");
        let chunks = Chunks::new(&seqs, 16).expect("valid");
        assert_eq!(chunks.table, [1, 0, 2, 0, 2, 1, 3, 0]);
        assert_eq!(chunks.offsets(), [0, 0, 1, 3, 4, 4]);
        let dense = Chunks::new(&SeqLens::dense(2, 17), 16).expect("valid");
        assert_eq!(dense.table, [0, 0, 0, 1, 1, 0, 1, 1]);
        assert!(Chunks::new(&SeqLens::dense(1, 0), 16).expect("valid").is_empty());
        assert!(Chunks::new(&seqs, 0).is_err());
    }
}
