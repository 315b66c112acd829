//! Times the recurrent forward pass of RWKV-7 on one thread.

use std::hint::black_box;
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
    println!("rwkv7::recurrent_fwd, T=4096, H=16, K=V=64, f32, one thread, fastest of {RUNS} runs");
    let mut fastest = Times { wall_ms: f64::INFINITY, core_ms: Some(f64::INFINITY) };
    for _ in 0..RUNS {
        let (core, wall) = (core_ms(), Instant::now());
        black_box(rwkv7::recurrent_fwd(&shape, &x, &options));
        let core_ms = core_ms().zip(core).map(|(end, start)| end - start);
        fastest.wall_ms = fastest.wall_ms.min(wall.elapsed().as_secs_f64() * 1e3);
        fastest.core_ms = fastest.core_ms.zip(core_ms).map(|(a, b)| a.min(b));
    }
    println!("{:.0} ms on the clock", fastest.wall_ms);
    match fastest.core_ms {
        Some(core_ms) => println!("{core_ms:.0} ms on a core: what a machine without other work takes"),
        None => println!("time on a core is not known on this system"),
    }
}

struct Times {
    wall_ms: f64,
    core_ms: Option<f64>,
}

/// How long this thread has been on a core, as Linux counts it.
fn core_ms() -> Option<f64> {
    let times = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    let nanoseconds: f64 = times.split(' ').next()?.parse().ok()?;
    Some(nanoseconds / 1e6)
}
