//! Launch tables: which constants a kernel is compiled with for which shape.

use fla_core::{Arch, DType, StateStream, StateTile};

use crate::Transition;

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

#[cfg(test)]
mod tests {
    use super::{RecurrentFwdStream, RecurrentFwdVariant, Transition};
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
}
