//! `recurrent_fwd` on the GPU against the float64 recurrence.

mod support;

use std::ops::Range;
use std::sync::Arc;

use fla_core::cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut};
use fla_core::testing::{Guarded, Poison, gpu, run_cases, same_bits};
use fla_core::{DType, Device, Error, FinalState, SeqLens, StateElement, StatePool};
use fla_gated_delta::{
    Beta, BetaForm, BetaMap, ChannelGates, Gate, GateForm, QkNorm, RecurrentFwd, RecurrentFwdInputs,
    RecurrentFwdOptions, RecurrentFwdOutputs, Shape, StateLayout, recurrent_fwd,
};
use fla_reference::compare::relative_rms;
use fla_reference::gated_delta as reference;
use fla_reference::inputs::{Gates, REGIMES, Rng, Storage, round_to};
use fla_reference::tolerance::{Backend, Class, Key, Model, Pass, limit};
use half::{bf16, f16};
use proptest::prelude::{ProptestConfig, proptest};

use support::{BASE, Case, Keys, LAYER, Problem, Tensors, any_case, dtype, to_device};

const CASES: &[Case] = &[
    Case { name: "one token", t: 1, ..BASE },
    Case { name: "one token, no initial state", t: 1, initial_state: false, ..BASE },
    Case { name: "two tokens", t: 2, ..BASE },
    Case { name: "no token", t: 0, ..BASE },
    Case { name: "15 tokens", t: 15, ..BASE },
    Case { name: "16 tokens", t: 16, ..BASE },
    Case { name: "63 tokens, no states", t: 63, initial_state: false, ..BASE },
    Case { name: "64 tokens", t: 64, ..BASE },
    Case { name: "65 tokens, scale 1", t: 65, scale: 1.0, ..BASE },
    Case {
        name: "4000 tokens, slow decay",
        b: 1,
        t: 4000,
        h: 1,
        hv: 1,
        gates: Gates::Constant(-5e-4),
        ..BASE
    },
    Case { name: "decode, many sequences", b: 33, t: 1, h: 5, hv: 5, ..BASE },
    Case { name: "many states, one token", b: 67, t: 1, h: 8, hv: 8, ..BASE },
    Case { name: "very many states, one token", b: 201, t: 1, h: 4, hv: 8, ..BASE },
    Case { name: "many states, three tokens", b: 181, t: 3, h: 2, hv: 6, gates: Gates::Mixed, ..BASE },
    Case {
        name: "many states, eight tokens, no initial state",
        b: 67,
        t: 8,
        h: 8,
        hv: 8,
        initial_state: false,
        ..BASE
    },
    Case { name: "many states, nine tokens", b: 67, t: 9, h: 8, hv: 8, ..BASE },
    Case { name: "many states of 128 by 128", b: 47, t: 1, h: 2, hv: 6, k: 128, v: 128, ..BASE },
    Case { name: "very many states of 128 by 128", b: 101, t: 1, h: 4, hv: 16, k: 128, v: 128, ..BASE },
    Case { name: "many states of 128 by 128, five tokens", b: 67, t: 5, h: 2, hv: 2, k: 128, v: 128, ..BASE },
    Case { name: "many states of 64 by 128", b: 90, t: 2, h: 6, hv: 6, k: 64, v: 128, ..BASE },
    Case { name: "many states of 32 by 32", b: 90, t: 7, h: 6, hv: 6, k: 32, v: 32, ..BASE },
    Case { name: "many states that do not stream", b: 90, t: 2, h: 6, hv: 6, k: 60, v: 60, ..BASE },
    Case { name: "more heads than a grid axis of 65535", b: 35_000, t: 1, h: 1, hv: 2, k: 8, v: 4, ..BASE },
    Case { name: "packed", packed: &[3, 17, 1, 30], ..BASE },
    Case { name: "packed with empty members", packed: &[0, 5, 0, 0, 1, 20, 0], ..BASE },
    Case { name: "packed, empty members without a state", packed: &[0, 5, 0], initial_state: false, ..BASE },
    Case { name: "packed, all of one token", packed: &[1, 1, 1, 1, 1], ..BASE },
    Case { name: "packed, one sequence without tokens", packed: &[0], ..BASE },
    Case { name: "no sequence", b: 0, ..BASE },
    Case {
        name: "repeated keys, strength 1, no decay",
        t: 40,
        keys: Keys::Repeated,
        gates: Gates::Constant(0.0),
        ..BASE
    },
    Case { name: "K = V = 128", k: 128, v: 128, ..BASE },
    Case { name: "K = V = 128, one token", t: 1, k: 128, v: 128, ..BASE },
    Case { name: "K = V = 256", h: 1, hv: 2, k: 256, v: 256, ..BASE },
    Case { name: "K = 256, V = 512, one token", t: 1, h: 1, hv: 1, k: 256, v: 512, ..BASE },
    Case { name: "K = V = 1", k: 1, v: 1, ..BASE },
    Case { name: "K = 60, V = 100", k: 60, v: 100, ..BASE },
    Case { name: "K = 100, V = 60, one token", t: 1, k: 100, v: 60, ..BASE },
    Case { name: "K = 33, V = 65: rows that no vector access fits", k: 33, v: 65, ..BASE },
    Case { name: "K = 132, V = 17, packed", k: 132, v: 17, packed: &[2, 0, 9], ..BASE },
];

const OPTIONS: &[Case] = &[
    Case { name: "grouped heads", h: 2, hv: 8, ..BASE },
    Case { name: "no gate", gate: GateForm::None, ..BASE },
    Case { name: "no gate, strength 1", gate: GateForm::None, beta: BetaForm::One, t: 9, ..BASE },
    Case { name: "raw gate", gate: GateForm::Raw, ..BASE },
    Case { name: "raw gate without bias", gate: GateForm::Raw, dt_bias: false, ..BASE },
    Case { name: "row gates", channel_gates: ChannelGates::Rows, ..BASE },
    Case { name: "column gates", channel_gates: ChannelGates::Columns, ..BASE },
    Case {
        name: "row and column gates alone",
        gate: GateForm::None,
        channel_gates: ChannelGates::RowsAndColumns,
        ..BASE
    },
    Case {
        name: "all gates, uneven head",
        channel_gates: ChannelGates::RowsAndColumns,
        k: 33,
        v: 50,
        ..BASE
    },
    Case { name: "strength 1", beta: BetaForm::One, hv: 6, ..BASE },
    Case { name: "strength of channels", beta: BetaForm::PerChannel, v: 60, ..BASE },
    Case { name: "sigmoid", beta_map: BetaMap::Sigmoid, ..BASE },
    Case { name: "negative eigenvalues", beta_map: BetaMap::TwiceSigmoid, ..BASE },
    Case { name: "normalised", qk_norm: QkNorm::L2, ..BASE },
    Case { name: "layer", ..LAYER },
    Case { name: "layer, packed", packed: &[0, 5, 0, 0, 1, 20, 0], ..LAYER },
    Case { name: "layer, one token of 128 by 128", t: 1, b: 5, k: 128, v: 128, ..LAYER },
    Case { name: "layer, one token of many states", t: 1, b: 203, ..LAYER },
    Case { name: "layer, four tokens of many states", t: 4, b: 203, ..LAYER },
    Case {
        name: "everything",
        channel_gates: ChannelGates::RowsAndColumns,
        beta: BetaForm::PerChannel,
        beta_map: BetaMap::TwiceSigmoid,
        ..LAYER
    },
    Case {
        name: "everything, one token",
        t: 1,
        channel_gates: ChannelGates::RowsAndColumns,
        beta: BetaForm::PerChannel,
        beta_map: BetaMap::TwiceSigmoid,
        ..LAYER
    },
    Case {
        name: "everything, three tokens of many states",
        t: 3,
        b: 120,
        channel_gates: ChannelGates::RowsAndColumns,
        beta: BetaForm::PerChannel,
        beta_map: BetaMap::TwiceSigmoid,
        ..LAYER
    },
    Case { name: "states [V, K], one token", t: 1, state_layout: StateLayout::ValueMajor, ..LAYER },
    Case {
        name: "states [V, K], one token of many states",
        t: 1,
        b: 203,
        k: 128,
        v: 128,
        state_layout: StateLayout::ValueMajor,
        ..LAYER
    },
    Case {
        name: "states [V, K], four tokens of many states",
        t: 4,
        b: 203,
        state_layout: StateLayout::ValueMajor,
        ..LAYER
    },
    Case {
        name: "states [V, K], K = 33, V = 65, packed with empty members",
        packed: &[0, 5, 0, 0, 1, 20, 0],
        k: 33,
        v: 65,
        state_layout: StateLayout::ValueMajor,
        ..BASE
    },
    Case {
        name: "states [V, K], K = 60, V = 100, everything",
        t: 12,
        k: 60,
        v: 100,
        channel_gates: ChannelGates::RowsAndColumns,
        beta: BetaForm::PerChannel,
        beta_map: BetaMap::TwiceSigmoid,
        state_layout: StateLayout::ValueMajor,
        ..LAYER
    },
];

/// What the reference gives.
fn reference_of(problem: &Problem, case: &Case) -> reference::Outputs<f64> {
    reference::recurrent_fwd(&case.reference_shape(), &problem.inputs(case), &case.reference_options())
}

/// The tokens `from..to` of the one row, as a sequence of its own, and its case.
fn tokens(problem: &Problem, case: &Case, tokens: Range<usize>, state: Option<Vec<f64>>) -> (Problem, Case) {
    let total: usize = if case.packed.is_empty() { case.b * case.t } else { case.packed.iter().sum() };
    let cut = |x: &[f64]| x[x.len() / total * tokens.start..x.len() / total * tokens.end].to_vec();
    let piece = Problem {
        q: cut(&problem.q),
        k: cut(&problem.k),
        v: cut(&problem.v),
        g: cut(&problem.g),
        gk: cut(&problem.gk),
        gv: cut(&problem.gv),
        beta: cut(&problem.beta),
        a_log: problem.a_log.clone(),
        dt_bias: problem.dt_bias.clone(),
        initial_state: state,
    };
    (piece, Case { packed: &[], b: 1, t: tokens.len(), ..case.clone() })
}

/// What a run gives.
struct Got<T, S> {
    o: Vec<T>,
    last: Vec<S>,
    tokens: Vec<S>,
}

/// One run on poisoned buffers, with a new final state and the state after every token.
fn run<T: Poison, S: Poison + StateElement>(
    device: &Device,
    stream: &Arc<CudaStream>,
    case: &Case,
    problem: &Problem,
) -> Result<Got<T, S>, Error> {
    let shape = case.shape();
    let tensors = Tensors::<T, S>::new(stream, case, problem);
    let mut o = Guarded::<T>::output(stream, "o", shape.v_len());
    let mut last = Guarded::<S>::output(stream, "final_state", shape.state_len());
    // The states of all tokens are many, and their stores would hide what happens without them.
    let wants_tokens = case.t.is_multiple_of(2) && case.t < 100;
    let tokens_len = if wants_tokens { shape.head_len() * shape.k * shape.v } else { 0 };
    let mut tokens = Guarded::<S>::output(stream, "token_states", tokens_len);

    let plan = RecurrentFwd::<T, S>::new(device, &shape, &case.options())?;
    tensors.with(case, |x| {
        let initial = tensors.initial_state.as_ref().map(Guarded::view);
        let (mut o, mut last, mut tokens) = (o.view_mut(), last.view_mut(), tokens.view_mut());
        let initial_state = initial.as_ref().map(|s| s as &dyn DevicePtr<S>);
        let mut y = RecurrentFwdOutputs {
            o: &mut o,
            final_state: FinalState::New(&mut last),
            token_states: wants_tokens.then_some(&mut tokens as &mut dyn DevicePtrMut<S>),
        };
        plan.run(stream, &RecurrentFwdInputs { initial_state, ..x }, &mut y)
    })?;
    Ok(Got { o: o.read(), last: case.loaded(&last.read()), tokens: case.loaded(&tokens.read()) })
}

fn within<T: Poison>(class: Class, got: &[T], want: &[f64]) -> Result<(), String> {
    let class = match class {
        Class::FinalState if T::DTYPE != DType::F32 => Class::NarrowState,
        class => class,
    };
    let dtype = dtype::<T>();
    let model = Model::GatedDelta;
    let key = Key { backend: Backend::Gpu, model, pass: Pass::RecurrentFwd, dtype, class };
    let limit = limit(key).map_err(|error| error.to_string())?;
    let got: Vec<f64> = got.iter().map(|x| f64::from(x.to_f32())).collect();
    let error = relative_rms(&got, want);
    if error <= limit { Ok(()) } else { Err(format!("{class:?}: relative RMS {error:.2e} > {limit:.0e}")) }
}

fn check<T: Poison + Storage, S: Poison + StateElement + Storage>(
    device: &Device,
    stream: &Arc<CudaStream>,
    case: &Case,
) -> Result<(), String> {
    let problem = Problem::new::<T, S>(case);
    let want = reference_of(&problem, case);
    let once = || run::<T, S>(device, stream, case, &problem).map_err(|error| error.to_string());
    let (got, again) = (once()?, once()?);
    same_bits("o", &got.o, &again.o)?;
    same_bits("final_state", &got.last, &again.last)?;
    same_bits("token_states", &got.tokens, &again.tokens)?;
    within(Class::Output, &got.o, &want.o)?;
    within(Class::FinalState, &got.last, &want.final_state)?;
    // The state after the last token of a sequence is its final state.
    let state_len = case.hv * case.k * case.v;
    let offsets = if case.packed.is_empty() {
        (0..=case.b).map(|i_n| i_n * case.t).collect()
    } else {
        case.cu_seqlens()
    };
    for (i_n, ends) in offsets.windows(2).enumerate().filter(|(_, ends)| ends[0] < ends[1]) {
        if !got.tokens.is_empty() {
            let of_token = &got.tokens[(ends[1] - 1) * state_len..ends[1] * state_len];
            same_bits("token_states", of_token, &got.last[i_n * state_len..(i_n + 1) * state_len])?;
        }
    }
    Ok(())
}

fn check_all_dtypes(device: &Device, stream: &Arc<CudaStream>, case: &Case) -> Result<(), String> {
    check::<f32, f32>(device, stream, case).map_err(|error| format!("f32: {error}"))?;
    check::<bf16, f32>(device, stream, case).map_err(|error| format!("bf16: {error}"))?;
    check::<bf16, bf16>(device, stream, case).map_err(|error| format!("bf16, bf16 state: {error}"))?;
    check::<f16, f32>(device, stream, case).map_err(|error| format!("f16: {error}"))
}

#[test]
fn recurrent_fwd_matches_reference() {
    let Some((device, stream)) = gpu("recurrent_fwd_matches_reference") else { return };
    run_cases(CASES, |case| case.name.into(), |case| check_all_dtypes(&device, &stream, case));
}

#[test]
fn recurrent_fwd_matches_reference_with_every_option() {
    let Some((device, stream)) = gpu("recurrent_fwd_matches_reference_with_every_option") else { return };
    run_cases(OPTIONS, |case| case.name.into(), |case| check_all_dtypes(&device, &stream, case));
}

#[test]
fn recurrent_fwd_survives_every_gate_regime() {
    let Some((device, stream)) = gpu("recurrent_fwd_survives_every_gate_regime") else { return };
    run_cases(
        REGIMES,
        |gates| format!("{gates:?}"),
        |gates| {
            let channel_gates = ChannelGates::RowsAndColumns;
            check_all_dtypes(&device, &stream, &Case { t: 70, gates: *gates, ..BASE })?;
            check_all_dtypes(&device, &stream, &Case { t: 70, gates: *gates, channel_gates, ..BASE })
        },
    );
}

proptest! {
    // Every new K and V compiles a kernel, so a few cases a run; the seed changes from run to run.
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn recurrent_fwd_matches_reference_for_any_shape(case in any_case()) {
        if let Some((device, stream)) = gpu("recurrent_fwd_matches_reference_for_any_shape") {
            let result = check::<bf16, bf16>(&device, &stream, &case)
                .and_then(|()| check::<f32, f32>(&device, &stream, &case));
            assert_eq!(result, Ok(()), "{case:?}");
        }
    }
}

/// A call on a pool: sequences and tokens of each, columns of the table of slots.
#[derive(Clone, Debug)]
struct PoolCase {
    name: &'static str,
    case: Case,
    m: usize,
}

const POOLS: &[PoolCase] = &[
    PoolCase { name: "one token in place", case: Case { b: 9, t: 1, ..BASE }, m: 1 },
    PoolCase { name: "one token of many states in place", case: Case { b: 205, t: 1, hv: 6, ..BASE }, m: 1 },
    PoolCase { name: "one token of 128 by 128", case: Case { b: 90, t: 1, k: 128, v: 128, ..LAYER }, m: 1 },
    PoolCase { name: "five tokens in place", case: Case { b: 9, t: 5, ..BASE }, m: 1 },
    PoolCase { name: "four tokens kept", case: Case { b: 9, t: 4, ..LAYER }, m: 4 },
    PoolCase { name: "four tokens kept, many states", case: Case { b: 131, t: 4, ..LAYER }, m: 4 },
    PoolCase { name: "four tokens in two slots, many states", case: Case { b: 131, t: 4, ..BASE }, m: 2 },
    PoolCase {
        name: "three tokens of 128 by 128",
        case: Case { b: 67, t: 3, hv: 6, k: 128, v: 128, ..BASE },
        m: 3,
    },
    PoolCase { name: "packed", case: Case { packed: &[3, 0, 1, 1, 7, 2, 0, 1, 1], ..BASE }, m: 1 },
    PoolCase {
        name: "packed, two slots",
        case: Case { packed: &[3, 0, 1, 1, 7, 2, 0, 1, 1], ..LAYER },
        m: 2,
    },
    PoolCase { name: "uneven head", case: Case { b: 9, t: 2, k: 33, v: 50, ..BASE }, m: 2 },
];

/// Number of slots of a pool for `n` sequences of `m` slots.
fn pool_len(n: usize, m: usize) -> usize {
    n * m + 3
}

/// Slots in no order, with padding at sequence 2 and, at sequence 4, the first slot of sequence 3 again.
fn slots(n: usize, m: usize) -> Vec<i32> {
    let total = pool_len(n, m);
    let has_divisor = |step: &usize| (2..=*step).any(|d| step.is_multiple_of(d) && total.is_multiple_of(d));
    let step = (3..).find(|step| !has_divisor(step)).expect("ends");
    let mut slots: Vec<i32> = (0..n * m).map(|i| ((i * step + 1) % total) as i32).collect();
    slots[2 * m..3 * m].fill(-1);
    let taken = slots[3 * m];
    slots[4 * m..5 * m].fill(taken);
    slots
}

fn check_pool<T: Poison + Storage, S: Poison + StateElement + Storage>(
    device: &Device,
    stream: &Arc<CudaStream>,
    PoolCase { case, m, .. }: &PoolCase,
) -> Result<(), String> {
    let (shape, m) = (case.shape(), *m);
    let (n, state_len) = (shape.seqs.n(), case.hv * case.k * case.v);
    let problem = Problem { initial_state: None, ..Problem::new::<T, S>(case) };
    let total = pool_len(n, m);
    let mut rng = Rng::new(11);
    let states: Vec<f64> = round_to::<S, f64>(&rng.normal::<f64>(total * state_len, 1.0));
    let table = slots(n, m);
    // Sequence 5 has accepted nothing, and sequence 6 more than there is.
    let mut accepted: Vec<i32> = (0..n).map(|i_n| 1 + (i_n % m) as i32).collect();
    (accepted[5], accepted[6]) = (0, m as i32 + 1);
    let tensors = Tensors::<T, S>::new(stream, case, &problem);
    let plan =
        RecurrentFwd::<T, S>::new(device, &shape, &case.options()).map_err(|error| error.to_string())?;
    let once = || {
        let mut pool = to_device::<S>(stream, "final_state", &states);
        let mut o = Guarded::<T>::output(stream, "o", shape.v_len());
        let slots = stream.clone_htod(&table).expect("fits");
        let accepted = stream.clone_htod(&accepted).expect("fits");
        tensors.with(case, |x| {
            let (mut o, mut pool) = (o.view_mut(), pool.view_mut());
            let final_state =
                FinalState::Pool(StatePool { states: &mut pool, slots: &slots, accepted: Some(&accepted) });
            plan.run(stream, &x, &mut RecurrentFwdOutputs { o: &mut o, final_state, token_states: None })
        })?;
        Ok::<_, Error>((o.read(), pool.read()))
    };
    let (o, pool) = once().map_err(|error| error.to_string())?;
    let (o_again, pool_again) = once().map_err(|error| error.to_string())?;
    same_bits("o", &o, &o_again)?;
    same_bits("the pool", &pool, &pool_again)?;

    // What every sequence should have left, by the reference on that sequence alone.
    let mut want_o = vec![0.0; o.len()];
    let mut want_pool = states.clone();
    let mut touched = vec![false; total];
    let row = case.hv * case.v;
    for i_n in (0..n).filter(|i_n| ![2, 4, 5, 6].contains(i_n)) {
        let (bos, len) = match shape.seqs.cu_seqlens() {
            Some(offsets) => (offsets[i_n], offsets[i_n + 1] - offsets[i_n]),
            None => (i_n * case.t, case.t),
        };
        let of = |slot: usize| slot * state_len..(slot + 1) * state_len;
        let first = table[i_n * m + accepted[i_n] as usize - 1] as usize;
        let mut state = states[of(first)].to_vec();
        for i in 0..len {
            let (piece, piece_case) = tokens(&problem, case, bos + i..bos + i + 1, Some(state));
            let y = reference_of(&piece, &piece_case);
            want_o[(bos + i) * row..(bos + i + 1) * row].copy_from_slice(&y.o);
            state = y.final_state;
            // The last column is for the last token alone.
            if i + 1 < m || i + 1 == len {
                let slot = table[i_n * m + i.min(m - 1)] as usize;
                want_pool[of(slot)].copy_from_slice(&state);
                touched[slot] = true;
            }
        }
    }
    within(Class::Output, &o, &want_o)?;
    within(Class::FinalState, &pool, &want_pool)?;
    for slot in (0..total).filter(|slot| !touched[*slot]) {
        let before: Vec<S> =
            states[slot * state_len..(slot + 1) * state_len].iter().map(|x| S::from_f32(*x as f32)).collect();
        let after = &pool[slot * state_len..(slot + 1) * state_len];
        same_bits("a slot of nobody", &before, after)?;
    }
    for i_n in [2, 4, 5, 6] {
        let rows = match shape.seqs.cu_seqlens() {
            Some(offsets) => offsets[i_n]..offsets[i_n + 1],
            None => i_n * case.t..(i_n + 1) * case.t,
        };
        if o[rows.start * row..rows.end * row].iter().any(|x| x.to_f32() != 0.0) {
            return Err(format!("the outputs of sequence {i_n}, which has no state, are not zeros"));
        }
    }
    Ok(())
}

#[test]
fn states_in_a_pool_follow_their_slots() {
    let Some((device, stream)) = gpu("states_in_a_pool_follow_their_slots") else { return };
    run_cases(
        POOLS,
        |pool| pool.name.into(),
        |pool| {
            check_pool::<f32, f32>(&device, &stream, pool).map_err(|error| format!("f32: {error}"))?;
            check_pool::<bf16, f32>(&device, &stream, pool).map_err(|error| format!("bf16: {error}"))?;
            check_pool::<bf16, bf16>(&device, &stream, pool).map_err(|error| format!("bf16 state: {error}"))
        },
    );
}

#[test]
fn states_in_place_have_the_bits_of_new_ones() {
    let Some((device, stream)) = gpu("states_in_place_have_the_bits_of_new_ones") else { return };
    let cases = [
        Case { name: "one token", t: 1, ..BASE },
        Case { name: "17 tokens", ..BASE },
        Case { name: "four tokens of many states", t: 4, b: 203, ..LAYER },
        Case { name: "one token of many states", t: 1, b: 203, k: 128, v: 128, ..LAYER },
        Case { name: "packed", packed: &[0, 5, 0, 1], ..BASE },
    ];
    run_cases(
        &cases,
        |case| case.name.into(),
        |case| {
            let problem = Problem::new::<bf16, bf16>(case);
            let want =
                run::<bf16, bf16>(&device, &stream, case, &problem).map_err(|error| error.to_string())?;
            let mut tensors = Tensors::<bf16, bf16>::new(&stream, case, &problem);
            let mut state = tensors.initial_state.take().expect("the case has one");
            let mut o = Guarded::<bf16>::output(&stream, "o", want.o.len());
            let plan = RecurrentFwd::<bf16, bf16>::new(&device, &case.shape(), &case.options())
                .map_err(|error| error.to_string())?;
            tensors
                .with(case, |x| {
                    let (mut o, mut state) = (o.view_mut(), state.view_mut());
                    let final_state = FinalState::InPlace(&mut state);
                    let mut y = RecurrentFwdOutputs { o: &mut o, final_state, token_states: None };
                    plan.run(&stream, &x, &mut y)
                })
                .map_err(|error| error.to_string())?;
            same_bits("o", &want.o, &o.read())?;
            same_bits("final_state", &want.last, &state.read())
        },
    );
}

#[test]
fn splitting_a_sequence_changes_nothing() {
    let Some((device, stream)) = gpu("splitting_a_sequence_changes_nothing") else { return };
    let whole = Case { b: 1, t: 31, ..LAYER };
    let problem = Problem::new::<bf16, f32>(&whole);
    let got = run::<bf16, f32>(&device, &stream, &whole, &problem).expect("runs");
    let mut state = problem.initial_state.clone();
    let mut pieces = Vec::new();
    // One token takes another path through the kernel than many.
    for (from, to) in [(0, 1), (1, 20), (20, 21), (21, 31)] {
        let (piece, case) = tokens(&problem, &whole, from..to, state);
        let got = run::<bf16, f32>(&device, &stream, &case, &piece).expect("runs");
        pieces.extend(got.o);
        state = Some(got.last.into_iter().map(f64::from).collect());
    }
    assert_eq!(same_bits("o", &got.o, &pieces), Ok(()));
    let state: Vec<f32> = state.expect("asked for").into_iter().map(|x| x as f32).collect();
    assert_eq!(same_bits("final_state", &got.last, &state), Ok(()));
}

#[test]
fn the_one_call_form_gives_the_plans_bits() {
    let Some((device, stream)) = gpu("the_one_call_form_gives_the_plans_bits") else { return };
    let problem = Problem::new::<f16, f32>(&LAYER);
    let want = run::<f16, f32>(&device, &stream, &LAYER, &problem).expect("runs");
    let tensors = Tensors::<f16, f32>::new(&stream, &LAYER, &problem);
    let initial = tensors.initial_state.as_ref().expect("the case has one").view();
    // The one call runs on the stream of `q`.
    stream.synchronize().expect("finishes");
    let y = tensors
        .with(&LAYER, |x| {
            let x = RecurrentFwdInputs { initial_state: Some(&initial), ..x };
            recurrent_fwd(&device, &LAYER.shape(), &x, &LAYER.options())
        })
        .expect("runs");
    assert_eq!(same_bits("o", &want.o, &stream.clone_dtoh(&y.o).expect("copies")), Ok(()));
    let state = stream.clone_dtoh(&y.final_state).expect("copies");
    assert_eq!(same_bits("final_state", &want.last, &state), Ok(()));
}

#[test]
fn offsets_beyond_two_to_the_31_are_right() {
    const H: usize = 64;
    const LONG: usize = (1 << 31) / (H * 64);
    const SHORT: usize = 5;
    let Some((device, stream)) = gpu("offsets_beyond_two_to_the_31_are_right") else { return };
    // A long first sequence of zeros pushes the second one past 2^31 elements.
    let case = Case { name: "far", packed: &[LONG, SHORT], h: H, hv: H, initial_state: false, ..BASE };
    let bytes = 4 * case.shape().v_len() * size_of::<bf16>();
    let (free, _) = device.context().mem_get_info().expect("answers");
    if free < bytes + (1 << 30) {
        eprintln!(
            "offsets_beyond_two_to_the_31_are_right: skipped, it needs {} GiB of device memory",
            bytes >> 30
        );
        return;
    }
    let tail = Case { name: "tail", b: 1, t: SHORT, packed: &[], ..case.clone() };
    let problem = Problem::new::<bf16, f32>(&tail);
    let want = reference_of(&problem, &tail);
    fn far<T: Poison>(stream: &Arc<CudaStream>, values: &[f64]) -> fla_core::cudarc::driver::CudaSlice<T> {
        let values: Vec<T> = values.iter().map(|x| T::from_f32(*x as f32)).collect();
        let start = values.len() / SHORT * LONG;
        let mut all = stream.alloc_zeros::<T>(start + values.len()).expect("fits");
        stream.memcpy_htod(&values, &mut all.slice_mut(start..)).expect("copies");
        all
    }
    let (q, k, v) =
        (far::<bf16>(&stream, &problem.q), far::<bf16>(&stream, &problem.k), far(&stream, &problem.v));
    let (g, beta) = (far::<f32>(&stream, &problem.g), far::<bf16>(&stream, &problem.beta));
    let x = RecurrentFwdInputs {
        q: &q,
        k: &k,
        v: &v,
        g: Gate::Log(&g),
        gk: None,
        gv: None,
        beta: Beta::PerHead(&beta),
        initial_state: None,
        cu_seqlens: None,
    };
    let y = recurrent_fwd(&device, &case.shape(), &x, &case.options()).expect("runs");
    let o = stream.clone_dtoh(&y.o.slice(LONG * H * 64..)).expect("copies");
    assert_eq!(within(Class::Output, &o, &want.o), Ok(()));
}

#[test]
fn offsets_on_the_device_are_followed_and_not_trusted() {
    let Some((device, stream)) = gpu("offsets_on_the_device_are_followed_and_not_trusted") else { return };
    let case = Case { packed: &[3, 0, 9, 1, 4], ..LAYER };
    let problem = Problem::new::<bf16, f32>(&case);
    let want = run::<bf16, f32>(&device, &stream, &case, &problem).expect("runs");
    let shape = Shape { seqs: SeqLens::packed_on_device(5, 17), ..case.shape() };
    let plan = RecurrentFwd::<bf16>::new(&device, &shape, &case.options()).expect("valid");
    let tensors = Tensors::<bf16, f32>::new(&stream, &case, &problem);
    let run_with = |offsets: &[i64]| {
        let cu_seqlens = stream.clone_htod(offsets).expect("fits");
        let initial = tensors.initial_state.as_ref().expect("the case has one").view();
        let mut o = Guarded::<bf16>::output(&stream, "o", want.o.len());
        let mut last = Guarded::<f32>::output(&stream, "final_state", want.last.len());
        let done = tensors.with(&case, |x| {
            let (mut o, mut last) = (o.view_mut(), last.view_mut());
            let x = RecurrentFwdInputs { initial_state: Some(&initial), cu_seqlens: Some(&cu_seqlens), ..x };
            let final_state = FinalState::New(&mut last);
            plan.run(&stream, &x, &mut RecurrentFwdOutputs { o: &mut o, final_state, token_states: None })
        });
        done.map(|()| (o.read(), last.read()))
    };
    let (o, last) = run_with(&[0, 3, 3, 12, 13, 17]).expect("runs");
    assert_eq!(same_bits("o", &want.o, &o), Ok(()));
    assert_eq!(same_bits("final_state", &want.last, &last), Ok(()));
    // Guard words show whatever is read or written out of bounds.
    for offsets in [[-9, 99, 3, i64::MAX, i64::MIN, 5], [17, 0, 17, 0, 17, 0], [0, 0, 0, 0, 0, 1 << 40]] {
        let (_, last) = run_with(&offsets).expect("runs");
        assert!(last.iter().all(|x| x.is_finite()), "{offsets:?}");
    }
    let error = run_with(&[0, 17]).expect_err("too few").to_string();
    assert!(error.contains("`cu_seqlens` is [N + 1], which is 6 elements here, but holds 2"), "{error}");
}

#[test]
fn wrong_arguments_are_named_before_anything_is_launched() {
    let Some((device, stream)) = gpu("wrong_arguments_are_named_before_anything_is_launched") else { return };
    let shape = Shape { seqs: SeqLens::dense(1, 2), h: 1, hv: 2, k: 64, v: 32 };
    let options = RecurrentFwdOptions::new(1.0);
    let all = options
        .clone()
        .with_gate(GateForm::Raw)
        .with_channel_gates(ChannelGates::RowsAndColumns)
        .with_beta(BetaForm::PerChannel);
    let plan = RecurrentFwd::<f32>::new(&device, &shape, &all).expect("valid");
    let good = |len| stream.alloc_zeros::<f32>(len).expect("fits");
    let (qk, v, heads, rows, hv, s) = (good(128), good(128), good(4), good(256), good(2), good(2 * 64 * 32));
    let (bad, odd) = (good(127), good(129));
    let misaligned = odd.slice(1..);
    let x = RecurrentFwdInputs::<f32> {
        q: &qk,
        k: &qk,
        v: &v,
        g: Gate::Raw { g: &heads, a_log: &hv, dt_bias: Some(&hv) },
        gk: Some(&rows),
        gv: Some(&v),
        beta: Beta::PerChannel(&v),
        initial_state: Some(&s),
        cu_seqlens: None,
    };
    let mut o = Guarded::<f32>::output(&stream, "o", 128);
    let mut refused = |plan: &RecurrentFwd<f32>, x: &RecurrentFwdInputs<'_, f32>| {
        let mut view = o.view_mut();
        let final_state = FinalState::Dropped;
        let mut y = RecurrentFwdOutputs { o: &mut view, final_state, token_states: None };
        plan.run(&stream, x, &mut y).expect_err("must be refused").to_string()
    };
    let g = |g, a_log, dt_bias| Gate::Raw { g, a_log, dt_bias: Some(dt_bias) };
    for (name, x) in [
        ("q", RecurrentFwdInputs { q: &bad, ..x }),
        ("k", RecurrentFwdInputs { k: &bad, ..x }),
        ("v", RecurrentFwdInputs { v: &bad, ..x }),
        ("g", RecurrentFwdInputs { g: g(&bad, &hv, &hv), ..x }),
        ("a_log", RecurrentFwdInputs { g: g(&heads, &bad, &hv), ..x }),
        ("dt_bias", RecurrentFwdInputs { g: g(&heads, &hv, &bad), ..x }),
        ("gk", RecurrentFwdInputs { gk: Some(&bad), ..x }),
        ("gv", RecurrentFwdInputs { gv: Some(&bad), ..x }),
        ("beta", RecurrentFwdInputs { beta: Beta::PerChannel(&bad), ..x }),
        ("initial_state", RecurrentFwdInputs { initial_state: Some(&bad), ..x }),
    ] {
        let text = refused(&plan, &x);
        assert!(text.starts_with(&format!("`{name}` is [")) && text.ends_with("but holds 127"), "{text}");
    }
    for (name, x) in [
        ("g", RecurrentFwdInputs { g: Gate::None, ..x }),
        ("g", RecurrentFwdInputs { g: Gate::Log(&heads), ..x }),
        ("gk", RecurrentFwdInputs { gk: None, ..x }),
        ("gv", RecurrentFwdInputs { gv: None, ..x }),
        ("beta", RecurrentFwdInputs { beta: Beta::One, ..x }),
        ("beta", RecurrentFwdInputs { beta: Beta::PerHead(&heads), ..x }),
        (
            "cu_seqlens",
            RecurrentFwdInputs { cu_seqlens: Some(&stream.alloc_zeros::<i64>(2).expect("fits")), ..x },
        ),
    ] {
        let text = refused(&plan, &x);
        assert!(text.starts_with(&format!("`{name}` must be ")), "{text}");
    }
    let bare = options.clone().with_gate(GateForm::None).with_beta(BetaForm::One);
    let bare = RecurrentFwd::<f32>::new(&device, &shape, &bare).expect("valid");
    let nothing = RecurrentFwdInputs { g: Gate::None, gk: None, gv: None, beta: Beta::One, ..x };
    for (name, x) in [
        ("g", RecurrentFwdInputs { g: Gate::Log(&heads), ..nothing }),
        ("gk", RecurrentFwdInputs { gk: Some(&rows), ..nothing }),
        ("gv", RecurrentFwdInputs { gv: Some(&v), ..nothing }),
        ("beta", RecurrentFwdInputs { beta: Beta::PerHead(&heads), ..nothing }),
    ] {
        let text = refused(&bare, &x);
        assert!(text.starts_with(&format!("`{name}` must be absent")), "{text}");
    }
    let text = refused(&plan, &RecurrentFwdInputs { k: &misaligned, ..x });
    assert!(text.contains("`k`") && text.contains("16"), "{text}");
    let mut short = good(63);
    let mut y = RecurrentFwdOutputs { o: &mut short, final_state: FinalState::Dropped, token_states: None };
    let error = plan.run(&stream, &x, &mut y);
    assert!(matches!(error, Err(Error::Len { tensor: "o", wanted: 128, got: 63, .. })), "{error:?}");
    let mut last = good(3);
    let mut view = o.view_mut();
    let mut y =
        RecurrentFwdOutputs { o: &mut view, final_state: FinalState::New(&mut last), token_states: None };
    let text = plan.run(&stream, &x, &mut y).expect_err("too short").to_string();
    assert!(text.starts_with("`final_state` is [N, HV, K, V], which is 4096"), "{text}");
    let mut y =
        RecurrentFwdOutputs { o: &mut view, final_state: FinalState::InPlace(&mut last), token_states: None };
    let text = plan.run(&stream, &x, &mut y).expect_err("two initial states").to_string();
    assert!(text.starts_with("`initial_state` must be absent"), "{text}");
    // None of the refused calls has written anything.
    assert!(o.read().iter().all(|x| x.is_nan()));

    for (shape, options, text) in [
        (Shape { k: 0, ..shape.clone() }, options.clone(), "K must be from 1 to 256, but is 0"),
        (Shape { k: 257, ..shape.clone() }, options.clone(), "K must be from 1 to 256, but is 257"),
        (Shape { v: 513, ..shape.clone() }, options.clone(), "V must be from 1 to 512, but is 513"),
        (Shape { h: 3, hv: 4, ..shape.clone() }, options, "HV must be a multiple of H, which is 3, but is 4"),
        (shape.clone(), RecurrentFwdOptions::new(f32::NAN), "option `scale` must be finite, but is NaN"),
        (
            shape,
            RecurrentFwdOptions::new(1.0).with_beta(BetaForm::One).with_beta_map(BetaMap::Sigmoid),
            "option `beta_map` must be AsGiven where `beta` is 1 everywhere, but is Sigmoid",
        ),
    ] {
        let error = RecurrentFwd::<f32>::new(&device, &shape, &options).expect_err(text);
        assert_eq!(error.to_string(), text);
    }
}

#[test]
fn a_captured_graph_follows_slots_and_lengths() {
    let Some((device, _)) = gpu("a_captured_graph_follows_slots_and_lengths") else { return };
    // Event tracking belongs to a context, and other tests run on the shared one.
    let bench = fla_core::testing::Bench::open().expect("opens");
    let stream = bench.stream().clone();
    let case = Case { packed: &[3, 4], initial_state: false, ..LAYER };
    let state_len = case.hv * case.k * case.v;
    let problem = Problem::new::<bf16, f32>(&case);
    let tensors = Tensors::<bf16, f32>::new(&stream, &case, &problem);
    let shape = Shape { seqs: SeqLens::packed_on_device(2, 7), ..case.shape() };
    let plan = RecurrentFwd::<bf16>::new(&device, &shape, &case.options()).expect("valid");
    let states: Vec<f32> = Rng::new(3).normal(3 * state_len, 1.0);
    let mut pool = stream.clone_htod(&states).expect("fits");
    let mut slots = stream.clone_htod(&[0, 1]).expect("fits");
    let mut cu_seqlens = stream.clone_htod(&[0i64, 3, 7]).expect("fits");
    let mut o = stream.alloc_zeros::<bf16>(shape.v_len()).expect("fits");
    let replay = bench
        .capture(1, |stream, _| {
            tensors.with(&case, |x| {
                let x = RecurrentFwdInputs { cu_seqlens: Some(&cu_seqlens), ..x };
                let final_state =
                    FinalState::Pool(StatePool { states: &mut pool, slots: &slots, accepted: None });
                plan.run(stream, &x, &mut RecurrentFwdOutputs { o: &mut o, final_state, token_states: None })
            })
        })
        .expect("captures");
    for (lens, table) in [([3, 4], [0, 1]), ([6, 1], [2, 0]), ([0, 7], [1, 2])] {
        stream.memcpy_htod(&states, &mut pool).expect("copies");
        stream.memcpy_htod(&table, &mut slots).expect("copies");
        stream.memcpy_htod(&[0, lens[0] as i64, 7], &mut cu_seqlens).expect("copies");
        replay.time(1);
        let got = stream.clone_dtoh(&o).expect("copies");
        let pool = stream.clone_dtoh(&pool).expect("copies");
        let row = case.hv * case.v;
        for (i_n, (bos, len)) in [(0, lens[0]), (lens[0], lens[1])].into_iter().enumerate() {
            let slot = table[i_n] as usize * state_len..(table[i_n] as usize + 1) * state_len;
            let initial = states[slot.clone()].iter().map(|x| f64::from(*x)).collect();
            let (piece, piece_case) = tokens(&problem, &case, bos..bos + len, Some(initial));
            let want = reference_of(&piece, &piece_case);
            if len > 0 {
                let got = &got[bos * row..(bos + len) * row];
                assert_eq!(within(Class::Output, got, &want.o), Ok(()), "{lens:?} {table:?}");
            }
            let result = within(Class::FinalState, &pool[slot], &want.final_state);
            assert_eq!(result, Ok(()), "{lens:?} {table:?}");
        }
    }
}
