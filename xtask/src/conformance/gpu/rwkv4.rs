//! RWKV-4.

use fla_core::Element;
use fla_core::cudarc::driver::{CudaSlice, DevicePtr};
use fla_rwkv4::{
    ChunkBwdInputs, ChunkBwdOptions, ChunkFwdInputs, ChunkFwdOptions, RecurrentBwdInputs,
    RecurrentBwdOptions, RecurrentFwdInputs, RecurrentFwdOptions, Shape, chunk_bwd, chunk_fwd, recurrent_bwd,
    recurrent_fwd,
};

use super::{Case, Computed, Gpu, seqs};
use crate::Result;

/// What all passes read.
struct Inputs<T> {
    shape: Shape,
    w: CudaSlice<f32>,
    u: CudaSlice<f32>,
    k: CudaSlice<T>,
    v: CudaSlice<T>,
    d_o: CudaSlice<T>,
    initial_state: Option<CudaSlice<f32>>,
    d_final_state: Option<CudaSlice<f32>>,
}

impl<T: Element> Inputs<T> {
    fn new(gpu: &Gpu, case: &Case) -> Result<Self> {
        Ok(Self {
            shape: Shape { seqs: seqs(case)?, c: case.dim("C") },
            w: gpu.upload(case, "w")?,
            u: gpu.upload(case, "u")?,
            k: gpu.upload(case, "k")?,
            v: gpu.upload(case, "v")?,
            d_o: gpu.upload(case, "do")?,
            initial_state: gpu.upload_optional(case, "state")?,
            d_final_state: gpu.upload_optional(case, "d_final_state")?,
        })
    }
}

fn optional(state: &Option<CudaSlice<f32>>) -> Option<&dyn DevicePtr<f32>> {
    state.as_ref().map(|state| state as &dyn DevicePtr<f32>)
}

/// Outputs and gradients, chunk by chunk.
pub(super) fn chunk<T: Element>(gpu: &Gpu, case: &Case) -> Result<Vec<Computed>> {
    let Inputs { shape, w, u, k, v, d_o, initial_state, d_final_state } = &Inputs::<T>::new(gpu, case)?;
    let x = ChunkFwdInputs { w, u, k, v, initial_state: optional(initial_state) };
    let y = chunk_fwd(&gpu.device, shape, &x, &ChunkFwdOptions::new())?;
    let states = &y.states;
    let x = ChunkBwdInputs { w, u, k, v, states, d_o, d_final_state: optional(d_final_state) };
    let dx = chunk_bwd(&gpu.device, shape, &x, &ChunkBwdOptions::new())?;
    Ok(vec![
        gpu.computed("o", &y.o)?,
        gpu.computed("final_state", &y.final_state)?,
        gpu.computed("dw", &dx.dw)?,
        gpu.computed("du", &dx.du)?,
        gpu.computed("dk", &dx.dk)?,
        gpu.computed("dv", &dx.dv)?,
        gpu.computed("dstate", &dx.d_initial_state)?,
    ])
}

/// Outputs and gradients, token by token.
pub(super) fn recurrent<T: Element>(gpu: &Gpu, case: &Case) -> Result<Vec<Computed>> {
    let Inputs { shape, w, u, k, v, d_o, initial_state, d_final_state } = &Inputs::<T>::new(gpu, case)?;
    let (initial_state, d_final_state) = (optional(initial_state), optional(d_final_state));
    let x = RecurrentFwdInputs { w, u, k, v, initial_state, cu_seqlens: None };
    let y = recurrent_fwd(&gpu.device, shape, &x, &RecurrentFwdOptions::new())?;
    let x = RecurrentBwdInputs { w, u, k, v, initial_state, d_o, d_final_state, cu_seqlens: None };
    let dx = recurrent_bwd(&gpu.device, shape, &x, &RecurrentBwdOptions::new())?;
    Ok(vec![
        gpu.computed("o", &y.o)?,
        gpu.computed("final_state", &y.final_state)?,
        gpu.computed("dw", &dx.dw)?,
        gpu.computed("du", &dx.du)?,
        gpu.computed("dk", &dx.dk)?,
        gpu.computed("dv", &dx.dv)?,
        gpu.computed("dstate", &dx.d_initial_state)?,
    ])
}
