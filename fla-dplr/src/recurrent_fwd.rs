//! The recurrent forward pass: a fused loop over tokens that keeps the state on chip.

use std::mem::offset_of;
use std::sync::Arc;

use fla_core::cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DeviceSlice};
use fla_core::{
    Arch, DType, Device, Element, Error, Field, FinalState, Grid, Kernel, Params, Ptr, PtrMut, Shape, Source,
    StateElement, StateStream, StateTensors, States, Unit, check_len,
};
use half::{bf16, f16};

use crate::config::{RecurrentFwdConfig, RecurrentFwdStream, RecurrentFwdVariant};

/// Largest K and V: a warp holds whole columns of the state in registers.
pub(crate) const MAX_K: usize = 256;
pub(crate) const MAX_V: usize = 512;

const SOURCE: Source =
    Source { name: "fla/dplr/recurrent_fwd.cu", text: include_str!("../kernels/recurrent_fwd.cu") };
const SOURCE_SM90: Source =
    Source { name: "fla/dplr/recurrent_fwd_sm90.cu", text: include_str!("../kernels/recurrent_fwd_sm90.cu") };
pub(crate) const HEADERS: &[Source] =
    &[Source { name: "fla/dplr/recurrent_fwd.cuh", text: include_str!("../kernels/recurrent_fwd.cuh") }];

/// How `a` and `b` make the low-rank part of the transition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transition {
    /// As they are: `diag(e^g) + b a^T`.
    General,
    /// `a` is a key, of unit length where the state is to stay bounded, and `b` its rate for each channel:
    /// `diag(e^g) - (a ⊙ b) a^T`, formed in f32 inside the kernel. RWKV-7 decodes from this form.
    KeyAndRate,
}

/// What has no safe default, and what may be changed.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct RecurrentFwdOptions {
    /// Factor of the output; `K^-0.5` and 1 are both common, so it must be said.
    pub scale: f32,
    /// What `a` and `b` are; [`Transition::General`] unless changed.
    pub transition: Transition,
}

impl RecurrentFwdOptions {
    /// The options with this factor of the output.
    #[must_use]
    pub const fn new(scale: f32) -> Self {
        Self { scale, transition: Transition::General }
    }

    /// The scale, when it is one.
    pub(crate) fn checked_scale(&self) -> Result<f32, Error> {
        if self.scale.is_finite() {
            return Ok(self.scale);
        }
        Err(Error::Option { option: "scale", wanted: "finite", got: self.scale.to_string() })
    }

    /// Changes what `a` and `b` are.
    #[must_use]
    pub const fn with_transition(mut self, transition: Transition) -> Self {
        self.transition = transition;
        self
    }
}

/// What the pass reads. Contiguous, each at a multiple of 16 bytes.
#[derive(Clone, Copy)]
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub struct RecurrentFwdInputs<'a, T, S = f32> {
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
    /// Log decay, natural base, at most 0: `[B, T, H, K]`.
    pub g: &'a dyn DevicePtr<T>,
    /// State before the first token of each sequence: `[N, H, K, V]`. Zero when absent, unless
    /// [`RecurrentFwdOutputs::final_state`] holds the states.
    pub initial_state: Option<&'a dyn DevicePtr<S>>,
    /// Offsets of the sequences, for [`SeqLens::packed_on_device`](fla_core::SeqLens::packed_on_device) only: `[N + 1]`.
    pub cu_seqlens: Option<&'a dyn DevicePtr<i64>>,
}

/// What the pass writes, whole.
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub struct RecurrentFwdOutputs<'a, T, S = f32> {
    /// Outputs: `[B, T, H, V]`.
    pub o: &'a mut dyn DevicePtrMut<T>,
    /// State after the last token of each sequence: `[N, H, K, V]`, or slots of a pool `[S, H, K, V]`.
    pub final_state: FinalState<'a, S>,
    /// State after every token, when wanted: `[B, T, H, K, V]`.
    pub token_states: Option<&'a mut dyn DevicePtrMut<S>>,
}

/// What the one-call form returns.
#[derive(Debug)]
pub struct RecurrentFwdResult<T> {
    /// Outputs: `[B, T, H, V]`.
    pub o: CudaSlice<T>,
    /// State after the last token of each sequence: `[N, H, K, V]`.
    pub final_state: CudaSlice<f32>,
}

/// The recurrent forward pass of the DPLR delta rule, made once for a shape and run many times.
///
/// ```text
/// S_t = (diag(e^{g_t}) + b_t a_t^T) S_{t-1} + k_t v_t^T        o_t = scale S_t^T q_t
/// ```
///
/// | tensor               | shape             | dtype | meaning                                         |
/// |----------------------|-------------------|-------|-------------------------------------------------|
/// | `q`, `k`, `a`, `b`   | `[B, T, H, K]`    | `T`   | queries, keys, low-rank transition              |
/// | `v`                  | `[B, T, H, V]`    | `T`   | values                                          |
/// | `g`                  | `[B, T, H, K]`    | `T`   | log decay, natural base, at most 0              |
/// | `initial_state`      | `[N, H, K, V]`    | `S`   | optional; zero when absent                      |
/// | `cu_seqlens`         | `[N + 1]`         | i64   | only where the host does not know the lengths   |
/// | `o` (out)            | `[B, T, H, V]`    | `T`   | outputs                                         |
/// | `final_state` (out)  | `[N, H, K, V]`    | `S`   | optional: new, in place, or in a pool `[S, ..]` |
/// | `token_states` (out) | `[B, T, H, K, V]` | `S`   | optional: the state after every token           |
///
/// `T` is f32, bf16 or f16 and `S` f32 or bf16; K is at most 256 and V at most 512, any size. A sequence without
/// tokens hands its state through. The values of `g` are not checked: above 0 the state grows, which the operator
/// computes as asked. A server passes its pool of states with [`FinalState::Pool`], and captures the call in a graph.
///
/// # Numerics
///
/// Everything is widened to f32, the state too, which is rounded to `S` where it is stored; `o` is rounded once. The error against the
/// float64 recurrence stays under the rows `dplr, recurrent_fwd` of `fla_reference::tolerance`. Sums are taken
/// in a fixed order: the same inputs give the same bits.
///
/// A decay is one f32 number, off by up to 2.4e-7 of itself. A gate that stays the same is off alike at every
/// token, so what the state still holds of a token n steps back can be off by n times that.
///
/// # Source
///
/// The DPLR form of the delta rule: Peng et al., "RWKV-7 Goose with Expressive Dynamic State Evolution",
/// arXiv:2503.14456.
#[derive(Debug)]
pub struct RecurrentFwd<T, S = f32> {
    kernel: Kernel<RecurrentFwdParams<T, S>>,
    shape: Shape,
    cu_seqlens: Option<CudaSlice<i64>>,
    scale: f32,
    /// None when there is nothing to launch.
    grid: Option<Grid>,
}

const fn is_shareable<T: Send + Sync>() {}
// A plan may be made on one thread and run on others.
const _: () = is_shareable::<RecurrentFwd<bf16>>();

impl<T: Element, S: StateElement> RecurrentFwd<T, S> {
    /// Checks the shape, compiles or loads the kernel, and uploads the offsets of packed sequences.
    ///
    /// # Errors
    ///
    /// [`Error::Dim`] when H, K or V is 0 or too large; [`Error::Option`] when `scale` is not finite;
    /// [`Error::NoNvrtc`], [`Error::Compile`], [`Error::Driver`] or [`Error::OutOfMemory`] when the kernel cannot
    /// be had.
    pub fn new(device: &Device, shape: &Shape, options: &RecurrentFwdOptions) -> Result<Self, Error> {
        shape.check(MAX_K, MAX_V)?;
        let scale = options.checked_scale()?;
        let one_token = shape.seqs.is_dense() && shape.seqs.t() == 1;
        let variant = RecurrentFwdVariant {
            arch: device.arch(),
            dtype: T::DTYPE,
            state: S::DTYPE,
            k: shape.k,
            v: shape.v,
            one_token,
            transition: options.transition,
        };
        let states = shape.seqs.n().saturating_mul(shape.h);
        let (unit, grid) = match stream_launch(&variant, shape, device) {
            Some((config, blocks)) => {
                tracing::debug!(?variant, ?config, blocks, "dplr recurrent_fwd streams its states");
                (unit_sm90::<T, S>(&variant, &config), Some(Grid::x(blocks)))
            }
            None => {
                let config = variant.choose(states, device.sm_count());
                tracing::debug!(?variant, ?config, "dplr recurrent_fwd");
                let grid = variant.tile().grid("N * H", states, config.lanes_v, config.warps)?;
                (unit::<T, S>(&variant, &config), grid)
            }
        };
        let kernel = device.kernel(&unit)?;
        let cu_seqlens = shape.seqs.cu_seqlens().map(|offsets| device.upload_offsets(offsets)).transpose()?;
        Ok(Self { kernel, shape: shape.clone(), cu_seqlens, scale, grid })
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
        x: &RecurrentFwdInputs<'_, T, S>,
        y: &mut RecurrentFwdOutputs<'_, T, S>,
    ) -> Result<(), Error> {
        let Shape { seqs, h, .. } = &self.shape;
        let (k_len, v_len) = (self.shape.k_len(), self.shape.v_len());
        for (name, tensor) in [("q", x.q), ("k", x.k), ("a", x.a), ("b", x.b), ("g", x.g)] {
            check_len(name, "[B, T, H, K]", k_len, tensor.len())?;
        }
        check_len("v", "[B, T, H, V]", v_len, x.v.len())?;
        check_len("o", "[B, T, H, V]", v_len, y.o.len())?;
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
            q: bind.read("q", x.q),
            k: bind.read("k", x.k),
            v: bind.read("v", x.v),
            a: bind.read("a", x.a),
            b: bind.read("b", x.b),
            g: bind.read("g", x.g),
            cu_seqlens: match x.cu_seqlens {
                Some(offsets) => bind.read("cu_seqlens", offsets),
                None => bind.read_opt("cu_seqlens", self.cu_seqlens.as_ref()),
            },
            o: bind.write("o", &mut *y.o),
            states: states.bind(bind, &state_shape),
            n: seqs.n() as i64,
            t: seqs.t() as i64,
            // `new` has checked that H fits.
            h: *h as i32,
            scale: self.scale,
        })
    }
}

/// Makes the plan, allocates the outputs and runs, on the stream of `q`.
///
/// The compiled kernel comes from the device's cache, so a second call costs no compilation; but for decoding
/// keep a [`RecurrentFwd`], which allocates nothing and takes states of every type.
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
    let plan = RecurrentFwd::<T>::new(device, shape, options)?;
    let stream: Arc<CudaStream> = x.q.stream().clone();
    let mut y = RecurrentFwdResult {
        o: device.alloc(&stream, shape.v_len())?,
        final_state: device.alloc(&stream, shape.state_len())?,
    };
    let final_state = FinalState::New(&mut y.final_state);
    plan.run(&stream, x, &mut RecurrentFwdOutputs { o: &mut y.o, final_state, token_states: None })?;
    Ok(y)
}

/// Whether the states stream through shared memory, and with how many blocks.
fn stream_launch(
    variant: &RecurrentFwdVariant,
    shape: &Shape,
    device: &Device,
) -> Option<(RecurrentFwdStream, u32)> {
    let config = RecurrentFwdStream::new(variant, device.smem_bytes() as usize)?;
    let states = shape.seqs.n().saturating_mul(shape.h);
    // The kernel counts states in 31 bits; more fall to the other kernel, which refuses them by name.
    let blocks = RecurrentFwdStream::blocks(variant, states, device.sm_count())
        .filter(|_| i32::try_from(states).is_ok())?;
    Some((config, blocks))
}

pub(crate) fn units(arch: Arch) -> Vec<Unit> {
    let mut out = Vec::new();
    for (k, v) in [(64, 64), (128, 128), (256, 256), (60, 100), (33, 65)] {
        for one_token in [true, false] {
            let transition = Transition::General;
            let (dtype, state) = (DType::F32, DType::F32);
            let variant = RecurrentFwdVariant { arch, dtype, state, k, v, one_token, transition };
            out.extend(all_units::<f32, f32>(&variant));
            out.extend(all_units::<bf16, f32>(&variant));
            out.extend(all_units::<f16, f32>(&variant));
            if k == 64 {
                out.extend(all_units::<bf16, bf16>(&variant));
                out.extend(all_units::<bf16, f32>(&RecurrentFwdVariant {
                    transition: Transition::KeyAndRate,
                    ..variant
                }));
            }
        }
    }
    out
}

fn all_units<T: Element, S: StateElement>(variant: &RecurrentFwdVariant) -> impl Iterator<Item = Unit> {
    let variant = RecurrentFwdVariant { dtype: T::DTYPE, state: S::DTYPE, ..*variant };
    // The shared memory that a block can ask for on sm_90, sm_100 and sm_120.
    let smem_bytes = if variant.arch.major() >= 12 { 99 << 10 } else { 227 << 10 };
    let stream = RecurrentFwdStream::new(&variant, smem_bytes);
    let stream = stream.map(|config| unit_sm90::<T, S>(&variant, &config));
    let direct: Vec<Unit> = variant.all().map(|config| unit::<T, S>(&variant, &config)).collect();
    direct.into_iter().chain(stream)
}

fn unit<T: Element, S: StateElement>(variant: &RecurrentFwdVariant, config: &RecurrentFwdConfig) -> Unit {
    // All of these are below 2^31: `new` has checked K and V.
    Unit::new::<RecurrentFwdParams<T, S>>("dplr", "recurrent_fwd", SOURCE, config.warps as u32 * 32)
        .with_headers(HEADERS)
        .with_min_blocks(config.min_blocks)
        .with_smem_bytes(config.smem_bytes(variant) as u32)
        .with("Element", T::DTYPE)
        .with("State", S::DTYPE)
        .with("K", variant.k as i32)
        .with("V", variant.v as i32)
        .with("LANES_V", config.lanes_v as i32)
        .with("WARPS", config.warps as i32)
        .with("ONE_TOKEN", variant.one_token)
        .with("KEY_AND_RATE", variant.transition == Transition::KeyAndRate)
        .with("PREFETCH", config.prefetch)
        .with("RING", config.ring as i32)
}

fn unit_sm90<T: Element, S: StateElement>(
    variant: &RecurrentFwdVariant,
    config: &RecurrentFwdStream,
) -> Unit {
    let StateStream { lanes_v, warps, groups, slots } = config.groups;
    Unit::new::<RecurrentFwdParams<T, S>>("dplr", "recurrent_fwd", SOURCE_SM90, config.groups.threads())
        .with_headers(HEADERS)
        .with_smem_bytes(config.smem_bytes(variant) as u32)
        .with("Element", T::DTYPE)
        .with("State", S::DTYPE)
        .with("K", variant.k as i32)
        .with("V", variant.v as i32)
        .with("TOKENS", 1)
        .with("LANES_V", lanes_v as i32)
        .with("WARPS", warps as i32)
        .with("KEY_AND_RATE", variant.transition == Transition::KeyAndRate)
        .with("GROUPS", groups as i32)
        .with("SLOTS", slots as i32)
}

/// Twin of `fla::dplr::RecurrentFwdParams`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct RecurrentFwdParams<T, S> {
    q: Ptr<T>,
    k: Ptr<T>,
    v: Ptr<T>,
    a: Ptr<T>,
    b: Ptr<T>,
    g: Ptr<T>,
    cu_seqlens: Ptr<i64>,
    o: PtrMut<T>,
    states: States<S>,
    n: i64,
    t: i64,
    h: i32,
    scale: f32,
}

// SAFETY: `#[repr(C)]`, and the fields are listed in order.
unsafe impl<T: Element, S: StateElement> Params for RecurrentFwdParams<T, S> {
    const CUDA_TYPE: &'static str = "fla::dplr::RecurrentFwdParams<Cfg::Element, Cfg::State>";
    const FIELDS: &'static [Field] = &[
        Field::new("q", "const Cfg::Element*", offset_of!(Self, q)),
        Field::new("k", "const Cfg::Element*", offset_of!(Self, k)),
        Field::new("v", "const Cfg::Element*", offset_of!(Self, v)),
        Field::new("a", "const Cfg::Element*", offset_of!(Self, a)),
        Field::new("b", "const Cfg::Element*", offset_of!(Self, b)),
        Field::new("g", "const Cfg::Element*", offset_of!(Self, g)),
        Field::new("cu_seqlens", "const fla::i64*", offset_of!(Self, cu_seqlens)),
        Field::new("o", "Cfg::Element*", offset_of!(Self, o)),
        Field::nested::<States<S>>("states", offset_of!(Self, states)),
        Field::new("n", "fla::i64", offset_of!(Self, n)),
        Field::new("t", "fla::i64", offset_of!(Self, t)),
        Field::new("h", "fla::i32", offset_of!(Self, h)),
        Field::new("scale", "float", offset_of!(Self, scale)),
    ];
}

#[cfg(test)]
mod tests {
    use super::{Arch, Element, RecurrentFwdVariant, StateElement, Transition, all_units, bf16};
    use fla_core::compile::compile;
    use fla_core::testing::nvrtc;

    /// A plan of any shape has to find registers: what spills is refused, and the shape with it.
    fn failures<T: Element, S: StateElement>(heads: &[(usize, usize)]) -> Vec<String> {
        let mut failures = Vec::new();
        for &(k, v) in heads {
            // The two transitions differ by a product a row; the even heads stand for all.
            let both: &[Transition] = &[Transition::General, Transition::KeyAndRate];
            let transitions = if k == v { both } else { &both[..1] };
            for (one_token, transition) in
                [true, false].into_iter().flat_map(|one| transitions.iter().map(move |t| (one, *t)))
            {
                let (arch, dtype, state) = (Arch::SM_90, T::DTYPE, S::DTYPE);
                let variant = RecurrentFwdVariant { arch, dtype, state, k, v, one_token, transition };
                let units = all_units::<T, S>(&variant);
                failures.extend(
                    units.filter_map(|unit| compile(&unit, Arch::SM_90).err()).map(|e| e.to_string()),
                );
            }
        }
        failures
    }

    #[test]
    fn no_shape_spills() {
        if !nvrtc("no_shape_spills") {
            return;
        }
        // Heads whose rows end anywhere: within an access, within a lane, within a warp.
        const HEADS: &[(usize, usize)] = &[
            (7, 20),
            (33, 64),
            (48, 63),
            (64, 64),
            (64, 95),
            (96, 31),
            (100, 72),
            (128, 128),
            (200, 20),
            (255, 512),
            (256, 256),
        ];
        let failures = std::thread::scope(|scope| {
            let other = scope.spawn(|| failures::<f32, f32>(HEADS));
            let mut all = failures::<bf16, f32>(HEADS);
            all.extend(failures::<bf16, bf16>(&[(33, 64), (64, 64), (128, 128), (255, 512)]));
            all.extend(other.join().expect("does not panic"));
            all
        });
        assert!(failures.is_empty(), "{} units\n{}", failures.len(), failures.join("\n"));
    }
}
