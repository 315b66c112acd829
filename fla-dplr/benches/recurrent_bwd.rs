//! Gradients of the DPLR delta rule token by token: a short prompt of many heads, and a long one of few.

use criterion::Criterion;
use fla_core::testing::{Bench, Case, Samples};
use fla_core::{SeqLens, Shape};
use fla_dplr::{RecurrentBwd, RecurrentBwdInputs, RecurrentBwdOutputs, RecurrentFwdOptions};
use fla_reference::compare::relative_rms;
use fla_reference::inputs::{Gates, Rng};
use fla_reference::tolerance::{Backend, Class, Dtype, Key, Model, Pass, limit};
use half::bf16;

fn main() {
    let bench = match Bench::open() {
        Ok(bench) => bench,
        Err(error) => {
            eprintln!("no benchmark without a GPU: {error}");
            std::process::exit(1);
        }
    };
    let mut criterion = Criterion::default().configure_from_args();
    for (b, t, h, d) in [(8, 256, 64, 64), (1, 4096, 16, 64), (4, 256, 32, 128)] {
        let shape = Shape { seqs: SeqLens::dense(b, t), h, k: d, v: d };
        backward(&bench, &mut criterion, &shape);
    }
    criterion.final_summary();
}

fn backward(bench: &Bench, criterion: &mut Criterion, shape: &Shape) {
    let Shape { ref seqs, h, k, v } = *shape;
    let (b, t) = (seqs.b(), seqs.t());
    let plan =
        RecurrentBwd::<bf16>::new(bench.device(), shape, &RecurrentFwdOptions::new(1.0)).expect("compiles");
    let mut rng = Rng::new(1);
    let rows = shape.k_len() / k;
    let keys: Vec<f32> = rng.unit_rows(rows, k);
    let host: [Vec<bf16>; 7] = [
        rng.normal::<f32>(shape.k_len(), 1.0),
        keys.clone(),
        rng.normal::<f32>(shape.v_len(), 1.0),
        keys.iter().map(|k| -k).collect(),
        keys.iter().map(|k| 0.5 * k).collect(),
        rng.gates::<f32>(shape.k_len(), Gates::LogSigmoid),
        rng.normal::<f32>(shape.v_len(), 1.0),
    ]
    .map(|x| x.into_iter().map(bf16::from_f32).collect());
    let stream = bench.stream();
    let [xq, xk, xv, xa, xb, xg, d_o] = host.each_ref().map(|x| stream.clone_htod(x).expect("fits"));
    let x = RecurrentBwdInputs {
        q: &xq,
        k: &xk,
        v: &xv,
        a: &xa,
        b: &xb,
        g: &xg,
        initial_state: None,
        d_o: &d_o,
        d_final_state: None,
    };
    let mut grads =
        [shape.k_len(), shape.k_len(), shape.v_len(), shape.k_len(), shape.k_len(), shape.k_len()]
            .map(|len| stream.alloc_zeros::<bf16>(len).expect("fits"));
    let mut workspace = stream.alloc_zeros::<u8>(plan.workspace_bytes()).expect("fits");
    let mut run = |stream: &_| {
        let [dq, dk, dv, da, db, dg] = &mut grads;
        let mut dx = RecurrentBwdOutputs { dq, dk, dv, da, db, dg, d_initial_state: None };
        plan.run(stream, &x, &mut dx, &mut workspace)
    };
    run(stream).expect("runs");
    let samples = Samples::default();
    let id = format!("dplr/recurrent_bwd/B{b} T{t} H{h} D{k}");
    criterion.bench_function(&id, |bencher| {
        bencher.iter_custom(|iterations| bench.time_flushed(iterations, &samples, |stream| run(stream)));
    });

    // Heads do not see each other, but they lie side by side: the first sequence stands for all.
    let one = t * h * k;
    let wide = host.each_ref().map(|x| x[..one].iter().map(|x| f64::from(x.to_f32())).collect::<Vec<_>>());
    let [q, key, value, a, b_, g, d_o] = &wide;
    let reference = fla_reference::dplr::Inputs { q, k: key, v: value, a, b: b_, g, initial_state: None };
    let reference_shape = fla_reference::Shape { seqs: fla_reference::SeqLens::Dense { b: 1, t }, h, k, v };
    let dy = fla_reference::dplr::OutputGrads { d_o, d_final_state: None };
    let options = fla_reference::dplr::Options::new(1.0);
    let want = fla_reference::dplr::recurrent_bwd(&reference_shape, &reference, &dy, &options);
    let mut error: f64 = 0.0;
    for (got, want) in grads.iter().zip([&want.dq, &want.dk, &want.dv, &want.da, &want.db, &want.dg]) {
        let got = stream.clone_dtoh(&got.slice(..one)).expect("copies");
        let got: Vec<f64> = got.iter().map(|x| f64::from(x.to_f32())).collect();
        error = error.max(relative_rms(&got, want));
    }
    let key = Key {
        backend: Backend::Gpu,
        model: Model::Dplr,
        pass: Pass::RecurrentBwd,
        dtype: Dtype::Bf16,
        class: Class::Grad,
    };
    let limit = limit(key).expect("the table has the row");
    assert!(error <= limit, "the pass is wrong: relative RMS {error:.2e} > {limit:.0e}");

    let case = Case {
        id,
        dtype: "bf16",
        // Each input read once, each gradient written once; what is kept of states comes on top.
        bytes: 2.0 * (10 * shape.k_len() + 4 * shape.v_len()) as f64,
        // Twice forward, with 9 operations for each number of the state, and 22 back.
        flops: 40.0 * (shape.state_len() * t) as f64,
        error,
        extra_bytes: plan.workspace_bytes(),
        method: "single runs, L2 flushed",
    };
    bench.report(&case, &samples);
}
