//! The recurrent forward pass of RWKV-7: the DPLR delta rule under the model's names.

use fla_core::cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut};
use fla_core::{Device, Element, Error, FinalState, Shape, StateElement};

/// What may be changed.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct RecurrentFwdOptions {
    /// Factor of the output; the model's own is 1.
    pub scale: f32,
}

impl RecurrentFwdOptions {
    /// The model's own options: scale 1.
    #[must_use]
    #[expect(clippy::new_without_default, reason = "options are stated, never defaulted")]
    pub const fn new() -> Self {
        Self { scale: 1.0 }
    }

    /// Changes the factor of the output.
    #[must_use]
    pub const fn with_scale(mut self, scale: f32) -> Self {
        self.scale = scale;
        self
    }
}

/// What the pass reads. Contiguous, each at a multiple of 16 bytes.
#[derive(Clone, Copy)]
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub struct RecurrentFwdInputs<'a, T, S = f32> {
    /// Receptance: `[B, T, H, K]`.
    pub r: &'a dyn DevicePtr<T>,
    /// Log decay, natural base, at most 0; the model's is in (-0.6065, 0): `[B, T, H, K]`.
    pub w: &'a dyn DevicePtr<T>,
    /// Keys: `[B, T, H, K]`.
    pub k: &'a dyn DevicePtr<T>,
    /// Values: `[B, T, H, V]`.
    pub v: &'a dyn DevicePtr<T>,
    /// Removal key; the model's is the negative of the normalised key: `[B, T, H, K]`.
    pub a: &'a dyn DevicePtr<T>,
    /// Replacement key; the model's is the normalised key times the in-context learning rate: `[B, T, H, K]`.
    pub b: &'a dyn DevicePtr<T>,
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

/// The recurrent forward pass of RWKV-7, made once for a shape and run many times.
///
/// ```text
/// S_t = (diag(e^{w_t}) + b_t a_t^T) S_{t-1} + k_t v_t^T        o_t = scale S_t^T r_t
/// ```
///
/// | tensor               | shape             | dtype | meaning                                         |
/// |----------------------|-------------------|-------|-------------------------------------------------|
/// | `r`, `k`             | `[B, T, H, K]`    | `T`   | receptance, keys                                |
/// | `w`                  | `[B, T, H, K]`    | `T`   | log decay, natural base, at most 0              |
/// | `v`                  | `[B, T, H, V]`    | `T`   | values                                          |
/// | `a`, `b`             | `[B, T, H, K]`    | `T`   | removal and replacement keys                    |
/// | `initial_state`      | `[N, H, K, V]`    | `S`   | optional; zero when absent                      |
/// | `cu_seqlens`         | `[N + 1]`         | i64   | only where the host does not know the lengths   |
/// | `o` (out)            | `[B, T, H, V]`    | `T`   | outputs                                         |
/// | `final_state` (out)  | `[N, H, K, V]`    | `S`   | optional: new, in place, or in a pool `[S, ..]` |
/// | `token_states` (out) | `[B, T, H, K, V]` | `S`   | optional: the state after every token           |
///
/// `T` is f32, bf16 or f16 and `S` f32 or bf16; K is at most 256 and V at most 512. The state of RWKV-LM is `[V, K]`:
/// transpose it at the border. What is wanted as `w` here is the log decay itself: `-exp(w)` of the raw `w` that
/// RWKV-LM's kernels take, or `-exp(-1/2) sigmoid(x)` of the projection `x` that the model makes it from.
///
/// # Numerics
///
/// As [`fla_dplr::RecurrentFwd`], which does the work; the error stays under the rows `rwkv7, recurrent_fwd` of
/// `fla_reference::tolerance`.
///
/// # Source
///
/// Peng et al., "RWKV-7 Goose with Expressive Dynamic State Evolution", arXiv:2503.14456.
#[derive(Debug)]
pub struct RecurrentFwd<T, S = f32> {
    dplr: fla_dplr::RecurrentFwd<T, S>,
}

impl<T: Element, S: StateElement> RecurrentFwd<T, S> {
    /// Checks the shape and gets the kernel ready.
    ///
    /// # Errors
    ///
    /// As [`fla_dplr::RecurrentFwd::new`].
    pub fn new(device: &Device, shape: &Shape, options: &RecurrentFwdOptions) -> Result<Self, Error> {
        let options = fla_dplr::RecurrentFwdOptions::new(options.scale);
        Ok(Self { dplr: fla_dplr::RecurrentFwd::new(device, shape, &options)? })
    }

    /// Queues the pass on `stream`. Allocates nothing, never synchronises, and can be captured in a graph.
    ///
    /// # Errors
    ///
    /// As [`fla_dplr::RecurrentFwd::run`], with this model's names of the tensors.
    pub fn run(
        &self,
        stream: &CudaStream,
        x: &RecurrentFwdInputs<'_, T, S>,
        y: &mut RecurrentFwdOutputs<'_, T, S>,
    ) -> Result<(), Error> {
        self.dplr.run(stream, &dplr_inputs(x), &mut dplr_outputs(y)).map_err(own_names)
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
    let options = fla_dplr::RecurrentFwdOptions::new(options.scale);
    let y = fla_dplr::recurrent_fwd(device, shape, &dplr_inputs(x), &options).map_err(own_names)?;
    Ok(RecurrentFwdResult { o: y.o, final_state: y.final_state })
}

/// The outputs are the same ones.
pub(crate) fn dplr_outputs<'b, T, S>(
    y: &'b mut RecurrentFwdOutputs<'_, T, S>,
) -> fla_dplr::RecurrentFwdOutputs<'b, T, S> {
    // A match and not `as_deref_mut`: only a plain `&mut dyn` may shorten the lifetime inside it.
    let token_states: Option<&mut dyn DevicePtrMut<S>> = match &mut y.token_states {
        Some(states) => Some(&mut **states),
        None => None,
    };
    fla_dplr::RecurrentFwdOutputs { o: &mut *y.o, final_state: y.final_state.reborrow(), token_states }
}

/// RWKV's receptance is the query of the delta rule, and its `w` the log decay `g`.
fn dplr_inputs<'a, T, S>(x: &RecurrentFwdInputs<'a, T, S>) -> fla_dplr::RecurrentFwdInputs<'a, T, S> {
    let RecurrentFwdInputs { r, w, k, v, a, b, initial_state, cu_seqlens } = *x;
    fla_dplr::RecurrentFwdInputs { q: r, k, v, a, b, g: w, initial_state, cu_seqlens }
}

/// An error about `q` or `g` is about what the caller passed as `r` or `w`.
fn own_names(mut error: Error) -> Error {
    if let Error::Len { tensor, .. } | Error::Align { tensor, .. } = &mut error {
        *tensor = match *tensor {
            "q" => "r",
            "g" => "w",
            other => other,
        };
    }
    error
}
