//! The DPLR delta rule.

use fla_core::Element;
use fla_core::cudarc::driver::DevicePtr;
use fla_dplr::{RecurrentBwdInputs, RecurrentFwdInputs, RecurrentFwdOptions, recurrent_bwd, recurrent_fwd};

use super::{Case, Computed, Gpu, shape};
use crate::Result;

/// Outputs and gradients, token by token.
pub(super) fn recurrent<T: Element>(gpu: &Gpu, case: &Case) -> Result<Vec<Computed>> {
    let upload = |name| gpu.upload::<T>(case, name);
    let (q, k, v, a, b, g) =
        (upload("q")?, upload("k")?, upload("v")?, upload("a")?, upload("b")?, upload("gk")?);
    let (d_o, shape) = (upload("do")?, shape(case)?);
    let initial = gpu.upload_optional::<f32>(case, "initial_state")?;
    let d_final = gpu.upload_optional::<f32>(case, "d_final_state")?;
    let initial_state = initial.as_ref().map(|state| state as &dyn DevicePtr<f32>);
    let d_final_state = d_final.as_ref().map(|state| state as &dyn DevicePtr<f32>);
    let options = RecurrentFwdOptions::new(case.scale() as f32);

    let x = RecurrentFwdInputs { q: &q, k: &k, v: &v, a: &a, b: &b, g: &g, initial_state, cu_seqlens: None };
    let y = recurrent_fwd(&gpu.device, &shape, &x, &options)?;
    let x = RecurrentBwdInputs {
        q: &q,
        k: &k,
        v: &v,
        a: &a,
        b: &b,
        g: &g,
        initial_state,
        d_o: &d_o,
        d_final_state,
    };
    let dx = recurrent_bwd(&gpu.device, &shape, &x, &options)?;
    Ok(vec![
        gpu.computed("o", &y.o)?,
        gpu.computed("final_state", &y.final_state)?,
        gpu.computed("dq", &dx.dq)?,
        gpu.computed("dk", &dx.dk)?,
        gpu.computed("dv", &dx.dv)?,
        gpu.computed("da", &dx.da)?,
        gpu.computed("db", &dx.db)?,
        gpu.computed("dgk", &dx.dg)?,
        gpu.computed("d_initial_state", &dx.d_initial_state)?,
    ])
}
