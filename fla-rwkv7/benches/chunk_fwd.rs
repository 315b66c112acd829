//! The chunk forward pass in training: whole batches, each call after the L2 has been overwritten.

mod data;

use criterion::Criterion;
use data::{Data, Form, SHAPES, fwd_flops, verified};
use fla_core::Error;
use fla_core::cudarc::driver::{CudaSlice, CudaStream, DevicePtrMut};
use fla_core::testing::{Bench, Case, Samples};
use fla_reference::tolerance::{Class, Pass};
use fla_rwkv7::{
    ChunkFwd, ChunkFwdInputs, ChunkFwdOptions, ChunkFwdOutputs, Decay, FusedMulChunkFwd,
    FusedMulChunkFwdInputs, SavedStates,
};
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
    for shape in SHAPES {
        for saved_states in [SavedStates::Recomputed, SavedStates::Kept] {
            time(&bench, &mut criterion, shape, What { form: Form::Keys, saved_states });
        }
    }
    let what = What { form: Form::KeyAndRate, saved_states: SavedStates::Recomputed };
    time(&bench, &mut criterion, SHAPES[0], what);
    criterion.final_summary();
}

/// What is timed, apart from the shape.
#[derive(Clone, Copy)]
struct What {
    form: Form,
    saved_states: SavedStates,
}

fn time(bench: &Bench, criterion: &mut Criterion, [b, t, h, d]: [usize; 4], what: What) {
    let with = if what.saved_states == SavedStates::Kept { " with states" } else { "" };
    let form = if what.form == Form::KeyAndRate { " from kk and logits" } else { "" };
    let id = format!("rwkv7/chunk_fwd/B{b} T{t} H{h} D{d}{form}{with}");
    let samples = Samples::default();
    // Made when the case is wanted: filters leave cases out.
    let mut case: Option<Forward> = None;
    criterion.bench_function(&id, |bencher| {
        let case = case.get_or_insert_with(|| Forward::new(bench, [b, t, h, d], what));
        bencher.iter_custom(|iterations| bench.time_flushed(iterations, &samples, |stream| case.run(stream)));
    });
    let Some(case) = case else { return };
    let shape = case.data.shape();
    let states = case.states.as_ref().map_or(0, |_| case.states_len);
    let record = Case {
        id,
        dtype: "bf16",
        // Each input read once, each output written once.
        bytes: 2.0 * (5 * shape.k_len() + 2 * shape.v_len() + states) as f64,
        flops: fwd_flops(shape),
        error: case.error,
        extra_bytes: 2 * states,
        method: "events, L2 flushed",
    };
    bench.report(&record, &samples);
}

/// The plan of a form.
enum Plan {
    Keys(ChunkFwd<bf16>),
    KeyAndRate(FusedMulChunkFwd<bf16>),
}

/// A plan with its tensors.
struct Forward {
    plan: Plan,
    data: Data,
    o: CudaSlice<bf16>,
    states: Option<CudaSlice<u16>>,
    states_len: usize,
    workspace: CudaSlice<u8>,
    error: f64,
}

impl Forward {
    fn new(bench: &Bench, shape: [usize; 4], what: What) -> Self {
        let (device, stream) = (bench.device(), bench.stream());
        let data = Data::new(stream, shape, what.form);
        let options = ChunkFwdOptions::new().with_saved_states(what.saved_states);
        let (plan, states_len, workspace_bytes) = match what.form {
            Form::Keys => {
                let plan = ChunkFwd::new(device, data.shape(), &options).expect("compiles");
                let (states_len, bytes) = (plan.states_len(), plan.workspace_bytes());
                (Plan::Keys(plan), states_len, bytes)
            }
            Form::KeyAndRate => {
                let options = options.with_decay(Decay::Logit);
                let plan = FusedMulChunkFwd::new(device, data.shape(), &options).expect("compiles");
                let (states_len, bytes) = (plan.states_len(), plan.workspace_bytes());
                (Plan::KeyAndRate(plan), states_len, bytes)
            }
        };
        let o = stream.alloc_zeros(data.shape().v_len()).expect("fits");
        let states =
            (what.saved_states == SavedStates::Kept).then(|| stream.alloc_zeros(states_len).expect("fits"));
        let workspace = stream.alloc_zeros(workspace_bytes).expect("fits");
        let mut case = Self { plan, data, o, states, states_len, workspace, error: f64::NAN };
        case.run(stream).expect("runs");
        let (want, _) = case.data.reference();
        case.error = verified(Pass::ChunkFwd, Class::Output, &case.data.checked(&case.o), &want);
        case
    }

    fn run(&mut self, stream: &CudaStream) -> Result<(), Error> {
        let [r, w, k, v, a, b, _] = &self.data.device;
        let states = self.states.as_mut().map(|states| states as &mut dyn DevicePtrMut<u16>);
        let mut y = ChunkFwdOutputs { o: &mut self.o, final_state: None, states };
        match &self.plan {
            Plan::Keys(plan) => plan.run(
                stream,
                &ChunkFwdInputs { r, w, k, v, a, b, initial_state: None },
                &mut y,
                &mut self.workspace,
            ),
            Plan::KeyAndRate(plan) => {
                let x = FusedMulChunkFwdInputs { r, w, k, v, kk: a, a: b, initial_state: None };
                plan.run(stream, &x, &mut y, &mut self.workspace)
            }
        }
    }
}
