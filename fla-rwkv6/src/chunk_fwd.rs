//! The chunk forward pass: matrix products over 16 tokens at a time, with the state on chip from chunk to chunk.

use std::mem::offset_of;
use std::sync::Arc;

use fla_core::cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut};
use fla_core::{
    Arch, ChunkCut, Device, Element, Error, Field, Grid, Kernel, Params, Ptr, PtrMut, SavedStates, Shape,
    Source, Unit, Workspace, check_len,
};
use half::{bf16, f16};

use crate::config::{self, CHUNK, ChunkChoice, ChunkFwdConfig, ChunkFwdWrites, ChunkVariant, Segments};

/// Largest K and V of the chunk passes.
pub(crate) const MAX_K: usize = 256;
pub(crate) const MAX_V: usize = 256;

const SOURCE: Source =
    Source { name: "fla/rwkv6/chunk_fwd.cu", text: include_str!("../kernels/chunk_fwd.cu") };
const SOURCE_OUTPUT: Source =
    Source { name: "fla/rwkv6/chunk_fwd_output.cu", text: include_str!("../kernels/chunk_fwd_output.cu") };
pub(crate) const HEADERS: &[Source] =
    &[Source { name: "fla/rwkv6/chunk.cuh", text: include_str!("../kernels/chunk.cuh") }];
/// What the kernels that add up parts include.
pub(crate) const PARTS: &[Source] =
    &[Source { name: "fla/rwkv6/parts.cuh", text: include_str!("../kernels/parts.cuh") }];

/// Threads of the kernels that add up parts; each has one element.
pub(crate) const OUTPUT_THREADS: usize = 256;

/// What has no safe default, and what may be changed. Both passes of a training step take the same.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct ChunkFwdOptions {
    /// Factor of the output; `K^-0.5` and 1 are both common, so it must be said.
    pub scale: f32,
    /// Where the backward pass finds states; [`SavedStates::Recomputed`] unless changed. A plan of the forward pass writes
    /// states with [`SavedStates::Kept`] and not otherwise.
    pub saved_states: SavedStates,
}

impl ChunkFwdOptions {
    /// The options with this factor of the output.
    #[must_use]
    pub const fn new(scale: f32) -> Self {
        Self { scale, saved_states: SavedStates::Recomputed }
    }

    /// Changes where the backward pass finds states.
    #[must_use]
    pub const fn with_saved_states(mut self, saved_states: SavedStates) -> Self {
        self.saved_states = saved_states;
        self
    }

    /// The scale, when it is one.
    pub(crate) fn checked_scale(&self) -> Result<f32, Error> {
        if self.scale.is_finite() {
            return Ok(self.scale);
        }
        Err(Error::Option { option: "scale", wanted: "finite", got: self.scale.to_string() })
    }
}

/// What the pass reads. Contiguous, each at a multiple of 16 bytes.
#[derive(Clone, Copy)]
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub struct ChunkFwdInputs<'a, T> {
    /// Receptance, the query: `[B, T, H, K]`.
    pub r: &'a dyn DevicePtr<T>,
    /// Keys: `[B, T, H, K]`.
    pub k: &'a dyn DevicePtr<T>,
    /// Values: `[B, T, H, V]`.
    pub v: &'a dyn DevicePtr<T>,
    /// Log decay, natural base, at most 0; the model's raw weight x gives -exp(x): `[B, T, H, K]`.
    pub w: &'a dyn DevicePtr<T>,
    /// Bonus of the current token: `[H, K]`.
    pub u: &'a dyn DevicePtr<T>,
    /// State before the first token of each sequence, or zero when absent: `[N, H, K, V]`.
    pub initial_state: Option<&'a dyn DevicePtr<f32>>,
}

/// What the pass writes, whole.
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub struct ChunkFwdOutputs<'a, T> {
    /// Outputs: `[B, T, H, V]`.
    pub o: &'a mut dyn DevicePtrMut<T>,
    /// State after the last token of each sequence, when wanted: `[N, H, K, V]`.
    pub final_state: Option<&'a mut dyn DevicePtrMut<f32>>,
    /// State before every 16 tokens of each sequence, with [`SavedStates::Kept`] and not otherwise, in the form that
    /// [`ChunkBwd`](crate::ChunkBwd) reads: [`ChunkFwd::states_len`] elements.
    pub states: Option<&'a mut dyn DevicePtrMut<u16>>,
}

/// What the one-call form returns.
#[derive(Debug)]
pub struct ChunkFwdResult<T> {
    /// Outputs: `[B, T, H, V]`.
    pub o: CudaSlice<T>,
    /// State after the last token of each sequence: `[N, H, K, V]`.
    pub final_state: CudaSlice<f32>,
    /// States for [`chunk_bwd`](crate::chunk_bwd), when they are kept.
    pub states: Option<CudaSlice<u16>>,
}

/// The chunk forward pass of RWKV-6, made once for a shape and run many times.
///
/// ```text
/// o_t = scale (S_{t-1} + diag(u) k_t v_t^T)^T r_t        S_t = diag(e^{w_t}) S_{t-1} + k_t v_t^T
/// ```
///
/// A chunk of 16 tokens is a few matrix products. With E(i, j) the decay after row j until just before row i, which runs from
/// the start of the chunk when j is left out and to its end when i is:
///
/// ```text
/// A_ij = scale sum_k r_i k_j E(i, j)      j < i            A_ii = scale sum_k r_i u k_i
/// o = scale (r E) S + A v                                  S <- diag(E) S + (k E)^T v
/// ```
///
/// | tensor              | shape          | dtype | meaning                                                       |
/// |---------------------|----------------|-------|---------------------------------------------------------------|
/// | `r`, `k`            | `[B, T, H, K]` | `T`   | receptance (the query), keys                                  |
/// | `v`                 | `[B, T, H, V]` | `T`   | values                                                        |
/// | `w`                 | `[B, T, H, K]` | `T`   | log decay, natural base, at most 0                            |
/// | `u`                 | `[H, K]`       | `T`   | bonus, which only the current token gets                      |
/// | `initial_state`     | `[N, H, K, V]` | f32   | optional; zero when absent                                    |
/// | `o` (out)           | `[B, T, H, V]` | `T`   | outputs                                                       |
/// | `final_state` (out) | `[N, H, K, V]` | f32   | optional                                                      |
/// | `states` (out)      | `states_len()` | u16   | with [`SavedStates::Kept`]; for [`ChunkBwd`](crate::ChunkBwd) |
///
/// `T` is f32, bf16 or f16; K and V are at most 256, any size. A sequence without tokens hands its state through. The values
/// of `w` are not checked: above 0 the state grows. Lengths have to be known to the host.
///
/// `states` holds bits of bf16: for each of the NT chunks and each head an image of the state before it, K and V rounded up
/// to multiples of 16, so 2 K V bytes for 16 tokens; for f32 and f16 vectors two images whose sum it is. Nothing but
/// [`ChunkBwd`](crate::ChunkBwd) of the same version on a GPU of the same architecture reads them.
///
/// K above 128, and less on GPUs with 99 KiB of shared memory for a block, is cut into slices that are alike, each a multiple of 16
/// channels, and `states` covers all of them. Each slice leaves its part of `o` in f32 in the workspace, and a last launch adds
/// them up.
///
/// Where there are fewer heads than a GPU needs, long sequences are cut into segments: a first launch computes what each does
/// to a state, into the workspace, and the second takes all segments side by side.
///
/// # Numerics
///
/// Sums are taken in f32. The state is f32 from chunk to chunk; what is multiplied on tensor cores is rounded to bf16, or
/// split into two bf16 where vectors are f32 or f16; pairs of tokens are tf32 where it is bf16. No factor leaves its range under
/// any decay. The error against the float64 recurrence stays under the rows `rwkv6, chunk_fwd` of
/// `fla_reference::tolerance`. Sums are taken in a fixed order: the same inputs give the same bits on the same GPU.
///
/// # Source
///
/// Peng et al., "Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence", arXiv:2404.05892.
#[derive(Debug)]
pub struct ChunkFwd<T> {
    /// In their order: what segments do to a state, where sequences are cut into several, and everything else. Empty when there
    /// is nothing to do.
    launches: Vec<(Kernel<ChunkFwdParams<T>>, Grid)>,
    /// Adds up what slices of K leave of `o`; none where there is one, or no token.
    output: Option<(Kernel<ChunkFwdOutputParams<T>>, Grid)>,
    writes: ChunkFwdWrites,
    shape: Shape,
    cut: ChunkCut,
    segments: Segments,
    local: LocalStates,
    states_len: usize,
    /// Blocks that share K.
    slices_k: usize,
    scale: f32,
}

const fn is_shareable<T: Send + Sync>() {}
// A plan may be made on one thread and run on others.
const _: () = is_shareable::<ChunkFwd<bf16>>();

impl<T: Element> ChunkFwd<T> {
    /// Checks the shape, compiles or loads the kernels, and uploads the offsets of packed sequences.
    ///
    /// # Errors
    ///
    /// [`Error::Dim`] when H, K or V is 0 or too large, for this GPU too, or there are too many sequences for a launch;
    /// [`Error::SeqLens`] when only the device knows the lengths; [`Error::Option`] when `scale` is not finite; [`Error::NoNvrtc`],
    /// [`Error::Compile`], [`Error::Driver`] or [`Error::OutOfMemory`] when a kernel cannot be had.
    pub fn new(device: &Device, shape: &Shape, options: &ChunkFwdOptions) -> Result<Self, Error> {
        let writes = match options.saved_states {
            SavedStates::Recomputed => ChunkFwdWrites::Output,
            SavedStates::Kept => ChunkFwdWrites::OutputAndStates,
        };
        Self::that_writes(device, shape, options, writes)
    }

    /// The plan of a backward pass that was given no states: it writes them and nothing else.
    pub(crate) fn of_states(
        device: &Device,
        shape: &Shape,
        options: &ChunkFwdOptions,
    ) -> Result<Self, Error> {
        Self::that_writes(device, shape, options, ChunkFwdWrites::States)
    }

    fn that_writes(
        device: &Device,
        shape: &Shape,
        options: &ChunkFwdOptions,
        writes: ChunkFwdWrites,
    ) -> Result<Self, Error> {
        check_shape(shape)?;
        let scale = options.checked_scale()?;
        let variant = variant::<T>(device.arch(), shape);
        let smem_bytes = device.smem_bytes() as usize;
        let config = variant.fwd(writes, smem_bytes);
        let block_smem_bytes = variant.fwd_smem_bytes(&config);
        device.check_smem(shape, block_smem_bytes)?;
        let cut = ChunkCut::new(device, &shape.seqs, CHUNK)?;
        let slots = config::slots(device.sm_count(), config.min_blocks, smem_bytes, block_smem_bytes);
        // The same whatever is written, so that states have the same bits.
        let slices_k = variant.slices_k();
        let segments = segments_of(&cut, shape, shape.v.div_ceil(config.bv) * slices_k, slots);
        tracing::debug!(?variant, ?config, ?segments, ?writes, "rwkv6 chunk_fwd");
        let of_segments = (!segments.is_whole()).then_some(ChunkFwdWrites::Segments);
        let mut launches = Vec::new();
        for writes in of_segments.into_iter().chain([writes]) {
            let kernel = |config: &ChunkFwdConfig| device.kernel(&unit::<T>(&variant, config, writes));
            let (kernel, config) = with_registers(&variant.fwd(writes, smem_bytes), kernel)?;
            let slices = shape.v.div_ceil(config.bv) * slices_k;
            let grid = Grid::of_heads(shape, slices.saturating_mul(segments.count))?;
            launches.extend(grid.map(|grid| (kernel, grid)));
        }
        let output = match grid_of_elements(shape.v_len()) {
            Some(grid) if slices_k > 1 && writes.output() => {
                Some((device.kernel(&unit_output::<T>(slices_k))?, grid))
            }
            _ => None,
        };
        Ok(Self {
            launches,
            output,
            writes,
            local: LocalStates::new(shape, &variant, &segments),
            states_len: states_len(&cut, shape, &variant),
            shape: shape.clone(),
            cut,
            segments,
            slices_k,
            scale,
        })
    }

    /// Elements of the output `states`.
    #[must_use]
    pub fn states_len(&self) -> usize {
        self.states_len
    }

    /// Bytes of the workspace that a run needs: what segments do to a state, where sequences are cut into several, and parts of
    /// `o`, where K is cut. Never 0, which drivers refuse to allocate.
    #[must_use]
    pub fn workspace_bytes(&self) -> usize {
        let [local_states, local_decays] = self.local.bytes();
        let o_parts = self.o_parts_len().saturating_mul(size_of::<f32>());
        Workspace::bytes(&[local_states, local_decays, o_parts]).max(256)
    }

    fn o_parts_len(&self) -> usize {
        if self.output.is_some() { self.shape.v_len().saturating_mul(self.slices_k) } else { 0 }
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
        self.check_inputs(x)?;
        check_len("o", "[B, T, H, V]", self.shape.v_len(), y.o.len())?;
        if let Some(state) = &y.final_state {
            check_len("final_state", "[N, H, K, V]", self.shape.state_len(), state.len())?;
        }
        let presence = |wanted| Err(Error::Presence { tensor: "states", wanted });
        match (&y.states, self.writes.states()) {
            (Some(states), true) => {
                check_len("states", "states_len() of the plan", self.states_len, states.len())?;
            }
            (None, false) => {}
            (None, true) => return presence("must be given, since the plan is for states that are kept"),
            (Some(_), false) => return presence("must be absent, since the plan does not keep states"),
        }
        let wanted = Wanted {
            o: Some(&mut *y.o),
            final_state: y.final_state.as_deref_mut(),
            states: y.states.as_deref_mut(),
        };
        self.launch(stream, x, wanted, workspace)
    }

    /// Runs a plan that [`Self::of_states`] made.
    pub(crate) fn run_states(
        &self,
        stream: &CudaStream,
        x: &ChunkFwdInputs<'_, T>,
        states: &mut dyn DevicePtrMut<u16>,
        workspace: &mut dyn DevicePtrMut<u8>,
    ) -> Result<(), Error> {
        self.launch(stream, x, Wanted { o: None, final_state: None, states: Some(states) }, workspace)
    }

    fn check_inputs(&self, x: &ChunkFwdInputs<'_, T>) -> Result<(), Error> {
        let k_len = self.shape.k_len();
        for (name, tensor) in [("r", x.r), ("k", x.k), ("w", x.w)] {
            check_len(name, "[B, T, H, K]", k_len, tensor.len())?;
        }
        check_len("v", "[B, T, H, V]", self.shape.v_len(), x.v.len())?;
        check_len("u", "[H, K]", u_len(&self.shape), x.u.len())?;
        if let Some(state) = x.initial_state {
            check_len("initial_state", "[N, H, K, V]", self.shape.state_len(), state.len())?;
        }
        Ok(())
    }

    fn launch(
        &self,
        stream: &CudaStream,
        x: &ChunkFwdInputs<'_, T>,
        mut y: Wanted<'_, '_, T>,
        workspace: &mut dyn DevicePtrMut<u8>,
    ) -> Result<(), Error> {
        let workspace = Workspace::new(stream, workspace, self.workspace_bytes())?;
        let mut local_states = workspace.take::<f32>(self.local.states_len)?;
        let mut local_decays = workspace.take::<f32>(self.local.decays_len)?;
        let mut o_parts = workspace.take::<f32>(self.o_parts_len())?;
        let v_len = self.shape.v_len() as i64;
        // All tensors are bound by the first, so what a later one would refuse it does.
        for (kernel, grid) in &self.launches {
            kernel.launch(stream, *grid, |bind| ChunkFwdParams {
                r: bind.read("r", x.r),
                k: bind.read("k", x.k),
                v: bind.read("v", x.v),
                w: bind.read("w", x.w),
                u: bind.read("u", x.u),
                initial_state: bind.read_opt("initial_state", x.initial_state),
                cu_seqlens: bind.read_opt("cu_seqlens", self.cut.cu_seqlens.as_ref()),
                chunk_offsets: bind.read_opt("chunk_offsets", self.cut.chunk_offsets.as_ref()),
                o: bind.write_opt("o", y.o.as_deref_mut()),
                final_state: bind.write_opt("final_state", y.final_state.as_deref_mut()),
                states: bind.write_opt("states", y.states.as_deref_mut()),
                local_states: bind.write("workspace", &mut local_states),
                local_decays: bind.write("workspace", &mut local_decays),
                o_parts: bind.write("workspace", &mut o_parts),
                t: self.shape.seqs.t() as i64,
                o_len: v_len,
                // `new` has checked that these fit.
                h: self.shape.h as i32,
                segment_chunks: self.segments.chunks as i32,
                max_segments: self.segments.count as i32,
                scale: self.scale,
            })?;
        }
        if let Some((kernel, grid)) = &self.output {
            kernel.launch(stream, *grid, |bind| ChunkFwdOutputParams {
                o_parts: bind.read("workspace", &o_parts),
                o: bind.write_opt("o", y.o.as_deref_mut()),
                len: v_len,
            })?;
        }
        Ok(())
    }
}

/// Outputs of a launch; their lengths have been checked.
struct Wanted<'a, 'b, T> {
    o: Option<&'a mut (dyn DevicePtrMut<T> + 'b)>,
    final_state: Option<&'a mut (dyn DevicePtrMut<f32> + 'b)>,
    states: Option<&'a mut (dyn DevicePtrMut<u16> + 'b)>,
}

/// Makes the plan, allocates outputs and workspace and runs, on the stream of `r`.
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
    let stream: Arc<CudaStream> = x.r.stream().clone();
    let states = match options.saved_states {
        SavedStates::Recomputed => None,
        SavedStates::Kept => Some(device.alloc(&stream, plan.states_len())?),
    };
    let mut y = ChunkFwdResult {
        o: device.alloc(&stream, shape.v_len())?,
        final_state: device.alloc(&stream, shape.state_len())?,
        states,
    };
    let mut workspace = device.alloc::<u8>(&stream, plan.workspace_bytes())?;
    let mut outputs = ChunkFwdOutputs {
        o: &mut y.o,
        final_state: Some(&mut y.final_state),
        states: y.states.as_mut().map(|states| states as &mut dyn DevicePtrMut<u16>),
    };
    plan.run(&stream, x, &mut outputs, &mut workspace)?;
    Ok(y)
}

/// Elements of `[H, K]`.
pub(crate) fn u_len(shape: &Shape) -> usize {
    shape.h.saturating_mul(shape.k)
}

/// Elements of what is kept of all chunks. Saturates, so that a product that no memory holds fits no tensor.
pub(crate) fn states_len(cut: &ChunkCut, shape: &Shape, variant: &ChunkVariant) -> usize {
    cut.nt.saturating_mul(shape.h).saturating_mul(variant.saved_state_len())
}

/// A thread for each of so many elements, where there are any.
pub(crate) fn grid_of_elements(len: usize) -> Option<Grid> {
    // Tensors of 2^40 elements are more than any memory holds, and have been checked to exist when they are launched on.
    let blocks = u32::try_from(len.div_ceil(OUTPUT_THREADS)).unwrap_or(u32::MAX);
    (blocks > 0).then(|| Grid::x(blocks))
}

/// Where sequences are cut for a GPU that holds `slots` blocks, when a head has so many slices.
pub(crate) fn segments_of(cut: &ChunkCut, shape: &Shape, slices: usize, slots: usize) -> Segments {
    Segments::new(cut.nt, cut.longest, shape.h.saturating_mul(slices), slots)
}

/// What segments leave to each other: a state, or its gradient, and its decay; nothing when no sequence is cut.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LocalStates {
    pub(crate) states_len: usize,
    pub(crate) decays_len: usize,
}

impl LocalStates {
    pub(crate) fn new(shape: &Shape, variant: &ChunkVariant, segments: &Segments) -> Self {
        if segments.is_whole() {
            return Self { states_len: 0, decays_len: 0 };
        }
        let count = shape.seqs.n().saturating_mul(shape.h).saturating_mul(segments.count);
        Self {
            states_len: count.saturating_mul(variant.local_state_len()),
            decays_len: count.saturating_mul(variant.local_decay_len()),
        }
    }

    /// Bytes of the states and of the decays.
    pub(crate) fn bytes(&self) -> [usize; 2] {
        [self.states_len, self.decays_len].map(|len| len.saturating_mul(size_of::<f32>()))
    }
}

/// Checks the dims of a head.
pub(crate) fn check_shape(shape: &Shape) -> Result<(), Error> {
    shape.check(MAX_K, MAX_V)?;
    // Offsets inside of a chunk are 32 bits.
    let max = i32::MAX as usize / (CHUNK * shape.k.max(shape.v));
    if shape.h <= max {
        return Ok(());
    }
    Err(Error::Dim { dim: "H", wanted: format!("at most {max} for heads of this size"), got: shape.h })
}

/// The kernel of this choice, or of one that leaves more registers to a lane where the assembler asks for that.
pub(crate) fn with_registers<K, C: ChunkChoice>(
    config: &C,
    kernel: impl Fn(&C) -> Result<K, Error>,
) -> Result<(K, C), Error> {
    let mut config = *config;
    loop {
        let error = match kernel(&config) {
            Ok(kernel) => return Ok((kernel, config)),
            Err(error) => error,
        };
        config = match config.with_more_registers() {
            Some(next) if matches!(error, Error::Compile { .. }) => next,
            _ => return Err(error),
        };
        tracing::warn!(%error, ?config, "a chunk pass of rwkv6 runs with another choice");
    }
}

/// What a plan's kernels are compiled for.
pub(crate) fn variant<T: Element>(arch: Arch, shape: &Shape) -> ChunkVariant {
    ChunkVariant { arch, dtype: T::DTYPE, k: shape.k, v: shape.v }
}

/// Heads that are compiled ahead; the first in every form and the first three in every type.
pub(crate) const HEADS: [(usize, usize); 7] =
    [(64, 64), (128, 128), (256, 256), (128, 256), (200, 100), (60, 100), (33, 65)];

pub(crate) fn units(arch: Arch) -> Vec<Unit> {
    let smem_bytes = arch.smem_bytes();
    let mut out = vec![unit_output::<f32>(2), unit_output::<bf16>(2), unit_output::<f16>(2)];
    for (i, (k, v)) in HEADS.into_iter().enumerate() {
        let [output, output_and_states, states, segments] = all_units::<bf16>(arch, (k, v), smem_bytes);
        out.extend([output_and_states, segments]);
        if i == 0 {
            out.extend([output, states]);
        }
        if i < 3 {
            let [_, output_and_states, _, _] = all_units::<f32>(arch, (k, v), smem_bytes);
            out.push(output_and_states);
            let [_, output_and_states, _, _] = all_units::<f16>(arch, (k, v), smem_bytes);
            out.push(output_and_states);
        }
    }
    out
}

/// The kernels for heads of K by V in this type.
fn all_units<T: Element>(arch: Arch, (k, v): (usize, usize), smem_bytes: usize) -> [Unit; 4] {
    let variant = ChunkVariant { arch, dtype: T::DTYPE, k, v };
    ChunkFwdWrites::ALL.map(|writes| unit::<T>(&variant, &variant.fwd(writes, smem_bytes), writes))
}

fn unit<T: Element>(variant: &ChunkVariant, config: &ChunkFwdConfig, writes: ChunkFwdWrites) -> Unit {
    let threads = 32 * (config.bv / 16 + config.prep_warps) as u32;
    // All of these are below 2^31: `new` has checked K and V.
    Unit::new::<ChunkFwdParams<T>>("rwkv6", "chunk_fwd", SOURCE, threads)
        .with_smem_bytes(variant.fwd_smem_bytes(config) as u32)
        .with_headers(HEADERS)
        .with_min_blocks(config.min_blocks)
        .with("Element", T::DTYPE)
        .with("K", variant.k as i32)
        .with("V", variant.v as i32)
        .with("BK", variant.bk() as i32)
        .with("BV", config.bv as i32)
        .with("PREP_WARPS", config.prep_warps as i32)
        .with("OUTPUT", writes.output())
        .with("KEEP_STATES", writes.states())
        .with("LOCAL", writes == ChunkFwdWrites::Segments)
}

fn unit_output<T: Element>(slices: usize) -> Unit {
    Unit::new::<ChunkFwdOutputParams<T>>("rwkv6", "chunk_fwd_output", SOURCE_OUTPUT, OUTPUT_THREADS as u32)
        .with_headers(PARTS)
        .with("Element", T::DTYPE)
        .with("SLICES", slices as i32)
        .with("THREADS", OUTPUT_THREADS as i32)
}

/// Twin of `fla::rwkv6::ChunkFwdParams`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct ChunkFwdParams<T> {
    r: Ptr<T>,
    k: Ptr<T>,
    v: Ptr<T>,
    w: Ptr<T>,
    u: Ptr<T>,
    initial_state: Ptr<f32>,
    cu_seqlens: Ptr<i64>,
    chunk_offsets: Ptr<i64>,
    o: PtrMut<T>,
    final_state: PtrMut<f32>,
    states: PtrMut<u16>,
    local_states: PtrMut<f32>,
    local_decays: PtrMut<f32>,
    o_parts: PtrMut<f32>,
    t: i64,
    o_len: i64,
    h: i32,
    segment_chunks: i32,
    max_segments: i32,
    scale: f32,
}

// SAFETY: `#[repr(C)]`, and the fields are listed in order.
unsafe impl<T: Element> Params for ChunkFwdParams<T> {
    const CUDA_TYPE: &'static str = "fla::rwkv6::ChunkFwdParams<Cfg::Element>";
    const FIELDS: &'static [Field] = &[
        Field::new("r", "const Cfg::Element*", offset_of!(Self, r)),
        Field::new("k", "const Cfg::Element*", offset_of!(Self, k)),
        Field::new("v", "const Cfg::Element*", offset_of!(Self, v)),
        Field::new("w", "const Cfg::Element*", offset_of!(Self, w)),
        Field::new("u", "const Cfg::Element*", offset_of!(Self, u)),
        Field::new("initial_state", "const float*", offset_of!(Self, initial_state)),
        Field::new("cu_seqlens", "const fla::i64*", offset_of!(Self, cu_seqlens)),
        Field::new("chunk_offsets", "const fla::i64*", offset_of!(Self, chunk_offsets)),
        Field::new("o", "Cfg::Element*", offset_of!(Self, o)),
        Field::new("final_state", "float*", offset_of!(Self, final_state)),
        Field::new("states", "fla::u16*", offset_of!(Self, states)),
        Field::new("local_states", "float*", offset_of!(Self, local_states)),
        Field::new("local_decays", "float*", offset_of!(Self, local_decays)),
        Field::new("o_parts", "float*", offset_of!(Self, o_parts)),
        Field::new("t", "fla::i64", offset_of!(Self, t)),
        Field::new("o_len", "fla::i64", offset_of!(Self, o_len)),
        Field::new("h", "fla::i32", offset_of!(Self, h)),
        Field::new("segment_chunks", "fla::i32", offset_of!(Self, segment_chunks)),
        Field::new("max_segments", "fla::i32", offset_of!(Self, max_segments)),
        Field::new("scale", "float", offset_of!(Self, scale)),
    ];
}

/// Twin of `fla::rwkv6::ChunkFwdOutputParams`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct ChunkFwdOutputParams<T> {
    o_parts: Ptr<f32>,
    o: PtrMut<T>,
    len: i64,
}

// SAFETY: `#[repr(C)]`, and the fields are listed in order.
unsafe impl<T: Element> Params for ChunkFwdOutputParams<T> {
    const CUDA_TYPE: &'static str = "fla::rwkv6::ChunkFwdOutputParams<Cfg::Element>";
    const FIELDS: &'static [Field] = &[
        Field::new("o_parts", "const float*", offset_of!(Self, o_parts)),
        Field::new("o", "Cfg::Element*", offset_of!(Self, o)),
        Field::new("len", "fla::i64", offset_of!(Self, len)),
    ];
}

#[cfg(test)]
mod tests {
    use super::{Arch, Element, all_units, bf16, f16};
    use crate::chunk_bwd;
    use fla_core::compile::compile;
    use fla_core::testing::nvrtc;

    /// A plan of any shape has to find registers: what spills is refused, and the shape with it.
    fn failures<T: Element>(heads: &[(usize, usize)]) -> Vec<String> {
        let (arch, smem_bytes) = (Arch::SM_90, Arch::SM_90.smem_bytes());
        let mut failures = Vec::new();
        for head in heads {
            let mut units = all_units::<T>(arch, *head, smem_bytes).to_vec();
            units.extend(chunk_bwd::all_units::<T>(arch, *head, smem_bytes));
            failures.extend(units.iter().filter_map(|unit| compile(unit, arch).err()).map(|e| e.to_string()));
        }
        failures
    }

    #[test]
    fn no_shape_spills() {
        if !nvrtc("chunk passes: no_shape_spills") {
            return;
        }
        // Heads that end within a tile, within a slice of K or of V, and at the limits.
        const HEADS: &[(usize, usize)] = &[
            (1, 1),
            (16, 256),
            (33, 65),
            (60, 100),
            (64, 144),
            (64, 64),
            (100, 60),
            (128, 128),
            (128, 256),
            (200, 100),
            (256, 256),
        ];
        let failures = std::thread::scope(|scope| {
            let other = scope.spawn(|| failures::<f32>(HEADS));
            let mut all = failures::<bf16>(HEADS);
            all.extend(failures::<f16>(&HEADS[5..]));
            all.extend(other.join().expect("does not panic"));
            all
        });
        assert!(failures.is_empty(), "{} units\n{}", failures.len(), failures.join("\n"));
    }
}
