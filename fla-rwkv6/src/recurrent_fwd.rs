//! The recurrent forward pass: a fused loop over tokens that keeps the state on chip.

use std::mem::offset_of;
use std::sync::Arc;

use fla_core::cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DeviceSlice};
use fla_core::{
    Arch, DType, Device, Element, Error, Field, FinalState, Grid, Kernel, Params, Ptr, PtrMut, Shape, Source,
    StateElement, StateTensors, States, Unit, check_len,
};
use half::{bf16, f16};

use crate::config::{RecurrentFwdConfig, RecurrentFwdVariant};

/// Largest K and V: a warp holds whole columns of the state in registers.
pub(crate) const MAX_K: usize = 256;
pub(crate) const MAX_V: usize = 512;

const SOURCE: Source =
    Source { name: "fla/rwkv6/recurrent_fwd.cu", text: include_str!("../kernels/recurrent_fwd.cu") };

/// Which end of each sequence is visited first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the first token to the last.
    Forward,
    /// From the last token to the first: the initial state precedes the last token, and the final state follows the
    /// first.
    Reverse,
}

/// What has no safe default, and what may be changed.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct RecurrentFwdOptions {
    /// Factor of the output; `K^-0.5` and 1 are both common, so it must be said.
    pub scale: f32,
    /// Order in which the tokens of each sequence are visited; [`Direction::Forward`] unless changed.
    pub direction: Direction,
}

impl RecurrentFwdOptions {
    /// The options with this factor of the output.
    #[must_use]
    pub const fn new(scale: f32) -> Self {
        Self { scale, direction: Direction::Forward }
    }

    /// The scale, when it is one.
    pub(crate) fn checked_scale(&self) -> Result<f32, Error> {
        if self.scale.is_finite() {
            return Ok(self.scale);
        }
        Err(Error::Option { option: "scale", wanted: "finite", got: self.scale.to_string() })
    }

    /// Changes the order of the tokens.
    #[must_use]
    pub const fn with_direction(mut self, direction: Direction) -> Self {
        self.direction = direction;
        self
    }
}

/// What the pass reads. Contiguous, each at a multiple of 16 bytes.
#[derive(Clone, Copy)]
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub struct RecurrentFwdInputs<'a, T, S = f32> {
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

/// The recurrent forward pass of RWKV-6, made once for a shape and run many times.
///
/// ```text
/// o_t = scale (S_{t-1} + diag(u) k_t v_t^T)^T r_t        S_t = diag(e^{w_t}) S_{t-1} + k_t v_t^T
/// ```
///
/// | tensor               | shape             | dtype | meaning                                         |
/// |----------------------|-------------------|-------|-------------------------------------------------|
/// | `r`, `k`             | `[B, T, H, K]`    | `T`   | receptance (the query), keys                    |
/// | `v`                  | `[B, T, H, V]`    | `T`   | values                                          |
/// | `w`                  | `[B, T, H, K]`    | `T`   | log decay, natural base, at most 0              |
/// | `u`                  | `[H, K]`          | `T`   | bonus, which only the current token gets        |
/// | `initial_state`      | `[N, H, K, V]`    | `S`   | optional; zero when absent                      |
/// | `cu_seqlens`         | `[N + 1]`         | i64   | only where the host does not know the lengths   |
/// | `o` (out)            | `[B, T, H, V]`    | `T`   | outputs                                         |
/// | `final_state` (out)  | `[N, H, K, V]`    | `S`   | optional: new, in place, or in a pool `[S, ..]` |
/// | `token_states` (out) | `[B, T, H, K, V]` | `S`   | optional: the state after every token           |
///
/// `T` is f32, bf16 or f16 and `S` f32 or bf16; K is at most 256 and V at most 512, any size. A sequence without
/// tokens hands its state through. The values of `w` are not checked: above 0 the state grows, which the operator
/// computes as asked. A server passes its pool of states with [`FinalState::Pool`], and captures the call in a graph.
///
/// With [`Direction::Reverse`], S_{t-1} is the state after the token that was visited before, which is token t + 1.
/// `token_states` then holds at token t the state that t has left, still; the slots of a pool count tokens in the
/// order of their visit, so that column 0 is for the last token of the sequence.
///
/// # Numerics
///
/// Everything is widened to f32, the state too, which is rounded to `S` where it is stored; `o` is rounded once. The
/// error against the float64 recurrence stays under the rows `rwkv6, recurrent_fwd` of `fla_reference::tolerance`.
/// Sums are taken in a fixed order: the same inputs give the same bits.
///
/// A decay is one f32 number, off by up to (|w| + 4) 2^-23 of itself. A decay that stays the same is off alike at
/// every token, so what the state still holds of a token n steps back can be off by n times that.
///
/// # Source
///
/// Peng et al., "Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence", arXiv:2404.05892.
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
            // One token has no order.
            reverse: options.direction == Direction::Reverse && !one_token,
        };
        let states = shape.seqs.n().saturating_mul(shape.h);
        let config = variant.choose(states, device.sm_count());
        tracing::debug!(?variant, ?config, "rwkv6 recurrent_fwd");
        let grid = variant.tile().grid("N * H", states, config.lanes_v, config.warps)?;
        let unit = unit::<T, S>(&variant, &config);
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
        for (name, tensor) in [("r", x.r), ("k", x.k), ("w", x.w)] {
            check_len(name, "[B, T, H, K]", k_len, tensor.len())?;
        }
        check_len("v", "[B, T, H, V]", v_len, x.v.len())?;
        check_len("u", "[H, K]", h * self.shape.k, x.u.len())?;
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
            r: bind.read("r", x.r),
            k: bind.read("k", x.k),
            v: bind.read("v", x.v),
            w: bind.read("w", x.w),
            u: bind.read("u", x.u),
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

/// Makes the plan, allocates the outputs and runs, on the stream of `r`.
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
    let stream: Arc<CudaStream> = x.r.stream().clone();
    let mut y = RecurrentFwdResult {
        o: device.alloc(&stream, shape.v_len())?,
        final_state: device.alloc(&stream, shape.state_len())?,
    };
    let final_state = FinalState::New(&mut y.final_state);
    plan.run(&stream, x, &mut RecurrentFwdOutputs { o: &mut y.o, final_state, token_states: None })?;
    Ok(y)
}

pub(crate) fn units(arch: Arch) -> Vec<Unit> {
    let mut out = Vec::new();
    for (k, v) in [(64, 64), (128, 128), (256, 256), (60, 100), (33, 65)] {
        for one_token in [true, false] {
            let (dtype, state, reverse) = (DType::F32, DType::F32, false);
            let variant = RecurrentFwdVariant { arch, dtype, state, k, v, one_token, reverse };
            out.extend(all_units::<f32, f32>(&variant));
            out.extend(all_units::<bf16, f32>(&variant));
            out.extend(all_units::<f16, f32>(&variant));
            if k == 64 {
                out.extend(all_units::<bf16, bf16>(&variant));
            }
            if k == 64 && !one_token {
                out.extend(all_units::<bf16, f32>(&RecurrentFwdVariant { reverse: true, ..variant }));
            }
        }
    }
    out
}

fn all_units<T: Element, S: StateElement>(variant: &RecurrentFwdVariant) -> Vec<Unit> {
    let variant = RecurrentFwdVariant { dtype: T::DTYPE, state: S::DTYPE, ..*variant };
    variant.all().map(|config| unit::<T, S>(&variant, &config)).collect()
}

fn unit<T: Element, S: StateElement>(variant: &RecurrentFwdVariant, config: &RecurrentFwdConfig) -> Unit {
    // All of these are below 2^31: `new` has checked K and V.
    Unit::new::<RecurrentFwdParams<T, S>>("rwkv6", "recurrent_fwd", SOURCE, config.warps as u32 * 32)
        .with_smem_bytes(config.smem_bytes(variant) as u32)
        .with_min_blocks(config.min_blocks)
        .with("Element", T::DTYPE)
        .with("State", S::DTYPE)
        .with("K", variant.k as i32)
        .with("V", variant.v as i32)
        .with("LANES_V", config.lanes_v as i32)
        .with("WARPS", config.warps as i32)
        .with("ONE_TOKEN", variant.one_token)
        .with("REVERSE", variant.reverse)
        .with("PREFETCH", config.prefetch)
        .with("RING", config.ring as i32)
}

/// Twin of `fla::rwkv6::RecurrentFwdParams`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct RecurrentFwdParams<T, S> {
    r: Ptr<T>,
    k: Ptr<T>,
    v: Ptr<T>,
    w: Ptr<T>,
    u: Ptr<T>,
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
    const CUDA_TYPE: &'static str = "fla::rwkv6::RecurrentFwdParams<Cfg::Element, Cfg::State>";
    const FIELDS: &'static [Field] = &[
        Field::new("r", "const Cfg::Element*", offset_of!(Self, r)),
        Field::new("k", "const Cfg::Element*", offset_of!(Self, k)),
        Field::new("v", "const Cfg::Element*", offset_of!(Self, v)),
        Field::new("w", "const Cfg::Element*", offset_of!(Self, w)),
        Field::new("u", "const Cfg::Element*", offset_of!(Self, u)),
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
    use super::{Arch, Element, RecurrentFwdVariant, StateElement, all_units, bf16};
    use fla_core::compile::compile;
    use fla_core::testing::nvrtc;

    /// A plan of any shape has to find registers: what spills is refused, and the shape with it.
    fn failures<T: Element, S: StateElement>(heads: &[(usize, usize)]) -> Vec<String> {
        let mut failures = Vec::new();
        for &(k, v) in heads {
            for one_token in [true, false] {
                for reverse in [false, true] {
                    if one_token && reverse {
                        continue;
                    }
                    let (dtype, state) = (T::DTYPE, S::DTYPE);
                    let variant =
                        RecurrentFwdVariant { arch: Arch::SM_90, dtype, state, k, v, one_token, reverse };
                    let units = all_units::<T, S>(&variant);
                    failures.extend(
                        units
                            .iter()
                            .filter_map(|unit| compile(unit, Arch::SM_90).err())
                            .map(|e| e.to_string()),
                    );
                }
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
            (1, 1),
            (7, 20),
            (33, 64),
            (48, 63),
            (64, 64),
            (65, 64),
            (100, 72),
            (128, 128),
            (200, 20),
            (255, 512),
            (256, 256),
        ];
        let failures = std::thread::scope(|scope| {
            let other = scope.spawn(|| failures::<f32, f32>(HEADS));
            let mut all = failures::<bf16, f32>(HEADS);
            all.extend(failures::<bf16, bf16>(HEADS));
            all.extend(other.join().expect("does not panic"));
            all
        });
        assert!(failures.is_empty(), "{} units\n{}", failures.len(), failures.join("\n"));
    }
}
