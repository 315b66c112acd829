//! Gradients of RWKV-6 token by token, by graph replay.

use criterion::Criterion;
use fla_core::cudarc::driver::CudaSlice;
use fla_core::testing::{Bench, Case};
use fla_core::{Error, SeqLens, Shape};
use fla_reference::compare::relative_rms;
use fla_reference::inputs::{Gates, Rng};
use fla_reference::tolerance::{Backend, Class, Dtype, Key, Model, Pass, limit};
use fla_rwkv6::{RecurrentBwd, RecurrentBwdInputs, RecurrentBwdOutputs, RecurrentFwdOptions};
use half::bf16;

struct Tensors {
    /// `r`, `k`, `v`, `w`, `u`, `d_o`
    inputs: [CudaSlice<bf16>; 6],
    /// `dr`, `dk`, `dv`, `dw`
    grads: [CudaSlice<bf16>; 4],
    du: CudaSlice<f32>,
    workspace: CudaSlice<u8>,
}

impl Tensors {
    fn run(&mut self, bench: &Bench, plan: &RecurrentBwd<bf16>) -> Result<(), Error> {
        let [r, k, v, w, u, d_o] = &self.inputs;
        let x = RecurrentBwdInputs { r, k, v, w, u, initial_state: None, d_o, d_final_state: None };
        let [dr, dk, dv, dw] = &mut self.grads;
        let mut dx = RecurrentBwdOutputs { dr, dk, dv, dw, du: &mut self.du, d_initial_state: None };
        plan.run(bench.stream(), &x, &mut dx, &mut self.workspace)
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
    for (b, t, h, d) in [(1, 128, 64, 64), (8, 128, 64, 64), (8, 1024, 64, 64), (8, 128, 32, 128)] {
        let shape = Shape { seqs: SeqLens::dense(b, t), h, k: d, v: d };
        gradients(&bench, &mut criterion, &shape);
    }
    criterion.final_summary();
}

fn gradients(bench: &Bench, criterion: &mut Criterion, shape: &Shape) {
    let plan =
        RecurrentBwd::<bf16>::new(bench.device(), shape, &RecurrentFwdOptions::new(1.0)).expect("compiles");
    let (mut tensors, error) = tensors(bench, &plan, shape);
    let replay = bench.capture(2, |_, _| tensors.run(bench, &plan)).expect("the pass can be captured");
    let Shape { seqs, h, k, .. } = shape;
    let id = format!("rwkv6/recurrent_bwd/B{} T{} H{h} D{k}", seqs.b(), seqs.t());
    criterion.bench_function(&id, |bencher| bencher.iter_custom(|iterations| replay.time(iterations)));
    let case = Case {
        id,
        dtype: "bf16",
        bytes: (2 * (6 * shape.k_len() + 3 * shape.v_len()) + 6 * h * k) as f64,
        // Per state element and token: twice the decay and the update, then five products and sums.
        flops: 17.0 * (shape.k_len() * shape.v) as f64,
        error,
        extra_bytes: plan.workspace_bytes(),
        method: "graph replay",
    };
    bench.report(&case, &replay.samples());
}

/// Tensors, and the larger of two gradients' errors in the first head after one run on them.
fn tensors(bench: &Bench, plan: &RecurrentBwd<bf16>, shape: &Shape) -> (Tensors, f64) {
    let stream = bench.stream();
    let (h, d, t) = (shape.h, shape.k, shape.seqs.t());
    let mut rng = Rng::new(1);
    let host: [Vec<bf16>; 6] = [
        rng.normal::<f32>(shape.k_len(), 1.0),
        rng.normal::<f32>(shape.k_len(), 1.0),
        rng.normal::<f32>(shape.v_len(), 1.0),
        rng.gates::<f32>(shape.k_len(), Gates::LogSigmoid),
        rng.normal::<f32>(h * d, 1.0),
        rng.normal::<f32>(shape.v_len(), 1.0),
    ]
    .map(|x| x.into_iter().map(bf16::from_f32).collect());
    let zeros = |len| stream.alloc_zeros::<bf16>(len).expect("fits");
    let mut tensors = Tensors {
        inputs: host.each_ref().map(|x| stream.clone_htod(x).expect("fits")),
        grads: [zeros(shape.k_len()), zeros(shape.k_len()), zeros(shape.v_len()), zeros(shape.k_len())],
        du: stream.alloc_zeros(h * d).expect("fits"),
        workspace: stream.alloc_zeros(plan.workspace_bytes()).expect("fits"),
    };
    tensors.run(bench, plan).expect("runs");

    // Heads and sequences do not see each other but in `du`, so the first ones stand for all.
    let first_head = |x: &[bf16]| -> Vec<f64> {
        let rows = x.chunks_exact(d).step_by(h).take(t);
        rows.flatten().map(|x| f64::from(x.to_f32())).collect()
    };
    let wide = host.each_ref().map(|x| first_head(x));
    let [r, k, v, w, u, d_o] = &wide;
    let x = fla_reference::rwkv6::Inputs { r, k, v, w, u: &u[..d], initial_state: None };
    let dy = fla_reference::rwkv6::OutputGrads { d_o, d_final_state: None };
    let seqs = fla_reference::SeqLens::Dense { b: 1, t };
    let one = fla_reference::Shape { seqs, h: 1, k: d, v: d };
    let options = fla_reference::rwkv6::Options::new(1.0);
    let want = fla_reference::rwkv6::recurrent_bwd(&one, &x, &dy, &options);
    let got = |i: usize| first_head(&stream.clone_dtoh(&tensors.grads[i]).expect("copies"));
    let error = relative_rms(&got(1), &want.dk).max(relative_rms(&got(3), &want.dw));
    let key = Key {
        backend: Backend::Gpu,
        model: Model::Rwkv6,
        pass: Pass::RecurrentBwd,
        dtype: Dtype::Bf16,
        class: Class::GateGrad,
    };
    let limit = limit(key).expect("the table has the row");
    assert!(error <= limit, "the pass is wrong, so it is not timed: relative RMS {error:.2e} > {limit:.0e}");
    (tensors, error)
}
