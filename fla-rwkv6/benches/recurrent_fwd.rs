//! Decoding with RWKV-6: one token or four a call, by graph replay.

use criterion::Criterion;
use fla_core::cudarc::driver::CudaSlice;
use fla_core::testing::{Bench, Case};
use fla_core::{Error, FinalState, SeqLens, Shape};
use fla_reference::compare::relative_rms;
use fla_reference::inputs::{Gates, Rng};
use fla_reference::tolerance::{Backend, Class, Dtype, Key, Model, Pass, limit};
use fla_rwkv6::{RecurrentFwd, RecurrentFwdInputs, RecurrentFwdOptions, RecurrentFwdOutputs};
use half::bf16;

/// Where the new states go.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kept {
    New,
    InPlace,
}

/// Where a launch finds its tensors.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Buffers {
    /// In device memory.
    Rotating,
    /// In L2, if they fit.
    One,
}

/// One set of tensors, of which several are rotated so that none is found in L2.
struct Tensors {
    /// `r`, `k`, `v`, `w`, `u`
    vectors: [CudaSlice<bf16>; 5],
    state: CudaSlice<f32>,
    o: CudaSlice<bf16>,
    /// Absent when the states are updated in place.
    final_state: Option<CudaSlice<f32>>,
}

impl Tensors {
    fn run(&mut self, bench: &Bench, plan: &RecurrentFwd<bf16>) -> Result<(), Error> {
        let [r, k, v, w, u] = &self.vectors;
        let (initial_state, final_state) = match &mut self.final_state {
            Some(last) => (Some(&self.state as _), FinalState::New(last)),
            None => (None, FinalState::InPlace(&mut self.state)),
        };
        let x = RecurrentFwdInputs { r, k, v, w, u, initial_state, cu_seqlens: None };
        let mut y = RecurrentFwdOutputs { o: &mut self.o, final_state, token_states: None };
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
    let one = Shape { seqs: SeqLens::dense(1, 1), h: 64, k: 64, v: 64 };
    decode(&bench, &mut criterion, &one, (Kept::InPlace, Buffers::One));
    for kept in [Kept::InPlace, Kept::New] {
        for (h, d) in [(64, 64), (32, 128)] {
            for (b, t) in [(1, 1), (32, 1), (256, 1), (32, 4), (256, 4)] {
                let shape = Shape { seqs: SeqLens::dense(b, t), h, k: d, v: d };
                decode(&bench, &mut criterion, &shape, (kept, Buffers::Rotating));
            }
        }
    }
    criterion.final_summary();
}

fn decode(bench: &Bench, criterion: &mut Criterion, shape: &Shape, (kept, buffers): (Kept, Buffers)) {
    let plan =
        RecurrentFwd::<bf16>::new(bench.device(), shape, &RecurrentFwdOptions::new(1.0)).expect("compiles");
    let vectors = 3 * shape.k_len() + 2 * shape.v_len() + shape.h * shape.k;
    let bytes = (2 * 4 * shape.state_len() + 2 * vectors) as f64;
    let (count, method) = match buffers {
        // Four times the L2 between two uses of a buffer.
        Buffers::Rotating => (bench.rotation(bytes), "rotating"),
        Buffers::One => (1, "in L2"),
    };
    let (mut sets, error) = tensors(bench, &plan, shape, (count, kept));

    let launches = (count * 4).max(16);
    let replay =
        bench.capture(launches, |_, i| sets[i % count].run(bench, &plan)).expect("the pass can be captured");
    let place = if kept == Kept::InPlace { "in place" } else { "new state" };
    let Shape { seqs, h, k, .. } = shape;
    let id = format!("rwkv6/recurrent_fwd/B{} T{} H{h} D{k} {method}, {place}", seqs.b(), seqs.t());
    criterion.bench_function(&id, |bencher| bencher.iter_custom(|iterations| replay.time(iterations)));
    let case = Case {
        id,
        dtype: "bf16",
        bytes,
        // Per state element and token: read r, decay and one rank-one update.
        flops: 5.0 * shape.state_len() as f64 * seqs.t() as f64,
        error,
        extra_bytes: 0,
        method: match buffers {
            Buffers::Rotating => "graph replay, rotating buffers",
            Buffers::One => "graph replay, one set of buffers",
        },
    };
    bench.report(&case, &replay.samples());
}

/// Tensors for so many launches, and the error of one run on them.
fn tensors(
    bench: &Bench,
    plan: &RecurrentFwd<bf16>,
    shape: &Shape,
    (sets, kept): (usize, Kept),
) -> (Vec<Tensors>, f64) {
    let stream = bench.stream();
    let (h, d, t) = (shape.h, shape.k, shape.seqs.t());
    let mut rng = Rng::new(1);
    let host: [Vec<bf16>; 5] = [
        rng.normal::<f32>(shape.k_len(), 1.0),
        rng.normal::<f32>(shape.k_len(), 1.0),
        rng.normal::<f32>(shape.v_len(), 1.0),
        rng.gates::<f32>(shape.k_len(), Gates::LogSigmoid),
        rng.normal::<f32>(h * d, 1.0),
    ]
    .map(|x| x.into_iter().map(bf16::from_f32).collect());
    let state: Vec<f32> = rng.uniform(shape.state_len(), -1.0, 1.0);
    let mut all: Vec<Tensors> = (0..sets)
        .map(|_| Tensors {
            vectors: host.each_ref().map(|x| stream.clone_htod(x).expect("fits")),
            state: stream.clone_htod(&state).expect("fits"),
            o: stream.alloc_zeros(shape.v_len()).expect("fits"),
            final_state: (kept == Kept::New).then(|| stream.alloc_zeros(shape.state_len()).expect("fits")),
        })
        .collect();
    all[0].run(bench, plan).expect("runs");

    // Sequences do not see each other, so the first ones stand for all.
    let n = shape.seqs.n().min(2);
    let tokens = n * t * h * d;
    let wide =
        host.each_ref().map(|x| x.iter().take(tokens).map(|x| f64::from(x.to_f32())).collect::<Vec<_>>());
    let initial: Vec<f64> = state[..n * h * d * d].iter().map(|x| f64::from(*x)).collect();
    let [r, k, v, w, u] = &wide;
    let reference = fla_reference::rwkv6::Inputs { r, k, v, w, u, initial_state: Some(&initial) };
    let seqs = fla_reference::SeqLens::Dense { b: n, t };
    let reference_shape = fla_reference::Shape { seqs, h, k: d, v: d };
    let options = fla_reference::rwkv6::Options::new(1.0);
    let want = fla_reference::rwkv6::recurrent_fwd(&reference_shape, &reference, &options);
    let got: Vec<f64> = stream
        .clone_dtoh(&all[0].o.slice(..tokens))
        .expect("copies")
        .iter()
        .map(|x| f64::from(x.to_f32()))
        .collect();
    let error = relative_rms(&got, &want.o);
    let key = Key {
        backend: Backend::Gpu,
        model: Model::Rwkv6,
        pass: Pass::RecurrentFwd,
        dtype: Dtype::Bf16,
        class: Class::Output,
    };
    let limit = limit(key).expect("the table has the row");
    assert!(error <= limit, "the pass is wrong, so it is not timed: relative RMS {error:.2e} > {limit:.0e}");
    (all, error)
}
