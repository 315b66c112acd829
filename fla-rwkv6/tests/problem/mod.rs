//! Cases, inputs and references that the tests of the chunk passes share.
#![allow(dead_code, reason = "every test uses its part")]

use std::sync::Arc;

use fla_core::cudarc::driver::CudaStream;
use fla_core::testing::{Guarded, Poison};
use fla_core::{DType, SeqLens, Shape};
use fla_reference::compare::{F16_SPACING, first_non_finite, relative_rms_beyond};
use fla_reference::inputs::{Gates, REGIMES, Rng, Storage, round_to};
use fla_reference::rwkv6::{self, Grads, OutputGrads, Outputs};
use fla_reference::tolerance::{Backend, Class, Dtype, Key, Model, Pass, limit, limit_of_len};
use fla_rwkv6::{ChunkFwdOptions, SavedStates};
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
    pub(crate) decays: Decays,
    pub(crate) bonus: Bonus,
    pub(crate) initial_state: bool,
    /// Whether the final state is wanted, and has a gradient.
    pub(crate) final_state: bool,
    pub(crate) scale: f64,
}

/// Log decays.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Decays {
    Of(Gates),
    /// One in eight is infinite, and leaves nothing; the others are ordinary.
    Infinite,
}

/// What the current token gets.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Bonus {
    Normal,
    Zero,
}

pub(crate) const BASE: Case = Case {
    name: "",
    packed: &[],
    b: 2,
    t: 33,
    h: 3,
    k: 64,
    v: 64,
    decays: Decays::Of(Gates::LogSigmoid),
    bonus: Bonus::Normal,
    initial_state: true,
    final_state: true,
    scale: 0.125,
};

const NO_STATES: Case = Case { initial_state: false, final_state: false, ..BASE };

/// One head, whose sequences are cut into segments.
const LONG: Case = Case { b: 1, t: 1024, h: 1, ..BASE };

const LONG_NO_STATES: Case = Case { initial_state: false, final_state: false, ..LONG };

/// The widest K.
pub(crate) const MAX_K: usize = 256;

/// Lengths around chunks and segments; packed sequences; heads around tiles and slices; every regime is a case of its own.
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
    Case { name: "33 tokens, no bonus", bonus: Bonus::Zero, ..BASE },
    Case { name: "64 tokens", t: 64, ..BASE },
    Case { name: "65 tokens, no initial state", t: 65, initial_state: false, ..BASE },
    Case { name: "100 tokens, no final state", t: 100, final_state: false, ..BASE },
    Case { name: "240 tokens, one head: not cut", t: 240, ..LONG },
    Case { name: "256 tokens, one head: two segments", t: 256, ..LONG },
    Case { name: "1024 tokens, one head: whole segments", ..LONG },
    Case { name: "1000 tokens, one head, no states", t: 1000, ..LONG_NO_STATES },
    Case { name: "2500 tokens, two heads", t: 2500, h: 2, decays: Decays::Of(Gates::Rwkv7), ..LONG },
    Case { name: "700 tokens, K = V = 128", t: 700, k: 128, v: 128, ..LONG },
    Case { name: "700 tokens, K = 60, V = 200", t: 700, k: 60, v: 200, ..LONG },
    Case { name: "700 tokens, K = 33, V = 65", t: 700, k: 33, v: 65, ..LONG },
    Case { name: "700 tokens, K = V = 256", t: 700, k: 256, v: 256, ..LONG },
    Case { name: "700 tokens, K = 200, V = 100, no states", t: 700, k: 200, v: 100, ..LONG_NO_STATES },
    Case { name: "many tokens without decay", decays: Decays::Of(Gates::Constant(0.0)), ..LONG },
    Case { name: "many tokens, mixed decays", decays: Decays::Of(Gates::Mixed), ..LONG },
    Case { name: "many tokens, infinite decays", decays: Decays::Infinite, ..LONG },
    Case { name: "packed, long and short", packed: &[700, 0, 1, 300, 257, 17, 0], h: 1, ..BASE },
    Case { name: "packed, long and short, no states", packed: &[0, 300, 40, 600], h: 1, ..NO_STATES },
    Case { name: "many sequences", b: 150, t: 18, h: 2, k: 32, v: 32, ..BASE },
    Case { name: "packed", packed: &[3, 17, 16, 70], ..BASE },
    Case { name: "packed with empty members", packed: &[0, 5, 0, 0, 1, 40, 0], ..BASE },
    Case { name: "packed, empty members, no states", packed: &[0, 5, 0], ..NO_STATES },
    Case { name: "packed, all of one token", packed: &[1, 1, 1, 1, 1], ..BASE },
    Case { name: "packed, one sequence without tokens", packed: &[0], ..BASE },
    Case { name: "packed, whole chunks", packed: &[16, 32, 16], ..BASE },
    Case { name: "packed, K = 60, V = 100", packed: &[7, 0, 33, 1], k: 60, v: 100, ..BASE },
    Case { name: "packed, K = 200, V = 100", packed: &[7, 0, 33, 1, 0], k: 200, v: 100, ..BASE },
    Case {
        name: "packed, long and short, K = 130, V = 17",
        packed: &[0, 300, 1, 270],
        h: 1,
        k: 130,
        v: 17,
        ..BASE
    },
    Case { name: "one head", h: 1, ..BASE },
    Case { name: "K = 64, V = 128", k: 64, v: 128, ..BASE },
    Case { name: "K = 128, V = 64", k: 128, v: 64, ..BASE },
    Case { name: "K = V = 128", k: 128, v: 128, t: 50, ..BASE },
    Case { name: "K = 128, V = 256", b: 1, h: 2, k: 128, v: 256, ..BASE },
    Case { name: "K = 128, V = 16", k: 128, v: 16, ..BASE },
    Case { name: "K = 257: too wide", k: 257, ..BASE },
    Case { name: "K = V = 256, no token", t: 0, k: 256, v: 256, ..BASE },
    Case { name: "K = V = 256, one token, no states", t: 1, k: 256, v: 256, ..NO_STATES },
    Case {
        name: "K = V = 256, mixed decays",
        b: 1,
        t: 70,
        k: 256,
        v: 256,
        decays: Decays::Of(Gates::Mixed),
        ..BASE
    },
    Case { name: "K = V = 208: a slice's last tile has no channel", k: 208, v: 208, ..BASE },
    Case { name: "K = 129, V = 255", b: 1, h: 2, k: 129, v: 255, ..BASE },
    Case { name: "K = 64, V = 80", v: 80, ..BASE },
    Case { name: "K = 64, V = 144: a slice's last tile has no channel", v: 144, ..BASE },
    Case { name: "K = 16, V = 256", k: 16, v: 256, ..BASE },
    Case { name: "K = V = 16", k: 16, v: 16, ..BASE },
    Case { name: "K = 60, V = 100", k: 60, v: 100, t: 40, ..BASE },
    Case { name: "K = 100, V = 60", k: 100, v: 60, ..BASE },
    Case { name: "K = 33, V = 65: rows that no vector access fits", k: 33, v: 65, ..BASE },
    Case { name: "K = 113, V = 17", k: 113, v: 17, ..BASE },
    Case { name: "K = 120, V = 150", b: 1, h: 2, k: 120, v: 150, ..BASE },
    Case { name: "K = V = 7", k: 7, v: 7, ..BASE },
    Case { name: "K = 8, V = 1", k: 8, v: 1, ..BASE },
    Case { name: "scale 1, 300 tokens", t: 300, scale: 1.0, ..BASE },
];

/// Heads whose K is cut into slices.
pub(crate) fn wide_heads() -> Vec<Case> {
    let heads = [130, 160, 192, 200, 256].into_iter().flat_map(|k| [16, 64, 100, 256].map(|v| (k, v)));
    heads.map(|(k, v)| Case { k, v, t: 37, h: 2, ..BASE }).collect()
}

/// The regimes of decays that both passes have to survive, beside those of every pass: the widest leave 1000 nats in a chunk,
/// or in a token.
const MORE_REGIMES: &[Gates] = &[
    Gates::Constant(-1e-3),
    Gates::Constant(-62.5),
    Gates::Constant(-1000.0),
    Gates::Weak,
    Gates::Strong,
    Gates::Extreme,
];

/// Every regime, over whole and partial chunks, with and without a bonus.
pub(crate) fn regimes() -> Vec<Case> {
    let gates = REGIMES.iter().chain(MORE_REGIMES).map(|gates| Decays::Of(*gates)).chain([Decays::Infinite]);
    let with_bonus = gates.map(|decays| Case { t: 70, decays, ..BASE });
    let without = [-5.0, -20.0, -70.0].map(|g| Case {
        t: 70,
        decays: Decays::Of(Gates::Constant(g)),
        bonus: Bonus::Zero,
        ..BASE
    });
    with_bonus.chain(without).collect()
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
        ChunkFwdOptions::new(self.scale as f32).with_saved_states(saved_states)
    }
}

/// Inputs and incoming gradients as f64, already rounded to the types that the kernels read.
pub(crate) struct Problem {
    /// r, k, v, w, u, d_o.
    pub(crate) vectors: [Vec<f64>; 6],
    pub(crate) initial_state: Option<Vec<f64>>,
    pub(crate) d_final_state: Option<Vec<f64>>,
}

impl Problem {
    pub(crate) fn new<T: Storage>(case: &Case) -> Self {
        let shape = case.shape();
        let mut rng = Rng::new(7);
        let (k_len, v_len) = (shape.k_len(), shape.v_len());
        let w = match case.decays {
            Decays::Of(gates) => rng.gates::<f64>(k_len, gates),
            Decays::Infinite => {
                let mut w = rng.gates::<f64>(k_len, Gates::LogSigmoid);
                w.iter_mut().filter(|_| rng.bits().is_multiple_of(8)).for_each(|w| *w = f64::NEG_INFINITY);
                w
            }
        };
        let u = match case.bonus {
            Bonus::Normal => rng.normal(shape.h * shape.k, 1.0),
            Bonus::Zero => vec![0.0; shape.h * shape.k],
        };
        let vectors = [
            rng.normal(k_len, 1.0),
            rng.normal(k_len, 1.0),
            rng.normal(v_len, 1.0),
            w,
            u,
            rng.normal(v_len, 1.0),
        ]
        .map(|x: Vec<f64>| round_to::<T, f64>(&x));
        let mut state = |wanted: bool| {
            let values = round_to::<f32, f64>(&rng.normal::<f64>(shape.state_len(), 1.0));
            wanted.then_some(values)
        };
        let (initial_state, d_final_state) = (state(case.initial_state), state(case.final_state));
        Self { vectors, initial_state, d_final_state }
    }

    pub(crate) fn outputs(&self, case: &Case) -> Outputs<f64> {
        let [r, k, v, w, u, _] = &self.vectors;
        let x = rwkv6::Inputs { r, k, v, w, u, initial_state: self.initial_state.as_deref() };
        rwkv6::recurrent_fwd(&case.reference_shape(), &x, &rwkv6::Options::new(case.scale))
    }

    pub(crate) fn grads(&self, case: &Case) -> Grads<f64> {
        let [r, k, v, w, u, d_o] = &self.vectors;
        let x = rwkv6::Inputs { r, k, v, w, u, initial_state: self.initial_state.as_deref() };
        let dy = OutputGrads { d_o, d_final_state: self.d_final_state.as_deref() };
        rwkv6::recurrent_bwd(&case.reference_shape(), &x, &dy, &rwkv6::Options::new(case.scale))
    }
}

pub(crate) fn to_device<T: Poison>(stream: &Arc<CudaStream>, name: &str, values: &[f64]) -> Guarded<T> {
    let values: Vec<T> = values.iter().map(|x| T::from_f32(*x as f32)).collect();
    Guarded::input(stream, name, &values)
}

pub(crate) fn widened<T: Poison>(x: &[T]) -> Vec<f64> {
    x.iter().map(|x| f64::from(x.to_f32())).collect()
}

/// What a tensor is judged as.
#[derive(Clone, Copy)]
pub(crate) struct Judge {
    pub(crate) pass: Pass,
    pub(crate) name: &'static str,
    pub(crate) class: Class,
}

impl Judge {
    /// Whether the relative RMS error is within the limit.
    pub(crate) fn within<T: Poison>(&self, got: &[f64], want: &[f64]) -> Result<(), String> {
        let Self { pass, name, class } = *self;
        if let Some(at) = first_non_finite(got) {
            return Err(format!("{name}: element {at} is {}", got[at]));
        }
        let dtype = match T::DTYPE {
            DType::F32 => Dtype::F32,
            DType::Bf16 => Dtype::Bf16,
            DType::F16 => Dtype::F16,
        };
        let key = Key { backend: Backend::Gpu, model: Model::Rwkv6, pass, dtype, class };
        let limit = limit_of_len(limit(key).map_err(|error| error.to_string())?, dtype, want.len());
        let slack = if dtype == Dtype::F16 { F16_SPACING } else { 0.0 };
        let error = relative_rms_beyond(got, want, slack);
        if error <= limit {
            return Ok(());
        }
        Err(format!("{name}: relative RMS {error:.2e} > {limit:.1e}"))
    }
}

/// Small shapes of every kind; one head with many tokens is cut into segments.
pub(crate) fn any_case() -> impl Strategy<Value = Case> {
    let width = prop_oneof![3 => Just(64usize), 3 => Just(32), 3 => 8usize..=96, 1 => 97usize..=256];
    let lens = prop_oneof![
        (1usize..4, 0usize..40, 1usize..4),
        (1usize..4, 60usize..150, 1usize..4),
        (1usize..3, 256usize..700, 1usize..3),
    ];
    let decays = prop_oneof![8 => select(REGIMES).prop_map(Decays::Of), 1 => Just(Decays::Infinite)];
    (lens, width.clone(), width, decays, any::<bool>(), any::<bool>()).prop_map(
        |((b, t, h), k, v, decays, initial_state, final_state)| Case {
            name: "proptest",
            b,
            t,
            h,
            k,
            v,
            decays,
            initial_state,
            final_state,
            ..BASE
        },
    )
}
