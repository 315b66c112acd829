//! `chunk_bwd` and `fused_mul_chunk_bwd` on the GPU against the float64 gradients, under RWKV-7's names.

mod problem;

use std::sync::Arc;

use fla_core::cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut};
use fla_core::testing::{Guarded, Poison, gpu, run_cases, same_bits};
use fla_core::{Device, Error, SeqLens, Shape};
use fla_reference::inputs::Storage;
use fla_reference::tolerance::{Class, Pass};
use fla_rwkv7::{
    ChunkBwd, ChunkBwdInputs, ChunkBwdOutputs, ChunkFwdInputs, ChunkFwdOptions, FusedMulChunkBwd,
    FusedMulChunkBwdInputs, FusedMulChunkBwdOutputs, FusedMulChunkFwdInputs, SavedStates, chunk_bwd,
    chunk_fwd, fused_mul_chunk_bwd, fused_mul_chunk_fwd,
};
use half::{bf16, f16};
use problem::{CASES, CLASSES, Case, Form, Judge, Problem, narrowed, regimes, widened};

/// Gradients over tokens in the order of the problem's vectors, and that of the initial state.
type Got<T> = ([Vec<T>; 6], Vec<f32>);

/// The names of the gradients.
fn names(form: Form) -> [&'static str; 7] {
    match form {
        Form::Keys => ["dr", "dw", "dk", "dv", "da", "db", "d_initial_state"],
        Form::KeyAndRate => ["dr", "dw", "dk", "dv", "dkk", "da", "d_initial_state"],
    }
}

/// One run on poisoned buffers, which computes states once more.
fn run<T: Poison>(
    device: &Device,
    stream: &Arc<CudaStream>,
    case: &Case,
    problem: &Problem,
) -> Result<Got<T>, Error> {
    let (shape, options) = (case.shape(), case.options(SavedStates::Recomputed));
    let inputs = problem.vectors.each_ref().map(|x| Guarded::input(stream, "an input", &narrowed::<T>(x)));
    let state =
        |s: &Option<Vec<f64>>| s.as_ref().map(|s| Guarded::input(stream, "a state", &narrowed::<f32>(s)));
    let (initial, d_final) = (state(&problem.initial_state), state(&problem.d_final_state));
    let views = inputs.each_ref().map(Guarded::view);
    let [r, w, k, v, x4, x5, d_o] = &views;
    let (initial, d_final) = (initial.as_ref().map(Guarded::view), d_final.as_ref().map(Guarded::view));
    let initial_state = initial.as_ref().map(|s| s as &dyn DevicePtr<f32>);
    let d_final_state = d_final.as_ref().map(|s| s as &dyn DevicePtr<f32>);
    let (k_len, v_len) = (shape.k_len(), shape.v_len());
    let mut grads =
        [k_len, k_len, k_len, v_len, k_len, k_len].map(|len| Guarded::<T>::output(stream, "a gradient", len));
    let mut d_initial = Guarded::<f32>::output(stream, "d_initial_state", shape.state_len());
    {
        let mut views = grads.each_mut().map(Guarded::view_mut);
        let [dr, dw, dk, dv, dx4, dx5] = &mut views;
        let mut d_initial = d_initial.view_mut();
        let d_initial_state: Option<&mut dyn DevicePtrMut<f32>> = Some(&mut d_initial);
        let nan = |bytes| stream.clone_htod(&vec![0xff_u8; bytes]).expect("fits");
        match case.form {
            Form::Keys => {
                let plan = ChunkBwd::<T>::new(device, &shape, &options)?;
                let x = ChunkBwdInputs {
                    r,
                    w,
                    k,
                    v,
                    a: x4,
                    b: x5,
                    initial_state,
                    states: None,
                    d_o,
                    d_final_state,
                };
                let mut dx = ChunkBwdOutputs { dr, dw, dk, dv, da: dx4, db: dx5, d_initial_state };
                plan.run(stream, &x, &mut dx, &mut nan(plan.workspace_bytes()))?;
            }
            Form::KeyAndRate => {
                let plan = FusedMulChunkBwd::<T>::new(device, &shape, &options)?;
                let x = FusedMulChunkBwdInputs {
                    r,
                    w,
                    k,
                    v,
                    kk: x4,
                    a: x5,
                    initial_state,
                    states: None,
                    d_o,
                    d_final_state,
                };
                let mut dx = FusedMulChunkBwdOutputs { dr, dw, dk, dv, dkk: dx4, da: dx5, d_initial_state };
                plan.run(stream, &x, &mut dx, &mut nan(plan.workspace_bytes()))?;
            }
        }
    }
    Ok((grads.map(|mut x| x.read()), d_initial.read()))
}

/// The same by the one-call forms, from states that the forward pass keeps.
fn one_call<T: Poison>(
    device: &Device,
    stream: &Arc<CudaStream>,
    case: &Case,
    problem: &Problem,
) -> Result<Got<T>, Error> {
    let (shape, options) = (case.shape(), case.options(SavedStates::Kept));
    let inputs = problem.vectors.each_ref().map(|x| stream.clone_htod(&narrowed::<T>(x)).expect("copies"));
    let state =
        |s: &Option<Vec<f64>>| s.as_ref().map(|s| stream.clone_htod(&narrowed::<f32>(s)).expect("copies"));
    let (initial, d_final) = (state(&problem.initial_state), state(&problem.d_final_state));
    let initial_state = initial.as_ref().map(|s| s as &dyn DevicePtr<f32>);
    let d_final_state = d_final.as_ref().map(|s| s as &dyn DevicePtr<f32>);
    let [r, w, k, v, x4, x5, d_o] = &inputs;
    let read = |x: &CudaSlice<T>| stream.clone_dtoh(x).expect("copies");
    let (grads, d_initial) = match case.form {
        Form::Keys => {
            let x = ChunkFwdInputs { r, w, k, v, a: x4, b: x5, initial_state };
            let states = chunk_fwd(device, &shape, &x, &options)?.states;
            let states = states.as_ref().map(|s| s as &dyn DevicePtr<u16>);
            let x = ChunkBwdInputs { r, w, k, v, a: x4, b: x5, initial_state, states, d_o, d_final_state };
            let dx = chunk_bwd(device, &shape, &x, &options)?;
            ([&dx.dr, &dx.dw, &dx.dk, &dx.dv, &dx.da, &dx.db].map(read), dx.d_initial_state)
        }
        Form::KeyAndRate => {
            let x = FusedMulChunkFwdInputs { r, w, k, v, kk: x4, a: x5, initial_state };
            let states = fused_mul_chunk_fwd(device, &shape, &x, &options)?.states;
            let states = states.as_ref().map(|s| s as &dyn DevicePtr<u16>);
            let x = FusedMulChunkBwdInputs {
                r,
                w,
                k,
                v,
                kk: x4,
                a: x5,
                initial_state,
                states,
                d_o,
                d_final_state,
            };
            let dx = fused_mul_chunk_bwd(device, &shape, &x, &options)?;
            ([&dx.dr, &dx.dw, &dx.dk, &dx.dv, &dx.dkk, &dx.da].map(read), dx.d_initial_state)
        }
    };
    Ok((grads, stream.clone_dtoh(&d_initial).expect("copies")))
}

fn check<T: Poison + Storage>(device: &Device, stream: &Arc<CudaStream>, case: &Case) -> Result<(), String> {
    let problem = Problem::new::<T>(case);
    let (want, cancellation) = problem.grads(case);
    let text = |error: Error| error.to_string();
    let (grads, state) = run::<T>(device, stream, case, &problem).map_err(text)?;
    let (grads_again, state_again) = one_call::<T>(device, stream, case, &problem).map_err(text)?;
    let names = names(case.form);
    for (name, (x, again)) in names.iter().zip(grads.iter().zip(&grads_again)) {
        same_bits(name, x, again)?;
    }
    same_bits("d_initial_state", &state, &state_again)?;
    let wide = grads.iter().map(|x| widened(x)).chain([widened(&state)]);
    for ((got, want), (name, class)) in wide.zip(&want).zip(names.into_iter().zip(CLASSES)) {
        let cancellation = if class == Class::GateGrad { cancellation } else { 1.0 };
        Judge { pass: Pass::ChunkBwd, name, class }.within_relieved::<T>(&got, want, cancellation)?;
    }
    Ok(())
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

#[test]
fn chunk_bwd_survives_the_models_gates() {
    let Some((device, stream)) = gpu("chunk_bwd_survives_the_models_gates") else { return };
    run_cases(
        &regimes(),
        |case| format!("{:?} {:?}", case.form, case.gates),
        |case| check_all_dtypes(&device, &stream, case),
    );
}

#[test]
fn errors_use_the_models_names() {
    let Some((device, stream)) = gpu("errors_use_the_models_names") else { return };
    let shape = Shape { seqs: SeqLens::dense(1, 1), h: 1, k: 64, v: 64 };
    let options = ChunkFwdOptions::new();
    let good = stream.alloc_zeros::<f32>(64).expect("fits");
    let bad = stream.alloc_zeros::<f32>(65).expect("fits");
    let (r, w, k, v, a) = (&good, &good, &good, &good, &good);
    let x = ChunkBwdInputs {
        r,
        w,
        k,
        v,
        a,
        b: &good,
        initial_state: None,
        states: None,
        d_o: &good,
        d_final_state: None,
    };
    for (x, name) in [
        (ChunkBwdInputs { r: &bad, ..x }, "`r` is"),
        (ChunkBwdInputs { w: &bad, ..x }, "`w` is"),
        (ChunkBwdInputs { d_o: &bad, ..x }, "`d_o` is"),
    ] {
        let error = chunk_bwd(&device, &shape, &x, &options).expect_err(name).to_string();
        assert!(error.starts_with(name), "{error}");
    }
    let x = FusedMulChunkBwdInputs {
        r,
        w,
        k,
        v,
        kk: &good,
        a,
        initial_state: None,
        states: None,
        d_o: &good,
        d_final_state: None,
    };
    for (x, name) in [
        (FusedMulChunkBwdInputs { w: &bad, ..x }, "`w` is"),
        (FusedMulChunkBwdInputs { kk: &bad, ..x }, "`kk` is"),
        (FusedMulChunkBwdInputs { a: &bad, ..x }, "`a` is"),
    ] {
        let error = fused_mul_chunk_bwd(&device, &shape, &x, &options).expect_err(name).to_string();
        assert!(error.starts_with(name), "{error}");
    }
}
