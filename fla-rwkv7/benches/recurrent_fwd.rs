//! Decoding with RWKV-7: one and four tokens a call, by graph replay over rotating buffers.

use criterion::Criterion;
use fla_core::cudarc::driver::CudaSlice;
use fla_core::testing::{Bench, Case};
use fla_core::{Error, FinalState, SeqLens, Shape};
use fla_reference::compare::relative_rms;
use fla_reference::inputs::{Gates, Rng};
use fla_reference::tolerance::{Backend, Class, Dtype, Key, Model, Pass, limit};
use fla_rwkv7::{RecurrentFwd, RecurrentFwdInputs, RecurrentFwdOptions, RecurrentFwdOutputs};
use half::bf16;

const H: usize = 64;
const D: usize = 64;

/// One set of tensors, of which several are rotated so that none is found in L2.
struct Tensors {
    vectors: [CudaSlice<bf16>; 6],
    initial_state: CudaSlice<f32>,
    o: CudaSlice<bf16>,
    final_state: CudaSlice<f32>,
}

impl Tensors {
    fn run(&mut self, bench: &Bench, plan: &RecurrentFwd<bf16>) -> Result<(), Error> {
        let [r, w, k, v, a, b] = &self.vectors;
        let x = RecurrentFwdInputs {
            r,
            w,
            k,
            v,
            a,
            b,
            initial_state: Some(&self.initial_state),
            cu_seqlens: None,
        };
        let mut y = RecurrentFwdOutputs {
            o: &mut self.o,
            final_state: FinalState::New(&mut self.final_state),
            token_states: None,
        };
        plan.run(bench.stream(), &x, &mut y)
    }
}

fn main() {
    let bench = match Bench::open() {
        Ok(bench) => bench,
        Err(error) => {
            eprintln!("no benchmark without a GPU: {error}");
            std::process::exit(1);
        }
    };
    let mut criterion = Criterion::default().configure_from_args();
    for (b, t) in [(1, 1), (8, 1), (32, 1), (256, 1), (32, 4), (256, 4)] {
        decode(&bench, &mut criterion, b, t, true);
    }
    decode(&bench, &mut criterion, 1, 1, false);
    criterion.final_summary();
}

fn decode(bench: &Bench, criterion: &mut Criterion, b: usize, t: usize, rotate: bool) {
    let shape = Shape { seqs: SeqLens::dense(b, t), h: H, k: D, v: D };
    let plan =
        RecurrentFwd::<bf16>::new(bench.device(), &shape, &RecurrentFwdOptions::new()).expect("compiles");
    let bytes = (2 * 4 * shape.state_len() + 2 * (5 * shape.k_len() + 2 * shape.v_len())) as f64;
    let sets = if rotate { bench.rotation(bytes) } else { 1 };
    let (mut sets, error) = tensors(bench, &plan, &shape, sets);

    let launches = (sets.len() * 4).max(16);
    let count = sets.len();
    let replay =
        bench.capture(launches, |_, i| sets[i % count].run(bench, &plan)).expect("the pass can be captured");
    let buffers = if rotate { "rotating" } else { "in L2" };
    let id = format!("rwkv7/recurrent_fwd/B{b} T{t} H{H} D{D} {buffers}");
    criterion.bench_function(&id, |bencher| bencher.iter_custom(|iterations| replay.time(iterations)));
    let case = Case {
        id,
        dtype: "bf16",
        bytes,
        // Per state element and token: read a, decay and two rank-one updates, read r.
        flops: 9.0 * (shape.state_len() * t) as f64,
        error,
        extra_bytes: 0,
        method: if rotate { "graph replay, rotating buffers" } else { "graph replay, one set of buffers" },
    };
    bench.report(&case, &replay.samples());
}

/// Tensors for `sets` launches, and the error of one run on them.
fn tensors(bench: &Bench, plan: &RecurrentFwd<bf16>, shape: &Shape, sets: usize) -> (Vec<Tensors>, f64) {
    let stream = bench.stream();
    let mut rng = Rng::new(1);
    let rows = shape.k_len() / D;
    let kk: Vec<f32> = rng.unit_rows(rows, D);
    let rate: Vec<f32> = rng.uniform(kk.len(), 0.0, 1.0);
    let host: [Vec<bf16>; 6] = [
        rng.normal::<f32>(shape.k_len(), 1.0),
        rng.gates::<f32>(shape.k_len(), Gates::Rwkv7),
        rng.normal::<f32>(shape.k_len(), 1.0),
        rng.normal::<f32>(shape.v_len(), 1.0),
        kk.iter().map(|x| -x).collect(),
        kk.iter().zip(&rate).map(|(x, rate)| x * rate).collect(),
    ]
    .map(|x| x.into_iter().map(bf16::from_f32).collect());
    let state: Vec<f32> = rng.uniform(shape.state_len(), -1.0, 1.0);
    let mut all: Vec<Tensors> = (0..sets)
        .map(|_| Tensors {
            vectors: host.each_ref().map(|x| stream.clone_htod(x).expect("fits")),
            initial_state: stream.clone_htod(&state).expect("fits"),
            o: stream.alloc_zeros(shape.v_len()).expect("fits"),
            final_state: stream.alloc_zeros(shape.state_len()).expect("fits"),
        })
        .collect();
    all[0].run(bench, plan).expect("runs");

    // Sequences do not see each other, so the first ones stand for all.
    let n = shape.seqs.n().min(2);
    let tokens = n * shape.seqs.t() * H * D;
    let wide = host.each_ref().map(|x| x[..tokens].iter().map(|x| f64::from(x.to_f32())).collect::<Vec<_>>());
    let initial: Vec<f64> = state[..n * H * D * D].iter().map(|x| f64::from(*x)).collect();
    let [r, w, k, v, a, b] = &wide;
    let reference = fla_reference::rwkv7::Inputs { r, w, k, v, a, b, initial_state: Some(&initial) };
    let seqs = fla_reference::SeqLens::Dense { b: n, t: shape.seqs.t() };
    let reference_shape = fla_reference::Shape { seqs, h: H, k: D, v: D };
    let options = fla_reference::rwkv7::Options::new(1.0);
    let want = fla_reference::rwkv7::recurrent_fwd(&reference_shape, &reference, &options);
    let got: Vec<f64> = stream
        .clone_dtoh(&all[0].o.slice(..tokens))
        .expect("copies")
        .iter()
        .map(|x| f64::from(x.to_f32()))
        .collect();
    let error = relative_rms(&got, &want.o);
    let key = Key {
        backend: Backend::Gpu,
        model: Model::Rwkv7,
        pass: Pass::RecurrentFwd,
        dtype: Dtype::Bf16,
        class: Class::Output,
    };
    let limit = limit(key).expect("the table has the row");
    assert!(error <= limit, "the pass is wrong, so it is not timed: relative RMS {error:.2e} > {limit:.0e}");
    (all, error)
}
