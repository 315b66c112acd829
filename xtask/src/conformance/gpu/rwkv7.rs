//! RWKV-7, both forms.

use fla_core::Element;
use fla_core::cudarc::driver::DevicePtr;
use fla_rwkv7::{
    FusedMulRecurrentBwdInputs, FusedMulRecurrentFwdInputs, RecurrentBwdInputs, RecurrentFwdInputs,
    RecurrentFwdOptions, fused_mul_recurrent_bwd, fused_mul_recurrent_fwd, recurrent_bwd, recurrent_fwd,
};

use super::{Case, Computed, Gpu, shape};
use crate::Result;

/// Outputs and gradients from (a, b), token by token.
pub(super) fn recurrent<T: Element>(gpu: &Gpu, case: &Case) -> Result<Vec<Computed>> {
    let upload = |name| gpu.upload::<T>(case, name);
    let (r, w, k, v, a, b) =
        (upload("r")?, upload("w")?, upload("k")?, upload("v")?, upload("a")?, upload("b")?);
    let (d_o, shape) = (upload("do")?, shape(case)?);
    let initial = gpu.upload_optional::<f32>(case, "initial_state")?;
    let d_final = gpu.upload_optional::<f32>(case, "d_final_state")?;
    let initial_state = initial.as_ref().map(|state| state as &dyn DevicePtr<f32>);
    let d_final_state = d_final.as_ref().map(|state| state as &dyn DevicePtr<f32>);
    let options = RecurrentFwdOptions::new().with_scale(case.scale() as f32);

    let x = RecurrentFwdInputs { r: &r, w: &w, k: &k, v: &v, a: &a, b: &b, initial_state, cu_seqlens: None };
    let y = recurrent_fwd(&gpu.device, &shape, &x, &options)?;
    let x = RecurrentBwdInputs {
        r: &r,
        w: &w,
        k: &k,
        v: &v,
        a: &a,
        b: &b,
        initial_state,
        d_o: &d_o,
        d_final_state,
    };
    let dx = recurrent_bwd(&gpu.device, &shape, &x, &options)?;
    Ok(vec![
        gpu.computed("o", &y.o)?,
        gpu.computed("final_state", &y.final_state)?,
        gpu.computed("dr", &dx.dr)?,
        gpu.computed("dw", &dx.dw)?,
        gpu.computed("dk", &dx.dk)?,
        gpu.computed("dv", &dx.dv)?,
        gpu.computed("da", &dx.da)?,
        gpu.computed("db", &dx.db)?,
        gpu.computed("d_initial_state", &dx.d_initial_state)?,
    ])
}

/// Outputs and gradients from (kk, a), token by token.
pub(super) fn fused_mul_recurrent<T: Element>(gpu: &Gpu, case: &Case) -> Result<Vec<Computed>> {
    let upload = |name| gpu.upload::<T>(case, name);
    let (r, w, k, v, kk, a) =
        (upload("r")?, upload("w")?, upload("k")?, upload("v")?, upload("kk")?, upload("a")?);
    let (d_o, shape) = (upload("do")?, shape(case)?);
    let initial = gpu.upload_optional::<f32>(case, "initial_state")?;
    let d_final = gpu.upload_optional::<f32>(case, "d_final_state")?;
    let initial_state = initial.as_ref().map(|state| state as &dyn DevicePtr<f32>);
    let d_final_state = d_final.as_ref().map(|state| state as &dyn DevicePtr<f32>);
    let options = RecurrentFwdOptions::new().with_scale(case.scale() as f32);

    let x = FusedMulRecurrentFwdInputs {
        r: &r,
        w: &w,
        k: &k,
        v: &v,
        kk: &kk,
        a: &a,
        initial_state,
        cu_seqlens: None,
    };
    let y = fused_mul_recurrent_fwd(&gpu.device, &shape, &x, &options)?;
    let x = FusedMulRecurrentBwdInputs {
        r: &r,
        w: &w,
        k: &k,
        v: &v,
        kk: &kk,
        a: &a,
        initial_state,
        d_o: &d_o,
        d_final_state,
    };
    let dx = fused_mul_recurrent_bwd(&gpu.device, &shape, &x, &options)?;
    Ok(vec![
        gpu.computed("o", &y.o)?,
        gpu.computed("final_state", &y.final_state)?,
        gpu.computed("dr", &dx.dr)?,
        gpu.computed("dw", &dx.dw)?,
        gpu.computed("dk", &dx.dk)?,
        gpu.computed("dv", &dx.dv)?,
        gpu.computed("dkk", &dx.dkk)?,
        gpu.computed("da", &dx.da)?,
        gpu.computed("d_initial_state", &dx.d_initial_state)?,
    ])
}
