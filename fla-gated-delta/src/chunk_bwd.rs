//! The chunk backward pass: states once more, their gradients from the last chunk to the first, then chunks side by side.

use std::mem::offset_of;
use std::sync::Arc;

use fla_core::cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut};
use fla_core::{
    Arch, Device, Element, Error, Field, Grid, Kernel, Params, Ptr, PtrMut, RawSlice, Source, Unit,
    Workspace, check_align, check_len,
};
use half::{bf16, f16};

use crate::Shape;
use crate::chunk_bwd_sm90::{self, ChunkBwdWhole, HeadGrads, WholeInputs};
use crate::chunk_fwd::{
    ChunkFwdInputs, ChunkFwdIntra, ChunkFwdOptions, ChunkFwdState, Maps, Matrices, ScanTargets, align_of,
    check_aligns, check_inputs, intra_unit, joined, scan_config, state_unit,
};
use crate::chunk_fwd_sm90::{ChunkFwdWhole, WholeConfig, WholeKept, WholeTargets, whole_units};
use crate::chunk_tiles::{
    self, ChunkTables, ChunkTiles, Direction, OutputConfig, Scan, ScanConfig, grid, too_large,
};
use crate::gates::{Beta, Forms, Gate, GateForm, StateLayout};
use crate::recurrent_bwd::{GateGrads, GateOfLogits, check_gate_grads};
use crate::recurrent_fwd::{FORMS, MAX_K, MAX_V, VALUE_MAJOR};

const SOURCE_STATE: Source = Source {
    name: "fla/gated_delta/chunk_bwd_state.cu",
    text: include_str!("../kernels/chunk_bwd_state.cu"),
};
const SOURCE_OUTPUT: Source = Source {
    name: "fla/gated_delta/chunk_bwd_output.cu",
    text: include_str!("../kernels/chunk_bwd_output.cu"),
};

/// What the pass reads. Contiguous, each at a multiple of 16 bytes.
#[derive(Clone, Copy)]
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub struct ChunkBwdInputs<'a, T> {
    /// Queries: `[B, T, H, K]`.
    pub q: &'a dyn DevicePtr<T>,
    /// Keys: `[B, T, H, K]`.
    pub k: &'a dyn DevicePtr<T>,
    /// Values: `[B, T, HV, V]`.
    pub v: &'a dyn DevicePtr<T>,
    /// Scalar decay of each value head.
    pub g: Gate<'a, T>,
    /// Write strength.
    pub beta: Beta<'a, T>,
    /// State that the forward pass has started from, or zero when absent: `[N, HV, K, V]`, or as [`StateLayout`] says.
    pub initial_state: Option<&'a dyn DevicePtr<f32>>,
    /// Gradient of the outputs: `[B, T, HV, V]`.
    pub d_o: &'a dyn DevicePtr<T>,
    /// Gradient of the final state, or zero when absent: `[N, HV, K, V]`, or as [`StateLayout`] says.
    pub d_final_state: Option<&'a dyn DevicePtr<f32>>,
}

/// What the pass writes, whole: gradients with respect to the inputs as they were given, before any map or norm.
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub struct ChunkBwdOutputs<'a, T> {
    /// Gradient of `q`, summed over the value heads of its group: `[B, T, H, K]`.
    pub dq: &'a mut dyn DevicePtrMut<T>,
    /// Gradient of `k`, summed over the value heads of its group: `[B, T, H, K]`.
    pub dk: &'a mut dyn DevicePtrMut<T>,
    /// Gradient of `v`: `[B, T, HV, V]`.
    pub dv: &'a mut dyn DevicePtrMut<T>,
    /// Gradients of `g` and what it is made of.
    pub dg: GateGrads<'a, T>,
    /// Gradient of `beta`, there when that is: `[B, T, HV]`.
    pub dbeta: Option<&'a mut dyn DevicePtrMut<T>>,
    /// Gradient of the initial state, when wanted: `[N, HV, K, V]`, or as [`StateLayout`] says.
    pub d_initial_state: Option<&'a mut dyn DevicePtrMut<f32>>,
}

/// What the one-call form returns; gradients of what was absent are absent.
#[derive(Debug)]
pub struct ChunkBwdResult<T> {
    /// Gradient of `q`: `[B, T, H, K]`.
    pub dq: CudaSlice<T>,
    /// Gradient of `k`: `[B, T, H, K]`.
    pub dk: CudaSlice<T>,
    /// Gradient of `v`: `[B, T, HV, V]`.
    pub dv: CudaSlice<T>,
    /// Gradient of log decays: `[B, T, HV]`.
    pub dg: Option<CudaSlice<f32>>,
    /// Gradient of logits: `[B, T, HV]`.
    pub dg_logits: Option<CudaSlice<T>>,
    /// Gradient of `a_log`: `[HV]`.
    pub d_a_log: Option<CudaSlice<f32>>,
    /// Gradient of `dt_bias`: `[HV]`.
    pub d_dt_bias: Option<CudaSlice<f32>>,
    /// Gradient of `beta`: `[B, T, HV]`.
    pub dbeta: Option<CudaSlice<T>>,
    /// Gradient of the initial state: `[N, HV, K, V]`, or as [`StateLayout`] says.
    pub d_initial_state: CudaSlice<f32>,
}

/// Gradients of [`ChunkFwd`](crate::ChunkFwd), made once for a shape and run many times.
///
/// With the names of the forward pass, `P = scale tril(Gamma Q K^T)`, X what T is multiplied with there, and dS the gradient
/// of the state after the chunk:
///
/// ```text
/// dV' = P^T dO + e^(G_C - G) K dS        dX = T^T dV'        dV = beta dX
/// dP  = scale Gamma tril(dO V'^T)         dM = -Gamma stril(dX V'^T)        D = beta dM
/// dQ  = scale e^G dO S^T + dP K
/// dK  = e^(G_C - G) V' dS^T - beta e^G dX S^T + dP^T Q + (D + D^T) K
/// dS <- e^(G_C) dS + Q^T (scale e^G dO) - K^T (beta e^G dX)
/// ```
///
/// and the gradients of `beta` and `g` are sums along rows and columns of the same terms. Gradients then pass through the
/// norm, the map of the strength and the gate, as far as the options ask for them.
///
/// | tensor                           | shape           | dtype | meaning                                       |
/// |----------------------------------|-----------------|-------|-----------------------------------------------|
/// | inputs of the forward pass       |                 |       | as in [`ChunkFwd`](crate::ChunkFwd)           |
/// | `d_o`                            | `[B, T, HV, V]` | `T`   | gradient of the outputs                       |
/// | `d_final_state`                  | `[N, HV, K, V]` | f32   | optional; zero when absent                    |
/// | `dq`, `dk` (out)                 | `[B, T, H, K]`  | `T`   | summed over the value heads that share them   |
/// | `dv` (out)                       | `[B, T, HV, V]` | `T`   |                                               |
/// | `dg` of log decays (out)         | `[B, T, HV]`    | f32   | where there are some                          |
/// | `dg` of logits (out)             | `[B, T, HV]`    | `T`   | in its place                                  |
/// | `d_a_log`, `d_dt_bias` (out)     | `[HV]`          | f32   | optional, with logits: sums over all tokens   |
/// | `dbeta` (out)                    | `[B, T, HV]`    | `T`   | where there is one                            |
/// | `d_initial_state` (out)          | `[N, HV, K, V]` | f32   | optional                                      |
///
/// Nothing of the forward pass has to be kept. With [`StateLayout::ValueMajor`] the initial state and the gradients of both
/// states are `[N, HV, V, K]`.
///
/// # Numerics
///
/// As in the forward pass, but f16 goes as pairs of bf16 too, since gradients may be too small for it. The gradient of the
/// decay holds differences that cancel; it is f32 from the sums of products on. Where one kernel makes the gradients and
/// value heads share queries and keys, the terms of `dq` and `dk` are rounded to `T` before they are added. Sums are taken in a fixed order, those of
/// `d_a_log` and `d_dt_bias` too: the same inputs give the same bits. The error against the float64 recurrence stays
/// under the rows `gated_delta, chunk_bwd` of `fla_reference::tolerance`.
///
/// # Source
///
/// Yang, Kautz and Hatamizadeh, "Gated Delta Networks: Improving Mamba2 with Delta Rule", arXiv:2412.06464.
#[derive(Debug)]
pub struct ChunkBwd<T> {
    /// Stages of the forward pass; where one kernel does all, those that it needs before.
    stages: Option<(ChunkFwdIntra<T>, ChunkFwdState<T>)>,
    whole: Option<ChunkFwdWhole<T>>,
    /// Gradients of states, after what they start from where sequences are cut into segments.
    states: Vec<Kernel<ChunkBwdStateParams<T>>>,
    state_grid: Option<Grid>,
    gradients: Gradients<T>,
    /// For a raw gate.
    logits: Option<GateOfLogits<T>>,
    tables: ChunkTables,
    tiles: ChunkTiles,
    scan: ScanConfig,
    shape: Shape,
    forms: Forms,
    scale: f32,
}

/// What makes the gradients of chunks.
#[derive(Debug)]
enum Gradients<T> {
    /// From gradients of states that are in memory, chunk by chunk.
    Output(Kernel<ChunkBwdOutputParams<T>>, Option<Grid>),
    /// On the walk over the states.
    Whole(ChunkBwdWhole<T>),
}

const fn is_shareable<T: Send + Sync>() {}
// A plan may be made on one thread and run on others.
const _: () = is_shareable::<ChunkBwd<bf16>>();

impl<T: Element> ChunkBwd<T> {
    /// Checks the shape, compiles or loads the kernels, and uploads the tables of chunks.
    ///
    /// # Errors
    ///
    /// As [`ChunkFwd::new`](crate::ChunkFwd::new).
    pub fn new(device: &Device, shape: &Shape, options: &ChunkFwdOptions) -> Result<Self, Error> {
        shape.check(MAX_K, MAX_V)?;
        let (scale, forms) = options.checked()?;
        let tiles = ChunkTiles::new(T::DTYPE, shape.k, shape.v, Direction::Backward);
        let smem_bytes = device.smem_bytes() as usize;
        let mut scan = scan_config(device, shape, &tiles)?;
        let can_be_whole = ChunkBwdWhole::<T>::is_for(&tiles, shape, device.arch());
        if can_be_whole && shape.hv > shape.h {
            scan = scan.cut_for_whole(&tiles, (&shape.seqs, shape.hv), device.sm_count(), smem_bytes);
        }
        let tables = ChunkTables::new(device, &shape.seqs, tiles.c, scan.segment)?;
        let output = OutputConfig::new(&tiles, shape.hv > shape.h, smem_bytes)
            .ok_or_else(|| too_large(shape, smem_bytes))?;
        let heads = tables.segments_len.saturating_mul(shape.hv);
        tracing::debug!(?output, ?forms, "gated_delta chunk_bwd");
        let kernel = |wanted| device.kernel(&bwd_state_unit::<T>(&tiles, &scan, wanted, forms.state_layout));
        // A block for each multiprocessor, which takes chunks in turn.
        let items = tables.chunks_len.saturating_mul(shape.h);
        grid("NT", tables.chunks_len, shape.h)?;
        let output_grid = grid("NT * H", items.min(device.sm_count() as usize), 1)?;
        // A block has a whole head, or a whole segment of one: with few of them, stages that cut V are faster.
        let fills = heads >= device.sm_count() as usize * 3 / 4;
        let is_cut = scan.segment.is_some();
        let forward_is_whole = fills && WholeConfig::is_for(&tiles, shape, is_cut, device.arch());
        let is_whole = fills && can_be_whole;
        let walks: &[Scan] = match (scan.segment, is_whole) {
            (None, false) => &[Scan::Gradients],
            (Some(_), false) => &[Scan::GradientMaps, Scan::Gradients],
            (None, true) => &[],
            (Some(_), true) => &[Scan::GradientMaps, Scan::Ends],
        };
        // All compile at once where there is a processor for each.
        let (intra, forward, whole, states, gradients) = std::thread::scope(|threads| {
            let intra = (!forward_is_whole).then(|| {
                threads.spawn(|| ChunkFwdIntra::new(device, shape, &tiles, &tables, (scale, &forms)))
            });
            let forward = (!forward_is_whole).then(|| {
                threads.spawn(|| {
                    let wanted = (Scan::States, forms.state_layout);
                    ChunkFwdState::new(device, shape, (&tiles, &scan), &tables, wanted)
                })
            });
            let whole = forward_is_whole.then(|| {
                threads.spawn(|| {
                    let whole = WholeConfig::new(&tiles, shape, device.sm_count());
                    ChunkFwdWhole::new(device, shape, (&tiles, whole, &tables), (scale, &forms, true))
                })
            });
            let kernel = &kernel;
            let states: Vec<_> = walks.iter().map(|walk| threads.spawn(|| kernel(*walk))).collect();
            let gradients = if is_whole {
                ChunkBwdWhole::new(device, shape, (&tiles, &tables), (scale, &forms)).map(Gradients::Whole)
            } else {
                let kernel = device.kernel(&output_unit::<T>(&tiles, &output, &forms));
                kernel.map(|kernel| Gradients::Output(kernel, output_grid))
            };
            let states: Result<Vec<_>, Error> = states.into_iter().map(joined).collect();
            (intra.map(joined), forward.map(joined), whole.map(joined), states, gradients)
        });
        let logits = (forms.gate == GateForm::Raw).then(|| GateOfLogits::new(device)).transpose()?;
        Ok(Self {
            stages: intra.transpose()?.zip(forward.transpose()?),
            whole: whole.transpose()?,
            states: states?,
            state_grid: grid("N * HV", heads, scan.slices(&tiles))?,
            gradients: gradients?,
            logits,
            tables,
            tiles,
            scan,
            shape: shape.clone(),
            forms,
            scale,
        })
    }

    /// Bytes of the workspace that a run needs: for every chunk and value head a state, a row of values, two matrices of C by
    /// C and eight rows of factors; a second state and row where the gradients of states take a launch of their own; and
    /// gradients of queries and keys for every value head where one kernel makes these and several share them.
    #[must_use]
    pub fn workspace_bytes(&self) -> usize {
        let [a, b, c] = Matrices::bytes(&self.tiles, self.tables.chunks_len.saturating_mul(self.shape.hv));
        let [states, values, d_states, d_values, dg] = self.workspace_parts();
        let [maps, kept, d_maps, ends] = self.maps_bytes();
        let parts = self.parts_len().saturating_mul(size_of::<T>());
        let of_scans = [a, b, c, states, values, d_states, d_values, dg, maps, kept, d_maps, ends];
        Workspace::bytes(&[&of_scans[..], &[parts, parts]].concat())
    }

    /// Numbers of gradients of queries and keys for each value head, where another launch adds them up.
    fn parts_len(&self) -> usize {
        match &self.gradients {
            Gradients::Output(..) => 0,
            Gradients::Whole(whole) => whole.parts_len(&self.shape),
        }
    }

    /// Bytes of maps of segments, of whether they keep anything, of those of gradients, and of gradients of states after
    /// segments.
    fn maps_bytes(&self) -> [usize; 4] {
        let heads = self.tables.segments_len.saturating_mul(self.shape.hv);
        let [maps, kept, d_maps] = self.scan.maps_bytes(&self.tiles, heads);
        let is_whole = matches!(self.gradients, Gradients::Whole(_));
        [maps, kept, d_maps, if is_whole { self.scan.ends_bytes(&self.tiles, heads) } else { 0 }]
    }

    /// Bytes of states, of what rows write, of the gradients of both, and of those of log decays.
    fn workspace_parts(&self) -> [usize; 5] {
        let (tiles, shape) = (&self.tiles, &self.shape);
        let heads = self.tables.chunks_len.saturating_mul(shape.hv);
        let columns = tiles.padded_v() * tiles.work().bytes();
        let dg = if self.logits.is_some() { shape.head_len().saturating_mul(size_of::<f32>()) } else { 0 };
        let states = heads.saturating_mul(columns * tiles.padded_k());
        let values = heads.saturating_mul(columns * tiles.c);
        let [d_states, d_values] = match self.gradients {
            Gradients::Output(..) => [states, values],
            Gradients::Whole(_) => [0, 0],
        };
        [states, values, d_states, d_values, dg]
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
        x: &ChunkBwdInputs<'_, T>,
        dx: &mut ChunkBwdOutputs<'_, T>,
        workspace: &mut dyn DevicePtrMut<u8>,
    ) -> Result<(), Error> {
        self.check(stream, x, dx)?;
        let workspace = Workspace::new(stream, workspace, self.workspace_bytes())?;
        let forward = forward_inputs(x);
        let on = (&self.shape, &self.tables);
        let heads = self.tables.chunks_len.saturating_mul(self.shape.hv);
        let mut matrices = match &self.stages {
            Some((intra, _)) => intra.run(stream, on, &forward, &workspace)?,
            None => Matrices::take(&self.tiles, heads, &workspace)?,
        };
        let [states, values, d_states, d_values, dg] = self.workspace_parts();
        let mut kept = Kept {
            states: workspace.take(states)?,
            written: workspace.take(values)?,
            d_states: workspace.take(d_states)?,
            dx: workspace.take(d_values)?,
        };
        let mut dg_of_logs = workspace.take::<f32>(dg / size_of::<f32>())?;
        let [maps, has_map, d_maps, ends] = self.maps_bytes();
        let mut maps = Maps {
            maps: workspace.take(maps / size_of::<f32>())?,
            kept: workspace.take(has_map / size_of::<i32>())?,
        };
        let mut of_maps = MapGrads {
            d_maps: workspace.take::<f32>(d_maps / size_of::<f32>())?,
            ends: workspace.take::<f32>(ends / size_of::<f32>())?,
        };
        let mut parts =
            HeadGrads { dq: workspace.take(self.parts_len())?, dk: workspace.take(self.parts_len())? };
        if let Some((_, scan)) = &self.stages {
            let kept = Some([&mut kept.states, &mut kept.written]);
            let to = ScanTargets { o: None, final_state: None, kept, maps: &mut maps };
            scan.run(stream, on, (&forward, &matrices), to)?;
        }
        if let Some(whole) = &self.whole {
            let matrices = Some(&mut matrices);
            let kept = WholeKept { states: &mut kept.states, written: &mut kept.written, matrices };
            let to = WholeTargets { o: None, final_state: None, kept: Some(kept) };
            whole.run(stream, on, &forward, to)?;
        }
        self.run_states(stream, x, dx, (&matrices, &mut kept, &maps, &mut of_maps))?;
        match &self.gradients {
            Gradients::Output(kernel, grid) => {
                self.run_output(stream, x, dx, (&matrices, &kept, &mut dg_of_logs, kernel, *grid))?;
            }
            Gradients::Whole(whole) => {
                let ends = self.scan.segment.map(|_| &of_maps.ends);
                let made = WholeInputs { matrices: &matrices, kept: &kept, ends };
                whole.run(stream, on, (x, made), (dx, &mut dg_of_logs, &mut parts))?;
            }
        }
        match (&self.logits, x.g, &mut dx.dg) {
            (Some(logits), Gate::Raw { .. }, grads) => {
                logits.run(stream, &self.shape, (x.g, &dg_of_logs), grads)
            }
            _ => Ok(()),
        }
    }

    /// The gradients of states, or of those after segments.
    fn run_states(
        &self,
        stream: &CudaStream,
        x: &ChunkBwdInputs<'_, T>,
        dx: &mut ChunkBwdOutputs<'_, T>,
        (matrices, kept, maps, of_maps): (&Matrices<'_>, &mut Kept<'_>, &Maps<'_>, &mut MapGrads<'_>),
    ) -> Result<(), Error> {
        let Some(grid) = self.state_grid else { return Ok(()) };
        for kernel in &self.states {
            kernel.launch(stream, grid, |bind| ChunkBwdStateParams {
                q: bind.read("q", x.q),
                k: bind.read("k", x.k),
                d_o: bind.read("d_o", x.d_o),
                inverse: bind.read("workspace", &matrices.inverse),
                scores: bind.read("workspace", &matrices.scores),
                factors: bind.read("workspace", &matrices.factors),
                segments: bind.read("segments", &self.tables.segments),
                d_final_state: bind.read_opt("d_final_state", x.d_final_state),
                d_initial_state: bind.write_opt("d_initial_state", dx.d_initial_state.as_deref_mut()),
                d_states: bind.write("workspace", &mut kept.d_states),
                dx: bind.write("workspace", &mut kept.dx),
                maps: bind.read("workspace", &maps.maps),
                kept: bind.read("workspace", &maps.kept),
                d_maps: bind.write("workspace", &mut of_maps.d_maps),
                ends: bind.write("workspace", &mut of_maps.ends),
                // `new` has checked that H and HV fit.
                h: self.shape.h as i32,
                hv: self.shape.hv as i32,
            })?;
        }
        Ok(())
    }

    /// The gradients of chunks.
    fn run_output(
        &self,
        stream: &CudaStream,
        x: &ChunkBwdInputs<'_, T>,
        dx: &mut ChunkBwdOutputs<'_, T>,
        (matrices, kept, dg_of_logs, kernel, grid): (
            &Matrices<'_>,
            &Kept<'_>,
            &mut RawSlice<'_, f32>,
            &Kernel<ChunkBwdOutputParams<T>>,
            Option<Grid>,
        ),
    ) -> Result<(), Error> {
        let Some(grid) = grid else { return Ok(()) };
        kernel.launch(stream, grid, |bind| ChunkBwdOutputParams {
            q: bind.read("q", x.q),
            k: bind.read("k", x.k),
            v: bind.read("v", x.v),
            beta: match x.beta {
                Beta::One => Ptr::NULL,
                Beta::PerHead(beta) | Beta::PerChannel(beta) => bind.read("beta", beta),
            },
            d_o: bind.read("d_o", x.d_o),
            states: bind.read("workspace", &kept.states),
            written: bind.read("workspace", &kept.written),
            d_states: bind.read("workspace", &kept.d_states),
            dx: bind.read("workspace", &kept.dx),
            factors: bind.read("workspace", &matrices.factors),
            chunks: bind.read("chunks", &self.tables.chunks),
            dq: bind.write("dq", &mut *dx.dq),
            dk: bind.write("dk", &mut *dx.dk),
            dv: bind.write("dv", &mut *dx.dv),
            dg: match &mut dx.dg {
                GateGrads::None => PtrMut::NULL,
                GateGrads::Log(dg) => bind.write("dg", &mut **dg),
                GateGrads::Raw { .. } => bind.write("workspace", dg_of_logs),
            },
            dbeta: bind.write_opt("dbeta", dx.dbeta.as_deref_mut()),
            items: (self.tables.chunks_len * self.shape.h) as i64,
            // `new` has checked that H and HV fit.
            h: self.shape.h as i32,
            hv: self.shape.hv as i32,
            scale: self.scale,
        })
    }

    /// Checks which tensors there are, and their lengths and places.
    fn check(
        &self,
        stream: &CudaStream,
        x: &ChunkBwdInputs<'_, T>,
        dx: &mut ChunkBwdOutputs<'_, T>,
    ) -> Result<(), Error> {
        let shape = &self.shape;
        let forward = forward_inputs(x);
        check_inputs(shape, &self.forms, &forward)?;
        check_len("dq", "[B, T, H, K]", shape.qk_len(), dx.dq.len())?;
        check_len("dk", "[B, T, H, K]", shape.qk_len(), dx.dk.len())?;
        check_len("d_o", "[B, T, HV, V]", shape.v_len(), x.d_o.len())?;
        check_len("dv", "[B, T, HV, V]", shape.v_len(), dx.dv.len())?;
        check_gate_grads(shape, x.g, &dx.dg)?;
        match (x.beta, &dx.dbeta) {
            (Beta::One, None) => {}
            (Beta::One, Some(_)) => {
                return Err(Error::Presence {
                    tensor: "dbeta",
                    wanted: "must be absent, since its input is",
                });
            }
            (_, Some(dbeta)) => check_len("dbeta", "[B, T, HV]", shape.head_len(), dbeta.len())?,
            (_, None) => {
                return Err(Error::Presence { tensor: "dbeta", wanted: "must be given, since its input is" });
            }
        }
        let state_len = shape.state_len();
        for (name, len) in [
            ("d_final_state", x.d_final_state.map(|s| s.len())),
            ("d_initial_state", dx.d_initial_state.as_ref().map(|s| s.len())),
        ] {
            check_len(name, self.forms.state_layout.dims().whole(), state_len, len.unwrap_or(state_len))?;
        }
        check_aligns(stream, &forward)?;
        check_align("d_o", x.d_o.device_ptr(stream).0)?;
        if let Some(state) = x.d_final_state {
            check_align("d_final_state", state.device_ptr(stream).0)?;
        }
        for (name, tensor) in [("dq", &mut dx.dq), ("dk", &mut dx.dk), ("dv", &mut dx.dv)] {
            align_of(name, stream, &mut **tensor)?;
        }
        if let Some(dbeta) = &mut dx.dbeta {
            align_of("dbeta", stream, &mut **dbeta)?;
        }
        if let Some(state) = &mut dx.d_initial_state {
            align_of("d_initial_state", stream, &mut **state)?;
        }
        match &mut dx.dg {
            GateGrads::None => Ok(()),
            GateGrads::Log(dg) => align_of("dg", stream, &mut **dg),
            GateGrads::Raw { dg, d_a_log, d_dt_bias } => {
                align_of("dg", stream, &mut **dg)?;
                for (name, tensor) in [("d_a_log", d_a_log), ("d_dt_bias", d_dt_bias)] {
                    if let Some(tensor) = tensor {
                        align_of(name, stream, &mut **tensor)?;
                    }
                }
                Ok(())
            }
        }
    }
}

/// What the scans leave for the gradients of chunks.
#[derive(Debug)]
pub(crate) struct Kept<'a> {
    pub(crate) states: RawSlice<'a, u8>,
    pub(crate) written: RawSlice<'a, u8>,
    d_states: RawSlice<'a, u8>,
    dx: RawSlice<'a, u8>,
}

/// How segments change gradients of states, and these gradients after them.
#[derive(Debug)]
struct MapGrads<'a> {
    d_maps: RawSlice<'a, f32>,
    ends: RawSlice<'a, f32>,
}

fn forward_inputs<'a, T: Element>(x: &ChunkBwdInputs<'a, T>) -> ChunkFwdInputs<'a, T> {
    ChunkFwdInputs { q: x.q, k: x.k, v: x.v, g: x.g, beta: x.beta, initial_state: x.initial_state }
}

/// Makes the plan, allocates gradients and workspace and runs, on the stream of `q`.
///
/// # Errors
///
/// As [`ChunkBwd::new`] and [`ChunkBwd::run`].
pub fn chunk_bwd<T: Element>(
    device: &Device,
    shape: &Shape,
    x: &ChunkBwdInputs<'_, T>,
    options: &ChunkFwdOptions,
) -> Result<ChunkBwdResult<T>, Error> {
    let plan = ChunkBwd::<T>::new(device, shape, options)?;
    let stream: Arc<CudaStream> = x.q.stream().clone();
    let narrow = |len| device.alloc::<T>(&stream, len);
    let wide = |given: bool, len| given.then(|| device.alloc::<f32>(&stream, len)).transpose();
    let (is_log, is_raw) = (matches!(x.g, Gate::Log(_)), matches!(x.g, Gate::Raw { .. }));
    let has_bias = matches!(x.g, Gate::Raw { dt_bias: Some(_), .. });
    let has_beta = !matches!(x.beta, Beta::One);
    let mut dx = ChunkBwdResult {
        dq: narrow(shape.qk_len())?,
        dk: narrow(shape.qk_len())?,
        dv: narrow(shape.v_len())?,
        dg: wide(is_log, shape.head_len())?,
        dg_logits: is_raw.then(|| narrow(shape.head_len())).transpose()?,
        d_a_log: wide(is_raw, shape.hv)?,
        d_dt_bias: wide(has_bias, shape.hv)?,
        dbeta: has_beta.then(|| narrow(shape.head_len())).transpose()?,
        d_initial_state: device.alloc(&stream, shape.state_len())?,
    };
    let mut workspace = device.alloc::<u8>(&stream, plan.workspace_bytes())?;
    fn tensor<T>(x: &mut Option<CudaSlice<T>>) -> Option<&mut dyn DevicePtrMut<T>> {
        x.as_mut().map(|x| x as &mut dyn DevicePtrMut<T>)
    }
    let mut outputs = ChunkBwdOutputs {
        dq: &mut dx.dq,
        dk: &mut dx.dk,
        dv: &mut dx.dv,
        dg: match (&mut dx.dg, &mut dx.dg_logits) {
            (Some(dg), _) => GateGrads::Log(dg),
            (_, Some(dg)) => {
                GateGrads::Raw { dg, d_a_log: tensor(&mut dx.d_a_log), d_dt_bias: tensor(&mut dx.d_dt_bias) }
            }
            (None, None) => GateGrads::None,
        },
        dbeta: tensor(&mut dx.dbeta),
        d_initial_state: Some(&mut dx.d_initial_state),
    };
    plan.run(&stream, x, &mut outputs, &mut workspace)?;
    Ok(dx)
}

pub(crate) fn units(arch: Arch) -> Vec<Unit> {
    let mut out = Vec::new();
    for (k, v) in [(64, 64), (128, 128), (256, 512), (60, 100)] {
        out.extend(any_units::<bf16>(k, v, &FORMS[0], arch));
    }
    let tiles = ChunkTiles::new(bf16::DTYPE, 128, 128, Direction::Backward);
    out.extend(output_units::<bf16>(&tiles, &FORMS[1]));
    out.extend(walk_units::<bf16>(128, 128, &VALUE_MAJOR, arch));
    out.extend(any_units::<f32>(128, 128, &FORMS[0], arch));
    out.extend(any_units::<f16>(128, 128, &FORMS[0], arch));
    out
}

/// Every kernel that a plan for heads of K by V may choose on an H200, and no forward pass has.
fn any_units<T: Element>(k: usize, v: usize, forms: &Forms, arch: Arch) -> Vec<Unit> {
    let tiles = ChunkTiles::new(T::DTYPE, k, v, Direction::Backward);
    let mut out = walk_units::<T>(k, v, forms, arch);
    if tiles != ChunkTiles::new(T::DTYPE, k, v, Direction::Forward) {
        out.push(intra_unit::<T>(&tiles, forms, arch));
    }
    out.extend(output_units::<T>(&tiles, forms));
    if ChunkBwdWhole::<T>::is_for_heads(&tiles, arch) {
        out.push(chunk_bwd_sm90::output_unit::<T>(&tiles));
    }
    out
}

/// Those of them that touch states.
fn walk_units<T: Element>(k: usize, v: usize, forms: &Forms, arch: Arch) -> Vec<Unit> {
    let tiles = ChunkTiles::new(T::DTYPE, k, v, Direction::Backward);
    let (mut out, layout) = (Vec::new(), forms.state_layout);
    for config in ScanConfig::all_split(&tiles, chunk_tiles::H200_SMEM_BYTES) {
        out.push(state_unit::<T>(&tiles, &config, Scan::States, layout));
        out.push(bwd_state_unit::<T>(&tiles, &config, Scan::Gradients, layout));
        if config.segment.is_some() {
            out.push(bwd_state_unit::<T>(&tiles, &config, Scan::GradientMaps, layout));
            out.push(bwd_state_unit::<T>(&tiles, &config, Scan::Ends, layout));
        }
    }
    out.extend(whole_units::<T>(&tiles, forms, true, arch));
    if ChunkBwdWhole::<T>::is_for_heads(&tiles, arch) {
        out.extend(chunk_bwd_sm90::whole_units::<T>(&tiles, forms));
    }
    out
}

fn output_units<T: Element>(tiles: &ChunkTiles, forms: &Forms) -> Vec<Unit> {
    let configs = [false, true]
        .into_iter()
        .filter_map(|grouped| OutputConfig::new(tiles, grouped, chunk_tiles::H200_SMEM_BYTES));
    configs.map(|config| output_unit::<T>(tiles, &config, forms)).collect()
}

fn bwd_state_unit<T: Element>(
    tiles: &ChunkTiles,
    config: &ScanConfig,
    scan: Scan,
    layout: StateLayout,
) -> Unit {
    let unit =
        Unit::new::<ChunkBwdStateParams<T>>("gated_delta", "chunk_bwd_state", SOURCE_STATE, config.threads());
    config
        .with_config(tiles.with_tiles(unit), tiles, scan)
        .with("ENDS", scan == Scan::Ends)
        .with("VALUE_MAJOR", layout == StateLayout::ValueMajor)
}

fn output_unit<T: Element>(tiles: &ChunkTiles, config: &OutputConfig, forms: &Forms) -> Unit {
    let unit = Unit::new::<ChunkBwdOutputParams<T>>(
        "gated_delta",
        "chunk_bwd_output",
        SOURCE_OUTPUT,
        OutputConfig::THREADS,
    );
    chunk_tiles::with_forms(config.with_config(tiles.with_tiles(unit), tiles), forms)
}

/// Twin of `fla::gated_delta::ChunkBwdStateParams`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct ChunkBwdStateParams<T> {
    q: Ptr<T>,
    k: Ptr<T>,
    d_o: Ptr<T>,
    inverse: Ptr<u8>,
    scores: Ptr<u8>,
    factors: Ptr<f32>,
    segments: Ptr<i64>,
    d_final_state: Ptr<f32>,
    d_initial_state: PtrMut<f32>,
    d_states: PtrMut<u8>,
    dx: PtrMut<u8>,
    maps: Ptr<f32>,
    kept: Ptr<i32>,
    d_maps: PtrMut<f32>,
    ends: PtrMut<f32>,
    h: i32,
    hv: i32,
}

// SAFETY: `#[repr(C)]`, and the fields are listed in order.
unsafe impl<T: Element> Params for ChunkBwdStateParams<T> {
    const CUDA_TYPE: &'static str = "fla::gated_delta::ChunkBwdStateParams<Cfg::Element, Cfg::Work>";
    const FIELDS: &'static [Field] = &[
        Field::new("q", "const Cfg::Element*", offset_of!(Self, q)),
        Field::new("k", "const Cfg::Element*", offset_of!(Self, k)),
        Field::new("d_o", "const Cfg::Element*", offset_of!(Self, d_o)),
        Field::new("inverse", "const Cfg::Work*", offset_of!(Self, inverse)),
        Field::new("scores", "const Cfg::Work*", offset_of!(Self, scores)),
        Field::new("factors", "const float*", offset_of!(Self, factors)),
        Field::new("segments", "const fla::i64*", offset_of!(Self, segments)),
        Field::new("d_final_state", "const float*", offset_of!(Self, d_final_state)),
        Field::new("d_initial_state", "float*", offset_of!(Self, d_initial_state)),
        Field::new("d_states", "Cfg::Work*", offset_of!(Self, d_states)),
        Field::new("dx", "Cfg::Work*", offset_of!(Self, dx)),
        Field::new("maps", "const float*", offset_of!(Self, maps)),
        Field::new("kept", "const fla::i32*", offset_of!(Self, kept)),
        Field::new("d_maps", "float*", offset_of!(Self, d_maps)),
        Field::new("ends", "float*", offset_of!(Self, ends)),
        Field::new("h", "fla::i32", offset_of!(Self, h)),
        Field::new("hv", "fla::i32", offset_of!(Self, hv)),
    ];
}

/// Twin of `fla::gated_delta::ChunkBwdOutputParams`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct ChunkBwdOutputParams<T> {
    q: Ptr<T>,
    k: Ptr<T>,
    v: Ptr<T>,
    beta: Ptr<T>,
    d_o: Ptr<T>,
    states: Ptr<u8>,
    written: Ptr<u8>,
    d_states: Ptr<u8>,
    dx: Ptr<u8>,
    factors: Ptr<f32>,
    chunks: Ptr<i64>,
    dq: PtrMut<T>,
    dk: PtrMut<T>,
    dv: PtrMut<T>,
    dg: PtrMut<f32>,
    dbeta: PtrMut<T>,
    items: i64,
    h: i32,
    hv: i32,
    scale: f32,
}

// SAFETY: `#[repr(C)]`, and the fields are listed in order.
unsafe impl<T: Element> Params for ChunkBwdOutputParams<T> {
    const CUDA_TYPE: &'static str = "fla::gated_delta::ChunkBwdOutputParams<Cfg::Element, Cfg::Work>";
    const FIELDS: &'static [Field] = &[
        Field::new("q", "const Cfg::Element*", offset_of!(Self, q)),
        Field::new("k", "const Cfg::Element*", offset_of!(Self, k)),
        Field::new("v", "const Cfg::Element*", offset_of!(Self, v)),
        Field::new("beta", "const Cfg::Element*", offset_of!(Self, beta)),
        Field::new("d_o", "const Cfg::Element*", offset_of!(Self, d_o)),
        Field::new("states", "const Cfg::Work*", offset_of!(Self, states)),
        Field::new("written", "const Cfg::Work*", offset_of!(Self, written)),
        Field::new("d_states", "const Cfg::Work*", offset_of!(Self, d_states)),
        Field::new("dx", "const Cfg::Work*", offset_of!(Self, dx)),
        Field::new("factors", "const float*", offset_of!(Self, factors)),
        Field::new("chunks", "const fla::i64*", offset_of!(Self, chunks)),
        Field::new("dq", "Cfg::Element*", offset_of!(Self, dq)),
        Field::new("dk", "Cfg::Element*", offset_of!(Self, dk)),
        Field::new("dv", "Cfg::Element*", offset_of!(Self, dv)),
        Field::new("dg", "float*", offset_of!(Self, dg)),
        Field::new("dbeta", "Cfg::Element*", offset_of!(Self, dbeta)),
        Field::new("items", "fla::i64", offset_of!(Self, items)),
        Field::new("h", "fla::i32", offset_of!(Self, h)),
        Field::new("hv", "fla::i32", offset_of!(Self, hv)),
        Field::new("scale", "float", offset_of!(Self, scale)),
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
