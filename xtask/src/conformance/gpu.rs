//! Runs a case on the GPU: a file for each model.

mod dplr;
mod gated_delta;
mod rwkv4;
mod rwkv6;
mod rwkv7;

use std::sync::Arc;

use fla_core::cudarc::driver::{CudaSlice, CudaStream};
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
    /// Every output and gradient.
    Computed(Vec<Computed>),
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
        match dtype {
            Dtype::F32 => self.compute_in::<f32>(case, form),
            Dtype::Bf16 => self.compute_in::<bf16>(case, form),
            Dtype::F16 => self.compute_in::<f16>(case, form),
            Dtype::F64 => missing(case, "f64 kernel"),
        }
    }

    fn compute_in<T: Element>(&self, case: &Case, form: Form) -> Result<Outcome> {
        let computed = match (case.operator.op, form) {
            (Op::GatedDelta, Form::Chunk) => gated_delta::chunk::<T>(self, case)?,
            (Op::GatedDelta, Form::Recurrent) => gated_delta::recurrent::<T>(self, case)?,
            (Op::Dplr, Form::Recurrent) => dplr::recurrent::<T>(self, case)?,
            (Op::Dplr, Form::Chunk) => dplr::chunk::<T>(self, case)?,
            (Op::Rwkv6, Form::Chunk) => rwkv6::chunk::<T>(self, case)?,
            (Op::Rwkv6, Form::Recurrent) => rwkv6::recurrent::<T>(self, case)?,
            (Op::Rwkv7, Form::Recurrent) => rwkv7::recurrent::<T>(self, case)?,
            (Op::Rwkv7, Form::Chunk) => rwkv7::chunk::<T>(self, case)?,
            (Op::FusedMul, Form::Chunk) => rwkv7::fused_mul_chunk::<T>(self, case)?,
            (Op::FusedMul, Form::Recurrent) => rwkv7::fused_mul_recurrent::<T>(self, case)?,
            (Op::Rwkv4, Form::Chunk) => rwkv4::chunk::<T>(self, case)?,
            (Op::Rwkv4, Form::Recurrent) => rwkv4::recurrent::<T>(self, case)?,
            (Op::Addcmul, Form::Single) => rwkv7::addcmul::<T>(self, case)?,
            (Op::KUpdate, Form::Single) => rwkv7::k_update::<T>(self, case)?,
            (Op::GateOutputCorrection, Form::Single) => rwkv7::gate_output_correction::<T>(self, case)?,
            (Op::ChannelMixing, Form::Single) => rwkv7::channel_mixing::<T>(self, case)?,
            (Op::TokenShift, Form::Single) => rwkv7::token_shift::<T>(self, case)?,
            (_, Form::Single) => return missing(case, "kernel"),
            _ => return missing(case, &format!("{} pass", form.name())),
        };
        Ok(Outcome::Computed(computed))
    }

    /// A tensor of the case.
    fn upload<T: Element>(&self, case: &Case, name: &str) -> Result<CudaSlice<T>> {
        self.upload_values(&case.values::<f32>(name))
    }

    /// A tensor that the case may not have.
    fn upload_optional<T: Element>(&self, case: &Case, name: &str) -> Result<Option<CudaSlice<T>>> {
        case.optional::<f32>(name).map(|values| self.upload_values(&values)).transpose()
    }

    fn upload_values<T: Element>(&self, values: &[f32]) -> Result<CudaSlice<T>> {
        let values: Vec<T> = values.iter().map(|x| T::from_f32(*x)).collect();
        Ok(self.stream.clone_htod(&values)?)
    }

    /// A result, under the name that it has in the file.
    fn computed<T: Element>(&self, name: &'static str, tensor: &CudaSlice<T>) -> Result<Computed> {
        let values = self.stream.clone_dtoh(tensor)?;
        Ok(Computed { name, values: values.into_iter().map(|x| f64::from(x.to_f32())).collect() })
    }
}

fn missing(case: &Case, what: &str) -> Result<Outcome> {
    Ok(Outcome::Missing(format!("the gpu {what} of {} does not exist yet", case.operator.name)))
}

/// The sequences of the case.
fn seqs(case: &Case) -> Result<SeqLens> {
    Ok(match &case.seqs {
        fla_reference::SeqLens::Dense { b, t } => SeqLens::dense(*b, *t),
        fla_reference::SeqLens::Packed { cu_seqlens } => SeqLens::packed(cu_seqlens, case.seqs.tokens())?,
    })
}

/// The dims of an operator with a matrix state.
fn shape(case: &Case) -> Result<Shape> {
    Ok(Shape { seqs: seqs(case)?, h: case.dim("H"), k: case.dim("K"), v: case.dim("V") })
}
