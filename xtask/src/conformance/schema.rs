//! Which operators a conformance file can name, and which tensors and metadata each of them has.

use fla_reference::tolerance::Model;

/// A form in which an operator can be computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// Token by token.
    Recurrent,
    /// Chunk by chunk.
    Chunk,
    /// The only form of an operator that has just one.
    Single,
}

impl Form {
    /// The name in the report.
    pub(super) fn name(self) -> &'static str {
        match self {
            Form::Recurrent => "recurrent",
            Form::Chunk => "chunk",
            Form::Single => "single",
        }
    }
}

/// The operators, by what computes them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Op {
    GatedDelta,
    Dplr,
    Rwkv7,
    FusedMul,
    Rwkv6,
    Rwkv4,
    Addcmul,
    KUpdate,
    GateOutputCorrection,
    ChannelMixing,
    TokenShift,
}

/// What a tensor is to its operator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// An input in the number format under test.
    Vector,
    /// An input that stays in f32 whatever the number format: a state, or the gradient of one.
    State,
    /// An expected output.
    Output,
    /// An expected state after the last token.
    FinalState,
    /// An expected gradient that is a sum of products.
    Grad,
    /// An expected gradient of a decay.
    GateGrad,
}

impl Role {
    /// Whether the file gives the tensor to the operator, rather than expecting it back.
    pub(super) fn is_input(self) -> bool {
        matches!(self, Role::Vector | Role::State)
    }

    /// Whether the backward pass computes it.
    pub(super) fn is_gradient(self) -> bool {
        matches!(self, Role::Grad | Role::GateGrad)
    }
}

/// When a file holds a tensor.
#[derive(Clone, Copy, Debug)]
pub(super) enum Presence {
    /// In every file.
    Always,
    /// Where the file likes.
    Optional,
    /// Exactly where another tensor is.
    With(&'static str),
    /// Exactly where the metadata key says `true`.
    Flag(&'static str),
}

/// One tensor of an operator.
#[derive(Clone, Copy, Debug)]
pub(super) struct TensorSpec {
    /// The name in the file.
    pub(super) name: &'static str,
    /// Dimensions, separated by blanks; each is a product of letters and numbers.
    pub(super) shape: &'static str,
    /// What it is.
    pub(super) role: Role,
    /// When it is there.
    pub(super) presence: Presence,
}

/// One operator.
#[derive(Debug)]
pub(super) struct Operator {
    /// The value of the metadata key `op`.
    pub(super) name: &'static str,
    /// What computes it.
    pub(super) op: Op,
    /// Whose row of the tolerance table holds.
    pub(super) model: Model,
    /// The forms that the mathematics has.
    pub(super) forms: &'static [Form],
    /// Dimensions that the metadata gives.
    pub(super) dims: &'static [&'static str],
    /// Metadata keys besides the dimensions, and how their values read.
    pub(super) options: &'static [OptionKey],
    /// Inputs first, then expected outputs, then expected gradients.
    pub(super) tensors: &'static [TensorSpec],
}

/// A metadata key that is not a dimension.
#[derive(Clone, Copy, Debug)]
pub(super) enum OptionKey {
    /// A decimal number.
    Number(&'static str),
    /// `true` or `false`.
    Flag(&'static str),
}

/// The operator of that name.
pub(super) fn find(name: &str) -> Option<&'static Operator> {
    OPERATORS.iter().find(|operator| operator.name == name)
}

const fn spec(name: &'static str, shape: &'static str, role: Role) -> TensorSpec {
    TensorSpec { name, shape, role, presence: Presence::Always }
}

const fn spec_if(name: &'static str, shape: &'static str, role: Role, presence: Presence) -> TensorSpec {
    TensorSpec { name, shape, role, presence }
}

const BOTH: &[Form] = &[Form::Recurrent, Form::Chunk];
const SINGLE: &[Form] = &[Form::Single];
const SCALE: &[OptionKey] = &[OptionKey::Number("scale")];

/// Every operator that a file can name.
pub(super) const OPERATORS: &[Operator] = &[
    Operator {
        name: "gated_delta",
        op: Op::GatedDelta,
        model: Model::GatedDelta,
        forms: BOTH,
        dims: &["B", "T", "H", "HV", "K", "V"],
        options: &[
            OptionKey::Number("scale"),
            OptionKey::Flag("qk_l2norm"),
            OptionKey::Flag("beta_sigmoid"),
            OptionKey::Flag("allow_neg_eigval"),
            OptionKey::Flag("gate_in_kernel"),
        ],
        tensors: &[
            spec("q", "B T H K", Role::Vector),
            spec("k", "B T H K", Role::Vector),
            spec("v", "B T HV V", Role::Vector),
            spec("g", "B T HV", Role::Vector),
            spec("beta", "B T HV", Role::Vector),
            spec_if("A_log", "HV", Role::Vector, Presence::Flag("gate_in_kernel")),
            spec_if("dt_bias", "HV", Role::Vector, Presence::Optional),
            spec_if("initial_state", "N HV K V", Role::State, Presence::Optional),
            spec("do", "B T HV V", Role::Vector),
            spec_if("d_final_state", "N HV K V", Role::State, Presence::Optional),
            spec("o", "B T HV V", Role::Output),
            spec("final_state", "N HV K V", Role::FinalState),
            spec("dq", "B T H K", Role::Grad),
            spec("dk", "B T H K", Role::Grad),
            spec("dv", "B T HV V", Role::Grad),
            spec("dg", "B T HV", Role::GateGrad),
            spec("dbeta", "B T HV", Role::Grad),
            spec_if("dA_log", "HV", Role::GateGrad, Presence::With("A_log")),
            spec_if("ddt_bias", "HV", Role::GateGrad, Presence::With("dt_bias")),
            spec_if("d_initial_state", "N HV K V", Role::Grad, Presence::With("initial_state")),
        ],
    },
    Operator {
        name: "dplr",
        op: Op::Dplr,
        model: Model::Dplr,
        forms: BOTH,
        dims: &["B", "T", "H", "K", "V"],
        options: SCALE,
        tensors: &[
            spec("q", "B T H K", Role::Vector),
            spec("k", "B T H K", Role::Vector),
            spec("v", "B T H V", Role::Vector),
            spec("a", "B T H K", Role::Vector),
            spec("b", "B T H K", Role::Vector),
            spec("gk", "B T H K", Role::Vector),
            spec_if("initial_state", "N H K V", Role::State, Presence::Optional),
            spec("do", "B T H V", Role::Vector),
            spec_if("d_final_state", "N H K V", Role::State, Presence::Optional),
            spec("o", "B T H V", Role::Output),
            spec("final_state", "N H K V", Role::FinalState),
            spec("dq", "B T H K", Role::Grad),
            spec("dk", "B T H K", Role::Grad),
            spec("dv", "B T H V", Role::Grad),
            spec("da", "B T H K", Role::Grad),
            spec("db", "B T H K", Role::Grad),
            spec("dgk", "B T H K", Role::GateGrad),
            spec_if("d_initial_state", "N H K V", Role::Grad, Presence::With("initial_state")),
        ],
    },
    Operator {
        name: "rwkv7",
        op: Op::Rwkv7,
        model: Model::Rwkv7,
        forms: BOTH,
        dims: &["B", "T", "H", "K", "V"],
        options: SCALE,
        tensors: &[
            spec("r", "B T H K", Role::Vector),
            spec("w", "B T H K", Role::Vector),
            spec("k", "B T H K", Role::Vector),
            spec("v", "B T H V", Role::Vector),
            spec("a", "B T H K", Role::Vector),
            spec("b", "B T H K", Role::Vector),
            spec_if("initial_state", "N H K V", Role::State, Presence::Optional),
            spec("do", "B T H V", Role::Vector),
            spec_if("d_final_state", "N H K V", Role::State, Presence::Optional),
            spec("o", "B T H V", Role::Output),
            spec("final_state", "N H K V", Role::FinalState),
            spec("dr", "B T H K", Role::Grad),
            spec("dw", "B T H K", Role::GateGrad),
            spec("dk", "B T H K", Role::Grad),
            spec("dv", "B T H V", Role::Grad),
            spec("da", "B T H K", Role::Grad),
            spec("db", "B T H K", Role::Grad),
            spec_if("d_initial_state", "N H K V", Role::Grad, Presence::With("initial_state")),
        ],
    },
    Operator {
        name: "rwkv7_fused_mul",
        op: Op::FusedMul,
        model: Model::Rwkv7,
        forms: BOTH,
        dims: &["B", "T", "H", "K", "V"],
        options: SCALE,
        tensors: &[
            spec("r", "B T H K", Role::Vector),
            spec("w", "B T H K", Role::Vector),
            spec("k", "B T H K", Role::Vector),
            spec("v", "B T H V", Role::Vector),
            spec("kk", "B T H K", Role::Vector),
            spec("a", "B T H K", Role::Vector),
            spec_if("initial_state", "N H K V", Role::State, Presence::Optional),
            spec("do", "B T H V", Role::Vector),
            spec_if("d_final_state", "N H K V", Role::State, Presence::Optional),
            spec("o", "B T H V", Role::Output),
            spec("final_state", "N H K V", Role::FinalState),
            spec("dr", "B T H K", Role::Grad),
            spec("dw", "B T H K", Role::GateGrad),
            spec("dk", "B T H K", Role::Grad),
            spec("dv", "B T H V", Role::Grad),
            spec("dkk", "B T H K", Role::Grad),
            spec("da", "B T H K", Role::Grad),
            spec_if("d_initial_state", "N H K V", Role::Grad, Presence::With("initial_state")),
        ],
    },
    Operator {
        name: "rwkv6",
        op: Op::Rwkv6,
        model: Model::Rwkv6,
        forms: BOTH,
        dims: &["B", "T", "H", "K", "V"],
        options: SCALE,
        tensors: &[
            spec("r", "B T H K", Role::Vector),
            spec("k", "B T H K", Role::Vector),
            spec("v", "B T H V", Role::Vector),
            spec("w", "B T H K", Role::Vector),
            spec("u", "H K", Role::Vector),
            spec_if("initial_state", "N H K V", Role::State, Presence::Optional),
            spec("do", "B T H V", Role::Vector),
            spec_if("d_final_state", "N H K V", Role::State, Presence::Optional),
            spec("o", "B T H V", Role::Output),
            spec("final_state", "N H K V", Role::FinalState),
            spec("dr", "B T H K", Role::Grad),
            spec("dk", "B T H K", Role::Grad),
            spec("dv", "B T H V", Role::Grad),
            spec("dw", "B T H K", Role::GateGrad),
            spec("du", "H K", Role::Grad),
            spec_if("d_initial_state", "N H K V", Role::Grad, Presence::With("initial_state")),
        ],
    },
    Operator {
        name: "rwkv4",
        op: Op::Rwkv4,
        model: Model::Rwkv4,
        forms: BOTH,
        dims: &["B", "T", "C"],
        options: &[],
        tensors: &[
            spec("w", "C", Role::Vector),
            spec("u", "C", Role::Vector),
            spec("k", "B T C", Role::Vector),
            spec("v", "B T C", Role::Vector),
            spec("state", "N 3 1 C", Role::State),
            spec("do", "B T C", Role::Vector),
            spec_if("d_final_state", "N 3 1 C", Role::State, Presence::Optional),
            spec("o", "B T C", Role::Output),
            spec("final_state", "N 3 1 C", Role::FinalState),
            spec("dw", "C", Role::GateGrad),
            spec("du", "C", Role::Grad),
            spec("dk", "B T C", Role::Grad),
            spec("dv", "B T C", Role::Grad),
            spec("dstate", "N 3 1 C", Role::Grad),
        ],
    },
    Operator {
        name: "rwkv7_addcmul",
        op: Op::Addcmul,
        model: Model::Rwkv7,
        forms: SINGLE,
        dims: &["B", "T", "D"],
        options: &[OptionKey::Flag("use_xg")],
        tensors: &[
            spec("hidden", "B T D", Role::Vector),
            spec("delta", "B T D", Role::Vector),
            spec("xr", "D", Role::Vector),
            spec("xw", "D", Role::Vector),
            spec("xk", "D", Role::Vector),
            spec("xv", "D", Role::Vector),
            spec("xa", "D", Role::Vector),
            spec_if("xg", "D", Role::Vector, Presence::Flag("use_xg")),
            spec("dout_r", "B T D", Role::Vector),
            spec("dout_w", "B T D", Role::Vector),
            spec("dout_k", "B T D", Role::Vector),
            spec("dout_v", "B T D", Role::Vector),
            spec("dout_a", "B T D", Role::Vector),
            spec_if("dout_g", "B T D", Role::Vector, Presence::With("xg")),
            spec("out_r", "B T D", Role::Output),
            spec("out_w", "B T D", Role::Output),
            spec("out_k", "B T D", Role::Output),
            spec("out_v", "B T D", Role::Output),
            spec("out_a", "B T D", Role::Output),
            spec_if("out_g", "B T D", Role::Output, Presence::With("xg")),
            spec("dhidden", "B T D", Role::Grad),
            spec("ddelta", "B T D", Role::Grad),
            spec("dxr", "D", Role::Grad),
            spec("dxw", "D", Role::Grad),
            spec("dxk", "D", Role::Grad),
            spec("dxv", "D", Role::Grad),
            spec("dxa", "D", Role::Grad),
            spec_if("dxg", "D", Role::Grad, Presence::With("xg")),
        ],
    },
    Operator {
        name: "rwkv7_k_update",
        op: Op::KUpdate,
        model: Model::Rwkv7,
        forms: SINGLE,
        dims: &["B", "T", "D"],
        options: &[],
        tensors: &[
            spec("k", "B T D", Role::Vector),
            spec("a", "B T D", Role::Vector),
            spec("ka", "D", Role::Vector),
            spec("dout", "B T D", Role::Vector),
            spec("out", "B T D", Role::Output),
            spec("dk", "B T D", Role::Grad),
            spec("da", "B T D", Role::Grad),
            spec("dka", "D", Role::Grad),
        ],
    },
    Operator {
        name: "rwkv7_gate_output_correction",
        op: Op::GateOutputCorrection,
        model: Model::Rwkv7,
        forms: SINGLE,
        dims: &["B", "T", "H", "D"],
        options: &[],
        tensors: &[
            spec("o", "B T H*D", Role::Vector),
            spec("r", "B T H D", Role::Vector),
            spec("k", "B T H D", Role::Vector),
            spec("r_k", "H D", Role::Vector),
            spec("v", "B T H D", Role::Vector),
            spec("g", "B T H*D", Role::Vector),
            spec("dout", "B T H*D", Role::Vector),
            spec("out", "B T H*D", Role::Output),
            spec("do", "B T H*D", Role::Grad),
            spec("dr", "B T H D", Role::Grad),
            spec("dk", "B T H D", Role::Grad),
            spec("dr_k", "H D", Role::Grad),
            spec("dv", "B T H D", Role::Grad),
            spec("dg", "B T H*D", Role::Grad),
        ],
    },
    Operator {
        name: "rwkv7_channel_mixing",
        op: Op::ChannelMixing,
        model: Model::ChannelMixing,
        forms: SINGLE,
        dims: &["B", "T", "C", "F"],
        options: &[],
        tensors: &[
            spec("x", "B T C", Role::Vector),
            spec("x_prev", "N C", Role::Vector),
            spec("x_k", "C", Role::Vector),
            spec("key_weight", "C F", Role::Vector),
            spec("value_weight", "F C", Role::Vector),
            spec("dout", "B T C", Role::Vector),
            spec("out", "B T C", Role::Output),
            spec("dx", "B T C", Role::Grad),
            spec("dx_prev", "N C", Role::Grad),
            spec("dx_k", "C", Role::Grad),
            spec("dkey_weight", "C F", Role::Grad),
            spec("dvalue_weight", "F C", Role::Grad),
        ],
    },
    Operator {
        name: "token_shift",
        op: Op::TokenShift,
        model: Model::TokenShift,
        forms: SINGLE,
        dims: &["B", "T", "D"],
        options: &[],
        tensors: &[
            spec("x", "B T D", Role::Vector),
            spec_if("cache", "N D", Role::Vector, Presence::Optional),
            spec("dy", "B T D", Role::Vector),
            spec_if("dcache_out", "N D", Role::Vector, Presence::Optional),
            spec("y", "B T D", Role::Output),
            spec("cache_out", "N D", Role::Output),
            spec("dx", "B T D", Role::Grad),
            spec_if("dcache", "N D", Role::Grad, Presence::With("cache")),
        ],
    },
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_dimension_of_a_shape_is_one_that_the_metadata_gives() {
        for operator in OPERATORS {
            for tensor in operator.tensors {
                for factor in tensor.shape.split([' ', '*']) {
                    let known =
                        factor == "N" || factor.parse::<usize>().is_ok() || operator.dims.contains(&factor);
                    assert!(known, "{}: `{}` is {}", operator.name, tensor.name, tensor.shape);
                }
            }
        }
    }

    #[test]
    fn what_a_tensor_comes_with_is_another_tensor_or_a_flag() {
        for operator in OPERATORS {
            for tensor in operator.tensors {
                let found = match tensor.presence {
                    Presence::Always | Presence::Optional => true,
                    Presence::With(other) => operator.tensors.iter().any(|t| t.name == other),
                    Presence::Flag(key) => {
                        operator.options.iter().any(|o| matches!(o, OptionKey::Flag(name) if *name == key))
                    }
                };
                assert!(found, "{}: `{}`", operator.name, tensor.name);
            }
        }
    }
}
