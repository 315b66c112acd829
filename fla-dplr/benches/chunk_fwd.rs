//! The chunk forward pass in training: whole batches, each call after the L2 has been overwritten.

mod data;

use criterion::Criterion;
use data::{Data, SCALE, SHAPES, fwd_flops, verified};
use fla_core::Error;
use fla_core::cudarc::driver::{CudaSlice, CudaStream, DevicePtrMut};
use fla_core::testing::{Bench, Case, Samples};
use fla_dplr::{ChunkFwd, ChunkFwdInputs, ChunkFwdOptions, ChunkFwdOutputs, SavedStates};
use fla_reference::inputs::Gates;
use fla_reference::tolerance::{Class, Pass};
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
            time(&bench, &mut criterion, shape, saved_states);
        }
    }
    criterion.final_summary();
}

fn time(bench: &Bench, criterion: &mut Criterion, [b, t, h, d]: [usize; 4], saved_states: SavedStates) {
    let with = if saved_states == SavedStates::Kept { " with states" } else { "" };
    let id = format!("dplr/chunk_fwd/B{b} T{t} H{h} D{d}{with}");
    let samples = Samples::default();
    // Made when the case is wanted: filters leave cases out.
    let mut case: Option<Forward> = None;
    criterion.bench_function(&id, |bencher| {
        let case = case.get_or_insert_with(|| Forward::new(bench, [b, t, h, d], saved_states));
        bencher.iter_custom(|iterations| bench.time_flushed(iterations, &samples, |stream| case.run(stream)));
    });
    let Some(case) = case else { return };
    let shape = case.data.shape();
    let states = case.states.as_ref().map_or(0, |_| case.plan.states_len());
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

/// A plan with its tensors.
struct Forward {
    plan: ChunkFwd<bf16>,
    data: Data,
    o: CudaSlice<bf16>,
    states: Option<CudaSlice<u16>>,
    workspace: CudaSlice<u8>,
    error: f64,
}

impl Forward {
    fn new(bench: &Bench, shape: [usize; 4], saved_states: SavedStates) -> Self {
        let stream = bench.stream();
        let data = Data::new(stream, shape, Gates::LogSigmoid);
        let options = ChunkFwdOptions::new(SCALE).with_saved_states(saved_states);
        let plan = ChunkFwd::new(bench.device(), data.shape(), &options).expect("compiles");
        let o = stream.alloc_zeros(data.shape().v_len()).expect("fits");
        let states =
            (saved_states == SavedStates::Kept).then(|| stream.alloc_zeros(plan.states_len()).expect("fits"));
        let workspace = stream.alloc_zeros(plan.workspace_bytes()).expect("fits");
        let mut case = Self { plan, data, o, states, workspace, error: f64::NAN };
        case.run(stream).expect("runs");
        let (want, _) = case.data.reference();
        case.error = verified(Pass::ChunkFwd, Class::Output, &case.data.checked(&case.o), &want);
        case
    }

    fn run(&mut self, stream: &CudaStream) -> Result<(), Error> {
        let [q, k, v, a, b, g, _] = &self.data.device;
        let x = ChunkFwdInputs { q, k, v, a, b, g, initial_state: None };
        let states = self.states.as_mut().map(|states| states as &mut dyn DevicePtrMut<u16>);
        let mut y = ChunkFwdOutputs { o: &mut self.o, final_state: None, states };
        self.plan.run(stream, &x, &mut y, &mut self.workspace)
    }
}
