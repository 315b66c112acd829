//! `recurrent_fwd` on the GPU against the float64 recurrence, under RWKV-7's names.

use fla_core::cudarc::driver::{DevicePtr, DevicePtrMut};
use fla_core::testing::{Guarded, Poison, gpu, run_cases, same_bits};
use fla_core::{DType, FinalState, SeqLens, Shape};
use fla_reference::compare::relative_rms;
use fla_reference::inputs::{Gates, REGIMES, Rng, Storage, round_to};
use fla_reference::tolerance::{Backend, Class, Dtype, Key, Model, Pass, limit};
use fla_rwkv7::{
    RecurrentFwd, RecurrentFwdInputs, RecurrentFwdOptions, RecurrentFwdOutputs, RecurrentFwdResult,
    recurrent_fwd,
};
use half::{bf16, f16};

#[derive(Clone, Debug)]
struct Case {
    name: &'static str,
    b: usize,
    t: usize,
    d: usize,
    gates: Gates,
    initial_state: bool,
}

const H: usize = 2;
const BASE: Case = Case { name: "", b: 2, t: 33, d: 64, gates: Gates::Rwkv7, initial_state: true };
const CASES: &[Case] = &[
    Case { name: "one token", t: 1, ..BASE },
    Case { name: "one token, no state", t: 1, initial_state: false, ..BASE },
    Case { name: "many tokens", ..BASE },
    Case { name: "heads of 128", d: 128, ..BASE },
    Case { name: "heads of 48", d: 48, t: 65, ..BASE },
];

/// Runs the plan twice on poisoned buffers, checks both results against the reference, and returns them with
/// the host's inputs: r, w, k, v, a, b.
fn check<T: Poison + Storage>(case: &Case) -> Result<(), String> {
    let Some((device, stream)) = gpu("recurrent_fwd") else { return Ok(()) };
    let Case { b, t, d, .. } = *case;
    let shape = Shape { seqs: SeqLens::dense(b, t), h: H, k: d, v: d };
    let mut rng = Rng::new(3);
    let kk: Vec<f64> = rng.unit_rows(b * t * H, d);
    let host = [
        rng.normal::<f64>(shape.k_len(), 1.0),
        rng.gates(shape.k_len(), case.gates),
        rng.normal(shape.k_len(), 1.0),
        rng.normal(shape.v_len(), 1.0),
        kk.iter().map(|x| -x).collect(),
        kk.iter().map(|x| x * rng.unit()).collect(),
    ]
    .map(|x| round_to::<T, f64>(&x));
    let state: Vec<f64> = round_to::<f32, f64>(&rng.normal::<f64>(shape.state_len(), 1.0));
    let state = case.initial_state.then_some(state);

    let [r, w, k, v, a, b_] = &host;
    let inputs = fla_reference::rwkv7::Inputs { r, w, k, v, a, b: b_, initial_state: state.as_deref() };
    let seqs = fla_reference::SeqLens::Dense { b, t };
    let reference_shape = fla_reference::Shape { seqs, h: H, k: d, v: d };
    let options = fla_reference::rwkv7::Options::new(1.0);
    let want = fla_reference::rwkv7::recurrent_fwd(&reference_shape, &inputs, &options);

    let narrow = |x: &Vec<f64>| x.iter().map(|x| T::from_f32(*x as f32)).collect::<Vec<T>>();
    let device_inputs = host.each_ref().map(|x| Guarded::input(&stream, "an input", &narrow(x)));
    let initial = state.as_ref().map(|s| {
        let s: Vec<f32> = s.iter().map(|x| *x as f32).collect();
        Guarded::input(&stream, "initial_state", &s)
    });
    let views = device_inputs.each_ref().map(Guarded::view);
    let initial = initial.as_ref().map(Guarded::view);
    let [r, w, k, v, a, b] = &views;
    let initial_state = initial.as_ref().map(|s| s as &dyn DevicePtr<f32>);
    let x = RecurrentFwdInputs { r, w, k, v, a, b, initial_state, cu_seqlens: None };
    let plan =
        RecurrentFwd::<T>::new(&device, &shape, &RecurrentFwdOptions::new()).map_err(|e| e.to_string())?;
    let mut results = Vec::new();
    for _ in 0..2 {
        let mut o = Guarded::<T>::output(&stream, "o", shape.v_len());
        let mut last = Guarded::<f32>::output(&stream, "final_state", shape.state_len());
        {
            let (mut o, mut last) = (o.view_mut(), last.view_mut());
            let final_state: &mut dyn DevicePtrMut<f32> = &mut last;
            let mut y = RecurrentFwdOutputs {
                o: &mut o,
                final_state: FinalState::New(final_state),
                token_states: None,
            };
            plan.run(&stream, &x, &mut y).map_err(|e| e.to_string())?;
        }
        results.push((o.read(), last.read()));
    }
    same_bits("o", &results[0].0, &results[1].0)?;
    same_bits("final_state", &results[0].1, &results[1].1)?;
    let RecurrentFwdResult { o, final_state } =
        recurrent_fwd(&device, &shape, &x, &RecurrentFwdOptions::new()).map_err(|e| e.to_string())?;
    same_bits("o of the one call", &results[0].0, &stream.clone_dtoh(&o).map_err(|e| e.to_string())?)?;
    let one_call_state = stream.clone_dtoh(&final_state).map_err(|e| e.to_string())?;
    same_bits("final_state of the one call", &results[0].1, &one_call_state)?;

    let dtype = match T::DTYPE {
        DType::F32 => Dtype::F32,
        DType::Bf16 => Dtype::Bf16,
        DType::F16 => Dtype::F16,
    };
    let key =
        |class| Key { backend: Backend::Gpu, model: Model::Rwkv7, pass: Pass::RecurrentFwd, dtype, class };
    let o: Vec<f64> = results[0].0.iter().map(|x| f64::from(x.to_f32())).collect();
    for (class, got, want) in [
        (Class::Output, o, want.o),
        (Class::FinalState, results[0].1.iter().map(|x| f64::from(*x)).collect(), want.final_state),
    ] {
        let limit = limit(key(class)).map_err(|error| error.to_string())?;
        let error = relative_rms(&got, &want);
        if error > limit {
            return Err(format!("{dtype:?} {class:?}: relative RMS {error:.2e} > {limit:.0e}"));
        }
    }
    Ok(())
}

fn check_all_dtypes(case: &Case) -> Result<(), String> {
    check::<f32>(case)?;
    check::<bf16>(case)?;
    check::<f16>(case)
}

#[test]
fn recurrent_fwd_matches_reference() {
    run_cases(CASES, |case| case.name.into(), check_all_dtypes);
}

#[test]
fn recurrent_fwd_survives_every_gate_regime() {
    run_cases(REGIMES, |g| format!("{g:?}"), |gates| check_all_dtypes(&Case { gates: *gates, ..BASE }));
}

#[test]
fn errors_use_the_models_names() {
    let Some((device, stream)) = gpu("errors_use_the_models_names") else { return };
    let shape = Shape { seqs: SeqLens::dense(1, 1), h: 1, k: 64, v: 64 };
    let plan = RecurrentFwd::<f32>::new(&device, &shape, &RecurrentFwdOptions::new()).expect("valid");
    let (good, bad) =
        (stream.alloc_zeros::<f32>(64).expect("fits"), stream.alloc_zeros::<f32>(65).expect("fits"));
    let misaligned = bad.slice(1..);
    let x = RecurrentFwdInputs {
        r: &good,
        w: &good,
        k: &good,
        v: &good,
        a: &good,
        b: &good,
        initial_state: None,
        cu_seqlens: None,
    };
    let mut o = stream.alloc_zeros::<f32>(64).expect("fits");
    for (x, text) in [
        (RecurrentFwdInputs { r: &bad, ..x }, "`r` is [B, T, H, K], which is 64 elements here, but holds 65"),
        (RecurrentFwdInputs { w: &bad, ..x }, "`w` is [B, T, H, K], which is 64 elements here, but holds 65"),
        (RecurrentFwdInputs { w: &misaligned, ..x }, "`w` must lie at a multiple of 16 bytes"),
    ] {
        let error = plan.run(
            &stream,
            &x,
            &mut RecurrentFwdOutputs { o: &mut o, final_state: FinalState::Dropped, token_states: None },
        );
        let error = error.expect_err(text).to_string();
        assert!(error.starts_with(text), "{error}");
    }
}
