//! Launch tables: which constants a kernel is compiled with for which shape.

use fla_core::{Arch, DType};

/// Constants of `recurrent_fwd` that are a choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RecurrentFwdConfig {
    /// Lanes side by side over V, each with 4 columns of the state; the other lanes of the warp lie over K.
    pub(crate) lanes_v: usize,
    /// Warps of a block.
    pub(crate) warps: usize,
    /// Blocks that a multiprocessor has to have registers for.
    pub(crate) min_blocks: u32,
    /// Whether the vectors of the next token are loaded while those of this one are used.
    pub(crate) prefetch: bool,
}

/// How many rows of the state a lane holds, times 4 columns: many rows keep much of the state under way at once,
/// few rows spread a small state over more multiprocessors.
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
    pub(crate) k: usize,
    pub(crate) v: usize,
    /// Every sequence has exactly one token.
    pub(crate) one_token: bool,
}

impl RecurrentFwdVariant {
    /// The choice for `states` states on `sm_count` multiprocessors.
    pub(crate) fn choose(&self, states: usize, sm_count: u32) -> RecurrentFwdConfig {
        // Warps that would hold 32 rows by 64 columns each, for every multiprocessor.
        let warps = states.saturating_mul(self.k * self.v) / (32 * 128);
        let rows = match warps / sm_count.max(1) as usize {
            // Beside the state, a loop over tokens has registers for 16 rows at most.
            _ if !self.one_token && self.k > 64 => Rows::Some,
            0..4 => Rows::Few,
            4..12 => Rows::Some,
            _ if !self.one_token => Rows::Some,
            _ => Rows::Many,
        };
        self.with_rows(rows)
    }

    /// Every choice that there is, for compiling ahead.
    pub(crate) fn all(&self) -> impl Iterator<Item = RecurrentFwdConfig> {
        let rows: &[Rows] = match (self.one_token, self.k > 64) {
            (true, _) => &[Rows::Few, Rows::Some, Rows::Many],
            (false, false) => &[Rows::Few, Rows::Some],
            (false, true) => &[Rows::Some],
        };
        rows.iter().map(|rows| self.with_rows(*rows))
    }

    fn with_rows(&self, rows: Rows) -> RecurrentFwdConfig {
        // Lanes over K that give each this many rows, as a power of two.
        let lanes_k = self.k.div_ceil(rows as usize).next_power_of_two().min(32);
        let lanes_v = 32 / lanes_k;
        // With many rows a block covers 64 columns, so that it reads 256 bytes of each row of the state.
        let warps = if rows == Rows::Many { (16 / lanes_v).max(1) } else { 1 };
        // 16 warps leave 128 registers to a lane, which on sm_90 just holds vectors of 16 bits.
        let tight =
            self.arch == Arch::SM_90 && self.one_token && self.dtype != DType::F32 && rows == Rows::Some;
        let prefetch = !self.one_token && rows == Rows::Few;
        RecurrentFwdConfig { lanes_v, warps, min_blocks: if tight { 16 } else { 1 }, prefetch }
    }
}

#[cfg(test)]
mod tests {
    use super::RecurrentFwdVariant;
    use fla_core::{Arch, DType};

    const BASE: RecurrentFwdVariant =
        RecurrentFwdVariant { arch: Arch::SM_90, dtype: DType::Bf16, k: 64, v: 64, one_token: true };

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
}
