//! How recurrent kernels cut matrix states: over the lanes of warps, or over groups that stream them through shared memory.

use crate::{DType, Error, Grid, SeqLens};

/// A matrix state `[K, V]` and the vectors beside it, as `recurrent.cuh` cuts them: a lane has 16 bytes of some rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StateTile {
    /// What vectors are stored as.
    pub dtype: DType,
    /// What states are stored as.
    pub state: DType,
    /// Rows of the state.
    pub k: usize,
    /// Columns of the state.
    pub v: usize,
}

impl StateTile {
    /// Columns of a lane: 16 bytes of a row of the state.
    #[must_use]
    pub const fn cols(&self) -> usize {
        16 / self.state.bytes()
    }

    /// Warps for every multiprocessor, if each held 4096 numbers of a state: 32 rows by 4 columns a lane.
    #[must_use]
    pub fn load(&self, states: usize, sm_count: u32) -> usize {
        states.saturating_mul(self.k * self.v) / (32 * 128) / sm_count.max(1) as usize
    }

    /// Lanes side by side over V, when a lane is to hold as many numbers as `rows` rows of 4 columns have; the other
    /// lanes of the warp lie over K.
    #[must_use]
    pub fn lanes_v(&self, rows: usize) -> usize {
        // As many numbers of the state for other columns, but whole accesses of the vectors over K.
        let own_rows = (rows * 4 / self.cols()).max(16 / self.dtype.bytes());
        32 / self.k.div_ceil(own_rows).next_power_of_two().min(32)
    }

    /// Rows of a lane when `lanes_v` of them lie over V: whole accesses of the vectors over K.
    #[must_use]
    pub fn rows(&self, lanes_v: usize) -> usize {
        let mut access = 16 / self.dtype.bytes();
        while !self.k.is_multiple_of(access) {
            access /= 2;
        }
        self.k.div_ceil(32 / lanes_v).next_multiple_of(access)
    }

    /// Blocks of `warps` warps that have `lanes_v` lanes over V; none when there is no state.
    ///
    /// # Errors
    ///
    /// [`Error::Dim`] when `states`, which is `dims`, makes more warps than kernels count.
    pub fn grid(
        &self,
        dims: &'static str,
        states: usize,
        lanes_v: usize,
        warps: usize,
    ) -> Result<Option<Grid>, Error> {
        let columns = self.cols() * lanes_v;
        match i32::try_from(states.saturating_mul(self.v.div_ceil(columns))) {
            Ok(0) => Ok(None),
            Ok(slices) => Ok(Some(Grid::x((slices as u32).div_ceil(warps as u32)))),
            Err(_) => {
                let wanted = format!("such that {dims} * ceil(V / {columns}) is at most {}", i32::MAX);
                Err(Error::Dim { dim: dims, wanted, got: states })
            }
        }
    }
}

/// How `recurrent_stream.cuh` cuts states: groups of warps that take one state after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StateStream {
    /// Lanes side by side over V, each with 16 bytes of a row of the state; the other lanes of the warp lie over K.
    pub lanes_v: usize,
    /// Warps that share a state, side by side over V.
    pub warps: usize,
    /// Groups of such warps in a block.
    pub groups: usize,
    /// States of a group that are worked on or under way.
    pub slots: usize,
}

impl StateStream {
    /// Groups of at most `max_warps` warps, as many as there is shared memory for; none when the lanes cannot cover the
    /// state or too few fit. `vector_bytes` are the vectors that travel with a state.
    #[must_use]
    pub fn new(tile: &StateTile, vector_bytes: usize, max_warps: usize, smem_bytes: usize) -> Option<Self> {
        let StateTile { dtype, k, v, .. } = *tile;
        // A lane holds 16 rows of the state, or fewer.
        let warps = (k * v).div_ceil(2048).next_power_of_two();
        let lanes_v = v / tile.cols() / warps;
        let rows = k * lanes_v / 32;
        // The lanes cover the state without a rest, and every copy and access is a multiple of 16 bytes.
        let fits = warps <= max_warps
            && lanes_v.is_power_of_two()
            && lanes_v <= 32
            && lanes_v * tile.cols() * warps == v
            && rows * 32 == k * lanes_v
            && [rows, k, v].iter().all(|n| (n * dtype.bytes()).is_multiple_of(16));
        // As many groups as make 8 warps, or as there is room for with two slots each; a third slot where it fits.
        let sizes = (1..=(8 / warps.max(1)).min(4)).rev().flat_map(|groups| [(groups, 3), (groups, 2)]);
        let mut choices = sizes.map(|(groups, slots)| Self { lanes_v, warps, groups, slots });
        choices.find(|choice| fits && choice.smem_bytes(tile, vector_bytes) <= smem_bytes)
    }

    /// Size of the kernel's shared memory; the unit compares it with the kernel's own.
    #[must_use]
    pub fn smem_bytes(&self, tile: &StateTile, vector_bytes: usize) -> usize {
        let slot = tile.state.bytes() * tile.k * tile.v + vector_bytes + size_of::<i64>();
        let slots = self.groups * self.slots;
        (slots * slot.next_multiple_of(128) + slots * size_of::<u64>()).next_multiple_of(128)
    }

    /// Threads of a block.
    #[must_use]
    pub const fn threads(&self) -> u32 {
        (32 * self.warps * self.groups) as u32
    }
}

/// How `recurrent_bwd.cuh` walks back over sequences: blocks that take one state after the other, each with memory of its
/// own for the states that it will see again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WalkBack {
    /// Lanes side by side over V, each with 4 columns; the other lanes of the warp lie over K.
    pub lanes_v: usize,
    /// Warps of a block, side by side over V.
    pub warps: usize,
    /// Times that a block goes over a sequence to see all columns of its state.
    pub parts: usize,
    /// Blocks of the launch; 0 when there is no state.
    pub blocks: usize,
    /// Tokens between two states that are kept on the way forward.
    pub segment: usize,
    /// States that a block has memory for.
    pub scratch_states: usize,
    /// Numbers of one of them.
    pub scratch_elems: usize,
}

impl WalkBack {
    /// Rows of a lane: the state, its gradient and the vectors of a token share the registers.
    const ROWS: usize = 8;
    /// Warps of a block: a thread of 8 warps may have 255 registers.
    const MAX_WARPS: usize = 8;

    /// The walk over `states` states of these sequences. A sequence of L tokens is cut into about the root of L segments
    /// of as many tokens, which keeps the fewest states.
    ///
    /// # Errors
    ///
    /// [`Error::SeqLens`] when only the device knows the lengths.
    pub fn new(tile: &StateTile, seqs: &SeqLens, states: usize, sm_count: u32) -> Result<Self, Error> {
        if seqs.is_on_device() {
            let reason =
                "its offsets are only on the device, but a backward pass keeps states for known lengths";
            return Err(Error::SeqLens { reason: reason.into() });
        }
        let longest = (0..seqs.n()).filter_map(|i_n| seqs.len(i_n)).max().unwrap_or(0);
        let lanes_v = tile.lanes_v(Self::ROWS);
        let columns = tile.cols() * lanes_v;
        let warps = tile.v.div_ceil(columns).min(Self::MAX_WARPS);
        let segment = longest.isqrt().max(1);
        Ok(Self {
            lanes_v,
            warps,
            parts: tile.v.div_ceil(columns * warps),
            blocks: states.min(sm_count as usize * (Self::MAX_WARPS / warps)),
            segment,
            scratch_states: segment + longest.div_ceil(segment),
            scratch_elems: tile.rows(lanes_v) * tile.cols() * 32 * warps,
        })
    }

    /// Numbers of all blocks' memory; saturates.
    #[must_use]
    pub fn scratch_len(&self) -> usize {
        self.blocks.saturating_mul(self.scratch_states).saturating_mul(self.scratch_elems)
    }

    /// Numbers of the sums that go from one part of the columns to the next, for `vectors` vectors of `len` numbers.
    #[must_use]
    pub const fn partial_len(&self, vectors: usize, len: usize) -> usize {
        if self.parts > 1 { vectors.saturating_mul(len) } else { 0 }
    }

    /// Threads of a block.
    #[must_use]
    pub const fn threads(&self) -> u32 {
        32 * self.warps as u32
    }
}

#[cfg(test)]
mod tests {
    use super::{StateStream, StateTile, WalkBack};
    use crate::{DType, SeqLens};

    const BASE: StateTile = StateTile { dtype: DType::Bf16, state: DType::F32, k: 64, v: 64 };

    #[test]
    fn lanes_hold_the_rows_that_are_asked_for() {
        let lanes_v = |k, rows| StateTile { k, ..BASE }.lanes_v(rows);
        assert_eq!([8, 16, 32].map(|rows| lanes_v(64, rows)), [4, 8, 16]);
        assert_eq!([8, 16, 32].map(|rows| lanes_v(128, rows)), [2, 4, 8]);
        assert_eq!([1, 7, 33, 256].map(|k| lanes_v(k, 8)), [32, 32, 4, 1]);
    }

    #[test]
    fn a_grid_covers_all_columns_or_is_refused() {
        let blocks = |states, warps| BASE.grid("N * H", states, 4, warps).map(|grid| format!("{grid:?}"));
        assert_eq!(BASE.grid("N * H", 0, 4, 1).ok(), Some(None));
        assert!(blocks(3, 1).is_ok_and(|grid| grid.contains("12")));
        let error = blocks(usize::MAX, 1).expect_err("too many").to_string();
        assert!(error.contains("N * H"), "{error}");
    }

    #[test]
    fn groups_cover_their_states() {
        let stream = |k, v| StateStream::new(&StateTile { k, v, ..BASE }, 1024, 8, 227 << 10);
        for (k, v) in [(64, 64), (128, 128), (64, 128), (128, 64), (32, 32)] {
            let choice = stream(k, v).expect("streams");
            assert_eq!(choice.lanes_v * 4 * choice.warps, v, "{choice:?}");
        }
        for (k, v) in [(60, 60), (256, 256), (64, 96), (1, 1), (4, 2048)] {
            assert_eq!(stream(k, v), None, "{k} {v}");
        }
        let small = StateStream::new(&BASE, 1024, 8, 99 << 10).expect("streams");
        assert!(small.smem_bytes(&BASE, 1024) <= 99 << 10, "{small:?}");
    }

    #[test]
    fn a_walk_back_keeps_few_states() {
        let walk = |k, v, t| {
            let tile = StateTile { k, v, ..BASE };
            WalkBack::new(&tile, &SeqLens::dense(2, t), 100, 132).expect("known lengths")
        };
        let base = walk(64, 64, 4096);
        assert_eq!((base.warps, base.parts, base.blocks), (4, 1, 100));
        assert_eq!((base.segment, base.scratch_states, base.scratch_elems), (64, 128, 4096));
        assert_eq!((walk(128, 128, 1).warps, walk(128, 128, 1).parts), (8, 2));
        assert_eq!(walk(256, 512, 1).parts, 16);
        for t in [0, 1, 2, 3, 15, 16, 17, 1000] {
            let WalkBack { segment, scratch_states, .. } = walk(64, 64, t);
            assert!(scratch_states >= segment + t.div_ceil(segment), "{t}");
        }
        let on_device = WalkBack::new(&BASE, &SeqLens::packed_on_device(3, 100), 3, 132);
        assert!(on_device.expect_err("unknown lengths").to_string().contains("only on the device"));
    }
}
