//! How the threads of an elementwise kernel lie over its rows: the units and launches of all of them.

use fla_core::cudarc::driver::CudaSlice;
use fla_core::{DType, Device, Element, Error, Grid, Params, Ptr, SeqLens, Source, Unit};

use super::{ChannelShape, HeadShape, tokens};
use crate::config::FusedConfig;

/// Largest K: up to 32 threads hold a head in registers, and odd sizes allow no wide access.
const MAX_K: usize = 256;

pub(super) const HEADERS: &[Source] = &[
    Source { name: "fla/rwkv7/rows.cuh", text: include_str!("../../kernels/rows.cuh") },
    Source { name: "fla/rwkv7/fused.cuh", text: include_str!("../../kernels/fused.cuh") },
    Source { name: "fla/rwkv7/shift.cuh", text: include_str!("../../kernels/shift.cuh") },
];

/// What a kernel is compiled and launched for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Spans {
    /// Rows of the tensors.
    tokens: usize,
    /// Spans of a row: heads, or accesses.
    spans: usize,
    /// Channels of a span.
    k: usize,
    /// Threads over a span.
    lanes_k: usize,
    /// Channels of an access at most.
    elems: usize,
}

impl Spans {
    /// One thread for each access of a row.
    pub(super) fn of_channels<T: Element>(shape: &ChannelShape, config: &FusedConfig) -> Result<Self, Error> {
        let k = access_elems(T::DTYPE, shape.d).min(config.max_elems);
        let spans = shape.d / k;
        if spans == 0 || i32::try_from(spans).is_err() {
            let wanted = format!("from 1 to {}", i32::MAX);
            return Err(Error::Dim { dim: "D", wanted, got: shape.d });
        }
        Ok(Self { tokens: tokens(&shape.seqs), spans, k, lanes_k: 1, elems: k })
    }

    /// Up to 32 threads for each head.
    pub(super) fn of_heads<T: Element>(shape: &HeadShape, config: &FusedConfig) -> Result<Self, Error> {
        let error = |dim, max, got| Err(Error::Dim { dim, wanted: format!("from 1 to {max}"), got });
        if !(1..=MAX_K).contains(&shape.k) {
            return error("K", MAX_K, shape.k);
        }
        let max_h = i32::MAX as usize / 32;
        if !(1..=max_h).contains(&shape.h) {
            return error("H", max_h, shape.h);
        }
        let elems = access_elems(T::DTYPE, shape.k).min(config.max_elems);
        let accesses = shape.k / elems;
        let lanes_k = accesses.next_power_of_two().min(32);
        Ok(Self { tokens: tokens(&shape.seqs), spans: shape.h, k: shape.k, lanes_k, elems })
    }

    /// The unit of a kernel for these spans.
    pub(super) fn unit<P: Params>(
        &self,
        stem: &'static str,
        source: Source,
        dtype: DType,
        config: &FusedConfig,
    ) -> Unit {
        // A thread with several pieces of a head needs the registers for itself.
        let several = self.elems * self.lanes_k < self.k;
        let (unroll, min_blocks) = if several { (1, 1) } else { (config.unroll, config.min_blocks) };
        // All of these are below 2^31: they have been checked, or are constants of the table.
        Unit::new::<P>("rwkv7", stem, source, (config.cols * config.lanes) as u32)
            .with_headers(HEADERS)
            .with_min_blocks(min_blocks)
            .with("Element", dtype)
            .with("K", self.k as i32)
            .with("ELEMS", self.elems as i32)
            .with("COLS", config.cols as i32)
            .with("LANES", config.lanes as i32)
            .with("UNROLL", unroll as i32)
    }

    /// The launch of a kernel for these spans.
    pub(super) fn launch(&self, device: &Device, config: &FusedConfig) -> Result<Launch, Error> {
        let FusedConfig { lanes, min_blocks, run_rows, max_tiles, .. } = *config;
        let strips = (self.spans * self.lanes_k).div_ceil(config.cols);
        // As many groups as run at once; tiles are smaller where there are too few for them.
        let resident = ((device.sm_count() * min_blocks) as usize / strips).max(1);
        let tile_rows = lanes * self.tokens.div_ceil(lanes * resident).clamp(1, run_rows);
        let tiles = self.tokens.div_ceil(tile_rows);
        // There is a group even without rows: caches and sums are written all the same.
        let groups = tiles.min(resident).max(tiles.div_ceil(max_tiles)).max(1);
        let blocks = groups.saturating_mul(strips);
        let Some(blocks) = u32::try_from(blocks).ok().filter(|blocks| i32::try_from(*blocks).is_ok()) else {
            let wanted = format!("such that there are at most {} blocks, not {blocks}", i32::MAX);
            return Err(Error::Dim { dim: "T", wanted, got: self.tokens });
        };
        let params = RowsParams {
            rows: self.tokens as i64,
            tile_rows: tile_rows as i64,
            spans: self.spans as i32,
            strips: strips as i32,
        };
        Ok(Launch { grid: Grid::x(blocks), groups, params })
    }
}

/// How a kernel is launched.
#[derive(Clone, Copy, Debug)]
pub(super) struct Launch {
    pub(super) grid: Grid,
    /// Groups of blocks, each of which leaves one row of partial sums.
    pub(super) groups: usize,
    pub(super) params: RowsParams,
}

/// Twin of `fla::rwkv7::Rows`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct RowsParams {
    rows: i64,
    tile_rows: i64,
    spans: i32,
    strips: i32,
}

/// Twin of `fla::rwkv7::Sequences`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct SequencesParams {
    pub(super) cu_seqlens: Ptr<i64>,
    n: i64,
    t: i64,
}

impl SequencesParams {
    pub(super) fn new(seqs: &SeqLens, cu_seqlens: Ptr<i64>) -> Self {
        Self { cu_seqlens, n: seqs.n() as i64, t: seqs.t() as i64 }
    }
}

/// Offsets of packed sequences on the device, which the plan has to know.
pub(super) fn offsets(device: &Device, seqs: &SeqLens) -> Result<Option<CudaSlice<i64>>, Error> {
    if seqs.is_on_device() {
        let reason = "this pass wants the offsets when its plan is made".to_owned();
        return Err(Error::SeqLens { reason });
    }
    seqs.cu_seqlens().map(|offsets| device.upload_offsets(offsets)).transpose()
}

/// The widest access, in elements, that keeps every span of `span` elements aligned when the first one is.
const fn access_elems(dtype: DType, span: usize) -> usize {
    let mut n = 16 / dtype.bytes();
    while !span.is_multiple_of(n) {
        n /= 2;
    }
    n
}

/// Widths that are compiled ahead: the common one first, then rows that no wide access fits.
pub(super) fn shapes_d() -> [ChannelShape; 3] {
    [4096, 4100, 33].map(|d| ChannelShape { seqs: SeqLens::dense(1, 1), d })
}

/// Heads that are compiled ahead: RWKV-7's first, then larger and uneven ones.
pub(super) fn shapes_k() -> [HeadShape; 4] {
    [64, 128, 60, 255].map(|k| HeadShape { seqs: SeqLens::dense(1, 1), h: 1, k })
}
