//! The gradients of states and of chunks as one kernel, where warpgroups multiply: Hopper. Another adds up those of queries
//! and keys that value heads share.

use std::mem::offset_of;

use fla_core::cudarc::driver::{CudaStream, DevicePtr, DeviceSlice};
use fla_core::{
    Arch, Device, Element, Error, Field, Grid, Kernel, Matrix, Params, Ptr, PtrMut, RawSlice, Source,
    Swizzle, TensorMap, Unit,
};

use crate::Shape;
use crate::chunk_bwd::{ChunkBwdInputs, ChunkBwdOutputs, Kept};
use crate::chunk_fwd::Matrices;
use crate::chunk_tiles::{self, ChunkTables, ChunkTiles, Layout, grid};
use crate::gates::{Beta, Forms};
use crate::recurrent_bwd::GateGrads;

const SOURCE: Source =
    Source { name: "fla/gated_delta/chunk_bwd_sm90.cu", text: include_str!("../kernels/chunk_bwd_sm90.cu") };

const SOURCE_OUTPUT: Source = Source {
    name: "fla/gated_delta/chunk_bwd_output_sm90.cu",
    text: include_str!("../kernels/chunk_bwd_output_sm90.cu"),
};

/// Columns of a state: two warpgroups have 64 each.
const V: usize = 128;
const THREADS: u32 = 384;
const STAGES: usize = 2;
const OUTPUT_THREADS: u32 = 256;

fn smem_bytes(tiles: &ChunkTiles) -> usize {
    let (c, k) = (tiles.c, tiles.k);
    let of_tokens = Layout::new().tile(tiles, c, k).times(2 * STAGES);
    let d_o = Layout::new().tile(tiles, c, V).times(STAGES);
    let all = Layout::new().member(of_tokens).member(d_o);
    let all = all.tile(tiles, V, k).tile(tiles, V, k).tile(tiles, V, c).tile(tiles, V, c);
    let all = all.tile(tiles, c, c).tile(tiles, c, c).member(Layout::new().factors(c).times(STAGES));
    // Six sums of each row, four of each column, eight of values, eight products of states.
    let sums = ((6 + 4 + 8) * c + 8) * size_of::<f32>();
    let barriers = 3 * STAGES + 8;
    let walk = 5 * size_of::<i32>();
    all.add(STAGES * sums, 4).add(barriers * size_of::<u64>(), 8).add(walk, 4).size()
}

/// The kernels of a plan.
#[derive(Debug)]
pub(crate) struct ChunkBwdWhole<T> {
    kernel: Kernel<ChunkBwdParams<T>>,
    grid: Option<Grid>,
    scale: f32,
    /// What adds up over value heads, where they share queries and keys.
    output: Option<(Kernel<ChunkBwdOutputParams<T>>, Grid)>,
}

/// Gradients of queries and keys, a term for each value head: `[B, T, HV, K]`; empty where heads share nothing.
#[derive(Debug)]
pub(crate) struct HeadGrads<'a, T> {
    pub(crate) dq: RawSlice<'a, T>,
    pub(crate) dk: RawSlice<'a, T>,
}

/// What the kernel reads that other launches have made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WholeInputs<'a, 'b> {
    pub(crate) matrices: &'a Matrices<'b>,
    pub(crate) kept: &'a Kept<'b>,
    /// Where sequences are cut into segments.
    pub(crate) ends: Option<&'a RawSlice<'b, f32>>,
}

impl<T: Element> ChunkBwdWhole<T> {
    /// Whether a GPU and a shape are ones for it: tokens, chunks and states that tensor copies can name by 32 bits.
    pub(crate) fn is_for(tiles: &ChunkTiles, shape: &Shape, arch: Arch) -> bool {
        let tokens = shape.seqs.b().saturating_mul(shape.seqs.t());
        // Each sequence adds at most one chunk to those of its whole 64 tokens.
        let chunks = (tokens / tiles.c).saturating_add(shape.seqs.n());
        let rows = chunks.saturating_mul(shape.hv.saturating_mul(V));
        let is_in_range = tokens > 0 && rows.max(tokens) <= i32::MAX as usize;
        Self::is_for_heads(tiles, arch) && is_in_range
    }

    pub(crate) fn is_for_heads(tiles: &ChunkTiles, arch: Arch) -> bool {
        arch.has_wgmma() && tiles.parts == 1 && tiles.c == 64 && tiles.k.is_multiple_of(64) && tiles.v == V
    }

    pub(crate) fn new(
        device: &Device,
        shape: &Shape,
        (tiles, tables): (&ChunkTiles, &ChunkTables),
        (scale, forms): (f32, &Forms),
    ) -> Result<Self, Error> {
        let is_grouped = shape.hv > shape.h;
        let output = if is_grouped {
            // The shape is one for the kernel, so that rows are whole pieces of 8.
            let blocks = grid("B * T * H", shape.qk_len().div_ceil(8 * OUTPUT_THREADS as usize), 1)?;
            let kernel = device.kernel(&output_unit::<T>(tiles))?;
            blocks.map(|blocks| (kernel, blocks))
        } else {
            None
        };
        Ok(Self {
            kernel: device.kernel(&whole_unit::<T>(tiles, forms, is_grouped))?,
            grid: grid("N * HV", tables.segments_len.saturating_mul(shape.hv), 1)?,
            scale,
            output,
        })
    }

    /// Numbers of [`HeadGrads`], each of two.
    pub(crate) fn parts_len(&self, shape: &Shape) -> usize {
        if self.output.is_some() { shape.k_len() } else { 0 }
    }

    pub(crate) fn run(
        &self,
        stream: &CudaStream,
        (shape, tables): (&Shape, &ChunkTables),
        (x, made): (&ChunkBwdInputs<'_, T>, WholeInputs<'_, '_>),
        (dx, dg_of_logs, parts): (&mut ChunkBwdOutputs<'_, T>, &mut RawSlice<'_, f32>, &mut HeadGrads<'_, T>),
    ) -> Result<(), Error> {
        let Some(grid) = self.grid else { return Ok(()) };
        let is_grouped = self.output.is_some();
        let tokens = shape.seqs.b() * shape.seqs.t();
        let heads = tables.chunks_len * shape.hv;
        let boxes = |rows: usize, cols: usize, tile_rows: usize| Matrix {
            rows,
            cols,
            row_stride: cols,
            tile_rows,
            tile_cols: 64,
            swizzle: Swizzle::Bytes128,
        };
        let of_tokens = |width: usize| boxes(tokens, width, 64);
        // The guards are held until the launch is queued.
        let (q, _q) = TensorMap::new(stream, x.q, &of_tokens(shape.h * shape.k))?;
        let (k, _k) = TensorMap::new(stream, x.k, &of_tokens(shape.h * shape.k))?;
        let (d_o, _d_o) = TensorMap::new(stream, x.d_o, &of_tokens(shape.hv * V))?;
        let map = |bytes: &RawSlice<'_, u8>, matrix: Matrix| -> Result<TensorMap, Error> {
            let (ptr, _guard) = bytes.device_ptr(stream);
            // SAFETY: the part of the workspace holds that many elements, which other launches of this run write before, on
            // the same stream; it outlives the launch.
            let elements = unsafe { RawSlice::<T>::new(ptr, bytes.len() / size_of::<T>(), bytes.stream()) };
            Ok(TensorMap::new(stream, &elements, &matrix)?.0)
        };
        let states = map(&made.kept.states, boxes(heads * V, shape.k, V))?;
        let written = map(&made.kept.written, boxes(heads * V, 64, V))?;
        let inverse = map(&made.matrices.inverse, boxes(heads * 64, 64, 64))?;
        let scores = map(&made.matrices.scores, boxes(heads * 64, 64, 64))?;
        self.kernel.launch(stream, grid, |bind| ChunkBwdParams {
            q,
            k,
            d_o,
            states,
            written,
            inverse,
            scores,
            v: bind.read("v", x.v),
            beta: match x.beta {
                Beta::One => Ptr::NULL,
                Beta::PerHead(beta) | Beta::PerChannel(beta) => bind.read("beta", beta),
            },
            factors: bind.read("workspace", &made.matrices.factors),
            segments: bind.read("segments", &tables.segments),
            d_final_state: bind.read_opt("d_final_state", x.d_final_state),
            d_ends: bind.read_opt("workspace", made.ends),
            d_initial_state: bind.write_opt("d_initial_state", dx.d_initial_state.as_deref_mut()),
            dq: if is_grouped {
                bind.write("workspace", &mut parts.dq)
            } else {
                bind.write("dq", &mut *dx.dq)
            },
            dk: if is_grouped {
                bind.write("workspace", &mut parts.dk)
            } else {
                bind.write("dk", &mut *dx.dk)
            },
            dv: bind.write("dv", &mut *dx.dv),
            dg: match &mut dx.dg {
                GateGrads::None => PtrMut::NULL,
                GateGrads::Log(dg) => bind.write("dg", &mut **dg),
                GateGrads::Raw { .. } => bind.write("workspace", dg_of_logs),
            },
            dbeta: bind.write_opt("dbeta", dx.dbeta.as_deref_mut()),
            // `new` of the plan has checked that H and HV fit.
            h: shape.h as i32,
            hv: shape.hv as i32,
            scale: self.scale,
        })?;
        let Some((kernel, grid)) = &self.output else { return Ok(()) };
        kernel.launch(stream, *grid, |bind| ChunkBwdOutputParams {
            dq_parts: bind.read("workspace", &parts.dq),
            dk_parts: bind.read("workspace", &parts.dk),
            dq: bind.write("dq", &mut *dx.dq),
            dk: bind.write("dk", &mut *dx.dk),
            len: shape.qk_len() as i64,
            group: (shape.hv / shape.h) as i32,
        })
    }
}

/// Every kernel of these heads that touches states.
pub(crate) fn whole_units<T: Element>(tiles: &ChunkTiles, forms: &Forms) -> [Unit; 2] {
    [false, true].map(|is_grouped| whole_unit::<T>(tiles, forms, is_grouped))
}

pub(crate) fn output_unit<T: Element>(tiles: &ChunkTiles) -> Unit {
    let unit = Unit::new::<ChunkBwdOutputParams<T>>(
        "gated_delta",
        "chunk_bwd_output",
        SOURCE_OUTPUT,
        OUTPUT_THREADS,
    );
    unit.with("Element", T::DTYPE).with("K", tiles.k as i32).with("THREADS", OUTPUT_THREADS as i32)
}

fn whole_unit<T: Element>(tiles: &ChunkTiles, forms: &Forms, is_grouped: bool) -> Unit {
    let unit = Unit::new::<ChunkBwdParams<T>>("gated_delta", "chunk_bwd", SOURCE, THREADS);
    chunk_tiles::with_forms(tiles.with_tiles(unit), forms)
        .with_smem_bytes(smem_bytes(tiles) as u32)
        .with("VALUE_MAJOR", forms.is_value_major())
        .with("GROUPED", is_grouped)
}

/// Twin of `fla::gated_delta::ChunkBwdParams`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct ChunkBwdParams<T> {
    q: TensorMap,
    k: TensorMap,
    d_o: TensorMap,
    states: TensorMap,
    written: TensorMap,
    inverse: TensorMap,
    scores: TensorMap,
    v: Ptr<T>,
    beta: Ptr<T>,
    factors: Ptr<f32>,
    segments: Ptr<i64>,
    d_final_state: Ptr<f32>,
    d_ends: Ptr<f32>,
    d_initial_state: PtrMut<f32>,
    dq: PtrMut<T>,
    dk: PtrMut<T>,
    dv: PtrMut<T>,
    dg: PtrMut<f32>,
    dbeta: PtrMut<T>,
    h: i32,
    hv: i32,
    scale: f32,
}

// SAFETY: `#[repr(C)]`, and the fields are listed in order.
unsafe impl<T: Element> Params for ChunkBwdParams<T> {
    const CUDA_TYPE: &'static str = "fla::gated_delta::ChunkBwdParams<Cfg::Element, Cfg::Work>";
    const FIELDS: &'static [Field] = &[
        Field::new("q", "fla::TensorMap", offset_of!(Self, q)),
        Field::new("k", "fla::TensorMap", offset_of!(Self, k)),
        Field::new("d_o", "fla::TensorMap", offset_of!(Self, d_o)),
        Field::new("states", "fla::TensorMap", offset_of!(Self, states)),
        Field::new("written", "fla::TensorMap", offset_of!(Self, written)),
        Field::new("inverse", "fla::TensorMap", offset_of!(Self, inverse)),
        Field::new("scores", "fla::TensorMap", offset_of!(Self, scores)),
        Field::new("v", "const Cfg::Element*", offset_of!(Self, v)),
        Field::new("beta", "const Cfg::Element*", offset_of!(Self, beta)),
        Field::new("factors", "const float*", offset_of!(Self, factors)),
        Field::new("segments", "const fla::i64*", offset_of!(Self, segments)),
        Field::new("d_final_state", "const float*", offset_of!(Self, d_final_state)),
        Field::new("d_ends", "const float*", offset_of!(Self, d_ends)),
        Field::new("d_initial_state", "float*", offset_of!(Self, d_initial_state)),
        Field::new("dq", "Cfg::Element*", offset_of!(Self, dq)),
        Field::new("dk", "Cfg::Element*", offset_of!(Self, dk)),
        Field::new("dv", "Cfg::Element*", offset_of!(Self, dv)),
        Field::new("dg", "float*", offset_of!(Self, dg)),
        Field::new("dbeta", "Cfg::Element*", offset_of!(Self, dbeta)),
        Field::new("h", "fla::i32", offset_of!(Self, h)),
        Field::new("hv", "fla::i32", offset_of!(Self, hv)),
        Field::new("scale", "float", offset_of!(Self, scale)),
    ];
}

/// Twin of `fla::gated_delta::ChunkBwdOutputParams` on Hopper.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct ChunkBwdOutputParams<T> {
    dq_parts: Ptr<T>,
    dk_parts: Ptr<T>,
    dq: PtrMut<T>,
    dk: PtrMut<T>,
    len: i64,
    group: i32,
}

// SAFETY: `#[repr(C)]`, and the fields are listed in order.
unsafe impl<T: Element> Params for ChunkBwdOutputParams<T> {
    const CUDA_TYPE: &'static str = "fla::gated_delta::ChunkBwdOutputParams<Cfg::Element>";
    const FIELDS: &'static [Field] = &[
        Field::new("dq_parts", "const Cfg::Element*", offset_of!(Self, dq_parts)),
        Field::new("dk_parts", "const Cfg::Element*", offset_of!(Self, dk_parts)),
        Field::new("dq", "Cfg::Element*", offset_of!(Self, dq)),
        Field::new("dk", "Cfg::Element*", offset_of!(Self, dk)),
        Field::new("len", "fla::i64", offset_of!(Self, len)),
        Field::new("group", "fla::i32", offset_of!(Self, group)),
    ];
}
