//! The chunk forward pass of RWKV-7: the DPLR delta rule under the model's names.

use fla_core::cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut};
use fla_core::{Device, Element, Error, Shape};
use fla_dplr::{Decay, SavedStates};

/// What may be changed. Both passes of a training step take the same.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct ChunkFwdOptions {
    /// Factor of the output; the model's own is 1.
    pub scale: f32,
    /// What `w` holds; [`Decay::Log`] unless changed.
    pub decay: Decay,
    /// Where the backward pass finds states; [`SavedStates::Recomputed`] unless changed. A plan of the forward pass writes
    /// states with [`SavedStates::Kept`] and not otherwise.
    pub saved_states: SavedStates,
}

impl ChunkFwdOptions {
    /// The model's own options: scale 1, log decays, and states that the backward pass computes once more.
    #[must_use]
    #[expect(clippy::new_without_default, reason = "options are stated, never defaulted")]
    pub const fn new() -> Self {
        Self { scale: 1.0, decay: Decay::Log, saved_states: SavedStates::Recomputed }
    }

    /// Changes the factor of the output.
    #[must_use]
    pub const fn with_scale(mut self, scale: f32) -> Self {
        self.scale = scale;
        self
    }

    /// Changes what `w` holds: with [`Decay::Logit`] the projection x that the model makes its decay from.
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

    pub(crate) const fn dplr(&self) -> fla_dplr::ChunkFwdOptions {
        fla_dplr::ChunkFwdOptions::new(self.scale).with_decay(self.decay).with_saved_states(self.saved_states)
    }
}

/// What the pass reads. Contiguous, each at a multiple of 16 bytes.
#[derive(Clone, Copy)]
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub struct ChunkFwdInputs<'a, T> {
    /// Receptance: `[B, T, H, K]`.
    pub r: &'a dyn DevicePtr<T>,
    /// Log decay, natural base, at most 0, the model's in (-0.6065, 0); or its logit, see [`Decay`]: `[B, T, H, K]`.
    pub w: &'a dyn DevicePtr<T>,
    /// Keys: `[B, T, H, K]`.
    pub k: &'a dyn DevicePtr<T>,
    /// Values: `[B, T, H, V]`.
    pub v: &'a dyn DevicePtr<T>,
    /// Removal key; the model's is the negative of the normalised key: `[B, T, H, K]`.
    pub a: &'a dyn DevicePtr<T>,
    /// Replacement key; the model's is the normalised key times the in-context learning rate: `[B, T, H, K]`.
    pub b: &'a dyn DevicePtr<T>,
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

/// The chunk forward pass of RWKV-7, made once for a shape and run many times: for prompts and training.
///
/// ```text
/// S_t = (diag(e^{w_t}) + b_t a_t^T) S_{t-1} + k_t v_t^T        o_t = scale S_t^T r_t
/// ```
///
/// | tensor              | shape          | dtype | meaning                                                |
/// |---------------------|----------------|-------|--------------------------------------------------------|
/// | `r`, `k`            | `[B, T, H, K]` | `T`   | receptance, keys                                       |
/// | `w`                 | `[B, T, H, K]` | `T`   | log decay, natural base, at most 0; or its logit       |
/// | `v`                 | `[B, T, H, V]` | `T`   | values                                                 |
/// | `a`, `b`            | `[B, T, H, K]` | `T`   | removal and replacement keys                           |
/// | `initial_state`     | `[N, H, K, V]` | f32   | optional; zero when absent                             |
/// | `o` (out)           | `[B, T, H, V]` | `T`   | outputs                                                |
/// | `final_state` (out) | `[N, H, K, V]` | f32   | optional                                               |
/// | `states` (out)      | `states_len()` | u16   | with [`SavedStates::Kept`]; for [`ChunkBwd`](crate::ChunkBwd) |
///
/// `T` is f32, bf16 or f16; K and V are at most 256, any size. Lengths have to be known to the host. With [`Decay::Logit`]
/// `w` is the projection x that the model makes its decay from, and the kernel forms `-exp(-1/2) sigmoid(x)` in f32.
///
/// # Numerics
///
/// As [`fla_dplr::ChunkFwd`], which does the work; the error stays under the rows `rwkv7, chunk_fwd` of
/// `fla_reference::tolerance`.
///
/// # Source
///
/// Peng et al., "RWKV-7 Goose with Expressive Dynamic State Evolution", arXiv:2503.14456. FLA's function is
/// `chunk_rwkv7`.
#[derive(Debug)]
pub struct ChunkFwd<T> {
    dplr: fla_dplr::ChunkFwd<T>,
}

impl<T: Element> ChunkFwd<T> {
    /// Checks the shape and gets the kernel ready.
    ///
    /// # Errors
    ///
    /// As [`fla_dplr::ChunkFwd::new`].
    pub fn new(device: &Device, shape: &Shape, options: &ChunkFwdOptions) -> Result<Self, Error> {
        Ok(Self { dplr: fla_dplr::ChunkFwd::new(device, shape, &options.dplr())? })
    }

    /// Elements of the output `states`.
    #[must_use]
    pub fn states_len(&self) -> usize {
        self.dplr.states_len()
    }

    /// Bytes of the workspace that a run needs: what segments do to a state, where sequences are cut into several. Never 0,
    /// which drivers refuse to allocate.
    #[must_use]
    pub fn workspace_bytes(&self) -> usize {
        self.dplr.workspace_bytes()
    }

    /// Queues the pass on `stream`. Allocates nothing, never synchronises, and can be captured in a graph.
    ///
    /// `workspace` has [`Self::workspace_bytes`] bytes and starts at a multiple of 256; its contents do not matter.
    ///
    /// # Errors
    ///
    /// As [`fla_dplr::ChunkFwd::run`], with this model's names of the tensors.
    pub fn run(
        &self,
        stream: &CudaStream,
        x: &ChunkFwdInputs<'_, T>,
        y: &mut ChunkFwdOutputs<'_, T>,
        workspace: &mut dyn DevicePtrMut<u8>,
    ) -> Result<(), Error> {
        self.dplr.run(stream, &dplr_inputs(x), &mut dplr_outputs(y), workspace).map_err(own_names)
    }
}

/// Makes the plan, allocates the outputs and runs, on the stream of `r`.
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
    let y = fla_dplr::chunk_fwd(device, shape, &dplr_inputs(x), &options.dplr()).map_err(own_names)?;
    Ok(ChunkFwdResult { o: y.o, final_state: y.final_state, states: y.states })
}

/// The outputs are the same ones.
pub(crate) fn dplr_outputs<'b, T>(y: &'b mut ChunkFwdOutputs<'_, T>) -> fla_dplr::ChunkFwdOutputs<'b, T> {
    // Matches and not `as_deref_mut`: only a plain `&mut dyn` may shorten the lifetime inside it.
    let final_state: Option<&mut dyn DevicePtrMut<f32>> = match &mut y.final_state {
        Some(state) => Some(&mut **state),
        None => None,
    };
    let states: Option<&mut dyn DevicePtrMut<u16>> = match &mut y.states {
        Some(states) => Some(&mut **states),
        None => None,
    };
    fla_dplr::ChunkFwdOutputs { o: &mut *y.o, final_state, states }
}

/// RWKV's receptance is the query of the delta rule, and its `w` the log decay `g`.
fn dplr_inputs<'a, T>(x: &ChunkFwdInputs<'a, T>) -> fla_dplr::ChunkFwdInputs<'a, T> {
    let ChunkFwdInputs { r, w, k, v, a, b, initial_state } = *x;
    fla_dplr::ChunkFwdInputs { q: r, k, v, a, b, g: w, initial_state }
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
