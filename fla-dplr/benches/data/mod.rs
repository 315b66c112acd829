//! Tensors that the benchmarks of the chunk passes share, and the heads on which they are verified.
#![allow(dead_code, reason = "every benchmark uses its part")]

use std::sync::Arc;

use fla_core::cudarc::driver::{CudaSlice, CudaStream};
use fla_core::{SeqLens, Shape};
use fla_reference::compare::relative_rms;
use fla_reference::dplr::{self, OutputGrads};
use fla_reference::inputs::{Gates, Rng};
use fla_reference::tolerance::{Backend, Class, Dtype, Key, Model, Pass, limit};
use half::bf16;

/// Shapes of training, B, T, H and D: the whole GPU, and a batch that leaves most of it idle.
pub(crate) const SHAPES: [[usize; 4]; 2] = [[8, 4096, 32, 64], [8, 1024, 8, 64]];

/// Factor of the output.
pub(crate) const SCALE: f32 = 0.125;

/// Rows that are made; a tensor has them over and over, and since this is a prime no head sees one twice soon.
const ROWS: usize = 15_013;

/// Tensors on the host and on the device, in bf16: q, k, v, a, b, g, d_o.
#[derive(Debug)]
pub(crate) struct Data {
    shape: Shape,
    host: [Vec<bf16>; 7],
    pub(crate) device: [CudaSlice<bf16>; 7],
}

impl Data {
    pub(crate) fn new(stream: &Arc<CudaStream>, [b, t, h, d]: [usize; 4], gates: Gates) -> Self {
        let shape = Shape { seqs: SeqLens::dense(b, t), h, k: d, v: d };
        let mut rng = Rng::new(1);
        let removed: Vec<f32> = rng.unit_rows(ROWS, d);
        let host = [
            rng.normal::<f32>(ROWS * d, 1.0),
            rng.normal(ROWS * d, 1.0),
            rng.normal(ROWS * d, 1.0),
            removed.iter().map(|kk| -kk).collect(),
            removed.iter().map(|kk| kk * rng.unit() as f32).collect(),
            rng.gates(ROWS * d, gates),
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
        Self { shape, host, device }
    }

    pub(crate) fn shape(&self) -> &Shape {
        &self.shape
    }

    /// The first and the last head of the batch, as sequence and head: no head sees another.
    fn checked_heads(&self) -> [(usize, usize); 2] {
        [(0, 0), (self.shape.seqs.b() - 1, self.shape.h - 1)]
    }

    /// Output, and the gradients of q, k, v, a, b and g, of the checked heads.
    pub(crate) fn reference(&self) -> (Vec<f64>, [Vec<f64>; 6]) {
        let (t, h, d) = (self.shape.seqs.t(), self.shape.h, self.shape.k);
        let [q, k, v, a, b, g, d_o] = self.host.each_ref().map(|some| {
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
        let x = dplr::Inputs { q: &q, k: &k, v: &v, a: &a, b: &b, g: &g, initial_state: None };
        let dy = OutputGrads { d_o: &d_o, d_final_state: None };
        let options = dplr::Options::new(f64::from(SCALE));
        let o = dplr::recurrent_fwd(&shape, &x, &options).o;
        let dx = dplr::recurrent_bwd(&shape, &x, &dy, &options);
        (o, [dx.dq, dx.dk, dx.dv, dx.da, dx.db, dx.dg])
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
    let key = Key { backend: Backend::Gpu, model: Model::Dplr, pass, dtype: Dtype::Bf16, class };
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
