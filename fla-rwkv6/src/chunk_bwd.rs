//! The chunk backward pass: gradients chunk by chunk, from the states at the starts of chunks.

use std::mem::offset_of;
use std::sync::Arc;

use fla_core::cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut};
use fla_core::{
    Arch, ChunkCut, Device, Element, Error, Field, Grid, Kernel, Params, Ptr, PtrMut, RawSlice, SavedStates,
    Shape, Source, Unit, Workspace, check_align, check_len,
};
use half::{bf16, f16};

use crate::chunk_fwd::{
    ChunkFwd, ChunkFwdInputs, ChunkFwdOptions, HEADERS, HEADS, LocalStates, OUTPUT_THREADS, PARTS,
    check_shape, grid_of_elements, segments_of, states_len, u_len, variant, with_registers,
};
use crate::config::{self, CHUNK, ChunkBwdConfig, ChunkVariant, Segments};

const SOURCE: Source =
    Source { name: "fla/rwkv6/chunk_bwd.cu", text: include_str!("../kernels/chunk_bwd.cu") };
const SOURCE_OUTPUT: Source =
    Source { name: "fla/rwkv6/chunk_bwd_output.cu", text: include_str!("../kernels/chunk_bwd_output.cu") };

/// Gradients over K, which are added up over the slices of V: of r, k and w.
const K_GRADS: usize = 3;

/// What the pass reads. Contiguous, each at a multiple of 16 bytes.
#[derive(Clone, Copy)]
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub struct ChunkBwdInputs<'a, T> {
    /// Receptance, the query: `[B, T, H, K]`.
    pub r: &'a dyn DevicePtr<T>,
    /// Keys: `[B, T, H, K]`.
    pub k: &'a dyn DevicePtr<T>,
    /// Values: `[B, T, H, V]`.
    pub v: &'a dyn DevicePtr<T>,
    /// Log decay, natural base, at most 0: `[B, T, H, K]`.
    pub w: &'a dyn DevicePtr<T>,
    /// Bonus of the current token: `[H, K]`.
    pub u: &'a dyn DevicePtr<T>,
    /// State that the forward pass has started from, or zero when absent: `[N, H, K, V]`. Read only where states are
    /// recomputed; the ones that were kept begin with it.
    pub initial_state: Option<&'a dyn DevicePtr<f32>>,
    /// What [`ChunkFwd`] wrote as `states` for the same inputs, with [`SavedStates::Kept`]; absent otherwise.
    pub states: Option<&'a dyn DevicePtr<u16>>,
    /// Gradient of the outputs: `[B, T, H, V]`.
    pub d_o: &'a dyn DevicePtr<T>,
    /// Gradient of the final state, or zero when absent: `[N, H, K, V]`.
    pub d_final_state: Option<&'a dyn DevicePtr<f32>>,
}

/// What the pass writes, whole.
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub struct ChunkBwdOutputs<'a, T> {
    /// Gradient of `r`: `[B, T, H, K]`.
    pub dr: &'a mut dyn DevicePtrMut<T>,
    /// Gradient of `k`: `[B, T, H, K]`.
    pub dk: &'a mut dyn DevicePtrMut<T>,
    /// Gradient of `v`: `[B, T, H, V]`.
    pub dv: &'a mut dyn DevicePtrMut<T>,
    /// Gradient of `w`, the log decay: `[B, T, H, K]`.
    pub dw: &'a mut dyn DevicePtrMut<T>,
    /// Gradient of `u`, over all tokens of all sequences: `[H, K]`.
    pub du: &'a mut dyn DevicePtrMut<f32>,
    /// Gradient of the initial state, when wanted; that at zero when there was none: `[N, H, K, V]`.
    pub d_initial_state: Option<&'a mut dyn DevicePtrMut<f32>>,
}

/// What the one-call form returns.
#[derive(Debug)]
pub struct ChunkBwdResult<T> {
    /// Gradient of `r`: `[B, T, H, K]`.
    pub dr: CudaSlice<T>,
    /// Gradient of `k`: `[B, T, H, K]`.
    pub dk: CudaSlice<T>,
    /// Gradient of `v`: `[B, T, H, V]`.
    pub dv: CudaSlice<T>,
    /// Gradient of `w`, the log decay: `[B, T, H, K]`.
    pub dw: CudaSlice<T>,
    /// Gradient of `u`: `[H, K]`.
    pub du: CudaSlice<f32>,
    /// Gradient of the initial state: `[N, H, K, V]`.
    pub d_initial_state: CudaSlice<f32>,
}

/// Gradients of [`ChunkFwd`], made once for a shape and run many times.
///
/// With dS the gradient of the state after a chunk and the names of [`ChunkFwd`], last chunk first:
///
/// ```text
/// dA = scale tril(do v^T)            X = S do^T            Y = dS v^T
/// dv = A^T do + (k E) dS
/// dr_i = scale E_i X_i + sum_{j < i} dA_ij k_j E(i, j) + dA_ii u k_i
/// dk_j = E_j Y_j + sum_{i > j} dA_ij r_i E(i, j) + dA_jj u r_j
/// dw_t = scale sum_{i > t} (r E X)_i + sum_{j < t} (k E Y)_j + E sum_v S dS + what pairs with j < t < i are
/// du = sum_t dA_tt r_t k_t
/// dS <- diag(E) dS + scale (r E)^T do
/// ```
///
/// | tensor                           | shape          | dtype | meaning                                   |
/// |----------------------------------|----------------|-------|-------------------------------------------|
/// | `r`, `k`                         | `[B, T, H, K]` | `T`   | receptance (the query), keys              |
/// | `v`, `d_o`                       | `[B, T, H, V]` | `T`   | values, gradient of the outputs           |
/// | `w`                              | `[B, T, H, K]` | `T`   | log decay, natural base, at most 0        |
/// | `u`                              | `[H, K]`       | `T`   | bonus                                     |
/// | `initial_state`, `d_final_state` | `[N, H, K, V]` | f32   | optional; zero when absent                |
/// | `states`                         | `states_len()` | u16   | what the forward pass kept                |
/// | `dr`, `dk`, `dw` (out)           | `[B, T, H, K]` | `T`   | gradients                                 |
/// | `dv` (out)                       | `[B, T, H, V]` | `T`   | gradient of the values                    |
/// | `du` (out)                       | `[H, K]`       | f32   | gradient of the bonus, over all sequences |
/// | `d_initial_state` (out)          | `[N, H, K, V]` | f32   | optional                                  |
///
/// `du` is f32 whatever the vectors are: it is the sum of as many terms as there are tokens, on its way to a parameter.
/// `T`, K and V are as in the forward pass. Lengths have to be known to the host.
///
/// The states at the starts of chunks are what the forward pass kept, [`SavedStates::Kept`], or the pass first computes
/// them again from `initial_state` into its workspace, [`SavedStates::Recomputed`]; the gradients are the same bits.
///
/// # Numerics
///
/// As in the forward pass. The error against the float64 recurrence stays under the rows `rwkv6, chunk_bwd` of
/// `fla_reference::tolerance`. `dw` is summed up from the decays that a factor is made of, and no difference of larger sums:
/// under any decay it is as exact as the others. Sums are taken in a fixed order: the same inputs give the same bits on the
/// same GPU.
///
/// # Source
///
/// Peng et al., "Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence", arXiv:2404.05892; the gradients
/// are its transpose, chunk by chunk.
#[derive(Debug)]
pub struct ChunkBwd<T> {
    /// In their order: what segments do to the gradient of a state, where sequences are cut into several, and the gradients.
    /// Empty when there is no state.
    launches: Vec<(Kernel<ChunkBwdParams<T>>, Grid)>,
    /// Adds up what sequences, segments and slices of V and K leave.
    output: Kernel<ChunkBwdOutputParams<T>>,
    /// Computes states once more; none when they are kept.
    recompute: Option<ChunkFwd<T>>,
    shape: Shape,
    cut: ChunkCut,
    segments: Segments,
    local: LocalStates,
    states_len: usize,
    /// Blocks that share V where gradients are, and those that share K.
    slices_v: usize,
    slices_k: usize,
    scale: f32,
}

const fn is_shareable<T: Send + Sync>() {}
// A plan may be made on one thread and run on others.
const _: () = is_shareable::<ChunkBwd<bf16>>();

impl<T: Element> ChunkBwd<T> {
    /// Checks the shape, compiles or loads the kernels, and uploads the offsets of packed sequences.
    ///
    /// `options` are those of the forward pass.
    ///
    /// # Errors
    ///
    /// As [`ChunkFwd::new`].
    pub fn new(device: &Device, shape: &Shape, options: &ChunkFwdOptions) -> Result<Self, Error> {
        check_shape(shape)?;
        let scale = options.checked_scale()?;
        let variant = variant::<T>(device.arch(), shape);
        let smem_bytes = device.smem_bytes() as usize;
        let config = variant.bwd(smem_bytes);
        let block_smem_bytes = variant.bwd_smem_bytes(&config);
        device.check_smem(shape, block_smem_bytes)?;
        let cut = ChunkCut::new(device, &shape.seqs, CHUNK)?;
        let slots = config::slots(device.sm_count(), config.min_blocks, smem_bytes, block_smem_bytes);
        let slices_k = variant.slices_k();
        let segments = segments_of(&cut, shape, shape.v.div_ceil(config.bv) * slices_k, slots);
        tracing::debug!(?variant, ?config, ?segments, "rwkv6 chunk_bwd");
        let (mut launches, mut slices_v) = (Vec::new(), 1);
        for launch in (!segments.is_whole()).then_some(Launch::Segments).into_iter().chain([Launch::Main]) {
            let kernel = |config: &ChunkBwdConfig| device.kernel(&unit::<T>(&variant, config, launch));
            let (kernel, config) = with_registers(&config, kernel)?;
            slices_v = shape.v.div_ceil(config.bv);
            let grid = Grid::of_heads(shape, (slices_v * slices_k).saturating_mul(segments.count))?;
            launches.extend(grid.map(|grid| (kernel, grid)));
        }
        let recompute = match options.saved_states {
            SavedStates::Recomputed => Some(ChunkFwd::of_states(device, shape, options)?),
            SavedStates::Kept => None,
        };
        Ok(Self {
            launches,
            output: device.kernel(&unit_output::<T>(slices_v, slices_k))?,
            recompute,
            local: LocalStates::new(shape, &variant, &segments),
            states_len: states_len(&cut, shape, &variant),
            shape: shape.clone(),
            cut,
            segments,
            slices_v,
            slices_k,
            scale,
        })
    }

    /// Elements of the input `states`.
    #[must_use]
    pub fn states_len(&self) -> usize {
        self.states_len
    }

    /// Bytes of the workspace that a run needs: the states where they are recomputed, what segments do to a state where
    /// sequences are cut into several, and sums over sequences, segments and slices of V and K. Never 0, which drivers refuse
    /// to allocate.
    #[must_use]
    pub fn workspace_bytes(&self) -> usize {
        let f32_bytes = |len: usize| len.saturating_mul(size_of::<f32>());
        let [local_states, local_decays] = self.local.bytes();
        Workspace::bytes(&[
            self.forward_bytes(),
            self.recomputed_len().saturating_mul(size_of::<u16>()),
            local_states,
            local_decays,
            f32_bytes(self.du_parts_len()),
            f32_bytes(self.partial_len()),
            f32_bytes(self.dv_parts_len()),
        ])
        .max(256)
    }

    /// Bytes of the workspace of the forward pass that computes states once more.
    fn forward_bytes(&self) -> usize {
        self.recompute.as_ref().map_or(0, ChunkFwd::workspace_bytes)
    }

    fn recomputed_len(&self) -> usize {
        if self.recompute.is_some() { self.states_len } else { 0 }
    }

    /// Gradients of the bonus, one for each slice of V, sequence and segment.
    fn du_parts(&self) -> usize {
        self.shape.seqs.n().saturating_mul(self.slices_v).saturating_mul(self.segments.count)
    }

    fn du_parts_len(&self) -> usize {
        self.du_parts().saturating_mul(u_len(&self.shape))
    }

    fn partial_len(&self) -> usize {
        if self.slices_v == 1 {
            return 0;
        }
        self.shape.k_len().saturating_mul(K_GRADS).saturating_mul(self.slices_v)
    }

    fn dv_parts_len(&self) -> usize {
        if self.slices_k == 1 { 0 } else { self.shape.v_len().saturating_mul(self.slices_k) }
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
        self.check_lens(x, dx)?;
        let workspace = Workspace::new(stream, workspace, self.workspace_bytes())?;
        let mut of_forward = workspace.take::<u8>(self.forward_bytes())?;
        let mut recomputed = workspace.take::<u16>(self.recomputed_len())?;
        let mut parts = Parts {
            local_states: workspace.take(self.local.states_len)?,
            local_decays: workspace.take(self.local.decays_len)?,
            du_parts: workspace.take(self.du_parts_len())?,
            partial: workspace.take(self.partial_len())?,
            dv_parts: workspace.take(self.dv_parts_len())?,
        };
        // Later launches bind these, when the first has been queued.
        check_aligned(stream, x, dx)?;
        if let Some(forward) = &self.recompute {
            forward.run_states(stream, &forward_inputs(x), &mut recomputed, &mut of_forward)?;
        }
        let x = ChunkBwdInputs { states: Some(x.states.unwrap_or(&recomputed)), ..*x };
        for (kernel, grid) in &self.launches {
            self.launch(stream, (kernel, *grid), (&x, dx), &mut parts)?;
        }
        self.launch_output(stream, dx, &parts)
    }

    fn launch(
        &self,
        stream: &CudaStream,
        (kernel, grid): (&Kernel<ChunkBwdParams<T>>, Grid),
        (x, dx): (&ChunkBwdInputs<'_, T>, &mut ChunkBwdOutputs<'_, T>),
        parts: &mut Parts<'_>,
    ) -> Result<(), Error> {
        kernel.launch(stream, grid, |bind| ChunkBwdParams {
            r: bind.read("r", x.r),
            k: bind.read("k", x.k),
            v: bind.read("v", x.v),
            w: bind.read("w", x.w),
            u: bind.read("u", x.u),
            states: bind.read_opt("states", x.states),
            d_o: bind.read("d_o", x.d_o),
            d_final_state: bind.read_opt("d_final_state", x.d_final_state),
            cu_seqlens: bind.read_opt("cu_seqlens", self.cut.cu_seqlens.as_ref()),
            chunk_offsets: bind.read_opt("chunk_offsets", self.cut.chunk_offsets.as_ref()),
            dr: bind.write("dr", &mut *dx.dr),
            dk: bind.write("dk", &mut *dx.dk),
            dv: bind.write("dv", &mut *dx.dv),
            dw: bind.write("dw", &mut *dx.dw),
            du_parts: bind.write("workspace", &mut parts.du_parts),
            d_initial_state: bind.write_opt("d_initial_state", dx.d_initial_state.as_deref_mut()),
            partial: bind.write("workspace", &mut parts.partial),
            local_states: bind.write("workspace", &mut parts.local_states),
            local_decays: bind.write("workspace", &mut parts.local_decays),
            dv_parts: bind.write("workspace", &mut parts.dv_parts),
            n: self.shape.seqs.n() as i64,
            t: self.shape.seqs.t() as i64,
            partial_len: self.shape.k_len() as i64,
            dv_len: self.shape.v_len() as i64,
            // `new` has checked that these fit.
            h: self.shape.h as i32,
            segment_chunks: self.segments.chunks as i32,
            max_segments: self.segments.count as i32,
            scale: self.scale,
        })
    }

    fn launch_output(
        &self,
        stream: &CudaStream,
        dx: &mut ChunkBwdOutputs<'_, T>,
        parts: &Parts<'_>,
    ) -> Result<(), Error> {
        let (hk, len, dv_len) = (u_len(&self.shape), self.shape.k_len(), self.shape.v_len());
        let over_v = if self.slices_v > 1 { len } else { 0 };
        let over_k = if self.slices_k > 1 { dv_len } else { 0 };
        let Some(grid) = grid_of_elements(hk.max(over_v).max(over_k)) else { return Ok(()) };
        self.output.launch(stream, grid, |bind| ChunkBwdOutputParams {
            du_parts: bind.read("workspace", &parts.du_parts),
            partial: bind.read("workspace", &parts.partial),
            dv_parts: bind.read("workspace", &parts.dv_parts),
            du: bind.write("du", &mut *dx.du),
            dr: bind.write("dr", &mut *dx.dr),
            dk: bind.write("dk", &mut *dx.dk),
            dv: bind.write("dv", &mut *dx.dv),
            dw: bind.write("dw", &mut *dx.dw),
            parts: self.du_parts() as i64,
            hk: hk as i64,
            len: len as i64,
            dv_len: dv_len as i64,
        })
    }

    fn check_lens(&self, x: &ChunkBwdInputs<'_, T>, dx: &ChunkBwdOutputs<'_, T>) -> Result<(), Error> {
        let (k_len, v_len, state_len) = (self.shape.k_len(), self.shape.v_len(), self.shape.state_len());
        for (name, len) in [
            ("r", x.r.len()),
            ("k", x.k.len()),
            ("w", x.w.len()),
            ("dr", dx.dr.len()),
            ("dk", dx.dk.len()),
            ("dw", dx.dw.len()),
        ] {
            check_len(name, "[B, T, H, K]", k_len, len)?;
        }
        for (name, len) in [("v", x.v.len()), ("d_o", x.d_o.len()), ("dv", dx.dv.len())] {
            check_len(name, "[B, T, H, V]", v_len, len)?;
        }
        for (name, len) in [("u", x.u.len()), ("du", dx.du.len())] {
            check_len(name, "[H, K]", u_len(&self.shape), len)?;
        }
        for (name, len) in [
            ("initial_state", x.initial_state.map(|s| s.len())),
            ("d_final_state", x.d_final_state.map(|s| s.len())),
            ("d_initial_state", dx.d_initial_state.as_ref().map(|s| s.len())),
        ] {
            check_len(name, "[N, H, K, V]", state_len, len.unwrap_or(state_len))?;
        }
        let presence = |wanted| Err(Error::Presence { tensor: "states", wanted });
        match (x.states, &self.recompute) {
            (Some(states), None) => {
                check_len("states", "states_len() of the plan", self.states_len, states.len())
            }
            (None, Some(_)) => Ok(()),
            (None, None) => presence("must be given, since the plan is for states that are kept"),
            (Some(_), Some(_)) => presence("must be absent, since the plan recomputes states"),
        }
    }
}

/// Parts of the workspace that the kernels of this pass share.
struct Parts<'a> {
    local_states: RawSlice<'a, f32>,
    local_decays: RawSlice<'a, f32>,
    du_parts: RawSlice<'a, f32>,
    partial: RawSlice<'a, f32>,
    dv_parts: RawSlice<'a, f32>,
}

fn forward_inputs<'a, T>(x: &ChunkBwdInputs<'a, T>) -> ChunkFwdInputs<'a, T> {
    let ChunkBwdInputs { r, k, v, w, u, initial_state, .. } = *x;
    ChunkFwdInputs { r, k, v, w, u, initial_state }
}

/// Refuses a tensor that a launch would refuse.
fn check_aligned<T>(
    stream: &CudaStream,
    x: &ChunkBwdInputs<'_, T>,
    dx: &mut ChunkBwdOutputs<'_, T>,
) -> Result<(), Error> {
    check_align("d_o", x.d_o.device_ptr(stream).0)?;
    if let Some(states) = x.states {
        check_align("states", states.device_ptr(stream).0)?;
    }
    if let Some(state) = x.d_final_state {
        check_align("d_final_state", state.device_ptr(stream).0)?;
    }
    for (name, tensor) in [("dr", &mut *dx.dr), ("dk", &mut *dx.dk), ("dv", &mut *dx.dv), ("dw", &mut *dx.dw)]
    {
        check_align(name, tensor.device_ptr_mut(stream).0)?;
    }
    check_align("du", dx.du.device_ptr_mut(stream).0)?;
    match &mut dx.d_initial_state {
        Some(state) => check_align("d_initial_state", state.device_ptr_mut(stream).0),
        None => Ok(()),
    }
}

/// Makes the plan, allocates gradients and workspace and runs, on the stream of `r`.
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
    let stream: Arc<CudaStream> = x.r.stream().clone();
    let over_k = || device.alloc::<T>(&stream, shape.k_len());
    let mut dx = ChunkBwdResult {
        dr: over_k()?,
        dk: over_k()?,
        dv: device.alloc(&stream, shape.v_len())?,
        dw: over_k()?,
        du: device.alloc(&stream, u_len(shape))?,
        d_initial_state: device.alloc(&stream, shape.state_len())?,
    };
    let mut workspace = device.alloc::<u8>(&stream, plan.workspace_bytes())?;
    let mut outputs = ChunkBwdOutputs {
        dr: &mut dx.dr,
        dk: &mut dx.dk,
        dv: &mut dx.dv,
        dw: &mut dx.dw,
        du: &mut dx.du,
        d_initial_state: Some(&mut dx.d_initial_state),
    };
    plan.run(&stream, x, &mut outputs, &mut workspace)?;
    Ok(dx)
}

/// What a launch of the kernel is for: the gradients, or what segments do to that of a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Launch {
    Main,
    Segments,
}

pub(crate) fn units(arch: Arch) -> Vec<Unit> {
    let smem_bytes = arch.smem_bytes();
    let (mut out, mut outputs) = (Vec::new(), Vec::<Unit>::new());
    for (i, head) in HEADS.into_iter().enumerate() {
        out.extend(all_units::<bf16>(arch, head, smem_bytes));
        let mut of_head = vec![output_of::<bf16>(arch, head)];
        if i < 3 {
            let [main, _] = all_units::<f32>(arch, head, smem_bytes);
            out.push(main);
            let [main, _] = all_units::<f16>(arch, head, smem_bytes);
            out.push(main);
            of_head.extend([output_of::<f32>(arch, head), output_of::<f16>(arch, head)]);
        }
        // Heads with as many slices share these.
        for unit in of_head {
            if outputs.iter().all(|other| other.constants() != unit.constants()) {
                outputs.push(unit);
            }
        }
    }
    out.extend(outputs);
    out
}

fn output_of<T: Element>(arch: Arch, (k, v): (usize, usize)) -> Unit {
    let variant = ChunkVariant { arch, dtype: T::DTYPE, k, v };
    unit_output::<T>(v.div_ceil(variant.bwd(arch.smem_bytes()).bv), variant.slices_k())
}

/// The kernels for heads of K by V in this type.
pub(crate) fn all_units<T: Element>(arch: Arch, (k, v): (usize, usize), smem_bytes: usize) -> [Unit; 2] {
    let variant = ChunkVariant { arch, dtype: T::DTYPE, k, v };
    let config = variant.bwd(smem_bytes);
    [Launch::Main, Launch::Segments].map(|launch| unit::<T>(&variant, &config, launch))
}

fn unit<T: Element>(variant: &ChunkVariant, config: &ChunkBwdConfig, launch: Launch) -> Unit {
    let threads = 2 * variant.bk() as u32;
    // All of these are below 2^31: `new` has checked K and V.
    Unit::new::<ChunkBwdParams<T>>("rwkv6", "chunk_bwd", SOURCE, threads)
        .with_smem_bytes(variant.bwd_smem_bytes(config) as u32)
        .with_headers(HEADERS)
        .with_min_blocks(config.min_blocks)
        .with("Element", T::DTYPE)
        .with("K", variant.k as i32)
        .with("V", variant.v as i32)
        .with("BK", variant.bk() as i32)
        .with("BV", config.bv as i32)
        .with("STAGES", config.stages as i32)
        .with("LOCAL", launch == Launch::Segments)
}

fn unit_output<T: Element>(slices_v: usize, slices_k: usize) -> Unit {
    Unit::new::<ChunkBwdOutputParams<T>>("rwkv6", "chunk_bwd_output", SOURCE_OUTPUT, OUTPUT_THREADS as u32)
        .with_headers(PARTS)
        .with("Element", T::DTYPE)
        .with("SLICES_V", slices_v as i32)
        .with("SLICES_K", slices_k as i32)
        .with("THREADS", OUTPUT_THREADS as i32)
}

/// Twin of `fla::rwkv6::ChunkBwdParams`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct ChunkBwdParams<T> {
    r: Ptr<T>,
    k: Ptr<T>,
    v: Ptr<T>,
    w: Ptr<T>,
    u: Ptr<T>,
    states: Ptr<u16>,
    d_o: Ptr<T>,
    d_final_state: Ptr<f32>,
    cu_seqlens: Ptr<i64>,
    chunk_offsets: Ptr<i64>,
    dr: PtrMut<T>,
    dk: PtrMut<T>,
    dv: PtrMut<T>,
    dw: PtrMut<T>,
    du_parts: PtrMut<f32>,
    d_initial_state: PtrMut<f32>,
    partial: PtrMut<f32>,
    local_states: PtrMut<f32>,
    local_decays: PtrMut<f32>,
    dv_parts: PtrMut<f32>,
    n: i64,
    t: i64,
    partial_len: i64,
    dv_len: i64,
    h: i32,
    segment_chunks: i32,
    max_segments: i32,
    scale: f32,
}

// SAFETY: `#[repr(C)]`, and the fields are listed in order.
unsafe impl<T: Element> Params for ChunkBwdParams<T> {
    const CUDA_TYPE: &'static str = "fla::rwkv6::ChunkBwdParams<Cfg::Element>";
    const FIELDS: &'static [Field] = &[
        Field::new("r", "const Cfg::Element*", offset_of!(Self, r)),
        Field::new("k", "const Cfg::Element*", offset_of!(Self, k)),
        Field::new("v", "const Cfg::Element*", offset_of!(Self, v)),
        Field::new("w", "const Cfg::Element*", offset_of!(Self, w)),
        Field::new("u", "const Cfg::Element*", offset_of!(Self, u)),
        Field::new("states", "const fla::u16*", offset_of!(Self, states)),
        Field::new("d_o", "const Cfg::Element*", offset_of!(Self, d_o)),
        Field::new("d_final_state", "const float*", offset_of!(Self, d_final_state)),
        Field::new("cu_seqlens", "const fla::i64*", offset_of!(Self, cu_seqlens)),
        Field::new("chunk_offsets", "const fla::i64*", offset_of!(Self, chunk_offsets)),
        Field::new("dr", "Cfg::Element*", offset_of!(Self, dr)),
        Field::new("dk", "Cfg::Element*", offset_of!(Self, dk)),
        Field::new("dv", "Cfg::Element*", offset_of!(Self, dv)),
        Field::new("dw", "Cfg::Element*", offset_of!(Self, dw)),
        Field::new("du_parts", "float*", offset_of!(Self, du_parts)),
        Field::new("d_initial_state", "float*", offset_of!(Self, d_initial_state)),
        Field::new("partial", "float*", offset_of!(Self, partial)),
        Field::new("local_states", "float*", offset_of!(Self, local_states)),
        Field::new("local_decays", "float*", offset_of!(Self, local_decays)),
        Field::new("dv_parts", "float*", offset_of!(Self, dv_parts)),
        Field::new("n", "fla::i64", offset_of!(Self, n)),
        Field::new("t", "fla::i64", offset_of!(Self, t)),
        Field::new("partial_len", "fla::i64", offset_of!(Self, partial_len)),
        Field::new("dv_len", "fla::i64", offset_of!(Self, dv_len)),
        Field::new("h", "fla::i32", offset_of!(Self, h)),
        Field::new("segment_chunks", "fla::i32", offset_of!(Self, segment_chunks)),
        Field::new("max_segments", "fla::i32", offset_of!(Self, max_segments)),
        Field::new("scale", "float", offset_of!(Self, scale)),
    ];
}

/// Twin of `fla::rwkv6::ChunkBwdOutputParams`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct ChunkBwdOutputParams<T> {
    du_parts: Ptr<f32>,
    partial: Ptr<f32>,
    dv_parts: Ptr<f32>,
    du: PtrMut<f32>,
    dr: PtrMut<T>,
    dk: PtrMut<T>,
    dv: PtrMut<T>,
    dw: PtrMut<T>,
    parts: i64,
    hk: i64,
    len: i64,
    dv_len: i64,
}

// SAFETY: `#[repr(C)]`, and the fields are listed in order.
unsafe impl<T: Element> Params for ChunkBwdOutputParams<T> {
    const CUDA_TYPE: &'static str = "fla::rwkv6::ChunkBwdOutputParams<Cfg::Element>";
    const FIELDS: &'static [Field] = &[
        Field::new("du_parts", "const float*", offset_of!(Self, du_parts)),
        Field::new("partial", "const float*", offset_of!(Self, partial)),
        Field::new("dv_parts", "const float*", offset_of!(Self, dv_parts)),
        Field::new("du", "float*", offset_of!(Self, du)),
        Field::new("dr", "Cfg::Element*", offset_of!(Self, dr)),
        Field::new("dk", "Cfg::Element*", offset_of!(Self, dk)),
        Field::new("dv", "Cfg::Element*", offset_of!(Self, dv)),
        Field::new("dw", "Cfg::Element*", offset_of!(Self, dw)),
        Field::new("parts", "fla::i64", offset_of!(Self, parts)),
        Field::new("hk", "fla::i64", offset_of!(Self, hk)),
        Field::new("len", "fla::i64", offset_of!(Self, len)),
        Field::new("dv_len", "fla::i64", offset_of!(Self, dv_len)),
    ];
}
