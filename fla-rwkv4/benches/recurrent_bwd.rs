//! The recurrent backward pass: many short sequences, each call after the L2 has been overwritten.

mod data;

use criterion::Criterion;
use data::{Data, verified};
use fla_core::cudarc::driver::{CudaSlice, CudaStream};
use fla_core::testing::{Bench, Case, Samples};
use fla_core::{Element, Error};
use fla_reference::tolerance::{Class, Pass};
use fla_rwkv4::{RecurrentBwd, RecurrentBwdInputs, RecurrentBwdOptions, RecurrentBwdOutputs};
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
    for shape in [[512, 64, 1024], [64, 512, 1024]] {
        time::<f32>(&bench, &mut criterion, shape);
        time::<bf16>(&bench, &mut criterion, shape);
    }
    criterion.final_summary();
}

fn time<T: Element>(bench: &Bench, criterion: &mut Criterion, [b, t, c]: [usize; 3]) {
    let dtype = T::DTYPE.name();
    let id = format!("rwkv4/recurrent_bwd/B{b} T{t} C{c} {dtype}");
    let samples = Samples::default();
    // Made when the case is wanted: filters leave cases out.
    let mut case: Option<Backward<T>> = None;
    criterion.bench_function(&id, |bencher| {
        let case = case.get_or_insert_with(|| Backward::new(bench, [b, t, c]));
        bencher.iter_custom(|iterations| bench.time_flushed(iterations, &samples, |stream| case.run(stream)));
    });
    let Some(case) = case else { return };
    let elements = case.data.shape().token_len() as f64;
    let record = Case {
        id,
        dtype,
        bytes: 5.0 * elements * T::DTYPE.bytes() as f64,
        // Three exponentials, a quotient, and the sums of both directions.
        flops: 50.0 * elements,
        error: case.error,
        extra_bytes: case.plan.workspace_bytes(),
        method: "events, L2 flushed",
    };
    bench.report(&record, &samples);
}

/// A plan with its tensors.
struct Backward<T> {
    plan: RecurrentBwd<T>,
    data: Data<T>,
    dw: CudaSlice<f32>,
    du: CudaSlice<f32>,
    dk: CudaSlice<T>,
    dv: CudaSlice<T>,
    workspace: CudaSlice<u8>,
    error: f64,
}

impl<T: Element> Backward<T> {
    fn new(bench: &Bench, shape: [usize; 3]) -> Self {
        let (device, stream) = (bench.device(), bench.stream());
        let data = Data::<T>::new(stream, shape);
        let plan =
            RecurrentBwd::<T>::new(device, data.shape(), &RecurrentBwdOptions::new()).expect("compiles");
        let len = data.shape().token_len();
        let mut case = Self {
            dw: stream.alloc_zeros(data.shape().c).expect("fits"),
            du: stream.alloc_zeros(data.shape().c).expect("fits"),
            dk: stream.alloc_zeros(len).expect("fits"),
            dv: stream.alloc_zeros(len).expect("fits"),
            workspace: stream.alloc_zeros(plan.workspace_bytes()).expect("fits"),
            plan,
            data,
            error: f64::NAN,
        };
        case.run(stream).expect("runs");
        let (_, want) = case.data.reference();
        let data = &case.data;
        verified::<f32>(Pass::RecurrentBwd, Class::GateGrad, &data.checked(&case.dw), &want.dw);
        verified::<f32>(Pass::RecurrentBwd, Class::Grad, &data.checked(&case.du), &want.du);
        verified::<T>(Pass::RecurrentBwd, Class::Grad, &data.checked(&case.dv), &want.dv);
        case.error = verified::<T>(Pass::RecurrentBwd, Class::Grad, &data.checked(&case.dk), &want.dk);
        case
    }

    fn run(&mut self, stream: &CudaStream) -> Result<(), Error> {
        let Data { w, u, k, v, d_o, .. } = &self.data;
        let x = RecurrentBwdInputs {
            w,
            u,
            k,
            v,
            initial_state: None,
            d_o,
            d_final_state: None,
            cu_seqlens: None,
        };
        let mut y = RecurrentBwdOutputs {
            dw: &mut self.dw,
            du: &mut self.du,
            dk: &mut self.dk,
            dv: &mut self.dv,
            d_initial_state: None,
        };
        self.plan.run(stream, &x, &mut y, &mut self.workspace)
    }
}
