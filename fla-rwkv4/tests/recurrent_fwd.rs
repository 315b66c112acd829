//! `recurrent_fwd` on the GPU against the float64 recurrence, and where it finds its states and leaves them.

mod problem;

use std::sync::Arc;

use fla_core::cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut};
use fla_core::testing::{Guarded, Poison, gpu, run_cases, same_bits};
use fla_core::{Device, Error, FinalState, SeqLens, StatePool};
use fla_reference::inputs::Storage;
use fla_reference::tolerance::{Class, Pass};
use fla_rwkv4::{
    RecurrentFwd, RecurrentFwdInputs, RecurrentFwdOptions, RecurrentFwdOutputs, Shape, recurrent_fwd,
};
use half::{bf16, f16};
use problem::{BASE, CASES, Case, Initial, Judge, Problem, any_case, to_device, widened};
use proptest::prelude::{ProptestConfig, proptest};

/// A device, its stream, and the tensors of a problem in guarded buffers.
struct Setup<T: Poison> {
    stream: Arc<CudaStream>,
    plan: RecurrentFwd<T>,
    shape: Shape,
    w: Guarded<f32>,
    u: Guarded<f32>,
    k: Guarded<T>,
    v: Guarded<T>,
}

/// Outputs, last states, states after every token.
type Plain<T> = (Vec<T>, Vec<f32>, Vec<f32>);

/// Where states come from and go to.
struct States<'a> {
    initial: Option<&'a Guarded<f32>>,
    last: FinalState<'a, f32>,
    tokens: Option<&'a mut Guarded<f32>>,
    cu_seqlens: Option<&'a CudaSlice<i64>>,
}

impl<T: Poison> Setup<T> {
    fn new(
        device: &Device,
        stream: &Arc<CudaStream>,
        shape: Shape,
        problem: &Problem,
    ) -> Result<Self, Error> {
        Ok(Self {
            plan: RecurrentFwd::new(device, &shape, &RecurrentFwdOptions::new())?,
            w: to_device(stream, "w", &problem.w),
            u: to_device(stream, "u", &problem.u),
            k: to_device(stream, "k", &problem.k),
            v: to_device(stream, "v", &problem.v),
            stream: stream.clone(),
            shape,
        })
    }

    fn run(&self, states: States<'_>) -> Result<Vec<T>, Error> {
        let States { initial, mut last, tokens, cu_seqlens } = states;
        let mut o = Guarded::<T>::output(&self.stream, "o", self.shape.token_len());
        {
            let (w, u, k, v) = (self.w.view(), self.u.view(), self.k.view(), self.v.view());
            let initial = initial.map(Guarded::view);
            let x = RecurrentFwdInputs {
                w: &w,
                u: &u,
                k: &k,
                v: &v,
                initial_state: initial.as_ref().map(|s| s as &dyn DevicePtr<f32>),
                cu_seqlens: cu_seqlens.map(|s| s as &dyn DevicePtr<i64>),
            };
            let mut tokens = tokens.map(Guarded::view_mut);
            let token_states = tokens.as_mut().map(|s| s as &mut dyn DevicePtrMut<f32>);
            let mut o = o.view_mut();
            let mut y = RecurrentFwdOutputs { o: &mut o, final_state: last.reborrow(), token_states };
            self.plan.run(&self.stream, &x, &mut y)?;
        }
        Ok(o.read())
    }

    /// New states.
    fn plain(&self, initial: Option<&[f32]>) -> Result<Plain<T>, Error> {
        let initial = initial.map(|state| Guarded::input(&self.stream, "initial_state", state));
        let mut last = Guarded::output(&self.stream, "final_state", self.shape.state_len());
        let mut tokens = Guarded::output(&self.stream, "token_states", 3 * self.shape.token_len());
        let mut view = last.view_mut();
        let o = self.run(States {
            initial: initial.as_ref(),
            last: FinalState::New(&mut view),
            tokens: Some(&mut tokens),
            cu_seqlens: None,
        })?;
        Ok((o, last.read(), tokens.read()))
    }
}

fn single(values: &[f64]) -> Vec<f32> {
    values.iter().map(|x| *x as f32).collect()
}

fn check<T: Poison + Storage>(device: &Device, stream: &Arc<CudaStream>, case: &Case) -> Result<(), String> {
    let problem = Problem::new::<T>(case);
    let want = problem.outputs(case);
    let setup = Setup::<T>::new(device, stream, case.shape(), &problem).map_err(|e| e.to_string())?;
    let initial = problem.initial_state.as_deref().map(single);
    let once = || setup.plain(initial.as_deref()).map_err(|error| error.to_string());
    let ((o, last, tokens), (o_again, last_again, tokens_again)) = (once()?, once()?);
    same_bits("o", &o, &o_again)?;
    same_bits("final_state", &last, &last_again)?;
    same_bits("token_states", &tokens, &tokens_again)?;
    let judge = |name, class| Judge { pass: Pass::RecurrentFwd, name, class };
    judge("o", Class::Output).within::<T>(1, &widened(&o), &want.o)?;
    let n = case.shape().seqs.n();
    judge("final_state", Class::FinalState).within::<T>(n, &widened(&last), &want.final_state)
}

fn check_all_dtypes(device: &Device, stream: &Arc<CudaStream>, case: &Case) -> Result<(), String> {
    check::<f32>(device, stream, case).map_err(|error| format!("f32: {error}"))?;
    check::<bf16>(device, stream, case).map_err(|error| format!("bf16: {error}"))?;
    check::<f16>(device, stream, case).map_err(|error| format!("f16: {error}"))
}

/// Shapes of decoding, beside those of all passes.
const DECODE: &[Case] = &[
    Case { name: "decode, many sequences", b: 600, t: 1, c: 768, ..BASE },
    Case { name: "decode, many sequences, odd", b: 600, t: 1, c: 769, ..BASE },
    Case { name: "decode, four tokens", b: 500, t: 4, c: 516, ..BASE },
    Case { name: "more sequences than a grid axis of 65535", b: 70_000, t: 1, c: 4, ..BASE },
];

#[test]
fn recurrent_fwd_matches_reference() {
    let Some((device, stream)) = gpu("recurrent_fwd_matches_reference") else { return };
    let cases: Vec<Case> = CASES.iter().chain(DECODE).cloned().collect();
    run_cases(&cases, |case| case.name.into(), |case| check_all_dtypes(&device, &stream, case));
}

proptest! {
    // Every new C compiles a kernel, so a few cases a run; the seed changes from run to run.
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn recurrent_fwd_matches_reference_for_any_shape(case in any_case()) {
        if let Some((device, stream)) = gpu("recurrent_fwd_matches_reference_for_any_shape") {
            let result = check::<bf16>(&device, &stream, &case).and_then(|()| check::<f32>(&device, &stream, &case));
            assert_eq!(result, Ok(()), "{case:?}");
        }
    }
}

/// Token by token is what a server does; the bits are those of one call, and of every state in between.
#[test]
fn splitting_a_sequence_changes_nothing() {
    let Some((device, stream)) = gpu("splitting_a_sequence_changes_nothing") else { return };
    let case = Case { b: 1, t: 31, ..BASE };
    let problem = Problem::new::<bf16>(&case);
    let whole = Setup::<bf16>::new(&device, &stream, case.shape(), &problem).expect("valid");
    let mut state = single(problem.initial_state.as_ref().expect("given"));
    let (o, last, tokens) = whole.plain(Some(&state)).expect("runs");
    for i_t in 0..case.t {
        let row = i_t * case.c..(i_t + 1) * case.c;
        let part = Problem {
            k: problem.k[row.clone()].to_vec(),
            v: problem.v[row.clone()].to_vec(),
            ..Problem::new::<bf16>(&case)
        };
        let shape = Shape { seqs: SeqLens::dense(1, 1), c: case.c };
        let (one, after, _) = Setup::<bf16>::new(&device, &stream, shape, &part)
            .expect("valid")
            .plain(Some(&state))
            .expect("runs");
        assert_eq!(same_bits("o", &o[row], &one), Ok(()), "token {i_t}");
        let elems = 3 * case.c;
        assert_eq!(same_bits("token_states", &tokens[i_t * elems..(i_t + 1) * elems], &after), Ok(()));
        state = after;
    }
    assert_eq!(same_bits("final_state", &last, &state), Ok(()));
}

#[test]
fn a_state_without_tokens_is_handed_through_bit_by_bit() {
    let Some((device, stream)) = gpu("a_state_without_tokens_is_handed_through_bit_by_bit") else { return };
    let case = Case { packed: &[0, 4, 0], ..BASE };
    let problem = Problem::new::<f32>(&case);
    let setup = Setup::<f32>::new(&device, &stream, case.shape(), &problem).expect("valid");
    let initial = single(problem.initial_state.as_ref().expect("given"));
    let (_, last, _) = setup.plain(Some(&initial)).expect("runs");
    let elems = 3 * case.c;
    for i_n in [0, 2] {
        let part = i_n * elems..(i_n + 1) * elems;
        assert_eq!(same_bits("final_state", &initial[part.clone()], &last[part]), Ok(()));
    }
    let (_, last, _) = setup.plain(None).expect("runs");
    let fresh: Vec<f32> = (0..elems).map(|i| if i < 2 * case.c { 0.0 } else { -1e38 }).collect();
    assert_eq!(same_bits("final_state", &last[..elems], &fresh), Ok(()));
}

/// A problem of `n` sequences of `t` tokens for the tests of states; every other count of channels has vectors.
fn states_of<R>(name: &str, test: impl Fn(&Setup<bf16>, &[f32]) -> R) {
    let Some((device, stream)) = gpu(name) else { return };
    for (n, t, c) in [(6, 1, 40), (6, 3, 33), (5, 4, 64), (700, 3, 100)] {
        let case = Case { b: n, t, c, ..BASE };
        let problem = Problem::new::<bf16>(&case);
        let setup = Setup::<bf16>::new(&device, &stream, case.shape(), &problem).expect("valid");
        test(&setup, &single(problem.initial_state.as_ref().expect("given")));
    }
}

#[test]
fn states_in_place_are_those_of_new_ones() {
    states_of("states_in_place_are_those_of_new_ones", |setup, initial| {
        let (o, last, _) = setup.plain(Some(initial)).expect("runs");
        let mut state = Guarded::input(&setup.stream, "state", initial);
        let mut view = state.view_mut();
        let states =
            States { initial: None, last: FinalState::InPlace(&mut view), tokens: None, cu_seqlens: None };
        let got = setup.run(states).expect("runs");
        assert_eq!(same_bits("o", &o, &got), Ok(()));
        assert_eq!(same_bits("state", &last, &state.read()), Ok(()));
    });
}

/// A pool with the slots in any order, padding, slots that do not exist, and one that two sequences have.
#[test]
fn a_pool_changes_the_slots_of_its_sequences_and_no_other() {
    states_of("a_pool_changes_the_slots_of_its_sequences_and_no_other", |setup, initial| {
        let Shape { seqs, c } = &setup.shape;
        let (n, elems, spare) = (seqs.n(), 3 * c, 3);
        let slots: Vec<i32> = (0..n)
            .map(|i_n| match i_n {
                1 => -1,
                2 => (n + spare) as i32,
                3 => i32::MIN,
                // The slot of sequence 0.
                4 => (n + spare - 1) as i32,
                _ => (n + spare - 1 - i_n) as i32,
            })
            .collect();
        let is_skipped = |i_n: usize| (1..=4).contains(&i_n);
        let owner = |slot: usize| (0..n).find(|i_n| !is_skipped(*i_n) && slots[*i_n] == slot as i32);
        // Slots that no sequence has are poison, which spoils whatever reads them.
        let before: Vec<f32> = (0..n + spare)
            .flat_map(|slot| match owner(slot) {
                Some(i_n) => initial[i_n * elems..(i_n + 1) * elems].to_vec(),
                None => vec![f32::POISON; elems],
            })
            .collect();
        let (o, last, tokens) = setup.plain(Some(initial)).expect("runs");

        let mut pool = Guarded::input(&setup.stream, "pool", &before);
        let mut got_tokens = Guarded::output(&setup.stream, "token_states", tokens.len());
        let on_device = setup.stream.clone_htod(&slots).expect("copies");
        let mut view = pool.view_mut();
        let got = setup
            .run(States {
                initial: None,
                last: FinalState::Pool(StatePool { states: &mut view, slots: &on_device, accepted: None }),
                tokens: Some(&mut got_tokens),
                cu_seqlens: None,
            })
            .expect("runs");
        let (after, got_tokens) = (pool.read(), got_tokens.read());
        let rows = seqs.t() * c;
        for i_n in 0..n {
            let part = i_n * rows..(i_n + 1) * rows;
            let want = if is_skipped(i_n) { vec![bf16::ZERO; rows] } else { o[part.clone()].to_vec() };
            assert_eq!(same_bits("o", &want, &got[part]), Ok(()), "sequence {i_n}");
            let part = 3 * i_n * rows..3 * (i_n + 1) * rows;
            let want = if is_skipped(i_n) { vec![0.0; 3 * rows] } else { tokens[part.clone()].to_vec() };
            assert_eq!(same_bits("token_states", &want, &got_tokens[part]), Ok(()), "sequence {i_n}");
        }
        for slot in 0..n + spare {
            let want = match owner(slot) {
                Some(i_n) => &last[i_n * elems..(i_n + 1) * elems],
                None => &before[slot * elems..(slot + 1) * elems],
            };
            assert_eq!(
                same_bits("pool", want, &after[slot * elems..(slot + 1) * elems]),
                Ok(()),
                "slot {slot}"
            );
        }
    });
}

/// A column for every token keeps every state, and the next call starts from the one that was accepted.
#[test]
fn rejected_tokens_can_be_rolled_back() {
    states_of("rejected_tokens_can_be_rolled_back", |setup, initial| {
        let Shape { seqs, c } = &setup.shape;
        let (n, t, elems) = (seqs.n(), seqs.t(), 3 * c);
        for m in [t, t.saturating_sub(1).max(1), t + 1] {
            let slots: Vec<i32> = (0..n * m).map(|i| (n * m - 1 - i) as i32).collect();
            // Sequence 2 has accepted nothing, which is no state to go on from; sequence 3 too much.
            let accepted: Vec<i32> = (0..n)
                .map(|i_n| match i_n {
                    2 => 0,
                    3 => m as i32 + 1,
                    _ => 1 + (i_n % m) as i32,
                })
                .collect();
            let is_skipped = |i_n: usize| i_n == 2 || i_n == 3;
            let slot = |i_n: usize, column: usize| slots[i_n * m + column] as usize;
            let mut before = vec![1.0_f32; n * m * elems];
            for i_n in (0..n).filter(|i_n| !is_skipped(*i_n)) {
                let to = slot(i_n, accepted[i_n] as usize - 1) * elems;
                before[to..to + elems].copy_from_slice(&initial[i_n * elems..(i_n + 1) * elems]);
            }
            let (_, last, tokens) = setup.plain(Some(initial)).expect("runs");

            let mut pool = Guarded::input(&setup.stream, "pool", &before);
            let (slots_on_device, accepted_on_device) = (
                setup.stream.clone_htod(&slots).expect("copies"),
                setup.stream.clone_htod(&accepted).expect("copies"),
            );
            let mut view = pool.view_mut();
            let states = States {
                initial: None,
                last: FinalState::Pool(StatePool {
                    states: &mut view,
                    slots: &slots_on_device,
                    accepted: Some(&accepted_on_device),
                }),
                tokens: None,
                cu_seqlens: None,
            };
            setup.run(states).expect("runs");
            let after = pool.read();
            for i_n in 0..n {
                for column in 0..m {
                    let at = slot(i_n, column) * elems;
                    let want = if is_skipped(i_n) || column >= t {
                        &before[at..at + elems]
                    } else if column + 1 == m {
                        &last[i_n * elems..(i_n + 1) * elems]
                    } else {
                        let row = i_n * t + column;
                        &tokens[row * elems..(row + 1) * elems]
                    };
                    let same = same_bits("pool", want, &after[at..at + elems]);
                    assert_eq!(same, Ok(()), "sequence {i_n}, column {column} of {m}");
                }
            }
        }
    });
}

#[test]
fn lengths_can_be_read_on_the_device() {
    let Some((device, stream)) = gpu("lengths_can_be_read_on_the_device") else { return };
    let case = Case { packed: &[4, 0, 1, 12], ..BASE };
    let problem = Problem::new::<bf16>(&case);
    let initial = single(problem.initial_state.as_ref().expect("given"));
    let on_host = Setup::<bf16>::new(&device, &stream, case.shape(), &problem).expect("valid");
    let (o, last, _) = on_host.plain(Some(&initial)).expect("runs");
    let shape = Shape { seqs: SeqLens::packed_on_device(4, 17), c: case.c };
    let on_device = Setup::<bf16>::new(&device, &stream, shape, &problem).expect("valid");
    let run = |offsets: &[i64]| {
        let offsets = stream.clone_htod(offsets).expect("copies");
        let mut state = Guarded::input(&stream, "state", &initial);
        let mut view = state.view_mut();
        let last = FinalState::InPlace(&mut view);
        let got = on_device.run(States { initial: None, last, tokens: None, cu_seqlens: Some(&offsets) });
        (got.expect("runs"), state.read())
    };
    let (got, state) = run(&[0, 4, 4, 5, 17]);
    assert_eq!(same_bits("o", &o, &got), Ok(()));
    assert_eq!(same_bits("state", &last, &state), Ok(()));
    // Whatever the offsets are, nothing outside is touched: the guards would show it.
    for wild in [[-5, 4, 2, 99, 1 << 40], [17, 17, 17, 17, 17], [i64::MIN, i64::MAX, 0, 3, 3]] {
        assert!(run(&wild).1.iter().all(|x| x.is_finite()));
    }
}

#[test]
fn the_one_call_form_gives_the_plans_bits() {
    let Some((device, stream)) = gpu("the_one_call_form_gives_the_plans_bits") else { return };
    let problem = Problem::new::<f16>(&BASE);
    let setup = Setup::<f16>::new(&device, &stream, BASE.shape(), &problem).expect("valid");
    let initial = single(problem.initial_state.as_ref().expect("given"));
    let (o, last, _) = setup.plain(Some(&initial)).expect("runs");
    let (w, u, k, v) = (setup.w.view(), setup.u.view(), setup.k.view(), setup.v.view());
    let initial = stream.clone_htod(&initial).expect("copies");
    let x =
        RecurrentFwdInputs { w: &w, u: &u, k: &k, v: &v, initial_state: Some(&initial), cu_seqlens: None };
    let y = recurrent_fwd(&device, &BASE.shape(), &x, &RecurrentFwdOptions::new()).expect("runs");
    assert_eq!(same_bits("o", &o, &stream.clone_dtoh(&y.o).expect("copies")), Ok(()));
    assert_eq!(same_bits("final_state", &last, &stream.clone_dtoh(&y.final_state).expect("copies")), Ok(()));
}

#[test]
fn a_captured_graph_gives_the_same_bits() {
    let Some((device, _)) = gpu("a_captured_graph_gives_the_same_bits") else { return };
    // Event tracking belongs to a context, and other tests run on the shared one.
    let bench = fla_core::testing::Bench::open().expect("opens");
    let stream = bench.stream().clone();
    let case = Case { t: 1, initial_state: Initial::Absent, ..BASE };
    let problem = Problem::new::<bf16>(&case);
    let setup = Setup::<bf16>::new(&device, &stream, case.shape(), &problem).expect("valid");
    let (want, _, _) = setup.plain(None).expect("runs");
    let (w, u, k, v) = (setup.w.view(), setup.u.view(), setup.k.view(), setup.v.view());
    let mut o = stream.alloc_zeros::<bf16>(want.len()).expect("fits");
    let replay = bench
        .capture(1, |stream, _| {
            let x = RecurrentFwdInputs { w: &w, u: &u, k: &k, v: &v, initial_state: None, cu_seqlens: None };
            let final_state = FinalState::Dropped;
            setup.plan.run(
                stream,
                &x,
                &mut RecurrentFwdOutputs { o: &mut o, final_state, token_states: None },
            )
        })
        .expect("captures");
    for _ in 0..2 {
        replay.time(1);
    }
    assert_eq!(same_bits("o", &want, &stream.clone_dtoh(&o).expect("copies")), Ok(()));
}

#[test]
fn wrong_arguments_are_named_before_anything_is_launched() {
    let Some((device, stream)) = gpu("wrong_arguments_are_named_before_anything_is_launched") else { return };
    let shape = Shape { seqs: SeqLens::dense(1, 2), c: 64 };
    let plan = RecurrentFwd::<f32>::new(&device, &shape, &RecurrentFwdOptions::new()).expect("valid");
    let good = |len| stream.alloc_zeros::<f32>(len).expect("fits");
    let (w, k, s) = (good(64), good(128), good(3 * 64));
    let (bad, odd) = (good(127), good(129));
    let misaligned = odd.slice(1..);
    let offsets = stream.alloc_zeros::<i64>(2).expect("fits");
    let x = RecurrentFwdInputs { w: &w, u: &w, k: &k, v: &k, initial_state: Some(&s), cu_seqlens: None };
    let mut o = Guarded::<f32>::output(&stream, "o", 128);
    let mut refused = |x: &RecurrentFwdInputs<'_, f32>, mut final_state: FinalState<'_, f32>| {
        let mut view = o.view_mut();
        let final_state = final_state.reborrow();
        let mut y = RecurrentFwdOutputs { o: &mut view, final_state, token_states: None };
        plan.run(&stream, x, &mut y).expect_err("is refused").to_string()
    };
    type Spoil<'a> = (&'static str, fn(&mut RecurrentFwdInputs<'a, f32>, &'a dyn DevicePtr<f32>));
    let spoils: [Spoil<'_>; 5] = [
        ("w", |x, bad| x.w = bad),
        ("u", |x, bad| x.u = bad),
        ("k", |x, bad| x.k = bad),
        ("v", |x, bad| x.v = bad),
        ("initial_state", |x, bad| x.initial_state = Some(bad)),
    ];
    for (name, spoil) in spoils {
        let mut x = x;
        spoil(&mut x, &bad);
        let text = refused(&x, FinalState::Dropped);
        assert!(text.starts_with(&format!("`{name}` is [")) && text.ends_with("but holds 127"), "{text}");
    }
    let text = refused(&RecurrentFwdInputs { k: &misaligned, ..x }, FinalState::Dropped);
    assert!(text.starts_with("`k` must lie at a multiple of 16 bytes"), "{text}");
    let text = refused(&RecurrentFwdInputs { cu_seqlens: Some(&offsets), ..x }, FinalState::Dropped);
    assert_eq!(text, "`cu_seqlens` must be absent, since the plan knows the lengths");
    let mut state = good(3 * 64);
    let text = refused(&x, FinalState::InPlace(&mut state));
    assert_eq!(text, "`initial_state` must be absent, since `final_state` holds the states to start from");
    let mut short = good(3);
    let text = refused(&x, FinalState::New(&mut short));
    assert_eq!(text, "`final_state` is [N, 3, 1, C], which is 192 elements here, but holds 3");
    // None of the refused calls has written anything.
    assert!(o.read().iter().all(|x| x.is_nan()));
    let error = RecurrentFwd::<f32>::new(&device, &Shape { c: 0, ..shape }, &RecurrentFwdOptions::new());
    assert_eq!(error.expect_err("is refused").to_string(), "C must be from 1 to 1048576, but is 0");
}
