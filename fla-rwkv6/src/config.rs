//! Launch tables: which constants a kernel is compiled with for which shape.

use fla_core::{Arch, DType, StateTile};

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

#[cfg(test)]
mod tests {
    use super::RecurrentFwdVariant;
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
}
