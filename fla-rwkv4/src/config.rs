//! Launch tables: which constants a kernel is compiled with for which shape.

use crate::Shape;

/// How a block's threads lie over channels and time; every one is a run of tokens of one channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tiling {
    /// Channels of a block.
    pub(crate) channels: usize,
    /// Runs of a tile, side by side.
    pub(crate) slots: usize,
    /// Tokens of a run.
    pub(crate) steps: usize,
}

impl Tiling {
    /// Threads of a block.
    pub(crate) fn threads(self) -> u32 {
        // At most 256.
        (self.channels * self.slots) as u32
    }

    /// Blocks that cover the channels once.
    pub(crate) fn blocks_c(self, c: usize) -> usize {
        c.div_ceil(self.channels)
    }
}

/// Tokens of a run: what a thread holds in registers, and where the states for the gradients are kept.
const STEPS: usize = crate::CHUNK;

/// Warps that a multiprocessor is to have.
const FWD_WARPS: usize = 24;
const BWD_WARPS: usize = 8;

/// The forward pass: 16 warps and a few more have registers on a multiprocessor.
pub(crate) fn chunk_fwd(shape: &Shape, sm_count: u32) -> Tiling {
    choose(shape, sm_count, FWD_WARPS)
}

/// The backward pass: what is left of a run between its two walks is in registers, so there are fewer warps.
pub(crate) fn chunk_bwd(shape: &Shape, sm_count: u32) -> Tiling {
    choose(shape, sm_count, BWD_WARPS)
}

/// Slots only as far as sequences and channels alone leave multiprocessors without work; then fewer channels a block.
///
/// Forward, H200, microseconds, median of 12 with the L2 flushed, by slots of 32 channels:
///
/// | B, T, C        | dtype |    1 |   2 |   4 |   8 |  16 |
/// |----------------|-------|------|-----|-----|-----|-----|
/// | 8, 4096, 4096  | f32   |  414 | 418 | 405 | 402 | 406 |
/// |                | bf16  |  294 | 286 | 266 | 314 | 444 |
/// | 1, 32768, 4096 | f32   | 1570 | 891 | 564 | 428 | 406 |
/// |                | bf16  | 1478 | 805 | 468 | 358 | 431 |
fn choose(shape: &Shape, sm_count: u32, warps: usize) -> Tiling {
    let sm_count = sm_count.max(1) as usize;
    let blocks = |channels: usize| shape.seqs.n().saturating_mul(shape.c.div_ceil(channels)).max(1);
    let runs = shape.mean_tokens().div_ceil(STEPS).max(1);
    let slots = (warps * sm_count / blocks(32)).clamp(1, runs).next_power_of_two();
    let (channels, slots) = match slots {
        0..8 => (32, slots),
        _ if blocks(32) * 4 >= sm_count * 3 || runs < 16 => (32, 8),
        _ if blocks(16) * 4 >= sm_count * 3 || runs < 32 => (16, 16),
        _ => (8, 32),
    };
    Tiling { channels, slots, steps: STEPS }
}

/// Every tiling that there is, for compiling ahead.
pub(crate) fn tilings() -> impl Iterator<Item = Tiling> {
    [(32, 1), (32, 2), (32, 4), (32, 8), (16, 16), (8, 32)].into_iter().map(|(channels, slots)| Tiling {
        channels,
        slots,
        steps: STEPS,
    })
}

/// How the recurrent forward pass lies over channels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Lanes {
    /// Channels of a lane: vector accesses, where there are enough channels for them.
    pub(crate) cols: usize,
    /// Warps of a block.
    pub(crate) warps: usize,
}

/// Four channels a lane, and so 16 bytes an access, where they leave every multiprocessor some warps.
pub(crate) fn recurrent_fwd(shape: &Shape, sm_count: u32) -> Lanes {
    let channels = shape.seqs.n().saturating_mul(shape.c);
    let cols = if shape.c.is_multiple_of(4) && channels >= 4 * 128 * sm_count as usize { 4 } else { 1 };
    Lanes { cols, warps: 4 }
}

/// The choices of [`recurrent_fwd`], for compiling ahead.
pub(crate) fn recurrent_fwd_all(c: usize) -> impl Iterator<Item = Lanes> {
    [1, 4].into_iter().filter(move |cols| c.is_multiple_of(*cols)).map(|cols| Lanes { cols, warps: 4 })
}

/// Groups of sequences in a backward pass: each has one sum of `dw` and `du`, and a launch of a few thousand blocks
/// leaves no multiprocessor idle, so more sequences than that share groups.
pub(crate) fn groups(n: usize, blocks_c: usize) -> usize {
    n.min((4096 / blocks_c).max(1))
}

#[cfg(test)]
mod tests {
    use super::{Tiling, chunk_bwd, chunk_fwd, tilings};
    use crate::{SeqLens, Shape};

    #[test]
    fn time_is_split_where_channels_do_not_fill_the_gpu() {
        let slots = |b: usize, t: usize, c: usize| {
            let shape = Shape { seqs: SeqLens::dense(b, t), c };
            let Tiling { channels, slots, .. } = chunk_fwd(&shape, 132);
            (channels, slots, chunk_bwd(&shape, 132).slots)
        };
        assert_eq!(slots(8, 4096, 4096), (32, 4, 1));
        assert_eq!(slots(1, 32768, 4096), (32, 8, 8));
        assert_eq!(slots(1, 32768, 768), (8, 32, 32));
        // Short sequences have no use for many slots.
        assert_eq!(slots(1, 16, 768), (32, 1, 1));
        assert_eq!(slots(1, 33, 768), (32, 4, 4));
    }

    #[test]
    fn every_choice_of_a_plan_can_be_compiled_ahead() {
        for (b, c) in [(0, 1), (1, 1), (1, 768), (4, 4096), (64, 2048), (usize::MAX, 33)] {
            for t in [0, 1, 17, 1000, 100_000] {
                let shape = Shape { seqs: SeqLens::dense(b, t), c };
                for tiling in [chunk_fwd(&shape, 132), chunk_bwd(&shape, 132)] {
                    assert!(tilings().any(|other| other == tiling), "{shape:?}: {tiling:?}");
                }
            }
        }
    }
}
