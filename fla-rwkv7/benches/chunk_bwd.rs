//! The chunk backward pass in training: whole batches, each call after the L2 has been overwritten.

mod data;

use criterion::Criterion;
use data::{Data, Form, SHAPES, bwd_flops, fwd_flops, verified};
use fla_core::Error;
use fla_core::cudarc::driver::{CudaSlice, CudaStream, DevicePtr};
use fla_core::testing::{Bench, Case, Samples};
use fla_reference::tolerance::{Class, Pass};
use fla_rwkv7::{
    ChunkBwd, ChunkBwdInputs, ChunkBwdOutputs, ChunkFwdInputs, ChunkFwdOptions, Decay, FusedMulChunkBwd,
    FusedMulChunkBwdInputs, FusedMulChunkBwdOutputs, FusedMulChunkFwdInputs, SavedStates, chunk_fwd,
    fused_mul_chunk_fwd,
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
        for saved_states in [SavedStates::Kept, SavedStates::Recomputed] {
            time(&bench, &mut criterion, shape, What { form: Form::Keys, saved_states });
        }
    }
    let what = What { form: Form::KeyAndRate, saved_states: SavedStates::Kept };
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
    let with = if what.saved_states == SavedStates::Kept { "with states" } else { "recomputed" };
    let form = if what.form == Form::KeyAndRate { "from kk and logits " } else { "" };
    let id = format!("rwkv7/chunk_bwd/B{b} T{t} H{h} D{d} {form}{with}");
    let samples = Samples::default();
    // Made when the case is wanted: filters leave cases out.
    let mut case: Option<Backward> = None;
    criterion.bench_function(&id, |bencher| {
        let case = case.get_or_insert_with(|| Backward::new(bench, [b, t, h, d], what));
        bencher.iter_custom(|iterations| bench.time_flushed(iterations, &samples, |stream| case.run(stream)));
    });
    let Some(case) = case else { return };
    let shape = case.data.shape();
    let states = case.states.as_ref().map_or(0, CudaSlice::len);
    let record = Case {
        id,
        dtype: "bf16",
        // Each input read once, each gradient written once; states that are recomputed come on top.
        bytes: 2.0 * (10 * shape.k_len() + 3 * shape.v_len() + states) as f64,
        flops: bwd_flops(shape) + if states == 0 { fwd_flops(shape) } else { 0.0 },
        error: case.error,
        extra_bytes: case.workspace.len() + 2 * states,
        method: "events, L2 flushed",
    };
    bench.report(&record, &samples);
}

/// The plan of a form.
enum Plan {
    Keys(ChunkBwd<bf16>),
    KeyAndRate(FusedMulChunkBwd<bf16>),
}

/// A plan with its tensors.
struct Backward {
    plan: Plan,
    data: Data,
    states: Option<CudaSlice<u16>>,
    grads: [CudaSlice<bf16>; 6],
    workspace: CudaSlice<u8>,
    error: f64,
}

impl Backward {
    fn new(bench: &Bench, shape: [usize; 4], what: What) -> Self {
        let (device, stream) = (bench.device(), bench.stream());
        let data = Data::new(stream, shape, what.form);
        let options = ChunkFwdOptions::new().with_saved_states(what.saved_states);
        let [r, w, k, v, a, b, _] = &data.device;
        let (plan, workspace_bytes, states) = match what.form {
            Form::Keys => {
                let x = ChunkFwdInputs { r, w, k, v, a, b, initial_state: None };
                let y = chunk_fwd(device, data.shape(), &x, &options).expect("runs");
                let plan = ChunkBwd::new(device, data.shape(), &options).expect("compiles");
                let workspace_bytes = plan.workspace_bytes();
                (Plan::Keys(plan), workspace_bytes, y.states)
            }
            Form::KeyAndRate => {
                let options = options.with_decay(Decay::Logit);
                let x = FusedMulChunkFwdInputs { r, w, k, v, kk: a, a: b, initial_state: None };
                let y = fused_mul_chunk_fwd(device, data.shape(), &x, &options).expect("runs");
                let plan = FusedMulChunkBwd::new(device, data.shape(), &options).expect("compiles");
                let workspace_bytes = plan.workspace_bytes();
                (Plan::KeyAndRate(plan), workspace_bytes, y.states)
            }
        };
        let (k_len, v_len) = (data.shape().k_len(), data.shape().v_len());
        let mut case = Self {
            grads: [k_len, k_len, k_len, v_len, k_len, k_len]
                .map(|len| stream.alloc_zeros(len).expect("fits")),
            workspace: stream.alloc_zeros(workspace_bytes).expect("fits"),
            plan,
            data,
            states,
            error: 0.0,
        };
        case.run(stream).expect("runs");
        let (_, want) = case.data.reference();
        for (i, (got, want)) in case.grads.iter().zip(&want).enumerate() {
            let class = if i == 1 { Class::GateGrad } else { Class::Grad };
            let error = verified(Pass::ChunkBwd, class, &case.data.checked(got), want);
            case.error = case.error.max(error);
        }
        case
    }

    fn run(&mut self, stream: &CudaStream) -> Result<(), Error> {
        let [r, w, k, v, a, b, d_o] = &self.data.device;
        let states = self.states.as_ref().map(|states| states as &dyn DevicePtr<u16>);
        let [dr, dw, dk, dv, da, db] = &mut self.grads;
        let (initial_state, d_final_state, d_initial_state) = (None, None, None);
        match &self.plan {
            Plan::Keys(plan) => {
                let x = ChunkBwdInputs { r, w, k, v, a, b, initial_state, states, d_o, d_final_state };
                let mut dx = ChunkBwdOutputs { dr, dw, dk, dv, da, db, d_initial_state };
                plan.run(stream, &x, &mut dx, &mut self.workspace)
            }
            Plan::KeyAndRate(plan) => {
                let x = FusedMulChunkBwdInputs {
                    r,
                    w,
                    k,
                    v,
                    kk: a,
                    a: b,
                    initial_state,
                    states,
                    d_o,
                    d_final_state,
                };
                let mut dx = FusedMulChunkBwdOutputs { dr, dw, dk, dv, dkk: da, da: db, d_initial_state };
                plan.run(stream, &x, &mut dx, &mut self.workspace)
            }
        }
    }
}
