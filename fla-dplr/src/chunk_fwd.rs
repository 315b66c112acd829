//! The chunk forward pass: matrix products over 16 tokens at a time, with the state on chip from chunk to chunk.

use std::mem::offset_of;
use std::sync::Arc;

use fla_core::cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut};
use fla_core::{
    Arch, ChunkCut, Device, Element, Error, Field, Grid, HeadShares, Kernel, Params, Ptr, PtrMut,
    SavedStates, Shape, Source, Unit, Workspace, check_align, check_len,
};
use half::{bf16, f16};

use crate::Transition;
use crate::config::{CHUNK, ChunkConfig, ChunkFwdWrites, ChunkVariant, Room};
use crate::segments::{Ends, Fold, Maps, Segments};

/// Largest K and V of the chunk passes: a block holds whole columns of the state.
pub(crate) const MAX_K: usize = 256;
pub(crate) const MAX_V: usize = 256;

const SOURCE: Source =
    Source { name: "fla/dplr/chunk_fwd.cu", text: include_str!("../kernels/chunk_fwd.cu") };
pub(crate) const HEADERS: &[Source] = &[
    Source { name: "fla/dplr/chunk_prep.cuh", text: include_str!("../kernels/chunk_prep.cuh") },
    Source { name: "fla/dplr/chunk_state.cuh", text: include_str!("../kernels/chunk_state.cuh") },
];

/// What `g` holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decay {
    /// The log decay, natural base, at most 0.
    Log,
    /// RWKV-7's logit x, any number: the log decay is `-e^{-1/2} sigmoid(x)`, formed in f32 inside the kernel. The
    /// gradient is that of x.
    Logit,
}

/// What has no safe default, and what may be changed. Both passes of a training step take the same.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct ChunkFwdOptions {
    /// Factor of the output; `K^-0.5` and 1 are both common, so it must be said.
    pub scale: f32,
    /// What `a` and `b` are; [`Transition::General`] unless changed.
    pub transition: Transition,
    /// What `g` holds; [`Decay::Log`] unless changed.
    pub decay: Decay,
    /// Where the backward pass finds states; [`SavedStates::Recomputed`] unless changed. A plan of the forward pass writes
    /// states with [`SavedStates::Kept`] and not otherwise.
    pub saved_states: SavedStates,
}

impl ChunkFwdOptions {
    /// The options with this factor of the output.
    #[must_use]
    pub const fn new(scale: f32) -> Self {
        let (transition, decay) = (Transition::General, Decay::Log);
        Self { scale, transition, decay, saved_states: SavedStates::Recomputed }
    }

    /// Changes what `a` and `b` are.
    #[must_use]
    pub const fn with_transition(mut self, transition: Transition) -> Self {
        self.transition = transition;
        self
    }

    /// Changes what `g` holds.
    #[must_use]
    pub const fn with_decay(mut self, decay: Decay) -> Self {
        self.decay = decay;
        self
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
    /// Queries: `[B, T, H, K]`.
    pub q: &'a dyn DevicePtr<T>,
    /// Keys: `[B, T, H, K]`.
    pub k: &'a dyn DevicePtr<T>,
    /// Values: `[B, T, H, V]`.
    pub v: &'a dyn DevicePtr<T>,
    /// What is read from the state before the decay, or a key; see [`Transition`]: `[B, T, H, K]`.
    pub a: &'a dyn DevicePtr<T>,
    /// Where it is written back, or the rate of the key: `[B, T, H, K]`.
    pub b: &'a dyn DevicePtr<T>,
    /// Log decay, natural base, at most 0, or a logit; see [`Decay`]: `[B, T, H, K]`.
    pub g: &'a dyn DevicePtr<T>,
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

/// The chunk forward pass of the DPLR delta rule, made once for a shape and run many times.
///
/// ```text
/// S_t = (diag(e^{g_t}) + b_t a_t^T) S_{t-1} + k_t v_t^T        o_t = scale S_t^T q_t
/// ```
///
/// A chunk of 16 tokens is a triangular inverse and a few matrix products. With e_i the decay from the start of the chunk
/// through row i, e'_i until just before it, and e_end that of the whole chunk:
///
/// ```text
/// A_qk, A_qb = scale sum_k q_i {k, b}_j e_i / e_j      j <= i
/// A_ak, A_ab = sum_k a_i {k, b}_j e'_i / e_j           j < i
/// u = (I - A_ab)^-1 (A_ak v + (a e') S)                the values S_{t-1}^T a_t
/// o = scale (q e) S + A_qk v + A_qb u
/// S <- diag(e_end) S + (k e_end / e)^T v + (b e_end / e)^T u
/// ```
///
/// | tensor              | shape          | dtype | meaning                                             |
/// |---------------------|----------------|-------|-----------------------------------------------------|
/// | `q`, `k`, `a`, `b`  | `[B, T, H, K]` | `T`   | queries, keys, low-rank transition                  |
/// | `v`                 | `[B, T, H, V]` | `T`   | values                                              |
/// | `g`                 | `[B, T, H, K]` | `T`   | log decay, natural base, at most 0; or a logit      |
/// | `initial_state`     | `[N, H, K, V]` | f32   | optional; zero when absent                          |
/// | `o` (out)           | `[B, T, H, V]` | `T`   | outputs                                             |
/// | `final_state` (out) | `[N, H, K, V]` | f32   | optional                                            |
/// | `states` (out)      | `states_len()` | u16   | with [`SavedStates::Kept`]; for [`ChunkBwd`](crate::ChunkBwd) |
///
/// `T` is f32, bf16 or f16; K and V are at most 256, any size. A sequence without tokens
/// hands its state through. The values of `g` are not checked: above 0 the state grows. Lengths have to be known to the host.
///
/// Where there are few heads for a GPU, long sequences are cut into segments that blocks walk side by side: once for what a
/// segment adds to a state of zero, once from the unit matrix for the matrix that it multiplies a state with, and, when a
/// small kernel has made the states at their starts of both, once for everything else. That is exact whatever the decay.
///
/// `states` holds bits of bf16: for each of the NT chunks and each head images of the state before it and of u, K and V rounded
/// up to multiples of 16, so 2 (K + 16) V bytes for 16 tokens; for f32 and f16 vectors two images whose sum they are. Nothing but
/// [`ChunkBwd`](crate::ChunkBwd) of the same version reads them.
///
/// # Numerics
///
/// Sums are taken in f32. The state is f32 from chunk to chunk; what is multiplied on tensor cores is rounded to bf16, or
/// split into two bf16 where vectors are f32 or f16. The error against the float64 recurrence stays under the rows
/// `dplr, chunk_fwd` of `fla_reference::tolerance`. Sums are taken in a fixed order: the same inputs give the same bits.
///
/// # Source
///
/// The DPLR form of the delta rule: Peng et al., "RWKV-7 Goose with Expressive Dynamic State Evolution",
/// arXiv:2503.14456.
#[derive(Debug)]
pub struct ChunkFwd<T> {
    walk: Walk<T>,
    of_segments: Option<OfSegments<T>>,
    writes: ChunkFwdWrites,
    shape: Shape,
}

/// What a pass over segments does first.
#[derive(Debug)]
struct OfSegments<T> {
    /// What each segment adds to a state of zero.
    values: Walk<T>,
    maps: Maps<T>,
}

const fn is_shareable<T: Send + Sync>() {}
// A plan may be made on one thread and run on others.
const _: () = is_shareable::<ChunkFwd<bf16>>();

impl<T: Element> ChunkFwd<T> {
    /// Checks the shape, compiles or loads the kernel, and uploads the offsets of packed sequences.
    ///
    /// # Errors
    ///
    /// [`Error::Dim`] when H, K or V is 0 or too large, for this GPU too, or there are too many sequences for a launch;
    /// [`Error::SeqLens`] when only the device knows the lengths; [`Error::Option`] when `scale` is not finite; [`Error::NoNvrtc`],
    /// [`Error::Compile`], [`Error::Driver`] or [`Error::OutOfMemory`] when the kernel cannot be had.
    pub fn new(device: &Device, shape: &Shape, options: &ChunkFwdOptions) -> Result<Self, Error> {
        let writes = match options.saved_states {
            SavedStates::Recomputed => ChunkFwdWrites::Output,
            SavedStates::Kept => ChunkFwdWrites::OutputAndStates,
        };
        Self::that_writes(device, shape, options, writes, HeadShares::whole(shape.h))
    }

    /// The plan of a backward pass that was given no states: it writes them and nothing else, share by share.
    pub(crate) fn of_states(
        device: &Device,
        shape: &Shape,
        options: &ChunkFwdOptions,
        shares: HeadShares,
    ) -> Result<Self, Error> {
        Self::that_writes(device, shape, options, ChunkFwdWrites::States, shares)
    }

    fn that_writes(
        device: &Device,
        shape: &Shape,
        options: &ChunkFwdOptions,
        writes: ChunkFwdWrites,
        shares: HeadShares,
    ) -> Result<Self, Error> {
        shape.check(MAX_K, MAX_V)?;
        let blocks = shape.h.saturating_mul(variant::<T>(device.arch(), shape, options).fwd_slices());
        // The same whatever is written, so that states have the same bits.
        let segments = Segments::new(&shape.seqs, blocks, device.sm_count() as usize);
        let Some(segments) = segments.filter(|_| shares.count == 1) else {
            let walk = Walk::of_shares(device, shape, options, writes, shares)?;
            return Ok(Self { walk, of_segments: None, writes, shape: shape.clone() });
        };
        tracing::debug!(segments = segments.seqs.n(), ?writes, "dplr chunk_fwd");
        let of_states = Shape { seqs: segments.seqs.clone(), ..shape.clone() };
        let maps = Maps::new(device, shape, &segments, options, Fold::Forward)?;
        let values = Walk::new(device, &of_states, options, ChunkFwdWrites::FinalState)?;
        Ok(Self {
            walk: Walk::new(device, &of_states, options, writes)?,
            of_segments: Some(OfSegments { values, maps }),
            writes,
            shape: shape.clone(),
        })
    }

    /// Elements of the output `states`.
    #[must_use]
    pub fn states_len(&self) -> usize {
        self.walk.states_len
    }

    /// Bytes of the workspace that a run needs: what segments do to a state, where sequences are cut into several. Never 0,
    /// which drivers refuse to allocate.
    #[must_use]
    pub fn workspace_bytes(&self) -> usize {
        Workspace::bytes(&self.of_segments.as_ref().map_or([0, 0], |of| of.maps.bytes())).max(256)
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
                check_len("states", "states_len() of the plan", self.states_len(), states.len())?;
            }
            (None, false) => {}
            (None, true) => return presence("must be given, since the plan is for states that are kept"),
            (Some(_), false) => return presence("must be absent, since the plan does not keep states"),
        }
        let wanted = Wanted {
            o: Some(&mut *y.o),
            final_state: y.final_state.as_deref_mut(),
            states: y.states.as_deref_mut(),
            first_h: 0,
        };
        self.launch(stream, x, wanted, workspace)
    }

    /// Runs a plan that [`Self::of_states`] made, for the share of heads that begins with head `first_h`.
    pub(crate) fn run_states(
        &self,
        stream: &CudaStream,
        x: &ChunkFwdInputs<'_, T>,
        (states, first_h): (&mut dyn DevicePtrMut<u16>, usize),
        workspace: &mut dyn DevicePtrMut<u8>,
    ) -> Result<(), Error> {
        let wanted = Wanted { states: Some(states), first_h, ..Wanted::NOTHING };
        self.launch(stream, x, wanted, workspace)
    }

    fn check_inputs(&self, x: &ChunkFwdInputs<'_, T>) -> Result<(), Error> {
        let k_len = self.shape.k_len();
        for (name, tensor) in [("q", x.q), ("k", x.k), ("a", x.a), ("b", x.b), ("g", x.g)] {
            check_len(name, "[B, T, H, K]", k_len, tensor.len())?;
        }
        check_len("v", "[B, T, H, V]", self.shape.v_len(), x.v.len())?;
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
        let Some(OfSegments { values, maps }) = &self.of_segments else {
            return self.walk.launch(stream, x, y);
        };
        // Later launches bind these, when the first has been queued.
        y.check_aligned(stream)?;
        if let Some(state) = x.initial_state {
            check_align("initial_state", state.device_ptr(stream).0)?;
        }
        let mut parts = maps.parts(&workspace)?;
        let from_zero = ChunkFwdInputs { initial_state: None, ..*x };
        let added = Wanted { final_state: Some(&mut parts.states), ..Wanted::NOTHING };
        values.launch(stream, &from_zero, added)?;
        maps.run(stream, x, &mut parts, Ends { first: x.initial_state, last: y.final_state.take() })?;
        self.walk.launch(stream, &ChunkFwdInputs { initial_state: Some(&parts.states), ..*x }, y)
    }
}

/// One launch: a walk over the chunks of every sequence, or of every segment.
#[derive(Debug)]
pub(crate) struct Walk<T> {
    kernel: Kernel<ChunkFwdParams<T>>,
    shape: Shape,
    cut: ChunkCut,
    /// Heads of a launch, and the elements of what it keeps of chunks.
    shares: HeadShares,
    states_len: usize,
    scale: f32,
    /// None when there is nothing to launch.
    grid: Option<Grid>,
}

impl<T: Element> Walk<T> {
    /// All heads at once. A map is of a shape whose V is K.
    pub(crate) fn new(
        device: &Device,
        shape: &Shape,
        options: &ChunkFwdOptions,
        writes: ChunkFwdWrites,
    ) -> Result<Self, Error> {
        Self::of_shares(device, shape, options, writes, HeadShares::whole(shape.h))
    }

    fn of_shares(
        device: &Device,
        shape: &Shape,
        options: &ChunkFwdOptions,
        writes: ChunkFwdWrites,
        shares: HeadShares,
    ) -> Result<Self, Error> {
        let scale = options.checked_scale()?;
        let variant = variant::<T>(device.arch(), shape, options);
        let room = Room::new(device, shape);
        let configs = [variant.fwd(&room, writes), variant.fwd_of_few_warps(&room)];
        device.check_smem(shape, variant.fwd_smem_bytes(&configs[0]))?;
        let (kernel, config) =
            kernel_that_fits(device, configs, |config| unit::<T>(&variant, config, writes))?;
        tracing::debug!(?variant, ?config, ?writes, "dplr chunk_fwd");
        let grid = Grid::of_heads(&of_share(shape, &shares), variant.slices(&config))?;
        let cut = ChunkCut::new(device, &shape.seqs, CHUNK)?;
        Ok(Self {
            kernel,
            states_len: states_len(&cut, &shares, &variant),
            shape: shape.clone(),
            cut,
            shares,
            scale,
            grid,
        })
    }

    /// Queues the walk.
    pub(crate) fn launch(
        &self,
        stream: &CudaStream,
        x: &ChunkFwdInputs<'_, T>,
        y: Wanted<'_, '_, T>,
    ) -> Result<(), Error> {
        let Shape { seqs, h, .. } = &self.shape;
        let Some(grid) = self.grid else { return Ok(()) };
        self.kernel.launch(stream, grid, |bind| ChunkFwdParams {
            q: bind.read("q", x.q),
            k: bind.read("k", x.k),
            v: bind.read("v", x.v),
            a: bind.read("a", x.a),
            b: bind.read("b", x.b),
            g: bind.read("g", x.g),
            initial_state: bind.read_opt("initial_state", x.initial_state),
            cu_seqlens: bind.read_opt("cu_seqlens", self.cut.cu_seqlens.as_ref()),
            chunk_offsets: bind.read_opt("chunk_offsets", self.cut.chunk_offsets.as_ref()),
            o: bind.write_opt("o", y.o),
            final_state: bind.write_opt("final_state", y.final_state),
            states: bind.write_opt("states", y.states),
            n: seqs.n() as i64,
            t: seqs.t() as i64,
            // The plan has checked that H fits.
            h: *h as i32,
            first_h: y.first_h as i32,
            heads: self.shares.heads as i32,
            scale: self.scale,
        })
    }
}

/// Outputs of a launch; their lengths have been checked.
pub(crate) struct Wanted<'a, 'b, T> {
    pub(crate) o: Option<&'a mut (dyn DevicePtrMut<T> + 'b)>,
    pub(crate) final_state: Option<&'a mut (dyn DevicePtrMut<f32> + 'b)>,
    pub(crate) states: Option<&'a mut (dyn DevicePtrMut<u16> + 'b)>,
    /// The first head of the share that is walked.
    pub(crate) first_h: usize,
}

impl<T> Wanted<'_, '_, T> {
    pub(crate) const NOTHING: Self = Self { o: None, final_state: None, states: None, first_h: 0 };

    /// Refuses a tensor that a launch would refuse.
    fn check_aligned(&mut self, stream: &CudaStream) -> Result<(), Error> {
        if let Some(o) = &mut self.o {
            check_align("o", o.device_ptr_mut(stream).0)?;
        }
        if let Some(state) = &mut self.final_state {
            check_align("final_state", state.device_ptr_mut(stream).0)?;
        }
        if let Some(states) = &mut self.states {
            check_align("states", states.device_ptr_mut(stream).0)?;
        }
        Ok(())
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
    let states = match options.saved_states {
        SavedStates::Recomputed => None,
        SavedStates::Kept => Some(device.alloc(&stream, plan.states_len())?),
    };
    let mut y = ChunkFwdResult {
        o: device.alloc(&stream, shape.v_len())?,
        final_state: device.alloc(&stream, shape.state_len())?,
        states,
    };
    let mut outputs = ChunkFwdOutputs {
        o: &mut y.o,
        final_state: Some(&mut y.final_state),
        states: y.states.as_mut().map(|states| states as &mut dyn DevicePtrMut<u16>),
    };
    let mut workspace = device.alloc::<u8>(&stream, plan.workspace_bytes())?;
    plan.run(&stream, x, &mut outputs, &mut workspace)?;
    Ok(y)
}

/// Bytes of a thread that may be spilled where nothing finds registers for all: addresses, once in a chunk.
pub(crate) const SPILL_LIMIT: u32 = 128;

/// The kernel of the first choice, or of the second where the first finds too few registers: for which heads that is, only the
/// assembler knows.
pub(crate) fn kernel_that_fits<P: Params>(
    device: &Device,
    [config, few_warps]: [ChunkConfig; 2],
    unit: impl Fn(&ChunkConfig) -> Unit,
) -> Result<(Kernel<P>, ChunkConfig), Error> {
    match device.kernel(&unit(&config)) {
        Err(error @ Error::Compile { .. }) => {
            tracing::warn!(%error, ?config, ?few_warps, "a dplr chunk pass runs with fewer warps");
            Ok((device.kernel(&unit(&few_warps).with_spill_limit(SPILL_LIMIT))?, few_warps))
        }
        kernel => Ok((kernel?, config)),
    }
}

/// Elements of what is kept of the chunks of a share. Saturates, so that a product that no memory holds fits no tensor.
pub(crate) fn states_len(cut: &ChunkCut, shares: &HeadShares, variant: &ChunkVariant) -> usize {
    cut.nt.saturating_mul(shares.heads).saturating_mul(variant.saved_len())
}

/// The shape that one launch of a share sees.
pub(crate) fn of_share(shape: &Shape, shares: &HeadShares) -> Shape {
    Shape { h: shares.heads, ..shape.clone() }
}

/// What a plan's kernels are compiled for.
pub(crate) fn variant<T: Element>(arch: Arch, shape: &Shape, options: &ChunkFwdOptions) -> ChunkVariant {
    let ChunkFwdOptions { transition, decay, .. } = *options;
    ChunkVariant { arch, dtype: T::DTYPE, k: shape.k, v: shape.v, transition, decay }
}

/// Heads and forms that are compiled ahead.
pub(crate) fn variants(arch: Arch) -> impl Iterator<Item = ChunkVariant> {
    let heads = [(64, 64), (128, 128), (256, 256), (60, 100), (33, 65)];
    let general = heads.map(|(k, v)| ChunkVariant {
        arch,
        dtype: bf16::DTYPE,
        k,
        v,
        transition: Transition::General,
        decay: Decay::Log,
    });
    let of_rwkv7 = [
        (Transition::General, Decay::Logit),
        (Transition::KeyAndRate, Decay::Log),
        (Transition::KeyAndRate, Decay::Logit),
    ];
    let of_rwkv7 = of_rwkv7.map(|(transition, decay)| ChunkVariant { transition, decay, ..general[0] });
    general.into_iter().chain(of_rwkv7)
}

/// Whether a variant is compiled ahead for f32 and f16 too: common heads, without RWKV-7's forms.
pub(crate) fn is_plain(variant: &ChunkVariant) -> bool {
    let ChunkVariant { k, v, transition, decay, .. } = *variant;
    transition == Transition::General && decay == Decay::Log && k == v && k <= 128
}

pub(crate) fn units(arch: Arch) -> Vec<Unit> {
    let room = Room::of_many_heads(arch);
    let mut out = Vec::new();
    for variant in variants(arch) {
        let [output, output_and_states, states] = all_units::<bf16>(&variant, &room);
        out.push(output_and_states);
        if (variant.k, variant.v) == (64, 64) {
            out.extend([output, states]);
            out.extend(units_of_segments::<bf16>(&variant, &room));
            out.extend(all_units::<bf16>(&variant, &Room::of_few_heads(arch)));
        }
        if is_plain(&variant) {
            let [_, output_and_states, _] = all_units::<f32>(&variant, &room);
            out.push(output_and_states);
            let [_, output_and_states, _] = all_units::<f16>(&variant, &room);
            out.push(output_and_states);
        }
    }
    out
}

/// The kernels of a variant in this type.
pub(crate) fn all_units<T: Element>(variant: &ChunkVariant, room: &Room) -> [Unit; 3] {
    let variant = ChunkVariant { dtype: T::DTYPE, ..*variant };
    ChunkFwdWrites::ALL.map(|writes| unit::<T>(&variant, &variant.fwd(room, writes), writes))
}

/// The kernels for what segments do to a state.
pub(crate) fn units_of_segments<T: Element>(variant: &ChunkVariant, room: &Room) -> [Unit; 2] {
    ChunkFwdWrites::OF_SEGMENTS.map(|writes| {
        let v = if writes == ChunkFwdWrites::Map { variant.k } else { variant.v };
        let variant = ChunkVariant { dtype: T::DTYPE, v, ..*variant };
        unit::<T>(&variant, &variant.fwd(room, writes), writes)
    })
}

fn unit<T: Element>(variant: &ChunkVariant, config: &ChunkConfig, writes: ChunkFwdWrites) -> Unit {
    let unit = Unit::new::<ChunkFwdParams<T>>("dplr", "chunk_fwd", SOURCE, config.threads())
        .with_smem_bytes(variant.fwd_smem_bytes(config) as u32);
    // Half of the registers hold the state, in two parts where it is an operand.
    let unit = if variant.is_tight() { unit.with_spill_limit(SPILL_LIMIT) } else { unit };
    with_constants::<T>(unit, variant, config)
        .with("OUTPUT", writes.output())
        .with("KEEP_STATES", writes.states())
        .with("UNIT", writes == ChunkFwdWrites::Map)
}

/// What both passes are compiled with.
pub(crate) fn with_constants<T: Element>(unit: Unit, variant: &ChunkVariant, config: &ChunkConfig) -> Unit {
    // All of these are below 2^31: `new` has checked K and V.
    unit.with_headers(HEADERS)
        .with("Element", T::DTYPE)
        .with("K", variant.k as i32)
        .with("V", variant.v as i32)
        .with("BV", config.bv as i32)
        .with("KEY_AND_RATE", variant.transition == Transition::KeyAndRate)
        .with("RAW_DECAY", variant.decay == Decay::Logit)
        .with("STAGES", config.stages as i32)
        .with("STATE_ROWS", config.state_rows as i32)
        .with("PREP_GROUPS", config.prep_groups as i32)
        .with("SCALE_WARPS", config.scale_warps as i32)
        .with("LOAD_WARP", config.load_warp)
}

/// Twin of `fla::dplr::ChunkFwdParams`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct ChunkFwdParams<T> {
    q: Ptr<T>,
    k: Ptr<T>,
    v: Ptr<T>,
    a: Ptr<T>,
    b: Ptr<T>,
    g: Ptr<T>,
    initial_state: Ptr<f32>,
    cu_seqlens: Ptr<i64>,
    chunk_offsets: Ptr<i64>,
    o: PtrMut<T>,
    final_state: PtrMut<f32>,
    states: PtrMut<u16>,
    n: i64,
    t: i64,
    h: i32,
    first_h: i32,
    heads: i32,
    scale: f32,
}

// SAFETY: `#[repr(C)]`, and the fields are listed in order.
unsafe impl<T: Element> Params for ChunkFwdParams<T> {
    const CUDA_TYPE: &'static str = "fla::dplr::ChunkFwdParams<Cfg::Element>";
    const FIELDS: &'static [Field] = &[
        Field::new("q", "const Cfg::Element*", offset_of!(Self, q)),
        Field::new("k", "const Cfg::Element*", offset_of!(Self, k)),
        Field::new("v", "const Cfg::Element*", offset_of!(Self, v)),
        Field::new("a", "const Cfg::Element*", offset_of!(Self, a)),
        Field::new("b", "const Cfg::Element*", offset_of!(Self, b)),
        Field::new("g", "const Cfg::Element*", offset_of!(Self, g)),
        Field::new("initial_state", "const float*", offset_of!(Self, initial_state)),
        Field::new("cu_seqlens", "const fla::i64*", offset_of!(Self, cu_seqlens)),
        Field::new("chunk_offsets", "const fla::i64*", offset_of!(Self, chunk_offsets)),
        Field::new("o", "Cfg::Element*", offset_of!(Self, o)),
        Field::new("final_state", "float*", offset_of!(Self, final_state)),
        Field::new("states", "fla::u16*", offset_of!(Self, states)),
        Field::new("n", "fla::i64", offset_of!(Self, n)),
        Field::new("t", "fla::i64", offset_of!(Self, t)),
        Field::new("h", "fla::i32", offset_of!(Self, h)),
        Field::new("first_h", "fla::i32", offset_of!(Self, first_h)),
        Field::new("heads", "fla::i32", offset_of!(Self, heads)),
        Field::new("scale", "float", offset_of!(Self, scale)),
    ];
}

#[cfg(test)]
mod tests {
    use super::{
        Arch, ChunkVariant, Decay, Element, Room, Transition, all_units, bf16, f16, units_of_segments,
    };
    use crate::chunk_bwd::{self, Grads};
    use fla_core::compile::compile;
    use fla_core::testing::nvrtc;

    const GRADS: [Grads; 2] = [Grads::OfTokens, Grads::OfState];

    /// A plan of any shape has to find registers: what spills is refused, and the shape with it.
    fn failures<T: Element>(heads: &[(usize, usize)]) -> Vec<String> {
        let mut failures = Vec::new();
        for (i, &(k, v)) in heads.iter().enumerate() {
            // The forms differ by a product a row; each is met by some heads.
            let transition = if i % 2 == 0 { Transition::General } else { Transition::KeyAndRate };
            let decay = if i % 4 < 2 { Decay::Log } else { Decay::Logit };
            let variant = ChunkVariant { arch: Arch::SM_90, dtype: T::DTYPE, k, v, transition, decay };
            let mut units = Vec::new();
            for room in [Room::of_many_heads(Arch::SM_90), Room::of_few_heads(Arch::SM_90)] {
                units.extend(GRADS.map(|grads| chunk_bwd::any_unit::<T>(&variant, &room, grads)));
                units.extend(all_units::<T>(&variant, &room));
                units.extend(units_of_segments::<T>(&variant, &room));
            }
            units.dedup_by_key(|unit| unit.text());
            failures.extend(
                units.iter().filter_map(|unit| compile(unit, Arch::SM_90).err()).map(|e| e.to_string()),
            );
        }
        failures
    }

    #[test]
    fn no_shape_spills() {
        if !nvrtc("chunk passes: no_shape_spills") {
            return;
        }
        // Heads that end within a tile, within a slice of V, and at the limits.
        const HEADS: &[(usize, usize)] = &[(1, 1), (33, 65), (60, 100), (64, 64), (128, 128), (255, 256)];
        const OF_TWO_PARTS: &[(usize, usize)] =
            &[(1, 1), (33, 65), (60, 100), (64, 64), (128, 128), (256, 256)];
        let failures = std::thread::scope(|scope| {
            let other = scope.spawn(|| failures::<f32>(OF_TWO_PARTS));
            let mut all = failures::<bf16>(HEADS);
            all.extend(failures::<f16>(&OF_TWO_PARTS[3..]));
            all.extend(other.join().expect("does not panic"));
            all
        });
        assert!(failures.is_empty(), "{} units\n{}", failures.len(), failures.join("\n"));
    }
}
