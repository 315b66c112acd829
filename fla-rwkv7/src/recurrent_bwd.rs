//! The recurrent backward pass of RWKV-7: that of the DPLR delta rule under the model's names.

use fla_core::cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut};
use fla_core::{Device, Element, Error, Shape};

use crate::recurrent_fwd::RecurrentFwdOptions;

/// What the pass reads. Contiguous, each at a multiple of 16 bytes.
#[derive(Clone, Copy)]
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub struct RecurrentBwdInputs<'a, T> {
    /// Receptance: `[B, T, H, K]`.
    pub r: &'a dyn DevicePtr<T>,
    /// Log decay, natural base, at most 0: `[B, T, H, K]`.
    pub w: &'a dyn DevicePtr<T>,
    /// Keys: `[B, T, H, K]`.
    pub k: &'a dyn DevicePtr<T>,
    /// Values: `[B, T, H, V]`.
    pub v: &'a dyn DevicePtr<T>,
    /// Removal key: `[B, T, H, K]`.
    pub a: &'a dyn DevicePtr<T>,
    /// Replacement key: `[B, T, H, K]`.
    pub b: &'a dyn DevicePtr<T>,
    /// State that the forward pass has started from, or zero when absent: `[N, H, K, V]`.
    pub initial_state: Option<&'a dyn DevicePtr<f32>>,
    /// Gradient of the outputs: `[B, T, H, V]`.
    pub d_o: &'a dyn DevicePtr<T>,
    /// Gradient of the final state, or zero when absent: `[N, H, K, V]`.
    pub d_final_state: Option<&'a dyn DevicePtr<f32>>,
}

/// What the pass writes, whole.
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub struct RecurrentBwdOutputs<'a, T> {
    /// Gradient of `r`: `[B, T, H, K]`.
    pub dr: &'a mut dyn DevicePtrMut<T>,
    /// Gradient of `w`: `[B, T, H, K]`.
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
pub struct RecurrentBwdResult<T> {
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

/// The recurrent backward pass of RWKV-7, made once for a shape and run many times.
///
/// With `S_t` as in [`RecurrentFwd`](crate::RecurrentFwd), and from the last token to the first:
///
/// ```text
/// dS_t += scale r_t d_o_t^T        dx_t = dS_t^T b_t
/// dr_t = scale S_t d_o_t           dv_t = dS_t^T k_t
/// dk_t = dS_t v_t                  db_t = dS_t S_{t-1}^T a_t
/// da_t = S_{t-1} dx_t              dw_t = e^{w_t} sum_v S_{t-1} dS_t
/// dS_{t-1} = diag(e^{w_t}) dS_t + a_t dx_t^T
/// ```
///
/// | tensor                             | shape          | dtype | meaning                                   |
/// |------------------------------------|----------------|-------|-------------------------------------------|
/// | `r`, `w`, `k`, `a`, `b`            | `[B, T, H, K]` | `T`   | as in the forward pass                    |
/// | `v`, `d_o`                         | `[B, T, H, V]` | `T`   | values, gradient of the outputs           |
/// | `initial_state`, `d_final_state`   | `[N, H, K, V]` | f32   | optional; zero when absent                |
/// | `dr`, `dw`, `dk`, `da`, `db` (out) | `[B, T, H, K]` | `T`   | gradients; `dw` is that of the log decay  |
/// | `dv` (out)                         | `[B, T, H, V]` | `T`   | gradient of the values                    |
/// | `d_initial_state` (out)            | `[N, H, K, V]` | f32   | optional                                  |
///
/// # Numerics
///
/// As [`fla_dplr::RecurrentBwd`], which does the work.
///
/// # Source
///
/// Peng et al., "RWKV-7 Goose with Expressive Dynamic State Evolution", arXiv:2503.14456.
#[derive(Debug)]
pub struct RecurrentBwd<T> {
    dplr: fla_dplr::RecurrentBwd<T>,
}

impl<T: Element> RecurrentBwd<T> {
    /// Checks the shape and gets the kernel ready.
    ///
    /// # Errors
    ///
    /// As [`fla_dplr::RecurrentBwd::new`].
    pub fn new(device: &Device, shape: &Shape, options: &RecurrentFwdOptions) -> Result<Self, Error> {
        let options = fla_dplr::RecurrentFwdOptions::new(options.scale);
        Ok(Self { dplr: fla_dplr::RecurrentBwd::new(device, shape, &options)? })
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
    /// As [`fla_dplr::RecurrentBwd::run`], with this model's names of the tensors.
    pub fn run(
        &self,
        stream: &CudaStream,
        x: &RecurrentBwdInputs<'_, T>,
        dx: &mut RecurrentBwdOutputs<'_, T>,
        workspace: &mut dyn DevicePtrMut<u8>,
    ) -> Result<(), Error> {
        // A match and not `as_deref_mut`: only a plain `&mut dyn` may shorten the lifetime inside it.
        let d_initial_state: Option<&mut dyn DevicePtrMut<f32>> = match &mut dx.d_initial_state {
            Some(state) => Some(&mut **state),
            None => None,
        };
        let mut dplr = fla_dplr::RecurrentBwdOutputs {
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
/// As [`RecurrentBwd::new`] and [`RecurrentBwd::run`].
pub fn recurrent_bwd<T: Element>(
    device: &Device,
    shape: &Shape,
    x: &RecurrentBwdInputs<'_, T>,
    options: &RecurrentFwdOptions,
) -> Result<RecurrentBwdResult<T>, Error> {
    let options = fla_dplr::RecurrentFwdOptions::new(options.scale);
    let fla_dplr::RecurrentBwdResult { dq, dk, dv, da, db, dg, d_initial_state } =
        fla_dplr::recurrent_bwd(device, shape, &dplr_inputs(x), &options).map_err(own_names)?;
    Ok(RecurrentBwdResult { dr: dq, dw: dg, dk, dv, da, db, d_initial_state })
}

fn dplr_inputs<'a, T>(x: &RecurrentBwdInputs<'a, T>) -> fla_dplr::RecurrentBwdInputs<'a, T> {
    let RecurrentBwdInputs { r, w, k, v, a, b, initial_state, d_o, d_final_state } = *x;
    fla_dplr::RecurrentBwdInputs { q: r, k, v, a, b, g: w, initial_state, d_o, d_final_state }
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
