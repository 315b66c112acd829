//! Where `recurrent_fwd` finds its states and leaves them: in place, in a pool, after every token, in bf16; and lengths
//! that only the device knows. The plain form with a new f32 state is the measure.

use std::sync::Arc;

use fla_core::cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut};
use fla_core::testing::{Guarded, Poison, gpu, run_cases, same_bits};
use fla_core::{DType, Device, Error, FinalState, SeqLens, Shape, StateElement, StatePool, check_slots};
use fla_dplr::{RecurrentFwd, RecurrentFwdInputs, RecurrentFwdOptions, RecurrentFwdOutputs};
use fla_reference::compare::relative_rms;
use fla_reference::inputs::{Gates, Rng, Storage, round_to};
use fla_reference::tolerance::{Backend, Class, Dtype, Key, Model, Pass, limit};
use half::bf16;

const SCALE: f32 = 0.25;

/// Outputs, last states, states after every token.
type Plain<S> = (Vec<bf16>, Vec<S>, Vec<S>);

/// Vectors of one row of tokens, `[T, H, K]` or `[T, H, V]`, which cases cut into sequences as they like.
struct Problem {
    stream: Arc<CudaStream>,
    device: Device,
    shape: Shape,
    /// q, k, v, a, b, g.
    vectors: [Vec<bf16>; 6],
}

impl Problem {
    fn new(device: &Device, stream: &Arc<CudaStream>, shape: Shape) -> Self {
        let mut rng = Rng::new(11);
        let rows = shape.k_len() / shape.k;
        let keys: Vec<f32> = rng.unit_rows(rows, shape.k);
        let vectors = [
            rng.normal::<f32>(shape.k_len(), 1.0),
            keys.clone(),
            rng.normal::<f32>(shape.v_len(), 1.0),
            keys.iter().map(|k| -k).collect(),
            keys.iter().map(|k| 0.5 * k).collect(),
            rng.gates::<f32>(shape.k_len(), Gates::LogSigmoid),
        ]
        .map(|x| x.into_iter().map(bf16::from_f32).collect());
        Self { stream: stream.clone(), device: device.clone(), shape, vectors }
    }

    /// Elements of the state of one sequence.
    fn elems(&self) -> usize {
        self.shape.h * self.shape.k * self.shape.v
    }

    fn states<S: Poison>(&self, count: usize, seed: u64) -> Vec<S> {
        let values: Vec<f32> = Rng::new(seed).normal(count * self.elems(), 1.0);
        values.into_iter().map(S::from_f32).collect()
    }

    /// Runs on the problem's vectors, with states as `y` has them; returns the outputs.
    fn run<S: StateElement + Poison>(
        &self,
        initial_state: Option<&Guarded<S>>,
        mut final_state: FinalState<'_, S>,
        token_states: Option<&mut Guarded<S>>,
        cu_seqlens: Option<&dyn DevicePtr<i64>>,
    ) -> Result<Vec<bf16>, Error> {
        let plan = RecurrentFwd::<bf16, S>::new(&self.device, &self.shape, &RecurrentFwdOptions::new(SCALE))?;
        let vectors = self.vectors.each_ref().map(|x| Guarded::input(&self.stream, "vectors", x));
        let views = vectors.each_ref().map(Guarded::view);
        let [q, k, v, a, b, g] = &views;
        let initial = initial_state.map(Guarded::view);
        let initial_state = initial.as_ref().map(|s| s as &dyn DevicePtr<S>);
        let mut o = Guarded::<bf16>::output(&self.stream, "o", self.shape.v_len());
        {
            let mut o = o.view_mut();
            let mut tokens = token_states.map(Guarded::view_mut);
            let token_states = tokens.as_mut().map(|s| s as &mut dyn DevicePtrMut<S>);
            let x = RecurrentFwdInputs { q, k, v, a, b, g, initial_state, cu_seqlens };
            let mut y = RecurrentFwdOutputs { o: &mut o, final_state: final_state.reborrow(), token_states };
            plan.run(&self.stream, &x, &mut y)?;
        }
        Ok(o.read())
    }

    /// The plain form: new states.
    fn plain<S: StateElement + Poison>(&self, initial: &[S]) -> Result<Plain<S>, Error> {
        let (n, rows) = (self.shape.seqs.n(), self.shape.seqs.b() * self.shape.seqs.t());
        let initial = Guarded::input(&self.stream, "initial_state", initial);
        let mut last = Guarded::output(&self.stream, "final_state", n * self.elems());
        let mut tokens = Guarded::output(&self.stream, "token_states", rows * self.elems());
        let mut view = last.view_mut();
        let o = self.run(Some(&initial), FinalState::New(&mut view), Some(&mut tokens), None)?;
        Ok((o, last.read(), tokens.read()))
    }

    /// The rows of some tokens of one sequence, as a problem of one sequence.
    fn cut(&self, from: usize, to: usize) -> Self {
        let Shape { h, k, v, .. } = self.shape;
        let widths = [k, k, v, k, k, k];
        let mut widths = widths.iter();
        let vectors = self.vectors.each_ref().map(|x| {
            let width = h * widths.next().expect("six vectors");
            x[from * width..to * width].to_vec()
        });
        let shape = Shape { seqs: SeqLens::dense(1, to - from), ..self.shape };
        Self { stream: self.stream.clone(), device: self.device.clone(), shape, vectors }
    }
}

struct Case {
    name: &'static str,
    shape: Shape,
}

/// Both kernels: states in registers, and where there are enough of them for a few tokens, streamed.
fn cases() -> Vec<Case> {
    let case = |name, n, t, h, k, v| Case { name, shape: Shape { seqs: SeqLens::dense(n, t), h, k, v } };
    vec![
        case("one token", 5, 1, 3, 64, 64),
        case("three tokens", 5, 3, 3, 64, 64),
        case("three tokens, K = 60, V = 36", 5, 3, 3, 60, 36),
        case("three tokens, K = 33, V = 17", 5, 3, 3, 33, 17),
        case("three tokens, streamed", 90, 3, 6, 64, 64),
        case("one token, K = V = 128", 5, 1, 2, 128, 128),
        case("one token, streamed", 201, 1, 8, 64, 64),
        case("four tokens of 128 by 128, streamed", 70, 4, 2, 128, 128),
    ]
}

fn all(check: impl Fn(&Problem) -> Result<(), String>, name: &str) {
    let Some((device, stream)) = gpu(name) else { return };
    run_cases(
        &cases(),
        |case| case.name.into(),
        |case| check(&Problem::new(&device, &stream, case.shape.clone())),
    );
}

fn in_place<S: StateElement + Poison>(problem: &Problem) -> Result<(), String> {
    let initial = problem.states::<S>(problem.shape.seqs.n(), 3);
    let (o, last, _) = problem.plain(&initial).map_err(|e| e.to_string())?;
    let mut state = Guarded::input(&problem.stream, "state", &initial);
    let mut view = state.view_mut();
    let got = problem.run(None, FinalState::InPlace(&mut view), None, None).map_err(|e| e.to_string())?;
    same_bits("o", &o, &got)?;
    same_bits("state", &last, &state.read())
}

#[test]
fn states_in_place_are_those_of_new_ones() {
    all(in_place::<f32>, "states_in_place_are_those_of_new_ones");
    all(in_place::<bf16>, "states_in_place_are_those_of_new_ones");
}

/// Every token's state is the last one of the tokens so far. Fewer tokens may be another kernel's, whose sums go in
/// another order, so only the last state has to be the same bits.
fn after_every_token<S: StateElement + Poison + Storage>(problem: &Problem) -> Result<(), String> {
    let (n, t, elems) = (problem.shape.seqs.n(), problem.shape.seqs.t(), problem.elems());
    let initial = problem.states::<S>(n, 3);
    let (_, last, tokens) = problem.plain(&initial).map_err(|e| e.to_string())?;
    let class = if S::DTYPE == DType::F32 { Class::FinalState } else { Class::NarrowState };
    for i_n in [0, n - 1] {
        let state = &initial[i_n * elems..(i_n + 1) * elems];
        for i_t in 0..t {
            let part = problem.cut(i_n * t, i_n * t + i_t + 1);
            let (_, want, _) = part.plain(state).map_err(|e| e.to_string())?;
            let row = i_n * t + i_t;
            let error = relative_rms(&widen(&tokens[row * elems..(row + 1) * elems]), &widen(&want));
            if error > bound(class) {
                return Err(format!("state after token {i_t} of sequence {i_n}: relative RMS {error:.2e}"));
            }
        }
        let row = i_n * t + t - 1;
        same_bits(
            "final_state",
            &last[i_n * elems..(i_n + 1) * elems],
            &tokens[row * elems..(row + 1) * elems],
        )?;
    }
    Ok(())
}

fn bound(class: Class) -> f64 {
    let key = Key {
        backend: Backend::Gpu,
        model: Model::Dplr,
        pass: Pass::RecurrentFwd,
        dtype: Dtype::Bf16,
        class,
    };
    limit(key).expect("the table has the row")
}

#[test]
fn token_states_are_the_last_states_of_the_tokens_so_far() {
    all(after_every_token::<f32>, "token_states_are_the_last_states_of_the_tokens_so_far");
    all(after_every_token::<bf16>, "token_states_are_the_last_states_of_the_tokens_so_far");
}

/// A pool with the slots in any order, padding, slots that do not exist, and one that two sequences have.
fn pool<S: StateElement + Poison>(problem: &Problem) -> Result<(), String> {
    let (n, elems, width) = (problem.shape.seqs.n(), problem.elems(), problem.shape.h * problem.shape.v);
    let per_sequence = problem.shape.seqs.t() * width;
    let spare = 3;
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
    assert!(check_slots(&slots, n, n + spare).is_err());

    // Slots that no sequence has are poison, which spoils whatever reads them.
    let states = problem.states::<S>(n + spare, 5);
    let used = |slot: usize| (0..n).any(|i_n| !is_skipped(i_n) && slots[i_n] == slot as i32);
    let before: Vec<S> = states
        .chunks(elems)
        .enumerate()
        .flat_map(|(slot, state)| if used(slot) { state.to_vec() } else { vec![S::POISON; elems] })
        .collect();
    let initial: Vec<S> = (0..n)
        .flat_map(|i_n| {
            let slot = if is_skipped(i_n) { n + spare - 1 } else { slots[i_n] as usize };
            states[slot * elems..(slot + 1) * elems].to_vec()
        })
        .collect();
    let (o, last, tokens) = problem.plain(&initial).map_err(|e| e.to_string())?;

    let mut pool = Guarded::input(&problem.stream, "pool", &before);
    let mut got_tokens = Guarded::<S>::output(&problem.stream, "token_states", tokens.len());
    let device_slots = problem.stream.clone_htod(&slots).map_err(|e| e.to_string())?;
    let mut view = pool.view_mut();
    let final_state = FinalState::Pool(StatePool { states: &mut view, slots: &device_slots, accepted: None });
    let got = problem.run(None, final_state, Some(&mut got_tokens), None).map_err(|e| e.to_string())?;
    let (after, got_tokens) = (pool.read(), got_tokens.read());
    for i_n in 0..n {
        let (from, to) = (i_n * per_sequence, (i_n + 1) * per_sequence);
        let rows = problem.shape.seqs.t() * elems;
        let want_o = if is_skipped(i_n) { vec![bf16::ZERO; per_sequence] } else { o[from..to].to_vec() };
        same_bits(&format!("o of sequence {i_n}"), &want_o, &got[from..to])?;
        let want_tokens = if is_skipped(i_n) {
            vec![S::from_f32(0.0); rows]
        } else {
            tokens[i_n * rows..(i_n + 1) * rows].to_vec()
        };
        same_bits("token_states", &want_tokens, &got_tokens[i_n * rows..(i_n + 1) * rows])?;
    }
    for slot in 0..n + spare {
        let owner = (0..n).find(|i_n| !is_skipped(*i_n) && slots[*i_n] == slot as i32);
        let want = owner.map_or_else(
            || before[slot * elems..(slot + 1) * elems].to_vec(),
            |i_n| last[i_n * elems..(i_n + 1) * elems].to_vec(),
        );
        same_bits(&format!("slot {slot}"), &want, &after[slot * elems..(slot + 1) * elems])?;
    }
    Ok(())
}

#[test]
fn a_pool_changes_the_slots_of_its_sequences_and_no_other() {
    all(pool::<f32>, "a_pool_changes_the_slots_of_its_sequences_and_no_other");
    all(pool::<bf16>, "a_pool_changes_the_slots_of_its_sequences_and_no_other");
}

/// A column for every token keeps every state, and the next call starts from the one that was accepted.
fn rollback<S: StateElement + Poison>(problem: &Problem) -> Result<(), String> {
    let (n, t, elems) = (problem.shape.seqs.n(), problem.shape.seqs.t(), problem.elems());
    // As many columns as tokens; for one case one less, so that only the last token's state goes to the last column.
    for m in [t, t.saturating_sub(1).max(1), t + 1] {
        let before = problem.states::<S>(n * m, 7);
        let slots: Vec<i32> = (0..n * m).map(|i| (n * m - 1 - i) as i32).collect();
        // Sequence 2 has accepted nothing, which is not a state that it could go on from; sequence 3 too much.
        let accepted: Vec<i32> = (0..n)
            .map(|i_n| match i_n {
                2 => 0,
                3 => m as i32 + 1,
                _ => 1 + (i_n % m) as i32,
            })
            .collect();
        let is_skipped = |i_n: usize| i_n == 2 || i_n == 3;
        let slot = |i_n: usize, column: usize| slots[i_n * m + column] as usize;
        let state = |pool: &[S], slot: usize| pool[slot * elems..(slot + 1) * elems].to_vec();
        let initial: Vec<S> = (0..n)
            .flat_map(|i_n| {
                let column = if is_skipped(i_n) { 0 } else { accepted[i_n] as usize - 1 };
                state(&before, slot(i_n, column))
            })
            .collect();
        let (_, last, tokens) = problem.plain(&initial).map_err(|e| e.to_string())?;

        let mut pool = Guarded::input(&problem.stream, "pool", &before);
        let device_slots = problem.device.upload_slots(&slots, n, n * m).map_err(|e| e.to_string())?;
        let device_accepted = problem.stream.clone_htod(&accepted).map_err(|e| e.to_string())?;
        let mut view = pool.view_mut();
        let pool_of = StatePool { states: &mut view, slots: &device_slots, accepted: Some(&device_accepted) };
        problem.run(None, FinalState::Pool(pool_of), None, None).map_err(|e| e.to_string())?;
        let after = pool.read();
        for i_n in 0..n {
            for column in 0..m {
                let want = if is_skipped(i_n) || column >= t {
                    state(&before, slot(i_n, column))
                } else if column + 1 == m {
                    last[i_n * elems..(i_n + 1) * elems].to_vec()
                } else {
                    let row = i_n * t + column;
                    tokens[row * elems..(row + 1) * elems].to_vec()
                };
                same_bits(
                    &format!("sequence {i_n}, column {column} of {m}"),
                    &want,
                    &state(&after, slot(i_n, column)),
                )?;
            }
        }
    }
    Ok(())
}

#[test]
fn rejected_tokens_can_be_rolled_back() {
    all(rollback::<f32>, "rejected_tokens_can_be_rolled_back");
    all(rollback::<bf16>, "rejected_tokens_can_be_rolled_back");
}

#[test]
fn lengths_can_be_read_on_the_device() {
    let Some((device, stream)) = gpu("lengths_can_be_read_on_the_device") else { return };
    for (h, k, v) in [(3, 64, 64), (2, 60, 36)] {
        let offsets = [0, 4, 4, 5, 17];
        let seqs = SeqLens::packed(&offsets, 17).expect("valid");
        let host = Problem::new(&device, &stream, Shape { seqs, h, k, v });
        let initial = host.states::<f32>(4, 3);
        let (o, last, _) = host.plain(&initial).expect("runs");
        let on_device = Problem::new(
            &device,
            &stream,
            Shape { seqs: SeqLens::packed_on_device(4, 17), ..host.shape.clone() },
        );
        let given = stream.clone_htod(&offsets.map(|x| x as i64)).expect("copies");
        let mut state = Guarded::input(&stream, "state", &initial);
        let mut view = state.view_mut();
        let got = on_device.run(None, FinalState::InPlace(&mut view), None, Some(&given)).expect("runs");
        assert_eq!(same_bits("o", &o, &got), Ok(()));
        assert_eq!(same_bits("state", &last, &state.read()), Ok(()));

        // Whatever the offsets are, nothing outside is touched: the guards would show it.
        for wild in [[-5, 4, 2, 99, 1 << 40], [17, 17, 17, 17, 17], [i64::MIN, i64::MAX, 0, 3, 3]] {
            let given = stream.clone_htod(&wild).expect("copies");
            let mut state = Guarded::input(&stream, "state", &initial);
            let mut view = state.view_mut();
            on_device.run(None, FinalState::InPlace(&mut view), None, Some(&given)).expect("runs");
            assert!(state.read().iter().all(|x| x.is_finite()));
        }
    }
}

/// A state in bf16 is rounded once where it is stored; the tokens of a call see it in f32.
#[test]
fn a_bf16_state_is_rounded_once() {
    let Some((device, stream)) = gpu("a_bf16_state_is_rounded_once") else { return };
    for (t, k, v) in [(1, 64, 64), (40, 64, 64), (3, 128, 128), (5, 33, 20), (2, 256, 512)] {
        let problem = Problem::new(&device, &stream, Shape { seqs: SeqLens::dense(2, t), h: 2, k, v });
        let initial = problem.states::<bf16>(2, 3);
        let (o, last, _) = problem.plain(&initial).expect("runs");
        let [q, keys, values, a, b, g] = problem.vectors.each_ref().map(|x| widen(x));
        let initial = widen(&initial);
        let x = fla_reference::dplr::Inputs {
            q: &q,
            k: &keys,
            v: &values,
            a: &a,
            b: &b,
            g: &g,
            initial_state: Some(&initial),
        };
        let shape = fla_reference::Shape { seqs: fla_reference::SeqLens::Dense { b: 2, t }, h: 2, k, v };
        let want = fla_reference::dplr::recurrent_fwd(
            &shape,
            &x,
            &fla_reference::dplr::Options::new(f64::from(SCALE)),
        );
        for (class, got, want) in
            [(Class::Output, widen(&o), want.o), (Class::NarrowState, widen(&last), want.final_state)]
        {
            let (error, limit) = (relative_rms(&got, &want), bound(class));
            assert!(error <= limit, "T = {t}, K = {k}, V = {v}, {class:?}: {error:.2e} > {limit:.0e}");
        }
        // The reference rounded to bf16 is nearly all that the state may differ from.
        let rounded = round_to::<bf16, f64>(
            &fla_reference::dplr::recurrent_fwd(
                &shape,
                &x,
                &fla_reference::dplr::Options::new(f64::from(SCALE)),
            )
            .final_state,
        );
        let differ = rounded.iter().zip(widen(&last)).filter(|(a, b)| **a != *b).count();
        assert!(
            differ * 50 <= rounded.len(),
            "{differ} of {} elements are not the nearest bf16",
            rounded.len()
        );
    }
}

fn widen<T: Poison + Storage>(x: &[T]) -> Vec<f64> {
    x.iter().map(|x| f64::from(x.to_f32())).collect()
}

#[test]
fn wrong_states_are_refused_by_name() {
    let Some((device, stream)) = gpu("wrong_states_are_refused_by_name") else { return };
    let problem = Problem::new(&device, &stream, Shape { seqs: SeqLens::dense(2, 1), h: 1, k: 8, v: 8 });
    let mut state = stream.alloc_zeros::<f32>(128).expect("fits");
    let other = Guarded::input(&stream, "initial_state", &[0.0_f32; 128]);
    let offsets = stream.alloc_zeros::<i64>(3).expect("fits");
    let slots = stream.alloc_zeros::<i32>(3).expect("fits");
    let two = stream.alloc_zeros::<i32>(2).expect("fits");
    let mut wide = stream.alloc_zeros::<f32>(130).expect("fits");
    let text = |result: Result<Vec<bf16>, Error>| result.expect_err("must be refused").to_string();

    let got = text(problem.run(Some(&other), FinalState::InPlace(&mut state), None, None));
    assert_eq!(got, "`initial_state` must be absent, since `final_state` holds the states to start from");
    let got = text(problem.run(Some(&other), FinalState::Dropped, None, Some(&offsets)));
    assert_eq!(got, "`cu_seqlens` must be absent, since the plan knows the lengths");
    let pool = StatePool { states: &mut state, slots: &slots, accepted: None };
    let got = text(problem.run(None, FinalState::Pool(pool), None, None));
    assert_eq!(got, "`slots` is [N, M], which is 2 elements here, but holds 3");
    let pool = StatePool { states: &mut state, slots: &two, accepted: Some(&slots) };
    let got = text(problem.run(None, FinalState::Pool(pool), None, None));
    assert_eq!(got, "`accepted` is [N], which is 2 elements here, but holds 3");
    let pool = StatePool { states: &mut wide, slots: &two, accepted: None };
    let got = text(problem.run(None, FinalState::Pool(pool), None, None));
    assert_eq!(got, "`final_state` is [S, H, K, V], which is 128 elements here, but holds 130");
    let mut tokens = Guarded::<f32>::output(&stream, "token_states", 64);
    let got = text(problem.run(None, FinalState::InPlace(&mut state), Some(&mut tokens), None));
    assert_eq!(got, "`token_states` is [B, T, H, K, V], which is 128 elements here, but holds 64");
    let on_device = Shape { seqs: SeqLens::packed_on_device(2, 2), ..problem.shape.clone() };
    let problem = Problem::new(&device, &stream, on_device);
    let got = text(problem.run(None, FinalState::InPlace(&mut state), None, None));
    assert_eq!(got, "`cu_seqlens` must be given, since the plan is for offsets on the device");
    let got = text(problem.run(
        None,
        FinalState::InPlace(&mut state),
        None,
        Some(&stream.alloc_zeros::<i64>(2).expect("fits")),
    ));
    assert_eq!(got, "`cu_seqlens` is [N + 1], which is 3 elements here, but holds 2");
}
