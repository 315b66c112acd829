//! `chunk_fwd` on the GPU against the float64 recurrence.

mod problem;

use std::sync::Arc;

use fla_core::cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut};
use fla_core::testing::{Guarded, Poison, gpu, run_cases, same_bits};
use fla_core::{Device, Error, SeqLens};
use fla_reference::inputs::Storage;
use fla_reference::tolerance::{Class, Pass};
use fla_rwkv4::{CHUNK, ChunkFwd, ChunkFwdInputs, ChunkFwdOptions, ChunkFwdOutputs, Shape, chunk_fwd};
use half::{bf16, f16};
use problem::{BASE, CASES, Case, Initial, Judge, Problem, any_case, to_device, widened};
use proptest::prelude::{ProptestConfig, proptest};

/// What a run returned.
struct Got<T> {
    o: Vec<T>,
    final_state: Option<Vec<f32>>,
    states: Vec<f32>,
}

/// One run on poisoned buffers.
fn run<T: Poison>(
    device: &Device,
    stream: &Arc<CudaStream>,
    case: &Case,
    problem: &Problem,
) -> Result<Got<T>, Error> {
    let shape = case.shape();
    let (w, u) = (to_device::<f32>(stream, "w", &problem.w), to_device::<f32>(stream, "u", &problem.u));
    let (k, v) = (to_device::<T>(stream, "k", &problem.k), to_device::<T>(stream, "v", &problem.v));
    let initial = problem.initial_state.as_ref().map(|s| to_device::<f32>(stream, "initial_state", s));
    let mut o = Guarded::<T>::output(stream, "o", shape.token_len());
    let mut last = case.final_state.then(|| Guarded::<f32>::output(stream, "final_state", shape.state_len()));
    let mut states = Guarded::<f32>::output(stream, "states", shape.states_len());

    let plan = ChunkFwd::<T>::new(device, &shape, &ChunkFwdOptions::new())?;
    {
        let (w, u, k, v) = (w.view(), u.view(), k.view(), v.view());
        let initial = initial.as_ref().map(Guarded::view);
        let (mut o, mut last) = (o.view_mut(), last.as_mut().map(Guarded::view_mut));
        let mut states = states.view_mut();
        let x = ChunkFwdInputs {
            w: &w,
            u: &u,
            k: &k,
            v: &v,
            initial_state: initial.as_ref().map(|s| s as &dyn DevicePtr<f32>),
        };
        let final_state = last.as_mut().map(|s| s as &mut dyn DevicePtrMut<f32>);
        plan.run(stream, &x, &mut ChunkFwdOutputs { o: &mut o, final_state, states: Some(&mut states) })?;
    }
    Ok(Got { o: o.read(), final_state: last.as_mut().map(Guarded::read), states: states.read() })
}

/// The states before every chunk, from the reference: final states of sequences cut short.
fn reference_states(case: &Case, problem: &Problem) -> Vec<f64> {
    let shape = case.shape();
    let (seqs, c) = (&shape.seqs, shape.c);
    let bos: Vec<usize> = match seqs.cu_seqlens() {
        Some(offsets) => offsets.to_vec(),
        None => (0..=seqs.b()).map(|i_n| i_n * seqs.t()).collect(),
    };
    let mut states = Vec::new();
    for i_n in 0..seqs.n() {
        for start in (0..seqs.len(i_n).unwrap_or(0)).step_by(CHUNK) {
            let cut = |x: &[f64]| x[bos[i_n] * c..(bos[i_n] + start) * c].to_vec();
            let head = Problem {
                w: problem.w.clone(),
                u: problem.u.clone(),
                k: cut(&problem.k),
                v: cut(&problem.v),
                initial_state: problem
                    .initial_state
                    .as_ref()
                    .map(|state| state[i_n * 3 * c..(i_n + 1) * 3 * c].to_vec()),
                d_o: Vec::new(),
                d_final_state: None,
            };
            let case = Case { packed: &[], b: 1, t: start, ..case.clone() };
            states.extend(head.outputs(&case).final_state);
        }
    }
    states
}

fn check<T: Poison + Storage>(device: &Device, stream: &Arc<CudaStream>, case: &Case) -> Result<(), String> {
    let problem = Problem::new::<T>(case);
    let want = problem.outputs(case);
    let once = || run::<T>(device, stream, case, &problem).map_err(|error| error.to_string());
    let (got, again) = (once()?, once()?);
    same_bits("o", &got.o, &again.o)?;
    same_bits("states", &got.states, &again.states)?;
    let judge = |name, class| Judge { pass: Pass::ChunkFwd, name, class };
    judge("o", Class::Output).within::<T>(1, &widened(&got.o), &want.o)?;
    let n = case.shape().seqs.n();
    if let (Some(last), Some(again)) = (got.final_state, again.final_state) {
        same_bits("final_state", &last, &again)?;
        judge("final_state", Class::FinalState).within::<T>(n, &widened(&last), &want.final_state)?;
    }
    let chunks = case.shape().chunks();
    let states = reference_states(case, &problem);
    judge("states", Class::FinalState).within::<T>(chunks, &widened(&got.states), &states)
}

fn check_all_dtypes(device: &Device, stream: &Arc<CudaStream>, case: &Case) -> Result<(), String> {
    check::<f32>(device, stream, case).map_err(|error| format!("f32: {error}"))?;
    check::<bf16>(device, stream, case).map_err(|error| format!("bf16: {error}"))?;
    check::<f16>(device, stream, case).map_err(|error| format!("f16: {error}"))
}

#[test]
fn chunk_fwd_matches_reference() {
    let Some((device, stream)) = gpu("chunk_fwd_matches_reference") else { return };
    run_cases(CASES, |case| case.name.into(), |case| check_all_dtypes(&device, &stream, case));
}

proptest! {
    // Every new C compiles a kernel, so a few cases a run; the seed changes from run to run.
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn chunk_fwd_matches_reference_for_any_shape(case in any_case()) {
        if let Some((device, stream)) = gpu("chunk_fwd_matches_reference_for_any_shape") {
            let result = check::<bf16>(&device, &stream, &case).and_then(|()| check::<f32>(&device, &stream, &case));
            assert_eq!(result, Ok(()), "{case:?}");
        }
    }
}

#[test]
fn a_state_without_tokens_is_handed_through_bit_by_bit() {
    let Some((device, stream)) = gpu("a_state_without_tokens_is_handed_through_bit_by_bit") else { return };
    let case = Case { packed: &[0, 0, 4, 0], ..BASE };
    let problem = Problem::new::<f32>(&case);
    let got = run::<f32>(&device, &stream, &case, &problem).expect("runs");
    let initial: Vec<f32> = problem.initial_state.iter().flatten().map(|x| *x as f32).collect();
    let last = got.final_state.expect("asked for");
    for i_n in [0, 1, 3] {
        let part = i_n * 3 * case.c..(i_n + 1) * 3 * case.c;
        assert_eq!(same_bits("final_state", &last[part.clone()], &initial[part]), Ok(()));
    }
    let case = Case { initial_state: Initial::Absent, ..case };
    let problem = Problem::new::<f32>(&case);
    let got = run::<f32>(&device, &stream, &case, &problem).expect("runs");
    let fresh: Vec<f32> = (0..3 * case.c).map(|i| if i < 2 * case.c { 0.0 } else { -1e38 }).collect();
    assert_eq!(same_bits("final_state", &got.final_state.expect("asked for")[..3 * case.c], &fresh), Ok(()));
}

#[test]
fn the_one_call_form_gives_the_plans_bits() {
    let Some((device, stream)) = gpu("the_one_call_form_gives_the_plans_bits") else { return };
    let problem = Problem::new::<f16>(&BASE);
    let got = run::<f16>(&device, &stream, &BASE, &problem).expect("runs");
    let single = |values: &[f64]| {
        let values: Vec<f32> = values.iter().map(|x| *x as f32).collect();
        stream.clone_htod(&values).expect("copies")
    };
    let half = |values: &[f64]| {
        let values: Vec<f16> = values.iter().map(|x| f16::from_f64(*x)).collect();
        stream.clone_htod(&values).expect("copies")
    };
    let initial = single(problem.initial_state.as_ref().expect("given"));
    let (w, u, k, v) = (single(&problem.w), single(&problem.u), half(&problem.k), half(&problem.v));
    let x = ChunkFwdInputs { w: &w, u: &u, k: &k, v: &v, initial_state: Some(&initial) };
    let y = chunk_fwd(&device, &BASE.shape(), &x, &ChunkFwdOptions::new()).expect("runs");
    assert_eq!(same_bits("o", &got.o, &stream.clone_dtoh(&y.o).expect("copies")), Ok(()));
    let last = stream.clone_dtoh(&y.final_state).expect("copies");
    assert_eq!(same_bits("final_state", &got.final_state.expect("asked for"), &last), Ok(()));
    assert_eq!(same_bits("states", &got.states, &stream.clone_dtoh(&y.states).expect("copies")), Ok(()));
}

#[test]
fn offsets_beyond_two_to_the_31_are_right() {
    const C: usize = 4096;
    const LONG: usize = (1 << 31) / C;
    const SHORT: usize = 300;
    let Some((device, stream)) = gpu("offsets_beyond_two_to_the_31_are_right") else { return };
    // A long first sequence of zeros pushes the second one past 2^31 elements.
    let far = Case { packed: &[LONG, SHORT], c: C, initial_state: Initial::Absent, ..BASE };
    let bytes = 3 * far.shape().token_len() * size_of::<bf16>();
    let (free, _) = device.context().mem_get_info().expect("answers");
    if free < bytes + (1 << 30) {
        eprintln!(
            "offsets_beyond_two_to_the_31_are_right: skipped, it needs {} GiB of device memory",
            bytes >> 30
        );
        return;
    }
    let tail = Case { packed: &[], b: 1, t: SHORT, ..far.clone() };
    let problem = Problem::new::<bf16>(&tail);
    let want = problem.outputs(&tail);
    let single = |values: &[f64]| {
        let values: Vec<f32> = values.iter().map(|x| *x as f32).collect();
        stream.clone_htod(&values).expect("copies")
    };
    let shifted = |values: &[f64]| {
        let values: Vec<bf16> = values.iter().map(|x| bf16::from_f64(*x)).collect();
        let mut all = stream.alloc_zeros::<bf16>(far.shape().token_len()).expect("fits");
        stream.memcpy_htod(&values, &mut all.slice_mut(LONG * C..)).expect("copies");
        all
    };
    let (w, u, k, v) = (single(&problem.w), single(&problem.u), shifted(&problem.k), shifted(&problem.v));
    let x = ChunkFwdInputs { w: &w, u: &u, k: &k, v: &v, initial_state: None };
    let y = chunk_fwd(&device, &far.shape(), &x, &ChunkFwdOptions::new()).expect("runs");
    let o = stream.clone_dtoh(&y.o.slice(LONG * C..)).expect("copies");
    let judge = Judge { pass: Pass::ChunkFwd, name: "o", class: Class::Output };
    assert_eq!(judge.within::<bf16>(1, &widened(&o), &want.o), Ok(()));
}

#[test]
fn wrong_arguments_are_named_before_anything_is_launched() {
    let Some((device, stream)) = gpu("wrong_arguments_are_named_before_anything_is_launched") else { return };
    let shape = Shape { seqs: SeqLens::dense(1, 2), c: 64 };
    let plan = ChunkFwd::<f32>::new(&device, &shape, &ChunkFwdOptions::new()).expect("valid");
    let good = |len| stream.alloc_zeros::<f32>(len).expect("fits");
    let (w, k, s) = (good(64), good(128), good(3 * 64));
    let (bad, odd) = (good(127), good(129));
    let misaligned = odd.slice(1..);
    type Spoil<'a> = (&'static str, fn(&mut ChunkFwdInputs<'a, f32>, &'a dyn DevicePtr<f32>));
    let spoils: [Spoil<'_>; 5] = [
        ("w", |x, bad| x.w = bad),
        ("u", |x, bad| x.u = bad),
        ("k", |x, bad| x.k = bad),
        ("v", |x, bad| x.v = bad),
        ("initial_state", |x, bad| x.initial_state = Some(bad)),
    ];
    let x = ChunkFwdInputs { w: &w, u: &w, k: &k, v: &k, initial_state: Some(&s) };
    let mut o = Guarded::<f32>::output(&stream, "o", 128);
    for (name, spoil) in spoils {
        let mut x = x;
        spoil(&mut x, &bad);
        let mut view = o.view_mut();
        let mut y = ChunkFwdOutputs { o: &mut view, final_state: None, states: None };
        let text = plan.run(&stream, &x, &mut y).expect_err(name).to_string();
        assert!(text.starts_with(&format!("`{name}` is [")) && text.ends_with("but holds 127"), "{text}");
    }
    let x_odd = ChunkFwdInputs { k: &misaligned, ..x };
    let mut view = o.view_mut();
    let mut y = ChunkFwdOutputs { o: &mut view, final_state: None, states: None };
    let error = plan.run(&stream, &x_odd, &mut y);
    assert!(matches!(error, Err(Error::Align { tensor: "k", wanted: 16, .. })), "{error:?}");
    let (mut short, mut spare) = (good(3), good(128));
    let mut y = ChunkFwdOutputs { o: &mut short, final_state: None, states: None };
    let error = plan.run(&stream, &x, &mut y);
    assert!(matches!(error, Err(Error::Len { tensor: "o", wanted: 128, got: 3, .. })), "{error:?}");
    let mut y = ChunkFwdOutputs { o: &mut spare, final_state: Some(&mut short), states: None };
    let error = plan.run(&stream, &x, &mut y);
    assert!(matches!(error, Err(Error::Len { tensor: "final_state", .. })), "{error:?}");
    let mut y = ChunkFwdOutputs { o: &mut spare, final_state: None, states: Some(&mut short) };
    let error = plan.run(&stream, &x, &mut y);
    assert!(matches!(error, Err(Error::Len { tensor: "states", .. })), "{error:?}");
    // None of the refused calls has written anything.
    assert!(o.read().iter().all(|x| x.is_nan()));

    for (shape, text) in [
        (Shape { c: 0, ..shape.clone() }, "C must be from 1 to 1048576, but is 0"),
        (Shape { c: (1 << 20) + 1, ..shape }, "C must be from 1 to 1048576, but is 1048577"),
    ] {
        let error = ChunkFwd::<f32>::new(&device, &shape, &ChunkFwdOptions::new()).expect_err(text);
        assert_eq!(error.to_string(), text);
    }
}

#[test]
fn a_captured_graph_gives_the_same_bits() {
    let Some((device, _)) = gpu("a_captured_graph_gives_the_same_bits") else { return };
    // Event tracking belongs to a context, and other tests run on the shared one.
    let bench = fla_core::testing::Bench::open().expect("opens");
    let stream = bench.stream().clone();
    let case = Case { t: 300, ..BASE };
    let problem = Problem::new::<bf16>(&case);
    let got = run::<bf16>(&device, &stream, &case, &problem).expect("runs");
    let single = |values: &[f64]| {
        let values: Vec<f32> = values.iter().map(|x| *x as f32).collect();
        stream.clone_htod(&values).expect("copies")
    };
    let half = |values: &[f64]| {
        let values: Vec<bf16> = values.iter().map(|x| bf16::from_f64(*x)).collect();
        stream.clone_htod(&values).expect("copies")
    };
    let initial = single(problem.initial_state.as_ref().expect("given"));
    let (w, u, k, v) = (single(&problem.w), single(&problem.u), half(&problem.k), half(&problem.v));
    let plan = ChunkFwd::<bf16>::new(&device, &case.shape(), &ChunkFwdOptions::new()).expect("valid");
    let mut o = stream.alloc_zeros::<bf16>(got.o.len()).expect("fits");
    let replay = bench
        .capture(1, |stream, _| {
            let x = ChunkFwdInputs { w: &w, u: &u, k: &k, v: &v, initial_state: Some(&initial) };
            plan.run(stream, &x, &mut ChunkFwdOutputs { o: &mut o, final_state: None, states: None })
        })
        .expect("captures");
    for _ in 0..2 {
        replay.time(1);
    }
    assert_eq!(same_bits("o", &got.o, &stream.clone_dtoh(&o).expect("copies")), Ok(()));
}
