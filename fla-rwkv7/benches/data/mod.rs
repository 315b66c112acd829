//! Tensors that the benchmarks of the chunk passes share, and the heads on which they are verified.
#![allow(dead_code, reason = "every benchmark uses its part")]

use std::sync::Arc;

use fla_core::cudarc::driver::{CudaSlice, CudaStream};
use fla_core::{SeqLens, Shape};
use fla_reference::compare::relative_rms;
use fla_reference::inputs::{Gates, Rng};
use fla_reference::rwkv7::{self, OutputGrads};
use fla_reference::tolerance::{Backend, Class, Dtype, Key, Model, Pass, limit};
use half::bf16;

/// Shapes of training, B, T, H and D: a batch that fills the GPU, one long sequence, one that leaves most of the GPU idle, and
/// heads of 128.
pub(crate) const SHAPES: [[usize; 4]; 4] =
    [[8, 4096, 64, 64], [1, 32768, 64, 64], [8, 1024, 8, 64], [4, 4096, 64, 128]];

/// What the tensors hold.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Form {
    /// Removal and replacement keys, and log decays.
    Keys,
    /// The normalised key and its rate, and logits of decays.
    KeyAndRate,
}

/// Rows that are made; a tensor has them over and over, and since this is a prime no head sees one twice soon.
const ROWS: usize = 15_013;

/// Tensors on the host and on the device, in bf16: r, w, k, v, a or kk, b or a, d_o.
#[derive(Debug)]
pub(crate) struct Data {
    shape: Shape,
    form: Form,
    host: [Vec<bf16>; 7],
    pub(crate) device: [CudaSlice<bf16>; 7],
}

impl Data {
    pub(crate) fn new(stream: &Arc<CudaStream>, [b, t, h, d]: [usize; 4], form: Form) -> Self {
        let shape = Shape { seqs: SeqLens::dense(b, t), h, k: d, v: d };
        let mut rng = Rng::new(1);
        let kk: Vec<f32> = rng.unit_rows(ROWS, d);
        let rates: Vec<f32> = rng.uniform(ROWS * d, 0.0, 1.0);
        let (w, a, b) = match form {
            Form::Keys => (
                rng.gates(ROWS * d, Gates::Rwkv7),
                kk.iter().map(|kk| -kk).collect(),
                kk.iter().zip(&rates).map(|(kk, rate)| kk * rate).collect(),
            ),
            Form::KeyAndRate => (rng.normal(ROWS * d, 1.0), kk, rates),
        };
        let host = [
            rng.normal::<f32>(ROWS * d, 1.0),
            w,
            rng.normal(ROWS * d, 1.0),
            rng.normal(ROWS * d, 1.0),
            a,
            b,
            rng.normal(ROWS * d, 1.0),
        ]
        .map(|x| x.into_iter().map(bf16::from_f32).collect::<Vec<bf16>>());
        let device = host.each_ref().map(|some| {
            let len = shape.k_len();
            let mut all = stream.alloc_zeros::<bf16>(len).expect("fits");
            for from in (0..len).step_by(some.len()) {
                let to = len.min(from + some.len());
                stream.memcpy_htod(&some[..to - from], &mut all.slice_mut(from..to)).expect("copies");
            }
            all
        });
        Self { shape, form, host, device }
    }

    pub(crate) fn shape(&self) -> &Shape {
        &self.shape
    }

    /// The first and the last head of the batch, as sequence and head: no head sees another.
    fn checked_heads(&self) -> [(usize, usize); 2] {
        [(0, 0), (self.shape.seqs.b() - 1, self.shape.h - 1)]
    }

    /// Output, and the gradients in the order of the tensors, of the checked heads.
    pub(crate) fn reference(&self) -> (Vec<f64>, [Vec<f64>; 6]) {
        let (t, h, d) = (self.shape.seqs.t(), self.shape.h, self.shape.k);
        let [r, w, k, v, a, b, d_o] = self.host.each_ref().map(|some| {
            let mut x = Vec::with_capacity(2 * t * d);
            for (i_b, i_h) in self.checked_heads() {
                for i_t in 0..t {
                    let row = ((i_b * t + i_t) * h + i_h) % ROWS;
                    x.extend(some[row * d..][..d].iter().map(|x| x.to_f64()));
                }
            }
            x
        });
        let seqs = fla_reference::SeqLens::Dense { b: 2, t };
        let shape = fla_reference::Shape { seqs, h: 1, k: d, v: d };
        let dy = OutputGrads { d_o: &d_o, d_final_state: None };
        let options = rwkv7::Options::new(1.0);
        match self.form {
            Form::Keys => {
                let x = rwkv7::Inputs { r: &r, w: &w, k: &k, v: &v, a: &a, b: &b, initial_state: None };
                let o = rwkv7::recurrent_fwd(&shape, &x, &options).o;
                let dx = rwkv7::recurrent_bwd(&shape, &x, &dy, &options);
                (o, [dx.dr, dx.dw, dx.dk, dx.dv, dx.da, dx.db])
            }
            Form::KeyAndRate => {
                let log_decay = rwkv7::log_decay_fwd(&w);
                let x = rwkv7::FusedMulInputs {
                    r: &r,
                    w: &log_decay,
                    k: &k,
                    v: &v,
                    kk: &a,
                    a: &b,
                    initial_state: None,
                };
                let o = rwkv7::fused_mul_recurrent_fwd(&shape, &x, &options).o;
                let dx = rwkv7::fused_mul_recurrent_bwd(&shape, &x, &dy, &options);
                let dw = rwkv7::log_decay_bwd(&w, &dx.dw);
                (o, [dx.dr, dw, dx.dk, dx.dv, dx.dkk, dx.da])
            }
        }
    }

    /// The checked heads of a tensor.
    pub(crate) fn checked(&self, x: &CudaSlice<bf16>) -> Vec<f64> {
        let (t, h, d) = (self.shape.seqs.t(), self.shape.h, self.shape.k);
        let mut out = Vec::with_capacity(2 * t * d);
        for (i_b, i_h) in self.checked_heads() {
            let sequence = x.slice(i_b * t * h * d..(i_b + 1) * t * h * d);
            let sequence = x.stream().clone_dtoh(&sequence).expect("copies");
            let rows = sequence.chunks(d).skip(i_h).step_by(h);
            out.extend(rows.flat_map(|row| row.iter().map(|x| x.to_f64())));
        }
        out
    }
}

/// The relative RMS error, if it is within the limit.
///
/// # Panics
///
/// When it is not: what is wrong is not timed.
pub(crate) fn verified(pass: Pass, class: Class, got: &[f64], want: &[f64]) -> f64 {
    let key = Key { backend: Backend::Gpu, model: Model::Rwkv7, pass, dtype: Dtype::Bf16, class };
    let limit = limit(key).expect("the table has the row");
    let error = relative_rms(got, want);
    assert!(error <= limit, "the pass is wrong, so it is not timed: {class:?} {error:.2e} > {limit:.1e}");
    error
}

/// Floating-point operations of a forward pass in chunks of 16: six products with a row of K or V for each pair of rows, and
/// four with the state.
pub(crate) fn fwd_flops(shape: &Shape) -> f64 {
    let rows = (shape.k_len() / shape.k) as f64;
    let (k, v) = (shape.k as f64, shape.v as f64);
    rows * (128.0 * (k + v) + 8.0 * k * v)
}

/// The same of a backward pass: twenty products for each pair of rows, and nine with a state or its gradient.
pub(crate) fn bwd_flops(shape: &Shape) -> f64 {
    let rows = (shape.k_len() / shape.k) as f64;
    let (k, v) = (shape.k as f64, shape.v as f64);
    rows * (384.0 * k + 256.0 * v + 18.0 * k * v)
}
