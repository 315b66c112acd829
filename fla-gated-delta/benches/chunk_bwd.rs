//! Gradients of the gated delta rule by chunks: batches that fill a GPU, long sequences of few heads, and grouped heads.

use criterion::Criterion;
use fla_core::SeqLens;
use fla_core::testing::{Bench, Case, Samples};
use fla_gated_delta::{
    Beta, ChunkBwd, ChunkBwdInputs, ChunkBwdOutputs, ChunkFwdOptions, Gate, GateGrads, Shape,
};
use fla_reference::compare::relative_rms;
use fla_reference::gated_delta as reference;
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
    for (b, t, h, hv, d) in [
        (4, 4096, 64, 64, 128),
        (2, 16384, 16, 16, 128),
        (1, 65536, 8, 8, 128),
        (1, 8192, 32, 32, 128),
        (4, 2048, 16, 16, 128),
        (1, 8192, 16, 64, 128),
        (4, 4096, 16, 64, 128),
        (8, 4096, 64, 64, 64),
    ] {
        let shape = Shape { seqs: SeqLens::dense(b, t), h, hv, k: d, v: d };
        backward(&bench, &mut criterion, &shape);
    }
    criterion.final_summary();
}

/// The numbers of the first query head and its value heads, of the first sequence: heads do not see each other.
fn head<T: Copy + Into<f64>>(x: &[T], (t, heads, width): (usize, usize, usize), wanted: usize) -> Vec<f64> {
    let rows = x.chunks_exact(heads * width).take(t);
    rows.flat_map(|row| row[..wanted * width].iter().map(|x| (*x).into())).collect()
}

fn backward(bench: &Bench, criterion: &mut Criterion, shape: &Shape) {
    let Shape { ref seqs, h, hv, k, v } = *shape;
    let (b, t, group) = (seqs.b(), seqs.t(), hv / h);
    let scale = (k as f32).powf(-0.5);
    let plan = ChunkBwd::<bf16>::new(bench.device(), shape, &ChunkFwdOptions::new(scale)).expect("compiles");
    let mut rng = Rng::new(1);
    let narrow = |x: Vec<f32>| -> Vec<bf16> { x.into_iter().map(bf16::from_f32).collect() };
    let (rows, v_len, head_len) = (shape.qk_len() / k, shape.v_len(), shape.head_len());
    let q_host = narrow(rng.unit_rows(rows, k));
    let k_host = narrow(rng.unit_rows(rows, k));
    let v_host = narrow(rng.normal(v_len, 1.0));
    let d_o_host = narrow(rng.normal(v_len, 1.0));
    let beta_host = narrow(rng.uniform(head_len, 0.0, 1.0));
    let g_host = rng.gates::<f32>(head_len, Gates::LogSigmoid);
    let stream = bench.stream();
    let [q, key, value, d_o, beta] =
        [&q_host, &k_host, &v_host, &d_o_host, &beta_host].map(|x| stream.clone_htod(x).expect("fits"));
    let g = stream.clone_htod(&g_host).expect("fits");
    let x = ChunkBwdInputs {
        q: &q,
        k: &key,
        v: &value,
        g: Gate::Log(&g),
        beta: Beta::PerHead(&beta),
        initial_state: None,
        d_o: &d_o,
        d_final_state: None,
    };
    let mut grads = [shape.qk_len(), shape.qk_len(), v_len, head_len]
        .map(|len| stream.alloc_zeros::<bf16>(len).expect("fits"));
    let mut dg = stream.alloc_zeros::<f32>(head_len).expect("fits");
    let mut workspace = stream.alloc_zeros::<u8>(plan.workspace_bytes()).expect("fits");
    let mut run = |stream: &_| {
        let [dq, dk, dv, dbeta] = &mut grads;
        let mut dx = ChunkBwdOutputs {
            dq,
            dk,
            dv,
            dg: GateGrads::Log(&mut dg),
            dbeta: Some(dbeta),
            d_initial_state: None,
        };
        plan.run(stream, &x, &mut dx, &mut workspace)
    };
    run(stream).expect("runs");
    let samples = Samples::default();
    let id = format!("gated_delta/chunk_bwd/B{b} T{t} H{h} HV{hv} D{k}");
    criterion.bench_function(&id, |bencher| {
        bencher.iter_custom(|iterations| bench.time_flushed(iterations, &samples, |stream| run(stream)));
    });

    let (of_q, of_v, of_heads) = ((t, h, k), (t, hv, v), (t, hv, 1));
    let [q, key] = [&q_host, &k_host].map(|x| head(x, of_q, 1));
    let [value, d_o] = [&v_host, &d_o_host].map(|x| head(x, of_v, group));
    let (beta, g) = (head(&beta_host, of_heads, group), head(&g_host, of_heads, group));
    let x = reference::Inputs {
        q: &q,
        k: &key,
        v: &value,
        g: reference::Gate::Log(&g),
        gk: None,
        gv: None,
        beta: reference::Beta::PerHead(&beta),
        initial_state: None,
    };
    let reference_shape =
        fla_reference::Shape { seqs: fla_reference::SeqLens::Dense { b: 1, t }, h: 1, k, v };
    let dy = reference::OutputGrads { d_o: &d_o, d_final_state: None };
    let options = reference::Options::new(group, f64::from(scale));
    let want = reference::recurrent_bwd(&reference_shape, &x, &dy, &options);
    let key = |class| Key {
        backend: Backend::Gpu,
        model: Model::GatedDelta,
        pass: Pass::ChunkBwd,
        dtype: Dtype::Bf16,
        class,
    };
    let (want_dg, want_dbeta) = (want.dg.unwrap_or_default(), want.dbeta.unwrap_or_default());
    let parts =
        [(&want.dq, of_q, 1), (&want.dk, of_q, 1), (&want.dv, of_v, group), (&want_dbeta, of_heads, group)];
    let mut error: f64 = 0.0;
    for (got, (want, dims, heads)) in grads.iter().zip(parts) {
        let got = stream.clone_dtoh(got).expect("copies");
        error = error.max(relative_rms(&head(&got, dims, heads), want));
    }
    let limit_of = |class| limit(key(class)).expect("the table has the row");
    let most = limit_of(Class::Grad);
    assert!(error <= most, "the pass is wrong: relative RMS {error:.2e} > {most:.0e}");
    let of_g = relative_rms(&head(&stream.clone_dtoh(&dg).expect("copies"), of_heads, group), &want_dg);
    let most = limit_of(Class::GateGrad);
    assert!(of_g <= most, "dg is wrong: relative RMS {of_g:.2e} > {most:.0e}");

    let case = Case {
        id,
        dtype: "bf16",
        // Each input read once, each gradient written once; what is kept between launches comes on top.
        bytes: 2.0 * (4 * shape.qk_len() + 3 * v_len + 4 * head_len) as f64,
        // Two products with the state and one inside a chunk of 64 for the states, seven and ten for the gradients.
        flops: (b * t * hv) as f64 * (18 * k * v + 2 * 64 * (6 * k + 5 * v)) as f64,
        error: error.max(of_g),
        extra_bytes: plan.workspace_bytes(),
        method: "single runs, L2 flushed",
    };
    bench.report(&case, &samples);
}
