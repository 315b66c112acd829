//! Tensors that the benchmarks of the chunk passes share, and the heads on which they are verified.
#![allow(dead_code, reason = "every benchmark uses its part")]

use std::sync::Arc;

use fla_core::cudarc::driver::{CudaSlice, CudaStream};
use fla_core::{SeqLens, Shape};
use fla_reference::compare::relative_rms;
use fla_reference::inputs::{Gates, Rng};
use fla_reference::rwkv6::{self, OutputGrads};
use fla_reference::tolerance::{Backend, Class, Dtype, Key, Model, Pass, limit};
use half::bf16;

/// What is timed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Problem {
    /// B, T, H and D, which is K and V.
    pub(crate) dims: [usize; 4],
    pub(crate) gates: Gates,
}

/// Training on the whole GPU with heads of 64 and of 128, one long sequence, and a batch that leaves most of the GPU idle; then
/// decays of which no two factors of a chunk have a common range.
pub(crate) const PROBLEMS: [Problem; 5] = [
    Problem { dims: [8, 4096, 64, 64], gates: Gates::LogSigmoid },
    Problem { dims: [4, 4096, 64, 128], gates: Gates::LogSigmoid },
    Problem { dims: [1, 32768, 64, 64], gates: Gates::LogSigmoid },
    Problem { dims: [8, 1024, 8, 64], gates: Gates::LogSigmoid },
    Problem { dims: [8, 4096, 64, 64], gates: Gates::Mixed },
];

impl Problem {
    /// As records name it.
    pub(crate) fn name(&self) -> String {
        let [b, t, h, d] = self.dims;
        let gates = if self.gates == Gates::Mixed { " mixed decays" } else { "" };
        format!("B{b} T{t} H{h} D{d}{gates}")
    }

    /// Factor of the output.
    pub(crate) fn scale(&self) -> f32 {
        (self.dims[3] as f32).powf(-0.5)
    }
}

/// Rows that are made; a tensor has them over and over, and since this is a prime no head sees one twice soon.
const ROWS: usize = 15_013;

/// Tensors on the host and on the device, in bf16.
#[derive(Debug)]
pub(crate) struct Data {
    shape: Shape,
    scale: f32,
    /// r, k, v, w and d_o.
    host: [Vec<bf16>; 5],
    pub(crate) device: [CudaSlice<bf16>; 5],
    /// The bonus of a head; all have the same.
    host_u: Vec<bf16>,
    pub(crate) u: CudaSlice<bf16>,
}

impl Data {
    pub(crate) fn new(stream: &Arc<CudaStream>, problem: &Problem) -> Self {
        let [b, t, h, d] = problem.dims;
        let shape = Shape { seqs: SeqLens::dense(b, t), h, k: d, v: d };
        let mut rng = Rng::new(1);
        let narrowed = |x: Vec<f32>| x.into_iter().map(bf16::from_f32).collect::<Vec<bf16>>();
        let host = [
            rng.normal(ROWS * d, 1.0),
            rng.normal(ROWS * d, 1.0),
            rng.normal(ROWS * d, 1.0),
            rng.gates(ROWS * d, problem.gates),
            rng.normal(ROWS * d, 1.0),
        ]
        .map(narrowed);
        let device = host.each_ref().map(|some| {
            let len = shape.k_len();
            let mut all = stream.alloc_zeros::<bf16>(len).expect("fits");
            for from in (0..len).step_by(some.len()) {
                let to = len.min(from + some.len());
                stream.memcpy_htod(&some[..to - from], &mut all.slice_mut(from..to)).expect("copies");
            }
            all
        });
        let host_u = narrowed(rng.normal(d, 1.0));
        let u = stream.clone_htod(&host_u.repeat(h)).expect("fits");
        Self { shape, scale: problem.scale(), host, device, host_u, u }
    }

    pub(crate) fn shape(&self) -> &Shape {
        &self.shape
    }

    /// The first and the last head of the batch, as sequence and head: no head sees another.
    fn checked_heads(&self) -> [(usize, usize); 2] {
        [(0, 0), (self.shape.seqs.b() - 1, self.shape.h - 1)]
    }

    /// Output, and the gradients of r, k, v and w, of the checked heads.
    pub(crate) fn reference(&self) -> (Vec<f64>, [Vec<f64>; 4]) {
        let (t, h, d) = (self.shape.seqs.t(), self.shape.h, self.shape.k);
        let [r, k, v, w, d_o] = self.host.each_ref().map(|some| {
            let mut x = Vec::with_capacity(2 * t * d);
            for (i_b, i_h) in self.checked_heads() {
                for i_t in 0..t {
                    let row = ((i_b * t + i_t) * h + i_h) % ROWS;
                    x.extend(some[row * d..][..d].iter().map(|x| x.to_f64()));
                }
            }
            x
        });
        let u: Vec<f64> = self.host_u.iter().map(|x| x.to_f64()).collect();
        let seqs = fla_reference::SeqLens::Dense { b: 2, t };
        let shape = fla_reference::Shape { seqs, h: 1, k: d, v: d };
        let x = rwkv6::Inputs { r: &r, k: &k, v: &v, w: &w, u: &u, initial_state: None };
        let dy = OutputGrads { d_o: &d_o, d_final_state: None };
        let options = rwkv6::Options::new(f64::from(self.scale));
        let o = rwkv6::recurrent_fwd(&shape, &x, &options).o;
        let dx = rwkv6::recurrent_bwd(&shape, &x, &dy, &options);
        (o, [dx.dr, dx.dk, dx.dv, dx.dw])
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
    let key = Key { backend: Backend::Gpu, model: Model::Rwkv6, pass, dtype: Dtype::Bf16, class };
    let limit = limit(key).expect("the table has the row");
    let error = relative_rms(got, want);
    assert!(error <= limit, "the pass is wrong, so it is not timed: {class:?} {error:.2e} > {limit:.1e}");
    error
}

/// Floating-point operations of a forward pass in chunks of 16: two products with a row of K or V for each pair of rows, and two
/// with the state.
pub(crate) fn fwd_flops(shape: &Shape) -> f64 {
    let rows = (shape.k_len() / shape.k) as f64;
    let (k, v) = (shape.k as f64, shape.v as f64);
    rows * (32.0 * (k + v) + 4.0 * k * v)
}

/// The same of a backward pass: five products for each pair of rows, and four with a state or its gradient.
pub(crate) fn bwd_flops(shape: &Shape) -> f64 {
    let rows = (shape.k_len() / shape.k) as f64;
    let (k, v) = (shape.k as f64, shape.v as f64);
    rows * (96.0 * k + 64.0 * v + 8.0 * k * v)
}
