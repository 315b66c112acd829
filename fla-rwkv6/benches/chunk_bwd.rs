//! The chunk backward pass in training: whole batches, each call after the L2 has been overwritten.

mod data;

use criterion::Criterion;
use data::{Data, PROBLEMS, Problem, bwd_flops, fwd_flops, verified};
use fla_core::Error;
use fla_core::cudarc::driver::{CudaSlice, CudaStream, DevicePtr};
use fla_core::testing::{Bench, Case, Samples};
use fla_reference::tolerance::{Class, Pass};
use fla_rwkv6::{
    ChunkBwd, ChunkBwdInputs, ChunkBwdOutputs, ChunkFwdInputs, ChunkFwdOptions, SavedStates, chunk_fwd,
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
    for problem in &PROBLEMS {
        for saved_states in [SavedStates::Kept, SavedStates::Recomputed] {
            time(&bench, &mut criterion, problem, saved_states);
        }
    }
    criterion.final_summary();
}

fn time(bench: &Bench, criterion: &mut Criterion, problem: &Problem, saved_states: SavedStates) {
    let with = if saved_states == SavedStates::Kept { "with states" } else { "recomputed" };
    let id = format!("rwkv6/chunk_bwd/{} {with}", problem.name());
    let samples = Samples::default();
    // Made when the case is wanted: filters leave cases out.
    let mut case: Option<Backward> = None;
    criterion.bench_function(&id, |bencher| {
        let case = case.get_or_insert_with(|| Backward::new(bench, problem, saved_states));
        bencher.iter_custom(|iterations| bench.time_flushed(iterations, &samples, |stream| case.run(stream)));
    });
    let Some(case) = case else { return };
    let shape = case.data.shape();
    let states = case.states.as_ref().map_or(0, CudaSlice::len);
    let record = Case {
        id,
        dtype: "bf16",
        // Each input read once, each gradient written once; states that are recomputed come on top.
        bytes: 2.0 * (6 * shape.k_len() + 3 * shape.v_len() + states) as f64,
        flops: bwd_flops(shape) + if states == 0 { fwd_flops(shape) } else { 0.0 },
        error: case.error,
        extra_bytes: case.plan.workspace_bytes() + 2 * states,
        method: "events, L2 flushed",
    };
    bench.report(&record, &samples);
}

/// A plan with its tensors.
struct Backward {
    plan: ChunkBwd<bf16>,
    data: Data,
    states: Option<CudaSlice<u16>>,
    /// Of r, k, v and w.
    grads: [CudaSlice<bf16>; 4],
    du: CudaSlice<f32>,
    workspace: CudaSlice<u8>,
    error: f64,
}

impl Backward {
    fn new(bench: &Bench, problem: &Problem, saved_states: SavedStates) -> Self {
        let (device, stream) = (bench.device(), bench.stream());
        let data = Data::new(stream, problem);
        let options = ChunkFwdOptions::new(problem.scale()).with_saved_states(saved_states);
        let states = {
            let [r, k, v, w, _] = &data.device;
            let x = ChunkFwdInputs { r, k, v, w, u: &data.u, initial_state: None };
            chunk_fwd(device, data.shape(), &x, &options).expect("runs").states
        };
        let plan = ChunkBwd::new(device, data.shape(), &options).expect("compiles");
        let (k_len, v_len) = (data.shape().k_len(), data.shape().v_len());
        let mut case = Self {
            grads: [k_len, k_len, v_len, k_len].map(|len| stream.alloc_zeros(len).expect("fits")),
            du: stream.alloc_zeros(data.shape().h * data.shape().k).expect("fits"),
            workspace: stream.alloc_zeros(plan.workspace_bytes()).expect("fits"),
            plan,
            data,
            states,
            error: 0.0,
        };
        case.run(stream).expect("runs");
        let (_, want) = case.data.reference();
        for (i, (got, want)) in case.grads.iter().zip(&want).enumerate() {
            let class = if i == 3 { Class::GateGrad } else { Class::Grad };
            let error = verified(Pass::ChunkBwd, class, &case.data.checked(got), want);
            case.error = case.error.max(error);
        }
        case
    }

    fn run(&mut self, stream: &CudaStream) -> Result<(), Error> {
        let [r, k, v, w, d_o] = &self.data.device;
        let states = self.states.as_ref().map(|states| states as &dyn DevicePtr<u16>);
        let u = &self.data.u;
        let x = ChunkBwdInputs { r, k, v, w, u, initial_state: None, states, d_o, d_final_state: None };
        let [dr, dk, dv, dw] = &mut self.grads;
        let mut dx = ChunkBwdOutputs { dr, dk, dv, dw, du: &mut self.du, d_initial_state: None };
        self.plan.run(stream, &x, &mut dx, &mut self.workspace)
    }
}
