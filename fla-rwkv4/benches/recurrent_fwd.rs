//! Decoding with RWKV-4: one token a call, states in place, by graph replay over rotating buffers.

use criterion::Criterion;
use fla_core::cudarc::driver::CudaSlice;
use fla_core::testing::{Bench, Case};
use fla_core::{Error, FinalState, SeqLens};
use fla_reference::compare::relative_rms;
use fla_reference::inputs::Rng;
use fla_reference::rwkv4 as reference;
use fla_reference::tolerance::{Backend, Class, Dtype, Key, Model, Pass, limit};
use fla_rwkv4::{RecurrentFwd, RecurrentFwdInputs, RecurrentFwdOptions, RecurrentFwdOutputs, Shape};
use half::bf16;

/// One set of tensors, of which several are rotated so that none is found in L2.
struct Tensors {
    w: CudaSlice<f32>,
    u: CudaSlice<f32>,
    k: CudaSlice<bf16>,
    v: CudaSlice<bf16>,
    state: CudaSlice<f32>,
    o: CudaSlice<bf16>,
}

impl Tensors {
    fn run(&mut self, bench: &Bench, plan: &RecurrentFwd<bf16>) -> Result<(), Error> {
        let Self { w, u, k, v, state, o } = self;
        let x = RecurrentFwdInputs { w, u, k, v, initial_state: None, cu_seqlens: None };
        let mut y = RecurrentFwdOutputs { o, final_state: FinalState::InPlace(state), token_states: None };
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
    for b in [1, 32, 256, 1024] {
        decode(&bench, &mut criterion, &Shape { seqs: SeqLens::dense(b, 1), c: 4096 });
    }
    criterion.final_summary();
}

fn decode(bench: &Bench, criterion: &mut Criterion, shape: &Shape) {
    let plan =
        RecurrentFwd::<bf16>::new(bench.device(), shape, &RecurrentFwdOptions::new()).expect("compiles");
    let bytes = (2 * 4 * shape.state_len() + 2 * 3 * shape.token_len() + 2 * 4 * shape.c) as f64;
    // Four times the L2 between two uses of a buffer; but never one set only.
    let count = bench.rotation(bytes);
    let (mut sets, error) = tensors(bench, &plan, shape, count);

    let launches = (count * 4).max(16);
    let replay =
        bench.capture(launches, |_, i| sets[i % count].run(bench, &plan)).expect("the pass can be captured");
    let id = format!("rwkv4/recurrent_fwd/B{} T1 C{} rotating", shape.seqs.b(), shape.c);
    criterion.bench_function(&id, |bencher| bencher.iter_custom(|iterations| replay.time(iterations)));
    let case = Case {
        id,
        dtype: "bf16",
        bytes,
        flops: 30.0 * shape.token_len() as f64,
        error,
        extra_bytes: 0,
        method: "graph replay, rotating buffers",
    };
    bench.report(&case, &replay.samples());
}

/// Tensors for `sets` launches, and the error of one run on them.
fn tensors(bench: &Bench, plan: &RecurrentFwd<bf16>, shape: &Shape, sets: usize) -> (Vec<Tensors>, f64) {
    let stream = bench.stream();
    let (n, c) = (shape.seqs.n(), shape.c);
    let mut rng = Rng::new(1);
    let w: Vec<f32> = rng.uniform(c, -6.0, 1.5);
    let u: Vec<f32> = rng.normal(c, 0.5);
    let narrow = |x: Vec<f32>| x.into_iter().map(bf16::from_f32).collect::<Vec<bf16>>();
    let (k, v) = (narrow(rng.normal(n * c, 1.0)), narrow(rng.normal(n * c, 1.0)));
    let mut state: Vec<f32> = Vec::with_capacity(3 * n * c);
    for _ in 0..n {
        state.extend(rng.normal::<f32>(c, 1.0));
        state.extend(rng.uniform::<f32>(c, 1.0, 2.0));
        state.extend(rng.normal::<f32>(c, 1.0));
    }
    let mut all: Vec<Tensors> = (0..sets)
        .map(|_| Tensors {
            w: stream.clone_htod(&w).expect("fits"),
            u: stream.clone_htod(&u).expect("fits"),
            k: stream.clone_htod(&k).expect("fits"),
            v: stream.clone_htod(&v).expect("fits"),
            state: stream.clone_htod(&state).expect("fits"),
            o: stream.alloc_zeros(n * c).expect("fits"),
        })
        .collect();
    all[0].run(bench, plan).expect("runs");

    // Sequences do not see each other, so the first ones stand for all.
    let some = n.min(8);
    let wide = |x: &[f32]| x.iter().map(|x| f64::from(*x)).collect::<Vec<f64>>();
    let widen = |x: &[bf16]| x.iter().map(|x| x.to_f64()).collect::<Vec<f64>>();
    let (w, u, k, v) = (wide(&w), wide(&u), widen(&k[..some * c]), widen(&v[..some * c]));
    let initial = wide(&state[..3 * some * c]);
    let x = reference::Inputs { w: &w, u: &u, k: &k, v: &v, initial_state: Some(&initial) };
    let seqs = fla_reference::SeqLens::Dense { b: some, t: 1 };
    let want = reference::recurrent_fwd(&reference::Shape { seqs, c }, &x, &reference::Options::new());
    let got = stream.clone_dtoh(&all[0].o.slice(..some * c)).expect("copies");
    let error = relative_rms(&widen(&got), &want.o);
    let key = Key {
        backend: Backend::Gpu,
        model: Model::Rwkv4,
        pass: Pass::RecurrentFwd,
        dtype: Dtype::Bf16,
        class: Class::Output,
    };
    let limit = limit(key).expect("the table has the row");
    assert!(error <= limit, "the pass is wrong, so it is not timed: relative RMS {error:.2e} > {limit:.0e}");
    (all, error)
}
