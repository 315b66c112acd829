//! The recurrent forward pass: token by token, with states in place or in pools, as servers decode.

use std::mem::offset_of;
use std::sync::Arc;

use fla_core::cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DeviceSlice};
use fla_core::{
    Arch, DType, Device, Element, Error, Field, FinalState, Grid, Kernel, Params, Ptr, PtrMut, Source,
    StateTensors, States, Unit, check_len,
};
use half::{bf16, f16};

use crate::chunk_fwd::{COMMON_C, OTHER_C};
use crate::config::{self, Lanes};
use crate::shape::Shape;

const SOURCE: Source =
    Source { name: "fla/rwkv4/recurrent_fwd.cu", text: include_str!("../kernels/recurrent_fwd.cu") };
const HEADERS: &[Source] =
    &[Source { name: "fla/rwkv4/average.cuh", text: include_str!("../kernels/average.cuh") }];

/// What may be changed; nothing yet.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct RecurrentFwdOptions {}

impl RecurrentFwdOptions {
    /// The options; RWKV-4 asks for none.
    #[must_use]
    #[allow(
        clippy::new_without_default,
        reason = "options have no default: one without a safe value may be added"
    )]
    pub const fn new() -> Self {
        Self {}
    }
}

/// What the pass reads. Contiguous, each at a multiple of 16 bytes.
#[derive(Clone, Copy)]
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub struct RecurrentFwdInputs<'a, T> {
    /// Raw decay: a token multiplies the sums before it by `exp(-exp(w))`: `[C]`.
    pub w: &'a dyn DevicePtr<f32>,
    /// Bonus of the current token, in log space: `[C]`.
    pub u: &'a dyn DevicePtr<f32>,
    /// Keys, which are log weights: `[B, T, C]`.
    pub k: &'a dyn DevicePtr<T>,
    /// Values: `[B, T, C]`.
    pub v: &'a dyn DevicePtr<T>,
    /// Numerator, denominator and exponent before the first token of each sequence: `[N, 3, 1, C]`. The fresh state
    /// (0, 0, -1e38) when absent, unless [`RecurrentFwdOutputs::final_state`] holds the states.
    pub initial_state: Option<&'a dyn DevicePtr<f32>>,
    /// Offsets of the sequences, for [`SeqLens::packed_on_device`](fla_core::SeqLens::packed_on_device) only: `[N + 1]`.
    pub cu_seqlens: Option<&'a dyn DevicePtr<i64>>,
}

/// What the pass writes, whole.
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub struct RecurrentFwdOutputs<'a, T> {
    /// Outputs: `[B, T, C]`.
    pub o: &'a mut dyn DevicePtrMut<T>,
    /// State after the last token of each sequence: `[N, 3, 1, C]`, or slots of a pool `[S, 3, 1, C]`.
    pub final_state: FinalState<'a, f32>,
    /// State after every token, when wanted: `[B, T, 3, 1, C]`.
    pub token_states: Option<&'a mut dyn DevicePtrMut<f32>>,
}

/// What the one-call form returns.
#[derive(Debug)]
pub struct RecurrentFwdResult<T> {
    /// Outputs: `[B, T, C]`.
    pub o: CudaSlice<T>,
    /// State after the last token of each sequence: `[N, 3, 1, C]`.
    pub final_state: CudaSlice<f32>,
}

/// The recurrent forward pass of RWKV-4's time mixing, made once for a shape and run many times.
///
/// ```text
/// m = max(u + k_t, e)      o_t = (exp(e - m) a + exp(u + k_t - m) v_t) / (exp(e - m) b + exp(u + k_t - m))
/// e' = max(l + e, k_t)     a <- exp(l + e - e') a + exp(k_t - e') v_t        b <- the same with v_t = 1
/// ```
///
/// with the log decay l = -exp(w) and the state (a, b, e):
///
/// | tensor               | shape             | dtype | meaning                                           |
/// |----------------------|-------------------|-------|---------------------------------------------------|
/// | `w`, `u`             | `[C]`             | f32   | raw decay, bonus of the current token             |
/// | `k`, `v`             | `[B, T, C]`       | `T`   | keys (log weights, natural base), values          |
/// | `initial_state`      | `[N, 3, 1, C]`    | f32   | optional; (0, 0, -1e38) when absent               |
/// | `cu_seqlens`         | `[N + 1]`         | i64   | only where the host does not know the lengths     |
/// | `o` (out)            | `[B, T, C]`       | `T`   | outputs                                           |
/// | `final_state` (out)  | `[N, 3, 1, C]`    | f32   | optional: new, in place, or in a pool `[S, ..]`   |
/// | `token_states` (out) | `[B, T, 3, 1, C]` | f32   | optional: the state after every token             |
///
/// `T` is f32, bf16 or f16, and a state f32 whatever `T` is; C is any number up to 2^20. A sequence without tokens hands
/// its state through, bit by bit. A server passes its pool of states with [`FinalState::Pool`], and captures the call in
/// a graph. Long sequences belong to [`ChunkFwd`](crate::ChunkFwd), which spreads them over the GPU.
///
/// # Numerics
///
/// Everything is f32; `o` is rounded once. The state between two tokens is the one that memory holds, so a call of many
/// tokens gives the bits of many calls. What the rounding of the exponent e leaves over goes into a and b, so slow decays
/// are not lost however many tokens there are. The error against the float64 recurrence stays under the rows
/// `rwkv4, recurrent_fwd` of `fla_reference::tolerance`.
///
/// # Source
///
/// Peng et al., "RWKV: Reinventing RNNs for the Transformer Era", arXiv:2305.13048.
#[derive(Debug)]
pub struct RecurrentFwd<T> {
    kernel: Kernel<RecurrentFwdParams<T>>,
    shape: Shape,
    cu_seqlens: Option<CudaSlice<i64>>,
    /// None when there is nothing to launch.
    grid: Option<Grid>,
}

const fn is_shareable<T: Send + Sync>() {}
// A plan may be made on one thread and run on others.
const _: () = is_shareable::<RecurrentFwd<bf16>>();

impl<T: Element> RecurrentFwd<T> {
    /// Checks the shape, compiles or loads the kernel, and uploads the offsets of packed sequences.
    ///
    /// # Errors
    ///
    /// [`Error::Dim`] when C is 0 or too large, or there are too many sequences for a launch; [`Error::NoNvrtc`],
    /// [`Error::Compile`], [`Error::Driver`] or [`Error::OutOfMemory`] when the kernel cannot be had.
    pub fn new(device: &Device, shape: &Shape, _options: &RecurrentFwdOptions) -> Result<Self, Error> {
        shape.check()?;
        let lanes = config::recurrent_fwd(shape, device.sm_count());
        tracing::debug!(c = shape.c, ?lanes, "rwkv4 recurrent_fwd");
        let grid = grid(shape, lanes)?;
        let kernel = device.kernel(&unit::<T>(shape.c, lanes))?;
        let cu_seqlens = shape.seqs.cu_seqlens().map(|offsets| device.upload_offsets(offsets)).transpose()?;
        Ok(Self { kernel, shape: shape.clone(), cu_seqlens, grid })
    }

    /// Queues the pass on `stream`. Allocates nothing, never synchronises, and can be captured in a graph.
    ///
    /// # Errors
    ///
    /// [`Error::Len`], [`Error::Align`] and [`Error::Presence`], which name the tensor; [`Error::Context`] when the
    /// stream belongs to another context; [`Error::Driver`] when the launch is refused. Nothing has been launched then.
    pub fn run(
        &self,
        stream: &CudaStream,
        x: &RecurrentFwdInputs<'_, T>,
        y: &mut RecurrentFwdOutputs<'_, T>,
    ) -> Result<(), Error> {
        let Shape { seqs, c } = &self.shape;
        check_len("w", "[C]", *c, x.w.len())?;
        check_len("u", "[C]", *c, x.u.len())?;
        check_len("k", "[B, T, C]", self.shape.token_len(), x.k.len())?;
        check_len("v", "[B, T, C]", self.shape.token_len(), x.v.len())?;
        check_len("o", "[B, T, C]", self.shape.token_len(), y.o.len())?;
        seqs.check_cu_seqlens(x.cu_seqlens.map(DeviceSlice::len))?;
        let state_shape = self.shape.state_shape();
        let states = StateTensors {
            initial_state: x.initial_state,
            final_state: &mut y.final_state,
            token_states: y.token_states.as_deref_mut(),
        };
        states.check(&state_shape)?;
        let Some(grid) = self.grid else { return Ok(()) };
        self.kernel.launch(stream, grid, |bind| RecurrentFwdParams {
            w: bind.read("w", x.w),
            u: bind.read("u", x.u),
            k: bind.read("k", x.k),
            v: bind.read("v", x.v),
            cu_seqlens: match x.cu_seqlens {
                Some(offsets) => bind.read("cu_seqlens", offsets),
                None => bind.read_opt("cu_seqlens", self.cu_seqlens.as_ref()),
            },
            o: bind.write("o", &mut *y.o),
            states: states.bind(bind, &state_shape),
            n: seqs.n() as i64,
            t: seqs.t() as i64,
        })
    }
}

/// Makes the plan, allocates the outputs and runs, on the stream of `k`.
///
/// The compiled kernel comes from the device's cache, so a second call costs no compilation; but for decoding keep a
/// [`RecurrentFwd`], which allocates nothing and takes states in every place.
///
/// # Errors
///
/// As [`RecurrentFwd::new`] and [`RecurrentFwd::run`].
pub fn recurrent_fwd<T: Element>(
    device: &Device,
    shape: &Shape,
    x: &RecurrentFwdInputs<'_, T>,
    options: &RecurrentFwdOptions,
) -> Result<RecurrentFwdResult<T>, Error> {
    let plan = RecurrentFwd::new(device, shape, options)?;
    let stream: Arc<CudaStream> = x.k.stream().clone();
    let mut y = RecurrentFwdResult {
        o: device.alloc(&stream, shape.token_len())?,
        final_state: device.alloc(&stream, shape.state_len())?,
    };
    let final_state = FinalState::New(&mut y.final_state);
    plan.run(&stream, x, &mut RecurrentFwdOutputs { o: &mut y.o, final_state, token_states: None })?;
    Ok(y)
}

/// The blocks of the launch; none when there is no sequence.
fn grid(shape: &Shape, lanes: Lanes) -> Result<Option<Grid>, Error> {
    let slices = shape.c.div_ceil(32 * lanes.cols);
    // The kernel counts warps in 31 bits.
    match i32::try_from(shape.seqs.n().saturating_mul(slices)) {
        Ok(0) => Ok(None),
        Ok(warps) => Ok(Some(Grid::x((warps as u32).div_ceil(lanes.warps as u32)))),
        Err(_) => {
            let wanted = format!("at most {} with so many channels", i32::MAX as usize / slices);
            Err(Error::Dim { dim: "N", wanted, got: shape.seqs.n() })
        }
    }
}

pub(crate) fn units(_arch: Arch) -> Vec<Unit> {
    let all = |channels: &[usize], unit: fn(usize, Lanes) -> Unit| -> Vec<Unit> {
        let lanes = |c: usize| config::recurrent_fwd_all(c).map(move |lanes| unit(c, lanes));
        channels.iter().flat_map(|&c| lanes(c)).collect()
    };
    [all(COMMON_C, unit::<bf16>), all(OTHER_C, unit::<f32>), all(&OTHER_C[..1], unit::<f16>)].concat()
}

fn unit<T: Element>(c: usize, lanes: Lanes) -> Unit {
    // All of these are below 2^31: `new` has checked C.
    Unit::new::<RecurrentFwdParams<T>>("rwkv4", "recurrent_fwd", SOURCE, lanes.warps as u32 * 32)
        .with_headers(HEADERS)
        .with("Element", T::DTYPE)
        .with("State", DType::F32)
        .with("C", c as i32)
        .with("COLS", lanes.cols as i32)
        .with("WARPS", lanes.warps as i32)
}

/// Twin of `fla::rwkv4::RecurrentFwdParams`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct RecurrentFwdParams<T> {
    w: Ptr<f32>,
    u: Ptr<f32>,
    k: Ptr<T>,
    v: Ptr<T>,
    cu_seqlens: Ptr<i64>,
    o: PtrMut<T>,
    states: States<f32>,
    n: i64,
    t: i64,
}

// SAFETY: `#[repr(C)]`, and the fields are listed in order.
unsafe impl<T: Element> Params for RecurrentFwdParams<T> {
    const CUDA_TYPE: &'static str = "fla::rwkv4::RecurrentFwdParams<Cfg::Element, Cfg::State>";
    const FIELDS: &'static [Field] = &[
        Field::new("w", "const float*", offset_of!(Self, w)),
        Field::new("u", "const float*", offset_of!(Self, u)),
        Field::new("k", "const Cfg::Element*", offset_of!(Self, k)),
        Field::new("v", "const Cfg::Element*", offset_of!(Self, v)),
        Field::new("cu_seqlens", "const fla::i64*", offset_of!(Self, cu_seqlens)),
        Field::new("o", "Cfg::Element*", offset_of!(Self, o)),
        Field::nested::<States<f32>>("states", offset_of!(Self, states)),
        Field::new("n", "fla::i64", offset_of!(Self, n)),
        Field::new("t", "fla::i64", offset_of!(Self, t)),
    ];
}
