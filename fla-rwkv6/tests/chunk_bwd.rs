//! `chunk_bwd` on the GPU against the float64 gradients, from states that were kept and from states computed again.

mod problem;

use std::sync::Arc;

use fla_core::cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut};
use fla_core::testing::{Bench, Bits, Guarded, Poison, compile_ahead, gpu, run_cases, same_bits};
use fla_core::{Device, Error, SeqLens, Shape};
use fla_reference::inputs::Storage;
use fla_reference::tolerance::{Class, Pass};
use fla_rwkv6::{
    ChunkBwd, ChunkBwdInputs, ChunkBwdOutputs, ChunkFwd, ChunkFwdInputs, ChunkFwdOptions, ChunkFwdOutputs,
    SavedStates, chunk_bwd, chunk_fwd,
};
use half::{bf16, f16};
use problem::{BASE, CASES, Case, Judge, MAX_K, Problem, any_case, regimes, to_device, wide_heads, widened};
use proptest::prelude::{ProptestConfig, proptest};

/// The gradients over tokens: of r, k, v and w.
const NAMES: [&str; 4] = ["dr", "dk", "dv", "dw"];

/// The gradients over tokens; then those that are f32 always.
struct Got<T> {
    over_tokens: [Vec<T>; 4],
    du: Vec<f32>,
    d_initial_state: Vec<f32>,
}

impl<T: Poison> Got<T> {
    fn same_as(&self, other: &Self) -> Result<(), String> {
        for (name, (x, y)) in NAMES.iter().zip(self.over_tokens.iter().zip(&other.over_tokens)) {
            same_bits(name, x, y)?;
        }
        same_bits("du", &self.du, &other.du)?;
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
    let [r, k, v, w, u, d_o] = &views;
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
            let mut workspace = Bits::new(stream, forward.workspace_bytes(), u8::MAX);
            let x = ChunkFwdInputs { r, k, v, w, u, initial_state };
            let mut view = states.view_mut();
            let mut y = ChunkFwdOutputs { o: &mut o.view_mut(), final_state: None, states: Some(&mut view) };
            forward.run(stream, &x, &mut y, &mut workspace.view_mut())?;
            states.read("states");
            Some(states)
        }
    };
    let lens = [shape.k_len(), shape.k_len(), shape.v_len(), shape.k_len()];
    let mut grads = [0, 1, 2, 3].map(|i| Guarded::<T>::output(stream, NAMES[i], lens[i]));
    let mut du = Guarded::<f32>::output(stream, "du", shape.h * shape.k);
    let mut d_initial = Guarded::<f32>::output(stream, "d_initial_state", shape.state_len());
    // Nothing may be read in the workspace before it is written.
    let mut workspace = Bits::new(stream, plan.workspace_bytes(), u8::MAX);
    {
        let states = states.as_ref().map(Bits::view);
        let states = states.as_ref().map(|s| s as &dyn DevicePtr<u16>);
        let x = ChunkBwdInputs { r, k, v, w, u, initial_state, states, d_o, d_final_state };
        let mut grads = grads.each_mut().map(Guarded::view_mut);
        let [dr, dk, dv, dw] = &mut grads;
        let (mut du, mut d_initial) = (du.view_mut(), d_initial.view_mut());
        let d_initial_state: Option<&mut dyn DevicePtrMut<f32>> = Some(&mut d_initial);
        let mut dx = ChunkBwdOutputs { dr, dk, dv, dw, du: &mut du, d_initial_state };
        plan.run(stream, &x, &mut dx, &mut workspace.view_mut())?;
    }
    workspace.read("workspace");
    let over_tokens = grads.map(|mut x| x.read());
    Ok(Got { over_tokens, du: du.read(), d_initial_state: d_initial.read() })
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
    let wanted = [&want.dr, &want.dk, &want.dv, &want.dw];
    let judge = |name, class| Judge { pass: Pass::ChunkBwd, name, class };
    for (i, (got, want)) in got.over_tokens.iter().zip(wanted).enumerate() {
        let class = if NAMES[i] == "dw" { Class::GateGrad } else { Class::Grad };
        judge(NAMES[i], class).within::<T>(&widened(got), want)?;
    }
    // Never narrowed, and no product that it is a sum of has been.
    judge("du", Class::Grad).within::<f32>(&widened(&got.du), &want.du)?;
    judge("d_initial_state", Class::Grad).within::<T>(&widened(&got.d_initial_state), &want.d_initial_state)
}

fn check_all_dtypes(device: &Device, stream: &Arc<CudaStream>, case: &Case) -> Result<(), String> {
    if case.k > MAX_K {
        return refused(device, case);
    }
    check::<bf16>(device, stream, case).map_err(|error| format!("bf16: {error}"))?;
    check::<f32>(device, stream, case).map_err(|error| format!("f32: {error}"))?;
    check::<f16>(device, stream, case).map_err(|error| format!("f16: {error}"))
}

/// A head that is too wide is named.
fn refused(device: &Device, case: &Case) -> Result<(), String> {
    let plan = ChunkBwd::<bf16>::new(device, &case.shape(), &case.options(SavedStates::Recomputed));
    let wanted = format!("K must be from 1 to {MAX_K}, but is {}", case.k);
    match plan {
        Err(error) if error.to_string() == wanted => Ok(()),
        Err(error) => Err(format!("wanted an error about K, got: {error}")),
        Ok(_) => Err("wanted an error about K, got a plan".into()),
    }
}

#[test]
fn chunk_bwd_matches_reference() {
    let Some((device, stream)) = gpu("chunk_bwd_matches_reference") else { return };
    compile_ahead(CASES, |case| case.name.into(), |case| plans(&device, case));
    run_cases(CASES, |case| case.name.into(), |case| check_all_dtypes(&device, &stream, case));
}

#[test]
fn chunk_bwd_matches_reference_for_wide_heads() {
    let Some((device, stream)) = gpu("chunk_bwd_matches_reference_for_wide_heads") else { return };
    let cases = wide_heads();
    let name = |case: &Case| format!("K = {}, V = {}", case.k, case.v);
    compile_ahead(&cases, name, |case| plans(&device, case));
    run_cases(&cases, name, |case| check_all_dtypes(&device, &stream, case));
}

/// Makes the plans of a case in every type.
fn plans(device: &Device, case: &Case) -> Result<(), Error> {
    let (shape, options) = (case.shape(), case.options(SavedStates::Recomputed));
    drop(ChunkBwd::<bf16>::new(device, &shape, &options)?);
    drop(ChunkBwd::<f32>::new(device, &shape, &options)?);
    ChunkBwd::<f16>::new(device, &shape, &options).map(drop)
}

#[test]
fn chunk_bwd_survives_every_gate_regime() {
    let Some((device, stream)) = gpu("chunk_bwd_survives_every_gate_regime") else { return };
    run_cases(
        &regimes(),
        |case| format!("{:?}, bonus {:?}", case.decays, case.bonus),
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

/// r, k, v, w, u and d_o on the device, for calls that need no guards.
fn tensors(stream: &Arc<CudaStream>, problem: &Problem) -> [CudaSlice<bf16>; 6] {
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
    // The second is cut into segments, the third into slices of K too.
    for (b, t, h, k) in [(2, 100, 3, 64), (1, 500, 1, 64), (1, 500, 1, 200)] {
        let case = Case { b, t, h, k, initial_state: false, final_state: false, ..BASE };
        let problem = Problem::new::<bf16>(&case);
        let want = run::<bf16>(&device, &stream, &case, &problem, SavedStates::Recomputed).expect("runs");
        let [r, k, v, w, u, d_o] = tensors(&stream, &problem);
        let read = |x: &CudaSlice<bf16>| stream.clone_dtoh(x).expect("copies");
        for saved_states in [SavedStates::Recomputed, SavedStates::Kept] {
            let options = case.options(saved_states);
            let x = ChunkFwdInputs { r: &r, k: &k, v: &v, w: &w, u: &u, initial_state: None };
            let y = chunk_fwd(&device, &case.shape(), &x, &options).expect("runs");
            let x = ChunkBwdInputs {
                r: &r,
                k: &k,
                v: &v,
                w: &w,
                u: &u,
                initial_state: None,
                states: y.states.as_ref().map(|states| states as &dyn DevicePtr<u16>),
                d_o: &d_o,
                d_final_state: None,
            };
            let mut dx = chunk_bwd(&device, &case.shape(), &x, &options).expect("runs");
            let got = Got {
                over_tokens: [&dx.dr, &dx.dk, &dx.dv, &dx.dw].map(read),
                du: stream.clone_dtoh(&dx.du).expect("copies"),
                d_initial_state: stream.clone_dtoh(&dx.d_initial_state).expect("copies"),
            };
            assert_eq!(want.same_as(&got), Ok(()), "{t} tokens, K = {}, {saved_states:?}", case.k);

            let plan = ChunkBwd::<bf16>::new(&device, &case.shape(), &options).expect("valid");
            let mut workspace = stream.alloc_zeros::<u8>(plan.workspace_bytes()).expect("fits");
            stream.memset_zeros(&mut dx.dw).expect("is set");
            let replay = bench
                .capture(1, |stream, _| {
                    let mut outputs = ChunkBwdOutputs {
                        dr: &mut dx.dr,
                        dk: &mut dx.dk,
                        dv: &mut dx.dv,
                        dw: &mut dx.dw,
                        du: &mut dx.du,
                        d_initial_state: None,
                    };
                    plan.run(stream, &x, &mut outputs, &mut workspace)
                })
                .expect("captures");
            replay.time(2);
            let same = same_bits("dw", &want.over_tokens[3], &read(&dx.dw));
            assert_eq!(same, Ok(()), "{t} tokens, K = {}, {saved_states:?}", case.k);
        }
    }
}

#[test]
fn wrong_arguments_are_named_before_anything_is_launched() {
    let Some((device, stream)) = gpu("wrong_arguments_are_named_before_anything_is_launched") else { return };
    let shape = Shape { seqs: SeqLens::dense(1, 2), h: 1, k: 64, v: 32 };
    let options = ChunkFwdOptions::new(1.0);
    let plan = ChunkBwd::<f32>::new(&device, &shape, &options).expect("valid");
    let good = |len| stream.alloc_zeros::<f32>(len).expect("fits");
    let (k, v, u, s) = (good(128), good(64), good(64), good(64 * 32));
    let (bad, odd) = (good(127), good(129));
    let misaligned = odd.slice(1..);
    type Spoil<'a> = (&'static str, fn(&mut ChunkBwdInputs<'a, f32>, &'a dyn DevicePtr<f32>));
    let spoils: [Spoil<'_>; 8] = [
        ("r", |x, bad| x.r = bad),
        ("k", |x, bad| x.k = bad),
        ("v", |x, bad| x.v = bad),
        ("w", |x, bad| x.w = bad),
        ("u", |x, bad| x.u = bad),
        ("initial_state", |x, bad| x.initial_state = Some(bad)),
        ("d_o", |x, bad| x.d_o = bad),
        ("d_final_state", |x, bad| x.d_final_state = Some(bad)),
    ];
    let x = ChunkBwdInputs {
        r: &k,
        k: &k,
        v: &v,
        w: &k,
        u: &u,
        initial_state: Some(&s),
        states: None,
        d_o: &v,
        d_final_state: Some(&s),
    };
    let mut dr = Guarded::<f32>::output(&stream, "dr", 128);
    let (mut dk, mut dv, mut dw, mut du) = (good(128), good(64), good(128), good(64));
    let mut d_initial = good(64 * 32);
    let mut workspace = stream.alloc_zeros::<u8>(plan.workspace_bytes()).expect("fits");
    let mut spoilt = |x: &ChunkBwdInputs<'_, f32>, output: &str, bad: &mut dyn DevicePtrMut<f32>| {
        let mut view = dr.view_mut();
        let mut dx = ChunkBwdOutputs {
            dr: &mut view,
            dk: &mut dk,
            dv: &mut dv,
            dw: &mut dw,
            du: &mut du,
            d_initial_state: Some(&mut d_initial),
        };
        match output {
            "dr" => dx.dr = bad,
            "dk" => dx.dk = bad,
            "dv" => dx.dv = bad,
            "dw" => dx.dw = bad,
            "du" => dx.du = bad,
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
    for name in NAMES.into_iter().chain(["du", "d_initial_state"]) {
        let text = spoilt(&x, name, &mut short);
        assert!(text.starts_with(&format!("`{name}` is [")) && text.ends_with("but holds 127"), "{text}");
    }
    // Those that only a later launch reads or writes are refused before the first.
    let odd_v = odd.slice(1..65);
    let text = spoilt(&ChunkBwdInputs { d_o: &odd_v, ..x }, "", &mut short);
    assert!(text.starts_with("`d_o` must lie at a multiple of 16 bytes"), "{text}");
    let text = spoilt(&ChunkBwdInputs { k: &misaligned, ..x }, "", &mut short);
    assert!(text.starts_with("`k` must lie at a multiple of 16 bytes"), "{text}");
    let (mut odd_out, mut odd_u) = (good(129), good(65));
    let text = spoilt(&x, "dw", &mut odd_out.slice_mut(1..));
    assert!(text.starts_with("`dw` must lie at a multiple of 16 bytes"), "{text}");
    let text = spoilt(&x, "du", &mut odd_u.slice_mut(1..));
    assert!(text.starts_with("`du` must lie at a multiple of 16 bytes"), "{text}");
    let states = stream.alloc_zeros::<u16>(plan.states_len()).expect("fits");
    let text = spoilt(&ChunkBwdInputs { states: Some(&states), ..x }, "", &mut short);
    assert_eq!(text, "`states` must be absent, since the plan recomputes states");
    // None of the refused calls has written anything.
    assert!(dr.read().iter().all(|x| x.is_nan()));

    let mut dr = good(128);
    let mut dx = ChunkBwdOutputs {
        dr: &mut dr,
        dk: &mut dk,
        dv: &mut dv,
        dw: &mut dw,
        du: &mut du,
        d_initial_state: None,
    };
    let mut little = stream.alloc_zeros::<u8>(plan.workspace_bytes() - 1).expect("fits");
    let error = plan.run(&stream, &x, &mut dx, &mut little);
    assert!(matches!(error, Err(Error::Len { tensor: "workspace", .. })), "{error:?}");

    let kept = ChunkBwd::<f32>::new(&device, &shape, &options.clone().with_saved_states(SavedStates::Kept))
        .expect("valid");
    assert!(kept.workspace_bytes() < plan.workspace_bytes());
    let mut workspace = stream.alloc_zeros::<u8>(kept.workspace_bytes()).expect("fits");
    let error = kept.run(&stream, &x, &mut dx, &mut workspace).expect_err("states are missing");
    assert_eq!(error.to_string(), "`states` must be given, since the plan is for states that are kept");
    let few = states.slice(1..);
    let error = kept.run(&stream, &ChunkBwdInputs { states: Some(&few), ..x }, &mut dx, &mut workspace);
    assert!(matches!(error, Err(Error::Len { tensor: "states", .. })), "{error:?}");

    let on_device = Shape { seqs: SeqLens::packed_on_device(1, 2), ..shape };
    let error = ChunkBwd::<f32>::new(&device, &on_device, &options);
    assert!(matches!(error, Err(Error::SeqLens { .. })), "{error:?}");
}
