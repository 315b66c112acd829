//! The chunk forward pass in training: whole batches, each call after the L2 has been overwritten.

mod data;

use criterion::Criterion;
use data::{Data, SHAPES, verified};
use fla_core::cudarc::driver::{CudaSlice, CudaStream, DevicePtrMut};
use fla_core::testing::{Bench, Case, Samples};
use fla_core::{Element, Error};
use fla_reference::tolerance::{Class, Pass};
use fla_rwkv4::{ChunkFwd, ChunkFwdInputs, ChunkFwdOptions, ChunkFwdOutputs};
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
        time::<f32>(&bench, &mut criterion, shape, States::Dropped);
        time::<bf16>(&bench, &mut criterion, shape, States::Dropped);
    }
    time::<f32>(&bench, &mut criterion, SHAPES[0], States::Kept);
    time::<bf16>(&bench, &mut criterion, SHAPES[0], States::Kept);
    criterion.final_summary();
}

/// Whether the states for the gradients are written.
#[derive(Clone, Copy, Debug, PartialEq)]
enum States {
    Kept,
    Dropped,
}

fn time<T: Element>(bench: &Bench, criterion: &mut Criterion, [b, t, c]: [usize; 3], kept: States) {
    let dtype = T::DTYPE.name();
    let with = if kept == States::Kept { " with states" } else { "" };
    let id = format!("rwkv4/chunk_fwd/B{b} T{t} C{c} {dtype}{with}");
    let samples = Samples::default();
    // Made when the case is wanted: filters leave cases out.
    let mut case: Option<Forward<T>> = None;
    criterion.bench_function(&id, |bencher| {
        let case = case.get_or_insert_with(|| Forward::new(bench, [b, t, c], kept));
        bencher.iter_custom(|iterations| bench.time_flushed(iterations, &samples, |stream| case.run(stream)));
    });
    let Some(case) = case else { return };
    let elements = case.data.shape().token_len() as f64;
    let states = if kept == States::Kept { 4.0 * case.data.shape().states_len() as f64 } else { 0.0 };
    let case = Case {
        id,
        dtype,
        bytes: 3.0 * elements * T::DTYPE.bytes() as f64 + states,
        // Two exponentials, a quotient, and the sums.
        flops: 20.0 * elements,
        error: case.error,
        extra_bytes: 0,
        method: "events, L2 flushed",
    };
    bench.report(&case, &samples);
}

/// A plan with its tensors.
struct Forward<T> {
    plan: ChunkFwd<T>,
    data: Data<T>,
    o: CudaSlice<T>,
    states: Option<CudaSlice<f32>>,
    error: f64,
}

impl<T: Element> Forward<T> {
    fn new(bench: &Bench, shape: [usize; 3], kept: States) -> Self {
        let stream = bench.stream();
        let data = Data::<T>::new(stream, shape);
        let plan =
            ChunkFwd::<T>::new(bench.device(), data.shape(), &ChunkFwdOptions::new()).expect("compiles");
        let o = stream.alloc_zeros(data.shape().token_len()).expect("fits");
        let states =
            (kept == States::Kept).then(|| stream.alloc_zeros(data.shape().states_len()).expect("fits"));
        let mut case = Self { plan, data, o, states, error: f64::NAN };
        case.run(stream).expect("runs");
        let (want, _) = case.data.reference();
        case.error = verified::<T>(Pass::ChunkFwd, Class::Output, &case.data.checked(&case.o), &want.o);
        case
    }

    fn run(&mut self, stream: &CudaStream) -> Result<(), Error> {
        let Data { w, u, k, v, .. } = &self.data;
        let x = ChunkFwdInputs { w, u, k, v, initial_state: None };
        let states = self.states.as_mut().map(|states| states as &mut dyn DevicePtrMut<f32>);
        self.plan.run(stream, &x, &mut ChunkFwdOutputs { o: &mut self.o, final_state: None, states })
    }
}
