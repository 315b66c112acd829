//! RWKV-6.

use fla_core::cudarc::driver::{CudaSlice, DevicePtr};
use fla_core::{Element, Shape};
use fla_rwkv6::{
    ChunkBwdInputs, ChunkFwdInputs, ChunkFwdOptions, RecurrentBwdInputs, RecurrentFwdInputs,
    RecurrentFwdOptions, SavedStates, chunk_bwd, chunk_fwd, recurrent_bwd, recurrent_fwd,
};

use super::{Case, Computed, Gpu, shape};
use crate::Result;

/// What all passes read.
struct Inputs<T> {
    shape: Shape,
    r: CudaSlice<T>,
    k: CudaSlice<T>,
    v: CudaSlice<T>,
    w: CudaSlice<T>,
    u: CudaSlice<T>,
    d_o: CudaSlice<T>,
    initial_state: Option<CudaSlice<f32>>,
    d_final_state: Option<CudaSlice<f32>>,
}

impl<T: Element> Inputs<T> {
    fn new(gpu: &Gpu, case: &Case) -> Result<Self> {
        Ok(Self {
            shape: shape(case)?,
            r: gpu.upload(case, "r")?,
            k: gpu.upload(case, "k")?,
            v: gpu.upload(case, "v")?,
            w: gpu.upload(case, "w")?,
            u: gpu.upload(case, "u")?,
            d_o: gpu.upload(case, "do")?,
            initial_state: gpu.upload_optional(case, "initial_state")?,
            d_final_state: gpu.upload_optional(case, "d_final_state")?,
        })
    }
}

fn optional(state: &Option<CudaSlice<f32>>) -> Option<&dyn DevicePtr<f32>> {
    state.as_ref().map(|state| state as &dyn DevicePtr<f32>)
}

/// Outputs and gradients, token by token.
pub(super) fn recurrent<T: Element>(gpu: &Gpu, case: &Case) -> Result<Vec<Computed>> {
    let inputs = Inputs::<T>::new(gpu, case)?;
    let Inputs { shape, r, k, v, w, u, d_o, .. } = &inputs;
    let (initial_state, d_final_state) = (optional(&inputs.initial_state), optional(&inputs.d_final_state));
    let options = RecurrentFwdOptions::new(case.scale() as f32);
    let x = RecurrentFwdInputs { r, k, v, w, u, initial_state, cu_seqlens: None };
    let y = recurrent_fwd(&gpu.device, shape, &x, &options)?;
    let x = RecurrentBwdInputs { r, k, v, w, u, initial_state, d_o, d_final_state };
    let dx = recurrent_bwd(&gpu.device, shape, &x, &options)?;
    Ok(vec![
        gpu.computed("o", &y.o)?,
        gpu.computed("final_state", &y.final_state)?,
        gpu.computed("dr", &dx.dr)?,
        gpu.computed("dk", &dx.dk)?,
        gpu.computed("dv", &dx.dv)?,
        gpu.computed("dw", &dx.dw)?,
        gpu.computed("du", &dx.du)?,
        gpu.computed("d_initial_state", &dx.d_initial_state)?,
    ])
}

/// Outputs and gradients, chunk by chunk.
pub(super) fn chunk<T: Element>(gpu: &Gpu, case: &Case) -> Result<Vec<Computed>> {
    let inputs = Inputs::<T>::new(gpu, case)?;
    let Inputs { shape, r, k, v, w, u, d_o, .. } = &inputs;
    let (initial_state, d_final_state) = (optional(&inputs.initial_state), optional(&inputs.d_final_state));
    let options = ChunkFwdOptions::new(case.scale() as f32).with_saved_states(SavedStates::Kept);
    let x = ChunkFwdInputs { r, k, v, w, u, initial_state };
    let y = chunk_fwd(&gpu.device, shape, &x, &options)?;
    let states = y.states.as_ref().map(|states| states as &dyn DevicePtr<u16>);
    let x = ChunkBwdInputs { r, k, v, w, u, initial_state, states, d_o, d_final_state };
    let dx = chunk_bwd(&gpu.device, shape, &x, &options)?;
    Ok(vec![
        gpu.computed("o", &y.o)?,
        gpu.computed("final_state", &y.final_state)?,
        gpu.computed("dr", &dx.dr)?,
        gpu.computed("dk", &dx.dk)?,
        gpu.computed("dv", &dx.dv)?,
        gpu.computed("dw", &dx.dw)?,
        gpu.computed("du", &dx.du)?,
        gpu.computed("d_initial_state", &dx.d_initial_state)?,
    ])
}
