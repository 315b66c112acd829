//! The elementwise functions at the size of a training step, each launch after the L2 has been overwritten; and at one
//! token a sequence, by graph replay.

use std::time::Duration;

use criterion::Criterion;
use fla_core::cudarc::driver::{CudaSlice, DevicePtrMut};
use fla_core::testing::{Bench, Case, Samples};
use fla_core::{Error, SeqLens};
use fla_reference::compare::relative_rms;
use fla_reference::inputs::Rng;
use fla_reference::rwkv7 as reference;
use fla_reference::token_shift;
use fla_reference::tolerance::{Backend, Class, Dtype, Key, Model, Pass, limit};
use fla_rwkv7::{
    ChannelMixingShape, ChannelShape, FusedAddcmul, FusedAddcmulBwd, FusedAddcmulBwdInputs,
    FusedAddcmulBwdOutputs, FusedAddcmulInputs, FusedAddcmulOutputs, FusedChannelMixing,
    FusedChannelMixingBwd, FusedChannelMixingBwdInputs, FusedChannelMixingBwdOutputs,
    FusedChannelMixingInputs, FusedChannelMixingOutputs, FusedGateOutputCorrection,
    FusedGateOutputCorrectionBwd, FusedGateOutputCorrectionBwdInputs, FusedGateOutputCorrectionBwdOutputs,
    FusedGateOutputCorrectionInputs, FusedGateOutputCorrectionOutputs, FusedKUpdate, FusedKUpdateBwd,
    FusedKUpdateBwdInputs, FusedKUpdateBwdOutputs, FusedKUpdateInputs, FusedKUpdateOutputs, FusedKkNorm,
    FusedKkNormBwd, FusedKkNormBwdInputs, FusedKkNormBwdOutputs, FusedKkNormInputs, FusedKkNormKUpdate,
    FusedKkNormKUpdateBwd, FusedKkNormKUpdateBwdInputs, FusedKkNormKUpdateBwdOutputs,
    FusedKkNormKUpdateInputs, FusedKkNormKUpdateOutputs, FusedKkNormOutputs, FusedTokenShift,
    FusedTokenShiftAddcmul, FusedTokenShiftAddcmulBwd, FusedTokenShiftAddcmulBwdInputs,
    FusedTokenShiftAddcmulBwdOutputs, FusedTokenShiftAddcmulInputs, FusedTokenShiftAddcmulOutputs,
    FusedTokenShiftBwd, FusedTokenShiftBwdInputs, FusedTokenShiftBwdOutputs, FusedTokenShiftInputs,
    FusedTokenShiftOutputs, HeadShape, Mixes,
};
use half::bf16;

/// Tokens on which a function is verified before it is timed on all; the kernel is the same.
const VERIFIED: usize = 300;

/// Channels of a head.
const K: usize = 64;

/// Elements of each tensor before its numbers repeat.
const PERIOD: usize = 1 << 20;

/// Tensors of one width: as many activations as the largest function reads and writes, and parameters.
struct Tensors {
    seqs: SeqLens,
    d: usize,
    inputs: Vec<CudaSlice<bf16>>,
    outputs: Vec<CudaSlice<bf16>>,
    parameters: Vec<CudaSlice<bf16>>,
    sums: Vec<CudaSlice<f32>>,
    workspace: Option<CudaSlice<u8>>,
    /// The numbers of `inputs` and of `parameters`.
    host: (Vec<Vec<f64>>, Vec<Vec<f64>>),
}

/// One function in one direction.
struct Function {
    name: &'static str,
    /// Activations that it reads and writes.
    traffic: usize,
    /// Operations for each channel of a token.
    flops: usize,
    /// Results, as activations and as sums, that `verify` compares.
    outputs: usize,
    sums: usize,
    model: Model,
    prepare: fn(&Bench, &mut Tensors) -> Run,
    verify: fn(&Tensors) -> Vec<Vec<f64>>,
}

type Run = Box<dyn Fn(&Bench, &mut Tensors) -> Result<(), Error>>;

fn main() {
    let bench = match Bench::open() {
        Ok(bench) => bench,
        Err(error) => {
            eprintln!("no benchmark without a GPU: {error}");
            std::process::exit(1);
        }
    };
    let mut criterion = Criterion::default()
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(500))
        .sample_size(20)
        .configure_from_args();
    for (b, t) in [(8, 4096), (32, 1)] {
        let mut small = Tensors::new(&bench, SeqLens::dense(1, VERIFIED), 4096);
        let mut large = Tensors::new(&bench, SeqLens::dense(b, t), 4096);
        for function in FUNCTIONS {
            let error = verified(&bench, function, &mut small);
            let run = (function.prepare)(&bench, &mut large);
            let elements = (b * t * 4096) as f64;
            let id = format!("rwkv7/{}/B{b} T{t} D4096", function.name);
            let flushed = t > 1;
            let samples = if flushed {
                let samples = Samples::default();
                criterion.bench_function(&id, |bencher| {
                    bencher.iter_custom(|n| bench.time_flushed(n, &samples, |_| run(&bench, &mut large)));
                });
                samples
            } else {
                let replay = bench.capture(64, |_, _| run(&bench, &mut large)).expect("can be captured");
                criterion.bench_function(&id, |bencher| bencher.iter_custom(|n| replay.time(n)));
                replay.samples()
            };
            let case = Case {
                id,
                dtype: "bf16",
                bytes: 2.0 * elements * function.traffic as f64,
                flops: elements * function.flops as f64,
                error,
                extra_bytes: large.workspace.as_ref().map_or(0, |workspace| workspace.num_bytes()),
                method: if flushed { "events, L2 flushed" } else { "graph replay, one set of buffers" },
            };
            bench.report(&case, &samples);
        }
    }
    channel_mixing(&bench, &mut criterion);
    criterion.final_summary();
}

/// Channels of a token and of the hidden layer in the benchmark of channel mixing.
const D: usize = 2048;
const F: usize = 8192;

/// Tensors of channel mixing for some sequences.
struct Mixing {
    shape: ChannelMixingShape,
    x: CudaSlice<bf16>,
    d_out: CudaSlice<bf16>,
    x_k: CudaSlice<bf16>,
    key_weight: CudaSlice<bf16>,
    value_weight: CudaSlice<bf16>,
    out: CudaSlice<bf16>,
    dx_k: CudaSlice<f32>,
    d_key_weight: CudaSlice<f32>,
    d_value_weight: CudaSlice<f32>,
}

impl Mixing {
    fn new(bench: &Bench, seqs: SeqLens) -> Self {
        let shape = ChannelMixingShape { seqs, d: D, f: F };
        let stream = bench.stream();
        let mut rng = Rng::new(6);
        let mut upload = |len: usize, deviation: f64| {
            let period = rng.normal::<f32>(len.min(PERIOD), deviation).into_iter().map(bf16::from_f32);
            let period: Vec<bf16> = period.collect();
            let values: Vec<bf16> = period.iter().copied().cycle().take(len).collect();
            stream.clone_htod(&values).expect("fits")
        };
        Self {
            x: upload(shape.len(), 1.0),
            d_out: upload(shape.len(), 1.0),
            x_k: upload(D, 1.0),
            key_weight: upload(shape.weight_len(), (D as f64).sqrt().recip()),
            value_weight: upload(shape.weight_len(), (F as f64).sqrt().recip()),
            out: stream.alloc_zeros(shape.len()).expect("fits"),
            dx_k: stream.alloc_zeros(D).expect("fits"),
            d_key_weight: stream.alloc_zeros(shape.weight_len()).expect("fits"),
            d_value_weight: stream.alloc_zeros(shape.weight_len()).expect("fits"),
            shape,
        }
    }

    fn fwd(
        &mut self,
        bench: &Bench,
        plan: &FusedChannelMixing<bf16>,
        workspace: &mut CudaSlice<u8>,
    ) -> Result<(), Error> {
        let x = FusedChannelMixingInputs {
            x: &self.x,
            x_prev: None,
            x_k: &self.x_k,
            key_weight: &self.key_weight,
            value_weight: &self.value_weight,
        };
        let mut y = FusedChannelMixingOutputs { out: &mut self.out, x_last: None, mixed: None, hidden: None };
        plan.run(bench.stream(), &x, &mut y, workspace)
    }

    fn bwd(
        &mut self,
        bench: &Bench,
        plan: &FusedChannelMixingBwd<bf16>,
        workspace: &mut CudaSlice<u8>,
    ) -> Result<(), Error> {
        let x = FusedChannelMixingBwdInputs {
            x: &self.x,
            x_prev: None,
            x_k: &self.x_k,
            key_weight: &self.key_weight,
            value_weight: &self.value_weight,
            mixed: None,
            hidden: None,
            d_out: &self.d_out,
            d_x_last: None,
        };
        let mut y = FusedChannelMixingBwdOutputs {
            dx: &mut self.out,
            dx_prev: None,
            dx_k: &mut self.dx_k,
            d_key_weight: &mut self.d_key_weight,
            d_value_weight: &mut self.d_value_weight,
        };
        plan.run(bench.stream(), &x, &mut y, workspace)
    }

    /// The worst error of the output, or of the gradient of x, which is in its place.
    fn error(&self, bench: &Bench, direction: Class) -> f64 {
        let read = |tensor: &CudaSlice<bf16>| {
            let values = bench.stream().clone_dtoh(tensor).expect("copies");
            values.iter().map(|x| f64::from(x.to_f32())).collect::<Vec<f64>>()
        };
        let [x, d_out, x_k, key_weight, value_weight] =
            &[&self.x, &self.d_out, &self.x_k, &self.key_weight, &self.value_weight].map(read);
        let shape = reference::ChannelMixingShape {
            seqs: fla_reference::SeqLens::Dense { b: self.shape.seqs.b(), t: self.shape.seqs.t() },
            c: D,
            f: F,
        };
        let x = reference::ChannelMixingInputs { x, x_prev: None, x_k, key_weight, value_weight };
        let want = match direction {
            Class::Grad => {
                let dy = reference::ChannelMixingOutputGrads { d_out, d_x_last: None };
                reference::channel_mixing_bwd(&shape, &x, &dy).dx
            }
            _ => reference::channel_mixing_fwd(&shape, &x).out,
        };
        let error = relative_rms(&read(&self.out), &want);
        let (backend, model, pass) = (Backend::Gpu, Model::ChannelMixing, Pass::Fused);
        let limit = limit(Key { backend, model, pass, dtype: Dtype::Bf16, class: direction });
        let limit = limit.expect("the table has the row");
        assert!(error <= limit, "channel mixing is wrong, so it is not timed: {error:.2e} > {limit:.0e}");
        error
    }
}

fn channel_mixing(bench: &Bench, criterion: &mut Criterion) {
    let (b, t) = (8, 4096);
    // The reference multiplies on one core: a few tokens have to do.
    let mut small = Mixing::new(bench, SeqLens::dense(1, 12));
    let mut large = Mixing::new(bench, SeqLens::dense(b, t));
    let (activation, weight) = ((b * t * D) as f64, (D * F) as f64);
    let product = 2.0 * activation * F as f64;

    let plan = FusedChannelMixing::<bf16>::new(bench.device(), &small.shape).expect("compiles");
    let mut workspace = bench.stream().alloc_zeros(plan.workspace_bytes()).expect("fits");
    small.fwd(bench, &plan, &mut workspace).expect("runs");
    let error = small.error(bench, Class::Output);
    let plan = FusedChannelMixing::<bf16>::new(bench.device(), &large.shape).expect("compiles");
    let mut workspace = bench.stream().alloc_zeros(plan.workspace_bytes()).expect("fits");
    let id = format!("rwkv7/fused_channel_mixing/B{b} T{t} D{D} F{F}");
    let samples = Samples::default();
    criterion.bench_function(&id, |bencher| {
        bencher.iter_custom(|n| bench.time_flushed(n, &samples, |_| large.fwd(bench, &plan, &mut workspace)));
    });
    let case = Case {
        id,
        dtype: "bf16",
        bytes: 2.0 * (2.0 * activation + 2.0 * weight),
        flops: 2.0 * product,
        error,
        extra_bytes: workspace.num_bytes(),
        method: "events, L2 flushed",
    };
    bench.report(&case, &samples);

    let plan = FusedChannelMixingBwd::<bf16>::new(bench.device(), &small.shape).expect("compiles");
    let mut workspace = bench.stream().alloc_zeros(plan.workspace_bytes()).expect("fits");
    small.bwd(bench, &plan, &mut workspace).expect("runs");
    let error = small.error(bench, Class::Grad);
    let plan = FusedChannelMixingBwd::<bf16>::new(bench.device(), &large.shape).expect("compiles");
    let mut workspace = bench.stream().alloc_zeros(plan.workspace_bytes()).expect("fits");
    let id = format!("rwkv7/fused_channel_mixing_bwd/B{b} T{t} D{D} F{F}");
    let samples = Samples::default();
    criterion.bench_function(&id, |bencher| {
        bencher.iter_custom(|n| bench.time_flushed(n, &samples, |_| large.bwd(bench, &plan, &mut workspace)));
    });
    let case = Case {
        id,
        dtype: "bf16",
        bytes: 2.0 * (3.0 * activation + 2.0 * weight) + 4.0 * 2.0 * weight,
        // z once more, and two products for each of the two.
        flops: 5.0 * product,
        error,
        extra_bytes: workspace.num_bytes(),
        method: "events, L2 flushed, z formed again",
    };
    bench.report(&case, &samples);
}

/// The worst error of a function on a small batch of the same width.
fn verified(bench: &Bench, function: &Function, tensors: &mut Tensors) -> f64 {
    let run = (function.prepare)(bench, tensors);
    run(bench, tensors).expect("runs");
    let stream = bench.stream();
    let rows = tensors.outputs[..function.outputs].iter().map(|out| {
        let out = stream.clone_dtoh(out).expect("copies");
        (Dtype::Bf16, out.iter().map(|x| f64::from(x.to_f32())).collect::<Vec<_>>())
    });
    let sums = tensors.sums[..function.sums].iter().map(|out| {
        let out = stream.clone_dtoh(out).expect("copies");
        (Dtype::F32, out.iter().map(|x| f64::from(*x)).collect())
    });
    let want = (function.verify)(tensors);
    assert_eq!(want.len(), function.outputs + function.sums, "{}", function.name);
    let mut worst = 0.0_f64;
    for ((dtype, got), want) in rows.chain(sums).zip(&want) {
        let class = if function.name.ends_with("bwd") { Class::Grad } else { Class::Output };
        let key = Key { backend: Backend::Gpu, model: function.model, pass: Pass::Fused, dtype, class };
        let error = relative_rms(&got, want);
        let limit = limit(key).expect("the table has the row");
        assert!(error <= limit, "{} is wrong, so it is not timed: {error:.2e} > {limit:.0e}", function.name);
        worst = worst.max(error);
    }
    worst
}

impl Tensors {
    fn new(bench: &Bench, seqs: SeqLens, d: usize) -> Self {
        let stream = bench.stream();
        let len = seqs.b() * seqs.t() * d;
        let mut rng = Rng::new(5);
        let mut numbers = |len: usize| -> Vec<bf16> {
            rng.normal::<f32>(len, 1.0).into_iter().map(bf16::from_f32).collect()
        };
        let wide = |x: &[bf16]| x.iter().map(|x| f64::from(x.to_f32())).collect::<Vec<f64>>();
        let (mut inputs, mut parameters, mut host) = (Vec::new(), Vec::new(), (Vec::new(), Vec::new()));
        for _ in 0..8 {
            let values = numbers(len.min(2 * PERIOD));
            let mut tensor = stream.alloc_zeros::<bf16>(len).expect("fits");
            for start in (0..len).step_by(values.len()) {
                let end = (start + values.len()).min(len);
                let mut part = tensor.slice_mut(start..end);
                stream.memcpy_htod(&values[..end - start], &mut part).expect("copies");
            }
            inputs.push(tensor);
            host.0.push(wide(&values));
        }
        for _ in 0..6 {
            let values = numbers(d);
            parameters.push(stream.clone_htod(&values).expect("fits"));
            host.1.push(wide(&values));
        }
        let outputs = (0..6).map(|_| stream.alloc_zeros(len).expect("fits")).collect();
        let sums = (0..6).map(|_| stream.alloc_zeros(d).expect("fits")).collect();
        Self { seqs, d, inputs, outputs, parameters, sums, workspace: None, host }
    }

    fn channels(&self) -> ChannelShape {
        ChannelShape { seqs: self.seqs.clone(), d: self.d }
    }

    fn heads(&self) -> HeadShape {
        HeadShape { seqs: self.seqs.clone(), h: self.d / K, k: K }
    }

    fn tokens(&self) -> usize {
        self.seqs.b() * self.seqs.t()
    }

    fn need(&mut self, bench: &Bench, bytes: usize) {
        self.workspace = Some(bench.stream().alloc_zeros(bytes).expect("fits"));
    }
}

const NO_WORKSPACE: &str = "`prepare` has allocated the workspace";

const FUNCTIONS: &[Function] = &[
    Function {
        name: "fused_addcmul",
        traffic: 8,
        flops: 12,
        outputs: 6,
        sums: 0,
        model: Model::Rwkv7,
        prepare: |bench, tensors| {
            let plan =
                FusedAddcmul::<bf16>::new(bench.device(), &tensors.channels(), Mixes::Six).expect("compiles");
            Box::new(move |bench, tensors| {
                let Tensors { inputs, parameters, outputs, .. } = tensors;
                let [xr, xw, xk, xv, xa, xg] = &parameters[..] else { unreachable!("six of them") };
                let [out_r, out_w, out_k, out_v, out_a, out_g] = &mut outputs[..] else {
                    unreachable!("six of them")
                };
                let x = FusedAddcmulInputs {
                    hidden: &inputs[0],
                    delta: &inputs[1],
                    xr,
                    xw,
                    xk,
                    xv,
                    xa,
                    xg: Some(xg),
                };
                let mut y = FusedAddcmulOutputs { out_r, out_w, out_k, out_v, out_a, out_g: Some(out_g) };
                plan.run(bench.stream(), &x, &mut y)
            })
        },
        verify: |tensors| {
            let shape = reference::AddcmulShape { tokens: tensors.tokens(), d: tensors.d };
            let y = reference::addcmul_fwd(&shape, &mixes(tensors, &tensors.host.0[1]));
            mixed(y)
        },
    },
    Function {
        name: "fused_addcmul_bwd",
        traffic: 9,
        flops: 30,
        outputs: 2,
        sums: 6,
        model: Model::Rwkv7,
        prepare: |bench, tensors| {
            let plan = FusedAddcmulBwd::<bf16>::new(bench.device(), &tensors.channels(), Mixes::Six)
                .expect("compiles");
            tensors.need(bench, plan.workspace_bytes());
            Box::new(move |bench, tensors| {
                let Tensors { inputs, parameters, outputs, sums, workspace, .. } = tensors;
                let [xr, xw, xk, xv, xa, xg] = &parameters[..] else { unreachable!("six of them") };
                let [dxr, dxw, dxk, dxv, dxa, dxg] = &mut sums[..] else { unreachable!("six of them") };
                let [d_hidden, d_delta, ..] = &mut outputs[..] else { unreachable!("six of them") };
                let x = FusedAddcmulBwdInputs {
                    delta: &inputs[1],
                    xr,
                    xw,
                    xk,
                    xv,
                    xa,
                    xg: Some(xg),
                    d_out_r: &inputs[2],
                    d_out_w: &inputs[3],
                    d_out_k: &inputs[4],
                    d_out_v: &inputs[5],
                    d_out_a: &inputs[6],
                    d_out_g: Some(&inputs[7]),
                };
                let dxg: Option<&mut dyn DevicePtrMut<f32>> = Some(dxg);
                let mut y = FusedAddcmulBwdOutputs { d_hidden, d_delta, dxr, dxw, dxk, dxv, dxa, dxg };
                plan.run(bench.stream(), &x, &mut y, workspace.as_mut().expect(NO_WORKSPACE))
            })
        },
        verify: |tensors| {
            let shape = reference::AddcmulShape { tokens: tensors.tokens(), d: tensors.d };
            let x = mixes(tensors, &tensors.host.0[1]);
            let dx = reference::addcmul_bwd(&shape, &x, &d_mixes(tensors));
            let mut out = vec![dx.d_hidden.clone(), dx.d_delta.clone()];
            out.extend(d_factors(dx));
            out
        },
    },
    Function {
        name: "fused_token_shift",
        traffic: 2,
        flops: 1,
        outputs: 1,
        sums: 0,
        model: Model::TokenShift,
        prepare: |bench, tensors| {
            let plan = FusedTokenShift::<bf16>::new(bench.device(), &tensors.channels()).expect("compiles");
            Box::new(move |bench, tensors| {
                let x = FusedTokenShiftInputs { x: &tensors.inputs[0], cache: None };
                let mut y = FusedTokenShiftOutputs { y: &mut tensors.outputs[0], cache_out: None };
                plan.run(bench.stream(), &x, &mut y)
            })
        },
        verify: |tensors| {
            let x = token_shift::Inputs { x: &tensors.host.0[0], cache: None };
            vec![token_shift::fwd(&shift_shape(tensors), &x).y]
        },
    },
    Function {
        name: "fused_token_shift_bwd",
        traffic: 2,
        flops: 1,
        outputs: 1,
        sums: 0,
        model: Model::TokenShift,
        prepare: |bench, tensors| {
            let plan =
                FusedTokenShiftBwd::<bf16>::new(bench.device(), &tensors.channels()).expect("compiles");
            Box::new(move |bench, tensors| {
                let x = FusedTokenShiftBwdInputs { dy: &tensors.inputs[0], d_cache_out: None };
                let mut y = FusedTokenShiftBwdOutputs { dx: &mut tensors.outputs[0], d_cache: None };
                plan.run(bench.stream(), &x, &mut y)
            })
        },
        verify: |tensors| {
            let dy = &tensors.host.0[0];
            let x = token_shift::Inputs { x: dy, cache: None };
            let dy = token_shift::OutputGrads { dy, d_cache_out: None };
            vec![token_shift::bwd(&shift_shape(tensors), &x, &dy).dx]
        },
    },
    Function {
        name: "fused_token_shift_addcmul",
        traffic: 7,
        flops: 13,
        outputs: 6,
        sums: 0,
        model: Model::Rwkv7,
        prepare: |bench, tensors| {
            let plan = FusedTokenShiftAddcmul::<bf16>::new(bench.device(), &tensors.channels(), Mixes::Six)
                .expect("compiles");
            Box::new(move |bench, tensors| {
                let Tensors { inputs, parameters, outputs, .. } = tensors;
                let [xr, xw, xk, xv, xa, xg] = &parameters[..] else { unreachable!("six of them") };
                let [out_r, out_w, out_k, out_v, out_a, out_g] = &mut outputs[..] else {
                    unreachable!("six of them")
                };
                let x = FusedTokenShiftAddcmulInputs {
                    x: &inputs[0],
                    cache: None,
                    xr,
                    xw,
                    xk,
                    xv,
                    xa,
                    xg: Some(xg),
                };
                let mut y = FusedTokenShiftAddcmulOutputs {
                    out_r,
                    out_w,
                    out_k,
                    out_v,
                    out_a,
                    out_g: Some(out_g),
                    cache_out: None,
                };
                plan.run(bench.stream(), &x, &mut y)
            })
        },
        verify: |tensors| {
            let y = reference::token_shift_addcmul_fwd(&shift_shape(tensors), &shift_mixes(tensors));
            mixed(y.mixes)
        },
    },
    Function {
        name: "fused_token_shift_addcmul_bwd",
        traffic: 8,
        flops: 33,
        outputs: 1,
        sums: 6,
        model: Model::Rwkv7,
        prepare: |bench, tensors| {
            let plan =
                FusedTokenShiftAddcmulBwd::<bf16>::new(bench.device(), &tensors.channels(), Mixes::Six)
                    .expect("compiles");
            tensors.need(bench, plan.workspace_bytes());
            Box::new(move |bench, tensors| {
                let Tensors { inputs, parameters, outputs, sums, workspace, .. } = tensors;
                let [xr, xw, xk, xv, xa, xg] = &parameters[..] else { unreachable!("six of them") };
                let [dxr, dxw, dxk, dxv, dxa, dxg] = &mut sums[..] else { unreachable!("six of them") };
                let x = FusedTokenShiftAddcmulBwdInputs {
                    x: &inputs[0],
                    cache: None,
                    xr,
                    xw,
                    xk,
                    xv,
                    xa,
                    xg: Some(xg),
                    d_out_r: &inputs[2],
                    d_out_w: &inputs[3],
                    d_out_k: &inputs[4],
                    d_out_v: &inputs[5],
                    d_out_a: &inputs[6],
                    d_out_g: Some(&inputs[7]),
                    d_cache_out: None,
                };
                let mut y = FusedTokenShiftAddcmulBwdOutputs {
                    dx: &mut outputs[0],
                    d_cache: None,
                    dxr,
                    dxw,
                    dxk,
                    dxv,
                    dxa,
                    dxg: Some(dxg),
                };
                plan.run(bench.stream(), &x, &mut y, workspace.as_mut().expect(NO_WORKSPACE))
            })
        },
        verify: |tensors| {
            let (shape, x) = (shift_shape(tensors), shift_mixes(tensors));
            let dx = reference::token_shift_addcmul_bwd(&shape, &x, &d_mixes(tensors), None);
            let mut out = vec![dx.dx];
            out.extend(d_factors(dx.mixes));
            out
        },
    },
    Function {
        name: "fused_k_update",
        traffic: 3,
        flops: 4,
        outputs: 1,
        sums: 0,
        model: Model::Rwkv7,
        prepare: |bench, tensors| {
            let plan = FusedKUpdate::<bf16>::new(bench.device(), &tensors.channels()).expect("compiles");
            Box::new(move |bench, tensors| {
                let x = FusedKUpdateInputs {
                    k: &tensors.inputs[0],
                    a: &tensors.inputs[1],
                    ka: &tensors.parameters[0],
                };
                let mut y = FusedKUpdateOutputs { out: &mut tensors.outputs[0] };
                plan.run(bench.stream(), &x, &mut y)
            })
        },
        verify: |tensors| {
            let shape = reference::KUpdateShape { tokens: tensors.tokens(), d: tensors.d };
            let (x, p) = &tensors.host;
            let x = reference::KUpdateInputs { k: &x[0], a: &x[1], ka: &p[0] };
            vec![reference::k_update_fwd(&shape, &x)]
        },
    },
    Function {
        name: "fused_k_update_bwd",
        traffic: 5,
        flops: 9,
        outputs: 2,
        sums: 1,
        model: Model::Rwkv7,
        prepare: |bench, tensors| {
            let plan = FusedKUpdateBwd::<bf16>::new(bench.device(), &tensors.channels()).expect("compiles");
            tensors.need(bench, plan.workspace_bytes());
            Box::new(move |bench, tensors| {
                let Tensors { inputs, parameters, outputs, sums, workspace, .. } = tensors;
                let x = FusedKUpdateBwdInputs {
                    k: &inputs[0],
                    a: &inputs[1],
                    ka: &parameters[0],
                    d_out: &inputs[2],
                };
                let [dk, da, ..] = &mut outputs[..] else { unreachable!("six of them") };
                let mut y = FusedKUpdateBwdOutputs { dk, da, dka: &mut sums[0] };
                plan.run(bench.stream(), &x, &mut y, workspace.as_mut().expect(NO_WORKSPACE))
            })
        },
        verify: |tensors| {
            let shape = reference::KUpdateShape { tokens: tensors.tokens(), d: tensors.d };
            let (x, p) = &tensors.host;
            let inputs = reference::KUpdateInputs { k: &x[0], a: &x[1], ka: &p[0] };
            let dx = reference::k_update_bwd(&shape, &inputs, &x[2]);
            vec![dx.dk, dx.da, dx.dka]
        },
    },
    Function {
        name: "fused_kk_norm",
        traffic: 2,
        flops: 4,
        outputs: 1,
        sums: 0,
        model: Model::Rwkv7,
        prepare: |bench, tensors| {
            let plan = FusedKkNorm::<bf16>::new(bench.device(), &tensors.heads()).expect("compiles");
            Box::new(move |bench, tensors| {
                let x = FusedKkNormInputs { k: &tensors.inputs[0], k_k: &tensors.parameters[0] };
                plan.run(bench.stream(), &x, &mut FusedKkNormOutputs { kk: &mut tensors.outputs[0] })
            })
        },
        verify: |tensors| {
            let (x, p) = &tensors.host;
            let x = reference::KkNormInputs { k: &x[0], k_k: &p[0] };
            vec![reference::kk_norm_fwd(&norm_shape(tensors), &x)]
        },
    },
    Function {
        name: "fused_kk_norm_bwd",
        traffic: 3,
        flops: 11,
        outputs: 1,
        sums: 1,
        model: Model::Rwkv7,
        prepare: |bench, tensors| {
            let plan = FusedKkNormBwd::<bf16>::new(bench.device(), &tensors.heads()).expect("compiles");
            tensors.need(bench, plan.workspace_bytes());
            Box::new(move |bench, tensors| {
                let Tensors { inputs, parameters, outputs, sums, workspace, .. } = tensors;
                let x = FusedKkNormBwdInputs { k: &inputs[0], k_k: &parameters[0], d_kk: &inputs[1] };
                let mut y = FusedKkNormBwdOutputs { dk: &mut outputs[0], dk_k: &mut sums[0] };
                plan.run(bench.stream(), &x, &mut y, workspace.as_mut().expect(NO_WORKSPACE))
            })
        },
        verify: |tensors| {
            let (x, p) = &tensors.host;
            let inputs = reference::KkNormInputs { k: &x[0], k_k: &p[0] };
            let dx = reference::kk_norm_bwd(&norm_shape(tensors), &inputs, &x[1]);
            vec![dx.dk, dx.dk_k]
        },
    },
    Function {
        name: "fused_kk_norm_k_update",
        traffic: 5,
        flops: 10,
        outputs: 3,
        sums: 0,
        model: Model::Rwkv7,
        prepare: |bench, tensors| {
            let plan = FusedKkNormKUpdate::<bf16>::new(bench.device(), &tensors.heads()).expect("compiles");
            Box::new(move |bench, tensors| {
                let Tensors { inputs, parameters, outputs, .. } = tensors;
                let [k_updated, neg_kk, b, ..] = &mut outputs[..] else { unreachable!("six of them") };
                let (k_k, ka) = (&parameters[0], &parameters[1]);
                let x = FusedKkNormKUpdateInputs { k: &inputs[0], a: &inputs[1], k_k, ka };
                let mut y =
                    FusedKkNormKUpdateOutputs { k_updated, kk: None, neg_kk: Some(neg_kk), b: Some(b) };
                plan.run(bench.stream(), &x, &mut y)
            })
        },
        verify: |tensors| {
            let (x, p) = &tensors.host;
            let x = reference::KkNormKUpdateInputs { k: &x[0], a: &x[1], k_k: &p[0], ka: &p[1] };
            let y = reference::kk_norm_k_update_fwd(&norm_shape(tensors), &x);
            vec![y.k_updated, y.kk.iter().map(|x| -x).collect(), y.b]
        },
    },
    Function {
        name: "fused_kk_norm_k_update_bwd",
        traffic: 7,
        flops: 25,
        outputs: 2,
        sums: 2,
        model: Model::Rwkv7,
        prepare: |bench, tensors| {
            let plan =
                FusedKkNormKUpdateBwd::<bf16>::new(bench.device(), &tensors.heads()).expect("compiles");
            tensors.need(bench, plan.workspace_bytes());
            Box::new(move |bench, tensors| {
                let Tensors { inputs, parameters, outputs, sums, workspace, .. } = tensors;
                let [dk, da, ..] = &mut outputs[..] else { unreachable!("six of them") };
                let [dk_k, dka, ..] = &mut sums[..] else { unreachable!("six of them") };
                let x = FusedKkNormKUpdateBwdInputs {
                    k: &inputs[0],
                    a: &inputs[1],
                    k_k: &parameters[0],
                    ka: &parameters[1],
                    d_k_updated: &inputs[2],
                    d_kk: None,
                    d_neg_kk: Some(&inputs[3]),
                    d_b: Some(&inputs[4]),
                };
                let mut y = FusedKkNormKUpdateBwdOutputs { dk, da, dk_k, dka };
                plan.run(bench.stream(), &x, &mut y, workspace.as_mut().expect(NO_WORKSPACE))
            })
        },
        verify: |tensors| {
            let (x, p) = &tensors.host;
            let inputs = reference::KkNormKUpdateInputs { k: &x[0], a: &x[1], k_k: &p[0], ka: &p[1] };
            let d_kk: Vec<f64> = x[3].iter().map(|x| -x).collect();
            let dy = reference::KkNormKUpdateOutputGrads { d_k_updated: &x[2], d_kk: &d_kk, d_b: &x[4] };
            let dx = reference::kk_norm_k_update_bwd(&norm_shape(tensors), &inputs, &dy);
            vec![dx.dk, dx.da, dx.dk_k, dx.dka]
        },
    },
    Function {
        name: "fused_gate_output_correction",
        traffic: 6,
        flops: 6,
        outputs: 1,
        sums: 0,
        model: Model::Rwkv7,
        prepare: |bench, tensors| {
            let plan =
                FusedGateOutputCorrection::<bf16>::new(bench.device(), &tensors.heads()).expect("compiles");
            Box::new(move |bench, tensors| {
                let [o, r, k, v, g, ..] = &tensors.inputs[..] else { unreachable!("eight of them") };
                let x = FusedGateOutputCorrectionInputs { o, r, k, r_k: &tensors.parameters[0], v, g };
                let mut y = FusedGateOutputCorrectionOutputs { out: &mut tensors.outputs[0] };
                plan.run(bench.stream(), &x, &mut y)
            })
        },
        verify: |tensors| {
            let shape = gated_shape(tensors);
            vec![reference::gate_output_correction_fwd(&shape, &gated(tensors))]
        },
    },
    Function {
        name: "fused_gate_output_correction_bwd",
        traffic: 11,
        flops: 16,
        outputs: 5,
        sums: 1,
        model: Model::Rwkv7,
        prepare: |bench, tensors| {
            let plan = FusedGateOutputCorrectionBwd::<bf16>::new(bench.device(), &tensors.heads())
                .expect("compiles");
            tensors.need(bench, plan.workspace_bytes());
            Box::new(move |bench, tensors| {
                let Tensors { inputs, parameters, outputs, sums, workspace, .. } = tensors;
                let [o, r, k, v, g, d_out, ..] = &inputs[..] else { unreachable!("eight of them") };
                let [d_o, dr, dk, dv, dg, ..] = &mut outputs[..] else { unreachable!("six of them") };
                let r_k = &parameters[0];
                let x = FusedGateOutputCorrectionBwdInputs { o, r, k, r_k, v, g, d_out };
                let mut y = FusedGateOutputCorrectionBwdOutputs { d_o, dr, dk, dv, dg, dr_k: &mut sums[0] };
                plan.run(bench.stream(), &x, &mut y, workspace.as_mut().expect(NO_WORKSPACE))
            })
        },
        verify: |tensors| {
            let dx = reference::gate_output_correction_bwd(
                &gated_shape(tensors),
                &gated(tensors),
                &tensors.host.0[5],
            );
            vec![dx.d_o, dx.dr, dx.dk, dx.dv, dx.dg, dx.dr_k]
        },
    },
];

fn mixes<'a>(tensors: &'a Tensors, delta: &'a [f64]) -> reference::AddcmulInputs<'a, f64> {
    let p = &tensors.host.1;
    reference::AddcmulInputs {
        hidden: &tensors.host.0[0],
        delta,
        xr: &p[0],
        xw: &p[1],
        xk: &p[2],
        xv: &p[3],
        xa: &p[4],
        xg: Some(&p[5]),
    }
}

fn shift_mixes(tensors: &Tensors) -> reference::TokenShiftAddcmulInputs<'_, f64> {
    let p = &tensors.host.1;
    reference::TokenShiftAddcmulInputs {
        x: &tensors.host.0[0],
        cache: None,
        xr: &p[0],
        xw: &p[1],
        xk: &p[2],
        xv: &p[3],
        xa: &p[4],
        xg: Some(&p[5]),
    }
}

fn mixed(y: reference::AddcmulOutputs<f64>) -> Vec<Vec<f64>> {
    [y.out_r, y.out_w, y.out_k, y.out_v, y.out_a].into_iter().chain(y.out_g).collect()
}

fn d_mixes(tensors: &Tensors) -> reference::AddcmulOutputGrads<'_, f64> {
    let x = &tensors.host.0;
    reference::AddcmulOutputGrads {
        d_out_r: &x[2],
        d_out_w: &x[3],
        d_out_k: &x[4],
        d_out_v: &x[5],
        d_out_a: &x[6],
        d_out_g: Some(&x[7]),
    }
}

fn d_factors(dx: reference::AddcmulGrads<f64>) -> Vec<Vec<f64>> {
    [dx.dxr, dx.dxw, dx.dxk, dx.dxv, dx.dxa].into_iter().chain(dx.dxg).collect()
}

fn shift_shape(tensors: &Tensors) -> token_shift::Shape {
    let seqs = fla_reference::SeqLens::Dense { b: tensors.seqs.b(), t: tensors.seqs.t() };
    token_shift::Shape { seqs, d: tensors.d }
}

fn norm_shape(tensors: &Tensors) -> reference::KkNormShape {
    reference::KkNormShape { tokens: tensors.tokens(), h: tensors.d / K, k: K }
}

fn gated_shape(tensors: &Tensors) -> reference::GateOutputCorrectionShape {
    reference::GateOutputCorrectionShape { tokens: tensors.tokens(), h: tensors.d / K, k: K }
}

fn gated(tensors: &Tensors) -> reference::GateOutputCorrectionInputs<'_, f64> {
    let (x, p) = &tensors.host;
    reference::GateOutputCorrectionInputs { o: &x[0], r: &x[1], k: &x[2], r_k: &p[0], v: &x[3], g: &x[4] }
}
