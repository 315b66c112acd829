//! Decoding with the gated delta rule: one token a call and four, by graph replay over rotating buffers.

use criterion::Criterion;
use fla_core::cudarc::driver::CudaSlice;
use fla_core::testing::{Bench, Case};
use fla_core::{Error, FinalState, SeqLens, StateElement, StatePool};
use fla_gated_delta::{
    Beta, BetaMap, Gate, GateForm, QkNorm, RecurrentFwd, RecurrentFwdInputs, RecurrentFwdOptions,
    RecurrentFwdOutputs, Shape,
};
use fla_reference::compare::relative_rms;
use fla_reference::gated_delta as reference;
use fla_reference::inputs::{Gates, Rng};
use fla_reference::tolerance::{Backend, Class, Dtype, Key, Model, Pass, limit};
use half::bf16;

const H: usize = 32;
const D: usize = 128;

/// What is timed.
#[derive(Clone, Copy)]
struct Row {
    b: usize,
    t: usize,
    form: Form,
    states: Where,
    buffers: Buffers,
}

/// Where tensors are found.
#[derive(Clone, Copy, PartialEq)]
enum Buffers {
    /// Several sets in turn, none of which is in L2 any more.
    Rotating,
    /// One set, which stays in L2 when it is small.
    Same,
}

/// What is done inside.
#[derive(Clone, Copy, PartialEq)]
enum Form {
    /// Log decays, strengths and keys as given.
    Plain,
    /// What a layer asks for: logits for both, and normalised queries and keys.
    Layer,
}

/// Where states are.
#[derive(Clone, Copy, PartialEq)]
enum Where {
    InPlace,
    New,
    Pool,
}

/// One set of tensors, of which several are rotated so that none is found in L2.
struct Tensors<S> {
    q: CudaSlice<bf16>,
    k: CudaSlice<bf16>,
    v: CudaSlice<bf16>,
    g: CudaSlice<f32>,
    logits: CudaSlice<bf16>,
    a_log: CudaSlice<f32>,
    beta: CudaSlice<bf16>,
    o: CudaSlice<bf16>,
    state: CudaSlice<S>,
    final_state: CudaSlice<S>,
    slots: CudaSlice<i32>,
}

impl<S: StateElement> Tensors<S> {
    fn run(&mut self, bench: &Bench, row: &Row, plan: &RecurrentFwd<bf16, S>) -> Result<(), Error> {
        let g = match row.form {
            Form::Plain => Gate::Log(&self.g),
            Form::Layer => Gate::Raw { g: &self.logits, a_log: &self.a_log, dt_bias: Some(&self.a_log) },
        };
        let mut x = RecurrentFwdInputs {
            q: &self.q,
            k: &self.k,
            v: &self.v,
            g,
            gk: None,
            gv: None,
            beta: Beta::PerHead(&self.beta),
            initial_state: None,
            cu_seqlens: None,
        };
        let final_state = match row.states {
            Where::InPlace => FinalState::InPlace(&mut self.state),
            Where::New => {
                x.initial_state = Some(&self.state);
                FinalState::New(&mut self.final_state)
            }
            Where::Pool => {
                FinalState::Pool(StatePool { states: &mut self.state, slots: &self.slots, accepted: None })
            }
        };
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
    let row = Row { b: 1, t: 1, form: Form::Plain, states: Where::InPlace, buffers: Buffers::Rotating };
    decode::<f32>(&bench, &mut criterion, &Row { buffers: Buffers::Same, ..row });
    decode::<bf16>(&bench, &mut criterion, &Row { buffers: Buffers::Same, ..row });
    for b in [1, 32, 256] {
        for states in [Where::InPlace, Where::New, Where::Pool] {
            decode::<f32>(&bench, &mut criterion, &Row { b, states, ..row });
            decode::<bf16>(&bench, &mut criterion, &Row { b, states, ..row });
        }
        decode::<f32>(&bench, &mut criterion, &Row { b, form: Form::Layer, states: Where::Pool, ..row });
    }
    for b in [32, 256] {
        decode::<f32>(&bench, &mut criterion, &Row { b, t: 4, ..row });
        decode::<bf16>(&bench, &mut criterion, &Row { b, t: 4, ..row });
    }
    criterion.final_summary();
}

fn decode<S: StateElement>(bench: &Bench, criterion: &mut Criterion, row: &Row) {
    let shape = Shape { seqs: SeqLens::dense(row.b, row.t), h: H, hv: H, k: D, v: D };
    let options = match row.form {
        Form::Plain => RecurrentFwdOptions::new(0.125),
        Form::Layer => RecurrentFwdOptions::new(0.125)
            .with_gate(GateForm::Raw)
            .with_beta_map(BetaMap::Sigmoid)
            .with_qk_norm(QkNorm::L2),
    };
    let plan = RecurrentFwd::<bf16, S>::new(bench.device(), &shape, &options).expect("compiles");
    let gate_bytes = if row.form == Form::Plain { size_of::<f32>() } else { size_of::<bf16>() };
    let vectors = size_of::<bf16>() * (2 * shape.qk_len() + 2 * shape.v_len() + shape.head_len());
    let bytes = (2 * size_of::<S>() * shape.state_len() + vectors + gate_bytes * shape.head_len()) as f64;
    // Four times the L2 between two uses of a buffer; but never one set only.
    let count = if row.buffers == Buffers::Same { 1 } else { bench.rotation(bytes) };
    let mut sets = tensors::<S>(bench, row, &shape, count);
    let error = error(bench, row, &plan, &mut sets[0]);

    let launches = (count * 4).max(64);
    let replay = bench
        .capture(launches, |_, i| sets[i % count].run(bench, row, &plan))
        .expect("the pass can be captured");
    let form = if row.form == Form::Plain { "" } else { " layer" };
    let states = match row.states {
        Where::InPlace => "in place",
        Where::New => "new state",
        Where::Pool => "pool",
    };
    let state = S::DTYPE.name();
    let buffers = if row.buffers == Buffers::Same { " in L2" } else { "" };
    let id =
        format!("gated_delta/recurrent_fwd/B{} T{} H{H} D{D}{form} {state} {states}{buffers}", row.b, row.t);
    criterion.bench_function(&id, |bencher| bencher.iter_custom(|iterations| replay.time(iterations)));
    let case = Case {
        id,
        dtype: "bf16",
        bytes,
        // Per state element and token: read for k and for q, decay and a rank-one update.
        flops: 7.0 * (shape.head_len() * D * D) as f64,
        error,
        extra_bytes: 0,
        method: match row.buffers {
            Buffers::Rotating => "graph replay, rotating buffers",
            Buffers::Same => "graph replay, one set of buffers",
        },
    };
    bench.report(&case, &replay.samples());
}

/// Tensors for `sets` launches, all with the same numbers.
fn tensors<S: StateElement>(bench: &Bench, row: &Row, shape: &Shape, sets: usize) -> Vec<Tensors<S>> {
    let stream = bench.stream();
    let narrow = |x: Vec<f32>| -> Vec<bf16> { x.into_iter().map(bf16::from_f32).collect() };
    let mut rng = Rng::new(1);
    let q = narrow(rng.normal(shape.qk_len(), 1.0));
    let k = narrow(rng.unit_rows(shape.qk_len() / D, D));
    let v = narrow(rng.normal(shape.v_len(), 1.0));
    let g: Vec<f32> = rng.gates(shape.head_len(), Gates::LogSigmoid);
    let logits = narrow(rng.normal(shape.head_len(), 1.0));
    let a_log: Vec<f32> = rng.uniform(H, -1.0, 1.0);
    let beta = narrow(rng.uniform(shape.head_len(), 0.0, 1.0));
    let state: Vec<S> =
        rng.uniform::<f32>(shape.state_len(), -1.0, 1.0).into_iter().map(S::from_f32).collect();
    // The slots of a pool in no order; the first two where they are, for the comparison.
    let slots: Vec<i32> = (0..row.b as i32).map(|i| if i < 2 { i } else { row.b as i32 + 1 - i }).collect();
    let last_len = if row.states == Where::New { shape.state_len() } else { 0 };
    (0..sets)
        .map(|_| Tensors {
            q: stream.clone_htod(&q).expect("fits"),
            k: stream.clone_htod(&k).expect("fits"),
            v: stream.clone_htod(&v).expect("fits"),
            g: stream.clone_htod(&g).expect("fits"),
            logits: stream.clone_htod(&logits).expect("fits"),
            a_log: stream.clone_htod(&a_log).expect("fits"),
            beta: stream.clone_htod(&beta).expect("fits"),
            o: stream.alloc_zeros(shape.v_len()).expect("fits"),
            state: stream.clone_htod(&state).expect("fits"),
            final_state: stream.alloc_zeros(last_len).expect("fits"),
            slots: stream.clone_htod(&slots).expect("fits"),
        })
        .collect()
}

/// The error of one run. Sequences do not see each other, so the first ones stand for all.
fn error<S: StateElement>(
    bench: &Bench,
    row: &Row,
    plan: &RecurrentFwd<bf16, S>,
    set: &mut Tensors<S>,
) -> f64 {
    let stream = bench.stream();
    let n = row.b.min(2);
    let rows = n * row.t * H;
    fn wide<T: fla_core::Element>(bench: &Bench, x: &CudaSlice<T>, len: usize) -> Vec<f64> {
        let x = bench.stream().clone_dtoh(&x.slice(..len)).expect("copies");
        x.iter().map(|x| f64::from(x.to_f32())).collect()
    }
    let (q, k, v) =
        (wide(bench, &set.q, rows * D), wide(bench, &set.k, rows * D), wide(bench, &set.v, rows * D));
    let (g, logits, beta) =
        (wide(bench, &set.g, rows), wide(bench, &set.logits, rows), wide(bench, &set.beta, rows));
    let a_log = wide(bench, &set.a_log, H);
    let initial = wide(bench, &set.state, n * H * D * D);
    set.run(bench, row, plan).expect("runs");
    stream.synchronize().expect("finishes");

    let x = reference::Inputs {
        q: &q,
        k: &k,
        v: &v,
        g: match row.form {
            Form::Plain => reference::Gate::Log(&g),
            Form::Layer => reference::Gate::Raw { g: &logits, a_log: &a_log, dt_bias: Some(&a_log) },
        },
        gk: None,
        gv: None,
        beta: reference::Beta::PerHead(&beta),
        initial_state: Some(&initial),
    };
    let options = match row.form {
        Form::Plain => reference::Options::new(H, 0.125),
        Form::Layer => reference::Options::new(H, 0.125)
            .with_qk_norm(reference::QkNorm::L2)
            .with_beta_map(reference::BetaMap::Sigmoid),
    };
    let seqs = fla_reference::SeqLens::Dense { b: n, t: row.t };
    let want = reference::recurrent_fwd(&fla_reference::Shape { seqs, h: H, k: D, v: D }, &x, &options);
    let error = relative_rms(&wide(bench, &set.o, rows * D), &want.o);
    let key = Key {
        backend: Backend::Gpu,
        model: Model::GatedDelta,
        pass: Pass::RecurrentFwd,
        dtype: Dtype::Bf16,
        class: Class::Output,
    };
    let limit = limit(key).expect("the table has the row");
    assert!(error <= limit, "the pass is wrong, so it is not timed: relative RMS {error:.2e} > {limit:.0e}");
    error
}
