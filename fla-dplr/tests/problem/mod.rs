//! Cases, inputs and references that the tests of the chunk passes share.
#![allow(dead_code, reason = "every test uses its part")]

use std::sync::Arc;

use fla_core::cudarc::driver::CudaStream;
use fla_core::testing::{Guarded, Poison};
use fla_core::{DType, SeqLens, Shape};
use fla_dplr::{ChunkFwdOptions, Decay, SavedStates, Transition};
use fla_reference::compare::{F16_SPACING, first_non_finite, relative_rms_beyond};
use fla_reference::dplr::{self, OutputGrads, Outputs};
use fla_reference::inputs::{Gates, REGIMES, Rng, Storage, round_to};
use fla_reference::rwkv7;
use fla_reference::tolerance::{
    Backend, Class, Dtype, Key, Model, Pass, limit, limit_of_alike_keys, limit_of_len, relieved,
};
use proptest::prelude::{Just, Strategy, any, prop_oneof};
use proptest::sample::select;

/// What is asked of the operator, apart from the numbers.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    pub(crate) name: &'static str,
    /// Lengths of packed sequences; dense when empty.
    pub(crate) packed: &'static [usize],
    pub(crate) b: usize,
    pub(crate) t: usize,
    pub(crate) h: usize,
    pub(crate) k: usize,
    pub(crate) v: usize,
    /// Log decays, when they are what is given.
    pub(crate) gates: Gates,
    pub(crate) keys: Keys,
    pub(crate) initial_state: bool,
    /// Whether the final state is wanted, and has a gradient.
    pub(crate) final_state: bool,
    pub(crate) transition: Transition,
    pub(crate) decay: Decay,
    pub(crate) scale: f64,
}

/// Keys of unit length, which are removed in part and written.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Keys {
    /// A key and a rate for every token.
    Random,
    /// The same key at every token, removed and replaced whole: the hardest case of a triangular inverse.
    Repeated,
    /// Keys that share their direction but for a tenth, with rates of 1.
    Similar,
}

pub(crate) const BASE: Case = Case {
    name: "",
    packed: &[],
    b: 2,
    t: 33,
    h: 3,
    k: 64,
    v: 64,
    gates: Gates::LogSigmoid,
    keys: Keys::Random,
    initial_state: true,
    final_state: true,
    transition: Transition::General,
    decay: Decay::Log,
    scale: 0.125,
};

const NO_STATES: Case = Case { initial_state: false, final_state: false, ..BASE };
const KEY_AND_RATE: Case = Case { transition: Transition::KeyAndRate, ..BASE };
const LOGIT: Case = Case { decay: Decay::Logit, ..BASE };

/// Lengths around chunks; packed sequences; heads around tiles and slices; every form and regime.
pub(crate) const CASES: &[Case] = &[
    Case { name: "one token", t: 1, ..BASE },
    Case { name: "one token, no states", t: 1, ..NO_STATES },
    Case { name: "no token", t: 0, ..BASE },
    Case { name: "no token, no initial state", t: 0, initial_state: false, ..BASE },
    Case { name: "no sequence", b: 0, ..BASE },
    Case { name: "15 tokens", t: 15, ..BASE },
    Case { name: "16 tokens", t: 16, ..BASE },
    Case { name: "16 tokens, no states", t: 16, ..NO_STATES },
    Case { name: "17 tokens", t: 17, ..BASE },
    Case { name: "31 tokens", t: 31, ..BASE },
    Case { name: "33 tokens", t: 33, ..BASE },
    Case { name: "64 tokens", t: 64, ..BASE },
    Case { name: "65 tokens, no initial state", t: 65, initial_state: false, ..BASE },
    Case { name: "100 tokens, no final state", t: 100, final_state: false, ..BASE },
    Case { name: "257 tokens", t: 257, ..BASE },
    Case { name: "1000 tokens, one head", b: 1, t: 1000, h: 1, gates: Gates::Rwkv7, ..BASE },
    Case { name: "many sequences", b: 150, t: 18, h: 2, k: 32, v: 32, ..BASE },
    Case { name: "many heads", b: 35, t: 40, h: 4, ..BASE },
    Case { name: "packed", packed: &[3, 17, 16, 70], ..BASE },
    Case { name: "packed with empty members", packed: &[0, 5, 0, 0, 1, 40, 0], ..BASE },
    Case { name: "packed, empty members, no states", packed: &[0, 5, 0], ..NO_STATES },
    Case { name: "packed, all of one token", packed: &[1, 1, 1, 1, 1], ..BASE },
    Case { name: "packed, one sequence without tokens", packed: &[0], ..BASE },
    Case { name: "packed, whole chunks", packed: &[16, 32, 16], ..BASE },
    Case { name: "packed, K = 60, V = 100", packed: &[7, 0, 33, 1], k: 60, v: 100, ..BASE },
    Case { name: "segments: one head", b: 1, t: 1500, h: 1, gates: Gates::Rwkv7, ..BASE },
    Case { name: "segments: no states", b: 2, t: 1031, h: 1, gates: Gates::Weak, ..NO_STATES },
    Case { name: "segments: packed", packed: &[0, 1100, 17, 0, 1041], h: 2, gates: Gates::Rwkv7, ..BASE },
    Case { name: "segments: strong and no decay", b: 1, t: 1100, h: 1, gates: Gates::Extreme, ..BASE },
    Case { name: "segments: K = 60, V = 100", b: 1, t: 1100, h: 1, k: 60, v: 100, ..BASE },
    Case { name: "segments: K = V = 128", b: 1, t: 1050, h: 1, k: 128, v: 128, gates: Gates::Rwkv7, ..BASE },
    Case { name: "segments: a key and its rate", b: 1, t: 1030, h: 2, gates: Gates::Rwkv7, ..KEY_AND_RATE },
    Case { name: "one head", h: 1, ..BASE },
    Case { name: "K = 64, V = 80: a slice's last tile has no channel", v: 80, ..BASE },
    Case { name: "K = 64, V = 128", k: 64, v: 128, ..BASE },
    Case { name: "K = 128, V = 64", k: 128, v: 64, ..BASE },
    Case { name: "K = V = 128", k: 128, v: 128, t: 50, ..BASE },
    Case { name: "K = V = 256", b: 1, h: 2, k: 256, v: 256, ..BASE },
    Case { name: "K = 256, V = 16", k: 256, v: 16, ..BASE },
    Case { name: "K = 16, V = 256", k: 16, v: 256, ..BASE },
    Case { name: "K = 60, V = 100", k: 60, v: 100, t: 40, ..BASE },
    Case { name: "K = 100, V = 60", k: 100, v: 60, ..BASE },
    Case { name: "K = 33, V = 65: rows that no vector access fits", k: 33, v: 65, ..BASE },
    Case { name: "K = 132, V = 17", k: 132, v: 17, ..BASE },
    Case { name: "K = 250, V = 150", b: 1, h: 2, k: 250, v: 150, ..BASE },
    Case { name: "K = V = 7", k: 7, v: 7, ..BASE },
    Case { name: "K = 8, V = 1", k: 8, v: 1, ..BASE },
    Case { name: "repeated keys, strength 1", t: 50, keys: Keys::Repeated, ..BASE },
    Case {
        name: "repeated keys, strength 1, no decay",
        t: 80,
        keys: Keys::Repeated,
        gates: Gates::Constant(0.0),
        ..BASE
    },
    Case { name: "similar keys, no decay", t: 80, keys: Keys::Similar, gates: Gates::Constant(0.0), ..BASE },
    Case { name: "similar keys, heads of 128", k: 128, v: 128, keys: Keys::Similar, ..BASE },
    Case { name: "a key and its rate", ..KEY_AND_RATE },
    Case {
        name: "a key and its rate, repeated, no decay",
        gates: Gates::Constant(0.0),
        keys: Keys::Repeated,
        ..KEY_AND_RATE
    },
    Case { name: "a key and its rate, K = 60, V = 100", k: 60, v: 100, ..KEY_AND_RATE },
    Case { name: "a key and its rate, K = V = 128", k: 128, v: 128, ..KEY_AND_RATE },
    Case { name: "a key and its rate, packed", packed: &[0, 19, 1], ..KEY_AND_RATE },
    Case { name: "logits", ..LOGIT },
    Case { name: "logits, one token", t: 1, ..LOGIT },
    Case { name: "logits, K = 33, V = 65", k: 33, v: 65, ..LOGIT },
    Case { name: "logits, K = V = 128", k: 128, v: 128, ..LOGIT },
    Case { name: "logits, a key and its rate", transition: Transition::KeyAndRate, ..LOGIT },
    Case { name: "scale 1, 300 tokens of RWKV-7", t: 300, gates: Gates::Rwkv7, scale: 1.0, ..BASE },
];

/// The regimes of decays that both passes have to survive, beside those of every pass.
pub(crate) const MORE_REGIMES: &[Gates] =
    &[Gates::Constant(-1e-3), Gates::Weak, Gates::Strong, Gates::Extreme];

/// Every regime, over whole and partial chunks.
pub(crate) fn regimes() -> Vec<Case> {
    let gates = REGIMES.iter().chain(MORE_REGIMES);
    gates.map(|gates| Case { t: 70, gates: *gates, ..BASE }).collect()
}

impl Case {
    fn cu_seqlens(&self) -> Vec<usize> {
        self.packed.iter().fold(vec![0], |mut offsets, len| {
            offsets.push(offsets[offsets.len() - 1] + len);
            offsets
        })
    }

    pub(crate) fn shape(&self) -> Shape {
        let seqs = if self.packed.is_empty() {
            SeqLens::dense(self.b, self.t)
        } else {
            SeqLens::packed(&self.cu_seqlens(), self.packed.iter().sum()).expect("valid lengths")
        };
        Shape { seqs, h: self.h, k: self.k, v: self.v }
    }

    fn reference_shape(&self) -> fla_reference::Shape {
        let seqs = if self.packed.is_empty() {
            fla_reference::SeqLens::Dense { b: self.b, t: self.t }
        } else {
            fla_reference::SeqLens::Packed { cu_seqlens: self.cu_seqlens() }
        };
        fla_reference::Shape { seqs, h: self.h, k: self.k, v: self.v }
    }

    pub(crate) fn options(&self, saved_states: SavedStates) -> ChunkFwdOptions {
        ChunkFwdOptions::new(self.scale as f32)
            .with_transition(self.transition)
            .with_decay(self.decay)
            .with_saved_states(saved_states)
    }
}

/// Inputs and incoming gradients as f64, already rounded to the types that the kernels read.
pub(crate) struct Problem {
    /// q, k, v, a, b, g, d_o.
    pub(crate) vectors: [Vec<f64>; 7],
    pub(crate) initial_state: Option<Vec<f64>>,
    pub(crate) d_final_state: Option<Vec<f64>>,
}

/// The names of the gradients, in the order of [`Problem::grads`].
pub(crate) const GRADS: [(&str, Class); 7] = [
    ("dq", Class::Grad),
    ("dk", Class::Grad),
    ("dv", Class::Grad),
    ("da", Class::Grad),
    ("db", Class::Grad),
    ("dg", Class::GateGrad),
    ("d_initial_state", Class::Grad),
];

impl Problem {
    pub(crate) fn new<T: Storage>(case: &Case) -> Self {
        let shape = case.shape();
        let mut rng = Rng::new(7);
        let (k_len, v_len, rows) = (shape.k_len(), shape.v_len(), shape.k_len() / shape.k);
        let keys = match case.keys {
            Keys::Random => rng.unit_rows(rows, shape.k),
            Keys::Repeated => rng.repeated_unit_rows(rows, shape.k),
            Keys::Similar => {
                let common: Vec<f64> = rng.repeated_unit_rows(rows, shape.k);
                let own: Vec<f64> = rng.unit_rows(rows, shape.k);
                common.iter().zip(own).map(|(common, own)| 0.995 * common + 0.0999 * own).collect()
            }
        };
        let rates: Vec<f64> =
            keys.iter().map(|_| if case.keys == Keys::Random { rng.unit() } else { 1.0 }).collect();
        let (a, b) = match case.transition {
            Transition::General => {
                (keys.iter().map(|k| -k).collect(), keys.iter().zip(&rates).map(|(k, r)| k * r).collect())
            }
            Transition::KeyAndRate => (keys.clone(), rates),
        };
        let g = match case.decay {
            Decay::Log => rng.gates(k_len, case.gates),
            Decay::Logit => rng.normal(k_len, 2.0),
        };
        let vectors = [rng.normal(k_len, 1.0), keys, rng.normal(v_len, 1.0), a, b, g, rng.normal(v_len, 1.0)]
            .map(|x: Vec<f64>| round_to::<T, f64>(&x));
        Self::with_vectors(case, vectors, &mut rng)
    }

    /// As [`fla_reference::tolerance::FLA_ERRORS`] were measured: keys are not those that are removed.
    pub(crate) fn beside_fla<T: Storage>(case: &Case) -> Self {
        let shape = case.shape();
        let mut rng = Rng::new(1);
        let (k_len, v_len) = (shape.k_len(), shape.v_len());
        let removed: Vec<f64> = rng.unit_rows(k_len / shape.k, shape.k);
        let replaced = removed.iter().map(|k| k * rng.unit()).collect();
        let removed = removed.iter().map(|k| -k).collect();
        let vectors = [
            rng.normal(k_len, 1.0),
            rng.normal(k_len, 1.0),
            rng.normal(v_len, 1.0),
            removed,
            replaced,
            rng.gates(k_len, case.gates),
            rng.normal(v_len, 1.0),
        ]
        .map(|x: Vec<f64>| round_to::<T, f64>(&x));
        Self::with_vectors(case, vectors, &mut rng)
    }

    fn with_vectors(case: &Case, vectors: [Vec<f64>; 7], rng: &mut Rng) -> Self {
        let len = case.shape().state_len();
        let mut state = |wanted: bool| {
            let values = round_to::<f32, f64>(&rng.normal::<f64>(len, 1.0));
            wanted.then_some(values)
        };
        let (initial_state, d_final_state) = (state(case.initial_state), state(case.final_state));
        Self { vectors, initial_state, d_final_state }
    }

    /// The log decays that `g` stands for.
    fn log_decay(&self, case: &Case) -> Vec<f64> {
        match case.decay {
            Decay::Log => self.vectors[5].clone(),
            Decay::Logit => rwkv7::log_decay_fwd(&self.vectors[5]),
        }
    }

    pub(crate) fn outputs(&self, case: &Case) -> Outputs<f64> {
        let [q, k, v, a, b, _, _] = &self.vectors;
        let (shape, g) = (case.reference_shape(), self.log_decay(case));
        let initial_state = self.initial_state.as_deref();
        match case.transition {
            Transition::General => {
                let x = dplr::Inputs { q, k, v, a, b, g: &g, initial_state };
                dplr::recurrent_fwd(&shape, &x, &dplr::Options::new(case.scale))
            }
            Transition::KeyAndRate => {
                let x = rwkv7::FusedMulInputs { r: q, w: &g, k, v, kk: a, a: b, initial_state };
                rwkv7::fused_mul_recurrent_fwd(&shape, &x, &rwkv7::Options::new(case.scale))
            }
        }
    }

    pub(crate) fn grads(&self, case: &Case) -> Grads {
        let [q, k, v, a, b, _, d_o] = &self.vectors;
        let (shape, g) = (case.reference_shape(), self.log_decay(case));
        let initial_state = self.initial_state.as_deref();
        let dy = OutputGrads { d_o, d_final_state: self.d_final_state.as_deref() };
        let [dq, dk, dv, da, db, dg, d_initial_state] = match case.transition {
            Transition::General => {
                let x = dplr::Inputs { q, k, v, a, b, g: &g, initial_state };
                let dx = dplr::recurrent_bwd(&shape, &x, &dy, &dplr::Options::new(case.scale));
                [dx.dq, dx.dk, dx.dv, dx.da, dx.db, dx.dg, dx.d_initial_state]
            }
            Transition::KeyAndRate => {
                let x = rwkv7::FusedMulInputs { r: q, w: &g, k, v, kk: a, a: b, initial_state };
                let options = rwkv7::Options::new(case.scale);
                let dx = rwkv7::fused_mul_recurrent_bwd(&shape, &x, &dy, &options);
                [dx.dr, dx.dk, dx.dv, dx.dkk, dx.da, dx.dw, dx.d_initial_state]
            }
        };
        let squares = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>();
        let product = |x: &[f64], dx: &[f64]| x.iter().zip(dx).map(|(x, dx)| x * dx).collect::<Vec<_>>();
        let terms: f64 =
            [(q, &dq), (k, &dk), (a, &da), (b, &db)].iter().map(|(x, dx)| squares(&product(x, dx))).sum();
        let size = squares(&dg);
        let cancellation = if size == 0.0 { 1.0 } else { (terms / size).sqrt() };
        let dg = match case.decay {
            Decay::Log => dg,
            Decay::Logit => rwkv7::log_decay_bwd(&self.vectors[5], &dg),
        };
        Grads { grads: [dq, dk, dv, da, db, dg, d_initial_state], cancellation }
    }
}

/// What the backward pass ought to return.
pub(crate) struct Grads {
    /// In the order of [`GRADS`].
    pub(crate) grads: [Vec<f64>; 7],
    /// How many times larger than the gradient of the decay the terms are whose difference a chunk pass takes.
    pub(crate) cancellation: f64,
}

pub(crate) fn to_device<T: Poison>(stream: &Arc<CudaStream>, name: &str, values: &[f64]) -> Guarded<T> {
    let values: Vec<T> = values.iter().map(|x| T::from_f32(*x as f32)).collect();
    Guarded::input(stream, name, &values)
}

pub(crate) fn widened<T: Poison>(x: &[T]) -> Vec<f64> {
    x.iter().map(|x| f64::from(x.to_f32())).collect()
}

pub(crate) fn dtype<T: Poison>() -> Dtype {
    match T::DTYPE {
        DType::F32 => Dtype::F32,
        DType::Bf16 => Dtype::Bf16,
        DType::F16 => Dtype::F16,
    }
}

/// What a tensor is judged as.
#[derive(Clone, Copy)]
pub(crate) struct Judge {
    pub(crate) keys: Keys,
    pub(crate) pass: Pass,
    pub(crate) name: &'static str,
    pub(crate) class: Class,
}

impl Judge {
    /// Whether the relative RMS error is within the limit.
    pub(crate) fn within<T: Poison>(&self, got: &[f64], want: &[f64]) -> Result<(), String> {
        self.within_relieved::<T>(got, want, 1.0)
    }

    /// The same for a tensor that is a difference of terms `cancellation` times as large.
    pub(crate) fn within_relieved<T: Poison>(
        &self,
        got: &[f64],
        want: &[f64],
        cancellation: f64,
    ) -> Result<(), String> {
        let Self { keys, pass, name, class } = *self;
        if let Some(at) = first_non_finite(got) {
            return Err(format!("{name}: element {at} is {}", got[at]));
        }
        let dtype = dtype::<T>();
        let key = Key { backend: Backend::Gpu, model: Model::Dplr, pass, dtype, class };
        let mut limit = limit_of_len(limit(key).map_err(|error| error.to_string())?, dtype, want.len());
        if keys != Keys::Random {
            limit = limit_of_alike_keys(limit, dtype);
        }
        let slack = if dtype == Dtype::F16 { F16_SPACING } else { 0.0 };
        let error = relative_rms_beyond(got, want, slack);
        if relieved(error, cancellation) <= limit {
            return Ok(());
        }
        Err(format!("{name}: relative RMS {error:.2e} > {limit:.1e}, cancellation {cancellation:.1e}"))
    }
}

/// Small shapes of every kind.
pub(crate) fn any_case() -> impl Strategy<Value = Case> {
    let width = prop_oneof![Just(64usize), Just(32), 8usize..=96];
    let t = prop_oneof![0usize..40, 60usize..150];
    let dims = (1usize..4, t, 1usize..4, width.clone(), width);
    let keys = select(&[Keys::Random, Keys::Random, Keys::Repeated, Keys::Similar][..]);
    let forms = (select(REGIMES), keys, any::<bool>(), any::<bool>());
    (dims, forms, any::<bool>(), any::<bool>()).prop_map(
        |((b, t, h, k, v), (gates, keys, rates, logits), initial_state, final_state)| Case {
            name: "proptest",
            b,
            t,
            h,
            k,
            v,
            gates,
            keys,
            initial_state,
            final_state,
            transition: if rates { Transition::KeyAndRate } else { Transition::General },
            decay: if logits { Decay::Logit } else { Decay::Log },
            ..BASE
        },
    )
}
