//! The chunk forward pass: matrix products inside chunks, and a scan that takes the state from chunk to chunk.

use std::mem::offset_of;
use std::sync::Arc;

use fla_core::cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut};
use fla_core::{
    Arch, DType, Device, Element, Error, Field, Grid, Kernel, Params, Ptr, PtrMut, RawSlice, Source, Unit,
    Workspace, check_align, check_len,
};
use half::{bf16, f16};

use crate::Shape;
use crate::chunk_fwd_sm90::{ChunkFwdWhole, WholeConfig, WholeTargets, whole_units};
use crate::chunk_tiles::{
    self, ChunkTables, ChunkTiles, Direction, FACTORS, Scan, ScanConfig, check_forms, grid, intra_smem_bytes,
    too_large,
};
use crate::gates::{
    Beta, BetaForm, BetaMap, ChannelGates, Forms, Gate, GateForm, GateTensors, QkNorm, StateLayout,
};
use crate::recurrent_fwd::{FORMS, MAX_K, MAX_V, VALUE_MAJOR};

const SOURCE_INTRA: Source = Source {
    name: "fla/gated_delta/chunk_fwd_intra.cu",
    text: include_str!("../kernels/chunk_fwd_intra.cu"),
};
const SOURCE_STATE: Source = Source {
    name: "fla/gated_delta/chunk_fwd_state.cu",
    text: include_str!("../kernels/chunk_fwd_state.cu"),
};

/// What has no safe default, and what may be changed. What is not asked for is not compiled in.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct ChunkFwdOptions {
    /// Factor of the output; `K^-0.5` and 1 are both common, so it must be said.
    pub scale: f32,
    /// Which scalar decay; [`GateForm::Log`] unless changed.
    pub gate: GateForm,
    /// Which write strength, [`BetaForm::One`] or [`BetaForm::PerHead`]; the second unless changed.
    pub beta: BetaForm,
    /// What is done to the write strength first; [`BetaMap::AsGiven`] unless changed.
    pub beta_map: BetaMap,
    /// What is done to queries and keys first; [`QkNorm::AsGiven`] unless changed.
    pub qk_norm: QkNorm,
    /// How states of the caller lie, gradients of states too; [`StateLayout::KeyMajor`] unless changed.
    pub state_layout: StateLayout,
}

impl ChunkFwdOptions {
    /// The options with this factor of the output, a log decay and a strength for each value head, both as given.
    #[must_use]
    pub const fn new(scale: f32) -> Self {
        Self {
            scale,
            gate: GateForm::Log,
            beta: BetaForm::PerHead,
            beta_map: BetaMap::AsGiven,
            qk_norm: QkNorm::AsGiven,
            state_layout: StateLayout::KeyMajor,
        }
    }

    /// Changes the scalar decay.
    #[must_use]
    pub const fn with_gate(mut self, gate: GateForm) -> Self {
        self.gate = gate;
        self
    }

    /// Changes the write strength.
    #[must_use]
    pub const fn with_beta(mut self, beta: BetaForm) -> Self {
        self.beta = beta;
        self
    }

    /// Changes what is done to the write strength first.
    #[must_use]
    pub const fn with_beta_map(mut self, beta_map: BetaMap) -> Self {
        self.beta_map = beta_map;
        self
    }

    /// Changes what is done to queries and keys first.
    #[must_use]
    pub const fn with_qk_norm(mut self, qk_norm: QkNorm) -> Self {
        self.qk_norm = qk_norm;
        self
    }

    /// Changes how states of the caller lie.
    #[must_use]
    pub const fn with_state_layout(mut self, state_layout: StateLayout) -> Self {
        self.state_layout = state_layout;
        self
    }

    /// The factor of the output and everything that is compiled in, checked.
    pub(crate) fn checked(&self) -> Result<(f32, Forms), Error> {
        let Self { scale, gate, beta, beta_map, qk_norm, state_layout } = *self;
        if !scale.is_finite() {
            return Err(Error::Option { option: "scale", wanted: "finite", got: scale.to_string() });
        }
        let channel_gates = ChannelGates::None;
        let forms = Forms { gate, channel_gates, beta, beta_map, qk_norm, state_layout };
        check_forms(&forms)?;
        Ok((scale, forms))
    }
}

/// What the pass reads. Contiguous, each at a multiple of 16 bytes.
#[derive(Clone, Copy)]
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub struct ChunkFwdInputs<'a, T> {
    /// Queries: `[B, T, H, K]`.
    pub q: &'a dyn DevicePtr<T>,
    /// Keys, of unit length unless they are normalised inside: `[B, T, H, K]`.
    pub k: &'a dyn DevicePtr<T>,
    /// Values: `[B, T, HV, V]`.
    pub v: &'a dyn DevicePtr<T>,
    /// Scalar decay of each value head.
    pub g: Gate<'a, T>,
    /// Write strength.
    pub beta: Beta<'a, T>,
    /// State before the first token of each sequence, or zero when absent: `[N, HV, K, V]`, or as [`StateLayout`] says.
    pub initial_state: Option<&'a dyn DevicePtr<f32>>,
}

/// What the pass writes, whole.
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub struct ChunkFwdOutputs<'a, T> {
    /// Outputs: `[B, T, HV, V]`.
    pub o: &'a mut dyn DevicePtrMut<T>,
    /// State after the last token of each sequence, when wanted: `[N, HV, K, V]`, or as [`StateLayout`] says.
    pub final_state: Option<&'a mut dyn DevicePtrMut<f32>>,
}

/// What the one-call form returns.
#[derive(Debug)]
pub struct ChunkFwdResult<T> {
    /// Outputs: `[B, T, HV, V]`.
    pub o: CudaSlice<T>,
    /// State after the last token of each sequence: `[N, HV, K, V]`, or as [`StateLayout`] says.
    pub final_state: CudaSlice<f32>,
}

/// The chunk forward pass of the gated delta rule, made once for a shape and run many times.
///
/// Tokens are taken in chunks of C, which is 64, or 32 where vectors are f32 or K is above 128. With G the sum of the log
/// decay from the start of a chunk, `Gamma_ij = e^(G_i - G_j)` and S the state before it:
///
/// ```text
/// T  = Gamma (I + stril(beta_i k_i . k_j))^-1        V' = T (beta V - beta e^G K S)
/// O  = scale (e^G Q S + tril(Gamma Q K^T) V')         S <- e^(G_C) S + K^T (e^(G_C - G) V')
/// ```
///
/// Products of Gamma are elementwise. That is the recurrence of [`RecurrentFwd`](crate::RecurrentFwd) without gates of
/// channels, and no approximation of it.
///
/// | tensor               | shape           | dtype | meaning                                             |
/// |----------------------|-----------------|-------|-----------------------------------------------------|
/// | `q`, `k`             | `[B, T, H, K]`  | `T`   | queries and keys; value head j reads `j H / HV`     |
/// | `v`                  | `[B, T, HV, V]` | `T`   | values                                              |
/// | `g` (log decay)      | `[B, T, HV]`    | f32   | natural base, at most 0; or absent                  |
/// | `g` (logits)         | `[B, T, HV]`    | `T`   | in its place: `-exp(a_log) softplus(g + dt_bias)`   |
/// | `a_log`, `dt_bias`   | `[HV]`          | f32   | with logits; `dt_bias` is optional                  |
/// | `beta`               | `[B, T, HV]`    | `T`   | write strength, or its logits; 1 when absent        |
/// | `initial_state`      | `[N, HV, K, V]` | f32   | optional; zero when absent                          |
/// | `o` (out)            | `[B, T, HV, V]` | `T`   | outputs                                             |
/// | `final_state` (out)  | `[N, HV, K, V]` | f32   | optional                                            |
///
/// `T` is f32, bf16 or f16; K is at most 256 and V at most 512, any size, and HV a multiple of H. Lengths have to be known
/// to the host; a sequence without tokens hands its state through. With [`StateLayout::ValueMajor`] both states are
/// `[N, HV, V, K]`, and nothing else changes.
///
/// # Numerics
///
/// Sums are f32, and so are gates, norms, the state between chunks and the inverse, which is taken by substitution: keys
/// that repeat do no harm. Operands of products are rounded to `T`; f32 goes as pairs of bf16 with three products, which
/// is good for about 1e-5. A log decay under -110 counts as -110. The error against the float64 recurrence stays under the
/// rows `gated_delta, chunk_fwd` of `fla_reference::tolerance`, and the same inputs give the same bits.
///
/// # Source
///
/// Yang, Kautz and Hatamizadeh, "Gated Delta Networks: Improving Mamba2 with Delta Rule", arXiv:2412.06464.
#[derive(Debug)]
pub struct ChunkFwd<T> {
    passes: Passes<T>,
    tables: ChunkTables,
    shape: Shape,
    forms: Forms,
}

/// The launches of a plan.
#[derive(Debug)]
enum Passes<T> {
    Stages(Box<(ChunkFwdIntra<T>, ChunkFwdState<T>)>),
    Whole(ChunkFwdWhole<T>),
}

const fn is_shareable<T: Send + Sync>() {}
// A plan may be made on one thread and run on others.
const _: () = is_shareable::<ChunkFwd<bf16>>();

impl<T: Element> ChunkFwd<T> {
    /// Checks the shape, compiles or loads the kernels, and uploads the tables of chunks.
    ///
    /// # Errors
    ///
    /// [`Error::Dim`] when H, HV, K or V is 0 or too large, for this GPU too, or HV is no multiple of H; [`Error::Option`]
    /// when `scale` is not finite, a strength is one of channels, or a map is asked for of strengths that are 1;
    /// [`Error::SeqLens`] when only the device knows the lengths; [`Error::NoNvrtc`], [`Error::Compile`],
    /// [`Error::Driver`] or [`Error::OutOfMemory`] when the kernels cannot be had.
    pub fn new(device: &Device, shape: &Shape, options: &ChunkFwdOptions) -> Result<Self, Error> {
        shape.check(MAX_K, MAX_V)?;
        let (scale, forms) = options.checked()?;
        let tiles = ChunkTiles::new(T::DTYPE, shape.k, shape.v, Direction::Forward);
        let config = scan_config(device, shape, &tiles)?;
        let tables = ChunkTables::new(device, &shape.seqs, tiles.c, config.segment)?;
        let is_whole = WholeConfig::is_for(&tiles, shape, config.segment.is_some(), device.arch());
        let passes = if is_whole {
            let whole = WholeConfig::new(&tiles, shape, device.sm_count());
            let whole = (&tiles, whole, &tables);
            Passes::Whole(ChunkFwdWhole::new(device, shape, whole, (scale, &forms, false))?)
        } else {
            let (intra, state) = std::thread::scope(|scope| {
                // Both compile at once where there is a processor for each.
                let intra =
                    scope.spawn(|| ChunkFwdIntra::new(device, shape, &tiles, &tables, (scale, &forms)));
                let scan = (Scan::Outputs, forms.state_layout);
                let state = ChunkFwdState::new(device, shape, (&tiles, &config), &tables, scan);
                (joined(intra), state)
            });
            Passes::Stages(Box::new((intra?, state?)))
        };
        Ok(Self { passes, tables, shape: shape.clone(), forms })
    }

    /// Bytes of the workspace that a run needs. Where one kernel does all that is next to nothing; otherwise for every chunk
    /// and value head two matrices of C by C and eight rows, and for every segment of a sequence that is cut into several how
    /// it changes a state.
    #[must_use]
    pub fn workspace_bytes(&self) -> usize {
        let Passes::Stages(stages) = &self.passes else { return Workspace::bytes(&[1]) };
        let (intra, state) = &**stages;
        let [inverse, scores, factors] = intra.workspace_parts(&self.shape, &self.tables);
        let [maps, kept, _] = state.maps_bytes(&self.shape, &self.tables);
        Workspace::bytes(&[inverse, scores, factors, maps, kept])
    }

    /// Queues the pass on `stream`. Allocates nothing, never synchronises, and can be captured in a graph.
    ///
    /// `workspace` has [`Self::workspace_bytes`] bytes and starts at a multiple of 256; its contents do not matter.
    ///
    /// # Errors
    ///
    /// [`Error::Len`], [`Error::Align`] and [`Error::Presence`], which name the tensor; [`Error::Context`] when the
    /// stream belongs to another context; nothing has been launched then. [`Error::Driver`] when a launch is refused.
    pub fn run(
        &self,
        stream: &CudaStream,
        x: &ChunkFwdInputs<'_, T>,
        y: &mut ChunkFwdOutputs<'_, T>,
        workspace: &mut dyn DevicePtrMut<u8>,
    ) -> Result<(), Error> {
        let shape = &self.shape;
        check_inputs(shape, &self.forms, x)?;
        check_len("o", "[B, T, HV, V]", shape.v_len(), y.o.len())?;
        if let Some(state) = &y.final_state {
            check_len("final_state", self.forms.state_layout.dims().whole(), shape.state_len(), state.len())?;
        }
        check_aligns(stream, x)?;
        align_of("o", stream, &mut *y.o)?;
        if let Some(state) = &mut y.final_state {
            align_of("final_state", stream, &mut **state)?;
        }
        let workspace = Workspace::new(stream, workspace, self.workspace_bytes())?;
        let on = (shape, &self.tables);
        let (o, final_state) = (Some(&mut *y.o), y.final_state.as_deref_mut());
        match &self.passes {
            Passes::Stages(stages) => {
                let (intra, state) = &**stages;
                let matrices = intra.run(stream, on, x, &workspace)?;
                let mut maps = state.take_maps(shape, &self.tables, &workspace)?;
                let to = ScanTargets { o, final_state, kept: None, maps: &mut maps };
                state.run(stream, on, (x, &matrices), to)
            }
            Passes::Whole(whole) => whole.run(stream, on, x, WholeTargets { o, final_state, kept: None }),
        }
    }
}

/// Makes the plan, allocates outputs and workspace and runs, on the stream of `q`.
///
/// # Errors
///
/// As [`ChunkFwd::new`] and [`ChunkFwd::run`].
pub fn chunk_fwd<T: Element>(
    device: &Device,
    shape: &Shape,
    x: &ChunkFwdInputs<'_, T>,
    options: &ChunkFwdOptions,
) -> Result<ChunkFwdResult<T>, Error> {
    let plan = ChunkFwd::<T>::new(device, shape, options)?;
    let stream: Arc<CudaStream> = x.q.stream().clone();
    let mut y = ChunkFwdResult {
        o: device.alloc(&stream, shape.v_len())?,
        final_state: device.alloc(&stream, shape.state_len())?,
    };
    let mut workspace = device.alloc::<u8>(&stream, plan.workspace_bytes())?;
    let mut outputs = ChunkFwdOutputs { o: &mut y.o, final_state: Some(&mut y.final_state) };
    plan.run(&stream, x, &mut outputs, &mut workspace)?;
    Ok(y)
}

/// What a thread of a scope has made; its panic goes on here.
pub(crate) fn joined<R>(thread: std::thread::ScopedJoinHandle<'_, R>) -> R {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// The choice of the scans for a shape.
pub(crate) fn scan_config(device: &Device, shape: &Shape, tiles: &ChunkTiles) -> Result<ScanConfig, Error> {
    let smem_bytes = device.smem_bytes() as usize;
    let config = ScanConfig::new(tiles, (&shape.seqs, shape.hv), device.sm_count(), smem_bytes);
    tracing::debug!(?tiles, ?config, "gated_delta chunk scans");
    config.ok_or_else(|| too_large(shape, smem_bytes))
}

/// Checks which inputs there are, and their lengths.
pub(crate) fn check_inputs<T: Element>(
    shape: &Shape,
    forms: &Forms,
    x: &ChunkFwdInputs<'_, T>,
) -> Result<(), Error> {
    check_len("q", "[B, T, H, K]", shape.qk_len(), x.q.len())?;
    check_len("k", "[B, T, H, K]", shape.qk_len(), x.k.len())?;
    check_len("v", "[B, T, HV, V]", shape.v_len(), x.v.len())?;
    GateTensors { g: x.g, gk: None, gv: None, beta: x.beta }.check(forms, shape)?;
    if let Some(state) = x.initial_state {
        check_len("initial_state", forms.state_layout.dims().whole(), shape.state_len(), state.len())?;
    }
    Ok(())
}

/// Refuses inputs that a launch would refuse: later launches bind some when the first has been queued.
pub(crate) fn check_aligns<T: Element>(stream: &CudaStream, x: &ChunkFwdInputs<'_, T>) -> Result<(), Error> {
    for (name, tensor) in [("q", x.q), ("k", x.k), ("v", x.v)] {
        check_align(name, tensor.device_ptr(stream).0)?;
    }
    if let Some(state) = x.initial_state {
        check_align("initial_state", state.device_ptr(stream).0)?;
    }
    Ok(())
}

/// The same for an output.
pub(crate) fn align_of<T: Element>(
    tensor: &'static str,
    stream: &CudaStream,
    memory: &mut dyn DevicePtrMut<T>,
) -> Result<(), Error> {
    check_align(tensor, memory.device_ptr_mut(stream).0)
}

/// What the stage `intra` leaves for the others.
#[derive(Debug)]
pub(crate) struct Matrices<'a> {
    pub(crate) inverse: RawSlice<'a, u8>,
    pub(crate) scores: RawSlice<'a, u8>,
    pub(crate) factors: RawSlice<'a, f32>,
}

impl<'a> Matrices<'a> {
    /// Bytes of the inverses, the scores and the factors, for every chunk of so many heads.
    pub(crate) fn bytes(tiles: &ChunkTiles, heads: usize) -> [usize; 3] {
        let c = tiles.c;
        let matrices = heads.saturating_mul(c * c * tiles.work().bytes());
        [matrices, matrices, heads.saturating_mul(FACTORS * c * size_of::<f32>())]
    }

    pub(crate) fn take(
        tiles: &ChunkTiles,
        heads: usize,
        workspace: &'a Workspace<'_>,
    ) -> Result<Self, Error> {
        let [inverse, scores, factors] = Self::bytes(tiles, heads);
        Ok(Self {
            inverse: workspace.take::<u8>(inverse)?,
            scores: workspace.take::<u8>(scores)?,
            factors: workspace.take::<f32>(factors / size_of::<f32>())?,
        })
    }
}

/// The stage `intra` of a plan, for both directions.
#[derive(Debug)]
pub(crate) struct ChunkFwdIntra<T> {
    kernel: Kernel<ChunkFwdIntraParams<T>>,
    tiles: ChunkTiles,
    scale: f32,
    grid: Option<Grid>,
}

impl<T: Element> ChunkFwdIntra<T> {
    pub(crate) fn new(
        device: &Device,
        shape: &Shape,
        tiles: &ChunkTiles,
        tables: &ChunkTables,
        (scale, forms): (f32, &Forms),
    ) -> Result<Self, Error> {
        if intra_smem_bytes(tiles) > device.smem_bytes() as usize {
            return Err(too_large(shape, device.smem_bytes() as usize));
        }
        let grid = grid("NT", tables.chunks_len, shape.h)?;
        Ok(Self {
            kernel: device.kernel(&intra_unit::<T>(tiles, forms, device.arch()))?,
            tiles: *tiles,
            scale,
            grid,
        })
    }

    /// Bytes of the inverses, the scores and the factors.
    pub(crate) fn workspace_parts(&self, shape: &Shape, tables: &ChunkTables) -> [usize; 3] {
        Matrices::bytes(&self.tiles, tables.chunks_len.saturating_mul(shape.hv))
    }

    pub(crate) fn run<'a>(
        &self,
        stream: &CudaStream,
        (shape, tables): (&Shape, &ChunkTables),
        x: &ChunkFwdInputs<'_, T>,
        workspace: &'a Workspace<'_>,
    ) -> Result<Matrices<'a>, Error> {
        let mut to = Matrices::take(&self.tiles, tables.chunks_len.saturating_mul(shape.hv), workspace)?;
        let Some(grid) = self.grid else { return Ok(to) };
        let (g, raw) = match x.g {
            Gate::None => (None, None),
            Gate::Log(g) => (Some(g), None),
            Gate::Raw { g, a_log, dt_bias } => (None, Some((g, a_log, dt_bias))),
        };
        self.kernel.launch(stream, grid, |bind| ChunkFwdIntraParams {
            q: bind.read("q", x.q),
            k: bind.read("k", x.k),
            g: bind.read_opt("g", g),
            g_logit: bind.read_opt("g", raw.map(|(g, ..)| g)),
            a_log: bind.read_opt("a_log", raw.map(|(_, a_log, _)| a_log)),
            dt_bias: bind.read_opt("dt_bias", raw.and_then(|(.., dt_bias)| dt_bias)),
            beta: match x.beta {
                Beta::One => Ptr::NULL,
                Beta::PerHead(beta) | Beta::PerChannel(beta) => bind.read("beta", beta),
            },
            chunks: bind.read("chunks", &tables.chunks),
            inverse: bind.write("workspace", &mut to.inverse),
            scores: bind.write("workspace", &mut to.scores),
            factors: bind.write("workspace", &mut to.factors),
            // `new` of the plan has checked that H and HV fit.
            h: shape.h as i32,
            hv: shape.hv as i32,
            scale: self.scale,
        })?;
        Ok(to)
    }
}

/// Where the scan leaves what it makes; it keeps states and what rows write.
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub(crate) struct ScanTargets<'a, 'b, 'c, T> {
    pub(crate) o: Option<&'a mut (dyn DevicePtrMut<T> + 'b)>,
    pub(crate) final_state: Option<&'a mut (dyn DevicePtrMut<f32> + 'b)>,
    pub(crate) kept: Option<[&'a mut RawSlice<'c, u8>; 2]>,
    pub(crate) maps: &'a mut Maps<'c>,
}

/// How segments change states, where sequences are cut into several; empty otherwise.
#[derive(Debug)]
pub(crate) struct Maps<'a> {
    pub(crate) maps: RawSlice<'a, f32>,
    pub(crate) kept: RawSlice<'a, i32>,
}

/// The stage `state` of a plan; the backward pass keeps what the forward pass makes outputs of.
#[derive(Debug)]
pub(crate) struct ChunkFwdState<T> {
    kernel: Kernel<ChunkFwdStateParams<T>>,
    grid: Option<Grid>,
    /// What runs before it where sequences are cut into segments.
    maps: Option<(Kernel<ChunkFwdStateParams<T>>, Grid)>,
    tiles: ChunkTiles,
    config: ScanConfig,
}

impl<T: Element> ChunkFwdState<T> {
    pub(crate) fn new(
        device: &Device,
        shape: &Shape,
        (tiles, config): (&ChunkTiles, &ScanConfig),
        tables: &ChunkTables,
        (scan, layout): (Scan, StateLayout),
    ) -> Result<Self, Error> {
        let heads = tables.segments_len.saturating_mul(shape.hv);
        let kernel = |scan: Scan| -> Result<_, Error> {
            let grid = grid("N * HV", heads, config.blocks(tiles, scan))?;
            Ok((device.kernel(&state_unit::<T>(tiles, config, scan, layout))?, grid))
        };
        let (maps, main) = std::thread::scope(|threads| {
            let maps = config.segment.map(|_| threads.spawn(|| kernel(Scan::Maps)));
            let main = kernel(scan);
            (maps.map(joined), main)
        });
        let maps = maps.transpose()?.and_then(|(kernel, grid)| grid.map(|grid| (kernel, grid)));
        let (kernel, grid) = main?;
        Ok(Self { kernel, grid, maps, tiles: *tiles, config: *config })
    }

    /// Bytes of the maps, of whether they keep anything, and of those of gradients.
    pub(crate) fn maps_bytes(&self, shape: &Shape, tables: &ChunkTables) -> [usize; 3] {
        self.config.maps_bytes(&self.tiles, tables.segments_len.saturating_mul(shape.hv))
    }

    pub(crate) fn take_maps<'a>(
        &self,
        shape: &Shape,
        tables: &ChunkTables,
        workspace: &'a Workspace<'_>,
    ) -> Result<Maps<'a>, Error> {
        let [maps, kept, _] = self.maps_bytes(shape, tables);
        Ok(Maps {
            maps: workspace.take(maps / size_of::<f32>())?,
            kept: workspace.take(kept / size_of::<i32>())?,
        })
    }

    pub(crate) fn run(
        &self,
        stream: &CudaStream,
        (shape, tables): (&Shape, &ChunkTables),
        (x, matrices): (&ChunkFwdInputs<'_, T>, &Matrices<'_>),
        to: ScanTargets<'_, '_, '_, T>,
    ) -> Result<(), Error> {
        let Some(grid) = self.grid else { return Ok(()) };
        let ScanTargets { mut o, mut final_state, mut kept, maps } = to;
        let launches = self.maps.as_ref().map(|(kernel, grid)| (kernel, *grid));
        for (kernel, grid) in launches.into_iter().chain([(&self.kernel, grid)]) {
            let [states, written] = match &mut kept {
                Some([states, written]) => [Some(&mut **states), Some(&mut **written)],
                None => [None, None],
            };
            kernel.launch(stream, grid, |bind| ChunkFwdStateParams {
                q: bind.read("q", x.q),
                k: bind.read("k", x.k),
                v: bind.read("v", x.v),
                inverse: bind.read("workspace", &matrices.inverse),
                scores: bind.read("workspace", &matrices.scores),
                factors: bind.read("workspace", &matrices.factors),
                segments: bind.read("segments", &tables.segments),
                initial_state: bind.read_opt("initial_state", x.initial_state),
                o: bind.write_opt("o", o.as_deref_mut()),
                final_state: bind.write_opt("final_state", final_state.as_deref_mut()),
                states: bind.write_opt("workspace", states),
                written: bind.write_opt("workspace", written),
                maps: bind.write("workspace", &mut maps.maps),
                kept: bind.write("workspace", &mut maps.kept),
                // `new` of the plan has checked that H and HV fit.
                h: shape.h as i32,
                hv: shape.hv as i32,
            })?;
        }
        Ok(())
    }
}

pub(crate) fn units(arch: Arch) -> Vec<Unit> {
    let mut out = Vec::new();
    for (k, v) in [(64, 64), (128, 128), (256, 512), (60, 100)] {
        out.extend(any_units::<bf16>(k, v, &FORMS[0], arch));
        let tiles = ChunkTiles::new(DType::Bf16, k, v, Direction::Forward);
        out.push(intra_unit::<bf16>(&tiles, &FORMS[1], arch));
    }
    out.extend(walk_units::<bf16>(128, 128, &VALUE_MAJOR, arch));
    out.extend(any_units::<f32>(128, 128, &FORMS[0], arch));
    out.extend(any_units::<f16>(128, 128, &FORMS[0], arch));
    out
}

/// Every kernel that a plan for heads of K by V may choose on an H200.
fn any_units<T: Element>(k: usize, v: usize, forms: &Forms, arch: Arch) -> Vec<Unit> {
    let tiles = ChunkTiles::new(T::DTYPE, k, v, Direction::Forward);
    let mut out = walk_units::<T>(k, v, forms, arch);
    out.push(intra_unit::<T>(&tiles, forms, arch));
    out
}

/// Those of them that touch states.
fn walk_units<T: Element>(k: usize, v: usize, forms: &Forms, arch: Arch) -> Vec<Unit> {
    let tiles = ChunkTiles::new(T::DTYPE, k, v, Direction::Forward);
    let scans = ScanConfig::all_split(&tiles, chunk_tiles::H200_SMEM_BYTES).flat_map(|config| {
        let scans =
            if config.segment.is_some() { &[Scan::Outputs, Scan::Maps][..] } else { &[Scan::Outputs] };
        scans.iter().map(move |scan| state_unit::<T>(&tiles, &config, *scan, forms.state_layout))
    });
    let whole = whole_units::<T>(&tiles, forms, false, arch);
    scans.chain(whole).collect()
}

pub(crate) fn intra_unit<T: Element>(tiles: &ChunkTiles, forms: &Forms, arch: Arch) -> Unit {
    // Four blocks have the registers of a multiprocessor; on sm_120, whose shared memory holds one, they would spill.
    let min_blocks = if arch.major() >= 12 { 2 } else { 4 };
    let threads = 2 * tiles.c as u32;
    let unit = Unit::new::<ChunkFwdIntraParams<T>>("gated_delta", "chunk_fwd_intra", SOURCE_INTRA, threads);
    chunk_tiles::with_forms(tiles.with_tiles(unit), forms)
        .with_min_blocks(min_blocks)
        .with_smem_bytes(intra_smem_bytes(tiles) as u32)
}

pub(crate) fn state_unit<T: Element>(
    tiles: &ChunkTiles,
    config: &ScanConfig,
    scan: Scan,
    layout: StateLayout,
) -> Unit {
    let unit =
        Unit::new::<ChunkFwdStateParams<T>>("gated_delta", "chunk_fwd_state", SOURCE_STATE, config.threads());
    config
        .with_config(tiles.with_tiles(unit), tiles, scan)
        .with("OUTPUT", scan == Scan::Outputs)
        .with("KEEP", scan == Scan::States)
        .with("VALUE_MAJOR", layout == StateLayout::ValueMajor)
}

/// Twin of `fla::gated_delta::ChunkFwdIntraParams`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct ChunkFwdIntraParams<T> {
    q: Ptr<T>,
    k: Ptr<T>,
    g: Ptr<f32>,
    g_logit: Ptr<T>,
    a_log: Ptr<f32>,
    dt_bias: Ptr<f32>,
    beta: Ptr<T>,
    chunks: Ptr<i64>,
    inverse: PtrMut<u8>,
    scores: PtrMut<u8>,
    factors: PtrMut<f32>,
    h: i32,
    hv: i32,
    scale: f32,
}

// SAFETY: `#[repr(C)]`, and the fields are listed in order.
unsafe impl<T: Element> Params for ChunkFwdIntraParams<T> {
    const CUDA_TYPE: &'static str = "fla::gated_delta::ChunkFwdIntraParams<Cfg::Element, Cfg::Work>";
    const FIELDS: &'static [Field] = &[
        Field::new("q", "const Cfg::Element*", offset_of!(Self, q)),
        Field::new("k", "const Cfg::Element*", offset_of!(Self, k)),
        Field::new("g", "const float*", offset_of!(Self, g)),
        Field::new("g_logit", "const Cfg::Element*", offset_of!(Self, g_logit)),
        Field::new("a_log", "const float*", offset_of!(Self, a_log)),
        Field::new("dt_bias", "const float*", offset_of!(Self, dt_bias)),
        Field::new("beta", "const Cfg::Element*", offset_of!(Self, beta)),
        Field::new("chunks", "const fla::i64*", offset_of!(Self, chunks)),
        Field::new("inverse", "Cfg::Work*", offset_of!(Self, inverse)),
        Field::new("scores", "Cfg::Work*", offset_of!(Self, scores)),
        Field::new("factors", "float*", offset_of!(Self, factors)),
        Field::new("h", "fla::i32", offset_of!(Self, h)),
        Field::new("hv", "fla::i32", offset_of!(Self, hv)),
        Field::new("scale", "float", offset_of!(Self, scale)),
    ];
}

/// Twin of `fla::gated_delta::ChunkFwdStateParams`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct ChunkFwdStateParams<T> {
    q: Ptr<T>,
    k: Ptr<T>,
    v: Ptr<T>,
    inverse: Ptr<u8>,
    scores: Ptr<u8>,
    factors: Ptr<f32>,
    segments: Ptr<i64>,
    initial_state: Ptr<f32>,
    o: PtrMut<T>,
    final_state: PtrMut<f32>,
    states: PtrMut<u8>,
    written: PtrMut<u8>,
    maps: PtrMut<f32>,
    kept: PtrMut<i32>,
    h: i32,
    hv: i32,
}

// SAFETY: `#[repr(C)]`, and the fields are listed in order.
unsafe impl<T: Element> Params for ChunkFwdStateParams<T> {
    const CUDA_TYPE: &'static str = "fla::gated_delta::ChunkFwdStateParams<Cfg::Element, Cfg::Work>";
    const FIELDS: &'static [Field] = &[
        Field::new("q", "const Cfg::Element*", offset_of!(Self, q)),
        Field::new("k", "const Cfg::Element*", offset_of!(Self, k)),
        Field::new("v", "const Cfg::Element*", offset_of!(Self, v)),
        Field::new("inverse", "const Cfg::Work*", offset_of!(Self, inverse)),
        Field::new("scores", "const Cfg::Work*", offset_of!(Self, scores)),
        Field::new("factors", "const float*", offset_of!(Self, factors)),
        Field::new("segments", "const fla::i64*", offset_of!(Self, segments)),
        Field::new("initial_state", "const float*", offset_of!(Self, initial_state)),
        Field::new("o", "Cfg::Element*", offset_of!(Self, o)),
        Field::new("final_state", "float*", offset_of!(Self, final_state)),
        Field::new("states", "Cfg::Work*", offset_of!(Self, states)),
        Field::new("written", "Cfg::Work*", offset_of!(Self, written)),
        Field::new("maps", "float*", offset_of!(Self, maps)),
        Field::new("kept", "fla::i32*", offset_of!(Self, kept)),
        Field::new("h", "fla::i32", offset_of!(Self, h)),
        Field::new("hv", "fla::i32", offset_of!(Self, hv)),
    ];
}

#[cfg(test)]
mod tests {
    use super::{Arch, Element, FORMS, VALUE_MAJOR, any_units, bf16, f16, walk_units};
    use fla_core::compile::compile;
    use fla_core::testing::nvrtc;

    fn failures<T: Element>() -> Vec<String> {
        // Rows that are read in vectors and rows that are not, wide and narrow; and the layer's form of what has one.
        let heads = [(128, 128), (256, 512), (33, 65)];
        let units = heads.iter().flat_map(|(k, v)| {
            let units = any_units::<T>(*k, *v, &FORMS[1], Arch::SM_90);
            units.into_iter().chain(walk_units::<T>(*k, *v, &VALUE_MAJOR, Arch::SM_90))
        });
        units.filter_map(|unit| compile(&unit, Arch::SM_90).err()).map(|error| error.to_string()).collect()
    }

    #[test]
    fn no_shape_spills() {
        if !nvrtc("no_shape_spills") {
            return;
        }
        let failures = std::thread::scope(|scope| {
            let other = scope.spawn(failures::<f32>);
            let narrow = [failures::<bf16>(), failures::<f16>()].concat();
            [narrow, other.join().expect("does not panic")].concat()
        });
        assert!(failures.is_empty(), "{} units\n{}", failures.len(), failures.join("\n"));
    }
}
