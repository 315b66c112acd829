//! `chunk_bwd` on the GPU against the float64 gradients.

mod support;

use std::sync::Arc;

use fla_core::cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut};
use fla_core::testing::{Bench, Guarded, Poison, gpu, run_cases, same_bits};
use fla_core::{DType, Device, Error, SeqLens};
use fla_gated_delta::{
    Beta, BetaForm, BetaMap, ChannelGates, ChunkBwd, ChunkBwdInputs, ChunkBwdOutputs, ChunkFwdOptions, Gate,
    GateForm, GateGrads, QkNorm, RecurrentFwdInputs, RecurrentFwdOptions, Shape, StateLayout, chunk_bwd,
};
use fla_reference::compare::{F16_SPACING, first_non_finite, relative_rms_beyond};
use fla_reference::gated_delta as reference;
use fla_reference::inputs::{Gates, REGIMES, Rng, Storage, round_to};
use fla_reference::tolerance::{Backend, Class, Dtype, Key, Model, Pass, limit, limit_of_len};
use half::{bf16, f16};
use proptest::prelude::{ProptestConfig, proptest};

use support::{BASE, Case, Keys, LAYER, Problem, Tensors, any_case, dtype, to_device};

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
    // Heads enough that one kernel makes the gradients of states and of chunks, where there is one.
    Case { name: "K = V = 128, 50 heads", t: 130, h: 50, hv: 50, k: 128, v: 128, ..LAYER },
    Case {
        name: "K = V = 128, packed, no states",
        packed: &[0, 65, 1, 130, 0],
        h: 20,
        hv: 20,
        k: 128,
        v: 128,
        initial_state: false,
        ..BASE
    },
    Case {
        name: "K = V = 128, strength 1",
        t: 66,
        h: 50,
        hv: 50,
        k: 128,
        v: 128,
        beta: BetaForm::One,
        ..BASE
    },
    Case {
        name: "K = 64, V = 128, no gate",
        t: 66,
        h: 50,
        hv: 50,
        k: 64,
        v: 128,
        gate: GateForm::None,
        ..BASE
    },
    Case {
        name: "K = V = 128, in segments",
        b: 1,
        t: 2100,
        h: 1,
        hv: 1,
        k: 128,
        v: 128,
        gates: Gates::Weak,
        ..BASE
    },
    // The same with value heads that share queries and keys: enough of them, and enough in segments.
    Case { name: "K = V = 128, 100 grouped heads", t: 130, h: 10, hv: 50, k: 128, v: 128, ..LAYER },
    Case {
        name: "K = 64, V = 128, grouped, packed",
        packed: &[0, 65, 1, 130, 0],
        h: 5,
        hv: 20,
        k: 64,
        v: 128,
        ..BASE
    },
    Case {
        name: "K = V = 128, grouped, in segments",
        b: 1,
        t: 1030,
        h: 5,
        hv: 50,
        k: 128,
        v: 128,
        gates: Gates::Weak,
        ..BASE
    },
    Case { name: "packed", packed: &[3, 70, 1, 130], ..LAYER },
    Case { name: "packed with empty members", packed: &[0, 65, 0, 0, 1, 20, 0], k: 128, ..LAYER },
    Case { name: "packed, empty members without states", packed: &[0, 5, 0], initial_state: false, ..BASE },
    Case { name: "packed, one sequence without tokens", packed: &[0], ..BASE },
    Case { name: "no sequence", b: 0, ..LAYER },
    Case { name: "K = 256, V = 512", t: 70, h: 1, hv: 2, k: 256, v: 512, ..BASE },
    Case { name: "K = 192, V = 96", t: 70, h: 1, hv: 2, k: 192, v: 96, ..LAYER },
    Case { name: "K = V = 1", t: 70, k: 1, v: 1, ..BASE },
    Case { name: "grouped heads of 128 channels", t: 130, h: 2, hv: 6, k: 128, v: 128, ..LAYER },
    Case { name: "K = 60, V = 100", t: 70, k: 60, v: 100, ..LAYER },
    Case { name: "K = 33, V = 65: rows that no vector access fits", t: 70, k: 33, v: 65, ..BASE },
    Case { name: "grouped heads", t: 70, h: 2, hv: 8, ..BASE },
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
        packed: &[0, 65, 0, 0, 1, 20, 0],
        k: 128,
        state_layout: VALUE_MAJOR,
        ..LAYER
    },
    Case {
        name: "states [V, K], K = 64, V = 128, 50 heads",
        t: 130,
        h: 50,
        hv: 50,
        k: 64,
        v: 128,
        state_layout: VALUE_MAJOR,
        ..BASE
    },
    Case {
        name: "states [V, K], in segments",
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

/// The gradients that come in: of the outputs, and of the final state where there is an initial one.
struct Incoming {
    d_o: Vec<f64>,
    d_final_state: Option<Vec<f64>>,
}

impl Incoming {
    fn new<T: Storage>(case: &Case) -> Self {
        let (shape, mut rng) = (case.shape(), Rng::new(19));
        let d_o = round_to::<T, f64>(&rng.normal::<f64>(shape.v_len(), 1.0));
        let d_final = || round_to::<f32, f64>(&rng.normal::<f64>(shape.state_len(), 1.0));
        Self { d_o, d_final_state: case.initial_state.then(d_final) }
    }
}

/// A gradient, by name: wide when it is f32 whatever the vectors are.
#[derive(Debug)]
enum Grad<T> {
    Narrow(Vec<T>),
    Wide(Vec<f32>),
}

fn bwd_inputs<'a, T: Poison>(
    x: &RecurrentFwdInputs<'a, T>,
    d_o: &'a dyn DevicePtr<T>,
    d_final_state: Option<&'a dyn DevicePtr<f32>>,
) -> ChunkBwdInputs<'a, T> {
    let RecurrentFwdInputs { q, k, v, g, beta, initial_state, .. } = *x;
    ChunkBwdInputs { q, k, v, g, beta, initial_state, d_o, d_final_state }
}

/// One run on poisoned buffers: every gradient that the case has.
fn run<T: Poison>(
    device: &Device,
    stream: &Arc<CudaStream>,
    case: &Case,
    (problem, incoming): (&Problem, &Incoming),
) -> Result<Vec<(&'static str, Grad<T>)>, Error> {
    let shape = case.shape();
    let tensors = Tensors::<T, f32>::new(stream, case, problem);
    let d_o = to_device::<T>(stream, "d_o", &incoming.d_o);
    let d_final =
        incoming.d_final_state.as_ref().map(|s| to_device::<f32>(stream, "d_final_state", &case.stored(s)));
    let narrow = |name, len| Guarded::<T>::output(stream, name, len);
    let wide = |name, len| Guarded::<f32>::output(stream, name, len);
    let (mut dq, mut dk) = (narrow("dq", shape.qk_len()), narrow("dk", shape.qk_len()));
    let (mut dv, mut dg_logits) = (narrow("dv", shape.v_len()), narrow("dg", shape.head_len()));
    let (mut dbeta, mut dg) = (narrow("dbeta", shape.head_len()), wide("dg", shape.head_len()));
    let (mut d_a_log, mut d_dt_bias) = (wide("d_a_log", case.hv), wide("d_dt_bias", case.hv));
    let mut d_initial = wide("d_initial_state", shape.state_len());

    let plan = ChunkBwd::<T>::new(device, &shape, &options(case))?;
    // A workspace full of NaN: nothing may be read there before it is written.
    let mut workspace = stream.clone_htod(&vec![0xff_u8; plan.workspace_bytes()]).expect("fits");
    tensors.with(case, |x| {
        let (d_o, d_final) = (d_o.view(), d_final.as_ref().map(Guarded::view));
        let initial = tensors.initial_state.as_ref().map(Guarded::view);
        let x = RecurrentFwdInputs { initial_state: initial.as_ref().map(|s| s as &dyn DevicePtr<f32>), ..x };
        let x = bwd_inputs(&x, &d_o, d_final.as_ref().map(|s| s as &dyn DevicePtr<f32>));
        let (mut dq, mut dk, mut dv) = (dq.view_mut(), dk.view_mut(), dv.view_mut());
        let (mut dg, mut dg_logits, mut dbeta) = (dg.view_mut(), dg_logits.view_mut(), dbeta.view_mut());
        let (mut d_a_log, mut d_dt_bias) = (d_a_log.view_mut(), d_dt_bias.view_mut());
        let mut d_initial = d_initial.view_mut();
        let mut dx = ChunkBwdOutputs {
            dq: &mut dq,
            dk: &mut dk,
            dv: &mut dv,
            dg: match case.gate {
                GateForm::None => GateGrads::None,
                GateForm::Log => GateGrads::Log(&mut dg),
                GateForm::Raw => GateGrads::Raw {
                    dg: &mut dg_logits,
                    d_a_log: Some(&mut d_a_log),
                    d_dt_bias: case.dt_bias.then_some(&mut d_dt_bias as &mut dyn DevicePtrMut<f32>),
                },
            },
            dbeta: (case.beta != BetaForm::One).then_some(&mut dbeta as &mut dyn DevicePtrMut<T>),
            d_initial_state: Some(&mut d_initial),
        };
        plan.run(stream, &x, &mut dx, &mut workspace)
    })?;
    let mut all = vec![
        ("dq", Grad::Narrow(dq.read())),
        ("dk", Grad::Narrow(dk.read())),
        ("dv", Grad::Narrow(dv.read())),
        ("d_initial_state", Grad::Wide(case.loaded(&d_initial.read()))),
    ];
    match case.gate {
        GateForm::None => {}
        GateForm::Log => all.push(("dg", Grad::Wide(dg.read()))),
        GateForm::Raw => {
            all.push(("dg", Grad::Narrow(dg_logits.read())));
            all.push(("d_a_log", Grad::Wide(d_a_log.read())));
            if case.dt_bias {
                all.push(("d_dt_bias", Grad::Wide(d_dt_bias.read())));
            }
        }
    }
    if case.beta != BetaForm::One {
        all.push(("dbeta", Grad::Narrow(dbeta.read())));
    }
    Ok(all)
}

/// The gradient of that name.
fn wanted<'a>(dx: &'a reference::Grads<f64>, name: &str) -> Option<&'a Vec<f64>> {
    match name {
        "dq" => Some(&dx.dq),
        "dk" => Some(&dx.dk),
        "dv" => Some(&dx.dv),
        "d_initial_state" => Some(&dx.d_initial_state),
        "dg" => dx.dg.as_ref(),
        "d_a_log" => dx.d_a_log.as_ref(),
        "d_dt_bias" => dx.d_dt_bias.as_ref(),
        _ => dx.dbeta.as_ref(),
    }
}

fn within<T: Poison>(
    name: &str,
    (dtype, of_repeats): (Dtype, bool),
    (got, again): (&[T], &[T]),
    want: &[f64],
) -> Result<(), String> {
    same_bits(name, got, again)?;
    let got: Vec<f64> = got.iter().map(|x| f64::from(x.to_f32())).collect();
    if let Some(at) = first_non_finite(&got) {
        return Err(format!("{name}: element {at} is {}", got[at]));
    }
    let is_gate = ["dg", "d_a_log", "d_dt_bias"].contains(&name);
    let class = match (of_repeats, is_gate) {
        (true, _) => Class::OfRepeats,
        (false, true) => Class::GateGrad,
        (false, false) => Class::Grad,
    };
    let (backend, model, pass) = (Backend::Gpu, Model::GatedDelta, Pass::ChunkBwd);
    let key = Key { backend, model, pass, dtype, class };
    // Gradients of vanished decays lie below the smallest numbers of a type.
    let slack = if T::DTYPE == DType::F16 { F16_SPACING } else { f64::from(f32::MIN_POSITIVE) };
    let error = relative_rms_beyond(&got, want, slack);
    let limit = limit_of_len(limit(key).map_err(|error| error.to_string())?, key.dtype, got.len());
    if error <= limit { Ok(()) } else { Err(format!("{name}: relative RMS {error:.2e} > {limit:.0e}")) }
}

fn check<T: Poison + Storage>(device: &Device, stream: &Arc<CudaStream>, case: &Case) -> Result<(), String> {
    check_repeats::<T>(device, stream, case, false)
}

/// By the limits for keys that repeat, or by those of every other case.
fn check_repeats<T: Poison + Storage>(
    device: &Device,
    stream: &Arc<CudaStream>,
    case: &Case,
    of_repeats: bool,
) -> Result<(), String> {
    let kind = (dtype::<T>(), of_repeats);
    let (problem, incoming) = (Problem::new::<T, f32>(case), Incoming::new::<T>(case));
    let dy = reference::OutputGrads { d_o: &incoming.d_o, d_final_state: incoming.d_final_state.as_deref() };
    let x = problem.inputs(case);
    let want = reference::recurrent_bwd(&case.reference_shape(), &x, &dy, &case.reference_options());
    let once = || run::<T>(device, stream, case, (&problem, &incoming)).map_err(|error| error.to_string());
    let mut failures = Vec::new();
    for ((name, got), (_, again)) in once()?.iter().zip(&once()?) {
        let want = wanted(&want, name).ok_or(format!("the reference has no {name}"))?;
        let result = match (got, again) {
            (Grad::Narrow(got), Grad::Narrow(again)) => within(name, kind, (got, again), want),
            (Grad::Wide(got), Grad::Wide(again)) => within(name, kind, (got, again), want),
            _ => Err(format!("{name} changes its type")),
        };
        failures.extend(result.err());
    }
    if failures.is_empty() { Ok(()) } else { Err(failures.join("; ")) }
}

fn check_all_dtypes(device: &Device, stream: &Arc<CudaStream>, case: &Case) -> Result<(), String> {
    check::<f32>(device, stream, case).map_err(|error| format!("f32: {error}"))?;
    check::<bf16>(device, stream, case).map_err(|error| format!("bf16: {error}"))?;
    check::<f16>(device, stream, case).map_err(|error| format!("f16: {error}"))
}

#[test]
fn chunk_bwd_matches_reference() {
    let Some((device, stream)) = gpu("chunk_bwd_matches_reference") else { return };
    run_cases(CASES, |case| case.name.into(), |case| check_all_dtypes(&device, &stream, case));
}

/// Gradients are then differences of neighbouring sums, which bf16 rounds before they cancel, so it has a limit of its own;
/// pairs of bf16 do not.
#[test]
fn repeated_keys_written_whole_do_no_harm() {
    let Some((device, stream)) = gpu("repeated_keys_written_whole_do_no_harm") else { return };
    let (keys, gates) = (Keys::Repeated, Gates::Constant(0.0));
    let case = Case { name: "repeated keys, strength 1, no decay", t: 200, keys, gates, ..BASE };
    assert_eq!(check::<f32>(&device, &stream, &case), Ok(()));
    assert_eq!(check::<f16>(&device, &stream, &case), Ok(()));
    assert_eq!(check_repeats::<bf16>(&device, &stream, &case, true), Ok(()));
    let wide = Case { t: 100, h: 50, hv: 50, k: 128, v: 128, ..case };
    assert_eq!(check_repeats::<bf16>(&device, &stream, &wide, true), Ok(()));
    let grouped = Case { h: 10, ..wide };
    assert_eq!(check_repeats::<bf16>(&device, &stream, &grouped, true), Ok(()));
}

#[test]
fn chunk_bwd_survives_every_gate_regime() {
    let Some((device, stream)) = gpu("chunk_bwd_survives_every_gate_regime") else { return };
    run_cases(
        REGIMES,
        |gates| format!("{gates:?}"),
        |gates| check_all_dtypes(&device, &stream, &Case { t: 200, gates: *gates, ..BASE }),
    );
}

proptest! {
    // Every new K and V compiles a kernel, so a few cases a run; the seed changes from run to run.
    #![proptest_config(ProptestConfig { cases: 8, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn chunk_bwd_matches_reference_for_any_shape(case in any_case()) {
        if let Some((device, stream)) = gpu("chunk_bwd_matches_reference_for_any_shape") {
            let beta = if case.beta == BetaForm::PerChannel { BetaForm::PerHead } else { case.beta };
            let case = Case { channel_gates: ChannelGates::None, beta, t: 5 * case.t, ..case };
            assert_eq!(check::<f32>(&device, &stream, &case), Ok(()), "{case:?}");
            // Keys of few channels nearly repeat, and bf16 rounds sums of them before they cancel.
            let nearly_repeats = case.k < 48 || case.beta_map == BetaMap::TwiceSigmoid;
            assert_eq!(check_repeats::<bf16>(&device, &stream, &case, nearly_repeats), Ok(()), "{case:?}");
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
    let (problem, incoming) = (Problem::new::<f16, f32>(&case), Incoming::new::<f16>(&case));
    let want = run::<f16>(&device, &stream, &case, (&problem, &incoming)).expect("runs");
    let narrow = |wanted: &str| match want.iter().find(|(name, _)| *name == wanted) {
        Some((_, Grad::Narrow(x))) => x.clone(),
        _ => panic!("there is no {wanted}"),
    };
    let wide = |wanted: &str| match want.iter().find(|(name, _)| *name == wanted) {
        Some((_, Grad::Wide(x))) => x.clone(),
        _ => panic!("there is no {wanted}"),
    };
    let tensors = Tensors::<f16, f32>::new(&stream, &case, &problem);
    let d_o = to_device::<f16>(&stream, "d_o", &incoming.d_o);
    let d_o = d_o.view();
    tensors.with(&case, |x| {
        let x = bwd_inputs(&x, &d_o, None);
        let mut dx = chunk_bwd(&device, &case.shape(), &x, &options(&case)).expect("runs");
        let read = |x: &CudaSlice<f16>| stream.clone_dtoh(x).expect("copies");
        let read_wide = |x: &CudaSlice<f32>| stream.clone_dtoh(x).expect("copies");
        let dg = dx.dg_logits.as_mut().expect("the gate is raw");
        let (d_a_log, d_dt_bias) = (dx.d_a_log.as_mut().expect("raw"), dx.d_dt_bias.as_mut().expect("raw"));
        let dbeta = dx.dbeta.as_mut().expect("there is one");
        for (name, got) in [("dq", &dx.dq), ("dk", &dx.dk), ("dv", &dx.dv), ("dg", &*dg), ("dbeta", &*dbeta)]
        {
            assert_eq!(same_bits(name, &narrow(name), &read(got)), Ok(()));
        }
        for (name, got) in
            [("d_a_log", &*d_a_log), ("d_dt_bias", &*d_dt_bias), ("d_initial_state", &dx.d_initial_state)]
        {
            assert_eq!(same_bits(name, &wide(name), &read_wide(got)), Ok(()));
        }

        let plan = ChunkBwd::<f16>::new(&device, &case.shape(), &options(&case)).expect("valid");
        let mut workspace = stream.alloc_zeros::<u8>(plan.workspace_bytes()).expect("fits");
        stream.memset_zeros(&mut *d_a_log).expect("is set");
        let replay = bench
            .capture(1, |stream, _| {
                let mut outputs = ChunkBwdOutputs {
                    dq: &mut dx.dq,
                    dk: &mut dx.dk,
                    dv: &mut dx.dv,
                    dg: GateGrads::Raw { dg: &mut *dg, d_a_log: Some(&mut *d_a_log), d_dt_bias: None },
                    dbeta: Some(&mut *dbeta),
                    d_initial_state: None,
                };
                plan.run(stream, &x, &mut outputs, &mut workspace)
            })
            .expect("captures");
        replay.time(2);
        assert_eq!(same_bits("d_a_log", &wide("d_a_log"), &read_wide(d_a_log)), Ok(()));
    });
}

#[test]
fn wrong_arguments_are_named_before_anything_is_launched() {
    let Some((device, stream)) = gpu("wrong_arguments_are_named_before_anything_is_launched") else { return };
    let shape = Shape { seqs: SeqLens::dense(1, 2), h: 1, hv: 2, k: 64, v: 32 };
    let options = ChunkFwdOptions::new(1.0).with_gate(GateForm::Raw);
    let plan = ChunkBwd::<f32>::new(&device, &shape, &options).expect("valid");
    let new = |len: usize| stream.alloc_zeros::<f32>(len).expect("fits");
    let (qk, v, heads, hv, odd) = (new(128), new(128), new(4), new(2), new(127));
    let good = ChunkBwdInputs {
        q: &qk,
        k: &qk,
        v: &v,
        g: Gate::Raw { g: &heads, a_log: &hv, dt_bias: None },
        beta: Beta::PerHead(&heads),
        initial_state: None,
        d_o: &v,
        d_final_state: None,
    };
    let mut grads = [128, 128, 128, 4, 4].map(|len| Guarded::<f32>::output(&stream, "a gradient", len));
    let mut workspace = stream.alloc_zeros::<u8>(plan.workspace_bytes()).expect("fits");
    type Spoil = fn(&mut ChunkBwdOutputs<'_, f32>);
    let mut text = |x: &ChunkBwdInputs<'_, f32>, spoil: Spoil| {
        let mut views = grads.each_mut().map(Guarded::view_mut);
        let [dq, dk, dv, dg, dbeta] = &mut views;
        let mut dx = ChunkBwdOutputs {
            dq,
            dk,
            dv,
            dg: GateGrads::Raw { dg, d_a_log: None, d_dt_bias: None },
            dbeta: Some(dbeta),
            d_initial_state: None,
        };
        spoil(&mut dx);
        plan.run(&stream, x, &mut dx, &mut workspace).expect_err("must be refused").to_string()
    };
    for (x, spoil, want) in [
        (
            ChunkBwdInputs { q: &odd, ..good },
            (|_| {}) as Spoil,
            "`q` is [B, T, H, K], which is 128 elements here, but holds 127",
        ),
        (
            ChunkBwdInputs { d_o: &odd, ..good },
            |_| {},
            "`d_o` is [B, T, HV, V], which is 128 elements here, but holds 127",
        ),
        (
            ChunkBwdInputs { d_final_state: Some(&odd), ..good },
            |_| {},
            "`d_final_state` is [N, HV, K, V], which is 4096 elements here, but holds 127",
        ),
        (
            ChunkBwdInputs { g: Gate::Log(&heads), ..good },
            |_| {},
            "`g` must be `Gate::Raw`, since the plan is for logits",
        ),
        (good, |dx| dx.dbeta = None, "`dbeta` must be given, since its input is"),
        (good, |dx| dx.dg = GateGrads::None, "`dg` must be the variant of `GateGrads` that `g` is of `Gate`"),
    ] {
        assert_eq!(text(&x, spoil), want);
    }
    assert!(grads.iter_mut().all(|x| x.read().iter().all(|x| x.is_nan())));

    let on_device = Shape { seqs: SeqLens::packed_on_device(1, 2), ..shape };
    let error = ChunkBwd::<f32>::new(&device, &on_device, &ChunkFwdOptions::new(1.0));
    assert!(matches!(error, Err(Error::SeqLens { .. })), "{error:?}");
}
