//! The chunk backward pass of RWKV-7: gradients of the DPLR delta rule under the model's names.

use fla_core::cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut};
use fla_core::{Device, Element, Error, Shape};

use crate::chunk_fwd::ChunkFwdOptions;

/// What the pass reads. Contiguous, each at a multiple of 16 bytes.
#[derive(Clone, Copy)]
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub struct ChunkBwdInputs<'a, T> {
    /// Receptance: `[B, T, H, K]`.
    pub r: &'a dyn DevicePtr<T>,
    /// Log decay, natural base, at most 0, or its logit; see [`Decay`](fla_dplr::Decay): `[B, T, H, K]`.
    pub w: &'a dyn DevicePtr<T>,
    /// Keys: `[B, T, H, K]`.
    pub k: &'a dyn DevicePtr<T>,
    /// Values: `[B, T, H, V]`.
    pub v: &'a dyn DevicePtr<T>,
    /// Removal key: `[B, T, H, K]`.
    pub a: &'a dyn DevicePtr<T>,
    /// Replacement key: `[B, T, H, K]`.
    pub b: &'a dyn DevicePtr<T>,
    /// State that the forward pass has started from, or zero when absent: `[N, H, K, V]`. Read only where states are
    /// recomputed; the ones that were kept begin with it.
    pub initial_state: Option<&'a dyn DevicePtr<f32>>,
    /// What [`ChunkFwd`](crate::ChunkFwd) wrote as `states` for the same inputs, with
    /// [`SavedStates::Kept`](fla_dplr::SavedStates::Kept); absent otherwise.
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
    /// Gradient of `w`, log decay or logit: `[B, T, H, K]`.
    pub dw: &'a mut dyn DevicePtrMut<T>,
    /// Gradient of `k`: `[B, T, H, K]`.
    pub dk: &'a mut dyn DevicePtrMut<T>,
    /// Gradient of `v`: `[B, T, H, V]`.
    pub dv: &'a mut dyn DevicePtrMut<T>,
    /// Gradient of `a`: `[B, T, H, K]`.
    pub da: &'a mut dyn DevicePtrMut<T>,
    /// Gradient of `b`: `[B, T, H, K]`.
    pub db: &'a mut dyn DevicePtrMut<T>,
    /// Gradient of the initial state, when wanted: `[N, H, K, V]`.
    pub d_initial_state: Option<&'a mut dyn DevicePtrMut<f32>>,
}

/// What the one-call form returns.
#[derive(Debug)]
pub struct ChunkBwdResult<T> {
    /// Gradient of `r`: `[B, T, H, K]`.
    pub dr: CudaSlice<T>,
    /// Gradient of `w`: `[B, T, H, K]`.
    pub dw: CudaSlice<T>,
    /// Gradient of `k`: `[B, T, H, K]`.
    pub dk: CudaSlice<T>,
    /// Gradient of `v`: `[B, T, H, V]`.
    pub dv: CudaSlice<T>,
    /// Gradient of `a`: `[B, T, H, K]`.
    pub da: CudaSlice<T>,
    /// Gradient of `b`: `[B, T, H, K]`.
    pub db: CudaSlice<T>,
    /// Gradient of the initial state: `[N, H, K, V]`.
    pub d_initial_state: CudaSlice<f32>,
}

/// Gradients of [`ChunkFwd`](crate::ChunkFwd), made once for a shape and run many times.
///
/// What each gradient is, token by token, [`RecurrentBwd`](crate::RecurrentBwd) says; how chunks give it,
/// [`fla_dplr::ChunkBwd`].
///
/// | tensor                             | shape          | dtype | meaning                                          |
/// |------------------------------------|----------------|-------|--------------------------------------------------|
/// | `r`, `w`, `k`, `a`, `b`            | `[B, T, H, K]` | `T`   | as in the forward pass                           |
/// | `v`, `d_o`                         | `[B, T, H, V]` | `T`   | values, gradient of the outputs                  |
/// | `initial_state`, `d_final_state`   | `[N, H, K, V]` | f32   | optional; zero when absent                       |
/// | `states`                           | `states_len()` | u16   | what the forward pass kept                       |
/// | `dr`, `dw`, `dk`, `da`, `db` (out) | `[B, T, H, K]` | `T`   | gradients; `dw` is that of what `w` holds        |
/// | `dv` (out)                         | `[B, T, H, V]` | `T`   | gradient of the values                           |
/// | `d_initial_state` (out)            | `[N, H, K, V]` | f32   | optional                                         |
///
/// # Numerics
///
/// As [`fla_dplr::ChunkBwd`], which does the work; the error stays under the rows `rwkv7, chunk_bwd` of
/// `fla_reference::tolerance`.
///
/// # Source
///
/// Peng et al., "RWKV-7 Goose with Expressive Dynamic State Evolution", arXiv:2503.14456.
#[derive(Debug)]
pub struct ChunkBwd<T> {
    dplr: fla_dplr::ChunkBwd<T>,
}

impl<T: Element> ChunkBwd<T> {
    /// Checks the shape and gets the kernels ready; `options` are those of the forward pass.
    ///
    /// # Errors
    ///
    /// As [`fla_dplr::ChunkBwd::new`].
    pub fn new(device: &Device, shape: &Shape, options: &ChunkFwdOptions) -> Result<Self, Error> {
        Ok(Self { dplr: fla_dplr::ChunkBwd::new(device, shape, &options.dplr())? })
    }

    /// Elements of the input `states`.
    #[must_use]
    pub fn states_len(&self) -> usize {
        self.dplr.states_len()
    }

    /// Bytes of the workspace that a run needs.
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
    /// As [`fla_dplr::ChunkBwd::run`], with this model's names of the tensors.
    pub fn run(
        &self,
        stream: &CudaStream,
        x: &ChunkBwdInputs<'_, T>,
        dx: &mut ChunkBwdOutputs<'_, T>,
        workspace: &mut dyn DevicePtrMut<u8>,
    ) -> Result<(), Error> {
        // A match and not `as_deref_mut`: only a plain `&mut dyn` may shorten the lifetime inside it.
        let d_initial_state: Option<&mut dyn DevicePtrMut<f32>> = match &mut dx.d_initial_state {
            Some(state) => Some(&mut **state),
            None => None,
        };
        let mut dplr = fla_dplr::ChunkBwdOutputs {
            dq: &mut *dx.dr,
            dk: &mut *dx.dk,
            dv: &mut *dx.dv,
            da: &mut *dx.da,
            db: &mut *dx.db,
            dg: &mut *dx.dw,
            d_initial_state,
        };
        self.dplr.run(stream, &dplr_inputs(x), &mut dplr, workspace).map_err(own_names)
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
    let fla_dplr::ChunkBwdResult { dq, dk, dv, da, db, dg, d_initial_state } =
        fla_dplr::chunk_bwd(device, shape, &dplr_inputs(x), &options.dplr()).map_err(own_names)?;
    Ok(ChunkBwdResult { dr: dq, dw: dg, dk, dv, da, db, d_initial_state })
}

fn dplr_inputs<'a, T>(x: &ChunkBwdInputs<'a, T>) -> fla_dplr::ChunkBwdInputs<'a, T> {
    let ChunkBwdInputs { r, w, k, v, a, b, initial_state, states, d_o, d_final_state } = *x;
    fla_dplr::ChunkBwdInputs { q: r, k, v, a, b, g: w, initial_state, states, d_o, d_final_state }
}

fn own_names(mut error: Error) -> Error {
    if let Error::Len { tensor, .. } | Error::Align { tensor, .. } = &mut error {
        *tensor = match *tensor {
            "q" => "r",
            "g" => "w",
            "dq" => "dr",
            "dg" => "dw",
            other => other,
        };
    }
    error
}
