//! The chunk backward pass of RWKV-7 from the normalised key and its rate.

use fla_core::cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut};
use fla_core::{Device, Element, Error, Shape};

use crate::chunk_fwd::ChunkFwdOptions;
use crate::fused_mul_chunk_fwd::dplr_options;

/// What the pass reads. Contiguous, each at a multiple of 16 bytes.
#[derive(Clone, Copy)]
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub struct FusedMulChunkBwdInputs<'a, T> {
    /// Receptance: `[B, T, H, K]`.
    pub r: &'a dyn DevicePtr<T>,
    /// Log decay, natural base, at most 0, or its logit; see [`Decay`](fla_dplr::Decay): `[B, T, H, K]`.
    pub w: &'a dyn DevicePtr<T>,
    /// Keys: `[B, T, H, K]`.
    pub k: &'a dyn DevicePtr<T>,
    /// Values: `[B, T, H, V]`.
    pub v: &'a dyn DevicePtr<T>,
    /// Normalised keys: `[B, T, H, K]`.
    pub kk: &'a dyn DevicePtr<T>,
    /// In-context learning rates: `[B, T, H, K]`.
    pub a: &'a dyn DevicePtr<T>,
    /// State that the forward pass has started from, or zero when absent: `[N, H, K, V]`. Read only where states are
    /// recomputed; the ones that were kept begin with it.
    pub initial_state: Option<&'a dyn DevicePtr<f32>>,
    /// What [`FusedMulChunkFwd`](crate::FusedMulChunkFwd) wrote as `states` for the same inputs, with
    /// [`SavedStates::Kept`](fla_dplr::SavedStates::Kept); absent otherwise.
    pub states: Option<&'a dyn DevicePtr<u16>>,
    /// Gradient of the outputs: `[B, T, H, V]`.
    pub d_o: &'a dyn DevicePtr<T>,
    /// Gradient of the final state, or zero when absent: `[N, H, K, V]`.
    pub d_final_state: Option<&'a dyn DevicePtr<f32>>,
}

/// What the pass writes, whole.
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub struct FusedMulChunkBwdOutputs<'a, T> {
    /// Gradient of `r`: `[B, T, H, K]`.
    pub dr: &'a mut dyn DevicePtrMut<T>,
    /// Gradient of `w`, log decay or logit: `[B, T, H, K]`.
    pub dw: &'a mut dyn DevicePtrMut<T>,
    /// Gradient of `k`: `[B, T, H, K]`.
    pub dk: &'a mut dyn DevicePtrMut<T>,
    /// Gradient of `v`: `[B, T, H, V]`.
    pub dv: &'a mut dyn DevicePtrMut<T>,
    /// Gradient of `kk`: `[B, T, H, K]`.
    pub dkk: &'a mut dyn DevicePtrMut<T>,
    /// Gradient of `a`: `[B, T, H, K]`.
    pub da: &'a mut dyn DevicePtrMut<T>,
    /// Gradient of the initial state, when wanted: `[N, H, K, V]`.
    pub d_initial_state: Option<&'a mut dyn DevicePtrMut<f32>>,
}

/// What the one-call form returns.
#[derive(Debug)]
pub struct FusedMulChunkBwdResult<T> {
    /// Gradient of `r`: `[B, T, H, K]`.
    pub dr: CudaSlice<T>,
    /// Gradient of `w`: `[B, T, H, K]`.
    pub dw: CudaSlice<T>,
    /// Gradient of `k`: `[B, T, H, K]`.
    pub dk: CudaSlice<T>,
    /// Gradient of `v`: `[B, T, H, V]`.
    pub dv: CudaSlice<T>,
    /// Gradient of `kk`: `[B, T, H, K]`.
    pub dkk: CudaSlice<T>,
    /// Gradient of `a`: `[B, T, H, K]`.
    pub da: CudaSlice<T>,
    /// Gradient of the initial state: `[N, H, K, V]`.
    pub d_initial_state: CudaSlice<f32>,
}

/// [`ChunkBwd`](crate::ChunkBwd) for the tensors of [`FusedMulChunkFwd`](crate::FusedMulChunkFwd): with `a' = -kk` and
/// `b' = kk ⊙ a` formed inside, and their gradients taken on to those of `kk` and `a`.
///
/// ```text
/// dkk_t = db'_t ⊙ a_t - da'_t        da_t = db'_t ⊙ kk_t
/// ```
///
/// | tensor                              | shape          | dtype | meaning                                    |
/// |-------------------------------------|----------------|-------|--------------------------------------------|
/// | `r`, `w`, `k`, `kk`, `a`            | `[B, T, H, K]` | `T`   | as in the forward pass                     |
/// | `v`, `d_o`                          | `[B, T, H, V]` | `T`   | values, gradient of the outputs            |
/// | `initial_state`, `d_final_state`    | `[N, H, K, V]` | f32   | optional; zero when absent                 |
/// | `states`                            | `states_len()` | u16   | what the forward pass kept                 |
/// | `dr`, `dw`, `dk`, `dkk`, `da` (out) | `[B, T, H, K]` | `T`   | gradients; `dw` is that of what `w` holds  |
/// | `dv` (out)                          | `[B, T, H, V]` | `T`   | gradient of the values                     |
/// | `d_initial_state` (out)             | `[N, H, K, V]` | f32   | optional                                   |
///
/// # Numerics
///
/// As [`fla_dplr::ChunkBwd`], which does the work; the gradient of `kk` is not taken through a normalisation.
///
/// # Source
///
/// Peng et al., "RWKV-7 Goose with Expressive Dynamic State Evolution", arXiv:2503.14456.
#[derive(Debug)]
pub struct FusedMulChunkBwd<T> {
    dplr: fla_dplr::ChunkBwd<T>,
}

impl<T: Element> FusedMulChunkBwd<T> {
    /// Checks the shape and gets the kernels ready; `options` are those of the forward pass.
    ///
    /// # Errors
    ///
    /// As [`fla_dplr::ChunkBwd::new`].
    pub fn new(device: &Device, shape: &Shape, options: &ChunkFwdOptions) -> Result<Self, Error> {
        Ok(Self { dplr: fla_dplr::ChunkBwd::new(device, shape, &dplr_options(options))? })
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
        x: &FusedMulChunkBwdInputs<'_, T>,
        dx: &mut FusedMulChunkBwdOutputs<'_, T>,
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
            da: &mut *dx.dkk,
            db: &mut *dx.da,
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
/// As [`FusedMulChunkBwd::new`] and [`FusedMulChunkBwd::run`].
pub fn fused_mul_chunk_bwd<T: Element>(
    device: &Device,
    shape: &Shape,
    x: &FusedMulChunkBwdInputs<'_, T>,
    options: &ChunkFwdOptions,
) -> Result<FusedMulChunkBwdResult<T>, Error> {
    let fla_dplr::ChunkBwdResult { dq, dk, dv, da, db, dg, d_initial_state } =
        fla_dplr::chunk_bwd(device, shape, &dplr_inputs(x), &dplr_options(options)).map_err(own_names)?;
    Ok(FusedMulChunkBwdResult { dr: dq, dw: dg, dk, dv, dkk: da, da: db, d_initial_state })
}

fn dplr_inputs<'a, T>(x: &FusedMulChunkBwdInputs<'a, T>) -> fla_dplr::ChunkBwdInputs<'a, T> {
    let FusedMulChunkBwdInputs { r, w, k, v, kk, a, initial_state, states, d_o, d_final_state } = *x;
    fla_dplr::ChunkBwdInputs { q: r, k, v, a: kk, b: a, g: w, initial_state, states, d_o, d_final_state }
}

fn own_names(mut error: Error) -> Error {
    if let Error::Len { tensor, .. } | Error::Align { tensor, .. } = &mut error {
        *tensor = match *tensor {
            "q" => "r",
            "g" => "w",
            "dq" => "dr",
            "dg" => "dw",
            "a" => "kk",
            "b" => "a",
            "da" => "dkk",
            "db" => "da",
            other => other,
        };
    }
    error
}
