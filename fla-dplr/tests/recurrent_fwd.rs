//! `recurrent_fwd` on the GPU against the float64 recurrence.

use std::sync::Arc;

use fla_core::cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut};
use fla_core::testing::{Guarded, Poison, gpu, run_cases, same_bits};
use fla_core::{DType, Device, Error, FinalState, SeqLens, Shape};
use fla_dplr::{RecurrentFwd, RecurrentFwdInputs, RecurrentFwdOptions, RecurrentFwdOutputs, recurrent_fwd};
use fla_reference::compare::relative_rms;
use fla_reference::inputs::{Gates, REGIMES, Rng, Storage, round_to};
use fla_reference::tolerance::{Backend, Class, Dtype, Key, Model, Pass, limit};
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
    gates: Gates,
    keys: Keys,
    initial_state: bool,
    final_state: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Keys {
    /// Unit keys, removed and replaced with strengths between 0 and 1.
    Random,
    /// The same unit key at every token, removed and replaced whole.
    Repeated,
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
    gates: Gates::LogSigmoid,
    keys: Keys::Random,
    initial_state: true,
    final_state: true,
};

const CASES: &[Case] = &[
    Case { name: "one token", t: 1, ..BASE },
    Case { name: "one token, no initial state", t: 1, initial_state: false, ..BASE },
    Case { name: "one token, no final state", t: 1, final_state: false, ..BASE },
    Case { name: "two tokens", t: 2, ..BASE },
    Case { name: "no token", t: 0, ..BASE },
    Case { name: "15 tokens", t: 15, ..BASE },
    Case { name: "16 tokens", t: 16, ..BASE },
    Case { name: "63 tokens, no states", t: 63, initial_state: false, final_state: false, ..BASE },
    Case { name: "64 tokens", t: 64, ..BASE },
    Case { name: "65 tokens, scale 1", t: 65, scale: 1.0, ..BASE },
    Case { name: "1000 tokens, one head", b: 1, t: 1000, h: 1, gates: Gates::Rwkv7, ..BASE },
    Case { name: "4000 tokens, slow decay", b: 1, t: 4000, h: 1, gates: Gates::Constant(-5e-4), ..BASE },
    Case { name: "decode, many sequences", b: 33, t: 1, h: 5, ..BASE },
    Case { name: "many states, one token", b: 67, t: 1, h: 8, ..BASE },
    Case { name: "very many states, one token", b: 201, t: 1, h: 8, ..BASE },
    Case { name: "many states, three tokens", b: 181, t: 3, h: 6, gates: Gates::Mixed, ..BASE },
    Case {
        name: "many states, eight tokens, no initial state",
        b: 67,
        t: 8,
        h: 8,
        initial_state: false,
        ..BASE
    },
    Case { name: "many states, four tokens, no final state", b: 67, t: 4, h: 8, final_state: false, ..BASE },
    Case { name: "many states, nine tokens", b: 67, t: 9, h: 8, ..BASE },
    Case { name: "many states of 128 by 128", b: 47, t: 1, h: 6, k: 128, v: 128, ..BASE },
    Case { name: "many states of 128 by 128, five tokens", b: 67, t: 5, h: 2, k: 128, v: 128, ..BASE },
    Case { name: "many states of 64 by 128", b: 90, t: 2, h: 6, k: 64, v: 128, ..BASE },
    Case { name: "many states of 128 by 32", b: 90, t: 1, h: 6, k: 128, v: 32, ..BASE },
    Case { name: "many states of 32 by 32", b: 90, t: 7, h: 6, k: 32, v: 32, ..BASE },
    Case { name: "many states that do not stream", b: 90, t: 1, h: 6, k: 60, v: 60, ..BASE },
    Case { name: "more heads than a grid axis of 65535", b: 35_000, t: 1, h: 2, k: 8, v: 4, ..BASE },
    Case { name: "packed", packed: &[3, 17, 1, 30], ..BASE },
    Case { name: "packed with empty members", packed: &[0, 5, 0, 0, 1, 20, 0], ..BASE },
    Case { name: "packed, empty members without a state", packed: &[0, 5, 0], initial_state: false, ..BASE },
    Case { name: "packed, all of one token", packed: &[1, 1, 1, 1, 1], ..BASE },
    Case { name: "packed, one sequence without tokens", packed: &[0], ..BASE },
    Case { name: "no sequence", b: 0, ..BASE },
    Case {
        name: "repeated keys, strength 1, no decay",
        t: 40,
        keys: Keys::Repeated,
        gates: Gates::Constant(0.0),
        ..BASE
    },
    Case { name: "K = V = 128", k: 128, v: 128, ..BASE },
    Case { name: "K = V = 128, one token", t: 1, k: 128, v: 128, ..BASE },
    Case { name: "K = V = 256", h: 1, k: 256, v: 256, ..BASE },
    Case { name: "K = V = 256, one token", t: 1, h: 1, k: 256, v: 256, ..BASE },
    Case { name: "V = 512", h: 1, k: 64, v: 512, ..BASE },
    Case { name: "K = V = 1", k: 1, v: 1, ..BASE },
    Case { name: "K = 60, V = 100", k: 60, v: 100, ..BASE },
    Case { name: "K = 100, V = 60, one token", t: 1, k: 100, v: 60, ..BASE },
    Case { name: "K = 33, V = 65: rows that no vector access fits", k: 33, v: 65, ..BASE },
    Case { name: "K = 50, V = 70", k: 50, v: 70, ..BASE },
    Case { name: "K = 132, V = 17, packed", k: 132, v: 17, packed: &[2, 0, 9], ..BASE },
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
}

/// Inputs as f64, already rounded to the type that the kernel reads.
struct Problem {
    q: Vec<f64>,
    k: Vec<f64>,
    v: Vec<f64>,
    a: Vec<f64>,
    b: Vec<f64>,
    g: Vec<f64>,
    initial_state: Option<Vec<f64>>,
}

impl Problem {
    fn new<T: Storage>(case: &Case) -> Self {
        let shape = case.shape();
        let mut rng = Rng::new(7);
        let rows = shape.k_len() / shape.k;
        let k: Vec<f64> = match case.keys {
            Keys::Random => rng.unit_rows(rows, shape.k),
            Keys::Repeated => rng.repeated_unit_rows(rows, shape.k),
        };
        let strength = |rng: &mut Rng| if case.keys == Keys::Repeated { 1.0 } else { rng.unit() };
        let b: Vec<f64> = k
            .chunks(shape.k)
            .flat_map(|row| {
                let strength = strength(&mut rng);
                row.iter().map(move |k| k * strength).collect::<Vec<_>>()
            })
            .collect();
        let a: Vec<f64> = k.iter().map(|k| -k).collect();
        let initial_state =
            case.initial_state.then(|| round_to::<f32, f64>(&rng.normal::<f64>(shape.state_len(), 1.0)));
        Self {
            q: round_to::<T, f64>(&rng.normal::<f64>(shape.k_len(), 1.0)),
            k: round_to::<T, f64>(&k),
            v: round_to::<T, f64>(&rng.normal::<f64>(shape.v_len(), 1.0)),
            a: round_to::<T, f64>(&a),
            b: round_to::<T, f64>(&b),
            g: round_to::<T, f64>(&rng.gates::<f64>(shape.k_len(), case.gates)),
            initial_state,
        }
    }

    fn reference(&self, case: &Case) -> fla_reference::dplr::Outputs<f64> {
        let Self { q, k, v, a, b, g, initial_state } = self;
        let x = fla_reference::dplr::Inputs { q, k, v, a, b, g, initial_state: initial_state.as_deref() };
        let options = fla_reference::dplr::Options::new(case.scale);
        fla_reference::dplr::recurrent_fwd(&case.reference_shape(), &x, &options)
    }
}

fn to_device<T: Poison>(stream: &Arc<CudaStream>, name: &str, values: &[f64]) -> Guarded<T> {
    let values: Vec<T> = values.iter().map(|x| T::from_f32(*x as f32)).collect();
    Guarded::input(stream, name, &values)
}

/// One run on poisoned buffers.
fn run<T: Poison>(
    device: &Device,
    stream: &Arc<CudaStream>,
    case: &Case,
    problem: &Problem,
) -> Result<(Vec<T>, Option<Vec<f32>>), Error> {
    let shape = case.shape();
    let input = |name, values: &[f64]| to_device::<T>(stream, name, values);
    let (q, k, v) = (input("q", &problem.q), input("k", &problem.k), input("v", &problem.v));
    let (a, b, g) = (input("a", &problem.a), input("b", &problem.b), input("g", &problem.g));
    let initial = problem.initial_state.as_ref().map(|s| to_device::<f32>(stream, "initial_state", s));
    let mut o = Guarded::<T>::output(stream, "o", shape.v_len());
    let mut last = case.final_state.then(|| Guarded::<f32>::output(stream, "final_state", shape.state_len()));

    let plan = RecurrentFwd::<T>::new(device, &shape, &RecurrentFwdOptions::new(case.scale as f32))?;
    {
        let (q, k, v, a, b, g) = (q.view(), k.view(), v.view(), a.view(), b.view(), g.view());
        let initial = initial.as_ref().map(Guarded::view);
        let (mut o, mut last) = (o.view_mut(), last.as_mut().map(Guarded::view_mut));
        let x = RecurrentFwdInputs {
            q: &q,
            k: &k,
            v: &v,
            a: &a,
            b: &b,
            g: &g,
            initial_state: initial.as_ref().map(|s| s as &dyn DevicePtr<f32>),
            cu_seqlens: None,
        };
        let final_state = last.as_mut().map(|s| s as &mut dyn DevicePtrMut<f32>).into();
        plan.run(stream, &x, &mut RecurrentFwdOutputs { o: &mut o, final_state, token_states: None })?;
    }
    Ok((o.read(), last.as_mut().map(Guarded::read)))
}

fn dtype<T: Poison>() -> Dtype {
    match T::DTYPE {
        DType::F32 => Dtype::F32,
        DType::Bf16 => Dtype::Bf16,
        DType::F16 => Dtype::F16,
    }
}

fn within<T: Poison>(class: Class, got: &[f64], want: &[f64]) -> Result<(), String> {
    let key = Key {
        backend: Backend::Gpu,
        model: Model::Dplr,
        pass: Pass::RecurrentFwd,
        dtype: dtype::<T>(),
        class,
    };
    let limit = limit(key).map_err(|error| error.to_string())?;
    let error = relative_rms(got, want);
    if error <= limit { Ok(()) } else { Err(format!("{class:?}: relative RMS {error:.2e} > {limit:.0e}")) }
}

fn check<T: Poison + Storage>(device: &Device, stream: &Arc<CudaStream>, case: &Case) -> Result<(), String> {
    let problem = Problem::new::<T>(case);
    let want = problem.reference(case);
    let once = || run::<T>(device, stream, case, &problem).map_err(|error| error.to_string());
    let ((o, last), (o_again, last_again)) = (once()?, once()?);
    same_bits("o", &o, &o_again)?;
    let widened: Vec<f64> = o.iter().map(|x| f64::from(x.to_f32())).collect();
    within::<T>(Class::Output, &widened, &want.o)?;
    if let (Some(last), Some(again)) = (last, last_again) {
        same_bits("final_state", &last, &again)?;
        let widened: Vec<f64> = last.iter().map(|x| f64::from(*x)).collect();
        within::<T>(Class::FinalState, &widened, &want.final_state)?;
    }
    Ok(())
}

fn check_all_dtypes(device: &Device, stream: &Arc<CudaStream>, case: &Case) -> Result<(), String> {
    check::<f32>(device, stream, case).map_err(|error| format!("f32: {error}"))?;
    check::<bf16>(device, stream, case).map_err(|error| format!("bf16: {error}"))?;
    check::<f16>(device, stream, case).map_err(|error| format!("f16: {error}"))
}

#[test]
fn recurrent_fwd_matches_reference() {
    let Some((device, stream)) = gpu("recurrent_fwd_matches_reference") else { return };
    run_cases(CASES, |case| case.name.into(), |case| check_all_dtypes(&device, &stream, case));
}

#[test]
fn recurrent_fwd_survives_every_gate_regime() {
    let Some((device, stream)) = gpu("recurrent_fwd_survives_every_gate_regime") else { return };
    run_cases(
        REGIMES,
        |gates| format!("{gates:?}"),
        |gates| check_all_dtypes(&device, &stream, &Case { t: 70, gates: *gates, ..BASE }),
    );
}

fn any_case() -> impl Strategy<Value = Case> {
    let width = prop_oneof![Just(64usize), Just(32), 1usize..=96];
    (1usize..4, 0usize..40, 1usize..4, width.clone(), width, 0..REGIMES.len(), proptest::bool::ANY).prop_map(
        |(b, t, h, k, v, regime, initial_state)| Case {
            name: "proptest",
            b,
            t,
            h,
            k,
            v,
            gates: REGIMES[regime],
            initial_state,
            ..BASE
        },
    )
}

proptest! {
    // Every new K and V compiles a kernel, so a few cases a run; the seed changes from run to run.
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn recurrent_fwd_matches_reference_for_any_shape(case in any_case()) {
        if let Some((device, stream)) = gpu("recurrent_fwd_matches_reference_for_any_shape") {
            let result = check::<bf16>(&device, &stream, &case).and_then(|()| check::<f32>(&device, &stream, &case));
            assert_eq!(result, Ok(()), "{case:?}");
        }
    }
}

#[test]
fn splitting_a_sequence_changes_nothing() {
    let Some((device, stream)) = gpu("splitting_a_sequence_changes_nothing") else { return };
    let whole = Case { b: 1, t: 31, ..BASE };
    let problem = Problem::new::<bf16>(&whole);
    let (o, last) = run::<bf16>(&device, &stream, &whole, &problem).expect("runs");
    let mut state = problem.initial_state.clone();
    let mut pieces = Vec::new();
    // One token takes another path through the kernel than many.
    for (from, to) in [(0, 1), (1, 20), (20, 21), (21, 31)] {
        let cut = |x: &[f64], width: usize| x[from * 3 * width..to * 3 * width].to_vec();
        let piece = Problem {
            q: cut(&problem.q, 64),
            k: cut(&problem.k, 64),
            v: cut(&problem.v, 64),
            a: cut(&problem.a, 64),
            b: cut(&problem.b, 64),
            g: cut(&problem.g, 64),
            initial_state: state,
        };
        let case = Case { t: to - from, ..whole.clone() };
        let (o, last) = run::<bf16>(&device, &stream, &case, &piece).expect("runs");
        pieces.extend(o);
        state = last.map(|s| s.into_iter().map(f64::from).collect());
    }
    assert_eq!(same_bits("o", &o, &pieces), Ok(()));
    let state: Vec<f32> = state.expect("asked for").into_iter().map(|x| x as f32).collect();
    assert_eq!(same_bits("final_state", &last.expect("asked for"), &state), Ok(()));
}

#[test]
fn the_one_call_form_gives_the_plans_bits() {
    let Some((device, stream)) = gpu("the_one_call_form_gives_the_plans_bits") else { return };
    let problem = Problem::new::<f16>(&BASE);
    let (o, last) = run::<f16>(&device, &stream, &BASE, &problem).expect("runs");
    let input = |values: &[f64]| {
        let values: Vec<f16> = values.iter().map(|x| f16::from_f64(*x)).collect();
        stream.clone_htod(&values).expect("copies")
    };
    let (q, k, v) = (input(&problem.q), input(&problem.k), input(&problem.v));
    let (a, b, g) = (input(&problem.a), input(&problem.b), input(&problem.g));
    let initial: Vec<f32> = problem.initial_state.iter().flatten().map(|x| *x as f32).collect();
    let initial = stream.clone_htod(&initial).expect("copies");
    let x = RecurrentFwdInputs {
        q: &q,
        k: &k,
        v: &v,
        a: &a,
        b: &b,
        g: &g,
        initial_state: Some(&initial),
        cu_seqlens: None,
    };
    let y = recurrent_fwd(&device, &BASE.shape(), &x, &RecurrentFwdOptions::new(BASE.scale as f32))
        .expect("runs");
    assert_eq!(same_bits("o", &o, &stream.clone_dtoh(&y.o).expect("copies")), Ok(()));
    let state = stream.clone_dtoh(&y.final_state).expect("copies");
    assert_eq!(same_bits("final_state", &last.expect("asked for"), &state), Ok(()));
}

#[test]
fn offsets_beyond_two_to_the_31_are_right() {
    const H: usize = 64;
    const LONG: usize = (1 << 31) / (H * 64);
    const SHORT: usize = 5;
    let Some((device, stream)) = gpu("offsets_beyond_two_to_the_31_are_right") else { return };
    // A long first sequence of zeros pushes the second one past 2^31 elements.
    let case = Case { name: "far", packed: &[LONG, SHORT], h: H, initial_state: false, ..BASE };
    let bytes = 7 * case.shape().k_len() * size_of::<bf16>();
    let (free, _) = device.context().mem_get_info().expect("answers");
    if free < bytes + (1 << 30) {
        eprintln!(
            "offsets_beyond_two_to_the_31_are_right: skipped, it needs {} GiB of device memory",
            bytes >> 30
        );
        return;
    }
    let tail = Case { name: "tail", b: 1, t: SHORT, packed: &[], ..case.clone() };
    let problem = Problem::new::<bf16>(&tail);
    let want = problem.reference(&tail);
    let far = |values: &[f64]| {
        let values: Vec<bf16> = values.iter().map(|x| bf16::from_f32(*x as f32)).collect();
        let mut all = stream.alloc_zeros::<bf16>(case.shape().k_len()).expect("fits");
        let start = LONG * H * 64;
        stream.memcpy_htod(&values, &mut all.slice_mut(start..start + values.len())).expect("copies");
        all
    };
    let (q, k, v) = (far(&problem.q), far(&problem.k), far(&problem.v));
    let (a, b, g) = (far(&problem.a), far(&problem.b), far(&problem.g));
    let x = RecurrentFwdInputs {
        q: &q,
        k: &k,
        v: &v,
        a: &a,
        b: &b,
        g: &g,
        initial_state: None,
        cu_seqlens: None,
    };
    let y = recurrent_fwd(&device, &case.shape(), &x, &RecurrentFwdOptions::new(case.scale as f32))
        .expect("runs");
    let o = stream.clone_dtoh(&y.o.slice(LONG * H * 64..)).expect("copies");
    let widened: Vec<f64> = o.iter().map(|x| f64::from(x.to_f32())).collect();
    assert_eq!(within::<bf16>(Class::Output, &widened, &want.o), Ok(()));
}

#[test]
fn wrong_arguments_are_named_before_anything_is_launched() {
    let Some((device, stream)) = gpu("wrong_arguments_are_named_before_anything_is_launched") else { return };
    let shape = Shape { seqs: SeqLens::dense(1, 2), h: 1, k: 64, v: 32 };
    let options = RecurrentFwdOptions::new(1.0);
    let plan = RecurrentFwd::<f32>::new(&device, &shape, &options).expect("valid");
    let good = |len| stream.alloc_zeros::<f32>(len).expect("fits");
    let (k, v, s) = (good(128), good(64), good(64 * 32));
    let (bad, odd) = (good(127), good(129));
    let misaligned = odd.slice(1..);
    type Spoil<'a> = (&'static str, fn(&mut RecurrentFwdInputs<'a, f32>, &'a dyn DevicePtr<f32>));
    let spoils: [Spoil<'_>; 7] = [
        ("q", |x, bad| x.q = bad),
        ("k", |x, bad| x.k = bad),
        ("v", |x, bad| x.v = bad),
        ("a", |x, bad| x.a = bad),
        ("b", |x, bad| x.b = bad),
        ("g", |x, bad| x.g = bad),
        ("initial_state", |x, bad| x.initial_state = Some(bad)),
    ];
    let x = RecurrentFwdInputs {
        q: &k,
        k: &k,
        v: &v,
        a: &k,
        b: &k,
        g: &k,
        initial_state: Some(&s),
        cu_seqlens: None,
    };
    let mut o = Guarded::<f32>::output(&stream, "o", 64);
    for (name, spoil) in spoils {
        let mut x = x;
        spoil(&mut x, &bad);
        let mut view = o.view_mut();
        let error = plan.run(
            &stream,
            &x,
            &mut RecurrentFwdOutputs { o: &mut view, final_state: FinalState::Dropped, token_states: None },
        );
        let text = error.expect_err(name).to_string();
        assert!(text.starts_with(&format!("`{name}` is [")) && text.ends_with("but holds 127"), "{text}");
    }
    let x_odd = RecurrentFwdInputs { k: &misaligned, ..x };
    let error = plan.run(
        &stream,
        &x_odd,
        &mut RecurrentFwdOutputs {
            o: &mut o.view_mut(),
            final_state: FinalState::Dropped,
            token_states: None,
        },
    );
    assert!(matches!(error, Err(Error::Align { tensor: "k", wanted: 16, .. })), "{error:?}");
    let mut short = good(63);
    let error = plan.run(
        &stream,
        &x,
        &mut RecurrentFwdOutputs { o: &mut short, final_state: FinalState::Dropped, token_states: None },
    );
    assert!(matches!(error, Err(Error::Len { tensor: "o", wanted: 64, got: 63, .. })), "{error:?}");
    let mut last = good(3);
    let mut view = o.view_mut();
    let mut y =
        RecurrentFwdOutputs { o: &mut view, final_state: FinalState::New(&mut last), token_states: None };
    let error = plan.run(&stream, &x, &mut y);
    assert!(matches!(error, Err(Error::Len { tensor: "final_state", .. })), "{error:?}");
    // None of the refused calls has written anything.
    assert!(o.read().iter().all(|x| x.is_nan()));

    for (shape, options, text) in [
        (Shape { k: 0, ..shape.clone() }, options.clone(), "K must be from 1 to 256, but is 0"),
        (Shape { k: 257, ..shape.clone() }, options.clone(), "K must be from 1 to 256, but is 257"),
        (Shape { v: 513, ..shape.clone() }, options, "V must be from 1 to 512, but is 513"),
        (shape, RecurrentFwdOptions::new(f32::NAN), "option `scale` must be finite, but is NaN"),
    ] {
        let error = RecurrentFwd::<f32>::new(&device, &shape, &options).expect_err(text);
        assert_eq!(error.to_string(), text);
    }
}

#[test]
fn a_captured_graph_gives_the_same_bits() {
    let Some((device, _)) = gpu("a_captured_graph_gives_the_same_bits") else { return };
    // Event tracking belongs to a context, and other tests run on the shared one.
    let bench = fla_core::testing::Bench::open().expect("opens");
    let stream = bench.stream().clone();
    let case = Case { t: 1, ..BASE };
    let problem = Problem::new::<bf16>(&case);
    let (want, _) = run::<bf16>(&device, &stream, &case, &problem).expect("runs");
    let input = |values: &[f64]| {
        let values: Vec<bf16> = values.iter().map(|x| bf16::from_f32(*x as f32)).collect();
        stream.clone_htod(&values).expect("copies")
    };
    let (q, k, v) = (input(&problem.q), input(&problem.k), input(&problem.v));
    let (a, b, g) = (input(&problem.a), input(&problem.b), input(&problem.g));
    let initial: Vec<f32> = problem.initial_state.iter().flatten().map(|x| *x as f32).collect();
    let initial = stream.clone_htod(&initial).expect("copies");
    let plan =
        RecurrentFwd::<bf16>::new(&device, &case.shape(), &RecurrentFwdOptions::new(case.scale as f32))
            .expect("valid");
    let mut o = stream.alloc_zeros::<bf16>(want.len()).expect("fits");
    let replay = bench
        .capture(1, |stream, _| {
            let x = RecurrentFwdInputs {
                q: &q,
                k: &k,
                v: &v,
                a: &a,
                b: &b,
                g: &g,
                initial_state: Some(&initial),
                cu_seqlens: None,
            };
            plan.run(
                stream,
                &x,
                &mut RecurrentFwdOutputs { o: &mut o, final_state: FinalState::Dropped, token_states: None },
            )
        })
        .expect("captures");
    for _ in 0..2 {
        replay.time(1);
    }
    assert_eq!(same_bits("o", &want, &stream.clone_dtoh(&o).expect("copies")), Ok(()));
}
