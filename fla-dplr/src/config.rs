//! Launch tables: which constants a kernel is compiled with for which shape.

use fla_core::{Arch, DType, Device, Shape, SmemLayout, StateStream, StateTile};

use crate::{Decay, Transition};

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
        self.ring * (5 * variant.k + self.warps * columns) * variant.dtype.bytes()
    }
}

/// How many rows of the state a lane holds, times 4 columns, or half as many rows of 8 columns where the state is bf16: many
/// rows keep much of the state under way at once, few rows spread a small state over more multiprocessors.
///
/// One token, H = 64, K = V = 64, bf16 vectors, H200, microseconds by graph replay over rotating buffers
/// (`records/nvidia-h200/2026-11-20-recurrent_fwd-choices.csv`):
///
/// | rows |  B = 1 | B = 8 | B = 16 | B = 32 | B = 64 | B = 256 |
/// |------|--------|-------|--------|--------|--------|---------|
/// | 8    |   2.34 |  5.98 |   11.0 |   22.1 |   44.3 |     173 |
/// | 16   |   2.98 |  6.51 |   10.2 |   20.3 |   39.2 |     152 |
/// | 32   |   3.37 |  6.91 |   11.0 |   20.2 |   37.7 |     141 |
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
    /// What `a` and `b` are.
    pub(crate) transition: Transition,
}

impl RecurrentFwdVariant {
    /// How a state is cut.
    pub(crate) const fn tile(&self) -> StateTile {
        StateTile { dtype: self.dtype, state: self.state, k: self.k, v: self.v }
    }

    /// The choice for `states` states on `sm_count` multiprocessors.
    pub(crate) fn choose(&self, states: usize, sm_count: u32) -> RecurrentFwdConfig {
        let rows = match self.tile().load(states, sm_count) {
            _ if !self.one_token && self.k > 64 => Rows::Some,
            0..4 => Rows::Few,
            4..12 => Rows::Some,
            _ if self.holds_many_rows() => Rows::Many,
            _ => Rows::Some,
        };
        self.with_rows(rows)
    }

    /// Whether registers hold 32 rows: there is no loop over tokens beside them, vectors are of 16 bits, and the heads are
    /// of the sizes for which the compiler keeps them all. Others spill.
    fn holds_many_rows(&self) -> bool {
        self.one_token && self.dtype != DType::F32 && self.k == self.v && [64, 128, 256].contains(&self.k)
    }

    /// Every choice that there is, for compiling ahead.
    pub(crate) fn all(&self) -> impl Iterator<Item = RecurrentFwdConfig> {
        let rows: &[Rows] = match (self.one_token, self.k > 64) {
            (true, _) if self.holds_many_rows() => &[Rows::Few, Rows::Some, Rows::Many],
            (true, _) | (false, false) => &[Rows::Few, Rows::Some],
            (false, true) => &[Rows::Some],
        };
        rows.iter().map(|rows| self.with_rows(*rows))
    }

    fn with_rows(&self, rows: Rows) -> RecurrentFwdConfig {
        let lanes_v = self.tile().lanes_v(rows as usize);
        // With many rows a block covers 64 columns, so that it reads 256 bytes of each row of an f32 state.
        let warps = if rows == Rows::Many { (64 / self.tile().cols() / lanes_v).max(1) } else { 1 };
        // 16 warps leave 128 registers to a lane, which just do for these heads on sm_90.
        let tight = self.arch == Arch::SM_90
            && self.one_token
            && self.dtype != DType::F32
            && self.state == DType::F32
            && self.transition == Transition::General
            && rows == Rows::Some
            && self.k == self.v
            && (self.k == 64 || self.k == 128);
        if tight {
            return RecurrentFwdConfig { lanes_v, warps, min_blocks: 16, prefetch: false, ring: 0 };
        }
        let ring = if self.one_token { 0 } else { self.ring(lanes_v) };
        if ring == 0 {
            let prefetch = !self.one_token && rows == Rows::Few;
            return RecurrentFwdConfig { lanes_v, warps, min_blocks: 1, prefetch, ring };
        }
        // Warps of one state share a ring.
        let slices = self.v.div_ceil(lanes_v * self.tile().cols());
        let warps = if rows == Rows::Few { 1 } else { largest_divisor(slices, 4) };
        // 12 warps of a multiprocessor leave 168 registers to a lane, which do for these heads.
        let tight = rows == Rows::Some
            && self.arch == Arch::SM_90
            && self.state == DType::F32
            && self.dtype != DType::F32
            && self.k == self.v
            && (self.k == 64 || self.k == 128);
        let min_blocks = if tight { 12 / warps as u32 } else { 1 };
        RecurrentFwdConfig { lanes_v, warps, min_blocks, prefetch: false, ring }
    }

    /// Tokens of a ring, where the lanes cover the state and every copy and access is a multiple of 16 bytes.
    fn ring(&self, lanes_v: usize) -> usize {
        let (lanes_k, columns) = (32 / lanes_v, lanes_v * self.tile().cols());
        let rows = self.k / lanes_k;
        let fits = rows * lanes_k == self.k
            && self.v.is_multiple_of(columns)
            && [rows, columns].iter().all(|n| (n * self.dtype.bytes()).is_multiple_of(16));
        if fits { 4 } else { 0 }
    }
}

/// The largest divisor of `n` that is a power of two and at most `max`, which is one too.
fn largest_divisor(n: usize, max: usize) -> usize {
    (0..=max.ilog2()).map(|i| max >> i).find(|divisor| n.is_multiple_of(*divisor)).unwrap_or(1)
}

/// Constants of `recurrent_fwd_sm90`, which streams many states with one token each through shared memory.
///
/// One token alone is in the hands of the memory, and it gains 3 % in a narrow range only
/// (`records/nvidia-h200/2026-11-20-recurrent_fwd-stream.csv`, the other kernel in `-before-stream.csv` beside it). More
/// tokens are faster with the other kernel and its ring: four at B = 256, H = 64, K = V = 64 took 166 us on an H200, 172 us
/// here, in one run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RecurrentFwdStream {
    /// Groups and their states.
    pub(crate) groups: StateStream,
}

impl RecurrentFwdStream {
    /// The choice where the device and the shape allow it.
    pub(crate) fn new(variant: &RecurrentFwdVariant, smem_bytes: usize) -> Option<Self> {
        if !variant.arch.has_tma() || !variant.one_token {
            return None;
        }
        // A larger state is faster with the other kernel.
        let groups = StateStream::new(&variant.tile(), vector_bytes(variant), 2, smem_bytes)?;
        Some(Self { groups })
    }

    /// Size of the kernel's shared memory.
    pub(crate) fn smem_bytes(&self, variant: &RecurrentFwdVariant) -> usize {
        self.groups.smem_bytes(&variant.tile(), vector_bytes(variant))
    }

    /// Blocks of the launch: one for each multiprocessor, or none where the other kernel is faster.
    pub(crate) fn blocks(variant: &RecurrentFwdVariant, states: usize, sm_count: u32) -> Option<u32> {
        (12..24).contains(&variant.tile().load(states, sm_count)).then_some(sm_count)
    }
}

/// Bytes of the vectors of a token.
const fn vector_bytes(variant: &RecurrentFwdVariant) -> usize {
    (5 * variant.k + variant.v) * variant.dtype.bytes()
}

/// Tokens of a chunk: one tile of the tensor cores.
pub(crate) const CHUNK: usize = 16;

/// What the chunk kernels are compiled for: everything but the choices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ChunkVariant {
    pub(crate) arch: Arch,
    pub(crate) dtype: DType,
    pub(crate) k: usize,
    pub(crate) v: usize,
    /// What `a` and `b` are.
    pub(crate) transition: Transition,
    /// What `g` holds.
    pub(crate) decay: Decay,
}

/// Constants of a chunk kernel that are a choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ChunkConfig {
    /// Value channels of a block, a multiple of 16: slices of V, whose columns of the state do not meet.
    pub(crate) bv: usize,
    /// Chunks in shared memory or under way to it, a multiple of `prep_groups`.
    pub(crate) stages: usize,
    /// Value channels of a warp that carries the state, a multiple of 16 that divides `bv`.
    pub(crate) state_rows: usize,
    /// Groups of warps that prepare chunks by turns, 1 or 2.
    pub(crate) prep_groups: usize,
    /// Warps of a group that make the operands of a chunk, 3 or 4; one more inverts.
    pub(crate) scale_warps: usize,
    /// Whether loading has a warp of its own, or those that invert do it.
    pub(crate) load_warp: bool,
    /// Sets of warps for gradients, which take chunks by turns; none in a forward pass.
    pub(crate) grad_sets: usize,
    /// Warps of a set: 1, 2 or 4.
    pub(crate) grad_warps: usize,
    /// Blocks that share the gradients over K of one head, each of which carries the gradient of the state.
    pub(crate) k_splits: usize,
}

/// What a block may ask for, and what a launch shares out among how many multiprocessors.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Room {
    pub(crate) smem_bytes: usize,
    /// Heads of all sequences.
    pub(crate) heads: usize,
    pub(crate) sm_count: usize,
}

impl Room {
    pub(crate) fn new(device: &Device, shape: &Shape) -> Self {
        Self {
            smem_bytes: device.smem_bytes() as usize,
            heads: shape.seqs.n().saturating_mul(shape.h),
            sm_count: device.sm_count() as usize,
        }
    }

    /// Of a launch that has work for all multiprocessors, for compiling without a device.
    pub(crate) const fn of_many_heads(arch: Arch) -> Self {
        Self { smem_bytes: arch.smem_bytes(), heads: usize::MAX, sm_count: 1 }
    }

    /// Of a launch that has not.
    pub(crate) const fn of_few_heads(arch: Arch) -> Self {
        Self { heads: 1, sm_count: 2, ..Self::of_many_heads(arch) }
    }

    /// Whether two blocks for each head find a multiprocessor each.
    fn has_few_heads(&self) -> bool {
        self.heads <= self.sm_count / 2
    }
}

/// What a forward kernel writes, beside the final state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ChunkFwdWrites {
    Output,
    OutputAndStates,
    States,
    /// Nothing beside it.
    FinalState,
    /// Nothing beside it, which is the map of a state: the walk is one of the unit matrix without values.
    Map,
}

impl ChunkFwdWrites {
    pub(crate) const ALL: [Self; 3] = [Self::Output, Self::OutputAndStates, Self::States];
    pub(crate) const OF_SEGMENTS: [Self; 2] = [Self::FinalState, Self::Map];

    pub(crate) const fn output(self) -> bool {
        matches!(self, Self::Output | Self::OutputAndStates)
    }

    pub(crate) const fn states(self) -> bool {
        matches!(self, Self::OutputAndStates | Self::States)
    }
}

impl ChunkConfig {
    /// Threads of a block: the warps that prepare, those that carry the state, and those of the gradients.
    pub(crate) fn threads(&self) -> u32 {
        self.threads_of_state() + (32 * self.grad_sets * self.grad_warps) as u32
    }

    /// The same without gradients.
    pub(crate) fn threads_of_state(&self) -> u32 {
        let preparing = self.prep_groups * (self.scale_warps + 1) + usize::from(self.load_warp);
        (32 * (preparing + self.bv / self.state_rows)) as u32
    }

    /// Named barriers of a block: two for a group that prepares, two for a turn and three for a set of gradient warps.
    #[cfg(test)]
    fn barriers(&self) -> usize {
        let copies = (self.stages / 2).max(1);
        let ahead = if self.stages > 2 * self.prep_groups { self.prep_groups } else { 0 };
        let turns = self.stages - if self.load_warp { copies - 1 } else { ahead };
        2 * self.prep_groups + 2 * turns + 3 * self.grad_sets
    }
}

impl ChunkVariant {
    /// Images in bf16 that make an operand of the tensor cores: of other types the sum of two, which is nearer than one.
    pub(crate) fn parts(&self) -> usize {
        if self.dtype == DType::Bf16 { 1 } else { 2 }
    }

    /// Whether a chunk has the shared memory alone, and the state half of the registers.
    pub(crate) fn is_tight(&self) -> bool {
        self.parts() == 2 && self.k > 128
    }

    /// Numbers that are kept of a chunk: its state, K by V, and u, CHUNK by V, all rounded up to whole tiles.
    pub(crate) fn saved_len(&self) -> usize {
        self.parts() * (self.k.next_multiple_of(16) + CHUNK) * self.v.next_multiple_of(16)
    }

    /// Blocks that share V.
    pub(crate) fn slices(&self, config: &ChunkConfig) -> usize {
        self.v.div_ceil(config.bv)
    }

    /// Blocks that share the columns of a state, or of a map, where there are heads for all multiprocessors.
    pub(crate) fn fwd_slices(&self) -> usize {
        let config = self.fwd(&Room::of_many_heads(self.arch), ChunkFwdWrites::Output);
        self.v.max(self.k).div_ceil(config.bv)
    }

    /// Whether tokens have whole copies of 16 bytes; what loads others takes registers.
    fn is_copied(&self) -> bool {
        let elems = 16 / self.dtype.bytes();
        self.k.is_multiple_of(elems) && self.v.is_multiple_of(elems)
    }

    /// The choice for a forward pass. A lane has 65536 / (32 * warps) registers, warps rounded up to a multiple of 4, and
    /// a warp of the state needs K / 2 of them for 16 value channels: so 16 warps up to K = 128, and 8 beyond and where an
    /// operand has two parts. One group of warps prepares slower than the state goes on: with two, K = 128 takes 1.09 ms in
    /// place of 1.21 (B4 T4096 H64, bf16, H200). Few heads go in halves of V, 1.50 ms for 1.70 (B1 T32768 H64 D64).
    ///
    /// Times of both: `records/nvidia-h200/2026-11-20-dplr-chunk-choices.txt`.
    pub(crate) fn fwd(&self, room: &Room, writes: ChunkFwdWrites) -> ChunkConfig {
        let v = self.v.next_multiple_of(16);
        let base = ChunkConfig {
            bv: v.min(64),
            stages: 4,
            state_rows: 16,
            prep_groups: 1,
            scale_warps: 3,
            load_warp: false,
            grad_sets: 0,
            grad_warps: 0,
            k_splits: 1,
        };
        let config = match (self.parts(), self.k) {
            (1, ..=64) => {
                let bv = if room.has_few_heads() { v.min(32) } else { base.bv };
                ChunkConfig { bv, stages: 6, prep_groups: 2, scale_warps: 4, load_warp: true, ..base }
            }
            (1, ..=128) if self.is_copied() && writes.output() => {
                ChunkConfig { bv: v.min(128), prep_groups: 2, ..base }
            }
            (1, ..=128) => ChunkConfig { bv: v.min(128), ..base },
            _ if self.is_tight() => ChunkConfig { stages: 1, ..base },
            _ => base,
        };
        self.fitted(config, room.smem_bytes, Self::fwd_smem_bytes)
    }

    /// The choice for a backward pass: as many warps as find registers, 16 up to K = 128, 12 where an operand has two parts,
    /// and 8. Two sets of gradient warps where there is room for both; one takes 2.57 ms in place of 2.44 (B8 T4096 H64 D64,
    /// bf16, H200). With few heads two blocks share the gradients of one: 3.71 ms for 4.24 (B1 T32768 H64 D64). Slices of V
    /// cost sums in device memory.
    pub(crate) fn bwd(&self, room: &Room) -> ChunkConfig {
        let v = self.v.next_multiple_of(16);
        let base = ChunkConfig {
            bv: v.min(128),
            stages: 5,
            state_rows: 16,
            prep_groups: 1,
            scale_warps: 3,
            load_warp: false,
            grad_sets: 1,
            grad_warps: 4,
            k_splits: 1,
        };
        // Where 16 warps find registers is the assembler's luck: what has been tried on sm_90a goes there, and the rest has 12.
        // Elsewhere some of these forms spill.
        let is_tuned = self.arch.major() == 9 && self.is_copied();
        let is_plain = self.transition == Transition::General && self.decay == Decay::Log;
        let is_both = self.transition == Transition::KeyAndRate && self.decay == Decay::Logit;
        let config = match (self.parts(), self.k) {
            (1, 33..=64) if is_tuned && v <= 64 && (is_plain || is_both) => {
                if room.has_few_heads() {
                    ChunkConfig {
                        scale_warps: 4,
                        load_warp: true,
                        grad_sets: 2,
                        grad_warps: 2,
                        k_splits: 2,
                        ..base
                    }
                } else {
                    ChunkConfig { grad_sets: 2, ..base }
                }
            }
            (1, 65..=128) if is_plain && is_tuned => base,
            (1, ..=128) => ChunkConfig { bv: v.min(64), ..base },
            (2, ..=64) if self.is_copied() => ChunkConfig { bv: v.min(64), ..base },
            _ if self.is_tight() => ChunkConfig { bv: v.min(32), stages: 1, grad_warps: 2, ..base },
            _ => ChunkConfig { bv: v.min(32), grad_warps: 2, ..base },
        };
        self.fitted(config, room.smem_bytes, Self::bwd_smem_bytes)
    }

    /// The choice for a backward pass with the most registers for a lane, where another leaves too few: which heads that
    /// are, only the assembler knows.
    pub(crate) fn bwd_of_few_warps(&self, room: &Room) -> ChunkConfig {
        let config = ChunkConfig {
            bv: if self.k > 128 { 16 } else { self.v.next_multiple_of(16).min(32) },
            scale_warps: 3,
            load_warp: false,
            grad_sets: 1,
            grad_warps: 2,
            k_splits: 1,
            ..self.bwd(room)
        };
        self.fitted(config, room.smem_bytes, Self::bwd_smem_bytes)
    }

    /// The choice for a forward pass with the most registers for a lane.
    pub(crate) fn fwd_of_few_warps(&self, room: &Room) -> ChunkConfig {
        let few = ChunkConfig {
            bv: 16,
            stages: 1,
            prep_groups: 1,
            scale_warps: 3,
            load_warp: false,
            ..self.fwd(room, ChunkFwdWrites::States)
        };
        self.fitted(few, room.smem_bytes, Self::fwd_smem_bytes)
    }

    /// The same with fewer stages and then narrower slices, until its shared memory fits; if nothing does, the smallest.
    fn fitted(
        &self,
        mut config: ChunkConfig,
        smem_bytes: usize,
        size: fn(&Self, &ChunkConfig) -> usize,
    ) -> ChunkConfig {
        while size(self, &config) > smem_bytes {
            if config.stages > 2 {
                config.stages -= config.prep_groups;
            } else if config.bv > 16 {
                config.bv = (config.bv / 2).next_multiple_of(16);
                config.state_rows =
                    if config.bv.is_multiple_of(config.state_rows) { config.state_rows } else { 16 };
            } else if config.stages > config.prep_groups {
                config.stages -= config.prep_groups;
            } else {
                break;
            }
        }
        config
    }

    /// Size of the forward kernel's shared memory; the unit compares it with the kernel's own.
    pub(crate) fn fwd_smem_bytes(&self, config: &ChunkConfig) -> usize {
        let stage = self.stage_layout(config).finished();
        SmemLayout::default()
            .with_many(config.stages, stage)
            .with(self.prep_layout(config))
            .with(WORK)
            .finished()
            .bytes()
    }

    /// Size of the backward kernel's shared memory.
    pub(crate) fn bwd_smem_bytes(&self, config: &ChunkConfig) -> usize {
        let (bv, k) = (config.bv, self.k.next_multiple_of(16));
        let (state, values) =
            (SmemLayout::block_tile(self.parts(), bv, k), SmemLayout::block_tile(self.parts(), bv, CHUNK));
        let stage = SmemLayout::default()
            .with(self.stage_layout(config).finished())
            .with(SmemLayout::token_tile(self.dtype, bv))
            .with(values)
            .finished();
        let scores = SmemLayout::default().with_many(4, SmemLayout::block_tile(2, CHUNK, CHUNK)).finished();
        let grad_warps = config.grad_sets * config.grad_warps;
        SmemLayout::default()
            .with_many(config.stages, stage)
            .with(self.prep_layout(config))
            .with_many(config.grad_sets, SmemLayout::default().with(state).with(values).finished())
            // Gradients of scores are two by turns, and two results may be put aside.
            .with_many(2 * config.grad_sets, scores)
            .with_many(grad_warps, SmemLayout::block_tile(self.parts(), bv, 16))
            .with_many(2 * grad_warps, SmemLayout::acc_tile())
            .with(WORK)
            .finished()
            .bytes()
    }

    /// `ChunkStage`: tokens, operands and decays of a chunk.
    fn stage_layout(&self, config: &ChunkConfig) -> SmemLayout {
        let k = self.k.next_multiple_of(16);
        SmemLayout::default()
            .with_many(5, SmemLayout::token_tile(self.dtype, k))
            .with(SmemLayout::token_tile(self.dtype, config.bv))
            .with_many(4, SmemLayout::block_tile(self.parts(), CHUNK, k))
            .with_many(4, SmemLayout::block_tile(self.parts(), CHUNK, CHUNK))
            .with_many(2 * k, SmemLayout::new(4, 4))
            .with(SmemLayout::new(16, 16))
    }

    /// `ChunkPrep`: what is prepared with, beside the stages.
    fn prep_layout(&self, config: &ChunkConfig) -> SmemLayout {
        // Rows of 16 f32 are 40 apart.
        SmemLayout::default()
            .with_many(config.prep_groups, SmemLayout::new(CHUNK * 40 * 4, 16))
            .with_many(3 * SUMS + PAIR_MODES, SmemLayout::block_tile(1, CHUNK, CHUNK))
            .with_many(5, SmemLayout::new(8, 8))
            .finished()
    }
}

/// References that log decays are summed up from: the ends of a chunk, its four levels, and its diagonal.
const SUMS: usize = 6;

/// Those of pairs of tokens: the levels and the diagonal.
const PAIR_MODES: usize = 5;

/// `ChunkWork`: what a block works on.
const WORK: SmemLayout = SmemLayout::new(48, 8);

#[cfg(test)]
mod tests {
    use super::{
        ChunkFwdWrites, ChunkVariant, Decay, RecurrentFwdStream, RecurrentFwdVariant, Room, Transition,
    };
    use fla_core::{Arch, DType};

    const BASE: RecurrentFwdVariant = RecurrentFwdVariant {
        arch: Arch::SM_90,
        dtype: DType::Bf16,
        state: DType::F32,
        k: 64,
        v: 64,
        one_token: true,
        transition: Transition::General,
    };

    #[test]
    fn small_batches_are_spread_and_large_ones_keep_more_under_way() {
        let lanes_v =
            |d: usize, b: usize| RecurrentFwdVariant { k: d, v: d, ..BASE }.choose(b * 4096 / d, 132).lanes_v;
        assert_eq!([1, 8, 16, 32, 256].map(|b| lanes_v(64, b)), [4, 4, 8, 16, 16]);
        assert_eq!([1, 2, 8, 32].map(|b| lanes_v(128, b)), [2, 2, 4, 8]);
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
    fn states_stream_where_lanes_cover_them() {
        let stream = |k, v| RecurrentFwdStream::new(&RecurrentFwdVariant { k, v, ..BASE }, 227 << 10);
        for (k, v) in [(64, 64), (32, 64), (64, 32), (32, 32)] {
            let choice = stream(k, v).expect("streams");
            assert_eq!(choice.groups.lanes_v * 4 * choice.groups.warps, v, "{choice:?}");
        }
        for (k, v) in [(60, 60), (128, 128), (256, 256), (64, 96), (1, 1), (4, 2048)] {
            assert_eq!(stream(k, v), None, "{k} {v}");
        }
        let tokens = RecurrentFwdVariant { one_token: false, ..BASE };
        assert_eq!(RecurrentFwdStream::new(&tokens, 227 << 10), None);
        let ampere = RecurrentFwdVariant { arch: Arch::SM_80, ..BASE };
        assert_eq!(RecurrentFwdStream::new(&ampere, 163 << 10), None);
        // 99 KiB, as sm_120 has, hold fewer states.
        let small = RecurrentFwdStream::new(&BASE, 99 << 10).expect("streams");
        assert!(small.smem_bytes(&BASE) <= 99 << 10, "{small:?}");
    }

    #[test]
    fn chunk_choices_cover_every_head_and_fit_a_block() {
        // The largest K for which everything fits, in one part and in two.
        for (arch, max_k) in [
            (Arch::SM_80, [256, 144]),
            (Arch::new(8, 9), [128, 64]),
            (Arch::SM_90, [256, 256]),
            (Arch::new(12, 0), [128, 64]),
        ] {
            for (k, v) in (1..=256).flat_map(|d| [(d, d), (d, 64), (64, d), (256, d), (d, 256)]) {
                for (dtype, max_k) in
                    [(DType::Bf16, max_k[0]), (DType::F16, max_k[1]), (DType::F32, max_k[1])]
                {
                    let (transition, decay) = (Transition::General, Decay::Log);
                    let variant = ChunkVariant { arch, dtype, k, v, transition, decay };
                    let many = Room::of_many_heads(arch);
                    for room in [many, Room::of_few_heads(arch)] {
                        let (fwd, bwd) = (variant.fwd(&room, ChunkFwdWrites::Output), variant.bwd(&room));
                        for (config, bytes) in
                            [(fwd, variant.fwd_smem_bytes(&fwd)), (bwd, variant.bwd_smem_bytes(&bwd))]
                        {
                            let what = || format!("{arch} {variant:?} {config:?}: {bytes} bytes");
                            assert!(k > max_k || bytes <= room.smem_bytes, "{}", what());
                            assert!(config.bv.is_multiple_of(config.state_rows), "{}", what());
                            assert!(config.threads() <= 1024, "{}", what());
                            assert!(config.stages.is_multiple_of(config.prep_groups), "{}", what());
                            assert!(config.barriers() <= 16, "{}", what());
                            assert!(variant.slices(&config) * config.bv >= v, "{}", what());
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn saved_states_are_whole_tiles() {
        let variant = |dtype, k, v| {
            let (transition, decay) = (Transition::General, Decay::Log);
            ChunkVariant { arch: Arch::SM_90, dtype, k, v, transition, decay }
        };
        assert_eq!(variant(DType::Bf16, 60, 17).saved_len(), 80 * 32);
        assert_eq!(variant(DType::F16, 64, 64).saved_len(), 2 * 80 * 64);
        assert_eq!(variant(DType::F32, 64, 64).saved_len(), 2 * 80 * 64);
    }
}
