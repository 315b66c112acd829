//! `chunk_fwd` on the GPU against the float64 recurrence.

mod support;

use std::sync::Arc;

use fla_core::cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut};
use fla_core::testing::{Bench, Guarded, Poison, gpu, run_cases, same_bits};
use fla_core::{Device, Error, SeqLens};
use fla_gated_delta::{
    Beta, BetaForm, BetaMap, ChannelGates, ChunkFwd, ChunkFwdInputs, ChunkFwdOptions, ChunkFwdOutputs, Gate,
    GateForm, QkNorm, RecurrentFwdInputs, RecurrentFwdOptions, Shape, StateLayout, chunk_fwd,
};
use fla_reference::compare::{first_non_finite, relative_rms};
use fla_reference::gated_delta as reference;
use fla_reference::inputs::{Gates, REGIMES, Storage};
use fla_reference::tolerance::{Backend, Class, Key, Model, Pass, limit};
use half::{bf16, f16};
use proptest::prelude::{ProptestConfig, proptest};

use support::{BASE, Case, Keys, LAYER, Problem, Tensors, any_case, dtype};

const CASES: &[Case] = &[
    Case { name: "one token", t: 1, ..BASE },
    Case { name: "no token", t: 0, ..LAYER },
    Case { name: "31 tokens", t: 31, ..BASE },
    Case { name: "32 tokens, no states", t: 32, initial_state: false, ..BASE },
    Case { name: "33 tokens", t: 33, ..BASE },
    Case { name: "63 tokens", t: 63, ..LAYER },
    Case { name: "64 tokens", t: 64, ..BASE },
    Case { name: "65 tokens, scale 1", t: 65, scale: 1.0, ..BASE },
    Case { name: "1000 tokens, one head", b: 1, t: 1000, h: 1, hv: 1, ..BASE },
    Case { name: "K = V = 128, 300 tokens", t: 300, k: 128, v: 128, ..BASE },
    Case { name: "K = V = 128, 64 heads", b: 4, t: 130, h: 64, hv: 64, k: 128, v: 128, ..BASE },
    Case {
        name: "K = V = 128, packed, no states",
        packed: &[0, 65, 1, 200, 0],
        k: 128,
        v: 128,
        initial_state: false,
        ..BASE
    },
    Case {
        name: "K = V = 128, normalised, sigmoid",
        t: 200,
        k: 128,
        v: 128,
        qk_norm: QkNorm::L2,
        beta_map: BetaMap::Sigmoid,
        ..BASE
    },
    Case { name: "K = V = 128, raw gate", t: 90, k: 128, v: 128, gate: GateForm::Raw, ..BASE },
    Case {
        name: "K = V = 128, no gate, strength 1",
        t: 90,
        k: 128,
        v: 128,
        gate: GateForm::None,
        beta: BetaForm::One,
        ..BASE
    },
    Case {
        name: "K = V = 128, one long sequence in segments",
        b: 1,
        t: 2100,
        h: 1,
        hv: 1,
        k: 128,
        v: 128,
        gates: Gates::Weak,
        ..BASE
    },
    Case { name: "K = 64, V = 128", t: 200, k: 64, v: 128, ..BASE },
    Case { name: "K = 128, V = 192", t: 200, k: 128, v: 192, ..BASE },
    Case { name: "K = V = 128, 32 heads", t: 130, h: 32, hv: 32, k: 128, v: 128, ..LAYER },
    Case { name: "packed", packed: &[3, 70, 1, 130], ..LAYER },
    Case { name: "packed with empty members", packed: &[0, 65, 0, 0, 1, 20, 0], k: 128, ..LAYER },
    Case { name: "packed, empty members without states", packed: &[0, 5, 0], initial_state: false, ..BASE },
    Case { name: "packed, one sequence without tokens", packed: &[0], ..BASE },
    Case { name: "no sequence", b: 0, ..LAYER },
    Case {
        name: "repeated keys, strength 1, no decay",
        t: 200,
        keys: Keys::Repeated,
        gates: Gates::Constant(0.0),
        ..BASE
    },
    Case { name: "K = 256, V = 512", t: 70, h: 1, hv: 2, k: 256, v: 512, ..BASE },
    Case { name: "K = 192, V = 96", t: 70, h: 1, hv: 2, k: 192, v: 96, ..LAYER },
    Case { name: "K = V = 1", t: 70, k: 1, v: 1, ..BASE },
    Case { name: "K = 60, V = 100", t: 70, k: 60, v: 100, ..LAYER },
    Case { name: "K = 33, V = 65: rows that no vector access fits", t: 70, k: 33, v: 65, ..BASE },
    Case { name: "grouped heads", t: 70, h: 2, hv: 8, ..BASE },
    // Heads for a kernel that prepares chunks by two warpgroups, where there is one, and heads enough for one.
    Case { name: "grouped heads of 128 channels", t: 330, h: 2, hv: 6, k: 128, v: 128, ..LAYER },
    Case { name: "grouped heads, packed", packed: &[0, 65, 1, 260, 0], h: 2, hv: 6, k: 128, v: 192, ..BASE },
    Case { name: "grouped heads, K = 64, V = 128", t: 200, h: 1, hv: 4, k: 64, v: 128, ..LAYER },
    Case { name: "grouped heads, 128 in all", b: 4, t: 130, h: 8, hv: 32, k: 128, v: 128, ..BASE },
    Case { name: "no gate", t: 70, gate: GateForm::None, ..BASE },
    Case { name: "no gate, strength 1", gate: GateForm::None, beta: BetaForm::One, t: 70, ..BASE },
    Case { name: "raw gate without bias", t: 70, gate: GateForm::Raw, dt_bias: false, ..BASE },
    Case { name: "strength 1", t: 70, beta: BetaForm::One, hv: 6, ..BASE },
    Case { name: "sigmoid", t: 70, beta_map: BetaMap::Sigmoid, ..BASE },
    Case { name: "negative eigenvalues", t: 70, beta_map: BetaMap::TwiceSigmoid, ..BASE },
    Case { name: "normalised", t: 70, qk_norm: QkNorm::L2, ..BASE },
    Case { name: "decays that empty the state", t: 200, gates: Gates::Constant(-70.0), ..BASE },
    Case { name: "states [V, K]", t: 70, v: 96, state_layout: VALUE_MAJOR, ..BASE },
    Case { name: "states [V, K], K = 33, V = 65", t: 70, k: 33, v: 65, state_layout: VALUE_MAJOR, ..BASE },
    Case {
        name: "states [V, K], K = 256, V = 512",
        t: 70,
        h: 1,
        hv: 2,
        k: 256,
        v: 512,
        state_layout: VALUE_MAJOR,
        ..BASE
    },
    Case {
        name: "states [V, K], packed with empty members",
        packed: &[0, 65, 0, 0, 1, 200, 0],
        k: 64,
        v: 128,
        state_layout: VALUE_MAJOR,
        ..BASE
    },
    Case {
        name: "states [V, K], grouped heads, packed with empty members",
        packed: &[0, 65, 0, 0, 1, 20, 0],
        k: 128,
        state_layout: VALUE_MAJOR,
        ..LAYER
    },
    Case {
        name: "states [V, K], one long sequence in segments",
        b: 1,
        t: 2100,
        h: 1,
        hv: 1,
        k: 64,
        v: 128,
        gates: Gates::Weak,
        state_layout: VALUE_MAJOR,
        ..BASE
    },
];
const VALUE_MAJOR: StateLayout = StateLayout::ValueMajor;

/// The same case as the pass by chunks takes it.
fn options(case: &Case) -> ChunkFwdOptions {
    let RecurrentFwdOptions { scale, gate, beta, beta_map, qk_norm, state_layout, .. } = case.options();
    let options = ChunkFwdOptions::new(scale).with_gate(gate).with_beta(beta).with_beta_map(beta_map);
    options.with_qk_norm(qk_norm).with_state_layout(state_layout)
}

fn chunk_inputs<'a, T: Poison>(x: &RecurrentFwdInputs<'a, T>) -> ChunkFwdInputs<'a, T> {
    let RecurrentFwdInputs { q, k, v, g, beta, initial_state, .. } = *x;
    ChunkFwdInputs { q, k, v, g, beta, initial_state }
}

/// One run on poisoned buffers: outputs and final state.
fn run<T: Poison>(
    device: &Device,
    stream: &Arc<CudaStream>,
    case: &Case,
    problem: &Problem,
) -> Result<(Vec<T>, Vec<f32>), Error> {
    let shape = case.shape();
    let tensors = Tensors::<T, f32>::new(stream, case, problem);
    let mut o = Guarded::<T>::output(stream, "o", shape.v_len());
    let mut final_state = Guarded::<f32>::output(stream, "final_state", shape.state_len());
    let plan = ChunkFwd::<T>::new(device, &shape, &options(case))?;
    // A workspace full of NaN: nothing may be read there before it is written.
    let mut workspace = stream.clone_htod(&vec![0xff_u8; plan.workspace_bytes()]).expect("fits");
    tensors.with(case, |x| {
        let initial = tensors.initial_state.as_ref().map(Guarded::view);
        let initial_state = initial.as_ref().map(|s| s as &dyn DevicePtr<f32>);
        let x = ChunkFwdInputs { initial_state, ..chunk_inputs(&x) };
        let (mut o, mut state) = (o.view_mut(), final_state.view_mut());
        let mut y = ChunkFwdOutputs { o: &mut o, final_state: Some(&mut state) };
        plan.run(stream, &x, &mut y, &mut workspace)
    })?;
    Ok((o.read(), case.loaded(&final_state.read())))
}

fn within<T: Poison>(name: &str, got: &[f32], want: &[f64], class: Class) -> Result<(), String> {
    let got: Vec<f64> = got.iter().map(|x| f64::from(*x)).collect();
    if let Some(at) = first_non_finite(&got) {
        return Err(format!("{name}: element {at} is {}", got[at]));
    }
    let (backend, model, pass) = (Backend::Gpu, Model::GatedDelta, Pass::ChunkFwd);
    let limit = limit(Key { backend, model, pass, dtype: dtype::<T>(), class }).map_err(|e| e.to_string())?;
    let error = relative_rms(&got, want);
    if error <= limit { Ok(()) } else { Err(format!("{name}: relative RMS {error:.2e} > {limit:.0e}")) }
}

fn check<T: Poison + Storage>(device: &Device, stream: &Arc<CudaStream>, case: &Case) -> Result<(), String> {
    check_classes::<T>(device, stream, case, [Class::Output, Class::FinalState])
}

/// With the classes of limits that outputs and final states are judged by.
fn check_classes<T: Poison + Storage>(
    device: &Device,
    stream: &Arc<CudaStream>,
    case: &Case,
    [of_o, of_state]: [Class; 2],
) -> Result<(), String> {
    let problem = Problem::new::<T, f32>(case);
    let want =
        reference::recurrent_fwd(&case.reference_shape(), &problem.inputs(case), &case.reference_options());
    let once = || run::<T>(device, stream, case, &problem).map_err(|error| error.to_string());
    let ((o, state), (o_again, state_again)) = (once()?, once()?);
    same_bits("o", &o, &o_again)?;
    same_bits("final_state", &state, &state_again)?;
    let o: Vec<f32> = o.iter().map(|x| x.to_f32()).collect();
    let results = [
        within::<T>("o", &o, &want.o, of_o),
        within::<T>("final_state", &state, &want.final_state, of_state),
    ];
    let failures: Vec<String> = results.into_iter().filter_map(Result::err).collect();
    if failures.is_empty() { Ok(()) } else { Err(failures.join("; ")) }
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

#[test]
fn chunk_fwd_survives_every_gate_regime() {
    let Some((device, stream)) = gpu("chunk_fwd_survives_every_gate_regime") else { return };
    run_cases(
        REGIMES,
        |gates| format!("{gates:?}"),
        |gates| check_all_dtypes(&device, &stream, &Case { t: 200, gates: *gates, ..BASE }),
    );
}

proptest! {
    // Every new K and V compiles kernels, so a few cases a run; the seed changes from run to run.
    #![proptest_config(ProptestConfig { cases: 8, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn chunk_fwd_matches_reference_for_any_shape(case in any_case()) {
        if let Some((device, stream)) = gpu("chunk_fwd_matches_reference_for_any_shape") {
            let beta = if case.beta == BetaForm::PerChannel { BetaForm::PerHead } else { case.beta };
            let case = Case { channel_gates: ChannelGates::None, beta, t: 5 * case.t, ..case };
            assert_eq!(check::<f32>(&device, &stream, &case), Ok(()), "{case:?}");
            // Keys of few channels nearly repeat, and bf16 rounds sums of them before they cancel.
            let nearly_repeats = case.k < 48 || case.beta_map == BetaMap::TwiceSigmoid;
            let classes =
                if nearly_repeats { [Class::OfRepeats; 2] } else { [Class::Output, Class::FinalState] };
            assert_eq!(check_classes::<bf16>(&device, &stream, &case, classes), Ok(()), "{case:?}");
        }
    }
}

#[test]
fn the_one_call_form_and_a_captured_graph_give_the_plans_bits() {
    let Some((device, _)) = gpu("the_one_call_form_and_a_captured_graph_give_the_plans_bits") else { return };
    // Event tracking belongs to a context, and other tests run on the shared one.
    let bench = Bench::open().expect("opens");
    let stream = bench.stream().clone();
    let case = Case { initial_state: false, t: 100, ..LAYER };
    let problem = Problem::new::<bf16, f32>(&case);
    let (o, state) = run::<bf16>(&device, &stream, &case, &problem).expect("runs");
    let tensors = Tensors::<bf16, f32>::new(&stream, &case, &problem);
    tensors.with(&case, |x| {
        let x = chunk_inputs(&x);
        let mut y = chunk_fwd(&device, &case.shape(), &x, &options(&case)).expect("runs");
        assert_eq!(same_bits("o", &o, &stream.clone_dtoh(&y.o).expect("copies")), Ok(()));
        assert_eq!(same_bits("state", &state, &stream.clone_dtoh(&y.final_state).expect("copies")), Ok(()));

        let plan = ChunkFwd::<bf16>::new(&device, &case.shape(), &options(&case)).expect("valid");
        let mut workspace = stream.alloc_zeros::<u8>(plan.workspace_bytes()).expect("fits");
        stream.memset_zeros(&mut y.o).expect("is set");
        let replay = bench
            .capture(1, |stream, _| {
                let mut outputs = ChunkFwdOutputs { o: &mut y.o, final_state: None };
                plan.run(stream, &x, &mut outputs, &mut workspace)
            })
            .expect("captures");
        replay.time(2);
        assert_eq!(same_bits("o", &o, &stream.clone_dtoh(&y.o).expect("copies")), Ok(()));
    });
}

#[test]
fn wrong_arguments_are_named_before_anything_is_launched() {
    let Some((device, stream)) = gpu("wrong_arguments_are_named_before_anything_is_launched") else { return };
    let shape = Shape { seqs: SeqLens::dense(1, 2), h: 1, hv: 2, k: 64, v: 32 };
    let plan = ChunkFwd::<f32>::new(&device, &shape, &ChunkFwdOptions::new(1.0)).expect("valid");
    let new = |len: usize| stream.alloc_zeros::<f32>(len).expect("fits");
    let (qk, v, heads, odd) = (new(128), new(128), new(4), new(127));
    let (gate, beta) = (Gate::Log(&heads), Beta::PerHead(&heads));
    let good = ChunkFwdInputs { q: &qk, k: &qk, v: &v, g: gate, beta, initial_state: None };
    let mut o = Guarded::<f32>::output(&stream, "o", 128);
    let mut workspace = stream.alloc_zeros::<u8>(plan.workspace_bytes()).expect("fits");
    let mut small = stream.alloc_zeros::<u8>(plan.workspace_bytes() - 1).expect("fits");
    let mut text = |x: &ChunkFwdInputs<'_, f32>, workspace: &mut dyn DevicePtrMut<u8>| {
        let mut o = o.view_mut();
        let mut y = ChunkFwdOutputs { o: &mut o, final_state: None };
        plan.run(&stream, x, &mut y, workspace).expect_err("must be refused").to_string()
    };
    for (x, want) in [
        (
            ChunkFwdInputs { q: &odd, ..good },
            "`q` is [B, T, H, K], which is 128 elements here, but holds 127",
        ),
        (
            ChunkFwdInputs { v: &odd, ..good },
            "`v` is [B, T, HV, V], which is 128 elements here, but holds 127",
        ),
        (
            ChunkFwdInputs { g: Gate::None, ..good },
            "`g` must be `Gate::Log`, since the plan is for log decays",
        ),
        (
            ChunkFwdInputs { initial_state: Some(&odd), ..good },
            "`initial_state` is [N, HV, K, V], which is 4096 elements here, but holds 127",
        ),
    ] {
        assert_eq!(text(&x, &mut workspace), want);
    }
    assert!(text(&good, &mut small).contains("`workspace`"));
    assert!(o.read().iter().all(|x| x.is_nan()));

    let by_columns = ChunkFwdOptions::new(1.0).with_state_layout(StateLayout::ValueMajor);
    let plan = ChunkFwd::<f32>::new(&device, &shape, &by_columns).expect("valid");
    let mut o = o.view_mut();
    let mut y = ChunkFwdOutputs { o: &mut o, final_state: None };
    let x = ChunkFwdInputs { initial_state: Some(&odd), ..good };
    let error = plan.run(&stream, &x, &mut y, &mut workspace).expect_err("must be refused").to_string();
    assert!(error.starts_with("`initial_state` is [N, HV, V, K], which is 4096 elements"), "{error}");

    let options = ChunkFwdOptions::new(1.0).with_beta(BetaForm::PerChannel);
    let error = ChunkFwd::<f32>::new(&device, &shape, &options);
    assert!(matches!(error, Err(Error::Option { option: "beta", .. })), "{error:?}");
    let on_device = Shape { seqs: SeqLens::packed_on_device(1, 2), ..shape };
    let error = ChunkFwd::<f32>::new(&device, &on_device, &ChunkFwdOptions::new(1.0));
    assert!(matches!(error, Err(Error::SeqLens { .. })), "{error:?}");
}
