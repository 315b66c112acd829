//! Runs a case on the GPU: one function per operator that has a kernel.

use std::sync::Arc;

use fla_core::cudarc::driver::{CudaSlice, CudaStream, DevicePtr};
use fla_core::{Device, Element, SeqLens, Shape};
use fla_reference::tolerance::Dtype;
use half::{bf16, f16};

use super::case::Case;
use super::reference::Computed;
use super::schema::{Form, Op};
use crate::Result;

/// A device, and the stream that every case runs on.
pub(super) struct Gpu {
    device: Device,
    stream: Arc<CudaStream>,
}

/// What the GPU made of a case.
pub(super) enum Outcome {
    /// There is no kernel for it, for this reason.
    Missing(String),
    /// Outputs, but no gradients.
    Forward {
        /// What was computed.
        computed: Vec<Computed>,
        /// Why there are no gradients.
        no_backward: String,
    },
}

impl Gpu {
    /// Opens the first device.
    pub(super) fn open() -> Result<Gpu> {
        let device = Device::new(0)?;
        let stream = device.context().new_stream()?;
        Ok(Gpu { device, stream })
    }

    /// Runs a case whose vectors are exact in `dtype`.
    pub(super) fn compute(&self, case: &Case, form: Form, dtype: Dtype) -> Result<Outcome> {
        let name = case.operator.name;
        let missing =
            |what: String| Ok(Outcome::Missing(format!("the gpu {what} of {name} does not exist yet")));
        let computed = match (case.operator.op, form) {
            (Op::Dplr, Form::Recurrent) => match dtype {
                Dtype::F32 => self.dplr::<f32>(case)?,
                Dtype::Bf16 => self.dplr::<bf16>(case)?,
                Dtype::F16 => self.dplr::<f16>(case)?,
                Dtype::F64 => return missing("f64 kernel".to_owned()),
            },
            (Op::Rwkv7, Form::Recurrent) => match dtype {
                Dtype::F32 => self.rwkv7::<f32>(case)?,
                Dtype::Bf16 => self.rwkv7::<bf16>(case)?,
                Dtype::F16 => self.rwkv7::<f16>(case)?,
                Dtype::F64 => return missing("f64 kernel".to_owned()),
            },
            (Op::FusedMul, Form::Recurrent) => match dtype {
                Dtype::F32 => self.rwkv7_fused_mul::<f32>(case)?,
                Dtype::Bf16 => self.rwkv7_fused_mul::<bf16>(case)?,
                Dtype::F16 => self.rwkv7_fused_mul::<f16>(case)?,
                Dtype::F64 => return missing("f64 kernel".to_owned()),
            },
            (_, Form::Single) => return missing("kernel".to_owned()),
            _ => return missing(format!("{} pass", form.name())),
        };
        let no_backward = format!("gradients: the gpu {} backward of {name} does not exist yet", form.name());
        Ok(Outcome::Forward { computed, no_backward })
    }

    fn dplr<T: Element>(&self, case: &Case) -> Result<Vec<Computed>> {
        let upload = |name| self.upload::<T>(&case.values(name));
        let (q, k, v, a, b, g) =
            (upload("q")?, upload("k")?, upload("v")?, upload("a")?, upload("b")?, upload("gk")?);
        let initial_state = self.initial_state(case)?;
        let options = fla_dplr::RecurrentFwdOptions::new(case.scale() as f32);
        let x = fla_dplr::RecurrentFwdInputs {
            q: &q,
            k: &k,
            v: &v,
            a: &a,
            b: &b,
            g: &g,
            initial_state: initial_state.as_ref().map(|state| state as &dyn DevicePtr<f32>),
            cu_seqlens: None,
        };
        let y = fla_dplr::recurrent_fwd(&self.device, &shape(case)?, &x, &options)?;
        Ok(vec![self.computed("o", &y.o)?, self.computed("final_state", &y.final_state)?])
    }

    fn rwkv7<T: Element>(&self, case: &Case) -> Result<Vec<Computed>> {
        let upload = |name| self.upload::<T>(&case.values(name));
        let (r, w, k, v, a, b) =
            (upload("r")?, upload("w")?, upload("k")?, upload("v")?, upload("a")?, upload("b")?);
        let initial_state = self.initial_state(case)?;
        let options = fla_rwkv7::RecurrentFwdOptions::new().with_scale(case.scale() as f32);
        let x = fla_rwkv7::RecurrentFwdInputs {
            r: &r,
            w: &w,
            k: &k,
            v: &v,
            a: &a,
            b: &b,
            initial_state: initial_state.as_ref().map(|state| state as &dyn DevicePtr<f32>),
            cu_seqlens: None,
        };
        let y = fla_rwkv7::recurrent_fwd(&self.device, &shape(case)?, &x, &options)?;
        Ok(vec![self.computed("o", &y.o)?, self.computed("final_state", &y.final_state)?])
    }

    fn rwkv7_fused_mul<T: Element>(&self, case: &Case) -> Result<Vec<Computed>> {
        let upload = |name| self.upload::<T>(&case.values(name));
        let (r, w, k, v, kk, a) =
            (upload("r")?, upload("w")?, upload("k")?, upload("v")?, upload("kk")?, upload("a")?);
        let initial_state = self.initial_state(case)?;
        let options = fla_rwkv7::RecurrentFwdOptions::new().with_scale(case.scale() as f32);
        let x = fla_rwkv7::FusedMulRecurrentFwdInputs {
            r: &r,
            w: &w,
            k: &k,
            v: &v,
            kk: &kk,
            a: &a,
            initial_state: initial_state.as_ref().map(|state| state as &dyn DevicePtr<f32>),
            cu_seqlens: None,
        };
        let y = fla_rwkv7::fused_mul_recurrent_fwd(&self.device, &shape(case)?, &x, &options)?;
        Ok(vec![self.computed("o", &y.o)?, self.computed("final_state", &y.final_state)?])
    }

    fn upload<T: Element>(&self, values: &[f32]) -> Result<CudaSlice<T>> {
        let values: Vec<T> = values.iter().map(|x| T::from_f32(*x)).collect();
        Ok(self.stream.clone_htod(&values)?)
    }

    fn initial_state(&self, case: &Case) -> Result<Option<CudaSlice<f32>>> {
        case.optional("initial_state").map(|state| self.upload(&state)).transpose()
    }

    fn computed<T: Element>(&self, name: &'static str, tensor: &CudaSlice<T>) -> Result<Computed> {
        let values = self.stream.clone_dtoh(tensor)?;
        Ok(Computed { name, values: values.into_iter().map(|x| f64::from(x.to_f32())).collect() })
    }
}

fn shape(case: &Case) -> Result<Shape> {
    let seqs = match &case.seqs {
        fla_reference::SeqLens::Dense { b, t } => SeqLens::dense(*b, *t),
        fla_reference::SeqLens::Packed { cu_seqlens } => SeqLens::packed(cu_seqlens, case.seqs.tokens())?,
    };
    Ok(Shape { seqs, h: case.dim("H"), k: case.dim("K"), v: case.dim("V") })
}
