//! `chunk_fwd` and `fused_mul_chunk_fwd` on the GPU against the float64 recurrence, under RWKV-7's names.

mod problem;

use std::sync::Arc;

use fla_core::cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut};
use fla_core::testing::{Guarded, Poison, gpu, run_cases, same_bits};
use fla_core::{Device, Error, SeqLens, Shape};
use fla_reference::inputs::Storage;
use fla_reference::tolerance::{Class, Pass};
use fla_rwkv7::{
    ChunkFwd, ChunkFwdInputs, ChunkFwdOptions, ChunkFwdOutputs, FusedMulChunkFwd, FusedMulChunkFwdInputs,
    SavedStates, chunk_fwd, fused_mul_chunk_fwd,
};
use half::{bf16, f16};
use problem::{CASES, Case, Form, Judge, Problem, narrowed, regimes, widened};

/// Output and final state of one run on poisoned buffers.
fn run<T: Poison>(
    device: &Device,
    stream: &Arc<CudaStream>,
    case: &Case,
    problem: &Problem,
) -> Result<(Vec<T>, Vec<f32>), Error> {
    let (shape, options) = (case.shape(), case.options(SavedStates::Recomputed));
    let inputs = problem.vectors.each_ref().map(|x| Guarded::input(stream, "an input", &narrowed::<T>(x)));
    let initial =
        problem.initial_state.as_ref().map(|s| Guarded::input(stream, "a state", &narrowed::<f32>(s)));
    let views = inputs.each_ref().map(Guarded::view);
    let [r, w, k, v, x4, x5, _] = &views;
    let initial = initial.as_ref().map(Guarded::view);
    let initial_state = initial.as_ref().map(|s| s as &dyn DevicePtr<f32>);
    let mut o = Guarded::<T>::output(stream, "o", shape.v_len());
    let mut last = Guarded::<f32>::output(stream, "final_state", shape.state_len());
    {
        let (mut o, mut last) = (o.view_mut(), last.view_mut());
        let final_state: Option<&mut dyn DevicePtrMut<f32>> = Some(&mut last);
        let mut y = ChunkFwdOutputs { o: &mut o, final_state, states: None };
        match case.form {
            Form::Keys => {
                let x = ChunkFwdInputs { r, w, k, v, a: x4, b: x5, initial_state };
                let plan = ChunkFwd::<T>::new(device, &shape, &options)?;
                plan.run(stream, &x, &mut y, &mut device.alloc(stream, plan.workspace_bytes())?)?;
            }
            Form::KeyAndRate => {
                let x = FusedMulChunkFwdInputs { r, w, k, v, kk: x4, a: x5, initial_state };
                let plan = FusedMulChunkFwd::<T>::new(device, &shape, &options)?;
                plan.run(stream, &x, &mut y, &mut device.alloc(stream, plan.workspace_bytes())?)?;
            }
        }
    }
    Ok((o.read(), last.read()))
}

/// The same by the one-call form.
fn one_call<T: Poison>(
    device: &Device,
    stream: &Arc<CudaStream>,
    case: &Case,
    problem: &Problem,
) -> Result<(Vec<T>, Vec<f32>), Error> {
    let (shape, options) = (case.shape(), case.options(SavedStates::Kept));
    let inputs = problem.vectors.each_ref().map(|x| stream.clone_htod(&narrowed::<T>(x)).expect("copies"));
    let initial =
        problem.initial_state.as_ref().map(|s| stream.clone_htod(&narrowed::<f32>(s)).expect("copies"));
    let initial_state = initial.as_ref().map(|s| s as &dyn DevicePtr<f32>);
    let [r, w, k, v, x4, x5, _] = &inputs;
    let y = match case.form {
        Form::Keys => {
            let x = ChunkFwdInputs { r, w, k, v, a: x4, b: x5, initial_state };
            chunk_fwd(device, &shape, &x, &options)?
        }
        Form::KeyAndRate => {
            let x = FusedMulChunkFwdInputs { r, w, k, v, kk: x4, a: x5, initial_state };
            fused_mul_chunk_fwd(device, &shape, &x, &options)?
        }
    };
    assert!(y.states.is_some());
    Ok((stream.clone_dtoh(&y.o).expect("copies"), stream.clone_dtoh(&y.final_state).expect("copies")))
}

fn check<T: Poison + Storage>(device: &Device, stream: &Arc<CudaStream>, case: &Case) -> Result<(), String> {
    let problem = Problem::new::<T>(case);
    let want = problem.outputs(case);
    let text = |error: Error| error.to_string();
    let (o, last) = run::<T>(device, stream, case, &problem).map_err(text)?;
    let (o_again, last_again) = one_call::<T>(device, stream, case, &problem).map_err(text)?;
    same_bits("o", &o, &o_again)?;
    same_bits("final_state", &last, &last_again)?;
    let judge = |name, class| Judge { pass: Pass::ChunkFwd, name, class };
    judge("o", Class::Output).within::<T>(&widened(&o), &want.o)?;
    judge("final_state", Class::FinalState).within::<T>(&widened(&last), &want.final_state)
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
fn chunk_fwd_survives_the_models_gates() {
    let Some((device, stream)) = gpu("chunk_fwd_survives_the_models_gates") else { return };
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
    let x = ChunkFwdInputs { r, w, k, v, a, b: &good, initial_state: None };
    for (x, name) in [
        (ChunkFwdInputs { r: &bad, ..x }, "`r` is"),
        (ChunkFwdInputs { w: &bad, ..x }, "`w` is"),
        (ChunkFwdInputs { a: &bad, ..x }, "`a` is"),
        (ChunkFwdInputs { b: &bad, ..x }, "`b` is"),
    ] {
        let error = chunk_fwd(&device, &shape, &x, &options).expect_err(name).to_string();
        assert!(error.starts_with(name), "{error}");
    }
    let x = FusedMulChunkFwdInputs { r, w, k, v, kk: &good, a, initial_state: None };
    for (x, name) in [
        (FusedMulChunkFwdInputs { r: &bad, ..x }, "`r` is"),
        (FusedMulChunkFwdInputs { w: &bad, ..x }, "`w` is"),
        (FusedMulChunkFwdInputs { kk: &bad, ..x }, "`kk` is"),
        (FusedMulChunkFwdInputs { a: &bad, ..x }, "`a` is"),
    ] {
        let error = fused_mul_chunk_fwd(&device, &shape, &x, &options).expect_err(name).to_string();
        assert!(error.starts_with(name), "{error}");
    }
}
