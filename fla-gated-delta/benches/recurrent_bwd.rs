//! Gradients of the gated delta rule token by token, as a layer asks for them: a short prompt of many heads, and a long one
//! of few.

use criterion::Criterion;
use fla_core::SeqLens;
use fla_core::testing::{Bench, Case, Samples};
use fla_gated_delta::{
    Beta, BetaMap, Gate, GateForm, GateGrads, QkNorm, RecurrentBwd, RecurrentBwdInputs, RecurrentBwdOutputs,
    RecurrentFwdOptions, Shape,
};
use fla_reference::compare::relative_rms;
use fla_reference::gated_delta as reference;
use fla_reference::inputs::Rng;
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
    for (b, t, h, hv, d) in [(8, 256, 64, 64, 64), (1, 4096, 16, 16, 64), (4, 256, 32, 32, 128)] {
        let shape = Shape { seqs: SeqLens::dense(b, t), h, hv, k: d, v: d };
        backward(&bench, &mut criterion, &shape);
    }
    criterion.final_summary();
}

fn backward(bench: &Bench, criterion: &mut Criterion, shape: &Shape) {
    let Shape { ref seqs, h, hv, k, v } = *shape;
    let (b, t) = (seqs.b(), seqs.t());
    let options = RecurrentFwdOptions::new(1.0)
        .with_gate(GateForm::Raw)
        .with_beta_map(BetaMap::Sigmoid)
        .with_qk_norm(QkNorm::L2);
    let plan = RecurrentBwd::<bf16>::new(bench.device(), shape, &options).expect("compiles");
    let mut rng = Rng::new(1);
    let (qk_len, v_len, head_len) = (shape.qk_len(), shape.v_len(), shape.head_len());
    let host: [Vec<bf16>; 6] = [qk_len, qk_len, v_len, head_len, head_len, v_len]
        .map(|len| rng.normal::<f32>(len, 1.0).into_iter().map(bf16::from_f32).collect());
    let a_log_host: Vec<f32> = rng.uniform(hv, -1.0, 1.0);
    let stream = bench.stream();
    let [q, key, value, g, beta, d_o] = host.each_ref().map(|x| stream.clone_htod(x).expect("fits"));
    let a_log = stream.clone_htod(&a_log_host).expect("fits");
    let x = RecurrentBwdInputs {
        q: &q,
        k: &key,
        v: &value,
        g: Gate::Raw { g: &g, a_log: &a_log, dt_bias: Some(&a_log) },
        gk: None,
        gv: None,
        beta: Beta::PerHead(&beta),
        initial_state: None,
        d_o: &d_o,
        d_final_state: None,
    };
    let mut grads =
        [qk_len, qk_len, v_len, head_len, head_len].map(|len| stream.alloc_zeros::<bf16>(len).expect("fits"));
    let (mut d_a_log, mut d_dt_bias) =
        (stream.alloc_zeros::<f32>(hv).expect("fits"), stream.alloc_zeros::<f32>(hv).expect("fits"));
    let mut workspace = stream.alloc_zeros::<u8>(plan.workspace_bytes()).expect("fits");
    let mut run = |stream: &_| {
        let [dq, dk, dv, dg, dbeta] = &mut grads;
        let mut dx = RecurrentBwdOutputs {
            dq,
            dk,
            dv,
            dg: GateGrads::Raw { dg, d_a_log: Some(&mut d_a_log), d_dt_bias: Some(&mut d_dt_bias) },
            dgk: None,
            dgv: None,
            dbeta: Some(dbeta),
            d_initial_state: None,
        };
        plan.run(stream, &x, &mut dx, &mut workspace)
    };
    run(stream).expect("runs");
    let samples = Samples::default();
    let id = format!("gated_delta/recurrent_bwd/B{b} T{t} H{hv} D{k} layer");
    criterion.bench_function(&id, |bencher| {
        bencher.iter_custom(|iterations| bench.time_flushed(iterations, &samples, |stream| run(stream)));
    });

    // Sequences do not see each other: the first one stands for all.
    let one = |len: usize| len / b;
    let wide =
        host.each_ref().map(|x| x[..one(x.len())].iter().map(|x| f64::from(x.to_f32())).collect::<Vec<_>>());
    let [q, key, value, g, beta, d_o] = &wide;
    let a_log: Vec<f64> = a_log_host.iter().map(|x| f64::from(*x)).collect();
    let x = reference::Inputs {
        q,
        k: key,
        v: value,
        g: reference::Gate::Raw { g, a_log: &a_log, dt_bias: Some(&a_log) },
        gk: None,
        gv: None,
        beta: reference::Beta::PerHead(beta),
        initial_state: None,
    };
    let reference_shape = fla_reference::Shape { seqs: fla_reference::SeqLens::Dense { b: 1, t }, h, k, v };
    let dy = reference::OutputGrads { d_o, d_final_state: None };
    let options = reference::Options::new(hv, 1.0)
        .with_qk_norm(reference::QkNorm::L2)
        .with_beta_map(reference::BetaMap::Sigmoid);
    let want = reference::recurrent_bwd(&reference_shape, &x, &dy, &options);
    let (dg, dbeta) = (want.dg.unwrap_or_default(), want.dbeta.unwrap_or_default());
    let mut error: f64 = 0.0;
    for (got, want) in grads.iter().zip([&want.dq, &want.dk, &want.dv, &dg, &dbeta]) {
        let got = stream.clone_dtoh(&got.slice(..want.len())).expect("copies");
        let got: Vec<f64> = got.iter().map(|x| f64::from(x.to_f32())).collect();
        error = error.max(relative_rms(&got, want));
    }
    let key = Key {
        backend: Backend::Gpu,
        model: Model::GatedDelta,
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
        bytes: 2.0 * (4 * qk_len + 3 * v_len + 4 * head_len) as f64,
        // Twice forward, with 7 operations for each number of the state, and 18 back.
        flops: 32.0 * (shape.state_len() * t) as f64,
        error,
        extra_bytes: plan.workspace_bytes(),
        method: "single runs, L2 flushed",
    };
    bench.report(&case, &samples);
}
