//! The gated delta rule.

use fla_core::Element;
use fla_core::cudarc::driver::DevicePtr;
use fla_gated_delta::{
    Beta, BetaMap, Gate, GateForm, QkNorm, RecurrentBwdInputs, RecurrentFwdInputs, RecurrentFwdOptions,
    Shape, recurrent_bwd, recurrent_fwd,
};

use super::{Case, Computed, Gpu, seqs};
use crate::Result;

/// Outputs and gradients, token by token.
pub(super) fn recurrent<T: Element>(gpu: &Gpu, case: &Case) -> Result<Vec<Computed>> {
    let upload = |name| gpu.upload::<T>(case, name);
    let (q, k, v, beta, d_o) = (upload("q")?, upload("k")?, upload("v")?, upload("beta")?, upload("do")?);
    let (log_decay, logits) = (gpu.upload::<f32>(case, "g")?, upload("g")?);
    let optional = |name| gpu.upload_optional::<f32>(case, name);
    let (a_log, dt_bias) = (optional("A_log")?, optional("dt_bias")?);
    let (initial, d_final) = (optional("initial_state")?, optional("d_final_state")?);
    let initial_state = initial.as_ref().map(|state| state as &dyn DevicePtr<f32>);
    let d_final_state = d_final.as_ref().map(|state| state as &dyn DevicePtr<f32>);
    let shape =
        Shape { seqs: seqs(case)?, h: case.dim("H"), hv: case.dim("HV"), k: case.dim("K"), v: case.dim("V") };
    let options = RecurrentFwdOptions::new(case.scale() as f32)
        .with_gate(if a_log.is_some() { GateForm::Raw } else { GateForm::Log })
        .with_qk_norm(if case.flag("qk_l2norm") { QkNorm::L2 } else { QkNorm::AsGiven })
        .with_beta_map(match (case.flag("beta_sigmoid"), case.flag("allow_neg_eigval")) {
            (false, _) => BetaMap::AsGiven,
            (true, false) => BetaMap::Sigmoid,
            (true, true) => BetaMap::TwiceSigmoid,
        });
    let g = match &a_log {
        Some(a_log) => {
            Gate::Raw { g: &logits, a_log, dt_bias: dt_bias.as_ref().map(|x| x as &dyn DevicePtr<f32>) }
        }
        None => Gate::Log(&log_decay),
    };
    let beta = Beta::PerHead(&beta);

    let (gk, gv, cu_seqlens) = (None, None, None);
    let x = RecurrentFwdInputs { q: &q, k: &k, v: &v, g, gk, gv, beta, initial_state, cu_seqlens };
    let y = recurrent_fwd(&gpu.device, &shape, &x, &options)?;
    let x =
        RecurrentBwdInputs { q: &q, k: &k, v: &v, g, gk, gv, beta, initial_state, d_o: &d_o, d_final_state };
    let dx = recurrent_bwd(&gpu.device, &shape, &x, &options)?;
    let mut all = vec![
        gpu.computed("o", &y.o)?,
        gpu.computed("final_state", &y.final_state)?,
        gpu.computed("dq", &dx.dq)?,
        gpu.computed("dk", &dx.dk)?,
        gpu.computed("dv", &dx.dv)?,
        gpu.computed("d_initial_state", &dx.d_initial_state)?,
    ];
    for (name, tensor) in [("dg", &dx.dg), ("dA_log", &dx.d_a_log), ("ddt_bias", &dx.d_dt_bias)] {
        all.extend(tensor.as_ref().map(|tensor| gpu.computed(name, tensor)).transpose()?);
    }
    for (name, tensor) in [("dg", &dx.dg_logits), ("dbeta", &dx.dbeta)] {
        all.extend(tensor.as_ref().map(|tensor| gpu.computed(name, tensor)).transpose()?);
    }
    Ok(all)
}
