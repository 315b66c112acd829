//! The chunk forward pass of RWKV-7 from the normalised key and its rate.

use fla_core::cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut};
use fla_core::{Device, Element, Error, Shape};
use fla_dplr::Transition;

use crate::chunk_fwd::{ChunkFwdOptions, ChunkFwdOutputs, ChunkFwdResult, dplr_outputs};

/// What the pass reads. Contiguous, each at a multiple of 16 bytes.
#[derive(Clone, Copy)]
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub struct FusedMulChunkFwdInputs<'a, T> {
    /// Receptance: `[B, T, H, K]`.
    pub r: &'a dyn DevicePtr<T>,
    /// Log decay, natural base, at most 0, the model's in (-0.6065, 0); or its logit, see
    /// [`Decay`](fla_dplr::Decay): `[B, T, H, K]`.
    pub w: &'a dyn DevicePtr<T>,
    /// Keys: `[B, T, H, K]`.
    pub k: &'a dyn DevicePtr<T>,
    /// Values: `[B, T, H, V]`.
    pub v: &'a dyn DevicePtr<T>,
    /// Normalised keys: `[B, T, H, K]`.
    pub kk: &'a dyn DevicePtr<T>,
    /// In-context learning rates, in [0, 1]: `[B, T, H, K]`.
    pub a: &'a dyn DevicePtr<T>,
    /// State before the first token of each sequence, or zero when absent: `[N, H, K, V]`.
    pub initial_state: Option<&'a dyn DevicePtr<f32>>,
}

/// [`ChunkFwd`](crate::ChunkFwd) with `a = -kk` and `b = kk ⊙ a` formed inside, which saves the launches and the tensors
/// that would hold them.
///
/// ```text
/// S_t = (diag(e^{w_t}) - (kk_t ⊙ a_t) kk_t^T) S_{t-1} + k_t v_t^T        o_t = scale S_t^T r_t
/// ```
///
/// | tensor              | shape          | dtype | meaning                                          |
/// |---------------------|----------------|-------|--------------------------------------------------|
/// | `r`, `k`            | `[B, T, H, K]` | `T`   | receptance, keys                                 |
/// | `w`                 | `[B, T, H, K]` | `T`   | log decay, natural base, at most 0; or its logit |
/// | `v`                 | `[B, T, H, V]` | `T`   | values                                           |
/// | `kk`, `a`           | `[B, T, H, K]` | `T`   | normalised keys, in-context learning rates       |
/// | `initial_state`     | `[N, H, K, V]` | f32   | optional; zero when absent                       |
/// | `o` (out)           | `[B, T, H, V]` | `T`   | outputs                                          |
/// | `final_state` (out) | `[N, H, K, V]` | f32   | optional                                         |
/// | `states` (out)      | `states_len()` | u16   | optional; for the backward pass                  |
///
/// # Numerics
///
/// As [`ChunkFwd`](crate::ChunkFwd), but `kk ⊙ a` is formed in f32.
///
/// # Source
///
/// Peng et al., "RWKV-7 Goose with Expressive Dynamic State Evolution", arXiv:2503.14456.
#[derive(Debug)]
pub struct FusedMulChunkFwd<T> {
    dplr: fla_dplr::ChunkFwd<T>,
}

impl<T: Element> FusedMulChunkFwd<T> {
    /// Checks the shape and gets the kernel ready.
    ///
    /// # Errors
    ///
    /// As [`fla_dplr::ChunkFwd::new`].
    pub fn new(device: &Device, shape: &Shape, options: &ChunkFwdOptions) -> Result<Self, Error> {
        Ok(Self { dplr: fla_dplr::ChunkFwd::new(device, shape, &dplr_options(options))? })
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
    /// As [`fla_dplr::ChunkFwd::run`], with the names of the tensors here.
    pub fn run(
        &self,
        stream: &CudaStream,
        x: &FusedMulChunkFwdInputs<'_, T>,
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
/// As [`FusedMulChunkFwd::new`] and [`FusedMulChunkFwd::run`].
pub fn fused_mul_chunk_fwd<T: Element>(
    device: &Device,
    shape: &Shape,
    x: &FusedMulChunkFwdInputs<'_, T>,
    options: &ChunkFwdOptions,
) -> Result<ChunkFwdResult<T>, Error> {
    let y = fla_dplr::chunk_fwd(device, shape, &dplr_inputs(x), &dplr_options(options)).map_err(own_names)?;
    Ok(ChunkFwdResult { o: y.o, final_state: y.final_state, states: y.states })
}

pub(crate) const fn dplr_options(options: &ChunkFwdOptions) -> fla_dplr::ChunkFwdOptions {
    options.dplr().with_transition(Transition::KeyAndRate)
}

/// The normalised key is what reads the state, and the rate what it is written back with.
fn dplr_inputs<'a, T>(x: &FusedMulChunkFwdInputs<'a, T>) -> fla_dplr::ChunkFwdInputs<'a, T> {
    let FusedMulChunkFwdInputs { r, w, k, v, kk, a, initial_state } = *x;
    fla_dplr::ChunkFwdInputs { q: r, k, v, a: kk, b: a, g: w, initial_state }
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
