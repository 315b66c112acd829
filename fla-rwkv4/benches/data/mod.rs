//! Tensors that the benchmarks of the chunk passes share, and the channels on which they are verified.
#![allow(dead_code, reason = "every benchmark uses its part")]

use std::sync::Arc;

use fla_core::cudarc::driver::{CudaSlice, CudaStream};
use fla_core::{DType, Element, SeqLens};
use fla_reference::compare::relative_rms;
use fla_reference::inputs::Rng;
use fla_reference::rwkv4 as reference;
use fla_reference::tolerance::{Backend, Class, Dtype, Key, Model, Pass, limit};
use fla_rwkv4::Shape;

/// Shapes of training, B, T and C: a batch that fills the GPU, one long sequence that has to be split, a small one.
pub(crate) const SHAPES: [[usize; 3]; 4] =
    [[8, 4096, 4096], [1, 32768, 4096], [1, 8192, 768], [8, 1024, 512]];

/// Channels that are compared with the reference; a sequence's channels do not see each other.
const CHECKED: usize = 16;

/// Tensors on the host and on the device.
#[derive(Debug)]
pub(crate) struct Data<T> {
    shape: Shape,
    host: Vec<Vec<f32>>,
    pub(crate) w: CudaSlice<f32>,
    pub(crate) u: CudaSlice<f32>,
    pub(crate) k: CudaSlice<T>,
    pub(crate) v: CudaSlice<T>,
    pub(crate) d_o: CudaSlice<T>,
}

impl<T: Element> Data<T> {
    pub(crate) fn new(stream: &Arc<CudaStream>, [b, t, c]: [usize; 3]) -> Self {
        let shape = Shape { seqs: SeqLens::dense(b, t), c };
        let mut rng = Rng::new(1);
        let w: Vec<f32> = rng.uniform(c, -6.0, 1.5);
        let u: Vec<f32> = rng.normal(c, 0.5);
        // A prime number of values, over and over: quickly made, and no two rows alike.
        let mut tensor = || {
            let some: Vec<T> = rng.normal::<f32>(1_000_003, 1.0).into_iter().map(T::from_f32).collect();
            let len = shape.token_len();
            let mut all = stream.alloc_zeros::<T>(len).expect("fits");
            for from in (0..len).step_by(some.len()) {
                let to = len.min(from + some.len());
                stream.memcpy_htod(&some[..to - from], &mut all.slice_mut(from..to)).expect("copies");
            }
            let rows = (0..len).step_by(c);
            let channels = (0..c).step_by(c / CHECKED).take(CHECKED);
            let checked = rows.flat_map(|row| channels.clone().map(move |i_c| row + i_c));
            (all, checked.map(|i| some[i % some.len()].to_f32()).collect::<Vec<f32>>())
        };
        let [(k, host_k), (v, host_v), (d_o, host_d_o)] = [tensor(), tensor(), tensor()];
        Self {
            host: vec![host_k, host_v, host_d_o],
            w: stream.clone_htod(&w).expect("fits"),
            u: stream.clone_htod(&u).expect("fits"),
            k,
            v,
            d_o,
            shape,
        }
    }

    pub(crate) fn shape(&self) -> &Shape {
        &self.shape
    }

    /// Outputs and gradients of the checked channels.
    pub(crate) fn reference(&self) -> (reference::Outputs<f64>, reference::Grads<f64>) {
        let c = CHECKED;
        let wide = |x: &[f32]| x.iter().map(|x| f64::from(*x)).collect::<Vec<f64>>();
        let parameter = |x: &CudaSlice<f32>| {
            let x = x.stream().clone_dtoh(x).expect("copies");
            wide(&x.iter().copied().step_by(self.shape.c / c).take(c).collect::<Vec<f32>>())
        };
        let (w, u) = (parameter(&self.w), parameter(&self.u));
        let [k, v, d_o] = [0, 1, 2].map(|i| wide(&self.host[i]));
        let seqs = fla_reference::SeqLens::Dense { b: self.shape.seqs.b(), t: self.shape.seqs.t() };
        let shape = reference::Shape { seqs, c };
        let x = reference::Inputs { w: &w, u: &u, k: &k, v: &v, initial_state: None };
        let dy = reference::OutputGrads { d_o: &d_o, d_final_state: None };
        let options = reference::Options::new();
        (reference::recurrent_fwd(&shape, &x, &options), reference::recurrent_bwd(&shape, &x, &dy, &options))
    }

    /// The checked channels of a tensor whose rows are C wide.
    pub(crate) fn checked<E: Element>(&self, x: &CudaSlice<E>) -> Vec<f64> {
        let x = x.stream().clone_dtoh(x).expect("copies");
        let step = self.shape.c / CHECKED;
        let rows = x.chunks(self.shape.c);
        rows.flat_map(|row| row.iter().step_by(step).take(CHECKED)).map(|x| f64::from(x.to_f32())).collect()
    }
}

/// The relative RMS error, if it is within the limit.
///
/// # Panics
///
/// When it is not: what is wrong is not timed.
pub(crate) fn verified<T: Element>(pass: Pass, class: Class, got: &[f64], want: &[f64]) -> f64 {
    let dtype = match T::DTYPE {
        DType::F32 => Dtype::F32,
        DType::Bf16 => Dtype::Bf16,
        DType::F16 => Dtype::F16,
    };
    let key = Key { backend: Backend::Gpu, model: Model::Rwkv4, pass, dtype, class };
    let limit = limit(key).expect("the table has the row");
    let error = relative_rms(got, want);
    assert!(error <= limit, "the pass is wrong, so it is not timed: {class:?} {error:.2e} > {limit:.0e}");
    error
}
