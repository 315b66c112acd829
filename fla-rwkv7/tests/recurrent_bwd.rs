//! `recurrent_bwd` and `fused_mul_recurrent_bwd` on the GPU against the float64 gradients, under RWKV-7's names.

use fla_core::cudarc::driver::{CudaSlice, DevicePtr};
use fla_core::testing::{Poison, gpu, run_cases, same_bits};
use fla_core::{DType, SeqLens, Shape};
use fla_reference::compare::{F16_SPACING, relative_rms_beyond};
use fla_reference::inputs::{Gates, REGIMES, Rng, Storage, round_to};
use fla_reference::tolerance::{Backend, Class, Dtype, Key, Model, Pass, limit};
use fla_rwkv7::{
    FusedMulRecurrentBwdInputs, RecurrentBwdInputs, RecurrentFwdOptions, fused_mul_recurrent_bwd,
    recurrent_bwd,
};
use half::{bf16, f16};

/// Which of the two forms of the low-rank part.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Form {
    /// Removal and replacement keys.
    Keys,
    /// The normalised key and its rate.
    KeyAndRate,
}

#[derive(Clone, Debug)]
struct Case {
    name: &'static str,
    b: usize,
    t: usize,
    d: usize,
    gates: Gates,
    states: bool,
}

const H: usize = 2;
const BASE: Case = Case { name: "many tokens", b: 2, t: 33, d: 64, gates: Gates::Rwkv7, states: true };
const CASES: &[Case] = &[
    BASE,
    Case { name: "one token", t: 1, ..BASE },
    Case { name: "no states", states: false, ..BASE },
    Case { name: "heads of 128", d: 128, t: 9, ..BASE },
    Case { name: "heads of 48", d: 48, t: 65, ..BASE },
];

fn check<T: Poison + Storage>(case: &Case, form: Form) -> Result<(), String> {
    let Some((device, stream)) = gpu("recurrent_bwd") else { return Ok(()) };
    let Case { b, t, d, .. } = *case;
    let shape = Shape { seqs: SeqLens::dense(b, t), h: H, k: d, v: d };
    let mut rng = Rng::new(3);
    let kk: Vec<f64> = rng.unit_rows(b * t * H, d);
    let rate: Vec<f64> = rng.uniform(kk.len(), 0.0, 1.0);
    // The last two before d_o are (a, b), or (kk, a).
    let (first, second) = match form {
        Form::Keys => (kk.iter().map(|x| -x).collect(), kk.iter().zip(&rate).map(|(x, r)| x * r).collect()),
        Form::KeyAndRate => (kk.clone(), rate),
    };
    let host = [
        rng.normal::<f64>(shape.k_len(), 1.0),
        rng.gates(shape.k_len(), case.gates),
        rng.normal(shape.k_len(), 1.0),
        rng.normal(shape.v_len(), 1.0),
        first,
        second,
        rng.normal(shape.v_len(), 1.0),
    ]
    .map(|x| round_to::<T, f64>(&x));
    let states = [(); 2].map(|()| round_to::<f32, f64>(&rng.normal::<f64>(shape.state_len(), 1.0)));
    let given = states.each_ref().map(|s| case.states.then_some(&s[..]));

    let [r, w, k, v, x4, x5, d_o] = &host;
    let seqs = fla_reference::SeqLens::Dense { b, t };
    let reference_shape = fla_reference::Shape { seqs, h: H, k: d, v: d };
    let options = fla_reference::rwkv7::Options::new(1.0);
    let dy = fla_reference::rwkv7::OutputGrads { d_o, d_final_state: given[1] };
    let want = match form {
        Form::Keys => {
            let x = fla_reference::rwkv7::Inputs { r, w, k, v, a: x4, b: x5, initial_state: given[0] };
            let dx = fla_reference::rwkv7::recurrent_bwd(&reference_shape, &x, &dy, &options);
            [dx.dr, dx.dw, dx.dk, dx.dv, dx.da, dx.db, dx.d_initial_state]
        }
        Form::KeyAndRate => {
            let x =
                fla_reference::rwkv7::FusedMulInputs { r, w, k, v, kk: x4, a: x5, initial_state: given[0] };
            let dx = fla_reference::rwkv7::fused_mul_recurrent_bwd(&reference_shape, &x, &dy, &options);
            [dx.dr, dx.dw, dx.dk, dx.dv, dx.dkk, dx.da, dx.d_initial_state]
        }
    };

    let uploaded = host.each_ref().map(|x| {
        let x: Vec<T> = x.iter().map(|x| T::from_f32(*x as f32)).collect();
        stream.clone_htod(&x).expect("copies")
    });
    let device_states = states.each_ref().map(|s| {
        let s: Vec<f32> = s.iter().map(|x| *x as f32).collect();
        stream.clone_htod(&s).expect("copies")
    });
    let [initial_state, d_final_state] =
        device_states.each_ref().map(|s| case.states.then_some(s as &dyn DevicePtr<f32>));
    let [r, w, k, v, x4, x5, d_o] = &uploaded;
    let options = RecurrentFwdOptions::new();
    let once = || -> Result<([CudaSlice<T>; 6], CudaSlice<f32>), String> {
        match form {
            Form::Keys => {
                let x = RecurrentBwdInputs { r, w, k, v, a: x4, b: x5, initial_state, d_o, d_final_state };
                let dx = recurrent_bwd(&device, &shape, &x, &options).map_err(|e| e.to_string())?;
                Ok(([dx.dr, dx.dw, dx.dk, dx.dv, dx.da, dx.db], dx.d_initial_state))
            }
            Form::KeyAndRate => {
                let x = FusedMulRecurrentBwdInputs {
                    r,
                    w,
                    k,
                    v,
                    kk: x4,
                    a: x5,
                    initial_state,
                    d_o,
                    d_final_state,
                };
                let dx = fused_mul_recurrent_bwd(&device, &shape, &x, &options).map_err(|e| e.to_string())?;
                Ok(([dx.dr, dx.dw, dx.dk, dx.dv, dx.dkk, dx.da], dx.d_initial_state))
            }
        }
    };
    let ((grads, state), (again, state_again)) = (once()?, once()?);
    let read = |x: &CudaSlice<T>| stream.clone_dtoh(x).map_err(|e| e.to_string());
    let read_state = |x: &CudaSlice<f32>| stream.clone_dtoh(x).map_err(|e| e.to_string());
    same_bits("d_initial_state", &read_state(&state)?, &read_state(&state_again)?)?;
    let mut got = Vec::new();
    for (x, again) in grads.iter().zip(&again) {
        same_bits("a gradient", &read(x)?, &read(again)?)?;
        got.push(read(x)?.into_iter().map(|x| f64::from(x.to_f32())).collect::<Vec<_>>());
    }
    got.push(read_state(&state)?.into_iter().map(f64::from).collect());

    let dtype = match T::DTYPE {
        DType::F32 => Dtype::F32,
        DType::Bf16 => Dtype::Bf16,
        DType::F16 => Dtype::F16,
    };
    let slack = if T::DTYPE == DType::F16 { F16_SPACING } else { 0.0 };
    for (i, (got, want)) in got.iter().zip(&want).enumerate() {
        let class = if i == 1 { Class::GateGrad } else { Class::Grad };
        let key = Key { backend: Backend::Gpu, model: Model::Rwkv7, pass: Pass::RecurrentBwd, dtype, class };
        let (error, limit) =
            (relative_rms_beyond(got, want, slack), limit(key).map_err(|error| error.to_string())?);
        if error > limit {
            return Err(format!("{form:?}, {dtype:?}, gradient {i}: relative RMS {error:.2e} > {limit:.0e}"));
        }
    }
    Ok(())
}

fn check_all(case: &Case) -> Result<(), String> {
    for form in [Form::Keys, Form::KeyAndRate] {
        check::<f32>(case, form)?;
        check::<bf16>(case, form)?;
        check::<f16>(case, form)?;
    }
    Ok(())
}

#[test]
fn recurrent_bwd_matches_reference() {
    run_cases(CASES, |case| case.name.into(), check_all);
}

#[test]
fn recurrent_bwd_survives_every_gate_regime() {
    run_cases(REGIMES, |g| format!("{g:?}"), |gates| check_all(&Case { gates: *gates, ..BASE }));
}

#[test]
fn errors_use_the_models_names() {
    let Some((device, stream)) = gpu("errors_use_the_models_names") else { return };
    let shape = Shape { seqs: SeqLens::dense(1, 1), h: 1, k: 64, v: 64 };
    let (good, bad) =
        (stream.alloc_zeros::<f32>(64).expect("fits"), stream.alloc_zeros::<f32>(65).expect("fits"));
    let x = RecurrentBwdInputs {
        r: &good,
        w: &bad,
        k: &good,
        v: &good,
        a: &good,
        b: &good,
        initial_state: None,
        d_o: &good,
        d_final_state: None,
    };
    let error = recurrent_bwd(&device, &shape, &x, &RecurrentFwdOptions::new()).expect_err("w is too long");
    assert_eq!(error.to_string(), "`w` is [B, T, H, K], which is 64 elements here, but holds 65");
    let x = FusedMulRecurrentBwdInputs {
        r: &good,
        w: &good,
        k: &good,
        v: &good,
        kk: &good,
        a: &bad,
        initial_state: None,
        d_o: &good,
        d_final_state: None,
    };
    let error =
        fused_mul_recurrent_bwd(&device, &shape, &x, &RecurrentFwdOptions::new()).expect_err("a is too long");
    assert_eq!(error.to_string(), "`a` is [B, T, H, K], which is 64 elements here, but holds 65");
}
