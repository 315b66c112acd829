//! How the passes by chunks cut their tensors: chunks, segments, tiles in shared memory, and the choices for a GPU.

use std::cmp::Reverse;

use fla_core::cudarc::driver::CudaSlice;
use fla_core::{Arch, Chunks, DType, Device, Error, Grid, SeqLens, Source, Unit};

use crate::Shape;
use crate::gates::{BetaForm, BetaMap, Forms, GateForm, QkNorm};

pub(crate) const HEADERS: &[Source] = &[
    Source { name: "fla/gated_delta/recurrent_fwd.cuh", text: include_str!("../kernels/recurrent_fwd.cuh") },
    Source { name: "fla/gated_delta/chunk.cuh", text: include_str!("../kernels/chunk.cuh") },
    Source { name: "fla/gated_delta/chunk_grads.cuh", text: include_str!("../kernels/chunk_grads.cuh") },
    Source { name: "fla/gated_delta/chunk_rows.cuh", text: include_str!("../kernels/chunk_rows.cuh") },
    Source { name: "fla/gated_delta/chunk_wgmma.cuh", text: include_str!("../kernels/chunk_wgmma.cuh") },
];

/// Rows of factors that `chunk_fwd_intra` writes for each chunk and value head.
pub(crate) const FACTORS: usize = 8;

/// Shared memory that a block can have on an H200, for compiling ahead.
pub(crate) const H200_SMEM_BYTES: usize = Arch::SM_90.smem_bytes();

/// Which way a pass goes: gradients can be too small for f16.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    Forward,
    Backward,
}

/// What is compiled in of a chunk's tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ChunkTiles {
    /// What vectors are stored as.
    pub(crate) dtype: DType,
    /// What operands of products are: a 16-bit type.
    pub(crate) half: DType,
    /// 16-bit numbers for each element of an operand.
    pub(crate) parts: usize,
    /// Rows of a chunk.
    pub(crate) c: usize,
    pub(crate) k: usize,
    pub(crate) v: usize,
}

impl ChunkTiles {
    /// The tiles for vectors of this type. Numbers of 32 bits are pairs of bf16, and so is f16 on the way back.
    pub(crate) fn new(dtype: DType, k: usize, v: usize, direction: Direction) -> Self {
        let (half, parts) = match (dtype, direction) {
            (DType::Bf16, _) => (DType::Bf16, 1),
            (DType::F16, Direction::Forward) => (DType::F16, 1),
            (DType::F16, Direction::Backward) | (DType::F32, _) => (DType::Bf16, 2),
        };
        // Half the rows where a row has twice the bytes.
        let c = if parts == 2 || k > 128 { 32 } else { 64 };
        Self { dtype, half, parts, c, k, v }
    }

    /// What is kept between launches.
    pub(crate) const fn work(&self) -> DType {
        if self.parts == 2 { DType::F32 } else { self.half }
    }

    pub(crate) const fn padded_k(&self) -> usize {
        self.k.next_multiple_of(64)
    }

    pub(crate) const fn padded_v(&self) -> usize {
        self.v.next_multiple_of(32)
    }

    pub(crate) fn with_tiles(&self, unit: Unit) -> Unit {
        // All of these are below 2^31: `new` of the plan has checked K and V.
        unit.with_headers(HEADERS)
            .with("Element", self.dtype)
            .with("Half", self.half)
            .with("Work", self.work())
            .with("PARTS", self.parts as i32)
            .with("C", self.c as i32)
            .with("K", self.k as i32)
            .with("V", self.v as i32)
    }
}

pub(crate) fn with_forms(unit: Unit, forms: &Forms) -> Unit {
    unit.with("LOG_GATE", forms.gate == GateForm::Log)
        .with("RAW_GATE", forms.gate == GateForm::Raw)
        .with("HEAD_BETA", forms.beta == BetaForm::PerHead)
        .with("SIGMOID_BETA", forms.beta_map != BetaMap::AsGiven)
        .with("TWICE_BETA", forms.beta_map == BetaMap::TwiceSigmoid)
        .with("NORMALISE_QK", forms.qk_norm == QkNorm::L2)
}

/// Lays out a struct of shared memory as the compiler of kernels does.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    bytes: usize,
    align: usize,
}

impl Layout {
    pub(crate) const fn new() -> Self {
        Self { bytes: 0, align: 1 }
    }

    pub(crate) fn add(mut self, bytes: usize, align: usize) -> Self {
        self.bytes = self.bytes.next_multiple_of(align) + bytes;
        self.align = self.align.max(align);
        self
    }

    /// Adds a struct.
    pub(crate) fn member(self, member: Self) -> Self {
        self.add(member.size(), member.align)
    }

    /// Adds a member, or the byte of an empty struct.
    fn add_if(self, present: bool, member: Self) -> Self {
        if present { self.add(member.size(), member.align) } else { self.add(1, 1) }
    }

    /// An operand `[rows, cols]`.
    pub(crate) fn tile(self, tiles: &ChunkTiles, rows: usize, cols: usize) -> Self {
        // Rows of whole 128 bytes are swizzled, others padded.
        let (stride, align) = if cols.is_multiple_of(64) { (cols, 1024) } else { (cols + 8, 16) };
        self.add(tiles.parts * rows * stride * 2, align)
    }

    pub(crate) fn factors(self, c: usize) -> Self {
        self.add(FACTORS * c * size_of::<f32>(), 16)
    }

    pub(crate) fn times(self, n: usize) -> Self {
        Self { bytes: n * self.size(), align: self.align }
    }

    pub(crate) const fn size(&self) -> usize {
        self.bytes.next_multiple_of(self.align)
    }
}

/// Size of the shared memory of `chunk_fwd_intra`.
pub(crate) fn intra_smem_bytes(tiles: &ChunkTiles) -> usize {
    let (c, k) = (tiles.c, tiles.padded_k());
    let inverse = c * (c + 8) * size_of::<f32>();
    let tiles = Layout::new().tile(tiles, c, k).tile(tiles, c, k);
    tiles.add(inverse, 16).factors(c).add(2 * c * size_of::<f32>(), 4).size()
}

/// Which of the scans a kernel is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scan {
    /// States and outputs.
    Outputs,
    /// States, which are kept.
    States,
    /// How segments change states.
    Maps,
    /// Gradients of states.
    Gradients,
    /// How segments change gradients of states.
    GradientMaps,
    /// Gradients of states after segments, made of these maps.
    Ends,
}

impl Scan {
    /// Whether it walks from the last chunk to the first.
    pub(crate) const fn is_back(self) -> bool {
        matches!(self, Self::Gradients | Self::GradientMaps | Self::Ends)
    }

    const fn is_maps(self) -> bool {
        matches!(self, Self::Maps | Self::GradientMaps)
    }
}

/// Constants of the scans that are a choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ScanConfig {
    /// Warps side by side over V, each with 16 columns of the state.
    pub(crate) warps_v: usize,
    /// Warps that share them, each with a part of K.
    pub(crate) warps_k: usize,
    /// Chunks that are in shared memory or on their way there.
    pub(crate) stages: usize,
    /// Chunks of a segment, where sequences are cut into several.
    pub(crate) segment: Option<usize>,
}

/// Fewest chunks of a segment: its start costs as much as a few chunks.
const MIN_SEGMENT: usize = 8;

impl ScanConfig {
    /// The choice for `states` states: the widest slices of which there are nearly as many as multiprocessors. Where even
    /// halves of 128 columns are too few, long sequences are cut into segments. None when shared memory has no room for the
    /// narrowest slices.
    pub(crate) fn new(
        tiles: &ChunkTiles,
        (seqs, hv): (&SeqLens, usize),
        sm_count: u32,
        smem_bytes: usize,
    ) -> Option<Self> {
        let fitting: Vec<Self> = Self::all(tiles, smem_bytes).collect();
        let enough = sm_count as usize * 3 / 4;
        let states = seqs.n().saturating_mul(hv);
        let fills = |config: &&Self| states.saturating_mul(config.slices(tiles)) >= enough;
        if let Some(config) = fitting.iter().take(2).find(fills) {
            return Some(*config);
        }
        if let (Some(widest), 1) = (fitting.first(), fitting.first().map_or(2, |config| config.warps_k)) {
            let (chunks, segment) = widest.segments(tiles, (seqs, hv), sm_count);
            if chunks >= 2 * segment {
                return Some(Self { segment: Some(segment), ..*widest });
            }
        }
        fitting.iter().find(fills).or(fitting.last()).copied()
    }

    /// Chunks of the longest sequence, and of segments of it that fill the GPU.
    fn segments(&self, tiles: &ChunkTiles, (seqs, hv): (&SeqLens, usize), sm_count: u32) -> (usize, usize) {
        let longest = (0..seqs.n()).filter_map(|i_n| seqs.len(i_n)).max().unwrap_or(0);
        let chunks = longest.div_ceil(tiles.c);
        let slices = seqs.n().saturating_mul(hv).saturating_mul(self.slices(tiles)).max(1);
        (chunks, chunks.div_ceil((sm_count as usize / slices).max(1)).max(MIN_SEGMENT))
    }

    /// The choice for a backward pass whose gradients one kernel makes, a whole head in a block: where heads do not fill the
    /// GPU, segments of them do, even where the scans alone would rather have narrow slices of whole sequences.
    pub(crate) fn cut_for_whole(
        self,
        tiles: &ChunkTiles,
        (seqs, hv): (&SeqLens, usize),
        sm_count: u32,
        smem_bytes: usize,
    ) -> Self {
        let fill = |count: usize| count.saturating_mul(hv) >= sm_count as usize * 3 / 4;
        let fills = fill(seqs.n());
        let widest = Self::all(tiles, smem_bytes).next().filter(|config| config.warps_k == 1);
        let (false, None, Some(widest)) = (fills, self.segment, widest) else { return self };
        let (chunks, segment) = widest.segments(tiles, (seqs, hv), sm_count);
        let lens = (0..seqs.n()).filter_map(|i_n| seqs.len(i_n));
        let count = lens.map(|len| len.div_ceil(tiles.c).div_ceil(segment).max(1)).sum();
        // Two of an odd number of chunks are not alike, and worth it all the same.
        if chunks + 1 >= 2 * segment && fill(count) {
            Self { segment: Some(segment), ..widest }
        } else {
            self
        }
    }

    /// Every width that fits, the widest first, with as many stages as fit.
    pub(crate) fn all(tiles: &ChunkTiles, smem_bytes: usize) -> impl Iterator<Item = Self> {
        let tiles = *tiles;
        let warps_k = if tiles.padded_k() > 128 { 2 } else { 1 };
        let widths = [8, 4, 2].into_iter().filter(move |warps_v| {
            warps_v * warps_k <= 8 && (*warps_v == 2 || 16 * warps_v < 2 * tiles.padded_v())
        });
        // Two blocks of few warps side by side hide more than a third stage; each block costs another KiB.
        let half = ((smem_bytes + 1024) / 2).saturating_sub(1024);
        widths.filter_map(move |warps_v| {
            let with = |stages| Self { warps_v, warps_k, stages, segment: None };
            let fits = |config: &Self, bytes| config.smem_bytes(&tiles, Scan::Gradients) <= bytes;
            let pair = (warps_v * warps_k <= 4).then_some(with(2)).filter(|config| fits(config, half));
            pair.or_else(|| [3, 2, 1].map(with).into_iter().find(|config| fits(config, smem_bytes)))
        })
    }

    /// The same, and the widest with sequences cut into segments, for compiling ahead.
    pub(crate) fn all_split(tiles: &ChunkTiles, smem_bytes: usize) -> impl Iterator<Item = Self> {
        let widest = Self::all(tiles, smem_bytes).next().filter(|config| config.warps_k == 1);
        Self::all(tiles, smem_bytes).chain(widest.map(|config| Self { segment: Some(MIN_SEGMENT), ..config }))
    }

    pub(crate) const fn slices(&self, tiles: &ChunkTiles) -> usize {
        tiles.v.div_ceil(16 * self.warps_v)
    }

    pub(crate) const fn threads(&self) -> u32 {
        (32 * self.warps_v * self.warps_k) as u32
    }

    pub(crate) fn smem_bytes(&self, tiles: &ChunkTiles, scan: Scan) -> usize {
        let (c, k, v) = (tiles.c, tiles.padded_k(), 16 * self.warps_v);
        let q = Layout::new().tile(tiles, c, k);
        let scores = Layout::new().tile(tiles, c, c);
        let stage = Layout::new().tile(tiles, c, k);
        let stage = if scan.is_back() {
            stage.tile(tiles, c, k).tile(tiles, c, v).tile(tiles, c, c).tile(tiles, c, c).factors(c)
        } else {
            let has_output = scan == Scan::Outputs;
            let stage = stage.tile(tiles, c, v).tile(tiles, c, c).factors(c);
            stage.add_if(has_output, q).add_if(has_output, scores)
        };
        let warps = self.warps_v * self.warps_k;
        let exchange = Layout::new().add(warps * c / 2 * 32 * size_of::<f32>(), 4);
        let stages = stage.times(self.stages);
        // A slice of a state and a strip of a map, in pairs of bf16, have the place of the stages before they are there.
        let map = if self.is_split(scan) { 2 * 2 * (v + 64) * k } else { 1 };
        let stages = Layout::new().add(stages.size().max(map).next_multiple_of(1024), 1024);
        // The number of chunks to be walked follows.
        stages.add(size_of::<i32>(), 4).add_if(self.warps_k > 1, exchange).size()
    }

    /// Whether the kernel starts from maps.
    fn is_split(&self, scan: Scan) -> bool {
        self.segment.is_some() && !scan.is_maps()
    }

    /// Blocks of a segment of a head.
    pub(crate) fn blocks(&self, tiles: &ChunkTiles, scan: Scan) -> usize {
        let of_unit = if scan == Scan::Maps { tiles.padded_k().div_ceil(16 * self.warps_v) } else { 0 };
        self.slices(tiles) + of_unit
    }

    pub(crate) fn with_config(&self, unit: Unit, tiles: &ChunkTiles, scan: Scan) -> Unit {
        // Few warps, and less shared memory than a block may have.
        unit.with_smem_bytes(self.smem_bytes(tiles, scan) as u32)
            .with("WARPS_V", self.warps_v as i32)
            .with("WARPS_K", self.warps_k as i32)
            .with("STAGES", self.stages as i32)
            .with("MAPS", scan.is_maps())
            .with("SPLIT", self.is_split(scan))
    }

    /// Bytes of the maps of segments, of whether they keep anything, and of those of gradients.
    pub(crate) fn maps_bytes(&self, tiles: &ChunkTiles, heads: usize) -> [usize; 3] {
        let rows = |rows: usize| heads.saturating_mul(rows * tiles.padded_k() * size_of::<f32>());
        match self.segment {
            None => [0; 3],
            Some(_) => [
                rows(tiles.padded_v() + tiles.padded_k()),
                heads.saturating_mul(size_of::<i32>()),
                rows(tiles.padded_v()),
            ],
        }
    }

    /// Bytes of the gradients of states after segments.
    pub(crate) fn ends_bytes(&self, tiles: &ChunkTiles, heads: usize) -> usize {
        let state = tiles.padded_v() * tiles.padded_k() * size_of::<f32>();
        if self.segment.is_some() { heads.saturating_mul(state) } else { 0 }
    }
}

/// Constants of `chunk_bwd_output` that are a choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OutputConfig {
    /// Columns of the state that are in shared memory at once.
    pub(crate) bv: usize,
    /// Such slices that are there or on their way.
    pub(crate) stages: usize,
    /// Value heads share a query head.
    pub(crate) grouped: bool,
}

impl OutputConfig {
    /// Two warps side by side over the rows of a chunk, four over K.
    const WARPS: usize = 8;
    pub(crate) const THREADS: u32 = 32 * Self::WARPS as u32;

    /// Wide slices where two of them fit, otherwise narrow ones, with as many stages as fit; none when there is no room for
    /// one.
    pub(crate) fn new(tiles: &ChunkTiles, grouped: bool, smem_bytes: usize) -> Option<Self> {
        let choices = [(64, 2), (32, 3), (32, 2), (32, 1)].map(|(bv, stages)| Self { bv, stages, grouped });
        // What is on its way belongs to one head and the next.
        let is_sound = |config: &Self| config.stages <= tiles.v.div_ceil(config.bv) + 1;
        let is_wide_enough = |config: &Self| config.bv == 32 || tiles.v > 32;
        choices
            .into_iter()
            .filter(is_sound)
            .filter(is_wide_enough)
            .find(|config| config.smem_bytes(tiles) <= smem_bytes)
    }

    pub(crate) fn smem_bytes(&self, tiles: &ChunkTiles) -> usize {
        let (c, k, bv) = (tiles.c, tiles.padded_k(), self.bv);
        let of_states = Layout::new().tile(tiles, bv, k).tile(tiles, bv, k);
        let stage = of_states.tile(tiles, bv, c).tile(tiles, bv, c).tile(tiles, c, bv).tile(tiles, c, bv);
        let stages = stage.times(self.stages);
        let buffers = self.stages.min(2);
        let qk = Layout::new().tile(tiles, c, k).times(2 * buffers);
        let scores = Layout::new().tile(tiles, c, c).times(2);
        let factors = Layout::new().factors(c).times(buffers);
        // Seven sums of each row by four warps, two of columns, dX . V and for single numbers dX . V'; one of each warp.
        let numbers = (7 * 4 + 2 + 3 - tiles.parts) * c + Self::WARPS;
        let sums = Layout::new().add(numbers * size_of::<f32>(), 4);
        let totals = Layout::new().add(c * k * 2 * size_of::<f32>(), 4);
        let members = [stages, qk, scores, factors, sums];
        let all = members.iter().fold(Layout::new(), |all, member| all.add(member.size(), member.align));
        all.add_if(self.grouped, totals).size()
    }

    pub(crate) fn with_config(&self, unit: Unit, tiles: &ChunkTiles) -> Unit {
        // Less shared memory than a block may have.
        unit.with_smem_bytes(self.smem_bytes(tiles) as u32)
            .with("BV", self.bv as i32)
            .with("STAGES", self.stages as i32)
            .with("GROUPED", self.grouped)
    }
}

/// The chunks of a plan, and the walks over them, on the device.
#[derive(Debug)]
pub(crate) struct ChunkTables {
    /// First token and rows of each chunk: `[NT, 2]`.
    pub(crate) chunks: CudaSlice<i64>,
    /// What is walked in one go, the longest first: `[NS, 6]`.
    pub(crate) segments: CudaSlice<i64>,
    /// `NT`.
    pub(crate) chunks_len: usize,
    /// `NS`.
    pub(crate) segments_len: usize,
}

impl ChunkTables {
    pub(crate) fn new(
        device: &Device,
        seqs: &SeqLens,
        c: usize,
        segment: Option<usize>,
    ) -> Result<Self, Error> {
        let (chunks, segments) = tables(seqs, c, segment)?;
        let (chunks_len, segments_len) = (chunks.len() / 2, segments.len() / 6);
        Ok(Self {
            chunks: device.upload_offsets(&chunks)?,
            segments: device.upload_offsets(&segments)?,
            chunks_len,
            segments_len,
        })
    }
}

/// The tables of chunks, and of segments of so many of them or of whole sequences.
fn tables(seqs: &SeqLens, c: usize, segment: Option<usize>) -> Result<(Vec<usize>, Vec<usize>), Error> {
    let offsets = Chunks::new(seqs, c)?;
    let (mut chunks, mut sequences, mut bos) = (Vec::new(), Vec::new(), 0);
    for (i_n, first_chunk) in offsets.offsets().iter().enumerate().take(seqs.n()) {
        // `Chunks` has asked for the lengths.
        let len = seqs.len(i_n).unwrap_or(0);
        let eos = bos + len;
        chunks.extend((bos..eos).step_by(c).flat_map(|first| [first, c.min(eos - first)]));
        let per_segment = segment.unwrap_or(usize::MAX).min(len.div_ceil(c).max(1));
        let segments = len.div_ceil(c).div_ceil(per_segment).max(1);
        let rows = (0..segments).flat_map(|i| {
            let first = bos + i * per_segment * c;
            let last = eos.min(first + per_segment * c);
            [first, last, first_chunk + i * per_segment, i_n, i, segments - 1 - i]
        });
        sequences.push((len, rows.collect::<Vec<_>>()));
        bos = eos;
    }
    // The longest first, so that none of them is left for the end.
    sequences.sort_by_key(|(len, _)| Reverse(*len));
    Ok((chunks, sequences.into_iter().flat_map(|(_, rows)| rows).collect()))
}

/// The blocks of a launch that gives `per_unit` of them to each of `n`; none when there is nothing to do.
pub(crate) fn grid(dim: &'static str, n: usize, per_unit: usize) -> Result<Option<Grid>, Error> {
    match i32::try_from(n.saturating_mul(per_unit)) {
        Ok(0) => Ok(None),
        Ok(blocks) => Ok(Some(Grid::x(blocks as u32))),
        Err(_) => {
            let wanted = format!("at most {}", i32::MAX as usize / per_unit);
            Err(Error::Dim { dim, wanted, got: n })
        }
    }
}

/// Checks what a plan by chunks does not take.
pub(crate) fn check_forms(forms: &Forms) -> Result<(), Error> {
    if forms.beta == BetaForm::PerChannel {
        let (option, got) = ("beta", format!("{:?}", forms.beta));
        return Err(Error::Option { option, wanted: "`One` or `PerHead` in a pass by chunks", got });
    }
    forms.check()
}

/// The error for heads whose tiles do not fit in the shared memory of a block.
pub(crate) fn too_large(shape: &Shape, smem_bytes: usize) -> Error {
    let wanted =
        format!("smaller with vectors of this type, on a GPU with {smem_bytes} bytes of shared memory");
    Error::Dim { dim: "K", wanted, got: shape.k }
}

#[cfg(test)]
mod tests {
    use super::{ChunkTiles, Direction, OutputConfig, ScanConfig, tables};
    use fla_core::{DType, SeqLens};

    const H200: usize = super::H200_SMEM_BYTES;

    #[test]
    fn chunks_and_segments_belong_to_sequences() {
        let seqs = SeqLens::packed(&[0, 0, 70, 71], 71).expect("valid");
        let (chunks, segments) = tables(&seqs, 64, None).expect("valid");
        assert_eq!(chunks, [0, 64, 64, 6, 70, 1]);
        assert_eq!(segments, [0, 70, 0, 1, 0, 0, 70, 71, 2, 2, 0, 0, 0, 0, 0, 0, 0, 0]);
        let (chunks, segments) = tables(&SeqLens::dense(2, 65), 64, None).expect("valid");
        assert_eq!(chunks, [0, 64, 64, 1, 65, 64, 129, 1]);
        assert_eq!(segments, [0, 65, 0, 0, 0, 0, 65, 130, 2, 1, 0, 0]);
        let (_, segments) = tables(&SeqLens::dense(1, 300), 64, Some(2)).expect("valid");
        assert_eq!(segments, [0, 128, 0, 0, 0, 2, 128, 256, 2, 0, 1, 1, 256, 300, 4, 0, 2, 0]);
    }

    #[test]
    fn every_head_fits_an_h200() {
        for dtype in [DType::F32, DType::Bf16, DType::F16] {
            for direction in [Direction::Forward, Direction::Backward] {
                for (k, v) in [(1, 1), (64, 64), (128, 128), (256, 512), (192, 64), (33, 65)] {
                    let tiles = ChunkTiles::new(dtype, k, v, direction);
                    assert!(
                        ScanConfig::new(&tiles, (&SeqLens::dense(1, 1), 1), 132, H200).is_some(),
                        "{tiles:?}"
                    );
                    for grouped in [false, true] {
                        assert!(OutputConfig::new(&tiles, grouped, H200).is_some(), "{tiles:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn few_states_are_cut_into_narrow_slices_or_short_segments() {
        let tiles = ChunkTiles::new(DType::Bf16, 128, 128, Direction::Forward);
        let choice = |b, t, hv| {
            let config = ScanConfig::new(&tiles, (&SeqLens::dense(b, t), hv), 132, H200).expect("fits");
            (config.warps_v, config.segment)
        };
        assert_eq!(choice(4, 4096, 64), (8, None));
        assert_eq!(choice(4, 2048, 16), (4, None));
        assert_eq!(choice(1, 512, 8), (2, None));
        assert_eq!(choice(1, 8192, 32), (8, Some(32)));
        // One kernel for all gradients has a whole head in a block, and wants more of them than the scans.
        let for_whole = |b, t, hv| {
            let heads = (&SeqLens::dense(b, t), hv);
            let config = ScanConfig::new(&tiles, heads, 132, H200).expect("fits");
            let config = config.cut_for_whole(&tiles, heads, 132, H200);
            (config.warps_v, config.segment)
        };
        assert_eq!(choice(1, 8192, 64), (4, None));
        assert_eq!(for_whole(1, 8192, 64), (8, Some(64)));
        assert_eq!(for_whole(1, 8192, 32), (8, Some(32)));
        assert_eq!(for_whole(4, 4096, 64), (8, None));
        assert_eq!(for_whole(1, 8000, 64), (8, Some(63)));
        assert_eq!(for_whole(1, 512, 64), (4, None));
        // One long sequence of several does not make enough of them.
        let seqs = SeqLens::packed(&[0, 8192, 8256, 8320], 8320).expect("valid");
        let config = ScanConfig::new(&tiles, (&seqs, 20), 132, H200).expect("fits");
        assert_eq!(config.cut_for_whole(&tiles, (&seqs, 20), 132, H200), config);
        assert_eq!(for_whole(1, 8192, 80), (4, None));
        assert_eq!(choice(1, 65536, 8), (8, Some(64)));
    }
}
