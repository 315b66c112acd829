//! `fused_mul_recurrent_fwd` on the GPU against the float64 recurrence.

use fla_core::cudarc::driver::{DevicePtr, DevicePtrMut};
use fla_core::testing::{Guarded, Poison, gpu, run_cases, same_bits};
use fla_core::{DType, FinalState, SeqLens, Shape};
use fla_reference::compare::relative_rms;
use fla_reference::inputs::{Gates, Rng, Storage, round_to};
use fla_reference::tolerance::{Backend, Class, Dtype, Key, Model, Pass, limit};
use fla_rwkv7::{
    FusedMulRecurrentFwd, FusedMulRecurrentFwdInputs, RecurrentFwdOptions, RecurrentFwdOutputs,
    fused_mul_recurrent_fwd,
};
use half::{bf16, f16};

struct Case {
    name: &'static str,
    b: usize,
    t: usize,
    d: usize,
    initial_state: bool,
}

const H: usize = 4;
const BASE: Case = Case { name: "many tokens", b: 2, t: 33, d: 64, initial_state: true };
const CASES: &[Case] = &[
    BASE,
    Case { name: "one token", t: 1, ..BASE },
    Case { name: "no initial state", t: 5, initial_state: false, ..BASE },
    Case { name: "heads of 50", d: 50, ..BASE },
    Case { name: "heads of 128", d: 128, t: 9, ..BASE },
    // Enough states that those of sm_90 stream through shared memory.
    Case { name: "many states, one token", b: 411, t: 1, ..BASE },
    Case { name: "many states, four tokens", b: 135, t: 4, ..BASE },
];

fn check<T: Poison + Storage>(case: &Case) -> Result<(), String> {
    let Some((device, stream)) = gpu("fused_mul_recurrent_fwd_matches_reference") else { return Ok(()) };
    let Case { b, t, d, .. } = *case;
    let shape = Shape { seqs: SeqLens::dense(b, t), h: H, k: d, v: d };
    let mut rng = Rng::new(11);
    let host = [
        rng.normal::<f64>(shape.k_len(), 1.0),
        rng.gates(shape.k_len(), Gates::Rwkv7),
        rng.normal(shape.k_len(), 1.0),
        rng.normal(shape.v_len(), 1.0),
        rng.unit_rows(b * t * H, d),
        rng.uniform(shape.k_len(), 0.0, 1.0),
    ]
    .map(|x| round_to::<T, f64>(&x));
    let state = round_to::<f32, f64>(&rng.normal::<f64>(shape.state_len(), 1.0));
    let state = case.initial_state.then_some(state);

    let [r, w, k, v, kk, a] = &host;
    let inputs = fla_reference::rwkv7::FusedMulInputs { r, w, k, v, kk, a, initial_state: state.as_deref() };
    let seqs = fla_reference::SeqLens::Dense { b, t };
    let reference_shape = fla_reference::Shape { seqs, h: H, k: d, v: d };
    let options = fla_reference::rwkv7::Options::new(1.0);
    let want = fla_reference::rwkv7::fused_mul_recurrent_fwd(&reference_shape, &inputs, &options);

    let narrow = |x: &Vec<f64>| x.iter().map(|x| T::from_f32(*x as f32)).collect::<Vec<T>>();
    let device_inputs = host.each_ref().map(|x| Guarded::input(&stream, "an input", &narrow(x)));
    let initial = state.as_ref().map(|state| {
        let state: Vec<f32> = state.iter().map(|x| *x as f32).collect();
        Guarded::input(&stream, "initial_state", &state)
    });
    let views = device_inputs.each_ref().map(Guarded::view);
    let initial = initial.as_ref().map(Guarded::view);
    let [r, w, k, v, kk, a] = &views;
    let initial_state = initial.as_ref().map(|state| state as &dyn DevicePtr<f32>);
    let x = FusedMulRecurrentFwdInputs { r, w, k, v, kk, a, initial_state, cu_seqlens: None };
    let options = RecurrentFwdOptions::new();
    let plan = FusedMulRecurrentFwd::<T>::new(&device, &shape, &options).map_err(|e| e.to_string())?;
    let mut o = Guarded::<T>::output(&stream, "o", shape.v_len());
    let mut last = Guarded::<f32>::output(&stream, "final_state", shape.state_len());
    {
        let (mut o, mut last) = (o.view_mut(), last.view_mut());
        let final_state: &mut dyn DevicePtrMut<f32> = &mut last;
        let mut y =
            RecurrentFwdOutputs { o: &mut o, final_state: FinalState::New(final_state), token_states: None };
        plan.run(&stream, &x, &mut y).map_err(|e| e.to_string())?;
    }
    let (o, last) = (o.read(), last.read());
    let again = fused_mul_recurrent_fwd(&device, &shape, &x, &options).map_err(|e| e.to_string())?;
    same_bits("o", &o, &stream.clone_dtoh(&again.o).map_err(|e| e.to_string())?)?;
    same_bits("final_state", &last, &stream.clone_dtoh(&again.final_state).map_err(|e| e.to_string())?)?;

    let dtype = match T::DTYPE {
        DType::F32 => Dtype::F32,
        DType::Bf16 => Dtype::Bf16,
        DType::F16 => Dtype::F16,
    };
    let o: Vec<f64> = o.iter().map(|x| f64::from(x.to_f32())).collect();
    let last: Vec<f64> = last.iter().map(|x| f64::from(*x)).collect();
    for (class, got, want) in [(Class::Output, o, want.o), (Class::FinalState, last, want.final_state)] {
        let key = Key { backend: Backend::Gpu, model: Model::Rwkv7, pass: Pass::RecurrentFwd, dtype, class };
        let limit = limit(key).map_err(|error| error.to_string())?;
        let error = relative_rms(&got, &want);
        if error > limit {
            return Err(format!("{dtype:?} {class:?}: relative RMS {error:.2e} > {limit:.0e}"));
        }
    }
    Ok(())
}

#[test]
fn fused_mul_recurrent_fwd_matches_reference() {
    run_cases(
        CASES,
        |case| case.name.into(),
        |case| {
            check::<f32>(case)?;
            check::<bf16>(case)?;
            check::<f16>(case)
        },
    );
}

#[test]
fn errors_use_the_names_of_this_form() {
    let Some((device, stream)) = gpu("errors_use_the_names_of_this_form") else { return };
    let shape = Shape { seqs: SeqLens::dense(1, 1), h: 1, k: 64, v: 64 };
    let plan = FusedMulRecurrentFwd::<f32>::new(&device, &shape, &RecurrentFwdOptions::new()).expect("valid");
    let good = stream.alloc_zeros::<f32>(64).expect("fits");
    let bad = stream.alloc_zeros::<f32>(65).expect("fits");
    let x = FusedMulRecurrentFwdInputs {
        r: &good,
        w: &good,
        k: &good,
        v: &good,
        kk: &good,
        a: &good,
        initial_state: None,
        cu_seqlens: None,
    };
    let mut o = stream.alloc_zeros::<f32>(64).expect("fits");
    for (x, name) in [
        (FusedMulRecurrentFwdInputs { r: &bad, ..x }, "`r` is"),
        (FusedMulRecurrentFwdInputs { w: &bad, ..x }, "`w` is"),
        (FusedMulRecurrentFwdInputs { kk: &bad, ..x }, "`kk` is"),
        (FusedMulRecurrentFwdInputs { a: &bad, ..x }, "`a` is"),
    ] {
        let error = plan.run(
            &stream,
            &x,
            &mut RecurrentFwdOutputs { o: &mut o, final_state: FinalState::Dropped, token_states: None },
        );
        let error = error.expect_err(name).to_string();
        assert!(error.starts_with(name), "{error}");
    }
}
