//! Launch tables: which constants a kernel is compiled with for which shape.

use fla_core::{Arch, DType, SmemLayout, StateTile};

/// Constants of `recurrent_fwd` that are a choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RecurrentFwdConfig {
    /// Lanes side by side over V, each with 16 bytes of a row of the state; the other lanes of the warp lie over K.
    pub(crate) lanes_v: usize,
    /// Warps of a block.
    pub(crate) warps: usize,
    /// Blocks that a multiprocessor has to have registers for.
    pub(crate) min_blocks: u32,
    /// Whether the vectors of the next token are loaded while those of this one are used.
    pub(crate) prefetch: bool,
    /// Tokens whose vectors are in shared memory or under way to it.
    pub(crate) ring: usize,
}

impl RecurrentFwdConfig {
    /// Size of the kernel's shared memory; the unit compares it with the kernel's own.
    pub(crate) fn smem_bytes(&self, variant: &RecurrentFwdVariant) -> usize {
        let columns = self.lanes_v * variant.tile().cols();
        self.ring * (3 * variant.k + self.warps * columns) * variant.dtype.bytes()
    }
}

/// How many rows of the state a lane holds, times 4 columns, or half as many rows of 8 columns where the state is bf16:
/// many rows keep much of the state under way at once, few rows spread a small state over more multiprocessors.
///
/// H = 64, K = V = 64, bf16 vectors, H200, microseconds by graph replay over rotating buffers, each with the warps that suit it
/// best (`records/nvidia-h200/2026-11-20-rwkv6-recurrent_fwd-choices.csv`):
///
/// | rows | tokens | B = 1 | B = 8 | B = 16 | B = 32 | B = 64 | B = 256 |
/// |------|--------|-------|-------|--------|--------|--------|---------|
/// | 8    | 1      |  2.15 |  5.78 |   11.7 |   21.2 |   40.0 |     154 |
/// | 16   | 1      |  2.76 |  5.99 |   10.2 |   19.8 |   38.0 |     145 |
/// | 32   | 1      |  3.33 |  6.21 |   9.94 |   19.1 |   36.3 |     136 |
/// | 8    | 4      |  3.92 |  7.79 |   14.7 |   26.4 |   47.7 |     174 |
/// | 16   | 4      |  4.46 |  8.70 |   13.6 |   25.2 |   44.1 |     158 |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rows {
    Few = 8,
    Some = 16,
    Many = 32,
}

/// What a kernel is compiled for: everything but the choices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RecurrentFwdVariant {
    pub(crate) arch: Arch,
    pub(crate) dtype: DType,
    /// What states are stored as.
    pub(crate) state: DType,
    pub(crate) k: usize,
    pub(crate) v: usize,
    /// Every sequence has exactly one token.
    pub(crate) one_token: bool,
    /// The tokens of a sequence are visited from the last to the first.
    pub(crate) reverse: bool,
}

impl RecurrentFwdVariant {
    /// How a state is cut.
    pub(crate) const fn tile(&self) -> StateTile {
        StateTile { dtype: self.dtype, state: self.state, k: self.k, v: self.v }
    }

    /// The choice for `states` states on `sm_count` multiprocessors.
    pub(crate) fn choose(&self, states: usize, sm_count: u32) -> RecurrentFwdConfig {
        let wanted = match self.tile().load(states, sm_count) {
            0..4 => Rows::Few,
            _ if self.one_token => Rows::Many,
            _ => Rows::Some,
        };
        // The nearest that there are registers for.
        let rows = self.rows().iter().rev().find(|rows| **rows as usize <= wanted as usize);
        self.with_rows(rows.copied().unwrap_or(self.rows()[0]))
    }

    /// Every choice that there is, for compiling ahead.
    pub(crate) fn all(&self) -> impl Iterator<Item = RecurrentFwdConfig> {
        self.rows().iter().map(|rows| self.with_rows(*rows))
    }

    /// What registers hold, ascending; more spills.
    fn rows(&self) -> &'static [Rows] {
        // Rows that start anywhere are read element by element, and each element has its own condition.
        let is_aligned = self.k.is_multiple_of(4) && self.v.is_multiple_of(4);
        let is_even = self.k == self.v && [64, 128, 256].contains(&self.k);
        match (self.one_token, is_aligned) {
            (true, _) if is_even && self.dtype != DType::F32 => &[Rows::Few, Rows::Some, Rows::Many],
            (true, _) => &[Rows::Few, Rows::Some],
            (false, false) => &[Rows::Few],
            (false, true) if self.k > 64 => &[Rows::Some],
            (false, true) => &[Rows::Few, Rows::Some],
        }
    }

    fn with_rows(&self, rows: Rows) -> RecurrentFwdConfig {
        let lanes_v = self.tile().lanes_v(rows as usize);
        let ring = if self.one_token { 0 } else { self.ring(lanes_v) };
        let prefetch = !self.one_token && ring == 0 && rows == Rows::Few;
        // Warps of one state share a ring.
        let slices = self.v.div_ceil(lanes_v * self.tile().cols());
        let warps = match rows {
            Rows::Few => 1,
            // A block reads 256 bytes of each row of an f32 state.
            Rows::Many => (64 / self.tile().cols() / lanes_v).max(1),
            Rows::Some if ring > 0 => largest_divisor(slices, 2),
            Rows::Some => 1,
        };
        // Registers of a lane, by the warps that a multiprocessor is to hold: 12 leave 168 and 16 leave 128. They just do on
        // sm_90; on sm_80 a few spill.
        let is_tight = ring > 0
            && rows == Rows::Some
            && self.arch == Arch::SM_90
            && self.state == DType::F32
            && self.k == self.v;
        let min_blocks = match self.k {
            64 if is_tight => 12 / warps as u32,
            128 if is_tight && self.dtype != DType::F32 => 16 / warps as u32,
            _ => 1,
        };
        RecurrentFwdConfig { lanes_v, warps, min_blocks, prefetch, ring }
    }

    /// Tokens of a ring, where the lanes cover the state and every copy and access is a multiple of 16 bytes.
    fn ring(&self, lanes_v: usize) -> usize {
        let (lanes_k, columns) = (32 / lanes_v, lanes_v * self.tile().cols());
        let rows = self.k / lanes_k;
        let fits = rows * lanes_k == self.k
            && self.v.is_multiple_of(columns)
            && [rows, columns].iter().all(|n| (n * self.dtype.bytes()).is_multiple_of(16));
        let token_bytes = (3 * self.k + columns) * self.dtype.bytes();
        match token_bytes {
            _ if !fits => 0,
            ..1024 => 8,
            _ => 4,
        }
    }
}

/// The largest divisor of `n` that is at most `max`, which is a power of two.
fn largest_divisor(n: usize, max: usize) -> usize {
    (0..=max.ilog2()).map(|i| max >> i).find(|divisor| n.is_multiple_of(*divisor)).unwrap_or(1)
}

/// Tokens of a chunk: one tile of the tensor cores.
pub(crate) const CHUNK: usize = 16;

/// Key channels that a block may have: a lane has registers for so many rows of the state.
const MAX_BK: usize = 128;

/// What the chunk kernels are compiled for: everything but the choices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ChunkVariant {
    pub(crate) arch: Arch,
    pub(crate) dtype: DType,
    pub(crate) k: usize,
    pub(crate) v: usize,
}

/// Constants of a forward kernel that are a choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ChunkFwdConfig {
    /// Value channels of a block, a multiple of 16: slices of V, whose columns of the state do not meet. A warp has 16.
    pub(crate) bv: usize,
    /// Warps that only make operands; with none those of the state make them.
    pub(crate) prep_warps: usize,
    /// Blocks that a multiprocessor has to have registers for.
    pub(crate) min_blocks: u32,
}

/// Constants of a backward kernel that are a choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ChunkBwdConfig {
    /// Value channels of a block, a multiple of 16.
    pub(crate) bv: usize,
    /// Chunks in shared memory or under way to it, 2 or 3.
    pub(crate) stages: usize,
    /// Blocks that a multiprocessor has to have registers for.
    pub(crate) min_blocks: u32,
}

/// A choice with which a kernel may be compiled.
pub(crate) trait ChunkChoice: Copy + std::fmt::Debug {
    /// The choice that leaves more registers to a lane, for heads for which this one leaves too few: which these are, only the
    /// assembler knows. None when there is no other.
    fn with_more_registers(self) -> Option<Self>;
}

impl ChunkChoice for ChunkFwdConfig {
    fn with_more_registers(self) -> Option<Self> {
        match (self.min_blocks, self.prep_warps, self.bv) {
            (2.., ..) => Some(Self { min_blocks: 1, ..self }),
            (_, 0, ..=64) => Some(Self { prep_warps: 4, ..self }),
            (_, _, 80..) => Some(Self { bv: 64, prep_warps: 4, ..self }),
            _ => None,
        }
    }
}

impl ChunkChoice for ChunkBwdConfig {
    fn with_more_registers(self) -> Option<Self> {
        match (self.min_blocks, self.bv) {
            (2.., _) => Some(Self { min_blocks: 1, ..self }),
            (_, 17..) => Some(Self { bv: (self.bv / 2).next_multiple_of(16), ..self }),
            // Two chunks change places with fewer registers than three.
            _ if self.stages == 3 => Some(Self { stages: 2, ..self }),
            _ => None,
        }
    }
}

/// What a forward kernel writes, beside the final state; `Segments` is for what segments of sequences do to a state that is
/// zero, and nothing else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ChunkFwdWrites {
    Output,
    OutputAndStates,
    States,
    Segments,
}

impl ChunkFwdWrites {
    pub(crate) const ALL: [Self; 4] = [Self::Output, Self::OutputAndStates, Self::States, Self::Segments];

    pub(crate) const fn output(self) -> bool {
        matches!(self, Self::Output | Self::OutputAndStates)
    }

    pub(crate) const fn states(self) -> bool {
        matches!(self, Self::States | Self::OutputAndStates)
    }
}

impl ChunkVariant {
    /// Images in bf16 that make an operand of the tensor cores: of other types the sum of two, which is nearer than one.
    pub(crate) fn parts(&self) -> usize {
        if self.dtype == DType::Bf16 { 1 } else { 2 }
    }

    /// Key channels of a block: all of K, or the fewest slices, alike, that registers and the smallest block of either pass
    /// have room for. Both passes have the same, as one writes the states that the other reads.
    ///
    /// With all of K = 256 in a block nothing compiles without spills for sm_90a: forward, where the state alone takes 128 registers
    /// of a lane, 4 to 172 bytes; backward, where 16 warps leave 128 registers to a lane, 204 and more. Slices of K cost sums of `o`
    /// and of `dv`, two numbers in f32 for each that is written; what a slice reads beside its own is `v` and `d_o`.
    pub(crate) fn bk(&self) -> usize {
        let smem_bytes = self.arch.smem_bytes();
        let fits = |bk: &usize| {
            let smallest = self.fwd_smem(*bk, 16).max(self.bwd_smem(*bk, 16, 2));
            *bk <= MAX_BK && smallest <= smem_bytes
        };
        (1..=self.k).map(|slices| self.k.div_ceil(slices).next_multiple_of(16)).find(fits).unwrap_or(16)
    }

    /// Slices of K.
    pub(crate) fn slices_k(&self) -> usize {
        self.k.div_ceil(self.bk())
    }

    /// K and V as slices and tiles cover them.
    fn covered(&self) -> (usize, usize) {
        (self.slices_k() * self.bk(), self.v.next_multiple_of(16))
    }

    /// Numbers of a saved state.
    pub(crate) fn saved_state_len(&self) -> usize {
        self.parts() * self.local_state_len()
    }

    /// Numbers of a state that a segment leaves.
    pub(crate) fn local_state_len(&self) -> usize {
        let (k, v) = self.covered();
        k * v
    }

    /// Numbers of its decay.
    pub(crate) fn local_decay_len(&self) -> usize {
        self.covered().0
    }

    /// The fewest slices of V that have at most `max` channels each, alike.
    fn bv(&self, max: usize) -> usize {
        self.v.div_ceil(self.v.div_ceil(max)).next_multiple_of(16)
    }

    /// Whether rows of K and of V are whole slices and tiles.
    fn is_even(&self) -> bool {
        self.k == self.covered().0 && self.v.is_multiple_of(16)
    }

    /// The choice for a forward pass: a warp for every 16 value channels, which holds BK / 2 registers of state in each lane.
    pub(crate) fn fwd(&self, writes: ChunkFwdWrites, smem_bytes: usize) -> ChunkFwdConfig {
        let (bk, bv) = (self.bk(), self.bv(128));
        let is_small = self.parts() == 1 && bk <= 64 && bv <= 64;
        // 16 warps of a multiprocessor leave 128 registers to a lane, and 8 leave all that it can have.
        let min_blocks = if is_small && self.arch == Arch::SM_90 { 4 } else { spare_blocks(bv / 16) };
        let mut config = match bk {
            // Two parts and half of all registers for the state: some bytes spill where rows of K are cut, and with other
            // assemblers.
            65.. if self.parts() == 2 && (self.arch != Arch::SM_90 || self.slices_k() > 1) => {
                ChunkFwdConfig { bv: self.bv(64), prep_warps: 4, min_blocks: 1 }
            }
            // A state of 64 registers leaves none for making operands beside it if 16 warps are to share a multiprocessor, which
            // they do in 0.61 ms where 8 take 0.75 (B4 T4096 H64 K = V = 128, H200, the same record as below); writing states takes more of them.
            65..=128 if self.parts() == 1 && self.arch == Arch::SM_90 && bv == 128 && self.is_even() => {
                let prep_warps = if writes.states() { 4 } else { 8 };
                ChunkFwdConfig { bv, prep_warps, min_blocks: 1 }
            }
            _ => ChunkFwdConfig { bv, prep_warps: 0, min_blocks },
        };
        while self.fwd_smem_bytes(&config) > smem_bytes && config.bv > 16 {
            config.bv = (config.bv / 2).next_multiple_of(16);
        }
        config
    }

    /// The choice for a backward pass: a warp for every 16 key channels, which holds BV / 2 registers of gradients of the
    /// state in each lane. Slices of V cost sums in device memory.
    pub(crate) fn bwd(&self, smem_bytes: usize) -> ChunkBwdConfig {
        let bk = self.bk();
        // Rows that end within a tile, and slices of V, take registers for their conditions; from sm_100 on so does more.
        let is_even = self.is_even();
        let is_aligned = [self.k, self.v].iter().all(|d| d.is_multiple_of(4));
        let is_newer = self.arch.major() >= 10;
        let bv = self.bv(match (self.parts(), bk) {
            (1, 33..) if is_even && self.v <= 128 && !is_newer => 128,
            (1, _) if is_even => 64,
            (1, _) if is_newer => 16,
            (1, _) => 48,
            (_, 65..) if is_even && self.v <= 128 && self.slices_k() == 1 => 64,
            _ if is_aligned => 32,
            _ => 16,
        });
        let min_blocks = spare_blocks(bk / 16);
        let stages = if is_newer && !is_even && self.slices_k() > 1 { 2 } else { 3 };
        let mut config = ChunkBwdConfig { bv, stages, min_blocks };
        while self.bwd_smem_bytes(&config) > smem_bytes {
            match config {
                ChunkBwdConfig { stages: 3, .. } => config.stages = 2,
                ChunkBwdConfig { bv: 17.., .. } => config.bv = (config.bv / 2).next_multiple_of(16),
                _ => break,
            }
        }
        config
    }

    /// Size of the forward kernel's shared memory; the unit compares it with the kernel's own.
    pub(crate) fn fwd_smem_bytes(&self, config: &ChunkFwdConfig) -> usize {
        self.fwd_smem(self.bk(), config.bv)
    }

    fn fwd_smem(&self, bk: usize, bv: usize) -> usize {
        let operands = SmemLayout::default()
            .with_many(2, SmemLayout::block_tile(self.parts(), CHUNK, bk))
            .with(channels(bk))
            .finished();
        SmemLayout::default()
            .with_many(2 * 3, SmemLayout::token_tile(self.dtype, bk))
            .with_many(4, SmemLayout::token_tile(self.dtype, bv))
            .with_many(3, operands)
            .with_many(2 * (bk / 16) + 2, SmemLayout::acc_tile())
            .with_many(SUMS, SmemLayout::block_tile(1, CHUNK, CHUNK))
            .with_many(2, channels(bk))
            .finished()
            .bytes()
    }

    /// Size of the backward kernel's shared memory.
    pub(crate) fn bwd_smem_bytes(&self, config: &ChunkBwdConfig) -> usize {
        self.bwd_smem(self.bk(), config.bv, config.stages)
    }

    fn bwd_smem(&self, bk: usize, bv: usize, stages: usize) -> usize {
        let stage = SmemLayout::default()
            .with_many(3, SmemLayout::token_tile(self.dtype, bk))
            .with_many(2, SmemLayout::token_tile(self.dtype, bv))
            .finished();
        SmemLayout::default()
            .with_many(stages, stage)
            .with(SmemLayout::new(2 * self.parts() * bk * bv * 2, 16))
            .with(SmemLayout::block_tile(self.parts(), bk, bv))
            .with(SmemLayout::block_tile(self.parts(), bk, CHUNK))
            .with_many(bk / 16 + 1, SmemLayout::acc_tile())
            .with_many(SUMS, SmemLayout::block_tile(1, CHUNK, CHUNK))
            .finished()
            .bytes()
    }
}

/// Blocks of so many warps that a multiprocessor holds without taking a register from a lane.
fn spare_blocks(warps: usize) -> u32 {
    (8 / warps).max(1) as u32
}

/// Matrices that sum up log decays, `DecaySums`.
const SUMS: usize = 6;

/// A number in f32 for each channel.
const fn channels(count: usize) -> SmemLayout {
    SmemLayout::new(count * 4, 16)
}

/// What a multiprocessor keeps for itself of the shared memory of each block.
const RESERVED_SMEM_BYTES: usize = 1 << 10;

/// Where long sequences are cut, so that few heads fill the GPU: segments of whole chunks, which blocks take side by side. The
/// kernel then runs twice, first for what each segment does to a state.
///
/// Microseconds in bf16 on an H200, of the first kernels, which were slower (`records/nvidia-h200/2026-11-20-rwkv6-chunk-choices.txt`):
///
/// | B, T, H, K = V | pass | whole | 4 segments | 8 | 16 |
/// |---|---|---|---|---|---|
/// | 1, 32768, 64, 64 | forward | 2480 | | 910 | 920 |
/// | 1, 32768, 64, 64 | backward | 4500 | 1890 | 1880 | |
/// | 8, 1024, 8, 64 | forward | 103 | | 71 | |
/// | 8, 1024, 8, 64 | backward | 176 | 96 | 111 | |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segments {
    /// Chunks of a segment, at least 1.
    pub(crate) chunks: usize,
    /// Segments of the longest sequence, at least 1.
    pub(crate) count: usize,
}

impl Segments {
    /// A segment has at least so many chunks: less is done before its state has been folded.
    const MIN_CHUNKS: usize = 8;

    /// A segment folds the states of all before it.
    const MAX_COUNT: usize = 16;

    /// The choice that fills `slots` blocks about once, for sequences of `chunks` chunks of which the longest has `longest`,
    /// with `blocks` blocks for each of them.
    pub(crate) fn new(chunks: usize, longest: usize, blocks: usize, slots: usize) -> Self {
        // A share of all chunks is what a slot has to do in any case.
        let wanted = longest.saturating_mul(slots) / chunks.saturating_mul(blocks).max(1);
        let count = wanted.min(longest / Self::MIN_CHUNKS).clamp(1, Self::MAX_COUNT);
        let chunks = longest.div_ceil(count).max(1);
        Self { chunks, count: longest.div_ceil(chunks).max(1) }
    }

    /// Whether no sequence is cut.
    pub(crate) const fn is_whole(&self) -> bool {
        self.count == 1
    }
}

/// Blocks that a GPU of `sm_count` multiprocessors holds, when one has registers for `min_blocks` of them, and so much shared
/// memory for a block of which this one has so much.
pub(crate) fn slots(sm_count: u32, min_blocks: u32, smem_bytes: usize, block_smem_bytes: usize) -> usize {
    let of_smem = (smem_bytes + RESERVED_SMEM_BYTES) / (block_smem_bytes + RESERVED_SMEM_BYTES);
    sm_count as usize * of_smem.clamp(1, min_blocks as usize)
}

#[cfg(test)]
mod tests {
    use super::{
        ChunkBwdConfig, ChunkChoice, ChunkFwdConfig, ChunkFwdWrites, ChunkVariant, RecurrentFwdVariant,
        Segments, slots,
    };
    use fla_core::{Arch, DType};

    const BASE: RecurrentFwdVariant = RecurrentFwdVariant {
        arch: Arch::SM_90,
        dtype: DType::Bf16,
        state: DType::F32,
        k: 64,
        v: 64,
        one_token: true,
        reverse: false,
    };

    #[test]
    fn small_batches_are_spread_and_large_ones_keep_more_under_way() {
        let lanes_v =
            |d: usize, b: usize| RecurrentFwdVariant { k: d, v: d, ..BASE }.choose(b * 4096 / d, 132).lanes_v;
        assert_eq!([1, 8, 16, 32, 256].map(|b| lanes_v(64, b)), [4, 4, 16, 16, 16]);
        assert_eq!([1, 2, 8, 32].map(|b| lanes_v(128, b)), [2, 2, 8, 8]);
    }

    #[test]
    fn every_choice_of_a_plan_can_be_compiled_ahead() {
        for k in [1, 7, 32, 60, 64, 100, 128, 200, 256] {
            for one_token in [true, false] {
                let variant = RecurrentFwdVariant { k, one_token, ..BASE };
                for states in [1, 100, 1000, 10_000, 100_000, usize::MAX] {
                    let config = variant.choose(states, 132);
                    assert!(variant.all().any(|other| other == config), "K = {k}: {config:?}");
                }
            }
        }
    }

    #[test]
    fn chunk_choices_cover_every_head_and_fit_a_block() {
        for arch in [Arch::SM_80, Arch::new(8, 9), Arch::SM_90, Arch::new(12, 0)] {
            for (k, v) in (1..=256).flat_map(|d| [(d, d), (d, 64), (64, d), (256, d), (d, 256)]) {
                for dtype in [DType::Bf16, DType::F16, DType::F32] {
                    let variant = ChunkVariant { arch, dtype, k, v };
                    let (bk, slices_k) = (variant.bk(), variant.slices_k());
                    assert!(bk.is_multiple_of(16) && bk <= 128, "{variant:?}: {bk}");
                    assert!(slices_k * bk >= k && (slices_k - 1) * bk < k, "{variant:?}: {bk}");
                    let smem_bytes = arch.smem_bytes();
                    let fwd = ChunkFwdWrites::ALL.map(|writes| variant.fwd(writes, smem_bytes));
                    let bwd = variant.bwd(smem_bytes);
                    let of_fwd = fwd.map(|fwd| (fwd.bv, variant.fwd_smem_bytes(&fwd)));
                    for (bv, bytes) in of_fwd.into_iter().chain([(bwd.bv, variant.bwd_smem_bytes(&bwd))]) {
                        let what = || format!("{arch} {variant:?} {fwd:?} {bwd:?}: {bytes} bytes");
                        assert!(bytes <= smem_bytes, "{}", what());
                        assert!(bv.is_multiple_of(16) && bv <= 128, "{}", what());
                        let slices = v.div_ceil(bv);
                        assert!(slices * bv >= v && (slices - 1) * bv < v, "{}", what());
                    }
                }
            }
        }
    }

    #[test]
    fn k_is_cut_where_registers_or_shared_memory_end() {
        let cut = |arch, dtype, k| {
            let variant = ChunkVariant { arch, dtype, k, v: 64 };
            (variant.bk(), variant.slices_k())
        };
        let on_h200 = [1, 60, 64, 128, 129, 160, 192, 200, 208, 256].map(|k| cut(Arch::SM_90, DType::F32, k));
        let wanted =
            [(16, 1), (64, 1), (64, 1), (128, 1), (80, 2), (80, 2), (96, 2), (112, 2), (112, 2), (128, 2)];
        assert_eq!(on_h200, wanted);
        // 99 KiB for a block.
        let ada = Arch::new(8, 9);
        assert_eq!([64, 128, 256].map(|k| cut(ada, DType::Bf16, k)), [(64, 1), (128, 1), (128, 2)]);
        assert_eq!([64, 128, 256].map(|k| cut(ada, DType::F32, k)), [(64, 1), (64, 2), (64, 4)]);
    }

    #[test]
    fn every_choice_ends_with_the_most_registers() {
        let mut config = ChunkBwdConfig { bv: 112, stages: 3, min_blocks: 4 };
        let mut seen = Vec::new();
        while let Some(next) = config.with_more_registers() {
            config = next;
            seen.push((config.bv, config.stages, config.min_blocks));
        }
        assert_eq!(seen, [(112, 3, 1), (64, 3, 1), (32, 3, 1), (16, 3, 1), (16, 2, 1)]);
        let mut config = ChunkFwdConfig { bv: 128, prep_warps: 0, min_blocks: 4 };
        let mut seen = Vec::new();
        while let Some(next) = config.with_more_registers() {
            config = next;
            seen.push((config.bv, config.prep_warps, config.min_blocks));
        }
        assert_eq!(seen, [(128, 0, 1), (64, 4, 1)]);
    }

    #[test]
    fn few_heads_are_cut_into_segments() {
        // Chunks of 16 tokens of dense sequences; blocks of a forward pass of 64 by 64 on an H200.
        let count = |b: usize, t: usize, h: usize, slots: usize| {
            let longest = t.div_ceil(16);
            let segments = Segments::new(b * longest, longest, h, slots);
            assert!(segments.chunks * segments.count >= longest, "{segments:?}");
            assert!((segments.count - 1) * segments.chunks < longest.max(1), "{segments:?}");
            segments.count
        };
        let (fwd, bwd) = (4 * 132, 2 * 132);
        assert_eq!([fwd, bwd].map(|slots| count(8, 4096, 64, slots)), [1, 1]);
        assert_eq!([fwd, bwd].map(|slots| count(1, 32768, 64, slots)), [8, 4]);
        assert_eq!([fwd, bwd].map(|slots| count(8, 1024, 8, slots)), [8, 4]);
        // Never many, and never short.
        assert_eq!(count(1, 1 << 20, 1, fwd), 16);
        assert_eq!([0, 1, 255, 256, 300].map(|t| count(1, t, 1, fwd)), [1, 1, 2, 2, 2]);
        assert_eq!([0, 1, 240].map(|t| count(1, t, 1, fwd)), [1, 1, 1]);
        assert_eq!(Segments::new(0, 0, 3, fwd), Segments { chunks: 1, count: 1 });
        // One long sequence among short ones is cut: they leave the slots idle soon.
        assert_eq!(Segments::new(2000 + 100, 2000, 8, fwd).count, 16);
    }

    #[test]
    fn slots_are_what_registers_and_shared_memory_hold() {
        assert_eq!(slots(132, 4, 227 << 10, 49152), 4 * 132);
        assert_eq!(slots(132, 4, 99 << 10, 49152), 2 * 132);
        assert_eq!(slots(132, 4, 227 << 10, 227 << 10), 132);
    }

    #[test]
    fn saved_states_are_whole_tiles() {
        let variant = |dtype, k, v| ChunkVariant { arch: Arch::SM_90, dtype, k, v };
        assert_eq!(variant(DType::Bf16, 60, 17).saved_state_len(), 64 * 32);
        assert_eq!(variant(DType::F16, 64, 64).saved_state_len(), 2 * 64 * 64);
        assert_eq!(variant(DType::F32, 64, 64).local_state_len(), 64 * 64);
        // Two slices of 112 rows.
        assert_eq!(variant(DType::Bf16, 200, 64).saved_state_len(), 224 * 64);
        assert_eq!(variant(DType::Bf16, 200, 64).local_decay_len(), 224);
    }
}
