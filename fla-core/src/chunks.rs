//! The chunk table: which sequence a chunk belongs to, and which of its chunks it is.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream};

use crate::{Device, Error, SeqLens, Shape};

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

/// The heads of a pass in equal shares, one after the other: what one of its kernels leaves for the next has to hold one
/// share, and not all heads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadShares {
    /// Heads of a share, of every sequence.
    pub heads: usize,
    /// Shares.
    pub count: usize,
}

impl HeadShares {
    /// All heads at once.
    #[must_use]
    pub const fn whole(h: usize) -> Self {
        Self { heads: h, count: 1 }
    }

    /// The most shares that leave no multiprocessor idle longer, where a head of a sequence takes `blocks` blocks and
    /// `resident` blocks run at a time: shares together take as many turns of the device as all heads at once. Lengths of
    /// packed sequences differ, and it takes a few turns until that evens out.
    #[must_use]
    pub fn most(shape: &Shape, blocks: usize, resident: usize) -> Self {
        const TURNS_OF_PACKED: usize = 4;
        let turns = |heads: usize| {
            let all = shape.seqs.n().saturating_mul(heads).saturating_mul(blocks);
            all.div_ceil(resident.max(1))
        };
        let (h, least) = (shape.h, if shape.seqs.is_dense() { 1 } else { TURNS_OF_PACKED });
        let is_free = |count: usize| {
            let of_share = turns(h / count);
            of_share >= least && count.saturating_mul(of_share) <= turns(h)
        };
        let count = (2..=h).rev().find(|&count| h.is_multiple_of(count) && is_free(count)).unwrap_or(1);
        Self { heads: h / count, count }
    }

    /// The first head of each share.
    pub fn firsts(&self) -> impl Iterator<Item = usize> + use<> {
        let heads = self.heads;
        (0..self.count).map(move |i| i * heads)
    }
}

#[cfg(test)]
mod tests {
    use super::{Chunks, HeadShares, SeqLens, Shape};

    #[test]
    fn shares_leave_no_multiprocessor_idle() {
        let count = |seqs: SeqLens, h, blocks| {
            let shares = HeadShares::most(&Shape { seqs, h, k: 64, v: 64 }, blocks, 132);
            assert_eq!(shares.firsts().count(), shares.count);
            assert_eq!(shares.heads * shares.count, h);
            shares.count
        };
        // 512 blocks take four turns, and so do four times 128.
        assert_eq!(count(SeqLens::dense(8, 4096), 64, 1), 4);
        assert_eq!(count(SeqLens::dense(4, 4096), 64, 1), 2);
        // 140 blocks take two turns: halves of 70 would too, sevenths would not.
        assert_eq!(count(SeqLens::dense(10, 4096), 14, 1), 2);
        // One turn is one turn.
        assert_eq!(count(SeqLens::dense(1, 32768), 64, 2), 1);
        assert_eq!(count(SeqLens::dense(0, 16), 64, 1), 1);
        let packed = |n: usize| {
            let offsets: Vec<usize> = (0..=n).collect();
            SeqLens::packed(&offsets, n).expect("valid")
        };
        assert_eq!(count(packed(8), 64, 1), 1);
        assert_eq!(count(packed(132), 64, 1), 16);
    }

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
