//! Launch tables: which constants for which kernel, with measured times.

/// Constants of an elementwise kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FusedConfig {
    /// Threads over a strip of a row: whole warps.
    pub(crate) cols: usize,
    /// Rows of a block side by side.
    pub(crate) lanes: usize,
    /// Rows whose loads are under way together.
    pub(crate) unroll: usize,
    /// Blocks that run at once on one multiprocessor: the compiler leaves them registers.
    pub(crate) min_blocks: u32,
    /// Rows that a lane has of a tile, at most: those that it walks over in order, or takes turns at.
    pub(crate) run_rows: usize,
    /// Tiles of a group at most; partial sums of parameters want as few groups as run at once.
    pub(crate) max_tiles: usize,
    /// Channels of a thread at most, where no channel needs another; fewer leave registers for sums.
    pub(crate) max_elems: usize,
}

/// One tile for each group: as blocks end, others start, which keeps the memory busier than blocks that stay (fused_k_update
/// 201 us against 212 us).
const FWD: FusedConfig =
    FusedConfig { cols: 64, lanes: 4, unroll: 2, min_blocks: 2, run_rows: 2, max_tiles: 1, max_elems: 8 };
const BWD: FusedConfig = FusedConfig { max_tiles: 8, ..FWD };

// Times on an H200, 2026-11-20, bf16, B = 8, T = 4096, D = 4096 (heads of 64), L2 flushed; what stays at FWD or BWD was
// as good as anything else. Loads that pass by L1 and stores that leave L2 first cost 2 to 6 % (fused_k_update 200 us
// against 189 us, fused_gate_output_correction 387 us against 369 us), so the kernels have neither; but those were still
// there when the choices below were timed.

/// 539 us; 4 rows at once 541 us, one 539 us; blocks of one row and 256 threads 541 us.
pub(crate) const ADDCMUL: FusedConfig = FusedConfig { min_blocks: 3, ..FWD };
/// 631 us; groups of 16 tiles 646 us; 8 channels a thread, one row at once 673 us; 2 channels 730 us.
pub(crate) const ADDCMUL_BWD: FusedConfig = FusedConfig { max_elems: 4, max_tiles: 64, ..BWD };
/// 158 us; 4 rows at once 184 us.
pub(crate) const TOKEN_SHIFT: FusedConfig = FusedConfig { run_rows: 4, ..FWD };
/// 152 us; 2 rows at once 155 us; runs of 4 rows 156 us.
pub(crate) const TOKEN_SHIFT_BWD: FusedConfig = FusedConfig { unroll: 4, run_rows: 8, ..FWD };
/// 485 us; runs of 8 rows 507 us, 2 rows at once 495 us, 4 channels a thread 518 us.
pub(crate) const TOKEN_SHIFT_ADDCMUL: FusedConfig = FusedConfig { unroll: 4, run_rows: 4, ..FWD };
/// 654 us; runs of 16 rows 674 us, 8 channels a thread 710 us, 2 channels 804 us.
pub(crate) const TOKEN_SHIFT_ADDCMUL_BWD: FusedConfig =
    FusedConfig { unroll: 1, run_rows: 32, max_elems: 4, ..BWD };
/// 200 us; 4 rows at once 203 us, one 214 us, 4 channels a thread 223 us.
pub(crate) const K_UPDATE: FusedConfig = FusedConfig { min_blocks: 3, ..FWD };
/// 355 us; 2 rows at once 359 us, 4 channels a thread 365 us.
pub(crate) const K_UPDATE_BWD: FusedConfig = FusedConfig { unroll: 4, run_rows: 4, ..BWD };
/// 142 us; 2 rows at once 150 us.
pub(crate) const KK_NORM: FusedConfig = FusedConfig { unroll: 4, run_rows: 4, ..FWD };
/// 221 us; 2 rows at once 241 us.
pub(crate) const KK_NORM_BWD: FusedConfig = FusedConfig { unroll: 4, run_rows: 4, ..BWD };
/// 339 us; 2 rows at once 342 us, one 351 us.
pub(crate) const KK_NORM_K_UPDATE: FusedConfig = FusedConfig { unroll: 4, run_rows: 4, ..FWD };
/// 540 us; 8 channels a thread 558 us, then with groups of 32 tiles 575 us.
pub(crate) const KK_NORM_K_UPDATE_BWD: FusedConfig =
    FusedConfig { unroll: 1, run_rows: 1, min_blocks: 4, max_elems: 4, max_tiles: usize::MAX, ..BWD };
/// 386 us; 2 rows at once 389 us.
pub(crate) const GATE_OUTPUT_CORRECTION: FusedConfig =
    FusedConfig { unroll: 1, run_rows: 1, min_blocks: 4, ..FWD };
/// 759 us; one row at once, 4 lanes 766 us; 4 channels a thread 772 us.
pub(crate) const GATE_OUTPUT_CORRECTION_BWD: FusedConfig =
    FusedConfig { lanes: 2, max_tiles: usize::MAX, ..BWD };
/// Not chosen by measurement: beside the matrix products it is small.
pub(crate) const CHANNEL_MIXING: FusedConfig = FusedConfig { unroll: 4, run_rows: 4, min_blocks: 3, ..FWD };
/// The same.
pub(crate) const CHANNEL_MIXING_BWD: FusedConfig = FusedConfig { min_blocks: 3, ..FWD };
