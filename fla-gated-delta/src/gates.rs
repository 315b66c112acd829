//! Where decays and write strengths come from: tensors of a call, and the forms that a plan is compiled for.

use fla_core::cudarc::driver::DevicePtr;
use fla_core::{Error, StateDims, check_len};

use crate::Shape;

/// Where the scalar log decay of a value head comes from.
#[derive(Clone, Copy, Default)]
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub enum Gate<'a, T> {
    /// No scalar decay.
    #[default]
    None,
    /// Log decay, natural base, at most 0: `[B, T, HV]`. In f32, since decays near 1 have logs near 0.
    Log(&'a dyn DevicePtr<f32>),
    /// Log decay `-exp(a_log) * softplus(g + dt_bias)`, formed inside, in f32.
    Raw {
        /// Logits: `[B, T, HV]`.
        g: &'a dyn DevicePtr<T>,
        /// Logarithm of the rate: `[HV]`.
        a_log: &'a dyn DevicePtr<f32>,
        /// Added to the logits; zero when absent: `[HV]`.
        dt_bias: Option<&'a dyn DevicePtr<f32>>,
    },
}

/// How strongly each token is written.
#[derive(Clone, Copy, Default)]
#[allow(missing_debug_implementations, reason = "device tensors have nothing to print")]
pub enum Beta<'a, T> {
    /// 1 everywhere.
    #[default]
    One,
    /// One strength per value head: `[B, T, HV]`.
    PerHead(&'a dyn DevicePtr<T>),
    /// One strength per value channel: `[B, T, HV, V]`.
    PerChannel(&'a dyn DevicePtr<T>),
}

/// Which [`Gate`] a plan is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GateForm {
    /// [`Gate::None`].
    None,
    /// [`Gate::Log`].
    Log,
    /// [`Gate::Raw`].
    Raw,
}

/// Which log decays for each channel a plan is for, beside the scalar one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChannelGates {
    /// None.
    None,
    /// `gk`, for each row of the state.
    Rows,
    /// `gv`, for each column of the state.
    Columns,
    /// Both.
    RowsAndColumns,
}

/// Which [`Beta`] a plan is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BetaForm {
    /// [`Beta::One`].
    One,
    /// [`Beta::PerHead`].
    PerHead,
    /// [`Beta::PerChannel`].
    PerChannel,
}

/// What is done to the write strength first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BetaMap {
    /// Nothing.
    AsGiven,
    /// `sigmoid(beta)`: strengths in (0, 1).
    Sigmoid,
    /// `2 sigmoid(beta)`: strengths in (0, 2), so the transition may have negative eigenvalues.
    TwiceSigmoid,
}

/// What is done to queries and keys first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkNorm {
    /// Nothing.
    AsGiven,
    /// Each is divided by `sqrt(sum x^2 + 1e-6)` over its head.
    L2,
}

/// How initial and final states, and gradients of both, lie in memory: the state of a head is a matrix, stored row by row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateLayout {
    /// A row for each key channel: `[N, HV, K, V]`.
    KeyMajor,
    /// A row for each value channel: `[N, HV, V, K]`.
    ValueMajor,
}

impl StateLayout {
    pub(crate) const fn dims(self) -> StateDims {
        match self {
            Self::KeyMajor => StateDims::ValueHeads,
            Self::ValueMajor => StateDims::ValueHeadsByColumn,
        }
    }
}

/// Everything of a plan that is compiled in, apart from sizes and types.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Forms {
    pub(crate) gate: GateForm,
    pub(crate) channel_gates: ChannelGates,
    pub(crate) beta: BetaForm,
    pub(crate) beta_map: BetaMap,
    pub(crate) qk_norm: QkNorm,
    pub(crate) state_layout: StateLayout,
}

impl Forms {
    pub(crate) fn is_value_major(&self) -> bool {
        self.state_layout == StateLayout::ValueMajor
    }

    pub(crate) fn rows(&self) -> bool {
        matches!(self.channel_gates, ChannelGates::Rows | ChannelGates::RowsAndColumns)
    }

    pub(crate) fn columns(&self) -> bool {
        matches!(self.channel_gates, ChannelGates::Columns | ChannelGates::RowsAndColumns)
    }

    /// Whether numbers of a head are taken as they are given, and nothing else is done.
    pub(crate) fn is_plain(&self) -> bool {
        self.gate != GateForm::Raw
            && self.channel_gates == ChannelGates::None
            && self.beta != BetaForm::PerChannel
            && self.beta_map == BetaMap::AsGiven
            && self.qk_norm == QkNorm::AsGiven
    }

    /// Checks that the forms fit each other.
    pub(crate) fn check(&self) -> Result<(), Error> {
        if self.beta == BetaForm::One && self.beta_map != BetaMap::AsGiven {
            let got = format!("{:?}", self.beta_map);
            return Err(Error::Option {
                option: "beta_map",
                wanted: "AsGiven where `beta` is 1 everywhere",
                got,
            });
        }
        Ok(())
    }
}

/// The tensors of a call that [`Forms`] speak of.
#[derive(Clone, Copy)]
pub(crate) struct GateTensors<'a, T> {
    pub(crate) g: Gate<'a, T>,
    pub(crate) gk: Option<&'a dyn DevicePtr<f32>>,
    pub(crate) gv: Option<&'a dyn DevicePtr<f32>>,
    pub(crate) beta: Beta<'a, T>,
}

impl<T> GateTensors<'_, T> {
    /// Checks that the tensors are those that the plan is for, and their lengths.
    pub(crate) fn check(&self, forms: &Forms, shape: &Shape) -> Result<(), Error> {
        let presence = |tensor, wanted| Err(Error::Presence { tensor, wanted });
        match (forms.gate, &self.g) {
            (GateForm::None, Gate::None) => {}
            (GateForm::Log, Gate::Log(g)) => check_len("g", "[B, T, HV]", shape.head_len(), g.len())?,
            (GateForm::Raw, Gate::Raw { g, a_log, dt_bias }) => {
                check_len("g", "[B, T, HV]", shape.head_len(), g.len())?;
                check_len("a_log", "[HV]", shape.hv, a_log.len())?;
                if let Some(dt_bias) = dt_bias {
                    check_len("dt_bias", "[HV]", shape.hv, dt_bias.len())?;
                }
            }
            (GateForm::None, _) => {
                return presence("g", "must be absent, since the plan is for no scalar decay");
            }
            (GateForm::Log, _) => {
                return presence("g", "must be `Gate::Log`, since the plan is for log decays");
            }
            (GateForm::Raw, _) => return presence("g", "must be `Gate::Raw`, since the plan is for logits"),
        }
        for (name, dims, tensor, wanted, len) in [
            ("gk", "[B, T, HV, K]", self.gk, forms.rows(), shape.k_len()),
            ("gv", "[B, T, HV, V]", self.gv, forms.columns(), shape.v_len()),
        ] {
            match (tensor, wanted) {
                (Some(tensor), true) => check_len(name, dims, len, tensor.len())?,
                (None, false) => {}
                (None, true) => return presence(name, "must be given, since the plan is for it"),
                (Some(_), false) => return presence(name, "must be absent, since the plan is not for it"),
            }
        }
        match (forms.beta, &self.beta) {
            (BetaForm::One, Beta::One) => Ok(()),
            (BetaForm::PerHead, Beta::PerHead(beta)) => {
                check_len("beta", "[B, T, HV]", shape.head_len(), beta.len())
            }
            (BetaForm::PerChannel, Beta::PerChannel(beta)) => {
                check_len("beta", "[B, T, HV, V]", shape.v_len(), beta.len())
            }
            (BetaForm::One, _) => presence("beta", "must be absent, since the plan is for strengths of 1"),
            (BetaForm::PerHead, _) => {
                presence("beta", "must be `Beta::PerHead`, since the plan is for a strength per value head")
            }
            (BetaForm::PerChannel, _) => presence(
                "beta",
                "must be `Beta::PerChannel`, since the plan is for a strength per value channel",
            ),
        }
    }
}
