//! `chunk_bwd` on the GPU against the float64 gradients, from states that were kept and from states computed again.

mod problem;

use std::sync::Arc;

use fla_core::cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut};
use fla_core::testing::{Bench, Bits, Guarded, Poison, compile_ahead, gpu, run_cases, same_bits};
use fla_core::{Device, Error, SeqLens, Shape};
use fla_dplr::{
    ChunkBwd, ChunkBwdInputs, ChunkBwdOutputs, ChunkFwd, ChunkFwdInputs, ChunkFwdOptions, ChunkFwdOutputs,
    SavedStates, chunk_bwd, chunk_fwd,
};
use fla_reference::inputs::Storage;
use fla_reference::tolerance::{Class, Pass};
use half::{bf16, f16};
use problem::{BASE, CASES, Case, GRADS, Judge, Problem, any_case, regimes, to_device, widened};
use proptest::prelude::{ProptestConfig, proptest};

/// The gradients over tokens, and that of the initial state.
struct Got<T> {
    over_tokens: [Vec<T>; 6],
    d_initial_state: Vec<f32>,
}

impl<T: Poison> Got<T> {
    fn same_as(&self, other: &Self) -> Result<(), String> {
        for ((name, _), (x, y)) in GRADS.iter().zip(self.over_tokens.iter().zip(&other.over_tokens)) {
            same_bits(name, x, y)?;
        }
        same_bits("d_initial_state", &self.d_initial_state, &other.d_initial_state)
    }
}

/// One run on poisoned buffers; states that are kept come from the forward pass.
fn run<T: Poison>(
    device: &Device,
    stream: &Arc<CudaStream>,
    case: &Case,
    problem: &Problem,
    saved_states: SavedStates,
) -> Result<Got<T>, Error> {
    let (shape, options) = (case.shape(), case.options(saved_states));
    let inputs = problem.vectors.each_ref().map(|x| to_device::<T>(stream, "an input", x));
    let state = |s: &Option<Vec<f64>>| s.as_ref().map(|s| to_device::<f32>(stream, "a state", s));
    let (initial, d_final) = (state(&problem.initial_state), state(&problem.d_final_state));
    let views = inputs.each_ref().map(Guarded::view);
    let [q, k, v, a, b, g, d_o] = &views;
    let (initial, d_final) = (initial.as_ref().map(Guarded::view), d_final.as_ref().map(Guarded::view));
    let initial_state = initial.as_ref().map(|s| s as &dyn DevicePtr<f32>);
    let d_final_state = d_final.as_ref().map(|s| s as &dyn DevicePtr<f32>);

    let plan = ChunkBwd::<T>::new(device, &shape, &options)?;
    let states = match saved_states {
        SavedStates::Recomputed => None,
        SavedStates::Kept => {
            let mut o = Guarded::<T>::output(stream, "o", shape.v_len());
            let mut states = Bits::new(stream, plan.states_len(), u16::MAX);
            let forward = ChunkFwd::<T>::new(device, &shape, &options)?;
            assert_eq!(forward.states_len(), plan.states_len());
            let x = ChunkFwdInputs { q, k, v, a, b, g, initial_state };
            let mut view = states.view_mut();
            let mut y = ChunkFwdOutputs { o: &mut o.view_mut(), final_state: None, states: Some(&mut view) };
            let mut workspace = Bits::new(stream, forward.workspace_bytes(), u8::MAX);
            forward.run(stream, &x, &mut y, &mut workspace.view_mut())?;
            states.read("states");
            Some(states)
        }
    };
    let (k_len, v_len) = (shape.k_len(), shape.v_len());
    let mut grads =
        [("dq", k_len), ("dk", k_len), ("dv", v_len), ("da", k_len), ("db", k_len), ("dg", k_len)]
            .map(|(name, len)| Guarded::<T>::output(stream, name, len));
    let mut d_initial = Guarded::<f32>::output(stream, "d_initial_state", shape.state_len());
    // Nothing may be read in the workspace before it is written.
    let mut workspace = Bits::new(stream, plan.workspace_bytes(), u8::MAX);
    {
        let states = states.as_ref().map(Bits::view);
        let states = states.as_ref().map(|s| s as &dyn DevicePtr<u16>);
        let x = ChunkBwdInputs { q, k, v, a, b, g, initial_state, states, d_o, d_final_state };
        let mut grads = grads.each_mut().map(Guarded::view_mut);
        let [dq, dk, dv, da, db, dg] = &mut grads;
        let mut d_initial = d_initial.view_mut();
        let d_initial_state: Option<&mut dyn DevicePtrMut<f32>> = Some(&mut d_initial);
        let mut dx = ChunkBwdOutputs { dq, dk, dv, da, db, dg, d_initial_state };
        plan.run(stream, &x, &mut dx, &mut workspace.view_mut())?;
    }
    workspace.read("workspace");
    Ok(Got { over_tokens: grads.map(|mut x| x.read()), d_initial_state: d_initial.read() })
}

fn check<T: Poison + Storage>(device: &Device, stream: &Arc<CudaStream>, case: &Case) -> Result<(), String> {
    let problem = Problem::new::<T>(case);
    let want = problem.grads(case);
    let once = |saved_states| {
        run::<T>(device, stream, case, &problem, saved_states).map_err(|error| error.to_string())
    };
    let (got, again) = (once(SavedStates::Recomputed)?, once(SavedStates::Recomputed)?);
    got.same_as(&again)?;
    got.same_as(&once(SavedStates::Kept)?).map_err(|error| format!("with states that were kept: {error}"))?;
    let wide = got.over_tokens.iter().map(|x| widened(x)).chain([widened(&got.d_initial_state)]);
    for ((got, wanted), (name, class)) in wide.zip(&want.grads).zip(GRADS) {
        let judge = Judge { keys: case.keys, pass: Pass::ChunkBwd, name, class };
        let cancellation = if class == Class::GateGrad { want.cancellation } else { 1.0 };
        judge.within_relieved::<T>(&got, wanted, cancellation)?;
    }
    Ok(())
}

fn check_all_dtypes(device: &Device, stream: &Arc<CudaStream>, case: &Case) -> Result<(), String> {
    check::<bf16>(device, stream, case).map_err(|error| format!("bf16: {error}"))?;
    check::<f32>(device, stream, case).map_err(|error| format!("f32: {error}"))?;
    check::<f16>(device, stream, case).map_err(|error| format!("f16: {error}"))
}

#[test]
fn chunk_bwd_matches_reference() {
    let Some((device, stream)) = gpu("chunk_bwd_matches_reference") else { return };
    compile_ahead(
        CASES,
        |case| case.name.into(),
        |case| {
            let (shape, options) = (case.shape(), case.options(SavedStates::Recomputed));
            drop(ChunkBwd::<bf16>::new(&device, &shape, &options)?);
            drop(ChunkBwd::<f32>::new(&device, &shape, &options)?);
            ChunkBwd::<f16>::new(&device, &shape, &options)
        },
    );
    run_cases(CASES, |case| case.name.into(), |case| check_all_dtypes(&device, &stream, case));
}

#[test]
fn chunk_bwd_survives_every_gate_regime() {
    let Some((device, stream)) = gpu("chunk_bwd_survives_every_gate_regime") else { return };
    run_cases(
        &regimes(),
        |case| format!("{:?}", case.gates),
        |case| check_all_dtypes(&device, &stream, case),
    );
}

proptest! {
    // Every new K and V compiles kernels, so a few cases a run; the seed changes from run to run.
    #![proptest_config(ProptestConfig { cases: 8, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn chunk_bwd_matches_reference_for_any_shape(case in any_case()) {
        if let Some((device, stream)) = gpu("chunk_bwd_matches_reference_for_any_shape") {
            let result = check::<bf16>(&device, &stream, &case).and_then(|()| check::<f32>(&device, &stream, &case));
            assert_eq!(result, Ok(()), "{case:?}");
        }
    }
}

/// q, k, v, a, b, g and d_o on the device, for calls that need no guards.
fn tensors(stream: &Arc<CudaStream>, problem: &Problem) -> [CudaSlice<bf16>; 7] {
    problem.vectors.each_ref().map(|x| {
        let values: Vec<bf16> = x.iter().map(|x| bf16::from_f64(*x)).collect();
        stream.clone_htod(&values).expect("copies")
    })
}

#[test]
fn the_one_call_forms_and_captured_graphs_give_the_plans_bits() {
    let Some((device, _)) = gpu("the_one_call_forms_and_captured_graphs_give_the_plans_bits") else { return };
    // Event tracking belongs to a context, and other tests run on the shared one.
    let bench = Bench::open().expect("opens");
    let stream = bench.stream().clone();
    let case = Case { t: 100, initial_state: false, final_state: false, ..BASE };
    let problem = Problem::new::<bf16>(&case);
    let want = run::<bf16>(&device, &stream, &case, &problem, SavedStates::Recomputed).expect("runs");
    let [q, k, v, a, b, g, d_o] = tensors(&stream, &problem);
    let read = |x: &CudaSlice<bf16>| stream.clone_dtoh(x).expect("copies");
    for saved_states in [SavedStates::Recomputed, SavedStates::Kept] {
        let options = case.options(saved_states);
        let x = ChunkFwdInputs { q: &q, k: &k, v: &v, a: &a, b: &b, g: &g, initial_state: None };
        let y = chunk_fwd(&device, &case.shape(), &x, &options).expect("runs");
        let x = ChunkBwdInputs {
            q: &q,
            k: &k,
            v: &v,
            a: &a,
            b: &b,
            g: &g,
            initial_state: None,
            states: y.states.as_ref().map(|states| states as &dyn DevicePtr<u16>),
            d_o: &d_o,
            d_final_state: None,
        };
        let mut dx = chunk_bwd(&device, &case.shape(), &x, &options).expect("runs");
        let got = Got {
            over_tokens: [&dx.dq, &dx.dk, &dx.dv, &dx.da, &dx.db, &dx.dg].map(read),
            d_initial_state: stream.clone_dtoh(&dx.d_initial_state).expect("copies"),
        };
        assert_eq!(want.same_as(&got), Ok(()), "{saved_states:?}");

        let plan = ChunkBwd::<bf16>::new(&device, &case.shape(), &options).expect("valid");
        let mut workspace = stream.alloc_zeros::<u8>(plan.workspace_bytes()).expect("fits");
        stream.memset_zeros(&mut dx.dg).expect("is set");
        let replay = bench
            .capture(1, |stream, _| {
                let mut outputs = ChunkBwdOutputs {
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
        assert_eq!(same_bits("dg", &want.over_tokens[5], &read(&dx.dg)), Ok(()), "{saved_states:?}");
    }
}

#[test]
fn heads_that_go_in_shares_give_the_same_bits() {
    let Some((device, stream)) = gpu("heads_that_go_in_shares_give_the_same_bits") else { return };
    let sm_count = device.sm_count() as usize;
    // Enough chunks that their memory counts, and enough heads that several turns of the device are several shares.
    let tokens = |heads: usize| 16 * (64 << 20) / ((64 + 16) * 64 * 2 * heads) + 16;
    let lens: Vec<usize> = (0..2 * sm_count).map(|i| i * 37 % 160).collect();
    assert!(lens.iter().sum::<usize>() > tokens(8), "packed sequences are too short for shares");
    for case in [
        Case { name: "dense", b: sm_count, t: tokens(4 * sm_count), h: 4, ..BASE },
        Case { name: "packed", packed: lens.leak(), h: 8, ..BASE },
    ] {
        let plan =
            |saved| ChunkBwd::<bf16>::new(&device, &case.shape(), &case.options(saved)).expect("valid");
        let (bytes, kept) =
            (plan(SavedStates::Recomputed).workspace_bytes(), 2 * plan(SavedStates::Kept).states_len());
        assert!(bytes <= kept / 2, "{}: {bytes} bytes of {kept} are no share", case.name);
        let problem = Problem::new::<bf16>(&case);
        let [recomputed, kept] = [SavedStates::Recomputed, SavedStates::Kept]
            .map(|saved| run::<bf16>(&device, &stream, &case, &problem, saved).expect("runs"));
        assert_eq!(recomputed.same_as(&kept), Ok(()), "{}", case.name);
    }
}

#[test]
fn wrong_arguments_are_named_before_anything_is_launched() {
    let Some((device, stream)) = gpu("wrong_arguments_are_named_before_anything_is_launched") else { return };
    let shape = Shape { seqs: SeqLens::dense(1, 2), h: 1, k: 64, v: 32 };
    let options = ChunkFwdOptions::new(1.0);
    let plan = ChunkBwd::<f32>::new(&device, &shape, &options).expect("valid");
    let good = |len| stream.alloc_zeros::<f32>(len).expect("fits");
    let (k, v, s) = (good(128), good(64), good(64 * 32));
    let (bad, odd) = (good(127), good(129));
    let misaligned = odd.slice(1..);
    type Spoil<'a> = (&'static str, fn(&mut ChunkBwdInputs<'a, f32>, &'a dyn DevicePtr<f32>));
    let spoils: [Spoil<'_>; 9] = [
        ("q", |x, bad| x.q = bad),
        ("k", |x, bad| x.k = bad),
        ("v", |x, bad| x.v = bad),
        ("a", |x, bad| x.a = bad),
        ("b", |x, bad| x.b = bad),
        ("g", |x, bad| x.g = bad),
        ("initial_state", |x, bad| x.initial_state = Some(bad)),
        ("d_o", |x, bad| x.d_o = bad),
        ("d_final_state", |x, bad| x.d_final_state = Some(bad)),
    ];
    let x = ChunkBwdInputs {
        q: &k,
        k: &k,
        v: &v,
        a: &k,
        b: &k,
        g: &k,
        initial_state: Some(&s),
        states: None,
        d_o: &v,
        d_final_state: Some(&s),
    };
    let mut dq = Guarded::<f32>::output(&stream, "dq", 128);
    let (mut dk, mut dv, mut da, mut db, mut dg) = (good(128), good(64), good(128), good(128), good(128));
    let mut d_initial = good(64 * 32);
    let mut workspace = stream.alloc_zeros::<u8>(plan.workspace_bytes()).expect("fits");
    let mut spoilt = |x: &ChunkBwdInputs<'_, f32>, output: &str, bad: &mut dyn DevicePtrMut<f32>| {
        let mut view = dq.view_mut();
        let mut dx = ChunkBwdOutputs {
            dq: &mut view,
            dk: &mut dk,
            dv: &mut dv,
            da: &mut da,
            db: &mut db,
            dg: &mut dg,
            d_initial_state: Some(&mut d_initial),
        };
        match output {
            "dq" => dx.dq = bad,
            "dk" => dx.dk = bad,
            "dv" => dx.dv = bad,
            "da" => dx.da = bad,
            "db" => dx.db = bad,
            "dg" => dx.dg = bad,
            "d_initial_state" => dx.d_initial_state = Some(bad),
            _ => {}
        }
        plan.run(&stream, x, &mut dx, &mut workspace).expect_err("is refused").to_string()
    };
    let mut short = good(127);
    for (name, spoil) in spoils {
        let mut x = x;
        spoil(&mut x, &bad);
        let text = spoilt(&x, "", &mut short);
        assert!(text.starts_with(&format!("`{name}` is [")) && text.ends_with("but holds 127"), "{text}");
    }
    for (name, _) in GRADS {
        let text = spoilt(&x, name, &mut short);
        assert!(text.starts_with(&format!("`{name}` is [")) && text.ends_with("but holds 127"), "{text}");
    }
    // Those that only the second launch reads or writes are refused before the first.
    let odd_v = odd.slice(1..65);
    let text = spoilt(&ChunkBwdInputs { d_o: &odd_v, ..x }, "", &mut short);
    assert!(text.starts_with("`d_o` must lie at a multiple of 16 bytes"), "{text}");
    let text = spoilt(&ChunkBwdInputs { k: &misaligned, ..x }, "", &mut short);
    assert!(text.starts_with("`k` must lie at a multiple of 16 bytes"), "{text}");
    let mut odd_out = good(129);
    let text = spoilt(&x, "dg", &mut odd_out.slice_mut(1..));
    assert!(text.starts_with("`dg` must lie at a multiple of 16 bytes"), "{text}");
    let states = stream.alloc_zeros::<u16>(plan.states_len()).expect("fits");
    let text = spoilt(&ChunkBwdInputs { states: Some(&states), ..x }, "", &mut short);
    assert_eq!(text, "`states` must be absent, since the plan recomputes states");
    // None of the refused calls has written anything.
    assert!(dq.read().iter().all(|x| x.is_nan()));

    let mut dq = good(128);
    let mut dx = ChunkBwdOutputs {
        dq: &mut dq,
        dk: &mut dk,
        dv: &mut dv,
        da: &mut da,
        db: &mut db,
        dg: &mut dg,
        d_initial_state: None,
    };
    let mut little = stream.alloc_zeros::<u8>(plan.workspace_bytes() - 1).expect("fits");
    let error = plan.run(&stream, &x, &mut dx, &mut little);
    assert!(matches!(error, Err(Error::Len { tensor: "workspace", .. })), "{error:?}");

    let kept = ChunkBwd::<f32>::new(&device, &shape, &options.clone().with_saved_states(SavedStates::Kept))
        .expect("valid");
    assert!(kept.workspace_bytes() < plan.workspace_bytes());
    let error = kept.run(&stream, &x, &mut dx, &mut workspace).expect_err("states are missing");
    assert_eq!(error.to_string(), "`states` must be given, since the plan is for states that are kept");
    let few = states.slice(1..);
    let error = kept.run(&stream, &ChunkBwdInputs { states: Some(&few), ..x }, &mut dx, &mut workspace);
    assert!(matches!(error, Err(Error::Len { tensor: "states", .. })), "{error:?}");

    let on_device = Shape { seqs: SeqLens::packed_on_device(1, 2), ..shape };
    let error = ChunkBwd::<f32>::new(&device, &on_device, &options);
    assert!(matches!(error, Err(Error::SeqLens { .. })), "{error:?}");
}
