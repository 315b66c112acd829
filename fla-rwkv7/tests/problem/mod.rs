//! Cases, inputs and references that the tests of the chunk passes share.
#![allow(dead_code, reason = "every test uses its part")]

use fla_core::testing::Poison;
use fla_core::{DType, SeqLens, Shape};
use fla_reference::compare::{F16_SPACING, first_non_finite, relative_rms_beyond};
use fla_reference::inputs::{Gates, Rng, Storage, round_to};
use fla_reference::rwkv7::{self, FusedMulInputs, Inputs, Options, OutputGrads, Outputs};
use fla_reference::tolerance::{Backend, Class, Dtype, Key, Model, Pass, limit, limit_of_len, relieved};
use fla_rwkv7::{ChunkFwdOptions, Decay, SavedStates};

/// Which of the two forms of the low-rank part.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Form {
    /// Removal and replacement keys.
    Keys,
    /// The normalised key and its rate.
    KeyAndRate,
}

/// What is asked of the operator, apart from the numbers.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    pub(crate) name: &'static str,
    /// Lengths of packed sequences; dense when empty.
    pub(crate) packed: &'static [usize],
    pub(crate) b: usize,
    pub(crate) t: usize,
    pub(crate) d: usize,
    /// Log decays, when they are what is given.
    pub(crate) gates: Gates,
    pub(crate) states: bool,
    pub(crate) form: Form,
    pub(crate) decay: Decay,
}

const H: usize = 2;
pub(crate) const BASE: Case = Case {
    name: "33 tokens",
    packed: &[],
    b: 2,
    t: 33,
    d: 64,
    gates: Gates::Rwkv7,
    states: true,
    form: Form::Keys,
    decay: Decay::Log,
};
const FUSED: Case = Case { form: Form::KeyAndRate, ..BASE };
const LOGIT: Case = Case { decay: Decay::Logit, ..BASE };

pub(crate) const CASES: &[Case] = &[
    BASE,
    Case { name: "one token", t: 1, ..BASE },
    Case { name: "16 tokens", t: 16, ..BASE },
    Case { name: "300 tokens", t: 300, ..BASE },
    Case { name: "no states", t: 65, states: false, ..BASE },
    Case { name: "packed", packed: &[0, 17, 1, 0, 40], ..BASE },
    Case { name: "heads of 128", d: 128, ..BASE },
    Case { name: "heads of 48", d: 48, t: 65, ..BASE },
    Case { name: "a key and its rate", ..FUSED },
    Case { name: "a key and its rate, packed", packed: &[0, 17, 1, 0, 40], ..FUSED },
    Case { name: "a key and its rate, heads of 100", d: 100, ..FUSED },
    Case { name: "logits", ..LOGIT },
    Case { name: "logits, no states", states: false, ..LOGIT },
    Case { name: "a key and its rate, logits", form: Form::KeyAndRate, ..LOGIT },
    Case { name: "a key and its rate, logits, 300 tokens", form: Form::KeyAndRate, t: 300, ..LOGIT },
];

/// The model's decays, and those at both ends of its range, in both forms.
pub(crate) fn regimes() -> Vec<Case> {
    let gates = [Gates::Rwkv7, Gates::Constant(-0.6065), Gates::Constant(-0.2)];
    let forms = [Form::Keys, Form::KeyAndRate];
    let both = gates.iter().flat_map(|gates| forms.map(|form| (*gates, form)));
    both.map(|(gates, form)| Case { t: 70, gates, form, ..BASE }).collect()
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
        Shape { seqs, h: H, k: self.d, v: self.d }
    }

    fn reference_shape(&self) -> fla_reference::Shape {
        let seqs = if self.packed.is_empty() {
            fla_reference::SeqLens::Dense { b: self.b, t: self.t }
        } else {
            fla_reference::SeqLens::Packed { cu_seqlens: self.cu_seqlens() }
        };
        fla_reference::Shape { seqs, h: H, k: self.d, v: self.d }
    }

    pub(crate) fn options(&self, saved_states: SavedStates) -> ChunkFwdOptions {
        ChunkFwdOptions::new().with_decay(self.decay).with_saved_states(saved_states)
    }
}

/// Inputs and incoming gradients as f64, already rounded to the types that the kernels read.
pub(crate) struct Problem {
    /// r, w, k, v, a or kk, b or a, d_o.
    pub(crate) vectors: [Vec<f64>; 7],
    pub(crate) initial_state: Option<Vec<f64>>,
    pub(crate) d_final_state: Option<Vec<f64>>,
}

/// Classes of the gradients, in the order of [`Problem::grads`]: those of the vectors, and of the initial state.
pub(crate) const CLASSES: [Class; 7] =
    [Class::Grad, Class::GateGrad, Class::Grad, Class::Grad, Class::Grad, Class::Grad, Class::Grad];

impl Problem {
    pub(crate) fn new<T: Storage>(case: &Case) -> Self {
        let shape = case.shape();
        let mut rng = Rng::new(3);
        let (k_len, v_len) = (shape.k_len(), shape.v_len());
        let kk: Vec<f64> = rng.unit_rows(k_len / shape.k, shape.k);
        let rate: Vec<f64> = rng.uniform(k_len, 0.0, 1.0);
        let (x4, x5) = match case.form {
            Form::Keys => {
                (kk.iter().map(|x| -x).collect(), kk.iter().zip(&rate).map(|(x, r)| x * r).collect())
            }
            Form::KeyAndRate => (kk, rate),
        };
        let w = match case.decay {
            Decay::Log => rng.gates(k_len, case.gates),
            Decay::Logit => rng.normal(k_len, 2.0),
        };
        let vectors = [
            rng.normal(k_len, 1.0),
            w,
            rng.normal(k_len, 1.0),
            rng.normal(v_len, 1.0),
            x4,
            x5,
            rng.normal(v_len, 1.0),
        ]
        .map(|x: Vec<f64>| round_to::<T, f64>(&x));
        let mut state = || {
            let values = round_to::<f32, f64>(&rng.normal::<f64>(shape.state_len(), 1.0));
            case.states.then_some(values)
        };
        let (initial_state, d_final_state) = (state(), state());
        Self { vectors, initial_state, d_final_state }
    }

    fn log_decay(&self, case: &Case) -> Vec<f64> {
        match case.decay {
            Decay::Log => self.vectors[1].clone(),
            Decay::Logit => rwkv7::log_decay_fwd(&self.vectors[1]),
        }
    }

    pub(crate) fn outputs(&self, case: &Case) -> Outputs<f64> {
        let [r, _, k, v, x4, x5, _] = &self.vectors;
        let (shape, w, options) = (case.reference_shape(), self.log_decay(case), Options::new(1.0));
        let initial_state = self.initial_state.as_deref();
        match case.form {
            Form::Keys => {
                let x = Inputs { r, w: &w, k, v, a: x4, b: x5, initial_state };
                rwkv7::recurrent_fwd(&shape, &x, &options)
            }
            Form::KeyAndRate => {
                let x = FusedMulInputs { r, w: &w, k, v, kk: x4, a: x5, initial_state };
                rwkv7::fused_mul_recurrent_fwd(&shape, &x, &options)
            }
        }
    }

    /// The gradients, and how many times larger than that of the decay the terms are whose difference a chunk pass takes.
    pub(crate) fn grads(&self, case: &Case) -> ([Vec<f64>; 7], f64) {
        let [r, _, k, v, x4, x5, d_o] = &self.vectors;
        let (shape, w, options) = (case.reference_shape(), self.log_decay(case), Options::new(1.0));
        let initial_state = self.initial_state.as_deref();
        let dy = OutputGrads { d_o, d_final_state: self.d_final_state.as_deref() };
        let mut grads = match case.form {
            Form::Keys => {
                let x = Inputs { r, w: &w, k, v, a: x4, b: x5, initial_state };
                let dx = rwkv7::recurrent_bwd(&shape, &x, &dy, &options);
                [dx.dr, dx.dw, dx.dk, dx.dv, dx.da, dx.db, dx.d_initial_state]
            }
            Form::KeyAndRate => {
                let x = FusedMulInputs { r, w: &w, k, v, kk: x4, a: x5, initial_state };
                let dx = rwkv7::fused_mul_recurrent_bwd(&shape, &x, &dy, &options);
                [dx.dr, dx.dw, dx.dk, dx.dv, dx.dkk, dx.da, dx.d_initial_state]
            }
        };
        let squares = |x: &[f64], dx: &[f64]| x.iter().zip(dx).map(|(x, dx)| (x * dx).powi(2)).sum::<f64>();
        let terms: f64 = [(r, 0), (k, 2), (x4, 4), (x5, 5)].iter().map(|(x, i)| squares(x, &grads[*i])).sum();
        let size: f64 = grads[1].iter().map(|x| x * x).sum();
        let cancellation = if size == 0.0 { 1.0 } else { (terms / size).sqrt() };
        if case.decay == Decay::Logit {
            grads[1] = rwkv7::log_decay_bwd(&self.vectors[1], &grads[1]);
        }
        (grads, cancellation)
    }
}

pub(crate) fn narrowed<T: Poison>(values: &[f64]) -> Vec<T> {
    values.iter().map(|x| T::from_f32(*x as f32)).collect()
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
        self.within_relieved::<T>(got, want, 1.0)
    }

    /// The same for a tensor that is a difference of terms `cancellation` times as large.
    pub(crate) fn within_relieved<T: Poison>(
        &self,
        got: &[f64],
        want: &[f64],
        cancellation: f64,
    ) -> Result<(), String> {
        let Self { pass, name, class } = *self;
        if let Some(at) = first_non_finite(got) {
            return Err(format!("{name}: element {at} is {}", got[at]));
        }
        let dtype = match T::DTYPE {
            DType::F32 => Dtype::F32,
            DType::Bf16 => Dtype::Bf16,
            DType::F16 => Dtype::F16,
        };
        let key = Key { backend: Backend::Gpu, model: Model::Rwkv7, pass, dtype, class };
        let limit = limit_of_len(limit(key).map_err(|error| error.to_string())?, dtype, want.len());
        let slack = if dtype == Dtype::F16 { F16_SPACING } else { 0.0 };
        let error = relative_rms_beyond(got, want, slack);
        if relieved(error, cancellation) <= limit {
            return Ok(());
        }
        Err(format!("{name}: relative RMS {error:.2e} > {limit:.1e}, cancellation {cancellation:.1e}"))
    }
}
