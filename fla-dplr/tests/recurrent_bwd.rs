//! `recurrent_bwd` on the GPU against the float64 gradients.

use std::sync::Arc;

use fla_core::cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut};
use fla_core::testing::{Bench, Guarded, Poison, gpu, run_cases, same_bits};
use fla_core::{DType, Device, Error, SeqLens, Shape};
use fla_dplr::{
    RecurrentBwd, RecurrentBwdInputs, RecurrentBwdOutputs, RecurrentFwdOptions, Transition, recurrent_bwd,
};
use fla_reference::compare::{F16_SPACING, first_non_finite, relative_rms_beyond};
use fla_reference::inputs::{Gates, REGIMES, Rng, Storage, round_to};
use fla_reference::tolerance::{Backend, Class, Dtype, Key, Model, Pass, limit};
use half::{bf16, f16};
use proptest::prelude::{Just, ProptestConfig, Strategy, prop_oneof, proptest};

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
    gates: Gates,
    /// The same unit key at every token, removed and replaced whole.
    repeated_keys: bool,
    initial_state: bool,
    d_final_state: bool,
    transition: Transition,
}

const BASE: Case = Case {
    name: "",
    packed: &[],
    b: 2,
    t: 17,
    h: 3,
    k: 64,
    v: 64,
    gates: Gates::LogSigmoid,
    repeated_keys: false,
    initial_state: true,
    d_final_state: true,
    transition: Transition::General,
};

const CASES: &[Case] = &[
    Case { name: "one token", t: 1, ..BASE },
    Case { name: "two tokens", t: 2, ..BASE },
    Case { name: "no token", t: 0, ..BASE },
    Case { name: "15 tokens", t: 15, ..BASE },
    Case { name: "16 tokens", t: 16, ..BASE },
    Case { name: "64 tokens, no states", t: 64, initial_state: false, d_final_state: false, ..BASE },
    Case { name: "65 tokens, no initial state", t: 65, initial_state: false, ..BASE },
    Case { name: "63 tokens, no gradient of the final state", t: 63, d_final_state: false, ..BASE },
    Case { name: "1000 tokens, one head", b: 1, t: 1000, h: 1, gates: Gates::Rwkv7, ..BASE },
    Case { name: "more states than blocks", b: 300, t: 3, h: 3, ..BASE },
    Case { name: "packed", packed: &[3, 17, 1, 30], ..BASE },
    Case { name: "packed with empty members", packed: &[0, 5, 0, 0, 1, 20, 0], ..BASE },
    Case { name: "packed, empty members without states", packed: &[0, 5, 0], initial_state: false, ..BASE },
    Case { name: "packed, one sequence without tokens", packed: &[0], ..BASE },
    Case { name: "no sequence", b: 0, ..BASE },
    Case {
        name: "repeated keys, strength 1, no decay",
        t: 40,
        repeated_keys: true,
        gates: Gates::Constant(0.0),
        ..BASE
    },
    Case { name: "a key and its rate", transition: Transition::KeyAndRate, ..BASE },
    Case {
        name: "a key and its rate, K = 60, V = 100",
        k: 60,
        v: 100,
        transition: Transition::KeyAndRate,
        ..BASE
    },
    Case {
        name: "a key and its rate, two parts",
        k: 128,
        v: 128,
        transition: Transition::KeyAndRate,
        ..BASE
    },
    Case { name: "K = V = 128: two parts", k: 128, v: 128, ..BASE },
    Case { name: "K = 256, V = 512: many parts", h: 1, k: 256, v: 512, ..BASE },
    Case { name: "V = 512", h: 1, k: 64, v: 512, ..BASE },
    Case { name: "K = V = 1", k: 1, v: 1, ..BASE },
    Case { name: "K = 60, V = 100", k: 60, v: 100, ..BASE },
    Case { name: "K = 33, V = 65: rows that no vector access fits", k: 33, v: 65, ..BASE },
    Case { name: "K = 132, V = 17, packed", k: 132, v: 17, packed: &[2, 0, 9], ..BASE },
];

const SCALE: f64 = 0.125;

impl Case {
    fn cu_seqlens(&self) -> Vec<usize> {
        self.packed.iter().fold(vec![0], |mut offsets, len| {
            offsets.push(offsets[offsets.len() - 1] + len);
            offsets
        })
    }

    fn shape(&self) -> Shape {
        let seqs = if self.packed.is_empty() {
            SeqLens::dense(self.b, self.t)
        } else {
            SeqLens::packed(&self.cu_seqlens(), self.packed.iter().sum()).expect("valid lengths")
        };
        Shape { seqs, h: self.h, k: self.k, v: self.v }
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
        RecurrentFwdOptions::new(SCALE as f32).with_transition(self.transition)
    }
}

/// Inputs as f64, already rounded to the type that the kernel reads.
struct Problem {
    /// q, k, v, a, b, g, d_o.
    vectors: [Vec<f64>; 7],
    initial_state: Option<Vec<f64>>,
    d_final_state: Option<Vec<f64>>,
}

/// The names of the gradients, in the order of `Problem::reference` and of [`run`].
const GRADS: [(&str, Class); 7] = [
    ("dq", Class::Grad),
    ("dk", Class::Grad),
    ("dv", Class::Grad),
    ("da", Class::Grad),
    ("db", Class::Grad),
    ("dg", Class::GateGrad),
    ("d_initial_state", Class::Grad),
];

impl Problem {
    fn new<T: Storage>(case: &Case) -> Self {
        let shape = case.shape();
        let mut rng = Rng::new(7);
        let rows = shape.k_len() / shape.k;
        let keys: Vec<f64> = if case.repeated_keys {
            rng.repeated_unit_rows(rows, shape.k)
        } else {
            rng.unit_rows(rows, shape.k)
        };
        let rates: Vec<f64> =
            keys.iter().map(|_| if case.repeated_keys { 1.0 } else { rng.unit() }).collect();
        let (a, b) = match case.transition {
            Transition::General => {
                (keys.iter().map(|k| -k).collect(), keys.iter().zip(&rates).map(|(k, r)| k * r).collect())
            }
            Transition::KeyAndRate => (keys.clone(), rates),
        };
        let vectors = [
            rng.normal(shape.k_len(), 1.0),
            keys,
            rng.normal(shape.v_len(), 1.0),
            a,
            b,
            rng.gates(shape.k_len(), case.gates),
            rng.normal(shape.v_len(), 1.0),
        ]
        .map(|x: Vec<f64>| round_to::<T, f64>(&x));
        let mut state = |wanted: bool| {
            let values = round_to::<f32, f64>(&rng.normal::<f64>(shape.state_len(), 1.0));
            wanted.then_some(values)
        };
        let (initial_state, d_final_state) = (state(case.initial_state), state(case.d_final_state));
        Self { vectors, initial_state, d_final_state }
    }

    fn reference(&self, case: &Case) -> [Vec<f64>; 7] {
        let [q, k, v, a, b, g, d_o] = &self.vectors;
        let (shape, initial_state) = (case.reference_shape(), self.initial_state.as_deref());
        let dy = fla_reference::dplr::OutputGrads { d_o, d_final_state: self.d_final_state.as_deref() };
        match case.transition {
            Transition::General => {
                let x = fla_reference::dplr::Inputs { q, k, v, a, b, g, initial_state };
                let options = fla_reference::dplr::Options::new(SCALE);
                let dx = fla_reference::dplr::recurrent_bwd(&shape, &x, &dy, &options);
                [dx.dq, dx.dk, dx.dv, dx.da, dx.db, dx.dg, dx.d_initial_state]
            }
            Transition::KeyAndRate => {
                let x = fla_reference::rwkv7::FusedMulInputs { r: q, w: g, k, v, kk: a, a: b, initial_state };
                let options = fla_reference::rwkv7::Options::new(SCALE);
                let dx = fla_reference::rwkv7::fused_mul_recurrent_bwd(&shape, &x, &dy, &options);
                [dx.dr, dx.dk, dx.dv, dx.dkk, dx.da, dx.dw, dx.d_initial_state]
            }
        }
    }
}

fn to_device<T: Poison>(stream: &Arc<CudaStream>, name: &str, values: &[f64]) -> Guarded<T> {
    let values: Vec<T> = values.iter().map(|x| T::from_f32(*x as f32)).collect();
    Guarded::input(stream, name, &values)
}

/// The gradients over tokens, and that of the initial state.
type Gradients<T> = ([Vec<T>; 6], Vec<f32>);

/// One run on poisoned buffers.
fn run<T: Poison>(
    device: &Device,
    stream: &Arc<CudaStream>,
    case: &Case,
    problem: &Problem,
) -> Result<Gradients<T>, Error> {
    let shape = case.shape();
    let inputs = problem.vectors.each_ref().map(|x| to_device::<T>(stream, "an input", x));
    let state = |s: &Option<Vec<f64>>| s.as_ref().map(|s| to_device::<f32>(stream, "a state", s));
    let (initial, d_final) = (state(&problem.initial_state), state(&problem.d_final_state));
    let (k_len, v_len) = (shape.k_len(), shape.v_len());
    let mut grads =
        [("dq", k_len), ("dk", k_len), ("dv", v_len), ("da", k_len), ("db", k_len), ("dg", k_len)]
            .map(|(name, len)| Guarded::<T>::output(stream, name, len));
    let mut d_initial = Guarded::<f32>::output(stream, "d_initial_state", shape.state_len());

    let plan = RecurrentBwd::<T>::new(device, &shape, &case.options())?;
    // A workspace full of NaN: nothing may be read there before it is written.
    let mut workspace = stream.clone_htod(&vec![0xff_u8; plan.workspace_bytes()]).expect("fits");
    {
        let views = inputs.each_ref().map(Guarded::view);
        let [q, k, v, a, b, g, d_o] = &views;
        let (initial, d_final) = (initial.as_ref().map(Guarded::view), d_final.as_ref().map(Guarded::view));
        let x = RecurrentBwdInputs {
            q,
            k,
            v,
            a,
            b,
            g,
            initial_state: initial.as_ref().map(|s| s as &dyn DevicePtr<f32>),
            d_o,
            d_final_state: d_final.as_ref().map(|s| s as &dyn DevicePtr<f32>),
        };
        let mut grads = grads.each_mut().map(Guarded::view_mut);
        let [dq, dk, dv, da, db, dg] = &mut grads;
        let mut d_initial = d_initial.view_mut();
        let d_initial_state: Option<&mut dyn DevicePtrMut<f32>> = Some(&mut d_initial);
        let mut dx = RecurrentBwdOutputs { dq, dk, dv, da, db, dg, d_initial_state };
        plan.run(stream, &x, &mut dx, &mut workspace)?;
    }
    Ok((grads.map(|mut x| x.read()), d_initial.read()))
}

fn dtype<T: Poison>() -> Dtype {
    match T::DTYPE {
        DType::F32 => Dtype::F32,
        DType::Bf16 => Dtype::Bf16,
        DType::F16 => Dtype::F16,
    }
}

fn check<T: Poison + Storage>(device: &Device, stream: &Arc<CudaStream>, case: &Case) -> Result<(), String> {
    let problem = Problem::new::<T>(case);
    let want = problem.reference(case);
    let once = || run::<T>(device, stream, case, &problem).map_err(|error| error.to_string());
    let ((grads, state), (grads_again, state_again)) = (once()?, once()?);
    let mut got: Vec<Vec<f64>> = Vec::new();
    for ((x, again), (name, _)) in grads.iter().zip(&grads_again).zip(GRADS) {
        same_bits(name, x, again)?;
        got.push(x.iter().map(|x| f64::from(x.to_f32())).collect());
    }
    same_bits("d_initial_state", &state, &state_again)?;
    got.push(state.into_iter().map(f64::from).collect());
    let slack = if T::DTYPE == DType::F16 { F16_SPACING } else { 0.0 };
    for ((got, want), (name, class)) in got.iter().zip(&want).zip(GRADS) {
        if let Some(at) = first_non_finite(got) {
            return Err(format!("{name}: element {at} is {}", got[at]));
        }
        let key = Key {
            backend: Backend::Gpu,
            model: Model::Dplr,
            pass: Pass::RecurrentBwd,
            dtype: dtype::<T>(),
            class,
        };
        let (error, limit) =
            (relative_rms_beyond(got, want, slack), limit(key).map_err(|error| error.to_string())?);
        if error > limit {
            return Err(format!("{name}: relative RMS {error:.2e} > {limit:.0e}"));
        }
    }
    Ok(())
}

fn check_all_dtypes(device: &Device, stream: &Arc<CudaStream>, case: &Case) -> Result<(), String> {
    check::<f32>(device, stream, case).map_err(|error| format!("f32: {error}"))?;
    check::<bf16>(device, stream, case).map_err(|error| format!("bf16: {error}"))?;
    check::<f16>(device, stream, case).map_err(|error| format!("f16: {error}"))
}

#[test]
fn recurrent_bwd_matches_reference() {
    let Some((device, stream)) = gpu("recurrent_bwd_matches_reference") else { return };
    run_cases(CASES, |case| case.name.into(), |case| check_all_dtypes(&device, &stream, case));
}

#[test]
fn recurrent_bwd_survives_every_gate_regime() {
    let Some((device, stream)) = gpu("recurrent_bwd_survives_every_gate_regime") else { return };
    run_cases(
        REGIMES,
        |gates| format!("{gates:?}"),
        |gates| check_all_dtypes(&device, &stream, &Case { t: 70, gates: *gates, ..BASE }),
    );
}

fn any_case() -> impl Strategy<Value = Case> {
    let width = prop_oneof![Just(64usize), Just(32), 1usize..=96];
    let dims = (1usize..4, 0usize..40, 1usize..4, width.clone(), width);
    (dims, 0..REGIMES.len(), proptest::bool::ANY, proptest::bool::ANY).prop_map(
        |((b, t, h, k, v), regime, initial_state, d_final_state)| Case {
            name: "proptest",
            b,
            t,
            h,
            k,
            v,
            gates: REGIMES[regime],
            initial_state,
            d_final_state,
            ..BASE
        },
    )
}

proptest! {
    // Every new K and V compiles a kernel, so a few cases a run; the seed changes from run to run.
    #![proptest_config(ProptestConfig { cases: 8, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn recurrent_bwd_matches_reference_for_any_shape(case in any_case()) {
        if let Some((device, stream)) = gpu("recurrent_bwd_matches_reference_for_any_shape") {
            let result = check::<bf16>(&device, &stream, &case).and_then(|()| check::<f32>(&device, &stream, &case));
            assert_eq!(result, Ok(()), "{case:?}");
        }
    }
}

#[test]
fn the_one_call_form_and_a_captured_graph_give_the_plans_bits() {
    let Some((device, _)) = gpu("the_one_call_form_and_a_captured_graph_give_the_plans_bits") else { return };
    // Event tracking belongs to a context, and other tests run on the shared one.
    let bench = Bench::open().expect("opens");
    let stream = bench.stream().clone();
    let case = Case { initial_state: false, d_final_state: false, ..BASE };
    let problem = Problem::new::<f16>(&case);
    let (want, want_state) = run::<f16>(&device, &stream, &case, &problem).expect("runs");
    let [q, k, v, a, b, g, d_o] = problem.vectors.each_ref().map(|x| {
        let values: Vec<f16> = x.iter().map(|x| f16::from_f64(*x)).collect();
        stream.clone_htod(&values).expect("copies")
    });
    let x = RecurrentBwdInputs {
        q: &q,
        k: &k,
        v: &v,
        a: &a,
        b: &b,
        g: &g,
        initial_state: None,
        d_o: &d_o,
        d_final_state: None,
    };
    let mut dx = recurrent_bwd(&device, &case.shape(), &x, &case.options()).expect("runs");
    let read = |x: &CudaSlice<f16>| stream.clone_dtoh(x).expect("copies");
    for ((name, _), (got, want)) in
        GRADS.iter().zip([&dx.dq, &dx.dk, &dx.dv, &dx.da, &dx.db, &dx.dg].iter().zip(&want))
    {
        assert_eq!(same_bits(name, want, &read(got)), Ok(()));
    }
    let state = stream.clone_dtoh(&dx.d_initial_state).expect("copies");
    assert_eq!(same_bits("d_initial_state", &want_state, &state), Ok(()));

    let plan = RecurrentBwd::<f16>::new(&device, &case.shape(), &case.options()).expect("valid");
    let mut workspace = stream.alloc_zeros::<u8>(plan.workspace_bytes()).expect("fits");
    stream.memset_zeros(&mut dx.dg).expect("is set");
    let replay = bench
        .capture(1, |stream, _| {
            let mut outputs = RecurrentBwdOutputs {
                dq: &mut dx.dq,
                dk: &mut dx.dk,
                dv: &mut dx.dv,
                da: &mut dx.da,
                db: &mut dx.db,
                dg: &mut dx.dg,
                d_initial_state: None,
            };
            plan.run(stream, &x, &mut outputs, &mut workspace)
        })
        .expect("captures");
    replay.time(2);
    assert_eq!(same_bits("dg", &want[5], &read(&dx.dg)), Ok(()));
}

#[test]
fn wrong_arguments_are_named_before_anything_is_launched() {
    let Some((device, stream)) = gpu("wrong_arguments_are_named_before_anything_is_launched") else { return };
    let shape = Shape { seqs: SeqLens::dense(1, 2), h: 1, k: 64, v: 32 };
    let plan = RecurrentBwd::<f32>::new(&device, &shape, &RecurrentFwdOptions::new(1.0)).expect("valid");
    let new = |len: usize| stream.alloc_zeros::<f32>(len).expect("fits");
    let (over_k, over_v, odd) = (new(128), new(64), new(127));
    let good = RecurrentBwdInputs {
        q: &over_k,
        k: &over_k,
        v: &over_v,
        a: &over_k,
        b: &over_k,
        g: &over_k,
        initial_state: None,
        d_o: &over_v,
        d_final_state: None,
    };
    let mut grads = [(); 6].map(|()| Guarded::<f32>::output(&stream, "a gradient", 128));
    let mut workspace = stream.alloc_zeros::<u8>(plan.workspace_bytes()).expect("fits");
    let mut small = stream.alloc_zeros::<u8>(16).expect("fits");
    let mut text = |x: &RecurrentBwdInputs<'_, f32>, dv_len: usize, has_workspace: bool| {
        let mut views = grads.each_mut().map(Guarded::view_mut);
        let [dq, dk, dv, da, db, dg] = &mut views;
        let mut dv = dv.slice_mut(..dv_len);
        let mut dx = RecurrentBwdOutputs { dq, dk, dv: &mut dv, da, db, dg, d_initial_state: None };
        let workspace = if has_workspace { &mut workspace } else { &mut small };
        plan.run(&stream, x, &mut dx, workspace).expect_err("must be refused").to_string()
    };
    let needed = plan.workspace_bytes();
    for (x, dv_len, has_workspace, want) in [
        (
            RecurrentBwdInputs { g: &odd, ..good },
            64,
            true,
            "`g` is [B, T, H, K], which is 128 elements here, but holds 127".to_owned(),
        ),
        (
            RecurrentBwdInputs { d_o: &odd, ..good },
            64,
            true,
            "`d_o` is [B, T, H, V], which is 64 elements here, but holds 127".to_owned(),
        ),
        (
            RecurrentBwdInputs { d_final_state: Some(&odd), ..good },
            64,
            true,
            "`d_final_state` is [N, H, K, V], which is 2048 elements here, but holds 127".to_owned(),
        ),
        (good, 63, true, "`dv` is [B, T, H, V], which is 64 elements here, but holds 63".to_owned()),
        (
            good,
            64,
            false,
            format!(
                "`workspace` is workspace_bytes() of the plan, which is {needed} elements here, but holds 16"
            ),
        ),
    ] {
        assert_eq!(text(&x, dv_len, has_workspace), want);
    }
    assert!(grads.iter_mut().all(|x| x.read().iter().all(|x| x.is_nan())));

    let on_device = Shape { seqs: SeqLens::packed_on_device(1, 2), ..shape };
    let error = RecurrentBwd::<f32>::new(&device, &on_device, &RecurrentFwdOptions::new(1.0));
    assert!(matches!(error, Err(Error::SeqLens { .. })), "{error:?}");
}
