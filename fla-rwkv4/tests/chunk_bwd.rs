//! `chunk_bwd` on the GPU against the float64 recurrence, from the states that `chunk_fwd` keeps.

mod problem;

use std::sync::Arc;

use fla_core::cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut};
use fla_core::testing::{Guarded, Poison, gpu, run_cases, same_bits};
use fla_core::{Device, Error, SeqLens};
use fla_reference::inputs::Storage;
use fla_reference::tolerance::{Class, Pass};
use fla_rwkv4::{
    ChunkBwd, ChunkBwdInputs, ChunkBwdOptions, ChunkBwdOutputs, ChunkFwdInputs, ChunkFwdOptions, Shape,
    chunk_bwd, chunk_fwd,
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

/// The states that the forward pass keeps, between guard words.
fn states<T: Poison>(
    device: &Device,
    stream: &Arc<CudaStream>,
    case: &Case,
    problem: &Problem,
) -> Guarded<f32> {
    let (w, u) = (to_device::<f32>(stream, "w", &problem.w), to_device::<f32>(stream, "u", &problem.u));
    let (k, v) = (to_device::<T>(stream, "k", &problem.k), to_device::<T>(stream, "v", &problem.v));
    let initial = problem.initial_state.as_ref().map(|s| to_device::<f32>(stream, "initial_state", s));
    let (w, u, k, v) = (w.view(), u.view(), k.view(), v.view());
    let initial = initial.as_ref().map(Guarded::view);
    let initial_state = initial.as_ref().map(|s| s as &dyn DevicePtr<f32>);
    let x = ChunkFwdInputs { w: &w, u: &u, k: &k, v: &v, initial_state };
    let y = chunk_fwd(device, &case.shape(), &x, &ChunkFwdOptions::new()).expect("runs");
    Guarded::input(stream, "states", &stream.clone_dtoh(&y.states).expect("copies"))
}

/// One run on poisoned buffers.
fn run<T: Poison>(
    device: &Device,
    stream: &Arc<CudaStream>,
    case: &Case,
    problem: &Problem,
) -> Result<Got<T>, Error> {
    let shape = case.shape();
    let states = states::<T>(device, stream, case, problem);
    let (w, u) = (to_device::<f32>(stream, "w", &problem.w), to_device::<f32>(stream, "u", &problem.u));
    let (k, v) = (to_device::<T>(stream, "k", &problem.k), to_device::<T>(stream, "v", &problem.v));
    let d_o = to_device::<T>(stream, "d_o", &problem.d_o);
    let d_last = problem.d_final_state.as_ref().map(|s| to_device::<f32>(stream, "d_final_state", s));
    let plan = ChunkBwd::<T>::new(device, &shape, &ChunkBwdOptions::new())?;
    let (mut dw, mut du) =
        (Guarded::<f32>::output(stream, "dw", shape.c), Guarded::<f32>::output(stream, "du", shape.c));
    let (mut dk, mut dv) = (
        Guarded::<T>::output(stream, "dk", shape.token_len()),
        Guarded::<T>::output(stream, "dv", shape.token_len()),
    );
    let mut d_initial = Guarded::<f32>::output(stream, "d_initial_state", shape.state_len());
    let mut workspace = Workspace::new(stream, plan.workspace_bytes());
    {
        let (w, u, k, v) = (w.view(), u.view(), k.view(), v.view());
        let (states, d_o) = (states.view(), d_o.view());
        let d_last = d_last.as_ref().map(Guarded::view);
        let x = ChunkBwdInputs {
            w: &w,
            u: &u,
            k: &k,
            v: &v,
            states: &states,
            d_o: &d_o,
            d_final_state: d_last.as_ref().map(|s| s as &dyn DevicePtr<f32>),
        };
        let mut y = ChunkBwdOutputs {
            dw: &mut dw.view_mut(),
            du: &mut du.view_mut(),
            dk: &mut dk.view_mut(),
            dv: &mut dv.view_mut(),
            d_initial_state: Some(&mut d_initial.view_mut()),
        };
        plan.run(stream, &x, &mut y, &mut workspace.view_mut())?;
    }
    workspace.check();
    Ok(Got { dw: dw.read(), du: du.read(), dk: dk.read(), dv: dv.read(), d_initial_state: d_initial.read() })
}

fn check<T: Poison + Storage>(device: &Device, stream: &Arc<CudaStream>, case: &Case) -> Result<(), String> {
    let problem = Problem::new::<T>(case);
    let want = problem.grads(case);
    let once = || run::<T>(device, stream, case, &problem).map_err(|error| error.to_string());
    let (got, again) = (once()?, once()?);
    same_bits("dw", &got.dw, &again.dw)?;
    same_bits("du", &got.du, &again.du)?;
    same_bits("dk", &got.dk, &again.dk)?;
    same_bits("dv", &got.dv, &again.dv)?;
    same_bits("d_initial_state", &got.d_initial_state, &again.d_initial_state)?;
    let judge = |name, class| Judge { pass: Pass::ChunkBwd, name, class };
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
fn chunk_bwd_matches_reference() {
    let Some((device, stream)) = gpu("chunk_bwd_matches_reference") else { return };
    run_cases(CASES, |case| case.name.into(), |case| check_all_dtypes(&device, &stream, case));
}

proptest! {
    // Every new C compiles kernels, so a few cases a run; the seed changes from run to run.
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn chunk_bwd_matches_reference_for_any_shape(case in any_case()) {
        if let Some((device, stream)) = gpu("chunk_bwd_matches_reference_for_any_shape") {
            let result = check::<bf16>(&device, &stream, &case).and_then(|()| check::<f32>(&device, &stream, &case));
            assert_eq!(result, Ok(()), "{case:?}");
        }
    }
}

/// Device tensors of a problem, for calls that need no guards.
struct Tensors {
    w: CudaSlice<f32>,
    u: CudaSlice<f32>,
    k: CudaSlice<bf16>,
    v: CudaSlice<bf16>,
    states: CudaSlice<f32>,
    d_o: CudaSlice<bf16>,
    d_final_state: CudaSlice<f32>,
}

impl Tensors {
    fn new(device: &Device, stream: &Arc<CudaStream>, case: &Case, problem: &Problem) -> Self {
        let single = |values: &[f64]| {
            let values: Vec<f32> = values.iter().map(|x| *x as f32).collect();
            stream.clone_htod(&values).expect("copies")
        };
        let half = |values: &[f64]| {
            let values: Vec<bf16> = values.iter().map(|x| bf16::from_f64(*x)).collect();
            stream.clone_htod(&values).expect("copies")
        };
        let mut states = states::<bf16>(device, stream, case, problem);
        Self {
            w: single(&problem.w),
            u: single(&problem.u),
            k: half(&problem.k),
            v: half(&problem.v),
            states: stream.clone_htod(&states.read()).expect("copies"),
            d_o: half(&problem.d_o),
            d_final_state: single(problem.d_final_state.as_ref().expect("given")),
        }
    }

    fn inputs(&self) -> ChunkBwdInputs<'_, bf16> {
        let Self { w, u, k, v, states, d_o, d_final_state } = self;
        ChunkBwdInputs { w, u, k, v, states, d_o, d_final_state: Some(d_final_state) }
    }
}

#[test]
fn the_one_call_form_gives_the_plans_bits() {
    let Some((device, stream)) = gpu("the_one_call_form_gives_the_plans_bits") else { return };
    let problem = Problem::new::<bf16>(&BASE);
    let got = run::<bf16>(&device, &stream, &BASE, &problem).expect("runs");
    let tensors = Tensors::new(&device, &stream, &BASE, &problem);
    let y = chunk_bwd(&device, &BASE.shape(), &tensors.inputs(), &ChunkBwdOptions::new()).expect("runs");
    assert_eq!(same_bits("dw", &got.dw, &stream.clone_dtoh(&y.dw).expect("copies")), Ok(()));
    assert_eq!(same_bits("du", &got.du, &stream.clone_dtoh(&y.du).expect("copies")), Ok(()));
    assert_eq!(same_bits("dk", &got.dk, &stream.clone_dtoh(&y.dk).expect("copies")), Ok(()));
    assert_eq!(same_bits("dv", &got.dv, &stream.clone_dtoh(&y.dv).expect("copies")), Ok(()));
    let d_initial = stream.clone_dtoh(&y.d_initial_state).expect("copies");
    assert_eq!(same_bits("d_initial_state", &got.d_initial_state, &d_initial), Ok(()));
}

#[test]
fn a_captured_graph_gives_the_same_bits() {
    let Some((device, _)) = gpu("a_captured_graph_gives_the_same_bits") else { return };
    // Event tracking belongs to a context, and other tests run on the shared one.
    let bench = fla_core::testing::Bench::open().expect("opens");
    let stream = bench.stream().clone();
    let case = Case { t: 300, ..BASE };
    let problem = Problem::new::<bf16>(&case);
    let got = run::<bf16>(&device, &stream, &case, &problem).expect("runs");
    let tensors = Tensors::new(&device, &stream, &case, &problem);
    let plan = ChunkBwd::<bf16>::new(&device, &case.shape(), &ChunkBwdOptions::new()).expect("valid");
    let (mut dw, mut du) =
        (stream.alloc_zeros::<f32>(case.c).expect("fits"), stream.alloc_zeros::<f32>(case.c).expect("fits"));
    let mut dk = stream.alloc_zeros::<bf16>(got.dk.len()).expect("fits");
    let mut dv = stream.alloc_zeros::<bf16>(got.dv.len()).expect("fits");
    let mut workspace = stream.alloc_zeros::<u8>(plan.workspace_bytes()).expect("fits");
    let replay = bench
        .capture(1, |stream, _| {
            let mut y =
                ChunkBwdOutputs { dw: &mut dw, du: &mut du, dk: &mut dk, dv: &mut dv, d_initial_state: None };
            plan.run(stream, &tensors.inputs(), &mut y, &mut workspace)
        })
        .expect("captures");
    for _ in 0..2 {
        replay.time(1);
    }
    assert_eq!(same_bits("dk", &got.dk, &stream.clone_dtoh(&dk).expect("copies")), Ok(()));
    assert_eq!(same_bits("dw", &got.dw, &stream.clone_dtoh(&dw).expect("copies")), Ok(()));
}

#[test]
fn wrong_arguments_are_named_before_anything_is_launched() {
    let Some((device, stream)) = gpu("wrong_arguments_are_named_before_anything_is_launched") else { return };
    let shape = Shape { seqs: SeqLens::dense(1, 2), c: 64 };
    let plan = ChunkBwd::<f32>::new(&device, &shape, &ChunkBwdOptions::new()).expect("valid");
    let good = |len| stream.alloc_zeros::<f32>(len).expect("fits");
    let (w, k, s) = (good(64), good(128), good(3 * 64));
    let (bad, odd) = (good(127), good(129));
    let misaligned = odd.slice(1..);
    type Spoil<'a> = (&'static str, fn(&mut ChunkBwdInputs<'a, f32>, &'a dyn DevicePtr<f32>));
    let spoils: [Spoil<'_>; 7] = [
        ("w", |x, bad| x.w = bad),
        ("u", |x, bad| x.u = bad),
        ("k", |x, bad| x.k = bad),
        ("v", |x, bad| x.v = bad),
        ("states", |x, bad| x.states = bad),
        ("d_o", |x, bad| x.d_o = bad),
        ("d_final_state", |x, bad| x.d_final_state = Some(bad)),
    ];
    let x = ChunkBwdInputs { w: &w, u: &w, k: &k, v: &k, states: &s, d_o: &k, d_final_state: Some(&s) };
    let mut dk = Guarded::<f32>::output(&stream, "dk", 128);
    let (mut dw, mut du, mut dv, mut d_initial) = (good(64), good(64), good(128), good(3 * 64));
    let mut workspace = stream.alloc_zeros::<u8>(plan.workspace_bytes()).expect("fits");
    let mut spoilt = |x: &ChunkBwdInputs<'_, f32>, output: &str, bad: &mut dyn DevicePtrMut<f32>| {
        let mut view = dk.view_mut();
        let mut y = ChunkBwdOutputs {
            dw: &mut dw,
            du: &mut du,
            dk: &mut view,
            dv: &mut dv,
            d_initial_state: Some(&mut d_initial),
        };
        match output {
            "dw" => y.dw = bad,
            "du" => y.du = bad,
            "dk" => y.dk = bad,
            "dv" => y.dv = bad,
            "d_initial_state" => y.d_initial_state = Some(bad),
            _ => {}
        }
        plan.run(&stream, x, &mut y, &mut workspace).expect_err("is refused").to_string()
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
    let text = spoilt(&ChunkBwdInputs { k: &misaligned, ..x }, "", &mut short);
    assert!(text.starts_with("`k` must lie at a multiple of 16 bytes"), "{text}");
    let mut odd_out = good(65);
    let text = spoilt(&x, "dw", &mut odd_out.slice_mut(1..));
    assert!(text.starts_with("`dw` must lie at a multiple of 16 bytes"), "{text}");
    // None of the refused calls has written anything.
    assert!(dk.read().iter().all(|x| x.is_nan()));

    let mut y =
        ChunkBwdOutputs { dw: &mut dw, du: &mut du, dk: &mut short, dv: &mut dv, d_initial_state: None };
    let mut dk = good(128);
    y.dk = &mut dk;
    let mut little = stream.alloc_zeros::<u8>(plan.workspace_bytes() - 1).expect("fits");
    let error = plan.run(&stream, &x, &mut y, &mut little);
    assert!(matches!(error, Err(Error::Len { tensor: "workspace", .. })), "{error:?}");
}
