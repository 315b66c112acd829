//! The gated delta rule by chunks: batches that fill a GPU, long sequences of few heads, and grouped heads.

use criterion::Criterion;
use fla_core::SeqLens;
use fla_core::testing::{Bench, Case, Samples};
use fla_gated_delta::{Beta, ChunkFwd, ChunkFwdInputs, ChunkFwdOptions, ChunkFwdOutputs, Gate, Shape};
use fla_reference::compare::relative_rms;
use fla_reference::gated_delta as reference;
use fla_reference::inputs::{Gates, Rng, round_to};
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
        forward(&bench, &mut criterion, &shape);
    }
    criterion.final_summary();
}

/// The numbers of the first query head and its value heads, of the first sequence: heads do not see each other.
fn head(x: &[bf16], (t, heads, width): (usize, usize, usize), wanted: usize) -> Vec<f64> {
    let rows = x.chunks_exact(heads * width).take(t);
    rows.flat_map(|row| row[..wanted * width].iter().map(|x| f64::from(x.to_f32()))).collect()
}

fn forward(bench: &Bench, criterion: &mut Criterion, shape: &Shape) {
    let Shape { ref seqs, h, hv, k, v } = *shape;
    let (b, t, group) = (seqs.b(), seqs.t(), hv / h);
    let scale = (k as f32).powf(-0.5);
    let plan = ChunkFwd::<bf16>::new(bench.device(), shape, &ChunkFwdOptions::new(scale)).expect("compiles");
    let mut rng = Rng::new(1);
    let unit = |rng: &mut Rng| -> Vec<bf16> {
        rng.unit_rows::<f32>(shape.qk_len() / k, k).into_iter().map(bf16::from_f32).collect()
    };
    let (q_host, k_host) = (unit(&mut rng), unit(&mut rng));
    let v_host: Vec<bf16> = rng.normal::<f32>(shape.v_len(), 1.0).into_iter().map(bf16::from_f32).collect();
    let g_host = rng.gates::<f32>(shape.head_len(), Gates::LogSigmoid);
    let beta_host: Vec<bf16> =
        rng.uniform::<f32>(shape.head_len(), 0.0, 1.0).into_iter().map(bf16::from_f32).collect();
    let stream = bench.stream();
    let [q, key, value, beta] =
        [&q_host, &k_host, &v_host, &beta_host].map(|x| stream.clone_htod(x).expect("fits"));
    let g = stream.clone_htod(&g_host).expect("fits");
    let x = ChunkFwdInputs {
        q: &q,
        k: &key,
        v: &value,
        g: Gate::Log(&g),
        beta: Beta::PerHead(&beta),
        initial_state: None,
    };
    let mut o = stream.alloc_zeros::<bf16>(shape.v_len()).expect("fits");
    let mut final_state = stream.alloc_zeros::<f32>(shape.state_len()).expect("fits");
    let mut workspace = stream.alloc_zeros::<u8>(plan.workspace_bytes()).expect("fits");
    let mut run = |stream: &_| {
        let mut y = ChunkFwdOutputs { o: &mut o, final_state: Some(&mut final_state) };
        plan.run(stream, &x, &mut y, &mut workspace)
    };
    run(stream).expect("runs");
    let samples = Samples::default();
    let id = format!("gated_delta/chunk_fwd/B{b} T{t} H{h} HV{hv} D{k}");
    criterion.bench_function(&id, |bencher| {
        bencher.iter_custom(|iterations| bench.time_flushed(iterations, &samples, |stream| run(stream)));
    });

    // Outputs see the tokens before them only.
    let tokens = t.min(2048);
    let (q, key) = (head(&q_host, (tokens, h, k), 1), head(&k_host, (tokens, h, k), 1));
    let value = head(&v_host, (tokens, hv, v), group);
    let beta = head(&beta_host, (tokens, hv, 1), group);
    let g: Vec<f32> = g_host.chunks_exact(hv).take(tokens).flat_map(|row| row[..group].to_vec()).collect();
    let g = round_to::<f32, f64>(&g.into_iter().map(f64::from).collect::<Vec<_>>());
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
    let seqs = fla_reference::SeqLens::Dense { b: 1, t: tokens };
    let reference_shape = fla_reference::Shape { seqs, h: 1, k, v };
    let options = reference::Options::new(group, f64::from(scale));
    let want = reference::recurrent_fwd(&reference_shape, &x, &options);
    let got = stream.clone_dtoh(&o.slice(..tokens * hv * v)).expect("copies");
    let error = relative_rms(&head(&got, (tokens, hv, v), group), &want.o);
    let key = Key {
        backend: Backend::Gpu,
        model: Model::GatedDelta,
        pass: Pass::ChunkFwd,
        dtype: Dtype::Bf16,
        class: Class::Output,
    };
    let limit = limit(key).expect("the table has the row");
    assert!(error <= limit, "the pass is wrong: relative RMS {error:.2e} > {limit:.0e}");

    let case = Case {
        id,
        dtype: "bf16",
        // Each input read once, each output written once; what is kept between launches comes on top.
        bytes: 2.0 * (2 * shape.qk_len() + 2 * shape.v_len() + 3 * shape.head_len()) as f64
            + 4.0 * shape.state_len() as f64,
        // Three products with the state and four inside a chunk of 64.
        flops: (b * t * hv) as f64 * (6 * k * v + 2 * 64 * (2 * k + 2 * v)) as f64,
        error,
        extra_bytes: plan.workspace_bytes(),
        method: "single runs, L2 flushed",
    };
    bench.report(&case, &samples);
}
