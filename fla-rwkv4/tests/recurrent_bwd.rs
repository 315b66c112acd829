//! `recurrent_bwd` on the GPU against the float64 recurrence.

mod problem;

use std::sync::Arc;

use fla_core::cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut};
use fla_core::testing::{Guarded, Poison, gpu, run_cases, same_bits};
use fla_core::{Device, Error, SeqLens};
use fla_reference::inputs::Storage;
use fla_reference::tolerance::{Class, Pass};
use fla_rwkv4::{
    RecurrentBwd, RecurrentBwdInputs, RecurrentBwdOptions, RecurrentBwdOutputs, Shape, recurrent_bwd,
};
use half::{bf16, f16};
use problem::{BASE, CASES, Case, Judge, Problem, Workspace, any_case, to_device, widened};
use proptest::prelude::{ProptestConfig, proptest};

/// What a run returned.
struct Got<T> {
    dw: Vec<f32>,
    du: Vec<f32>,
    dk: Vec<T>,
    dv: Vec<T>,
    d_initial_state: Vec<f32>,
}

/// Where the kernel finds the lengths.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Lengths<'a> {
    Plan,
    Device(&'a [i64]),
}

/// One run on poisoned buffers.
fn run<T: Poison>(
    device: &Device,
    stream: &Arc<CudaStream>,
    shape: &Shape,
    problem: &Problem,
    lengths: Lengths<'_>,
) -> Result<Got<T>, Error> {
    let (w, u) = (to_device::<f32>(stream, "w", &problem.w), to_device::<f32>(stream, "u", &problem.u));
    let (k, v) = (to_device::<T>(stream, "k", &problem.k), to_device::<T>(stream, "v", &problem.v));
    let d_o = to_device::<T>(stream, "d_o", &problem.d_o);
    let initial = problem.initial_state.as_ref().map(|s| to_device::<f32>(stream, "initial_state", s));
    let d_last = problem.d_final_state.as_ref().map(|s| to_device::<f32>(stream, "d_final_state", s));
    let offsets = match lengths {
        Lengths::Plan => None,
        Lengths::Device(offsets) => Some(stream.clone_htod(offsets).expect("copies")),
    };
    let plan = RecurrentBwd::<T>::new(device, shape, &RecurrentBwdOptions::new())?;
    let (mut dw, mut du) =
        (Guarded::<f32>::output(stream, "dw", shape.c), Guarded::<f32>::output(stream, "du", shape.c));
    let (mut dk, mut dv) = (
        Guarded::<T>::output(stream, "dk", shape.token_len()),
        Guarded::<T>::output(stream, "dv", shape.token_len()),
    );
    let mut d_initial = Guarded::<f32>::output(stream, "d_initial_state", shape.state_len());
    let mut workspace = Workspace::new(stream, plan.workspace_bytes());
    {
        let (w, u, k, v, d_o) = (w.view(), u.view(), k.view(), v.view(), d_o.view());
        let (initial, d_last) = (initial.as_ref().map(Guarded::view), d_last.as_ref().map(Guarded::view));
        let x = RecurrentBwdInputs {
            w: &w,
            u: &u,
            k: &k,
            v: &v,
            initial_state: initial.as_ref().map(|s| s as &dyn DevicePtr<f32>),
            d_o: &d_o,
            d_final_state: d_last.as_ref().map(|s| s as &dyn DevicePtr<f32>),
            cu_seqlens: offsets.as_ref().map(|s| s as &dyn DevicePtr<i64>),
        };
        let mut dx = RecurrentBwdOutputs {
            dw: &mut dw.view_mut(),
            du: &mut du.view_mut(),
            dk: &mut dk.view_mut(),
            dv: &mut dv.view_mut(),
            d_initial_state: Some(&mut d_initial.view_mut()),
        };
        plan.run(stream, &x, &mut dx, &mut workspace.view_mut())?;
    }
    workspace.check();
    Ok(Got { dw: dw.read(), du: du.read(), dk: dk.read(), dv: dv.read(), d_initial_state: d_initial.read() })
}

fn check<T: Poison + Storage>(device: &Device, stream: &Arc<CudaStream>, case: &Case) -> Result<(), String> {
    let problem = Problem::new::<T>(case);
    let want = problem.grads(case);
    let shape = case.shape();
    let once =
        || run::<T>(device, stream, &shape, &problem, Lengths::Plan).map_err(|error| error.to_string());
    let (got, again) = (once()?, once()?);
    same_bits("dw", &got.dw, &again.dw)?;
    same_bits("du", &got.du, &again.du)?;
    same_bits("dk", &got.dk, &again.dk)?;
    same_bits("dv", &got.dv, &again.dv)?;
    same_bits("d_initial_state", &got.d_initial_state, &again.d_initial_state)?;
    let judge = |name, class| Judge { pass: Pass::RecurrentBwd, name, class };
    judge("dv", Class::Grad).within::<T>(1, &widened(&got.dv), &want.dv)?;
    judge("dk", Class::Grad).within::<T>(1, &widened(&got.dk), &want.dk)?;
    // These are f32 whatever the vectors are.
    judge("du", Class::Grad).within::<f32>(1, &widened(&got.du), &want.du)?;
    let cancellation = problem.cancellation_of_dw(case, &want);
    judge("dw", Class::GateGrad).within_relieved::<f32>(1, &widened(&got.dw), &want.dw, cancellation)?;
    judge("d_initial_state", Class::Grad).within::<f32>(
        1,
        &widened(&got.d_initial_state),
        &want.d_initial_state,
    )
}

fn check_all_dtypes(device: &Device, stream: &Arc<CudaStream>, case: &Case) -> Result<(), String> {
    check::<f32>(device, stream, case).map_err(|error| format!("f32: {error}"))?;
    check::<bf16>(device, stream, case).map_err(|error| format!("bf16: {error}"))?;
    check::<f16>(device, stream, case).map_err(|error| format!("f16: {error}"))
}

#[test]
fn recurrent_bwd_matches_reference() {
    let Some((device, stream)) = gpu("recurrent_bwd_matches_reference") else { return };
    run_cases(CASES, |case| case.name.into(), |case| check_all_dtypes(&device, &stream, case));
}

proptest! {
    // Every new C compiles kernels, so a few cases a run; the seed changes from run to run.
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn recurrent_bwd_matches_reference_for_any_shape(case in any_case()) {
        if let Some((device, stream)) = gpu("recurrent_bwd_matches_reference_for_any_shape") {
            let result = check::<bf16>(&device, &stream, &case).and_then(|()| check::<f32>(&device, &stream, &case));
            assert_eq!(result, Ok(()), "{case:?}");
        }
    }
}

#[test]
fn lengths_can_be_read_on_the_device() {
    let Some((device, stream)) = gpu("lengths_can_be_read_on_the_device") else { return };
    let case = Case { packed: &[4, 0, 1, 40], ..BASE };
    let problem = Problem::new::<bf16>(&case);
    let on_host = run::<bf16>(&device, &stream, &case.shape(), &problem, Lengths::Plan).expect("runs");
    let shape = Shape { seqs: SeqLens::packed_on_device(4, 45), c: case.c };
    let lengths = Lengths::Device(&[0, 4, 4, 5, 45]);
    let got = run::<bf16>(&device, &stream, &shape, &problem, lengths).expect("runs");
    assert_eq!(same_bits("dk", &on_host.dk, &got.dk), Ok(()));
    assert_eq!(same_bits("dw", &on_host.dw, &got.dw), Ok(()));
    // Whatever the offsets are, nothing outside is touched: the guards would show it.
    for wild in [[-5, 4, 2, 99, 1 << 40], [45, 45, 45, 45, 45], [i64::MIN, i64::MAX, 0, 3, 3]] {
        run::<bf16>(&device, &stream, &shape, &problem, Lengths::Device(&wild)).expect("runs");
    }
}

#[test]
fn the_one_call_form_gives_the_plans_bits() {
    let Some((device, stream)) = gpu("the_one_call_form_gives_the_plans_bits") else { return };
    let problem = Problem::new::<bf16>(&BASE);
    let got = run::<bf16>(&device, &stream, &BASE.shape(), &problem, Lengths::Plan).expect("runs");
    let single = |values: &[f64]| {
        let values: Vec<f32> = values.iter().map(|x| *x as f32).collect();
        stream.clone_htod(&values).expect("copies")
    };
    let half = |values: &[f64]| {
        let values: Vec<bf16> = values.iter().map(|x| bf16::from_f64(*x)).collect();
        stream.clone_htod(&values).expect("copies")
    };
    let (w, u, k, v) = (single(&problem.w), single(&problem.u), half(&problem.k), half(&problem.v));
    let (d_o, initial) = (half(&problem.d_o), single(problem.initial_state.as_ref().expect("given")));
    let d_last = single(problem.d_final_state.as_ref().expect("given"));
    let x = RecurrentBwdInputs {
        w: &w,
        u: &u,
        k: &k,
        v: &v,
        initial_state: Some(&initial),
        d_o: &d_o,
        d_final_state: Some(&d_last),
        cu_seqlens: None,
    };
    let dx = recurrent_bwd(&device, &BASE.shape(), &x, &RecurrentBwdOptions::new()).expect("runs");
    assert_eq!(same_bits("dw", &got.dw, &stream.clone_dtoh(&dx.dw).expect("copies")), Ok(()));
    assert_eq!(same_bits("dk", &got.dk, &stream.clone_dtoh(&dx.dk).expect("copies")), Ok(()));
}

#[test]
fn wrong_arguments_are_named_before_anything_is_launched() {
    let Some((device, stream)) = gpu("wrong_arguments_are_named_before_anything_is_launched") else { return };
    let shape = Shape { seqs: SeqLens::dense(1, 2), c: 64 };
    let plan = RecurrentBwd::<f32>::new(&device, &shape, &RecurrentBwdOptions::new()).expect("valid");
    let good = |len| stream.alloc_zeros::<f32>(len).expect("fits");
    let (w, k, s) = (good(64), good(128), good(3 * 64));
    let (bad, odd) = (good(127), good(129));
    let misaligned = odd.slice(1..);
    type Spoil<'a> = (&'static str, fn(&mut RecurrentBwdInputs<'a, f32>, &'a dyn DevicePtr<f32>));
    let spoils: [Spoil<'_>; 7] = [
        ("w", |x, bad| x.w = bad),
        ("u", |x, bad| x.u = bad),
        ("k", |x, bad| x.k = bad),
        ("v", |x, bad| x.v = bad),
        ("initial_state", |x, bad| x.initial_state = Some(bad)),
        ("d_o", |x, bad| x.d_o = bad),
        ("d_final_state", |x, bad| x.d_final_state = Some(bad)),
    ];
    let x = RecurrentBwdInputs {
        w: &w,
        u: &w,
        k: &k,
        v: &k,
        initial_state: Some(&s),
        d_o: &k,
        d_final_state: Some(&s),
        cu_seqlens: None,
    };
    let mut dk = Guarded::<f32>::output(&stream, "dk", 128);
    let (mut dw, mut du, mut dv, mut d_initial) = (good(64), good(64), good(128), good(3 * 64));
    let mut workspace = stream.alloc_zeros::<u8>(plan.workspace_bytes()).expect("fits");
    let mut spoilt = |x: &RecurrentBwdInputs<'_, f32>, output: &str, bad: &mut dyn DevicePtrMut<f32>| {
        let mut view = dk.view_mut();
        let mut dx = RecurrentBwdOutputs {
            dw: &mut dw,
            du: &mut du,
            dk: &mut view,
            dv: &mut dv,
            d_initial_state: Some(&mut d_initial),
        };
        match output {
            "dw" => dx.dw = bad,
            "du" => dx.du = bad,
            "dk" => dx.dk = bad,
            "dv" => dx.dv = bad,
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
    for name in ["dw", "du", "dk", "dv", "d_initial_state"] {
        let text = spoilt(&x, name, &mut short);
        assert!(text.starts_with(&format!("`{name}` is [")) && text.ends_with("but holds 127"), "{text}");
    }
    let text = spoilt(&RecurrentBwdInputs { k: &misaligned, ..x }, "", &mut short);
    assert!(text.starts_with("`k` must lie at a multiple of 16 bytes"), "{text}");
    let offsets = stream.alloc_zeros::<i64>(2).expect("fits");
    let text = spoilt(&RecurrentBwdInputs { cu_seqlens: Some(&offsets), ..x }, "", &mut short);
    assert_eq!(text, "`cu_seqlens` must be absent, since the plan knows the lengths");
    // None of the refused calls has written anything.
    assert!(dk.read().iter().all(|x| x.is_nan()));
}
