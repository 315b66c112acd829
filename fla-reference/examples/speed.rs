//! Times the recurrent forward pass of RWKV-7 on one thread.

use std::time::Instant;

use fla_reference::inputs::{Gates, Rng};
use fla_reference::{SeqLens, Shape, rwkv7};

fn main() {
    let shape = Shape { seqs: SeqLens::Dense { b: 1, t: 4096 }, h: 16, k: 64, v: 64 };
    let rows = shape.seqs.tokens() * shape.h;
    let mut rng = Rng::new(1);
    let r: Vec<f32> = rng.normal(rows * shape.k, 1.0);
    let w: Vec<f32> = rng.gates(rows * shape.k, Gates::Rwkv7);
    let k: Vec<f32> = rng.normal(rows * shape.k, 1.0);
    let v: Vec<f32> = rng.normal(rows * shape.v, 1.0);
    let b: Vec<f32> = rng.unit_rows(rows, shape.k);
    let a: Vec<f32> = b.iter().map(|b| -b).collect();
    let x = rwkv7::Inputs { r: &r, w: &w, k: &k, v: &v, a: &a, b: &b, initial_state: None };
    let options = rwkv7::Options::new(1.0);

    const RUNS: usize = 9;
    let times_ms = (0..RUNS).map(|_| {
        let start = Instant::now();
        std::hint::black_box(rwkv7::recurrent_fwd(&shape, &x, &options));
        start.elapsed().as_secs_f64() * 1e3
    });
    // The fastest run is the one that shared its core with the least.
    let fastest_ms = times_ms.fold(f64::INFINITY, f64::min);
    println!("rwkv7::recurrent_fwd, T=4096, H=16, K=V=64, f32, one thread");
    println!("fastest of {RUNS} runs: {fastest_ms:.0} ms");
}
