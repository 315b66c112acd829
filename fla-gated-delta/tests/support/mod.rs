//! Cases of the gated delta rule for both directions: sizes, options and numbers.

use std::sync::Arc;

use fla_core::cudarc::driver::{CudaStream, DevicePtr};
use fla_core::testing::{Guarded, Poison};
use fla_core::{DType, SeqLens};
use fla_gated_delta::{
    Beta, BetaForm, BetaMap, ChannelGates, Gate, GateForm, QkNorm, RecurrentFwdInputs, RecurrentFwdOptions,
    Shape, StateLayout,
};
use fla_reference::gated_delta as reference;
use fla_reference::inputs::{Gates, REGIMES, Rng, Storage, round_to};
use fla_reference::tolerance::Dtype;
use proptest::prelude::{Just, Strategy, prop_oneof};

/// What is asked of the operator, apart from the numbers.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    pub(crate) name: &'static str,
    /// Lengths of packed sequences; dense when empty.
    pub(crate) packed: &'static [usize],
    pub(crate) b: usize,
    pub(crate) t: usize,
    pub(crate) h: usize,
    pub(crate) hv: usize,
    pub(crate) k: usize,
    pub(crate) v: usize,
    pub(crate) scale: f64,
    pub(crate) gates: Gates,
    pub(crate) keys: Keys,
    pub(crate) gate: GateForm,
    pub(crate) dt_bias: bool,
    pub(crate) channel_gates: ChannelGates,
    pub(crate) beta: BetaForm,
    pub(crate) beta_map: BetaMap,
    pub(crate) qk_norm: QkNorm,
    pub(crate) initial_state: bool,
    pub(crate) state_layout: StateLayout,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Keys {
    /// Unit keys, or of any length where they are normalised inside.
    Random,
    /// The same unit key at every token, written whole.
    Repeated,
}

pub(crate) const BASE: Case = Case {
    name: "",
    packed: &[],
    b: 2,
    t: 17,
    h: 3,
    hv: 3,
    k: 64,
    v: 64,
    scale: 0.125,
    gates: Gates::LogSigmoid,
    keys: Keys::Random,
    gate: GateForm::Log,
    dt_bias: true,
    channel_gates: ChannelGates::None,
    beta: BetaForm::PerHead,
    beta_map: BetaMap::AsGiven,
    qk_norm: QkNorm::AsGiven,
    initial_state: true,
    state_layout: StateLayout::KeyMajor,
};

/// What a layer of the model asks for.
pub(crate) const LAYER: Case =
    Case { gate: GateForm::Raw, beta_map: BetaMap::Sigmoid, qk_norm: QkNorm::L2, h: 2, hv: 6, ..BASE };

impl Case {
    pub(crate) fn shape(&self) -> Shape {
        let seqs = if self.packed.is_empty() {
            SeqLens::dense(self.b, self.t)
        } else {
            SeqLens::packed(&self.cu_seqlens(), self.packed.iter().sum()).expect("valid lengths")
        };
        Shape { seqs, h: self.h, hv: self.hv, k: self.k, v: self.v }
    }

    pub(crate) fn cu_seqlens(&self) -> Vec<usize> {
        self.packed.iter().fold(vec![0], |mut offsets, len| {
            offsets.push(offsets[offsets.len() - 1] + len);
            offsets
        })
    }

    pub(crate) fn reference_shape(&self) -> fla_reference::Shape {
        let seqs = if self.packed.is_empty() {
            fla_reference::SeqLens::Dense { b: self.b, t: self.t }
        } else {
            fla_reference::SeqLens::Packed { cu_seqlens: self.cu_seqlens() }
        };
        fla_reference::Shape { seqs, h: self.h, k: self.k, v: self.v }
    }

    pub(crate) fn reference_options(&self) -> reference::Options<f64> {
        reference::Options::new(self.hv, self.scale)
            .with_qk_norm(match self.qk_norm {
                QkNorm::AsGiven => reference::QkNorm::AsGiven,
                QkNorm::L2 => reference::QkNorm::L2,
            })
            .with_beta_map(match self.beta_map {
                BetaMap::AsGiven => reference::BetaMap::AsGiven,
                BetaMap::Sigmoid => reference::BetaMap::Sigmoid,
                BetaMap::TwiceSigmoid => reference::BetaMap::TwiceSigmoid,
            })
    }

    pub(crate) fn options(&self) -> RecurrentFwdOptions {
        RecurrentFwdOptions::new(self.scale as f32)
            .with_gate(self.gate)
            .with_channel_gates(self.channel_gates)
            .with_beta(self.beta)
            .with_beta_map(self.beta_map)
            .with_qk_norm(self.qk_norm)
            .with_state_layout(self.state_layout)
    }

    /// States [K, V] as the case has them in memory.
    pub(crate) fn stored<X: Copy>(&self, states: &[X]) -> Vec<X> {
        match self.state_layout {
            StateLayout::KeyMajor => states.to_vec(),
            StateLayout::ValueMajor => transposed(states, self.k, self.v),
        }
    }

    /// And from memory back to [K, V].
    pub(crate) fn loaded<X: Copy>(&self, states: &[X]) -> Vec<X> {
        match self.state_layout {
            StateLayout::KeyMajor => states.to_vec(),
            StateLayout::ValueMajor => transposed(states, self.v, self.k),
        }
    }
}

/// Each matrix `[rows, cols]` as `[cols, rows]`.
fn transposed<X: Copy>(matrices: &[X], rows: usize, cols: usize) -> Vec<X> {
    let columns = |matrix: &'_ [X]| -> Vec<X> {
        (0..cols).flat_map(|col| (0..rows).map(move |row| matrix[row * cols + col])).collect()
    };
    matrices.chunks_exact(rows * cols).flat_map(columns).collect()
}

/// Inputs as f64, already rounded to the type that the kernel reads. What the case does without is empty.
#[derive(Clone)]
pub(crate) struct Problem {
    pub(crate) q: Vec<f64>,
    pub(crate) k: Vec<f64>,
    pub(crate) v: Vec<f64>,
    pub(crate) g: Vec<f64>,
    pub(crate) a_log: Vec<f64>,
    pub(crate) dt_bias: Vec<f64>,
    pub(crate) gk: Vec<f64>,
    pub(crate) gv: Vec<f64>,
    pub(crate) beta: Vec<f64>,
    pub(crate) initial_state: Option<Vec<f64>>,
}

impl Problem {
    pub(crate) fn new<T: Storage, S: Storage>(case: &Case) -> Self {
        let shape = case.shape();
        let mut rng = Rng::new(7);
        let f32s = |x: Vec<f64>| round_to::<f32, f64>(&x);
        let qk = |rng: &mut Rng, deviation| round_to::<T, f64>(&rng.normal::<f64>(shape.qk_len(), deviation));
        let (rows, gates) = (shape.qk_len() / shape.k, case.gates);
        let k = match (case.keys, case.qk_norm) {
            (Keys::Repeated, _) => round_to::<T, f64>(&rng.repeated_unit_rows::<f64>(rows, shape.k)),
            (Keys::Random, QkNorm::L2) => qk(&mut rng, 0.7),
            (Keys::Random, QkNorm::AsGiven) => round_to::<T, f64>(&rng.unit_rows::<f64>(rows, shape.k)),
        };
        let g = match case.gate {
            GateForm::None => Vec::new(),
            GateForm::Log => f32s(rng.gates(shape.head_len(), gates)),
            GateForm::Raw => round_to::<T, f64>(&rng.normal::<f64>(shape.head_len(), 2.0)),
        };
        let (mut a_log, mut dt_bias) = (Vec::new(), Vec::new());
        if case.gate == GateForm::Raw {
            a_log = f32s(rng.uniform(case.hv, -2.0, 1.0));
            if case.dt_bias {
                dt_bias = f32s(rng.uniform(case.hv, -4.0, 1.0));
            }
        }
        let given =
            |wanted: ChannelGates| [wanted, ChannelGates::RowsAndColumns].contains(&case.channel_gates);
        let mut channels = |wanted, len| if given(wanted) { f32s(rng.gates(len, gates)) } else { Vec::new() };
        let gk = channels(ChannelGates::Rows, shape.k_len());
        let gv = channels(ChannelGates::Columns, shape.v_len());
        let beta_len = match case.beta {
            BetaForm::One => 0,
            BetaForm::PerHead => shape.head_len(),
            BetaForm::PerChannel => shape.v_len(),
        };
        let beta = match (case.keys, case.beta_map) {
            (Keys::Repeated, _) => vec![1.0; beta_len],
            (Keys::Random, BetaMap::AsGiven) => rng.uniform(beta_len, 0.0, 1.0),
            (Keys::Random, BetaMap::Sigmoid | BetaMap::TwiceSigmoid) => rng.normal(beta_len, 2.0),
        };
        Self {
            q: qk(&mut rng, 1.0),
            k,
            v: round_to::<T, f64>(&rng.normal::<f64>(shape.v_len(), 1.0)),
            g,
            a_log,
            dt_bias,
            gk,
            gv,
            beta: round_to::<T, f64>(&beta),
            initial_state: case
                .initial_state
                .then(|| round_to::<S, f64>(&rng.normal::<f64>(shape.state_len(), 1.0))),
        }
    }

    /// The problem as the reference takes it.
    pub(crate) fn inputs(&self, case: &Case) -> reference::Inputs<'_, f64> {
        let given = |x: &'_ [f64]| !x.is_empty();
        reference::Inputs {
            q: &self.q,
            k: &self.k,
            v: &self.v,
            g: match case.gate {
                GateForm::None => reference::Gate::None,
                GateForm::Log => reference::Gate::Log(&self.g),
                GateForm::Raw => reference::Gate::Raw {
                    g: &self.g,
                    a_log: &self.a_log,
                    dt_bias: given(&self.dt_bias).then_some(&self.dt_bias),
                },
            },
            gk: matches!(case.channel_gates, ChannelGates::Rows | ChannelGates::RowsAndColumns)
                .then_some(&self.gk[..]),
            gv: matches!(case.channel_gates, ChannelGates::Columns | ChannelGates::RowsAndColumns)
                .then_some(&self.gv[..]),
            beta: match case.beta {
                BetaForm::One => reference::Beta::One,
                BetaForm::PerHead => reference::Beta::PerHead(&self.beta),
                BetaForm::PerChannel => reference::Beta::PerChannel(&self.beta),
            },
            initial_state: self.initial_state.as_deref(),
        }
    }
}

/// The inputs of a problem on the device, in guarded memory.
pub(crate) struct Tensors<T: Poison, S: Poison> {
    pub(crate) q: Guarded<T>,
    pub(crate) k: Guarded<T>,
    pub(crate) v: Guarded<T>,
    pub(crate) g: Guarded<f32>,
    pub(crate) logits: Guarded<T>,
    pub(crate) a_log: Guarded<f32>,
    pub(crate) dt_bias: Guarded<f32>,
    pub(crate) gk: Guarded<f32>,
    pub(crate) gv: Guarded<f32>,
    pub(crate) beta: Guarded<T>,
    pub(crate) initial_state: Option<Guarded<S>>,
}

pub(crate) fn to_device<T: Poison>(stream: &Arc<CudaStream>, name: &str, values: &[f64]) -> Guarded<T> {
    let values: Vec<T> = values.iter().map(|x| T::from_f32(*x as f32)).collect();
    Guarded::input(stream, name, &values)
}

impl<T: Poison, S: Poison> Tensors<T, S> {
    pub(crate) fn new(stream: &Arc<CudaStream>, case: &Case, problem: &Problem) -> Self {
        let is_raw = case.gate == GateForm::Raw;
        let (g, logits): (&[f64], &[f64]) = if is_raw { (&[], &problem.g) } else { (&problem.g, &[]) };
        Self {
            q: to_device(stream, "q", &problem.q),
            k: to_device(stream, "k", &problem.k),
            v: to_device(stream, "v", &problem.v),
            g: to_device(stream, "g", g),
            logits: to_device(stream, "g", logits),
            a_log: to_device(stream, "a_log", &problem.a_log),
            dt_bias: to_device(stream, "dt_bias", &problem.dt_bias),
            gk: to_device(stream, "gk", &problem.gk),
            gv: to_device(stream, "gv", &problem.gv),
            beta: to_device(stream, "beta", &problem.beta),
            initial_state: problem
                .initial_state
                .as_ref()
                .map(|s| to_device(stream, "initial_state", &case.stored(s))),
        }
    }

    /// Calls `run` with the inputs, without the initial state.
    pub(crate) fn with<R>(&self, case: &Case, run: impl FnOnce(RecurrentFwdInputs<'_, T, S>) -> R) -> R {
        let (q, k, v) = (self.q.view(), self.k.view(), self.v.view());
        let (g, logits, beta) = (self.g.view(), self.logits.view(), self.beta.view());
        let (a_log, dt_bias) = (self.a_log.view(), self.dt_bias.view());
        let (gk, gv) = (self.gk.view(), self.gv.view());
        let (rows, columns) = match case.channel_gates {
            ChannelGates::None => (false, false),
            ChannelGates::Rows => (true, false),
            ChannelGates::Columns => (false, true),
            ChannelGates::RowsAndColumns => (true, true),
        };
        run(RecurrentFwdInputs {
            q: &q,
            k: &k,
            v: &v,
            g: match case.gate {
                GateForm::None => Gate::None,
                GateForm::Log => Gate::Log(&g),
                GateForm::Raw => Gate::Raw {
                    g: &logits,
                    a_log: &a_log,
                    dt_bias: case.dt_bias.then_some(&dt_bias as &dyn DevicePtr<f32>),
                },
            },
            gk: rows.then_some(&gk as &dyn DevicePtr<f32>),
            gv: columns.then_some(&gv as &dyn DevicePtr<f32>),
            beta: match case.beta {
                BetaForm::One => Beta::One,
                BetaForm::PerHead => Beta::PerHead(&beta),
                BetaForm::PerChannel => Beta::PerChannel(&beta),
            },
            initial_state: None,
            cu_seqlens: None,
        })
    }
}

pub(crate) fn dtype<T: Poison>() -> Dtype {
    match T::DTYPE {
        DType::F32 => Dtype::F32,
        DType::Bf16 => Dtype::Bf16,
        DType::F16 => Dtype::F16,
    }
}

pub(crate) fn any_case() -> impl Strategy<Value = Case> {
    let width = prop_oneof![Just(64usize), Just(32), 1usize..=96];
    let gate = prop_oneof![Just(GateForm::None), Just(GateForm::Log), Just(GateForm::Raw)];
    let channel_gates = prop_oneof![
        Just(ChannelGates::None),
        Just(ChannelGates::Rows),
        Just(ChannelGates::Columns),
        Just(ChannelGates::RowsAndColumns)
    ];
    let beta = prop_oneof![
        Just((BetaForm::One, BetaMap::AsGiven)),
        Just((BetaForm::PerHead, BetaMap::AsGiven)),
        Just((BetaForm::PerHead, BetaMap::TwiceSigmoid)),
        Just((BetaForm::PerChannel, BetaMap::Sigmoid))
    ];
    let qk_norm = prop_oneof![Just(QkNorm::AsGiven), Just(QkNorm::L2)];
    let sizes = (1usize..4, 0usize..40, 1usize..4, 1usize..4, width.clone(), width);
    let state_layout = prop_oneof![Just(StateLayout::KeyMajor), Just(StateLayout::ValueMajor)];
    let forms = (gate, channel_gates, beta, qk_norm, state_layout);
    (sizes, forms, 0..REGIMES.len(), proptest::bool::ANY).prop_map(|(sizes, forms, regime, flag)| {
        let (b, t, h, group, k, v) = sizes;
        let (gate, channel_gates, (beta, beta_map), qk_norm, state_layout) = forms;
        // A norm of one channel leaves nothing but its epsilon of a gradient, which f32 cannot resolve.
        let qk_norm = if k == 1 { QkNorm::AsGiven } else { qk_norm };
        Case {
            name: "proptest",
            b,
            t,
            h,
            hv: h * group,
            k,
            v,
            gate,
            dt_bias: flag,
            channel_gates,
            beta,
            beta_map,
            qk_norm,
            gates: REGIMES[regime],
            initial_state: flag,
            state_layout,
            ..BASE
        }
    })
}
