//! `recurrent_bwd` on the GPU against the float64 gradients.

use std::sync::Arc;

use fla_core::cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut};
use fla_core::testing::{Bench, Guarded, Poison, gpu, run_cases, same_bits};
use fla_core::{DType, Device, Error, SeqLens, Shape};
use fla_reference::compare::{F16_SPACING, relative_rms_beyond};
use fla_reference::inputs::{Gates, REGIMES, Rng, Storage, round_to};
use fla_reference::tolerance::{Backend, Class, Dtype, Key, Model, Pass, limit};
use fla_rwkv6::{
    Direction, RecurrentBwd, RecurrentBwdInputs, RecurrentBwdOutputs, RecurrentFwdOptions, recurrent_bwd,
};
use half::{bf16, f16};
use proptest::prelude::{ProptestConfig, Strategy, prop_oneof, proptest};
use proptest::strategy::Just;

/// What is asked of the operator, apart from the numbers.
#[derive(Clone, Debug)]
struct Case {
    name: &'static str,
    /// Lengths of packed sequences; dense when empty.
    packed: &'static [usize],
    b: usize,
    t: usize,
    h: usize,
    k: usize,
    v: usize,
    scale: f64,
    direction: Direction,
    gates: Gates,
    /// There is an initial state, and its gradient is wanted.
    initial_state: bool,
    /// A gradient of the final state comes in.
    d_final_state: bool,
}

const BASE: Case = Case {
    name: "",
    packed: &[],
    b: 2,
    t: 17,
    h: 3,
    k: 64,
    v: 64,
    scale: 0.125,
    direction: Direction::Forward,
    gates: Gates::LogSigmoid,
    initial_state: true,
    d_final_state: true,
};

const REVERSE: Case = Case { direction: Direction::Reverse, ..BASE };

const CASES: &[Case] = &[
    Case { name: "one token", t: 1, ..BASE },
    Case { name: "one token, no states", t: 1, initial_state: false, d_final_state: false, ..BASE },
    Case { name: "two tokens", t: 2, ..BASE },
    Case { name: "two tokens, reversed", t: 2, ..REVERSE },
    Case { name: "no token", t: 0, ..BASE },
    Case { name: "15 tokens", t: 15, ..BASE },
    Case { name: "16 tokens, no initial state", t: 16, initial_state: false, ..BASE },
    Case { name: "17 tokens, no gradient of the final state", d_final_state: false, ..BASE },
    Case { name: "17 tokens, reversed", ..REVERSE },
    Case {
        name: "63 tokens, no states, reversed",
        t: 63,
        initial_state: false,
        d_final_state: false,
        ..REVERSE
    },
    Case { name: "64 tokens, scale 1", t: 64, scale: 1.0, ..BASE },
    Case { name: "65 tokens", t: 65, ..BASE },
    Case { name: "1000 tokens, one head", b: 1, t: 1000, h: 1, gates: Gates::Rwkv7, ..BASE },
    Case { name: "many sequences", b: 131, t: 3, h: 5, ..BASE },
    Case { name: "packed", packed: &[3, 17, 1, 30], ..BASE },
    Case { name: "packed, reversed", packed: &[3, 17, 1, 30], ..REVERSE },
    Case { name: "packed with empty members", packed: &[0, 5, 0, 0, 1, 20, 0], ..BASE },
    Case { name: "packed with empty members, reversed", packed: &[0, 5, 0, 0, 1, 20, 0], ..REVERSE },
    Case { name: "packed, one sequence without tokens", packed: &[0], ..BASE },
    Case { name: "no sequence", b: 0, ..BASE },
    Case { name: "K = V = 128: two parts", k: 128, v: 128, ..BASE },
    Case { name: "K = V = 256", h: 1, k: 256, v: 256, ..BASE },
    Case { name: "K = 256, V = 512, reversed", b: 1, t: 5, h: 1, k: 256, v: 512, ..REVERSE },
    Case { name: "K = V = 1", k: 1, v: 1, ..BASE },
    Case { name: "K = 60, V = 100", k: 60, v: 100, ..BASE },
    Case { name: "K = 100, V = 60, packed", k: 100, v: 60, packed: &[2, 0, 9], ..BASE },
    Case { name: "K = 33, V = 65: rows that no vector access fits", k: 33, v: 65, ..BASE },
    Case { name: "K = 132, V = 17", k: 132, v: 17, ..BASE },
];

impl Case {
    fn shape(&self) -> Shape {
        let seqs = if self.packed.is_empty() {
            SeqLens::dense(self.b, self.t)
        } else {
            SeqLens::packed(&self.cu_seqlens(), self.packed.iter().sum()).expect("valid lengths")
        };
        Shape { seqs, h: self.h, k: self.k, v: self.v }
    }

    fn cu_seqlens(&self) -> Vec<usize> {
        self.packed.iter().fold(vec![0], |mut offsets, len| {
            offsets.push(offsets[offsets.len() - 1] + len);
            offsets
        })
    }

    fn reference_shape(&self) -> fla_reference::Shape {
        let seqs = if self.packed.is_empty() {
            fla_reference::SeqLens::Dense { b: self.b, t: self.t }
        } else {
            fla_reference::SeqLens::Packed { cu_seqlens: self.cu_seqlens() }
        };
        fla_reference::Shape { seqs, h: self.h, k: self.k, v: self.v }
    }

    fn options(&self) -> RecurrentFwdOptions {
        RecurrentFwdOptions::new(self.scale as f32).with_direction(self.direction)
    }
}

/// Inputs as f64, already rounded to the type that the kernel reads.
struct Problem {
    /// `r`, `k`, `v`, `w`, `u`, `d_o`
    vectors: [Vec<f64>; 6],
    initial_state: Option<Vec<f64>>,
    d_final_state: Option<Vec<f64>>,
}

impl Problem {
    fn new<T: Storage>(case: &Case) -> Self {
        let shape = case.shape();
        let mut rng = Rng::new(7);
        let vectors = [
            rng.normal::<f64>(shape.k_len(), 1.0),
            rng.normal::<f64>(shape.k_len(), 1.0),
            rng.normal::<f64>(shape.v_len(), 1.0),
            rng.gates::<f64>(shape.k_len(), case.gates),
            rng.normal::<f64>(shape.h * shape.k, 1.0),
            rng.normal::<f64>(shape.v_len(), 1.0),
        ]
        .map(|x| round_to::<T, f64>(&x));
        let mut state = || round_to::<f32, f64>(&rng.normal::<f64>(shape.state_len(), 1.0));
        let initial_state = case.initial_state.then(&mut state);
        let d_final_state = case.d_final_state.then(&mut state);
        Self { vectors, initial_state, d_final_state }
    }

    fn reference(&self, case: &Case) -> fla_reference::rwkv6::Grads<f64> {
        let [r, k, v, w, u, d_o] = &self.vectors;
        let initial_state = self.initial_state.as_deref();
        let x = fla_reference::rwkv6::Inputs { r, k, v, w, u, initial_state };
        let dy = fla_reference::rwkv6::OutputGrads { d_o, d_final_state: self.d_final_state.as_deref() };
        let direction = match case.direction {
            Direction::Forward => fla_reference::rwkv6::Direction::Forward,
            Direction::Reverse => fla_reference::rwkv6::Direction::Reverse,
        };
        let options = fla_reference::rwkv6::Options::new(case.scale).with_direction(direction);
        fla_reference::rwkv6::recurrent_bwd(&case.reference_shape(), &x, &dy, &options)
    }
}

fn narrowed<T: Poison>(values: &[f64]) -> Vec<T> {
    values.iter().map(|x| T::from_f32(*x as f32)).collect()
}

fn widened<T: Poison>(values: &[T]) -> Vec<f64> {
    values.iter().map(|x| f64::from(x.to_f32())).collect()
}

/// Gradients: `dr`, `dk`, `dv` and `dw`; then those that are f32 always.
struct Got<T> {
    vectors: [Vec<T>; 4],
    du: Vec<f32>,
    d_initial_state: Option<Vec<f32>>,
}

const NAMES: [&str; 4] = ["dr", "dk", "dv", "dw"];

/// One run on poisoned buffers.
fn run<T: Poison>(
    device: &Device,
    stream: &Arc<CudaStream>,
    case: &Case,
    problem: &Problem,
) -> Result<Got<T>, Error> {
    let shape = case.shape();
    let vectors = problem.vectors.each_ref().map(|x| Guarded::input(stream, "an input", &narrowed::<T>(x)));
    let state =
        |x: &Option<Vec<f64>>| x.as_ref().map(|x| Guarded::input(stream, "a state", &narrowed::<f32>(x)));
    let (initial, d_final) = (state(&problem.initial_state), state(&problem.d_final_state));
    let lens = [shape.k_len(), shape.k_len(), shape.v_len(), shape.k_len()];
    let mut outputs = [0, 1, 2, 3].map(|i| Guarded::<T>::output(stream, NAMES[i], lens[i]));
    let mut du = Guarded::<f32>::output(stream, "du", shape.h * shape.k);
    let mut d_initial =
        case.initial_state.then(|| Guarded::<f32>::output(stream, "d_initial_state", shape.state_len()));

    let plan = RecurrentBwd::<T>::new(device, &shape, &case.options())?;
    // 0xff in every byte is NaN in f32: what the pass reads of its workspace it has written.
    let mut workspace = stream.clone_htod(&vec![0xff_u8; plan.workspace_bytes()]).expect("fits");
    {
        let views = vectors.each_ref().map(Guarded::view);
        let [r, k, v, w, u, d_o] = &views;
        let (initial, d_final) = (initial.as_ref().map(Guarded::view), d_final.as_ref().map(Guarded::view));
        let x = RecurrentBwdInputs {
            r,
            k,
            v,
            w,
            u,
            initial_state: initial.as_ref().map(|s| s as &dyn DevicePtr<f32>),
            d_o,
            d_final_state: d_final.as_ref().map(|s| s as &dyn DevicePtr<f32>),
        };
        let mut views = outputs.each_mut().map(Guarded::view_mut);
        let [dr, dk, dv, dw] = &mut views;
        let mut d_initial = d_initial.as_mut().map(Guarded::view_mut);
        let mut dx = RecurrentBwdOutputs {
            dr,
            dk,
            dv,
            dw,
            du: &mut du.view_mut(),
            d_initial_state: d_initial.as_mut().map(|s| s as &mut dyn DevicePtrMut<f32>),
        };
        plan.run(stream, &x, &mut dx, &mut workspace)?;
    }
    Ok(Got {
        vectors: outputs.each_mut().map(Guarded::read),
        du: du.read(),
        d_initial_state: d_initial.as_mut().map(Guarded::read),
    })
}

fn within(name: &str, dtype: DType, got: &[f64], want: &[f64]) -> Result<(), String> {
    let dtype = match dtype {
        DType::F32 => Dtype::F32,
        DType::Bf16 => Dtype::Bf16,
        DType::F16 => Dtype::F16,
    };
    let class = if name == "dw" { Class::GateGrad } else { Class::Grad };
    let key = Key { backend: Backend::Gpu, model: Model::Rwkv6, pass: Pass::RecurrentBwd, dtype, class };
    let limit = limit(key).map_err(|error| error.to_string())?;
    let slack = if dtype == Dtype::F16 { F16_SPACING } else { 0.0 };
    let error = relative_rms_beyond(got, want, slack);
    if error <= limit { Ok(()) } else { Err(format!("{name}: relative RMS {error:.2e} > {limit:.0e}")) }
}

fn check<T: Poison + Storage>(device: &Device, stream: &Arc<CudaStream>, case: &Case) -> Result<(), String> {
    let problem = Problem::new::<T>(case);
    let want = problem.reference(case);
    let once = || run::<T>(device, stream, case, &problem).map_err(|error| error.to_string());
    let (got, again) = (once()?, once()?);
    let wants = [&want.dr, &want.dk, &want.dv, &want.dw];
    for (i, name) in NAMES.iter().enumerate() {
        same_bits(name, &got.vectors[i], &again.vectors[i])?;
        within(name, T::DTYPE, &widened(&got.vectors[i]), wants[i])?;
    }
    same_bits("du", &got.du, &again.du)?;
    within("du", DType::F32, &widened(&got.du), &want.du)?;
    if let (Some(got), Some(again)) = (got.d_initial_state, again.d_initial_state) {
        same_bits("d_initial_state", &got, &again)?;
        within("d_initial_state", DType::F32, &widened(&got), &want.d_initial_state)?;
    }
    Ok(())
}

fn check_all_types(device: &Device, stream: &Arc<CudaStream>, case: &Case) -> Result<(), String> {
    check::<f32>(device, stream, case).map_err(|error| format!("f32: {error}"))?;
    check::<bf16>(device, stream, case).map_err(|error| format!("bf16: {error}"))?;
    check::<f16>(device, stream, case).map_err(|error| format!("f16: {error}"))
}

#[test]
fn recurrent_bwd_matches_reference() {
    let Some((device, stream)) = gpu("recurrent_bwd_matches_reference") else { return };
    run_cases(CASES, |case| case.name.into(), |case| check_all_types(&device, &stream, case));
}

#[test]
fn recurrent_bwd_survives_every_gate_regime() {
    let Some((device, stream)) = gpu("recurrent_bwd_survives_every_gate_regime") else { return };
    let all: Vec<Case> = REGIMES
        .iter()
        .flat_map(|gates| [BASE, REVERSE].map(|case| Case { t: 70, gates: *gates, ..case }))
        .collect();
    run_cases(
        &all,
        |case| format!("{:?}, {:?}", case.gates, case.direction),
        |case| check_all_types(&device, &stream, case),
    );
}

fn any_case() -> impl Strategy<Value = Case> {
    let width = prop_oneof![Just(64usize), Just(32), 1usize..=96];
    let direction = prop_oneof![Just(Direction::Forward), Just(Direction::Reverse)];
    let gates = prop_oneof![Just(Gates::LogSigmoid), Just(Gates::Rwkv7), Just(Gates::Constant(-5.0))];
    (1usize..4, 0usize..40, 1usize..4, width.clone(), width, gates, direction, proptest::bool::ANY).prop_map(
        |(b, t, h, k, v, gates, direction, initial_state)| Case {
            name: "proptest",
            b,
            t,
            h,
            k,
            v,
            direction,
            gates,
            initial_state,
            ..BASE
        },
    )
}

proptest! {
    // Every new K and V compiles a kernel, so a few cases a run; the seed changes from run to run.
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn recurrent_bwd_matches_reference_for_any_shape(case in any_case()) {
        if let Some((device, stream)) = gpu("recurrent_bwd_matches_reference_for_any_shape") {
            let result =
                check::<bf16>(&device, &stream, &case).and_then(|()| check::<f32>(&device, &stream, &case));
            assert_eq!(result, Ok(()), "{case:?}");
        }
    }
}

/// The inputs of a problem without guards, for what outlives a test's buffers.
fn plain<T: Poison>(stream: &Arc<CudaStream>, problem: &Problem) -> [CudaSlice<T>; 6] {
    problem.vectors.each_ref().map(|x| stream.clone_htod(&narrowed::<T>(x)).expect("copies"))
}

fn inputs<T>(vectors: &[CudaSlice<T>; 6]) -> RecurrentBwdInputs<'_, T> {
    let [r, k, v, w, u, d_o] = vectors;
    RecurrentBwdInputs { r, k, v, w, u, initial_state: None, d_o, d_final_state: None }
}

#[test]
fn the_one_call_form_and_a_graph_give_the_plans_bits() {
    let Some((device, stream)) = gpu("the_one_call_form_and_a_graph_give_the_plans_bits") else { return };
    let case = Case { initial_state: false, d_final_state: false, ..REVERSE };
    let problem = Problem::new::<bf16>(&case);
    let want = run::<bf16>(&device, &stream, &case, &problem).expect("runs");
    let vectors = plain::<bf16>(&stream, &problem);
    let mut dx = recurrent_bwd(&device, &case.shape(), &inputs(&vectors), &case.options()).expect("runs");
    let du = stream.clone_dtoh(&dx.du).expect("copies");
    assert_eq!(same_bits("du", &want.du, &du), Ok(()));
    let dw = stream.clone_dtoh(&dx.dw).expect("copies");
    assert_eq!(same_bits("dw", &want.vectors[3], &dw), Ok(()));

    // Event tracking belongs to a context, and other tests run on the shared one.
    let bench = Bench::open().expect("opens");
    let stream = bench.stream().clone();
    let vectors = plain::<bf16>(&stream, &problem);
    let plan = RecurrentBwd::<bf16>::new(bench.device(), &case.shape(), &case.options()).expect("valid");
    let mut workspace = stream.alloc_zeros::<u8>(plan.workspace_bytes()).expect("fits");
    dx.du = stream.alloc_zeros(want.du.len()).expect("fits");
    let over_k = || stream.alloc_zeros::<bf16>(want.vectors[0].len()).expect("fits");
    let (mut dr, mut dk, mut dw) = (over_k(), over_k(), over_k());
    let mut dv = stream.alloc_zeros::<bf16>(want.vectors[2].len()).expect("fits");
    let replay = bench
        .capture(1, |stream, _| {
            let mut y = RecurrentBwdOutputs {
                dr: &mut dr,
                dk: &mut dk,
                dv: &mut dv,
                dw: &mut dw,
                du: &mut dx.du,
                d_initial_state: None,
            };
            plan.run(stream, &inputs(&vectors), &mut y, &mut workspace)
        })
        .expect("captures");
    for _ in 0..2 {
        replay.time(1);
    }
    assert_eq!(same_bits("du", &want.du, &stream.clone_dtoh(&dx.du).expect("copies")), Ok(()));
    assert_eq!(same_bits("dr", &want.vectors[0], &stream.clone_dtoh(&dr).expect("copies")), Ok(()));
}

#[test]
fn wrong_arguments_are_named_before_anything_is_launched() {
    let Some((device, stream)) = gpu("wrong_arguments_are_named_before_anything_is_launched") else { return };
    let shape = Shape { seqs: SeqLens::dense(1, 2), h: 1, k: 64, v: 32 };
    let options = RecurrentFwdOptions::new(1.0);
    let plan = RecurrentBwd::<f32>::new(&device, &shape, &options).expect("valid");
    let good = |len| stream.alloc_zeros::<f32>(len).expect("fits");
    let (k, v, u, s) = (good(128), good(64), good(64), good(64 * 32));
    let bad = good(127);
    type Spoil<'a> = (&'static str, fn(&mut RecurrentBwdInputs<'a, f32>, &'a dyn DevicePtr<f32>));
    let spoils: [Spoil<'_>; 8] = [
        ("r", |x, bad| x.r = bad),
        ("k", |x, bad| x.k = bad),
        ("v", |x, bad| x.v = bad),
        ("w", |x, bad| x.w = bad),
        ("u", |x, bad| x.u = bad),
        ("d_o", |x, bad| x.d_o = bad),
        ("initial_state", |x, bad| x.initial_state = Some(bad)),
        ("d_final_state", |x, bad| x.d_final_state = Some(bad)),
    ];
    let x = RecurrentBwdInputs {
        r: &k,
        k: &k,
        v: &v,
        w: &k,
        u: &u,
        initial_state: Some(&s),
        d_o: &v,
        d_final_state: Some(&s),
    };
    let mut dr = Guarded::<f32>::output(&stream, "dr", 128);
    let mut refused = |x: &RecurrentBwdInputs<'_, f32>, du: &mut dyn DevicePtrMut<f32>, bytes: usize| {
        let (mut dk, mut dv, mut dw) = (good(128), good(64), good(128));
        let mut workspace = stream.alloc_zeros::<u8>(bytes).expect("fits");
        let mut dx = RecurrentBwdOutputs {
            dr: &mut dr.view_mut(),
            dk: &mut dk,
            dv: &mut dv,
            dw: &mut dw,
            du,
            d_initial_state: None,
        };
        plan.run(&stream, x, &mut dx, &mut workspace).expect_err("must be refused")
    };
    let bytes = plan.workspace_bytes();
    for (name, spoil) in spoils {
        let mut x = x;
        spoil(&mut x, &bad);
        let text = refused(&x, &mut good(64), bytes).to_string();
        assert!(text.starts_with(&format!("`{name}` is [")) && text.ends_with("but holds 127"), "{text}");
    }
    let error = refused(&x, &mut good(63), bytes);
    assert!(matches!(error, Error::Len { tensor: "du", wanted: 64, got: 63, .. }), "{error:?}");
    let error = refused(&x, &mut good(65).slice_mut(1..), bytes);
    assert!(matches!(error, Error::Align { tensor: "du", wanted: 16, .. }), "{error:?}");
    let error = refused(&x, &mut good(64), bytes - 1);
    assert!(matches!(error, Error::Len { tensor: "workspace", .. }), "{error:?}");
    // None of the refused calls has written anything.
    assert!(dr.read().iter().all(|x| x.is_nan()));

    let on_device = Shape { seqs: SeqLens::packed_on_device(2, 5), ..shape };
    let error = RecurrentBwd::<f32>::new(&device, &on_device, &options).expect_err("unknown lengths");
    assert!(matches!(error, Error::SeqLens { .. }), "{error:?}");
}
