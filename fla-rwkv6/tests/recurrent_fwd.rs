//! `recurrent_fwd` on the GPU against the float64 recurrence.

use std::sync::Arc;

use fla_core::cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut};
use fla_core::testing::{Bench, Guarded, Poison, gpu, run_cases, same_bits};
use fla_core::{DType, Device, Error, FinalState, SeqLens, Shape, StateElement, StatePool};
use fla_reference::compare::relative_rms;
use fla_reference::inputs::{Gates, REGIMES, Rng, Storage, round_to};
use fla_reference::tolerance::{Backend, Class, Dtype, Key, Model, Pass, limit};
use fla_rwkv6::{
    Direction, RecurrentFwd, RecurrentFwdInputs, RecurrentFwdOptions, RecurrentFwdOutputs, recurrent_fwd,
};
use half::{bf16, f16};
use proptest::prelude::{ProptestConfig, Strategy, prop_oneof, proptest};
use proptest::strategy::Just;

/// What is asked of the operator, apart from the numbers.
#[derive(Clone, Debug)]
struct Case {
    name: &'static str,
    /// Lengths of packed sequences; dense when empty.
    packed: &'static [usize],
    /// The offsets of packed sequences are read on the device.
    on_device: bool,
    b: usize,
    t: usize,
    h: usize,
    k: usize,
    v: usize,
    scale: f64,
    direction: Direction,
    gates: Gates,
    initial_state: bool,
    kept: Kept,
    token_states: bool,
}

/// Where the final state goes.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kept {
    Dropped,
    New,
    InPlace,
}

const BASE: Case = Case {
    name: "",
    packed: &[],
    on_device: false,
    b: 2,
    t: 17,
    h: 3,
    k: 64,
    v: 64,
    scale: 0.125,
    direction: Direction::Forward,
    gates: Gates::LogSigmoid,
    initial_state: true,
    kept: Kept::New,
    token_states: false,
};

const REVERSE: Case = Case { direction: Direction::Reverse, ..BASE };

const CASES: &[Case] = &[
    Case { name: "one token", t: 1, ..BASE },
    Case { name: "one token, in place", t: 1, kept: Kept::InPlace, ..BASE },
    Case { name: "one token, no initial state", t: 1, initial_state: false, ..BASE },
    Case { name: "one token, no final state", t: 1, kept: Kept::Dropped, ..BASE },
    Case { name: "one token, reversed", t: 1, ..REVERSE },
    Case { name: "one token and its state", t: 1, token_states: true, ..BASE },
    Case { name: "two tokens", t: 2, ..BASE },
    Case { name: "no token", t: 0, ..BASE },
    Case { name: "no token, reversed, in place", t: 0, kept: Kept::InPlace, ..REVERSE },
    Case { name: "15 tokens, in place", t: 15, kept: Kept::InPlace, ..BASE },
    Case { name: "16 tokens and their states", t: 16, token_states: true, ..BASE },
    Case { name: "17 tokens and their states, reversed", token_states: true, ..REVERSE },
    Case { name: "63 tokens, no states", t: 63, initial_state: false, kept: Kept::Dropped, ..BASE },
    Case { name: "64 tokens, reversed", t: 64, ..REVERSE },
    Case { name: "65 tokens, scale 1", t: 65, scale: 1.0, ..BASE },
    Case { name: "1000 tokens, one head", b: 1, t: 1000, h: 1, gates: Gates::Rwkv7, ..BASE },
    Case { name: "4000 tokens, slow decay", b: 1, t: 4000, h: 1, gates: Gates::Constant(-1e-2), ..BASE },
    Case { name: "decode, many sequences", b: 33, t: 1, h: 5, ..BASE },
    Case { name: "many states, one token", b: 67, t: 1, h: 8, ..BASE },
    Case { name: "many states, one token, in place", b: 67, t: 1, h: 8, kept: Kept::InPlace, ..BASE },
    Case { name: "very many states, one token", b: 301, t: 1, h: 8, ..BASE },
    Case { name: "many states, three tokens", b: 181, t: 3, h: 6, gates: Gates::Mixed, ..BASE },
    Case { name: "many states, three tokens, reversed", b: 181, t: 3, h: 6, ..REVERSE },
    Case { name: "many states, four tokens, in place", b: 91, t: 4, h: 7, kept: Kept::InPlace, ..BASE },
    Case { name: "many states, four tokens and their states", b: 91, t: 4, h: 7, token_states: true, ..BASE },
    Case {
        name: "many states, five tokens and their states, reversed",
        b: 91,
        t: 5,
        h: 7,
        token_states: true,
        ..REVERSE
    },
    Case { name: "many states, eight tokens, none before", b: 67, t: 8, h: 8, initial_state: false, ..BASE },
    Case { name: "many states, four tokens, no final state", b: 67, t: 4, h: 8, kept: Kept::Dropped, ..BASE },
    Case { name: "many states, nine tokens", b: 67, t: 9, h: 8, ..BASE },
    Case { name: "many states of 128 by 128", b: 47, t: 1, h: 6, k: 128, v: 128, ..BASE },
    Case { name: "many states of 128 by 128, five tokens", b: 67, t: 5, h: 2, k: 128, v: 128, ..BASE },
    Case { name: "many states of 64 by 128", b: 90, t: 2, h: 6, k: 64, v: 128, ..BASE },
    Case { name: "many states of 128 by 32", b: 90, t: 1, h: 6, k: 128, v: 32, ..BASE },
    Case { name: "many states of 32 by 32", b: 90, t: 7, h: 6, k: 32, v: 32, ..BASE },
    Case { name: "many states that do not stream", b: 90, t: 1, h: 6, k: 60, v: 60, ..BASE },
    Case { name: "more heads than a grid axis of 65535", b: 35_000, t: 1, h: 2, k: 8, v: 4, ..BASE },
    Case { name: "packed", packed: &[3, 17, 1, 30], ..BASE },
    Case { name: "packed, reversed", packed: &[3, 17, 1, 30], ..REVERSE },
    Case { name: "packed with empty members", packed: &[0, 5, 0, 0, 1, 20, 0], ..BASE },
    Case { name: "packed with empty members, in place", packed: &[0, 5, 0, 1], kept: Kept::InPlace, ..BASE },
    Case { name: "packed with empty members, reversed", packed: &[0, 5, 0, 0, 1, 20, 0], ..REVERSE },
    Case { name: "packed, empty members without a state", packed: &[0, 5, 0], initial_state: false, ..BASE },
    Case { name: "packed, all of one token", packed: &[1, 1, 1, 1, 1], ..BASE },
    Case { name: "packed, one sequence without tokens", packed: &[0], ..BASE },
    Case { name: "packed on the device", packed: &[0, 5, 0, 0, 1, 20, 0], on_device: true, ..BASE },
    Case { name: "packed on the device, reversed", packed: &[0, 5, 0, 9], on_device: true, ..REVERSE },
    Case { name: "no sequence", b: 0, ..BASE },
    Case { name: "K = V = 128", k: 128, v: 128, ..BASE },
    Case { name: "K = V = 128, one token", t: 1, k: 128, v: 128, ..BASE },
    Case { name: "K = V = 256", h: 1, k: 256, v: 256, ..BASE },
    Case { name: "K = V = 256, one token", t: 1, h: 1, k: 256, v: 256, ..BASE },
    Case { name: "V = 512", h: 1, k: 64, v: 512, ..BASE },
    Case { name: "K = V = 1", k: 1, v: 1, ..BASE },
    Case { name: "K = 60, V = 100", k: 60, v: 100, ..BASE },
    Case { name: "K = 100, V = 60, one token", t: 1, k: 100, v: 60, ..BASE },
    Case { name: "K = 33, V = 65: rows that no vector access fits", k: 33, v: 65, ..BASE },
    Case { name: "K = 33, V = 65, reversed, with states", k: 33, v: 65, token_states: true, ..REVERSE },
    Case { name: "K = 50, V = 70", k: 50, v: 70, ..BASE },
    Case { name: "K = 132, V = 17, packed", k: 132, v: 17, packed: &[2, 0, 9], ..BASE },
];

impl Case {
    fn shape(&self) -> Shape {
        let tokens = self.packed.iter().sum();
        let seqs = match (self.packed, self.on_device) {
            ([], _) => SeqLens::dense(self.b, self.t),
            (packed, true) => SeqLens::packed_on_device(packed.len(), tokens),
            (_, false) => SeqLens::packed(&self.cu_seqlens(), tokens).expect("valid lengths"),
        };
        Shape { seqs, h: self.h, k: self.k, v: self.v }
    }

    fn cu_seqlens(&self) -> Vec<usize> {
        self.packed.iter().fold(vec![0], |mut offsets, len| {
            offsets.push(offsets[offsets.len() - 1] + len);
            offsets
        })
    }

    fn reference_shape(&self) -> fla_reference::Shape {
        let seqs = if self.packed.is_empty() {
            fla_reference::SeqLens::Dense { b: self.b, t: self.t }
        } else {
            fla_reference::SeqLens::Packed { cu_seqlens: self.cu_seqlens() }
        };
        fla_reference::Shape { seqs, h: self.h, k: self.k, v: self.v }
    }

    fn options(&self) -> RecurrentFwdOptions {
        RecurrentFwdOptions::new(self.scale as f32).with_direction(self.direction)
    }

    fn reference_options(&self) -> fla_reference::rwkv6::Options<f64> {
        fla_reference::rwkv6::Options::new(self.scale).with_direction(match self.direction {
            Direction::Forward => fla_reference::rwkv6::Direction::Forward,
            Direction::Reverse => fla_reference::rwkv6::Direction::Reverse,
        })
    }
}

/// Inputs as f64, already rounded to the type that the kernel reads.
struct Problem {
    r: Vec<f64>,
    k: Vec<f64>,
    v: Vec<f64>,
    w: Vec<f64>,
    u: Vec<f64>,
    initial_state: Option<Vec<f64>>,
}

impl Problem {
    fn new<T: Storage, S: Storage>(case: &Case) -> Self {
        let shape = case.shape();
        let mut rng = Rng::new(7);
        let initial_state =
            case.initial_state.then(|| round_to::<S, f64>(&rng.normal::<f64>(shape.state_len(), 1.0)));
        Self {
            r: round_to::<T, f64>(&rng.normal::<f64>(shape.k_len(), 1.0)),
            k: round_to::<T, f64>(&rng.normal::<f64>(shape.k_len(), 1.0)),
            v: round_to::<T, f64>(&rng.normal::<f64>(shape.v_len(), 1.0)),
            w: round_to::<T, f64>(&rng.gates::<f64>(shape.k_len(), case.gates)),
            u: round_to::<T, f64>(&rng.normal::<f64>(shape.h * shape.k, 1.0)),
            initial_state,
        }
    }

    fn reference(&self, case: &Case) -> fla_reference::rwkv6::Outputs<f64> {
        let Self { r, k, v, w, u, initial_state } = self;
        let x = fla_reference::rwkv6::Inputs { r, k, v, w, u, initial_state: initial_state.as_deref() };
        fla_reference::rwkv6::recurrent_fwd(&case.reference_shape(), &x, &case.reference_options())
    }

    /// The state after every token: `[B, T, H, K, V]`, by the recurrence on one token at a time.
    fn token_states(&self, case: &Case) -> Vec<f64> {
        let shape = case.reference_shape();
        let (h, k, v, elems) = (case.h, case.k, case.v, case.h * case.k * case.v);
        let mut states = vec![f64::NAN; shape.seqs.tokens() * elems];
        let seqs = fla_reference::SeqLens::Dense { b: 1, t: 1 };
        let one = fla_reference::Shape { seqs, h, k, v };
        for i_n in 0..shape.seqs.n() {
            let mut state = self.initial_of(case, i_n);
            let mut tokens: Vec<usize> = shape.seqs.range(i_n).collect();
            if case.direction == Direction::Reverse {
                tokens.reverse();
            }
            for i_t in tokens {
                let keys = i_t * h * k..(i_t + 1) * h * k;
                let x = fla_reference::rwkv6::Inputs {
                    r: &self.r[keys.clone()],
                    k: &self.k[keys.clone()],
                    v: &self.v[i_t * h * v..(i_t + 1) * h * v],
                    w: &self.w[keys],
                    u: &self.u,
                    initial_state: Some(&state),
                };
                state = fla_reference::rwkv6::recurrent_fwd(&one, &x, &case.reference_options()).final_state;
                states[i_t * elems..(i_t + 1) * elems].copy_from_slice(&state);
            }
        }
        states
    }

    /// The state that sequence `i_n` starts from.
    fn initial_of(&self, case: &Case, i_n: usize) -> Vec<f64> {
        let elems = case.h * case.k * case.v;
        self.initial_state
            .as_ref()
            .map_or_else(|| vec![0.0; elems], |state| state[i_n * elems..(i_n + 1) * elems].to_vec())
    }
}

fn narrowed<T: Poison>(values: &[f64]) -> Vec<T> {
    values.iter().map(|x| T::from_f32(*x as f32)).collect()
}

fn widened<T: Poison>(values: &[T]) -> Vec<f64> {
    values.iter().map(|x| f64::from(x.to_f32())).collect()
}

/// The vectors of a problem on the device.
struct Vectors<T: Poison> {
    r: Guarded<T>,
    k: Guarded<T>,
    v: Guarded<T>,
    w: Guarded<T>,
    u: Guarded<T>,
}

impl<T: Poison> Vectors<T> {
    fn new(stream: &Arc<CudaStream>, problem: &Problem) -> Self {
        let input = |name, values: &[f64]| Guarded::input(stream, name, &narrowed::<T>(values));
        Self {
            r: input("r", &problem.r),
            k: input("k", &problem.k),
            v: input("v", &problem.v),
            w: input("w", &problem.w),
            u: input("u", &problem.u),
        }
    }
}

/// What a run gives.
struct Got<T, S> {
    o: Vec<T>,
    final_state: Option<Vec<S>>,
    token_states: Option<Vec<S>>,
}

/// One run on poisoned buffers.
fn run<T: Poison, S: Poison + StateElement>(
    device: &Device,
    stream: &Arc<CudaStream>,
    case: &Case,
    problem: &Problem,
) -> Result<Got<T, S>, Error> {
    let shape = case.shape();
    let x = Vectors::<T>::new(stream, problem);
    let initial = problem.initial_state.as_ref().map(|s| narrowed::<S>(s));
    let in_place = case.kept == Kept::InPlace;
    let separate = initial.as_ref().filter(|_| !in_place);
    let separate = separate.map(|s| Guarded::input(stream, "initial_state", s));
    let mut last = match (case.kept, initial) {
        (Kept::Dropped, _) => None,
        (Kept::InPlace, Some(state)) => Some(Guarded::input(stream, "final_state", &state)),
        (_, _) => Some(Guarded::<S>::output(stream, "final_state", shape.state_len())),
    };
    let tokens_len = case.shape().state_shape().rows * case.h * case.k * case.v;
    let mut tokens = case.token_states.then(|| Guarded::<S>::output(stream, "token_states", tokens_len));
    let mut o = Guarded::<T>::output(stream, "o", shape.v_len());
    let offsets: Vec<i64> = case.cu_seqlens().iter().map(|x| *x as i64).collect();
    let offsets = case.on_device.then(|| stream.clone_htod(&offsets).expect("copies"));

    let plan = RecurrentFwd::<T, S>::new(device, &shape, &case.options())?;
    {
        let (r, k, v, w, u) = (x.r.view(), x.k.view(), x.v.view(), x.w.view(), x.u.view());
        let separate = separate.as_ref().map(Guarded::view);
        let inputs = RecurrentFwdInputs {
            r: &r,
            k: &k,
            v: &v,
            w: &w,
            u: &u,
            initial_state: separate.as_ref().map(|s| s as &dyn DevicePtr<S>),
            cu_seqlens: offsets.as_ref().map(|s| s as &dyn DevicePtr<i64>),
        };
        let mut o = o.view_mut();
        let (mut last, mut tokens) =
            (last.as_mut().map(Guarded::view_mut), tokens.as_mut().map(Guarded::view_mut));
        let final_state = match (last.as_mut(), in_place) {
            (None, _) => FinalState::Dropped,
            (Some(state), false) => FinalState::New(state),
            (Some(state), true) => FinalState::InPlace(state),
        };
        let token_states = tokens.as_mut().map(|s| s as &mut dyn DevicePtrMut<S>);
        plan.run(stream, &inputs, &mut RecurrentFwdOutputs { o: &mut o, final_state, token_states })?;
    }
    Ok(Got {
        o: o.read(),
        final_state: last.as_mut().map(Guarded::read),
        token_states: tokens.as_mut().map(Guarded::read),
    })
}

fn reference_dtype(dtype: DType) -> Dtype {
    match dtype {
        DType::F32 => Dtype::F32,
        DType::Bf16 => Dtype::Bf16,
        DType::F16 => Dtype::F16,
    }
}

fn within(dtype: DType, class: Class, got: &[f64], want: &[f64]) -> Result<(), String> {
    let key = Key {
        backend: Backend::Gpu,
        model: Model::Rwkv6,
        pass: Pass::RecurrentFwd,
        dtype: reference_dtype(dtype),
        class,
    };
    let limit = limit(key).map_err(|error| error.to_string())?;
    let error = relative_rms(got, want);
    if error <= limit { Ok(()) } else { Err(format!("{class:?}: relative RMS {error:.2e} > {limit:.0e}")) }
}

fn state_within<T: Poison, S: Poison>(got: &[S], want: &[f64]) -> Result<(), String> {
    let class = if S::DTYPE == DType::F32 { Class::FinalState } else { Class::NarrowState };
    within(T::DTYPE, class, &widened(got), want)
}

fn check<T: Poison + Storage, S: Poison + StateElement + Storage>(
    device: &Device,
    stream: &Arc<CudaStream>,
    case: &Case,
) -> Result<(), String> {
    let problem = Problem::new::<T, S>(case);
    let want = problem.reference(case);
    let once = || run::<T, S>(device, stream, case, &problem).map_err(|error| error.to_string());
    let (got, again) = (once()?, once()?);
    same_bits("o", &got.o, &again.o)?;
    within(T::DTYPE, Class::Output, &widened(&got.o), &want.o)?;
    if let (Some(state), Some(again)) = (got.final_state, again.final_state) {
        same_bits("final_state", &state, &again)?;
        state_within::<T, S>(&state, &want.final_state)?;
    }
    if let (Some(states), Some(again)) = (got.token_states, again.token_states) {
        same_bits("token_states", &states, &again)?;
        state_within::<T, S>(&states, &problem.token_states(case))
            .map_err(|error| format!("tokens: {error}"))?;
    }
    Ok(())
}

fn check_all_types(device: &Device, stream: &Arc<CudaStream>, case: &Case) -> Result<(), String> {
    check::<f32, f32>(device, stream, case).map_err(|error| format!("f32: {error}"))?;
    check::<bf16, f32>(device, stream, case).map_err(|error| format!("bf16: {error}"))?;
    check::<f16, f32>(device, stream, case).map_err(|error| format!("f16: {error}"))?;
    check::<bf16, bf16>(device, stream, case).map_err(|error| format!("bf16, states in bf16: {error}"))
}

#[test]
fn recurrent_fwd_matches_reference() {
    let Some((device, stream)) = gpu("recurrent_fwd_matches_reference") else { return };
    run_cases(CASES, |case| case.name.into(), |case| check_all_types(&device, &stream, case));
}

#[test]
fn recurrent_fwd_survives_every_gate_regime() {
    let Some((device, stream)) = gpu("recurrent_fwd_survives_every_gate_regime") else { return };
    run_cases(
        REGIMES,
        |gates| format!("{gates:?}"),
        |gates| check_all_types(&device, &stream, &Case { t: 70, gates: *gates, ..BASE }),
    );
}

fn any_case() -> impl Strategy<Value = Case> {
    let width = prop_oneof![Just(64usize), Just(32), 1usize..=96];
    let direction = prop_oneof![Just(Direction::Forward), Just(Direction::Reverse)];
    let kept = prop_oneof![Just(Kept::New), Just(Kept::InPlace)];
    (1usize..4, 0usize..40, 1usize..4, width.clone(), width, 0..REGIMES.len(), direction, kept).prop_map(
        |(b, t, h, k, v, regime, direction, kept)| Case {
            name: "proptest",
            b,
            t,
            h,
            k,
            v,
            direction,
            gates: REGIMES[regime],
            kept,
            ..BASE
        },
    )
}

proptest! {
    // Every new K and V compiles a kernel, so a few cases a run; the seed changes from run to run.
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn recurrent_fwd_matches_reference_for_any_shape(case in any_case()) {
        if let Some((device, stream)) = gpu("recurrent_fwd_matches_reference_for_any_shape") {
            let result = check::<bf16, f32>(&device, &stream, &case)
                .and_then(|()| check::<f32, f32>(&device, &stream, &case));
            assert_eq!(result, Ok(()), "{case:?}");
        }
    }
}

/// A call on a pool of states.
#[derive(Clone, Debug)]
struct Pooled {
    case: Case,
    /// `[N, M]`
    slots: &'static [i32],
    /// `[N]`
    accepted: Option<&'static [i32]>,
}

/// Slots of the pool.
const POOL: usize = 9;

const POOLED: &[Pooled] = &[
    Pooled {
        case: Case { name: "one token, in its slot", b: 3, t: 1, ..BASE },
        slots: &[4, 0, 7],
        accepted: None,
    },
    Pooled {
        case: Case { name: "one token, padding, a slot that is not there", b: 4, t: 1, ..BASE },
        slots: &[4, -1, 2, POOL as i32],
        accepted: None,
    },
    Pooled {
        case: Case { name: "one token, a slot that an earlier sequence has", b: 3, t: 1, ..BASE },
        slots: &[4, 2, 4],
        accepted: None,
    },
    Pooled {
        case: Case { name: "five tokens in one slot", b: 2, t: 5, ..BASE },
        slots: &[8, 1],
        accepted: None,
    },
    Pooled {
        case: Case { name: "five tokens in one slot, reversed", b: 2, t: 5, ..REVERSE },
        slots: &[8, 1],
        accepted: None,
    },
    Pooled {
        case: Case { name: "three tokens, each in a slot", b: 3, t: 3, ..BASE },
        slots: &[0, 1, 2, 5, 4, 3, 6, 7, 8],
        accepted: Some(&[1, 3, 2]),
    },
    Pooled {
        case: Case { name: "three tokens, each in a slot, reversed", b: 3, t: 3, ..REVERSE },
        slots: &[0, 1, 2, 5, 4, 3, 6, 7, 8],
        accepted: Some(&[1, 3, 2]),
    },
    Pooled {
        case: Case { name: "one token with three slots", b: 2, t: 1, ..BASE },
        slots: &[0, 1, 2, 5, 4, 3],
        accepted: Some(&[3, 2]),
    },
    Pooled {
        case: Case { name: "six tokens with three slots, nothing accepted", b: 3, t: 6, ..BASE },
        slots: &[0, 1, 2, 5, 4, 3, 6, 7, 8],
        accepted: Some(&[1, 0, 4]),
    },
    Pooled {
        case: Case { name: "packed with an empty member", packed: &[4, 0, 1], ..BASE },
        slots: &[3, 5, 1],
        accepted: None,
    },
    Pooled {
        case: Case {
            name: "two tokens on the device, reversed",
            packed: &[2, 2],
            on_device: true,
            ..REVERSE
        },
        slots: &[3, 4, 1, 2],
        accepted: Some(&[2, 1]),
    },
    Pooled {
        case: Case { name: "uneven heads", b: 3, t: 4, k: 33, v: 50, ..BASE },
        slots: &[4, 0, -1],
        accepted: None,
    },
];

/// The same, with enough heads to stream.
fn streaming() -> Vec<Pooled> {
    POOLED
        .iter()
        .filter(|pooled| pooled.case.packed.is_empty() && pooled.case.k == 64)
        .map(|pooled| Pooled { case: Case { h: 301, ..pooled.case.clone() }, ..pooled.clone() })
        .collect()
}

fn check_pooled<T: Poison + Storage, S: Poison + StateElement + Storage>(
    device: &Device,
    stream: &Arc<CudaStream>,
    pooled: &Pooled,
) -> Result<(), String> {
    let Pooled { case, slots, accepted } = pooled;
    let (n, elems) = (case.shape().seqs.n(), case.h * case.k * case.v);
    let m = slots.len() / n;
    let pool = round_to::<S, f64>(&Rng::new(3).normal::<f64>(POOL * elems, 1.0));
    let slot = |i: usize| usize::try_from(slots[i]).ok().filter(|slot| *slot < POOL);
    // What the sequence starts from, unless it is skipped.
    let first = |i_n: usize| {
        let column = accepted.map_or(0, |accepted| accepted[i_n] - 1);
        let column = usize::try_from(column).ok().filter(|column| *column < m)?;
        slot(i_n * m + column).filter(|first| !slots[..i_n * m].contains(&(*first as i32)))
    };

    // The reference: sequences with the states of their slots, then each state into its slot.
    let mut problem = Problem::new::<T, S>(&Case { initial_state: false, ..case.clone() });
    let initial = (0..n).flat_map(|i_n| {
        first(i_n).map_or_else(|| vec![0.0; elems], |first| pool[first * elems..(first + 1) * elems].to_vec())
    });
    problem.initial_state = Some(initial.collect());
    let mut want_o = problem.reference(case).o;
    let states = problem.token_states(case);
    let mut want_pool = pool.clone();
    let mut touched = [false; POOL];
    for i_n in 0..n {
        let rows = case.reference_shape().seqs.range(i_n);
        if first(i_n).is_none() {
            want_o[rows.start * case.h * case.v..rows.end * case.h * case.v].fill(0.0);
            continue;
        }
        for i in 0..rows.len() {
            if i + 1 < rows.len() && i + 1 >= m {
                continue;
            }
            let Some(slot) = slot(i_n * m + i.min(m - 1)) else { continue };
            let i_t = match case.direction {
                Direction::Forward => rows.start + i,
                Direction::Reverse => rows.end - 1 - i,
            };
            want_pool[slot * elems..(slot + 1) * elems]
                .copy_from_slice(&states[i_t * elems..(i_t + 1) * elems]);
            touched[slot] = true;
        }
    }

    let x = Vectors::<T>::new(stream, &problem);
    let pool = narrowed::<S>(&pool);
    let mut memory = Guarded::input(stream, "pool", &pool);
    let mut o = Guarded::<T>::output(stream, "o", case.shape().v_len());
    let slots = stream.clone_htod(*slots).expect("copies");
    let accepted = accepted.map(|accepted| stream.clone_htod(accepted).expect("copies"));
    let offsets: Vec<i64> = case.cu_seqlens().iter().map(|x| *x as i64).collect();
    let offsets = case.on_device.then(|| stream.clone_htod(&offsets).expect("copies"));
    let plan = RecurrentFwd::<T, S>::new(device, &case.shape(), &case.options())
        .map_err(|error| error.to_string())?;
    {
        let (r, k, v, w, u) = (x.r.view(), x.k.view(), x.v.view(), x.w.view(), x.u.view());
        let inputs = RecurrentFwdInputs {
            r: &r,
            k: &k,
            v: &v,
            w: &w,
            u: &u,
            initial_state: None,
            cu_seqlens: offsets.as_ref().map(|s| s as &dyn DevicePtr<i64>),
        };
        let (mut o, mut states) = (o.view_mut(), memory.view_mut());
        let accepted = accepted.as_ref().map(|s| s as &dyn DevicePtr<i32>);
        let final_state = FinalState::Pool(StatePool { states: &mut states, slots: &slots, accepted });
        let mut outputs = RecurrentFwdOutputs { o: &mut o, final_state, token_states: None };
        plan.run(stream, &inputs, &mut outputs).map_err(|error| error.to_string())?;
    }
    within(T::DTYPE, Class::Output, &o.read_f64(), &want_o)?;
    let got = memory.read();
    for (i, touched) in touched.into_iter().enumerate() {
        let slot = i * elems..(i + 1) * elems;
        if touched {
            state_within::<T, S>(&got[slot.clone()], &want_pool[slot])
                .map_err(|error| format!("slot {i}: {error}"))?;
        } else {
            same_bits(&format!("slot {i}"), &pool[slot.clone()], &got[slot])?;
        }
    }
    Ok(())
}

#[test]
fn a_pool_keeps_the_states_of_its_slots() {
    let Some((device, stream)) = gpu("a_pool_keeps_the_states_of_its_slots") else { return };
    let all = [POOLED.to_vec(), streaming()].concat();
    run_cases(
        &all,
        |pooled| format!("{}, {} heads", pooled.case.name, pooled.case.h),
        |pooled| {
            check_pooled::<bf16, f32>(&device, &stream, pooled)?;
            check_pooled::<f32, f32>(&device, &stream, pooled)?;
            check_pooled::<bf16, bf16>(&device, &stream, pooled)
        },
    );
}

#[test]
fn splitting_a_sequence_changes_nothing() {
    let Some((device, stream)) = gpu("splitting_a_sequence_changes_nothing") else { return };
    for direction in [Direction::Forward, Direction::Reverse] {
        let whole = Case { b: 1, t: 31, direction, ..BASE };
        let problem = Problem::new::<bf16, f32>(&whole);
        let got = run::<bf16, f32>(&device, &stream, &whole, &problem).expect("runs");
        let mut state = problem.initial_state.clone();
        let mut o = vec![bf16::NAN; got.o.len()];
        // One token takes another path through the kernel than many.
        let mut pieces = [(0, 1), (1, 20), (20, 21), (21, 31)];
        if direction == Direction::Reverse {
            pieces.reverse();
        }
        for (from, to) in pieces {
            let cut = |x: &[f64]| x[from * 3 * 64..to * 3 * 64].to_vec();
            let piece = Problem {
                r: cut(&problem.r),
                k: cut(&problem.k),
                v: cut(&problem.v),
                w: cut(&problem.w),
                u: problem.u.clone(),
                initial_state: state,
            };
            let case = Case { t: to - from, ..whole.clone() };
            let part = run::<bf16, f32>(&device, &stream, &case, &piece).expect("runs");
            o[from * 3 * 64..to * 3 * 64].copy_from_slice(&part.o);
            state = part.final_state.map(|s| widened(&s));
        }
        assert_eq!(same_bits("o", &got.o, &o), Ok(()));
        let state: Vec<f32> = narrowed(&state.expect("asked for"));
        assert_eq!(same_bits("final_state", &got.final_state.expect("asked for"), &state), Ok(()));
    }
}

/// The vectors of a problem without guards, for what outlives a test's buffers: `r`, `k`, `v`, `w`, `u`.
fn plain<T: Poison>(stream: &Arc<CudaStream>, problem: &Problem) -> [CudaSlice<T>; 5] {
    [&problem.r, &problem.k, &problem.v, &problem.w, &problem.u]
        .map(|x| stream.clone_htod(&narrowed::<T>(x)).expect("copies"))
}

fn inputs<T, S>(vectors: &[CudaSlice<T>; 5]) -> RecurrentFwdInputs<'_, T, S> {
    let [r, k, v, w, u] = vectors;
    RecurrentFwdInputs { r, k, v, w, u, initial_state: None, cu_seqlens: None }
}

#[test]
fn the_one_call_form_gives_the_plans_bits() {
    let Some((device, stream)) = gpu("the_one_call_form_gives_the_plans_bits") else { return };
    let problem = Problem::new::<f16, f32>(&BASE);
    let got = run::<f16, f32>(&device, &stream, &BASE, &problem).expect("runs");
    let vectors = plain::<f16>(&stream, &problem);
    let initial: Vec<f32> = narrowed(problem.initial_state.as_deref().expect("has one"));
    let initial = stream.clone_htod(&initial).expect("copies");
    let x = RecurrentFwdInputs { initial_state: Some(&initial), ..inputs(&vectors) };
    let y = recurrent_fwd(&device, &BASE.shape(), &x, &BASE.options()).expect("runs");
    assert_eq!(same_bits("o", &got.o, &stream.clone_dtoh(&y.o).expect("copies")), Ok(()));
    let state = stream.clone_dtoh(&y.final_state).expect("copies");
    assert_eq!(same_bits("final_state", &got.final_state.expect("asked for"), &state), Ok(()));
}

#[test]
fn offsets_beyond_two_to_the_31_are_right() {
    const H: usize = 64;
    const LONG: usize = (1 << 31) / (H * 64);
    const SHORT: usize = 5;
    let Some((device, stream)) = gpu("offsets_beyond_two_to_the_31_are_right") else { return };
    // A long first sequence of zeros pushes the second one past 2^31 elements.
    let case = Case { name: "far", packed: &[LONG, SHORT], h: H, initial_state: false, ..BASE };
    let bytes = 5 * case.shape().k_len() * size_of::<bf16>();
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
    let want = problem.reference(&tail);
    let start = LONG * H * 64;
    let far = |values: &[f64]| {
        let values = narrowed::<bf16>(values);
        let mut all = stream.alloc_zeros::<bf16>(case.shape().k_len()).expect("fits");
        stream.memcpy_htod(&values, &mut all.slice_mut(start..start + values.len())).expect("copies");
        all
    };
    let u = stream.clone_htod(&narrowed::<bf16>(&problem.u)).expect("copies");
    let vectors = [far(&problem.r), far(&problem.k), far(&problem.v), far(&problem.w), u];
    let y = recurrent_fwd(&device, &case.shape(), &inputs(&vectors), &case.options()).expect("runs");
    let o = stream.clone_dtoh(&y.o.slice(start..)).expect("copies");
    assert_eq!(within(DType::Bf16, Class::Output, &widened(&o), &want.o), Ok(()));
}

#[test]
fn wrong_arguments_are_named_before_anything_is_launched() {
    let Some((device, stream)) = gpu("wrong_arguments_are_named_before_anything_is_launched") else { return };
    let shape = Shape { seqs: SeqLens::dense(1, 2), h: 1, k: 64, v: 32 };
    let options = RecurrentFwdOptions::new(1.0);
    let plan = RecurrentFwd::<f32>::new(&device, &shape, &options).expect("valid");
    let good = |len| stream.alloc_zeros::<f32>(len).expect("fits");
    let (k, v, u, s) = (good(128), good(64), good(64), good(64 * 32));
    let (bad, odd) = (good(127), good(129));
    let misaligned = odd.slice(1..);
    type Spoil<'a> = (&'static str, fn(&mut RecurrentFwdInputs<'a, f32>, &'a dyn DevicePtr<f32>));
    let spoils: [Spoil<'_>; 6] = [
        ("r", |x, bad| x.r = bad),
        ("k", |x, bad| x.k = bad),
        ("v", |x, bad| x.v = bad),
        ("w", |x, bad| x.w = bad),
        ("u", |x, bad| x.u = bad),
        ("initial_state", |x, bad| x.initial_state = Some(bad)),
    ];
    let x =
        RecurrentFwdInputs { r: &k, k: &k, v: &v, w: &k, u: &u, initial_state: Some(&s), cu_seqlens: None };
    let mut o = Guarded::<f32>::output(&stream, "o", 64);
    let mut refused = |x: &RecurrentFwdInputs<'_, f32>, kept: Kept, mut state: CudaSlice<f32>| {
        let mut view = o.view_mut();
        let final_state = match kept {
            Kept::Dropped => FinalState::Dropped,
            Kept::New => FinalState::New(&mut state),
            Kept::InPlace => FinalState::InPlace(&mut state),
        };
        let mut y = RecurrentFwdOutputs { o: &mut view, final_state, token_states: None };
        plan.run(&stream, x, &mut y).expect_err("must be refused")
    };
    for (name, spoil) in spoils {
        let mut x = x;
        spoil(&mut x, &bad);
        let text = refused(&x, Kept::Dropped, good(0)).to_string();
        assert!(text.starts_with(&format!("`{name}` is [")) && text.ends_with("but holds 127"), "{text}");
    }
    let error = refused(&RecurrentFwdInputs { k: &misaligned, ..x }, Kept::Dropped, good(0));
    assert!(matches!(error, Error::Align { tensor: "k", wanted: 16, .. }), "{error:?}");
    let error = refused(&x, Kept::New, good(3));
    assert!(matches!(error, Error::Len { tensor: "final_state", .. }), "{error:?}");
    let error = refused(&x, Kept::InPlace, good(64 * 32));
    assert!(matches!(error, Error::Presence { tensor: "initial_state", .. }), "{error:?}");
    let offsets = stream.alloc_zeros::<i64>(2).expect("fits");
    let error = refused(&RecurrentFwdInputs { cu_seqlens: Some(&offsets), ..x }, Kept::Dropped, good(0));
    assert!(matches!(error, Error::Presence { tensor: "cu_seqlens", .. }), "{error:?}");
    // None of the refused calls has written anything.
    assert!(o.read().iter().all(|x| x.is_nan()));
    let mut short = good(63);
    let mut y = RecurrentFwdOutputs { o: &mut short, final_state: FinalState::Dropped, token_states: None };
    let error = plan.run(&stream, &x, &mut y);
    assert!(matches!(error, Err(Error::Len { tensor: "o", wanted: 64, got: 63, .. })), "{error:?}");

    for (shape, options, text) in [
        (Shape { k: 0, ..shape.clone() }, options.clone(), "K must be from 1 to 256, but is 0"),
        (Shape { k: 257, ..shape.clone() }, options.clone(), "K must be from 1 to 256, but is 257"),
        (Shape { v: 513, ..shape.clone() }, options, "V must be from 1 to 512, but is 513"),
        (shape, RecurrentFwdOptions::new(f32::NAN), "option `scale` must be finite, but is NaN"),
    ] {
        let error = RecurrentFwd::<f32>::new(&device, &shape, &options).expect_err(text);
        assert_eq!(error.to_string(), text);
    }
}

#[test]
fn a_captured_graph_follows_slots_and_lengths() {
    let Some((device, _)) = gpu("a_captured_graph_follows_slots_and_lengths") else { return };
    // Event tracking belongs to a context, and other tests run on the shared one.
    let bench = Bench::open().expect("opens");
    let stream = bench.stream().clone();
    let (h, k, v) = (3, 64, 64);
    let case = Case { packed: &[3, 4], on_device: true, h, k, v, initial_state: false, ..BASE };
    let problem = Problem::new::<bf16, f32>(&case);
    let vectors = plain::<bf16>(&stream, &problem);
    let plan = RecurrentFwd::<bf16>::new(&device, &case.shape(), &case.options()).expect("valid");
    let mut states = stream.alloc_zeros::<f32>(POOL * h * k * v).expect("fits");
    let mut slots = stream.clone_htod(&[1_i32, 2]).expect("copies");
    let mut offsets = stream.clone_htod(&[0_i64, 3, 7]).expect("copies");
    let mut o = stream.alloc_zeros::<bf16>(case.shape().v_len()).expect("fits");
    let replay = bench
        .capture(1, |stream, _| {
            let x = RecurrentFwdInputs { cu_seqlens: Some(&offsets), ..inputs(&vectors) };
            let pool = StatePool { states: &mut states, slots: &slots, accepted: None };
            let final_state = FinalState::Pool(pool);
            plan.run(stream, &x, &mut RecurrentFwdOutputs { o: &mut o, final_state, token_states: None })
        })
        .expect("captures");
    for (packed, numbers) in [(&[3, 4], [1_i32, 2]), (&[6, 1], [5, 0]), (&[0, 7], [7, 8])] {
        let fresh: Case = Case { packed, ..case.clone() };
        let cu_seqlens: Vec<i64> = fresh.cu_seqlens().iter().map(|x| *x as i64).collect();
        stream.memcpy_htod(&cu_seqlens, &mut offsets).expect("copies");
        stream.memcpy_htod(&numbers, &mut slots).expect("copies");
        stream.memset_zeros(&mut states).expect("writes");
        replay.time(1);
        let want = problem.reference(&fresh);
        let got = stream.clone_dtoh(&o).expect("copies");
        assert_eq!(within(DType::Bf16, Class::Output, &widened(&got), &want.o), Ok(()), "{packed:?}");
        let pool = stream.clone_dtoh(&states).expect("copies");
        for (i_n, want) in want.final_state.chunks(h * k * v).enumerate() {
            let slot = numbers[i_n] as usize * h * k * v;
            assert_eq!(
                state_within::<bf16, f32>(&pool[slot..slot + h * k * v], want),
                Ok(()),
                "{packed:?} {i_n}"
            );
        }
    }
}
