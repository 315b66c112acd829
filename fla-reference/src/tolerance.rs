//! The one table of error limits: model, pass, number format and kind of tensor, each row with its evidence.

use std::fmt;

/// Who computed the result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Backend {
    /// This crate.
    Reference,
    /// A CUDA kernel.
    Gpu,
}

/// The operator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)] // each is the name of a module
pub enum Model {
    GatedDelta,
    Dplr,
    Rwkv7,
    Rwkv7Fused,
    Rwkv6,
    Rwkv4,
    TokenShift,
}

/// The pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)] // each is the name of a function
pub enum Pass {
    RecurrentFwd,
    RecurrentBwd,
    ChunkFwd,
    ChunkBwd,
    Fused,
}

/// Number format of the input and output vectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)] // each is the name of a number format
pub enum Dtype {
    F64,
    F32,
    Bf16,
    F16,
}

/// Kind of tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Class {
    /// `o` and other outputs in the format of the vectors.
    Output,
    /// The state after the last token, kept in f32.
    FinalState,
    /// A gradient that is a sum of products.
    Grad,
    /// A gradient of a decay, which a chunk form computes as a difference of larger terms.
    GateGrad,
}

/// What a limit depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// Who computed the result.
    pub backend: Backend,
    /// The operator.
    pub model: Model,
    /// The pass.
    pub pass: Pass,
    /// Number format of the vectors.
    pub dtype: Dtype,
    /// Kind of tensor.
    pub class: Class,
}

/// There is no limit for this key: nobody has measured it yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MissingRow {
    /// What was asked for.
    pub key: Key,
}

impl fmt::Display for MissingRow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the tolerance table has no row for {:?}", self.key)
    }
}

impl std::error::Error for MissingRow {}

/// The largest relative RMS error that passes.
///
/// # Errors
///
/// [`MissingRow`] when the table does not hold the key.
pub fn limit(key: Key) -> Result<f64, MissingRow> {
    unimplemented!()
}
