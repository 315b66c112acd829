//! `chunk_fwd` on the GPU against the float64 recurrence.

mod problem;

use std::sync::Arc;

use fla_core::cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut};
use fla_core::testing::{Bench, Bits, Guarded, Poison, compile_ahead, gpu, run_cases, same_bits};
use fla_core::{Device, Error, SeqLens, Shape};
use fla_dplr::{ChunkFwd, ChunkFwdInputs, ChunkFwdOptions, ChunkFwdOutputs, SavedStates, chunk_fwd};
use fla_reference::inputs::Storage;
use fla_reference::tolerance::{Class, Pass};
use half::{bf16, f16};
use problem::{BASE, CASES, Case, Judge, Keys, Problem, any_case, regimes, to_device, widened};
use proptest::prelude::{ProptestConfig, proptest};

/// What a run returned.
struct Got<T> {
    o: Vec<T>,
    final_state: Option<Vec<f32>>,
    states: Option<Vec<u16>>,
}

/// One run on poisoned buffers.
fn run<T: Poison>(
    device: &Device,
    stream: &Arc<CudaStream>,
    case: &Case,
    problem: &Problem,
    saved_states: SavedStates,
) -> Result<Got<T>, Error> {
    let shape = case.shape();
    let inputs = problem.vectors.each_ref().map(|x| to_device::<T>(stream, "an input", x));
    let initial = problem.initial_state.as_ref().map(|s| to_device::<f32>(stream, "initial_state", s));
    let mut o = Guarded::<T>::output(stream, "o", shape.v_len());
    let mut last = case.final_state.then(|| Guarded::<f32>::output(stream, "final_state", shape.state_len()));

    let plan = ChunkFwd::<T>::new(device, &shape, &case.options(saved_states))?;
    let mut states =
        (saved_states == SavedStates::Kept).then(|| Bits::new(stream, plan.states_len(), u16::MAX));
    // Nothing may be read in the workspace before it is written.
    let mut workspace = Bits::new(stream, plan.workspace_bytes(), u8::MAX);
    {
        let views = inputs.each_ref().map(Guarded::view);
        let [q, k, v, a, b, g, _] = &views;
        let initial = initial.as_ref().map(Guarded::view);
        let initial_state = initial.as_ref().map(|s| s as &dyn DevicePtr<f32>);
        let x = ChunkFwdInputs { q, k, v, a, b, g, initial_state };
        let (mut o, mut last) = (o.view_mut(), last.as_mut().map(Guarded::view_mut));
        let mut states = states.as_mut().map(Bits::view_mut);
        let final_state = last.as_mut().map(|s| s as &mut dyn DevicePtrMut<f32>);
        let states = states.as_mut().map(|s| s as &mut dyn DevicePtrMut<u16>);
        let mut y = ChunkFwdOutputs { o: &mut o, final_state, states };
        plan.run(stream, &x, &mut y, &mut workspace.view_mut())?;
    }
    workspace.read("workspace");
    let states = states.map(|states| states.read("states"));
    Ok(Got { o: o.read(), final_state: last.as_mut().map(Guarded::read), states })
}

fn check<T: Poison + Storage>(device: &Device, stream: &Arc<CudaStream>, case: &Case) -> Result<(), String> {
    let problem = Problem::new::<T>(case);
    let want = problem.outputs(case);
    let once = |saved_states| {
        run::<T>(device, stream, case, &problem, saved_states).map_err(|error| error.to_string())
    };
    let (got, again, plain) =
        (once(SavedStates::Kept)?, once(SavedStates::Kept)?, once(SavedStates::Recomputed)?);
    same_bits("o", &got.o, &again.o)?;
    same_bits("o without states", &got.o, &plain.o)?;
    if got.states != again.states {
        return Err("`states` are not the same twice".into());
    }
    let judge = |name, class| Judge { keys: case.keys, pass: Pass::ChunkFwd, name, class };
    judge("o", Class::Output).within::<T>(&widened(&got.o), &want.o)?;
    if let (Some(last), Some(again), Some(plain)) = (&got.final_state, &again.final_state, &plain.final_state)
    {
        same_bits("final_state", last, again)?;
        same_bits("final_state without states", last, plain)?;
        judge("final_state", Class::FinalState).within::<T>(&widened(last), &want.final_state)?;
    }
    Ok(())
}

fn check_all_dtypes(device: &Device, stream: &Arc<CudaStream>, case: &Case) -> Result<(), String> {
    check::<bf16>(device, stream, case).map_err(|error| format!("bf16: {error}"))?;
    check::<f32>(device, stream, case).map_err(|error| format!("f32: {error}"))?;
    check::<f16>(device, stream, case).map_err(|error| format!("f16: {error}"))
}

#[test]
fn chunk_fwd_matches_reference() {
    let Some((device, stream)) = gpu("chunk_fwd_matches_reference") else { return };
    compile_ahead(
        CASES,
        |case| case.name.into(),
        |case| {
            let (shape, options) = (case.shape(), case.options(SavedStates::Recomputed));
            drop(ChunkFwd::<bf16>::new(&device, &shape, &options)?);
            drop(ChunkFwd::<f32>::new(&device, &shape, &options)?);
            ChunkFwd::<f16>::new(&device, &shape, &options)
        },
    );
    run_cases(CASES, |case| case.name.into(), |case| check_all_dtypes(&device, &stream, case));
}

#[test]
fn chunk_fwd_survives_every_gate_regime() {
    let Some((device, stream)) = gpu("chunk_fwd_survives_every_gate_regime") else { return };
    run_cases(
        &regimes(),
        |case| format!("{:?}", case.gates),
        |case| check_all_dtypes(&device, &stream, case),
    );
}

proptest! {
    // Every new K and V compiles a kernel, so a few cases a run; the seed changes from run to run.
    #![proptest_config(ProptestConfig { cases: 8, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn chunk_fwd_matches_reference_for_any_shape(case in any_case()) {
        if let Some((device, stream)) = gpu("chunk_fwd_matches_reference_for_any_shape") {
            let result = check::<bf16>(&device, &stream, &case).and_then(|()| check::<f32>(&device, &stream, &case));
            assert_eq!(result, Ok(()), "{case:?}");
        }
    }
}

/// Device tensors of a problem, for calls that need no guards: q, k, v, a, b, g, and the initial state.
fn tensors(stream: &Arc<CudaStream>, problem: &Problem) -> ([CudaSlice<bf16>; 6], CudaSlice<f32>) {
    let [q, k, v, a, b, g, _] = problem.vectors.each_ref().map(|x| {
        let values: Vec<bf16> = x.iter().map(|x| bf16::from_f64(*x)).collect();
        stream.clone_htod(&values).expect("copies")
    });
    let initial: Vec<f32> = problem.initial_state.iter().flatten().map(|x| *x as f32).collect();
    ([q, k, v, a, b, g], stream.clone_htod(&initial).expect("copies"))
}

#[test]
fn the_one_call_form_gives_the_plans_bits() {
    let Some((device, stream)) = gpu("the_one_call_form_gives_the_plans_bits") else { return };
    let problem = Problem::new::<bf16>(&BASE);
    let got = run::<bf16>(&device, &stream, &BASE, &problem, SavedStates::Kept).expect("runs");
    let ([q, k, v, a, b, g], initial) = tensors(&stream, &problem);
    let x = ChunkFwdInputs { q: &q, k: &k, v: &v, a: &a, b: &b, g: &g, initial_state: Some(&initial) };
    let y = chunk_fwd(&device, &BASE.shape(), &x, &BASE.options(SavedStates::Kept)).expect("runs");
    assert_eq!(same_bits("o", &got.o, &stream.clone_dtoh(&y.o).expect("copies")), Ok(()));
    let last = stream.clone_dtoh(&y.final_state).expect("copies");
    assert_eq!(same_bits("final_state", &got.final_state.expect("asked for"), &last), Ok(()));
    let states = y.states.map(|states| stream.clone_dtoh(&states).expect("copies"));
    assert_eq!(got.states, states);
    let y = chunk_fwd(&device, &BASE.shape(), &x, &BASE.options(SavedStates::Recomputed)).expect("runs");
    assert!(y.states.is_none());
}

#[test]
fn a_captured_graph_gives_the_same_bits() {
    let Some((device, _)) = gpu("a_captured_graph_gives_the_same_bits") else { return };
    // Event tracking belongs to a context, and other tests run on the shared one.
    let bench = Bench::open().expect("opens");
    let stream = bench.stream().clone();
    let case = Case { t: 100, ..BASE };
    let problem = Problem::new::<bf16>(&case);
    let got = run::<bf16>(&device, &stream, &case, &problem, SavedStates::Recomputed).expect("runs");
    let ([q, k, v, a, b, g], initial) = tensors(&stream, &problem);
    let plan =
        ChunkFwd::<bf16>::new(&device, &case.shape(), &case.options(SavedStates::Recomputed)).expect("valid");
    let mut o = stream.alloc_zeros::<bf16>(got.o.len()).expect("fits");
    let mut workspace = stream.alloc_zeros::<u8>(plan.workspace_bytes()).expect("fits");
    let replay = bench
        .capture(1, |stream, _| {
            let x =
                ChunkFwdInputs { q: &q, k: &k, v: &v, a: &a, b: &b, g: &g, initial_state: Some(&initial) };
            let mut y = ChunkFwdOutputs { o: &mut o, final_state: None, states: None };
            plan.run(stream, &x, &mut y, &mut workspace)
        })
        .expect("captures");
    for _ in 0..2 {
        replay.time(1);
    }
    assert_eq!(same_bits("o", &got.o, &stream.clone_dtoh(&o).expect("copies")), Ok(()));
}

#[test]
fn offsets_beyond_two_to_the_31_are_right() {
    const H: usize = 64;
    const LONG: usize = (1 << 31) / (H * 64);
    const SHORT: usize = 21;
    let Some((device, stream)) = gpu("offsets_beyond_two_to_the_31_are_right") else { return };
    // A long first sequence of zeros pushes the second one past 2^31 elements.
    let case = Case { name: "far", packed: &[LONG, SHORT], h: H, ..BASE };
    let bytes = 7 * case.shape().k_len() * size_of::<bf16>();
    let (free, _) = device.context().mem_get_info().expect("answers");
    if free < bytes + (1 << 30) {
        eprintln!(
            "offsets_beyond_two_to_the_31_are_right: skipped, it needs {} GiB of device memory",
            bytes >> 30
        );
        return;
    }
    let tail = Case { name: "tail", b: 1, t: SHORT, h: H, initial_state: false, ..BASE };
    let problem = Problem::new::<bf16>(&tail);
    let want = problem.outputs(&tail);
    let start = LONG * H * 64;
    let [q, k, v, a, b, g, _] = problem.vectors.each_ref().map(|values| {
        let values: Vec<bf16> = values.iter().map(|x| bf16::from_f64(*x)).collect();
        let mut all = stream.alloc_zeros::<bf16>(case.shape().k_len()).expect("fits");
        stream.memcpy_htod(&values, &mut all.slice_mut(start..start + values.len())).expect("copies");
        all
    });
    let x = ChunkFwdInputs { q: &q, k: &k, v: &v, a: &a, b: &b, g: &g, initial_state: None };
    let y = chunk_fwd(&device, &case.shape(), &x, &case.options(SavedStates::Recomputed)).expect("runs");
    let o = stream.clone_dtoh(&y.o.slice(start..)).expect("copies");
    let judge = Judge { keys: Keys::Random, pass: Pass::ChunkFwd, name: "o", class: Class::Output };
    assert_eq!(judge.within::<bf16>(&widened(&o), &want.o), Ok(()));
}

#[test]
fn wrong_arguments_are_named_before_anything_is_launched() {
    let Some((device, stream)) = gpu("wrong_arguments_are_named_before_anything_is_launched") else { return };
    let shape = Shape { seqs: SeqLens::dense(1, 2), h: 1, k: 64, v: 32 };
    let options = ChunkFwdOptions::new(1.0);
    let plan = ChunkFwd::<f32>::new(&device, &shape, &options).expect("valid");
    let good = |len| stream.alloc_zeros::<f32>(len).expect("fits");
    let (k, v, s) = (good(128), good(64), good(64 * 32));
    let (bad, odd) = (good(127), good(129));
    let misaligned = odd.slice(1..);
    type Spoil<'a> = (&'static str, fn(&mut ChunkFwdInputs<'a, f32>, &'a dyn DevicePtr<f32>));
    let spoils: [Spoil<'_>; 7] = [
        ("q", |x, bad| x.q = bad),
        ("k", |x, bad| x.k = bad),
        ("v", |x, bad| x.v = bad),
        ("a", |x, bad| x.a = bad),
        ("b", |x, bad| x.b = bad),
        ("g", |x, bad| x.g = bad),
        ("initial_state", |x, bad| x.initial_state = Some(bad)),
    ];
    let x = ChunkFwdInputs { q: &k, k: &k, v: &v, a: &k, b: &k, g: &k, initial_state: Some(&s) };
    let mut o = Guarded::<f32>::output(&stream, "o", 64);
    let mut workspace = stream.alloc_zeros::<u8>(plan.workspace_bytes()).expect("fits");
    for (name, spoil) in spoils {
        let mut x = x;
        spoil(&mut x, &bad);
        let mut view = o.view_mut();
        let mut y = ChunkFwdOutputs { o: &mut view, final_state: None, states: None };
        let text = plan.run(&stream, &x, &mut y, &mut workspace).expect_err(name).to_string();
        assert!(text.starts_with(&format!("`{name}` is [")) && text.ends_with("but holds 127"), "{text}");
    }
    let x_odd = ChunkFwdInputs { k: &misaligned, ..x };
    let mut view = o.view_mut();
    let mut y = ChunkFwdOutputs { o: &mut view, final_state: None, states: None };
    let error = plan.run(&stream, &x_odd, &mut y, &mut workspace);
    assert!(matches!(error, Err(Error::Align { tensor: "k", wanted: 16, .. })), "{error:?}");
    let (mut short, mut spare) = (good(3), good(64));
    let mut y = ChunkFwdOutputs { o: &mut short, final_state: None, states: None };
    let error = plan.run(&stream, &x, &mut y, &mut workspace);
    assert!(matches!(error, Err(Error::Len { tensor: "o", wanted: 64, got: 3, .. })), "{error:?}");
    let mut y = ChunkFwdOutputs { o: &mut spare, final_state: Some(&mut short), states: None };
    let error = plan.run(&stream, &x, &mut y, &mut workspace);
    assert!(matches!(error, Err(Error::Len { tensor: "final_state", .. })), "{error:?}");
    let mut few = stream.alloc_zeros::<u16>(plan.states_len() - 1).expect("fits");
    let kept = ChunkFwd::<f32>::new(&device, &shape, &options.clone().with_saved_states(SavedStates::Kept))
        .expect("valid");
    let mut y = ChunkFwdOutputs { o: &mut spare, final_state: None, states: Some(&mut few) };
    let error = kept.run(&stream, &x, &mut y, &mut workspace);
    assert!(matches!(error, Err(Error::Len { tensor: "states", .. })), "{error:?}");
    let text = plan.run(&stream, &x, &mut y, &mut workspace).expect_err("states are too many").to_string();
    assert_eq!(text, "`states` must be absent, since the plan does not keep states");
    y.states = None;
    let text = kept.run(&stream, &x, &mut y, &mut workspace).expect_err("states are missing").to_string();
    assert_eq!(text, "`states` must be given, since the plan is for states that are kept");
    let mut y = ChunkFwdOutputs { o: &mut spare, final_state: None, states: None };
    let error = plan.run(&stream, &x, &mut y, &mut stream.alloc_zeros::<u8>(1).expect("fits"));
    assert!(matches!(error, Err(Error::Len { tensor: "workspace", .. })), "{error:?}");
    // None of the refused calls has written anything.
    assert!(o.read().iter().all(|x| x.is_nan()));

    for (shape, options, text) in [
        (Shape { k: 0, ..shape.clone() }, options.clone(), "K must be from 1 to 128, but is 0"),
        (Shape { k: 129, ..shape.clone() }, options.clone(), "K must be from 1 to 128, but is 129"),
        (Shape { v: 257, ..shape.clone() }, options.clone(), "V must be from 1 to 256, but is 257"),
        (Shape { h: 0, ..shape.clone() }, options.clone(), "H must be from 1 to 2147483647, but is 0"),
        (shape.clone(), ChunkFwdOptions::new(f32::NAN), "option `scale` must be finite, but is NaN"),
    ] {
        let error = ChunkFwd::<f32>::new(&device, &shape, &options).expect_err(text);
        assert_eq!(error.to_string(), text);
    }
    let error =
        ChunkFwd::<bf16>::new(&device, &Shape { k: 257, ..shape.clone() }, &options).expect_err("K is 257");
    assert_eq!(error.to_string(), "K must be from 1 to 256, but is 257");
    let many = Shape { seqs: SeqLens::dense(1 << 31, 1), ..shape.clone() };
    let error = ChunkFwd::<f32>::new(&device, &many, &options);
    assert!(matches!(error, Err(Error::Dim { dim: "N * H", .. })), "{error:?}");
    let on_device = Shape { seqs: SeqLens::packed_on_device(1, 2), ..shape };
    let error = ChunkFwd::<f32>::new(&device, &on_device, &options);
    assert!(matches!(error, Err(Error::SeqLens { .. })), "{error:?}");
}

#[test]
fn saved_states_are_as_many_as_chunks() {
    let Some((device, _)) = gpu("saved_states_are_as_many_as_chunks") else { return };
    let packed = |offsets: &[usize]| SeqLens::packed(offsets, offsets[offsets.len() - 1]).expect("valid");
    for (seqs, chunks) in [
        (SeqLens::dense(3, 16), 3),
        (SeqLens::dense(2, 17), 4),
        (SeqLens::dense(5, 0), 0),
        (packed(&[0, 0, 1, 17, 34]), 4),
    ] {
        let shape = Shape { seqs, h: 3, k: 60, v: 17 };
        let options = ChunkFwdOptions::new(1.0);
        let one_part = ChunkFwd::<bf16>::new(&device, &shape, &options).expect("valid").states_len();
        let two_parts = ChunkFwd::<f32>::new(&device, &shape, &options).expect("valid").states_len();
        assert_eq!(one_part, chunks * 3 * (64 + 16) * 32);
        assert_eq!(two_parts, 2 * one_part);
    }
}
