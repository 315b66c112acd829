//! The chunk backward pass: gradients chunk by chunk, from the states at the starts of chunks.

use std::mem::offset_of;
use std::sync::Arc;

use fla_core::cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut};
use fla_core::{
    Arch, Binder, ChunkCut, Device, Element, Error, Field, Grid, HeadShares, Kernel, Params, Ptr, PtrMut,
    SavedStates, SeqLens, Shape, Source, Unit, Workspace, check_align, check_len,
};
use half::{bf16, f16};

use crate::chunk_fwd::{
    ChunkFwd, ChunkFwdInputs, ChunkFwdOptions, MAX_K, MAX_V, SPILL_LIMIT, is_plain, kernel_that_fits,
    of_share, states_len, variant, variants, with_constants,
};
use crate::config::{CHUNK, ChunkConfig, ChunkVariant, Room};
use crate::segments::{Ends, Fold, Maps, Segments};

const SOURCE: Source =
    Source { name: "fla/dplr/chunk_bwd.cu", text: include_str!("../kernels/chunk_bwd.cu") };
const SOURCE_OUTPUT: Source =
    Source { name: "fla/dplr/chunk_bwd_output.cu", text: include_str!("../kernels/chunk_bwd_output.cu") };

/// Gradients over K, which are added up over the slices of V: of q, k, a, b and g.
const K_GRADS: usize = 5;

/// Elements of what is kept of chunks from which heads go in shares, one after the other: below 64 MiB memory is no matter, and
/// a share is two launches more.
const LARGE_STATES: usize = 32 << 20;

/// Threads of the kernel that adds them up; each has one element.
const OUTPUT_THREADS: usize = 256;

/// What the pass reads. Contiguous, each at a multiple of 16 bytes.
#[derive(Clone, Copy)]
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub struct ChunkBwdInputs<'a, T> {
    /// Queries: `[B, T, H, K]`.
    pub q: &'a dyn DevicePtr<T>,
    /// Keys: `[B, T, H, K]`.
    pub k: &'a dyn DevicePtr<T>,
    /// Values: `[B, T, H, V]`.
    pub v: &'a dyn DevicePtr<T>,
    /// What is read from the state before the decay, or a key; see [`Transition`](crate::Transition): `[B, T, H, K]`.
    pub a: &'a dyn DevicePtr<T>,
    /// Where it is written back, or the rate of the key: `[B, T, H, K]`.
    pub b: &'a dyn DevicePtr<T>,
    /// Log decay, natural base, at most 0, or a logit; see [`Decay`](crate::Decay): `[B, T, H, K]`.
    pub g: &'a dyn DevicePtr<T>,
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
    /// Gradient of `q`: `[B, T, H, K]`.
    pub dq: &'a mut dyn DevicePtrMut<T>,
    /// Gradient of `k`: `[B, T, H, K]`.
    pub dk: &'a mut dyn DevicePtrMut<T>,
    /// Gradient of `v`: `[B, T, H, V]`.
    pub dv: &'a mut dyn DevicePtrMut<T>,
    /// Gradient of `a`: `[B, T, H, K]`.
    pub da: &'a mut dyn DevicePtrMut<T>,
    /// Gradient of `b`: `[B, T, H, K]`.
    pub db: &'a mut dyn DevicePtrMut<T>,
    /// Gradient of `g`: `[B, T, H, K]`.
    pub dg: &'a mut dyn DevicePtrMut<T>,
    /// Gradient of the initial state, when wanted; that at zero when there was none: `[N, H, K, V]`.
    pub d_initial_state: Option<&'a mut dyn DevicePtrMut<f32>>,
}

/// What the one-call form returns.
#[derive(Debug)]
pub struct ChunkBwdResult<T> {
    /// Gradient of `q`: `[B, T, H, K]`.
    pub dq: CudaSlice<T>,
    /// Gradient of `k`: `[B, T, H, K]`.
    pub dk: CudaSlice<T>,
    /// Gradient of `v`: `[B, T, H, V]`.
    pub dv: CudaSlice<T>,
    /// Gradient of `a`: `[B, T, H, K]`.
    pub da: CudaSlice<T>,
    /// Gradient of `b`: `[B, T, H, K]`.
    pub db: CudaSlice<T>,
    /// Gradient of `g`: `[B, T, H, K]`.
    pub dg: CudaSlice<T>,
    /// Gradient of the initial state: `[N, H, K, V]`.
    pub d_initial_state: CudaSlice<f32>,
}

/// Gradients of [`ChunkFwd`], made once for a shape and run many times.
///
/// With dS the gradient of the state after a chunk, the names of [`ChunkFwd`], and P = (I - A_ab)^-1; last chunk first:
///
/// ```text
/// z = P^T (A_qb^T do + (b e_end / e) dS)        the gradient of u's right side
/// dv = A_qk^T do + (k e_end / e) dS + A_ak^T z
/// dA_qk, dA_qb = scale tril(do {v, u}^T)        dA_ak, dA_ab = stril(z {v, u}^T)
/// dq_i = scale (do_i S^T) e_i + sum_j (dA_qk k_j + dA_qb b_j) e_i / e_j
/// da_i = (z_i S^T) e'_i + sum_j (dA_ak k_j + dA_ab b_j) e'_i / e_j
/// dk_j = (v_j dS^T) e_end / e_j + sum_i dA_qk q_i e_i / e_j + dA_ak a_i e'_i / e_j
/// db_j = (u_j dS^T) e_end / e_j + sum_i dA_qb q_i e_i / e_j + dA_ab a_i e'_i / e_j
/// dg_t = e^{g_t} sum_v S_{t-1} dS_t
/// dS <- diag(e_end) dS + scale (q e)^T do + (a e')^T z
/// ```
///
/// | tensor                             | shape          | dtype | meaning                                        |
/// |------------------------------------|----------------|-------|------------------------------------------------|
/// | `q`, `k`, `a`, `b`                 | `[B, T, H, K]` | `T`   | queries, keys, low-rank transition             |
/// | `v`, `d_o`                         | `[B, T, H, V]` | `T`   | values, gradient of the outputs                |
/// | `g`                                | `[B, T, H, K]` | `T`   | log decay, natural base, at most 0; or a logit |
/// | `initial_state`, `d_final_state`   | `[N, H, K, V]` | f32   | optional; zero when absent                     |
/// | `states`                           | `states_len()` | u16   | what the forward pass kept                     |
/// | `dq`, `dk`, `da`, `db`, `dg` (out) | `[B, T, H, K]` | `T`   | gradients                                      |
/// | `dv` (out)                         | `[B, T, H, V]` | `T`   | gradient of the values                         |
/// | `d_initial_state` (out)            | `[N, H, K, V]` | f32   | optional                                       |
///
/// With [`Transition::KeyAndRate`](crate::Transition::KeyAndRate), `da` and `db` are the gradients of the key and of its
/// rate; with [`Decay::Logit`](crate::Decay::Logit), `dg` is that of the logit. `T`, K and V are as in the forward pass. Lengths have to be known to the host.
///
/// The states at the starts of chunks are what the forward pass kept, [`SavedStates::Kept`], or the pass first computes
/// them again from `initial_state` into its workspace, [`SavedStates::Recomputed`]; the gradients are the same bits.
///
/// Segments of sequences are walked side by side as in the forward pass, for what each adds to the gradient of a state first.
///
/// # Numerics
///
/// As in the forward pass. The error against the float64 recurrence stays under the rows `dplr, chunk_bwd` of
/// `fla_reference::tolerance`; where a decay is strong, its gradient is a small difference of larger terms, and is judged
/// by these. Sums are taken in a fixed order: the same inputs give the same bits.
///
/// # Source
///
/// The DPLR form of the delta rule: Peng et al., "RWKV-7 Goose with Expressive Dynamic State Evolution",
/// arXiv:2503.14456; the gradients are its transpose, chunk by chunk.
#[derive(Debug)]
pub struct ChunkBwd<T> {
    kernel: Kernel<ChunkBwdParams<T>>,
    /// Adds up what the slices of V leave; none when there is one slice.
    output: Option<Kernel<ChunkBwdOutputParams<T>>>,
    /// Computes states once more; none when they are kept.
    recompute: Option<ChunkFwd<T>>,
    of_segments: Option<OfSegments<T>>,
    shape: Shape,
    /// Sequences that are walked: those of the shape, or their segments.
    walked: SeqLens,
    cut: ChunkCut,
    /// Heads of a launch, and the elements of what is kept of their chunks.
    shares: HeadShares,
    states_len: usize,
    slices: usize,
    scale: f32,
    /// None when there is nothing to launch.
    grid: Option<Grid>,
}

/// What a pass over segments does first.
#[derive(Debug)]
struct OfSegments<T> {
    /// What each segment adds to the gradient of a state.
    kernel: Kernel<ChunkBwdParams<T>>,
    grid: Option<Grid>,
    maps: Maps<T>,
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
        shape.check(MAX_K, MAX_V)?;
        let scale = options.checked_scale()?;
        let variant = variant::<T>(device.arch(), shape, options);
        let slices = variant.slices(&variant.bwd(&Room::of_many_heads(device.arch())));
        let segments = Segments::new(&shape.seqs, shape.h.saturating_mul(slices), device.sm_count() as usize);
        let walked = segments.as_ref().map_or(&shape.seqs, |segments| &segments.seqs);
        let of_walk = Shape { seqs: walked.clone(), ..shape.clone() };
        let room = Room::new(device, &of_walk);
        let configs = [variant.bwd(&room), variant.bwd_of_few_warps(&room)];
        device.check_smem(shape, variant.bwd_smem_bytes(&configs[0]))?;
        let (kernel, config) =
            kernel_that_fits(device, configs, |config| unit::<T>(&variant, config, Grads::OfTokens))?;
        let slices = variant.slices(&config);
        tracing::debug!(
            ?variant,
            ?config,
            segments = segments.as_ref().map(|s| s.seqs.n()),
            "dplr chunk_bwd"
        );
        let cut = ChunkCut::new(device, walked, CHUNK)?;
        let blocks = slices * config.k_splits;
        let whole = HeadShares::whole(shape.h);
        let is_large = states_len(&cut, &whole, &variant) > LARGE_STATES;
        let shares = if options.saved_states == SavedStates::Recomputed && is_large && segments.is_none() {
            let resident = kernel.blocks_per_sm()? as usize * device.sm_count() as usize;
            HeadShares::most(shape, blocks, resident)
        } else {
            whole
        };
        let grid = Grid::of_heads(&of_share(&of_walk, &shares), blocks)?;
        let recompute = match options.saved_states {
            SavedStates::Recomputed => Some(ChunkFwd::of_states(device, shape, options, shares)?),
            SavedStates::Kept => None,
        };
        let of_segments = segments.map(|segments| {
            let config = ChunkConfig { k_splits: 1, ..config };
            Ok::<_, Error>(OfSegments {
                kernel: device.kernel(&unit::<T>(&variant, &config, Grads::OfState))?,
                grid: Grid::of_heads(&of_walk, slices)?,
                maps: Maps::new(device, shape, &segments, options, Fold::Back)?,
            })
        });
        Ok(Self {
            kernel,
            output: (slices > 1).then(|| device.kernel(&unit_output::<T>())).transpose()?,
            recompute,
            of_segments: of_segments.transpose()?,
            states_len: states_len(&cut, &shares, &variant),
            shape: shape.clone(),
            walked: of_walk.seqs,
            cut,
            shares,
            slices,
            scale,
            grid,
        })
    }

    /// Elements of the input `states`.
    #[must_use]
    pub fn states_len(&self) -> usize {
        self.states_len
    }

    /// Bytes of the workspace that a run needs: the states where they are recomputed, what segments do to a state where
    /// sequences are cut into several, and sums over slices of V where a head has several. Never 0, which drivers refuse to
    /// allocate.
    #[must_use]
    pub fn workspace_bytes(&self) -> usize {
        let [maps, ends] = self.of_segments.as_ref().map_or([0, 0], |of| of.maps.bytes());
        Workspace::bytes(&[
            self.forward_bytes(),
            self.recomputed_len().saturating_mul(size_of::<u16>()),
            self.partial_len().saturating_mul(size_of::<f32>()),
            maps,
            ends,
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

    fn partial_len(&self) -> usize {
        if self.output.is_none() {
            return 0;
        }
        self.shape.k_len().saturating_mul(K_GRADS).saturating_mul(self.slices)
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
        let k_len = self.shape.k_len();
        let workspace = Workspace::new(stream, workspace, self.workspace_bytes())?;
        let mut of_forward = workspace.take::<u8>(self.forward_bytes())?;
        let mut recomputed = workspace.take::<u16>(self.recomputed_len())?;
        let mut partial = workspace.take::<f32>(self.partial_len())?;
        let mut of_maps = match &self.of_segments {
            Some(of) => Some(of.maps.parts(&workspace)?),
            None => None,
        };
        let Some(grid) = self.grid else { return Ok(()) };
        if self.recompute.is_some() || self.of_segments.is_some() || self.output.is_some() {
            // Later launches bind these, when the first has been queued.
            check_aligned(stream, x, dx)?;
        }
        if let (Some(of), Some(parts)) = (&self.of_segments, &mut of_maps) {
            let Some(grid) = of.grid else { return Ok(()) };
            of.kernel.launch(stream, grid, |bind| ChunkBwdParams {
                d_initial_state: bind.write("workspace", &mut parts.states),
                ..self.params(bind, x, 0)
            })?;
            let ends = Ends { first: x.d_final_state, last: dx.d_initial_state.as_deref_mut() };
            of.maps.run(stream, &forward_inputs(x), parts, ends)?;
        }
        let is_whole = self.of_segments.is_none();
        for first_h in self.shares.firsts() {
            if let Some(forward) = &self.recompute {
                let states = (&mut recomputed as &mut dyn DevicePtrMut<u16>, first_h);
                forward.run_states(stream, &forward_inputs(x), states, &mut of_forward)?;
            }
            let states: &dyn DevicePtr<u16> = x.states.unwrap_or(&recomputed);
            let ends = of_maps.as_ref().map(|parts| &parts.states as &dyn DevicePtr<f32>);
            self.kernel.launch(stream, grid, |bind| ChunkBwdParams {
                states: bind.read("states", states),
                d_final_state: bind.read_opt("d_final_state", ends.or(x.d_final_state)),
                dq: bind.write("dq", &mut *dx.dq),
                dk: bind.write("dk", &mut *dx.dk),
                dv: bind.write("dv", &mut *dx.dv),
                da: bind.write("da", &mut *dx.da),
                db: bind.write("db", &mut *dx.db),
                dg: bind.write("dg", &mut *dx.dg),
                d_initial_state: match dx.d_initial_state.as_deref_mut() {
                    Some(state) if is_whole => bind.write("d_initial_state", state),
                    _ => PtrMut::NULL,
                },
                partial: bind.write_opt("workspace", self.output.is_some().then_some(&mut partial)),
                ..self.params(bind, x, first_h)
            })?;
        }
        let Some(output) = &self.output else { return Ok(()) };
        let grid = match u32::try_from(k_len.div_ceil(OUTPUT_THREADS)) {
            Ok(0) => return Ok(()),
            // Five tensors of 2^39 elements are more than any memory holds, and have been checked to exist.
            blocks => Grid::x(blocks.unwrap_or(u32::MAX)),
        };
        output.launch(stream, grid, |bind| ChunkBwdOutputParams {
            partial: bind.read("workspace", &partial),
            dq: bind.write("dq", &mut *dx.dq),
            dk: bind.write("dk", &mut *dx.dk),
            da: bind.write("da", &mut *dx.da),
            db: bind.write("db", &mut *dx.db),
            dg: bind.write("dg", &mut *dx.dg),
            len: k_len as i64,
            slices: self.slices as i32,
        })
    }

    /// The inputs that every launch has in common, and nothing else.
    fn params<'a>(
        &'a self,
        bind: &mut Binder<'a>,
        x: &ChunkBwdInputs<'a, T>,
        first_h: usize,
    ) -> ChunkBwdParams<T> {
        ChunkBwdParams {
            q: bind.read("q", x.q),
            k: bind.read("k", x.k),
            v: bind.read("v", x.v),
            a: bind.read("a", x.a),
            b: bind.read("b", x.b),
            g: bind.read("g", x.g),
            states: Ptr::NULL,
            d_o: bind.read("d_o", x.d_o),
            d_final_state: Ptr::NULL,
            cu_seqlens: bind.read_opt("cu_seqlens", self.cut.cu_seqlens.as_ref()),
            chunk_offsets: bind.read_opt("chunk_offsets", self.cut.chunk_offsets.as_ref()),
            dq: PtrMut::NULL,
            dk: PtrMut::NULL,
            dv: PtrMut::NULL,
            da: PtrMut::NULL,
            db: PtrMut::NULL,
            dg: PtrMut::NULL,
            d_initial_state: PtrMut::NULL,
            partial: PtrMut::NULL,
            n: self.walked.n() as i64,
            t: self.walked.t() as i64,
            partial_len: self.shape.k_len() as i64,
            // `new` has checked that H fits.
            h: self.shape.h as i32,
            first_h: first_h as i32,
            heads: self.shares.heads as i32,
            scale: self.scale,
        }
    }

    fn check_lens(&self, x: &ChunkBwdInputs<'_, T>, dx: &ChunkBwdOutputs<'_, T>) -> Result<(), Error> {
        let (k_len, v_len, state_len) = (self.shape.k_len(), self.shape.v_len(), self.shape.state_len());
        for (name, len) in [
            ("q", x.q.len()),
            ("k", x.k.len()),
            ("a", x.a.len()),
            ("b", x.b.len()),
            ("g", x.g.len()),
            ("dq", dx.dq.len()),
            ("dk", dx.dk.len()),
            ("da", dx.da.len()),
            ("db", dx.db.len()),
            ("dg", dx.dg.len()),
        ] {
            check_len(name, "[B, T, H, K]", k_len, len)?;
        }
        for (name, len) in [("v", x.v.len()), ("d_o", x.d_o.len()), ("dv", dx.dv.len())] {
            check_len(name, "[B, T, H, V]", v_len, len)?;
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

fn forward_inputs<'a, T>(x: &ChunkBwdInputs<'a, T>) -> ChunkFwdInputs<'a, T> {
    let ChunkBwdInputs { q, k, v, a, b, g, initial_state, .. } = *x;
    ChunkFwdInputs { q, k, v, a, b, g, initial_state }
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
    for (name, tensor) in [
        ("dq", &mut *dx.dq),
        ("dk", &mut *dx.dk),
        ("dv", &mut *dx.dv),
        ("da", &mut *dx.da),
        ("db", &mut *dx.db),
        ("dg", &mut *dx.dg),
    ] {
        check_align(name, tensor.device_ptr_mut(stream).0)?;
    }
    match &mut dx.d_initial_state {
        Some(state) => check_align("d_initial_state", state.device_ptr_mut(stream).0),
        None => Ok(()),
    }
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
    let over_k = || device.alloc::<T>(&stream, shape.k_len());
    let mut dx = ChunkBwdResult {
        dq: over_k()?,
        dk: over_k()?,
        dv: device.alloc(&stream, shape.v_len())?,
        da: over_k()?,
        db: over_k()?,
        dg: over_k()?,
        d_initial_state: device.alloc(&stream, shape.state_len())?,
    };
    let mut workspace = device.alloc::<u8>(&stream, plan.workspace_bytes())?;
    let mut outputs = ChunkBwdOutputs {
        dq: &mut dx.dq,
        dk: &mut dx.dk,
        dv: &mut dx.dv,
        da: &mut dx.da,
        db: &mut dx.db,
        dg: &mut dx.dg,
        d_initial_state: Some(&mut dx.d_initial_state),
    };
    plan.run(&stream, x, &mut outputs, &mut workspace)?;
    Ok(dx)
}

pub(crate) fn units(arch: Arch) -> Vec<Unit> {
    let room = Room::of_many_heads(arch);
    let mut out = vec![unit_output::<f32>(), unit_output::<bf16>(), unit_output::<f16>()];
    for variant in variants(arch) {
        out.push(any_unit::<bf16>(&variant, &room, Grads::OfTokens));
        if (variant.k, variant.v) == (64, 64) {
            out.push(any_unit::<bf16>(&variant, &Room::of_few_heads(arch), Grads::OfTokens));
            out.push(any_unit::<bf16>(&variant, &room, Grads::OfState));
        }
        if is_plain(&variant) {
            out.push(any_unit::<f32>(&variant, &room, Grads::OfTokens));
            out.push(any_unit::<f16>(&variant, &room, Grads::OfTokens));
        }
    }
    out
}

/// What a backward kernel writes, beside the gradient of the initial state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Grads {
    OfTokens,
    /// Nothing beside it.
    OfState,
}

/// The kernel of a variant in this type.
pub(crate) fn any_unit<T: Element>(variant: &ChunkVariant, room: &Room, grads: Grads) -> Unit {
    let variant = ChunkVariant { dtype: T::DTYPE, ..*variant };
    unit::<T>(&variant, &variant.bwd(room), grads)
}

fn unit<T: Element>(variant: &ChunkVariant, config: &ChunkConfig, grads: Grads) -> Unit {
    let threads = match grads {
        Grads::OfTokens => config.threads(),
        Grads::OfState => config.threads_of_state(),
    };
    let unit = Unit::new::<ChunkBwdParams<T>>("dplr", "chunk_bwd", SOURCE, threads)
        .with_smem_bytes(variant.bwd_smem_bytes(config) as u32);
    let unit = if variant.is_tight() { unit.with_spill_limit(SPILL_LIMIT) } else { unit };
    with_constants::<T>(unit, variant, config)
        .with("GRAD_SETS", config.grad_sets as i32)
        .with("GRAD_WARPS", config.grad_warps as i32)
        .with("GRADS", grads == Grads::OfTokens)
        .with("K_SPLITS", config.k_splits as i32)
}

pub(crate) fn unit_output<T: Element>() -> Unit {
    Unit::new::<ChunkBwdOutputParams<T>>("dplr", "chunk_bwd_output", SOURCE_OUTPUT, OUTPUT_THREADS as u32)
        .with("Element", T::DTYPE)
        .with("THREADS", OUTPUT_THREADS as i32)
}

/// Twin of `fla::dplr::ChunkBwdParams`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct ChunkBwdParams<T> {
    q: Ptr<T>,
    k: Ptr<T>,
    v: Ptr<T>,
    a: Ptr<T>,
    b: Ptr<T>,
    g: Ptr<T>,
    states: Ptr<u16>,
    d_o: Ptr<T>,
    d_final_state: Ptr<f32>,
    cu_seqlens: Ptr<i64>,
    chunk_offsets: Ptr<i64>,
    dq: PtrMut<T>,
    dk: PtrMut<T>,
    dv: PtrMut<T>,
    da: PtrMut<T>,
    db: PtrMut<T>,
    dg: PtrMut<T>,
    d_initial_state: PtrMut<f32>,
    partial: PtrMut<f32>,
    n: i64,
    t: i64,
    partial_len: i64,
    h: i32,
    first_h: i32,
    heads: i32,
    scale: f32,
}

// SAFETY: `#[repr(C)]`, and the fields are listed in order.
unsafe impl<T: Element> Params for ChunkBwdParams<T> {
    const CUDA_TYPE: &'static str = "fla::dplr::ChunkBwdParams<Cfg::Element>";
    const FIELDS: &'static [Field] = &[
        Field::new("q", "const Cfg::Element*", offset_of!(Self, q)),
        Field::new("k", "const Cfg::Element*", offset_of!(Self, k)),
        Field::new("v", "const Cfg::Element*", offset_of!(Self, v)),
        Field::new("a", "const Cfg::Element*", offset_of!(Self, a)),
        Field::new("b", "const Cfg::Element*", offset_of!(Self, b)),
        Field::new("g", "const Cfg::Element*", offset_of!(Self, g)),
        Field::new("states", "const fla::u16*", offset_of!(Self, states)),
        Field::new("d_o", "const Cfg::Element*", offset_of!(Self, d_o)),
        Field::new("d_final_state", "const float*", offset_of!(Self, d_final_state)),
        Field::new("cu_seqlens", "const fla::i64*", offset_of!(Self, cu_seqlens)),
        Field::new("chunk_offsets", "const fla::i64*", offset_of!(Self, chunk_offsets)),
        Field::new("dq", "Cfg::Element*", offset_of!(Self, dq)),
        Field::new("dk", "Cfg::Element*", offset_of!(Self, dk)),
        Field::new("dv", "Cfg::Element*", offset_of!(Self, dv)),
        Field::new("da", "Cfg::Element*", offset_of!(Self, da)),
        Field::new("db", "Cfg::Element*", offset_of!(Self, db)),
        Field::new("dg", "Cfg::Element*", offset_of!(Self, dg)),
        Field::new("d_initial_state", "float*", offset_of!(Self, d_initial_state)),
        Field::new("partial", "float*", offset_of!(Self, partial)),
        Field::new("n", "fla::i64", offset_of!(Self, n)),
        Field::new("t", "fla::i64", offset_of!(Self, t)),
        Field::new("partial_len", "fla::i64", offset_of!(Self, partial_len)),
        Field::new("h", "fla::i32", offset_of!(Self, h)),
        Field::new("first_h", "fla::i32", offset_of!(Self, first_h)),
        Field::new("heads", "fla::i32", offset_of!(Self, heads)),
        Field::new("scale", "float", offset_of!(Self, scale)),
    ];
}

/// Twin of `fla::dplr::ChunkBwdOutputParams`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct ChunkBwdOutputParams<T> {
    partial: Ptr<f32>,
    dq: PtrMut<T>,
    dk: PtrMut<T>,
    da: PtrMut<T>,
    db: PtrMut<T>,
    dg: PtrMut<T>,
    len: i64,
    slices: i32,
}

// SAFETY: `#[repr(C)]`, and the fields are listed in order.
unsafe impl<T: Element> Params for ChunkBwdOutputParams<T> {
    const CUDA_TYPE: &'static str = "fla::dplr::ChunkBwdOutputParams<Cfg::Element>";
    const FIELDS: &'static [Field] = &[
        Field::new("partial", "const float*", offset_of!(Self, partial)),
        Field::new("dq", "Cfg::Element*", offset_of!(Self, dq)),
        Field::new("dk", "Cfg::Element*", offset_of!(Self, dk)),
        Field::new("da", "Cfg::Element*", offset_of!(Self, da)),
        Field::new("db", "Cfg::Element*", offset_of!(Self, db)),
        Field::new("dg", "Cfg::Element*", offset_of!(Self, dg)),
        Field::new("len", "fla::i64", offset_of!(Self, len)),
        Field::new("slices", "fla::i32", offset_of!(Self, slices)),
    ];
}
