//! The chunk forward pass as one kernel, where warpgroups multiply: Hopper.

use std::mem::offset_of;

use fla_core::cudarc::driver::{CudaStream, DevicePtrMut};
use fla_core::{
    Arch, Device, Element, Error, Field, Grid, Kernel, Matrix, Params, Ptr, PtrMut, RawSlice, Source,
    Swizzle, TensorMap, Unit,
};

use crate::Shape;
use crate::chunk_fwd::{ChunkFwdInputs, Matrices};
use crate::chunk_tiles::{self, ChunkTables, ChunkTiles, Layout, grid};
use crate::gates::{Beta, Forms, Gate};

const SOURCE: Source =
    Source { name: "fla/gated_delta/chunk_fwd_sm90.cu", text: include_str!("../kernels/chunk_fwd_sm90.cu") };

/// Constants of `chunk_fwd_sm90` that are a choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct WholeConfig {
    /// Columns of the state that a block has: 64 for each warpgroup.
    pub(crate) bv: usize,
    /// Chunks that are in shared memory or on their way there.
    pub(crate) stages: usize,
    /// Warpgroups that prepare chunks, in turn.
    pub(crate) preparers: usize,
}

impl WholeConfig {
    /// Whether a GPU and a shape are ones for it: tensor copies bring boxes of 64 channels and name a token by 32 bits. Where
    /// sequences are cut, what is made for maps would be made again.
    pub(crate) fn is_for(tiles: &ChunkTiles, shape: &Shape, is_cut: bool, arch: Arch) -> bool {
        let tokens = shape.seqs.b().saturating_mul(shape.seqs.t());
        let is_in_range = (1..=i32::MAX as usize).contains(&tokens);
        Self::is_for_heads(tiles, arch) && is_in_range && !is_cut
    }

    fn is_for_heads(tiles: &ChunkTiles, arch: Arch) -> bool {
        let is_in_boxes = tiles.k.is_multiple_of(64) && tiles.v.is_multiple_of(64);
        arch.has_wgmma() && tiles.parts == 1 && tiles.c == 64 && is_in_boxes
    }

    /// The choice for a shape: half of 128 columns for each block when there are few of them.
    pub(crate) fn new(tiles: &ChunkTiles, shape: &Shape, sm_count: u32) -> Self {
        let blocks = shape.seqs.n().saturating_mul(shape.hv).saturating_mul(tiles.v.div_ceil(128));
        let is_wide = tiles.v > 64 && blocks >= sm_count as usize * 3 / 4;
        Self::of(is_wide, shape.hv > shape.h)
    }

    /// A scan of 64 columns is done sooner than one warpgroup has prepared the next chunk, so two of them take turns. Where no
    /// value heads share keys, one does, as it has been timed; beside 128 columns shared memory has no room for a second.
    const fn of(is_wide: bool, is_grouped: bool) -> Self {
        let preparers = if is_grouped && !is_wide { 2 } else { 1 };
        Self { bv: if is_wide { 128 } else { 64 }, stages: 3, preparers }
    }

    fn threads(self) -> u32 {
        (128 * self.preparers + 2 * self.bv) as u32
    }

    fn smem_bytes(self, tiles: &ChunkTiles) -> usize {
        let (c, k) = (tiles.c, tiles.padded_k());
        let stage = Layout::new().tile(tiles, c, k).tile(tiles, c, k).tile(tiles, c, self.bv);
        let stage = stage.tile(tiles, c, c).tile(tiles, c, c).factors(c);
        let inverse = c * (c + 8) * size_of::<f32>();
        let all = Layout::new().member(stage.times(self.stages)).add(self.preparers * inverse, 16);
        all.add(self.preparers * 2 * c * size_of::<f32>(), 4)
            .add(3 * self.stages * size_of::<u64>(), 8)
            .size()
    }
}

/// The whole pass of a plan, or for a backward pass what that needs of it.
#[derive(Debug)]
pub(crate) struct ChunkFwdWhole<T> {
    kernel: Kernel<ChunkFwdParams<T>>,
    grid: Option<Grid>,
    scale: f32,
}

/// Where it leaves what it makes: outputs, or what a backward pass needs.
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub(crate) struct WholeTargets<'a, 'b, 'c, T> {
    pub(crate) o: Option<&'a mut (dyn DevicePtrMut<T> + 'b)>,
    pub(crate) final_state: Option<&'a mut (dyn DevicePtrMut<f32> + 'b)>,
    pub(crate) kept: Option<WholeKept<'a, 'c>>,
}

/// What a backward pass needs.
#[derive(Debug)]
pub(crate) struct WholeKept<'a, 'b> {
    pub(crate) states: &'a mut RawSlice<'b, u8>,
    pub(crate) written: &'a mut RawSlice<'b, u8>,
    /// None when a stage before has made them.
    pub(crate) matrices: Option<&'a mut Matrices<'b>>,
}

impl<T: Element> ChunkFwdWhole<T> {
    /// Outputs, or with `keeps` what a backward pass needs.
    pub(crate) fn new(
        device: &Device,
        shape: &Shape,
        (tiles, config, tables): (&ChunkTiles, WholeConfig, &ChunkTables),
        (scale, forms, keeps): (f32, &Forms, bool),
    ) -> Result<Self, Error> {
        let heads = tables.segments_len.saturating_mul(shape.hv);
        Ok(Self {
            kernel: device.kernel(&whole_unit::<T>(tiles, config, forms, keeps))?,
            grid: grid("N * HV", heads, tiles.v.div_ceil(config.bv))?,
            scale,
        })
    }

    pub(crate) fn run(
        &self,
        stream: &CudaStream,
        (shape, tables): (&Shape, &ChunkTables),
        x: &ChunkFwdInputs<'_, T>,
        to: WholeTargets<'_, '_, '_, T>,
    ) -> Result<(), Error> {
        let Some(grid) = self.grid else { return Ok(()) };
        let WholeTargets { o, final_state, kept } = to;
        let (g, raw) = match x.g {
            Gate::None => (None, None),
            Gate::Log(g) => (Some(g), None),
            Gate::Raw { g, a_log, dt_bias } => (None, Some((g, a_log, dt_bias))),
        };
        let (kept, matrices) = match kept {
            Some(WholeKept { states, written, matrices }) => ([Some(states), Some(written)], matrices),
            None => ([None, None], None),
        };
        let [states, written] = kept;
        let (inverse, scores, factors) = match matrices {
            Some(Matrices { inverse, scores, factors }) => (Some(inverse), Some(scores), Some(factors)),
            None => (None, None, None),
        };
        let tokens = shape.seqs.b() * shape.seqs.t();
        let boxes = |cols: usize| Matrix {
            rows: tokens,
            cols,
            row_stride: cols,
            tile_rows: 64,
            tile_cols: 64,
            swizzle: Swizzle::Bytes128,
        };
        // The guards are held until the launch is queued.
        let (q, _q) = TensorMap::new(stream, x.q, &boxes(shape.h * shape.k))?;
        let (k, _k) = TensorMap::new(stream, x.k, &boxes(shape.h * shape.k))?;
        let (v, _v) = TensorMap::new(stream, x.v, &boxes(shape.hv * shape.v))?;
        self.kernel.launch(stream, grid, |bind| ChunkFwdParams {
            q,
            k,
            v,
            g: bind.read_opt("g", g),
            g_logit: bind.read_opt("g", raw.map(|(g, ..)| g)),
            a_log: bind.read_opt("a_log", raw.map(|(_, a_log, _)| a_log)),
            dt_bias: bind.read_opt("dt_bias", raw.and_then(|(.., dt_bias)| dt_bias)),
            beta: match x.beta {
                Beta::One => Ptr::NULL,
                Beta::PerHead(beta) | Beta::PerChannel(beta) => bind.read("beta", beta),
            },
            segments: bind.read("segments", &tables.segments),
            initial_state: bind.read_opt("initial_state", x.initial_state),
            o: bind.write_opt("o", o),
            final_state: bind.write_opt("final_state", final_state),
            states: bind.write_opt("workspace", states),
            written: bind.write_opt("workspace", written),
            inverse: bind.write_opt("workspace", inverse),
            scores: bind.write_opt("workspace", scores),
            factors: bind.write_opt("workspace", factors),
            // `new` of the plan has checked that H and HV fit.
            h: shape.h as i32,
            hv: shape.hv as i32,
            scale: self.scale,
        })
    }
}

pub(crate) fn whole_unit<T: Element>(
    tiles: &ChunkTiles,
    config: WholeConfig,
    forms: &Forms,
    keeps: bool,
) -> Unit {
    let unit = Unit::new::<ChunkFwdParams<T>>("gated_delta", "chunk_fwd", SOURCE, config.threads());
    chunk_tiles::with_forms(tiles.with_tiles(unit), forms)
        .with_smem_bytes(config.smem_bytes(tiles) as u32)
        .with("BV", config.bv as i32)
        .with("STAGES", config.stages as i32)
        .with("OUTPUT", !keeps)
        .with("KEEP", keeps)
        .with("VALUE_MAJOR", forms.is_value_major())
        .with("PREPARERS", config.preparers as i32)
}

/// Every kernel that a plan for these heads may choose.
pub(crate) fn whole_units<T: Element>(
    tiles: &ChunkTiles,
    forms: &Forms,
    keeps: bool,
    arch: Arch,
) -> Vec<Unit> {
    let configs = [WholeConfig::of(false, false), WholeConfig::of(false, true), WholeConfig::of(true, false)];
    let possible = configs
        .into_iter()
        .filter(|config| WholeConfig::is_for_heads(tiles, arch) && (config.bv == 64 || tiles.v > 64));
    possible.map(|config| whole_unit::<T>(tiles, config, forms, keeps)).collect()
}

/// Twin of `fla::gated_delta::ChunkFwdParams`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct ChunkFwdParams<T> {
    q: TensorMap,
    k: TensorMap,
    v: TensorMap,
    g: Ptr<f32>,
    g_logit: Ptr<T>,
    a_log: Ptr<f32>,
    dt_bias: Ptr<f32>,
    beta: Ptr<T>,
    segments: Ptr<i64>,
    initial_state: Ptr<f32>,
    o: PtrMut<T>,
    final_state: PtrMut<f32>,
    states: PtrMut<u8>,
    written: PtrMut<u8>,
    inverse: PtrMut<u8>,
    scores: PtrMut<u8>,
    factors: PtrMut<f32>,
    h: i32,
    hv: i32,
    scale: f32,
}

// SAFETY: `#[repr(C)]`, and the fields are listed in order.
unsafe impl<T: Element> Params for ChunkFwdParams<T> {
    const CUDA_TYPE: &'static str = "fla::gated_delta::ChunkFwdParams<Cfg::Element, Cfg::Work>";
    const FIELDS: &'static [Field] = &[
        Field::new("q", "fla::TensorMap", offset_of!(Self, q)),
        Field::new("k", "fla::TensorMap", offset_of!(Self, k)),
        Field::new("v", "fla::TensorMap", offset_of!(Self, v)),
        Field::new("g", "const float*", offset_of!(Self, g)),
        Field::new("g_logit", "const Cfg::Element*", offset_of!(Self, g_logit)),
        Field::new("a_log", "const float*", offset_of!(Self, a_log)),
        Field::new("dt_bias", "const float*", offset_of!(Self, dt_bias)),
        Field::new("beta", "const Cfg::Element*", offset_of!(Self, beta)),
        Field::new("segments", "const fla::i64*", offset_of!(Self, segments)),
        Field::new("initial_state", "const float*", offset_of!(Self, initial_state)),
        Field::new("o", "Cfg::Element*", offset_of!(Self, o)),
        Field::new("final_state", "float*", offset_of!(Self, final_state)),
        Field::new("states", "Cfg::Work*", offset_of!(Self, states)),
        Field::new("written", "Cfg::Work*", offset_of!(Self, written)),
        Field::new("inverse", "Cfg::Work*", offset_of!(Self, inverse)),
        Field::new("scores", "Cfg::Work*", offset_of!(Self, scores)),
        Field::new("factors", "float*", offset_of!(Self, factors)),
        Field::new("h", "fla::i32", offset_of!(Self, h)),
        Field::new("hv", "fla::i32", offset_of!(Self, hv)),
        Field::new("scale", "float", offset_of!(Self, scale)),
    ];
}

#[cfg(test)]
mod tests {
    use super::{ChunkTiles, Shape, WholeConfig};
    use crate::chunk_tiles::{Direction, H200_SMEM_BYTES};
    use fla_core::{Arch, DType, SeqLens};

    #[test]
    fn grouped_heads_take_it_and_few_of_them_have_two_that_prepare() {
        let tiles = ChunkTiles::new(DType::Bf16, 128, 128, Direction::Forward);
        let choice = |b, h, hv| {
            let shape = Shape { seqs: SeqLens::dense(b, 8192), h, hv, k: 128, v: 128 };
            assert!(WholeConfig::is_for(&tiles, &shape, false, Arch::SM_90));
            let config = WholeConfig::new(&tiles, &shape, 132);
            assert!(config.smem_bytes(&tiles) <= H200_SMEM_BYTES, "{config:?}");
            (config.bv, config.preparers)
        };
        assert_eq!(choice(1, 64, 64), (64, 1));
        assert_eq!(choice(1, 16, 64), (64, 2));
        assert_eq!(choice(4, 16, 64), (128, 1));
    }
}
