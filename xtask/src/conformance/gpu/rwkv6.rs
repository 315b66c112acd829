//! RWKV-6.

use fla_core::Element;
use fla_core::cudarc::driver::DevicePtr;
use fla_rwkv6::{RecurrentBwdInputs, RecurrentFwdInputs, RecurrentFwdOptions, recurrent_bwd, recurrent_fwd};

use super::{Case, Computed, Gpu, shape};
use crate::Result;

/// Outputs and gradients, token by token.
pub(super) fn recurrent<T: Element>(gpu: &Gpu, case: &Case) -> Result<Vec<Computed>> {
    let upload = |name| gpu.upload::<T>(case, name);
    let (r, k, v, w, u) = (upload("r")?, upload("k")?, upload("v")?, upload("w")?, upload("u")?);
    let (d_o, shape) = (upload("do")?, shape(case)?);
    let initial = gpu.upload_optional::<f32>(case, "initial_state")?;
    let d_final = gpu.upload_optional::<f32>(case, "d_final_state")?;
    let initial_state = initial.as_ref().map(|state| state as &dyn DevicePtr<f32>);
    let d_final_state = d_final.as_ref().map(|state| state as &dyn DevicePtr<f32>);
    let options = RecurrentFwdOptions::new(case.scale() as f32);

    let x = RecurrentFwdInputs { r: &r, k: &k, v: &v, w: &w, u: &u, initial_state, cu_seqlens: None };
    let y = recurrent_fwd(&gpu.device, &shape, &x, &options)?;
    let x = RecurrentBwdInputs { r: &r, k: &k, v: &v, w: &w, u: &u, initial_state, d_o: &d_o, d_final_state };
    let dx = recurrent_bwd(&gpu.device, &shape, &x, &options)?;
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
