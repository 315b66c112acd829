//! The recurrent forward pass of RWKV-7 from the normalised key and its rate, as decoding has them.

use fla_core::cudarc::driver::{CudaStream, DevicePtr};
use fla_core::{Device, Element, Error, Shape, StateElement};
use fla_dplr::Transition;

use crate::recurrent_fwd::{RecurrentFwdOptions, RecurrentFwdOutputs, RecurrentFwdResult, dplr_outputs};

/// What the pass reads. Contiguous, each at a multiple of 16 bytes.
#[derive(Clone, Copy)]
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub struct FusedMulRecurrentFwdInputs<'a, T, S = f32> {
    /// Receptance: `[B, T, H, K]`.
    pub r: &'a dyn DevicePtr<T>,
    /// Log decay, natural base, at most 0; the model's is in (-0.6065, 0): `[B, T, H, K]`.
    pub w: &'a dyn DevicePtr<T>,
    /// Keys: `[B, T, H, K]`.
    pub k: &'a dyn DevicePtr<T>,
    /// Values: `[B, T, H, V]`.
    pub v: &'a dyn DevicePtr<T>,
    /// Normalised keys: `[B, T, H, K]`.
    pub kk: &'a dyn DevicePtr<T>,
    /// In-context learning rates, in [0, 1]: `[B, T, H, K]`.
    pub a: &'a dyn DevicePtr<T>,
    /// State before the first token of each sequence: `[N, H, K, V]`. Zero when absent, unless
    /// [`RecurrentFwdOutputs::final_state`] holds the states.
    pub initial_state: Option<&'a dyn DevicePtr<S>>,
    /// Offsets of the sequences, for [`SeqLens::packed_on_device`](fla_core::SeqLens::packed_on_device) only: `[N + 1]`.
    pub cu_seqlens: Option<&'a dyn DevicePtr<i64>>,
}

/// [`RecurrentFwd`](crate::RecurrentFwd) with `a = -kk` and `b = kk ⊙ a` formed inside, which saves the launches and
/// the tensors that would hold them.
///
/// ```text
/// S_t = (diag(e^{w_t}) - (kk_t ⊙ a_t) kk_t^T) S_{t-1} + k_t v_t^T        o_t = scale S_t^T r_t
/// ```
///
/// | tensor               | shape             | dtype | meaning                                         |
/// |----------------------|-------------------|-------|-------------------------------------------------|
/// | `r`, `k`             | `[B, T, H, K]`    | `T`   | receptance, keys                                |
/// | `w`                  | `[B, T, H, K]`    | `T`   | log decay, natural base, at most 0              |
/// | `v`                  | `[B, T, H, V]`    | `T`   | values                                          |
/// | `kk`, `a`            | `[B, T, H, K]`    | `T`   | normalised keys, in-context learning rates      |
/// | `initial_state`      | `[N, H, K, V]`    | `S`   | optional; zero when absent                      |
/// | `cu_seqlens`         | `[N + 1]`         | i64   | only where the host does not know the lengths   |
/// | `o` (out)            | `[B, T, H, V]`    | `T`   | outputs                                         |
/// | `final_state` (out)  | `[N, H, K, V]`    | `S`   | optional: new, in place, or in a pool `[S, ..]` |
/// | `token_states` (out) | `[B, T, H, K, V]` | `S`   | optional: the state after every token           |
///
/// # Numerics
///
/// As [`RecurrentFwd`](crate::RecurrentFwd), but `kk ⊙ a` is never rounded to `T`.
///
/// # Source
///
/// Peng et al., "RWKV-7 Goose with Expressive Dynamic State Evolution", arXiv:2503.14456. FLA's function is
/// `fused_mul_recurrent_rwkv7`.
#[derive(Debug)]
pub struct FusedMulRecurrentFwd<T, S = f32> {
    dplr: fla_dplr::RecurrentFwd<T, S>,
}

impl<T: Element, S: StateElement> FusedMulRecurrentFwd<T, S> {
    /// Checks the shape and gets the kernel ready.
    ///
    /// # Errors
    ///
    /// As [`fla_dplr::RecurrentFwd::new`].
    pub fn new(device: &Device, shape: &Shape, options: &RecurrentFwdOptions) -> Result<Self, Error> {
        Ok(Self { dplr: fla_dplr::RecurrentFwd::new(device, shape, &dplr_options(options))? })
    }

    /// Queues the pass on `stream`. Allocates nothing, never synchronises, and can be captured in a graph.
    ///
    /// # Errors
    ///
    /// As [`fla_dplr::RecurrentFwd::run`], with the names of the tensors here.
    pub fn run(
        &self,
        stream: &CudaStream,
        x: &FusedMulRecurrentFwdInputs<'_, T, S>,
        y: &mut RecurrentFwdOutputs<'_, T, S>,
    ) -> Result<(), Error> {
        self.dplr.run(stream, &dplr_inputs(x), &mut dplr_outputs(y)).map_err(own_names)
    }
}

/// Makes the plan, allocates the outputs and runs, on the stream of `r`.
///
/// # Errors
///
/// As [`FusedMulRecurrentFwd::new`] and [`FusedMulRecurrentFwd::run`].
pub fn fused_mul_recurrent_fwd<T: Element>(
    device: &Device,
    shape: &Shape,
    x: &FusedMulRecurrentFwdInputs<'_, T>,
    options: &RecurrentFwdOptions,
) -> Result<RecurrentFwdResult<T>, Error> {
    let y =
        fla_dplr::recurrent_fwd(device, shape, &dplr_inputs(x), &dplr_options(options)).map_err(own_names)?;
    Ok(RecurrentFwdResult { o: y.o, final_state: y.final_state })
}

pub(crate) fn dplr_options(options: &RecurrentFwdOptions) -> fla_dplr::RecurrentFwdOptions {
    fla_dplr::RecurrentFwdOptions::new(options.scale).with_transition(Transition::KeyAndRate)
}

/// The normalised key is what reads the state, and the rate what it is written back with.
fn dplr_inputs<'a, T, S>(x: &FusedMulRecurrentFwdInputs<'a, T, S>) -> fla_dplr::RecurrentFwdInputs<'a, T, S> {
    let FusedMulRecurrentFwdInputs { r, w, k, v, kk, a, initial_state, cu_seqlens } = *x;
    fla_dplr::RecurrentFwdInputs { q: r, k, v, a: kk, b: a, g: w, initial_state, cu_seqlens }
}

/// An error about a tensor of the delta rule is about what the caller passed in its place.
fn own_names(mut error: Error) -> Error {
    if let Error::Len { tensor, .. } | Error::Align { tensor, .. } = &mut error {
        *tensor = match *tensor {
            "q" => "r",
            "g" => "w",
            "a" => "kk",
            "b" => "a",
            other => other,
        };
    }
    error
}
