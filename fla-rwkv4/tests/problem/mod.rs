//! Cases, inputs and references that the tests of all passes share.
#![allow(dead_code, reason = "every test uses its part")]

use std::sync::Arc;

use fla_core::cudarc::driver::{CudaSlice, CudaStream, CudaViewMut};
use fla_core::testing::{Guarded, Poison};
use fla_core::{DType, SeqLens};
use fla_reference::compare::{F16_SPACING, relative_rms_beyond, worst_relative_rms};
use fla_reference::inputs::{Rng, Storage, round_to};
use fla_reference::rwkv4 as reference;
use fla_reference::tolerance::{Backend, Class, Dtype, Key, Model, Pass, limit, relieved};
use fla_rwkv4::Shape;
use proptest::prelude::{Strategy, any, prop_oneof};
use proptest::strategy::Just;

/// What is asked of the operator, apart from the numbers.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    pub(crate) name: &'static str,
    /// Lengths of packed sequences; dense when empty.
    pub(crate) packed: &'static [usize],
    pub(crate) b: usize,
    pub(crate) t: usize,
    pub(crate) c: usize,
    pub(crate) keys: Keys,
    pub(crate) decay: Decay,
    /// Added to every bonus.
    pub(crate) bonus: f64,
    pub(crate) initial_state: Initial,
    /// Whether the final state is wanted, and has a gradient.
    pub(crate) final_state: bool,
}

/// Where keys lie.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Keys {
    /// Normal, with this deviation.
    Normal(f64),
    /// 80 and -80 in any order.
    Extreme,
    /// From -80 to 80 over the sequence, so that every token outweighs all before it.
    Rising,
    /// From 80 to -80.
    Falling,
    /// All the same.
    Equal,
    /// One large key at the start, small ones after it.
    FirstLarge,
}

/// Where raw decays lie.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Decay {
    /// From -6 to 1.5, as RWKV-4's layers start out and a little further.
    Spread,
    /// The same for all channels.
    Constant(f64),
}

/// The state that sequences start from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Initial {
    /// None is given.
    Absent,
    /// (0, 0, -1e38), given.
    Fresh,
    /// As sums of some tokens would be.
    Random,
    /// The same with an exponent above every key.
    Heavy,
}

pub(crate) const BASE: Case = Case {
    name: "",
    packed: &[],
    b: 2,
    t: 50,
    c: 40,
    keys: Keys::Normal(1.5),
    decay: Decay::Spread,
    bonus: 0.0,
    initial_state: Initial::Random,
    final_state: true,
};

/// Lengths around runs, tiles and chunks; packed sequences; channel counts around blocks; every regime.
pub(crate) const CASES: &[Case] = &[
    Case { name: "one token", t: 1, ..BASE },
    Case { name: "one token, no states", t: 1, initial_state: Initial::Absent, final_state: false, ..BASE },
    Case { name: "two tokens", t: 2, ..BASE },
    Case { name: "no token", t: 0, ..BASE },
    Case { name: "no token, no initial state", t: 0, initial_state: Initial::Absent, ..BASE },
    Case { name: "no sequence", b: 0, ..BASE },
    Case { name: "15 tokens", t: 15, ..BASE },
    Case { name: "16 tokens", t: 16, ..BASE },
    Case { name: "17 tokens", t: 17, ..BASE },
    Case { name: "31 tokens", t: 31, ..BASE },
    Case { name: "32 tokens", t: 32, ..BASE },
    Case { name: "33 tokens", t: 33, ..BASE },
    Case { name: "127 tokens", t: 127, ..BASE },
    Case { name: "128 tokens", t: 128, ..BASE },
    Case { name: "129 tokens", t: 129, ..BASE },
    Case { name: "255 tokens, no initial state", t: 255, initial_state: Initial::Absent, ..BASE },
    Case { name: "256 tokens, no final state", t: 256, final_state: false, ..BASE },
    Case { name: "257 tokens", t: 257, ..BASE },
    Case { name: "600 tokens", t: 600, ..BASE },
    Case { name: "1100 tokens, few channels", b: 1, t: 1100, c: 8, ..BASE },
    Case { name: "3000 tokens, one channel", b: 1, t: 3000, c: 1, ..BASE },
    Case { name: "1024 tokens, 4224 channels", b: 1, t: 300, c: 4224, ..BASE },
    Case { name: "many sequences", b: 300, t: 40, c: 130, ..BASE },
    Case { name: "many long sequences", b: 40, t: 260, c: 260, ..BASE },
    Case { name: "very many sequences", b: 700, t: 33, c: 200, ..BASE },
    Case { name: "very many sequences, few channels", b: 5000, t: 3, c: 2, ..BASE },
    Case {
        name: "4000 tokens, no decay to speak of",
        b: 1,
        t: 4000,
        c: 33,
        decay: Decay::Constant(-14.0),
        ..BASE
    },
    Case { name: "4000 tokens, slow decay", b: 1, t: 4000, c: 33, decay: Decay::Constant(-7.0), ..BASE },
    Case { name: "packed", packed: &[3, 17, 129, 300], ..BASE },
    Case { name: "packed with empty members", packed: &[0, 5, 0, 0, 1, 200, 0], ..BASE },
    Case {
        name: "packed, empty members, no states",
        packed: &[0, 5, 0],
        initial_state: Initial::Absent,
        final_state: false,
        ..BASE
    },
    Case {
        name: "packed, empty members, no initial state",
        packed: &[0, 5, 0],
        initial_state: Initial::Absent,
        ..BASE
    },
    Case { name: "packed, all of one token", packed: &[1, 1, 1, 1, 1], ..BASE },
    Case { name: "packed, one sequence without tokens", packed: &[0], ..BASE },
    Case { name: "packed, long and odd", packed: &[1, 1000, 7, 513], c: 17, ..BASE },
    Case { name: "1 channel", c: 1, ..BASE },
    Case { name: "7 channels", c: 7, ..BASE },
    Case { name: "33 channels", c: 33, ..BASE },
    Case { name: "64 channels", c: 64, ..BASE },
    Case { name: "100 channels", c: 100, ..BASE },
    Case { name: "fresh state, given", initial_state: Initial::Fresh, ..BASE },
    Case { name: "heavy initial state", initial_state: Initial::Heavy, t: 140, ..BASE },
    Case {
        name: "heavy initial state, no decay",
        initial_state: Initial::Heavy,
        t: 140,
        decay: Decay::Constant(-20.0),
        ..BASE
    },
    Case { name: "no decay", decay: Decay::Constant(-20.0), t: 150, ..BASE },
    Case { name: "decay of e^-1", decay: Decay::Constant(0.0), t: 150, ..BASE },
    Case { name: "decay of e^-20", decay: Decay::Constant(3.0), t: 150, ..BASE },
    Case { name: "decay to nothing", decay: Decay::Constant(7.0), t: 150, ..BASE },
    Case { name: "decay beyond f32", decay: Decay::Constant(100.0), t: 150, ..BASE },
    Case { name: "large keys", keys: Keys::Normal(20.0), t: 150, ..BASE },
    Case { name: "extreme keys", keys: Keys::Extreme, t: 150, ..BASE },
    Case {
        name: "extreme keys, no decay",
        keys: Keys::Extreme,
        decay: Decay::Constant(-20.0),
        t: 150,
        ..BASE
    },
    Case { name: "extreme keys, fresh", keys: Keys::Extreme, initial_state: Initial::Absent, t: 150, ..BASE },
    Case { name: "rising keys", keys: Keys::Rising, t: 150, ..BASE },
    Case { name: "falling keys", keys: Keys::Falling, t: 150, ..BASE },
    Case {
        name: "falling keys, no decay",
        keys: Keys::Falling,
        decay: Decay::Constant(-20.0),
        t: 150,
        ..BASE
    },
    Case { name: "equal keys", keys: Keys::Equal, t: 150, ..BASE },
    Case { name: "equal keys, no decay", keys: Keys::Equal, decay: Decay::Constant(-20.0), t: 150, ..BASE },
    Case { name: "one large key", keys: Keys::FirstLarge, t: 300, ..BASE },
    Case { name: "large bonus", bonus: 60.0, t: 150, ..BASE },
    Case { name: "no bonus", bonus: -60.0, t: 150, ..BASE },
];

impl Case {
    pub(crate) fn shape(&self) -> Shape {
        let seqs = if self.packed.is_empty() {
            SeqLens::dense(self.b, self.t)
        } else {
            SeqLens::packed(&self.cu_seqlens(), self.packed.iter().sum()).expect("valid lengths")
        };
        Shape { seqs, c: self.c }
    }

    fn cu_seqlens(&self) -> Vec<usize> {
        self.packed.iter().fold(vec![0], |mut offsets, len| {
            offsets.push(offsets[offsets.len() - 1] + len);
            offsets
        })
    }

    pub(crate) fn reference_shape(&self) -> reference::Shape {
        let seqs = if self.packed.is_empty() {
            fla_reference::SeqLens::Dense { b: self.b, t: self.t }
        } else {
            fla_reference::SeqLens::Packed { cu_seqlens: self.cu_seqlens() }
        };
        reference::Shape { seqs, c: self.c }
    }
}

/// Inputs and incoming gradients as f64, already rounded to the types that the kernels read.
pub(crate) struct Problem {
    pub(crate) w: Vec<f64>,
    pub(crate) u: Vec<f64>,
    pub(crate) k: Vec<f64>,
    pub(crate) v: Vec<f64>,
    pub(crate) initial_state: Option<Vec<f64>>,
    pub(crate) d_o: Vec<f64>,
    pub(crate) d_final_state: Option<Vec<f64>>,
}

impl Problem {
    pub(crate) fn new<T: Storage>(case: &Case) -> Self {
        let shape = case.shape();
        let mut rng = Rng::new(11);
        let (n, c, len) = (shape.seqs.n(), shape.c, shape.token_len());
        let w: Vec<f64> = match case.decay {
            Decay::Spread => rng.uniform(c, -6.0, 1.5),
            Decay::Constant(w) => vec![w; c],
        };
        let u: Vec<f64> = rng.normal::<f64>(c, 0.5).iter().map(|u| u + case.bonus).collect();
        let rows = (len / c).max(1) as f64;
        let ramp = |i: usize| 160.0 * (i / c) as f64 / rows - 80.0;
        let k: Vec<f64> = match case.keys {
            Keys::Normal(deviation) => rng.normal(len, deviation),
            Keys::Extreme => (0..len).map(|_| if rng.unit() < 0.5 { 80.0 } else { -80.0 }).collect(),
            Keys::Rising => (0..len).map(ramp).collect(),
            Keys::Falling => (0..len).map(|i| -ramp(i)).collect(),
            Keys::Equal => vec![1.25; len],
            Keys::FirstLarge => (0..len).map(|i| if i < c { 8.0 } else { rng.gauss() - 4.0 }).collect(),
        };
        let random = |rng: &mut Rng, exponent: f64| {
            let mut state = Vec::with_capacity(3 * n * c);
            for _ in 0..n {
                state.extend(rng.normal::<f64>(c, 1.0));
                state.extend(rng.uniform::<f64>(c, 1.0, 2.0));
                state.extend(rng.normal::<f64>(c, 1.0).iter().map(|e| e + exponent));
            }
            state
        };
        let initial_state = match case.initial_state {
            Initial::Absent => None,
            Initial::Fresh => {
                Some((0..3 * n * c).map(|i| if i / c % 3 == 2 { -1e38 } else { 0.0 }).collect())
            }
            Initial::Random => Some(random(&mut rng, 0.0)),
            Initial::Heavy => Some(random(&mut rng, 30.0)),
        };
        let single = |x: &[f64]| round_to::<f32, f64>(x);
        Self {
            w: single(&w),
            u: single(&u),
            k: round_to::<T, f64>(&k),
            v: round_to::<T, f64>(&rng.normal::<f64>(len, 1.0)),
            initial_state: initial_state.map(|state: Vec<f64>| single(&state)),
            d_o: round_to::<T, f64>(&rng.normal::<f64>(len, 1.0)),
            d_final_state: case.final_state.then(|| single(&rng.normal::<f64>(3 * n * c, 1.0))),
        }
    }

    pub(crate) fn inputs(&self) -> reference::Inputs<'_, f64> {
        let Self { w, u, k, v, initial_state, .. } = self;
        reference::Inputs { w, u, k, v, initial_state: initial_state.as_deref() }
    }

    pub(crate) fn outputs(&self, case: &Case) -> reference::Outputs<f64> {
        reference::recurrent_fwd(&case.reference_shape(), &self.inputs(), &reference::Options::new())
    }

    pub(crate) fn grads(&self, case: &Case) -> reference::Grads<f64> {
        let dy = reference::OutputGrads { d_o: &self.d_o, d_final_state: self.d_final_state.as_deref() };
        reference::recurrent_bwd(&case.reference_shape(), &self.inputs(), &dy, &reference::Options::new())
    }

    /// How many times larger than dw the terms are whose difference it is: where one weight is nearly everything, an average
    /// does not depend on the decay. Measured by what the plain recurrence on the CPU loses in f32 beyond its own limit.
    pub(crate) fn cancellation_of_dw(&self, case: &Case, want: &reference::Grads<f64>) -> f64 {
        let narrow = |x: &[f64]| x.iter().map(|x| *x as f32).collect::<Vec<f32>>();
        let (w, u, k, v) = (narrow(&self.w), narrow(&self.u), narrow(&self.k), narrow(&self.v));
        let (d_o, initial_state) = (narrow(&self.d_o), self.initial_state.as_deref().map(narrow));
        let d_final_state = self.d_final_state.as_deref().map(narrow);
        let x = reference::Inputs { w: &w, u: &u, k: &k, v: &v, initial_state: initial_state.as_deref() };
        let dy = reference::OutputGrads { d_o: &d_o, d_final_state: d_final_state.as_deref() };
        let dx = reference::recurrent_bwd(&case.reference_shape(), &x, &dy, &reference::Options::new());
        let key = Key {
            backend: Backend::Reference,
            model: Model::Rwkv4,
            pass: Pass::RecurrentBwd,
            dtype: Dtype::F32,
            class: Class::GateGrad,
        };
        relative_rms_beyond(&dx.dw, &want.dw, 0.0) / limit(key).expect("the table has the row")
    }
}

pub(crate) fn to_device<T: Poison>(stream: &Arc<CudaStream>, name: &str, values: &[f64]) -> Guarded<T> {
    let values: Vec<T> = values.iter().map(|x| T::from_f32(*x as f32)).collect();
    Guarded::input(stream, name, &values)
}

pub(crate) fn widened<T: Poison>(x: &[T]) -> Vec<f64> {
    x.iter().map(|x| f64::from(x.to_f32())).collect()
}

fn dtype<T: Poison>() -> Dtype {
    match T::DTYPE {
        DType::F32 => Dtype::F32,
        DType::Bf16 => Dtype::Bf16,
        DType::F16 => Dtype::F16,
    }
}

/// What a tensor is judged as.
pub(crate) struct Judge {
    pub(crate) pass: Pass,
    pub(crate) name: &'static str,
    pub(crate) class: Class,
}

impl Judge {
    /// Whether the relative RMS error is within the limit, in every one of `groups` equal parts.
    pub(crate) fn within<T: Poison>(&self, groups: usize, got: &[f64], want: &[f64]) -> Result<(), String> {
        self.within_relieved::<T>(groups, got, want, 1.0)
    }

    /// The same for a tensor that is a difference of terms `cancellation` times as large.
    pub(crate) fn within_relieved<T: Poison>(
        &self,
        groups: usize,
        got: &[f64],
        want: &[f64],
        cancellation: f64,
    ) -> Result<(), String> {
        let Self { pass, name, class } = *self;
        let key = Key { backend: Backend::Gpu, model: Model::Rwkv4, pass, dtype: dtype::<T>(), class };
        let limit = limit(key).map_err(|error| error.to_string())?;
        // Beside a heavy state the gradients of tokens are among f16's smallest numbers, or under them.
        let slack = if T::DTYPE == DType::F16 { F16_SPACING } else { 0.0 };
        let error = if groups < 2 {
            relative_rms_beyond(got, want, slack)
        } else {
            worst_relative_rms(got, want, groups)
        };
        if relieved(error, cancellation) <= limit {
            return Ok(());
        }
        Err(format!("{name}: relative RMS {error:.2e} > {limit:.0e}, cancellation {cancellation:.1e}"))
    }
}

/// Bytes that are NaN as floats, with 256 more on either side.
pub(crate) struct Workspace {
    memory: CudaSlice<u8>,
}

impl Workspace {
    pub(crate) fn new(stream: &Arc<CudaStream>, bytes: usize) -> Self {
        Self { memory: stream.clone_htod(&vec![0xff_u8; bytes + 512]).expect("fits") }
    }

    /// The bytes in the middle.
    pub(crate) fn view_mut(&mut self) -> CudaViewMut<'_, u8> {
        let end = self.memory.len() - 256;
        self.memory.slice_mut(256..end)
    }

    /// Whether nothing around was written.
    pub(crate) fn check(&self) {
        let all = self.memory.stream().clone_dtoh(&self.memory).expect("copies");
        let (before, rest) = all.split_at(256);
        let after = &rest[rest.len() - 256..];
        assert!(
            before.iter().chain(after).all(|byte| *byte == 0xff),
            "the workspace was written out of bounds"
        );
    }
}

/// Small shapes of every kind. Heavy states are left to the table: with few tokens beside one, single numbers make up a
/// tensor, and the gradient of the decay vanishes by cancellation.
pub(crate) fn any_case() -> impl Strategy<Value = Case> {
    let c = prop_oneof![Just(40usize), Just(96), 16usize..=70];
    let t = prop_oneof![0usize..40, 100usize..300];
    let keys = prop_oneof![
        Just(Keys::Normal(1.0)),
        Just(Keys::Normal(5.0)),
        Just(Keys::Extreme),
        Just(Keys::Rising),
        Just(Keys::Equal)
    ];
    let decay = prop_oneof![Just(Decay::Spread), (-8.0..2.0f64).prop_map(Decay::Constant)];
    let initial = prop_oneof![Just(Initial::Absent), Just(Initial::Fresh), Just(Initial::Random)];
    (1usize..4, t, c, keys, decay, initial, any::<bool>()).prop_map(
        |(b, t, c, keys, decay, initial_state, final_state)| Case {
            name: "proptest",
            b,
            t,
            c,
            keys,
            decay,
            initial_state,
            final_state,
            ..BASE
        },
    )
}
