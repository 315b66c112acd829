//! The gated delta rule.

use fla_core::Element;
use fla_core::cudarc::driver::{CudaSlice, DevicePtr};
use fla_gated_delta::{
    Beta, BetaMap, ChunkBwdInputs, ChunkFwdInputs, ChunkFwdOptions, Gate, GateForm, QkNorm,
    RecurrentBwdInputs, RecurrentFwdInputs, RecurrentFwdOptions, Shape, chunk_bwd, chunk_fwd, recurrent_bwd,
    recurrent_fwd,
};

use super::{Case, Computed, Gpu, seqs};
use crate::Result;

/// The tensors of a case on the GPU, and what is asked of the operator.
struct Inputs<T> {
    shape: Shape,
    options: RecurrentFwdOptions,
    q: CudaSlice<T>,
    k: CudaSlice<T>,
    v: CudaSlice<T>,
    beta: CudaSlice<T>,
    d_o: CudaSlice<T>,
    log_decay: CudaSlice<f32>,
    logits: CudaSlice<T>,
    a_log: Option<CudaSlice<f32>>,
    dt_bias: Option<CudaSlice<f32>>,
    initial_state: Option<CudaSlice<f32>>,
    d_final_state: Option<CudaSlice<f32>>,
}

impl<T: Element> Inputs<T> {
    fn new(gpu: &Gpu, case: &Case) -> Result<Self> {
        let upload = |name| gpu.upload::<T>(case, name);
        let optional = |name| gpu.upload_optional::<f32>(case, name);
        let a_log = optional("A_log")?;
        let options = RecurrentFwdOptions::new(case.scale() as f32)
            .with_gate(if a_log.is_some() { GateForm::Raw } else { GateForm::Log })
            .with_qk_norm(if case.flag("qk_l2norm") { QkNorm::L2 } else { QkNorm::AsGiven })
            .with_beta_map(match (case.flag("beta_sigmoid"), case.flag("allow_neg_eigval")) {
                (false, _) => BetaMap::AsGiven,
                (true, false) => BetaMap::Sigmoid,
                (true, true) => BetaMap::TwiceSigmoid,
            });
        let dim = |name| case.dim(name);
        Ok(Self {
            shape: Shape { seqs: seqs(case)?, h: dim("H"), hv: dim("HV"), k: dim("K"), v: dim("V") },
            options,
            q: upload("q")?,
            k: upload("k")?,
            v: upload("v")?,
            beta: upload("beta")?,
            d_o: upload("do")?,
            log_decay: gpu.upload(case, "g")?,
            logits: upload("g")?,
            a_log,
            dt_bias: optional("dt_bias")?,
            initial_state: optional("initial_state")?,
            d_final_state: optional("d_final_state")?,
        })
    }

    fn gate(&self) -> Gate<'_, T> {
        match &self.a_log {
            Some(a_log) => {
                let dt_bias = self.dt_bias.as_ref().map(|x| x as &dyn DevicePtr<f32>);
                Gate::Raw { g: &self.logits, a_log, dt_bias }
            }
            None => Gate::Log(&self.log_decay),
        }
    }
}

fn optional(state: &Option<CudaSlice<f32>>) -> Option<&dyn DevicePtr<f32>> {
    state.as_ref().map(|state| state as &dyn DevicePtr<f32>)
}

/// What the backward passes return, as far as both have it.
struct Grads<T> {
    narrow: [(&'static str, Option<CudaSlice<T>>); 5],
    wide: [(&'static str, Option<CudaSlice<f32>>); 4],
}

impl<T: Element> Grads<T> {
    fn computed(&self, gpu: &Gpu, o: &CudaSlice<T>, final_state: &CudaSlice<f32>) -> Result<Vec<Computed>> {
        let mut all = vec![gpu.computed("o", o)?, gpu.computed("final_state", final_state)?];
        for (name, tensor) in &self.narrow {
            all.extend(tensor.as_ref().map(|tensor| gpu.computed(name, tensor)).transpose()?);
        }
        for (name, tensor) in &self.wide {
            all.extend(tensor.as_ref().map(|tensor| gpu.computed(name, tensor)).transpose()?);
        }
        Ok(all)
    }
}

/// Outputs and gradients, chunk by chunk.
pub(super) fn chunk<T: Element>(gpu: &Gpu, case: &Case) -> Result<Vec<Computed>> {
    let given = Inputs::<T>::new(gpu, case)?;
    let Inputs { shape, q, k, v, beta, d_o, initial_state, d_final_state, .. } = &given;
    let RecurrentFwdOptions { scale, gate, beta_map, qk_norm, .. } = given.options;
    let options = ChunkFwdOptions::new(scale).with_gate(gate).with_beta_map(beta_map).with_qk_norm(qk_norm);
    let (g, beta, initial_state) = (given.gate(), Beta::PerHead(beta), optional(initial_state));
    let y = chunk_fwd(&gpu.device, shape, &ChunkFwdInputs { q, k, v, g, beta, initial_state }, &options)?;
    let d_final_state = optional(d_final_state);
    let x = ChunkBwdInputs { q, k, v, g, beta, initial_state, d_o, d_final_state };
    let dx = chunk_bwd(&gpu.device, shape, &x, &options)?;
    let grads = Grads {
        narrow: [
            ("dq", Some(dx.dq)),
            ("dk", Some(dx.dk)),
            ("dv", Some(dx.dv)),
            ("dg", dx.dg_logits),
            ("dbeta", dx.dbeta),
        ],
        wide: [
            ("dg", dx.dg),
            ("dA_log", dx.d_a_log),
            ("ddt_bias", dx.d_dt_bias),
            ("d_initial_state", Some(dx.d_initial_state)),
        ],
    };
    grads.computed(gpu, &y.o, &y.final_state)
}

/// Outputs and gradients, token by token.
pub(super) fn recurrent<T: Element>(gpu: &Gpu, case: &Case) -> Result<Vec<Computed>> {
    let given = Inputs::<T>::new(gpu, case)?;
    let Inputs { shape, options, q, k, v, beta, d_o, initial_state, d_final_state, .. } = &given;
    let (g, beta, initial_state) = (given.gate(), Beta::PerHead(beta), optional(initial_state));
    let (gk, gv, cu_seqlens) = (None, None, None);
    let x = RecurrentFwdInputs { q, k, v, g, gk, gv, beta, initial_state, cu_seqlens };
    let y = recurrent_fwd(&gpu.device, shape, &x, options)?;
    let d_final_state = optional(d_final_state);
    let x = RecurrentBwdInputs { q, k, v, g, gk, gv, beta, initial_state, d_o, d_final_state };
    let dx = recurrent_bwd(&gpu.device, shape, &x, options)?;
    let grads = Grads {
        narrow: [
            ("dq", Some(dx.dq)),
            ("dk", Some(dx.dk)),
            ("dv", Some(dx.dv)),
            ("dg", dx.dg_logits),
            ("dbeta", dx.dbeta),
        ],
        wide: [
            ("dg", dx.dg),
            ("dA_log", dx.d_a_log),
            ("ddt_bias", dx.d_dt_bias),
            ("d_initial_state", Some(dx.d_initial_state)),
        ],
    };
    grads.computed(gpu, &y.o, &y.final_state)
}
