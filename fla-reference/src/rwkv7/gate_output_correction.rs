//! The bonus of the current token and the output gate: `out = (o + (sum_k r k r_k) v) * g`.

use num_traits::Float;

/// Dimensions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GateOutputCorrectionShape {
    /// Rows (B * T).
    pub tokens: usize,
    /// Heads (H).
    pub h: usize,
    /// Channels of a head, of keys and values alike (K = V).
    pub k: usize,
}

/// Tensors of the forward pass.
#[derive(Clone, Copy, Debug)]
pub struct GateOutputCorrectionInputs<'a, F> {
    /// `[B, T, H * K]`  normalised outputs of the recurrence
    pub o: &'a [F],
    /// `[B, T, H, K]`  receptance
    pub r: &'a [F],
    /// `[B, T, H, K]`  keys
    pub k: &'a [F],
    /// `[H, K]`  weight of each channel in the bonus
    pub r_k: &'a [F],
    /// `[B, T, H, K]`  values
    pub v: &'a [F],
    /// `[B, T, H * K]`  output gate
    pub g: &'a [F],
}

/// Gradients of the inputs.
#[derive(Clone, Debug, PartialEq)]
pub struct GateOutputCorrectionGrads<F> {
    /// `[B, T, H * K]`
    pub d_o: Vec<F>,
    /// `[B, T, H, K]`
    pub dr: Vec<F>,
    /// `[B, T, H, K]`
    pub dk: Vec<F>,
    /// `[H, K]`
    pub dr_k: Vec<F>,
    /// `[B, T, H, K]`
    pub dv: Vec<F>,
    /// `[B, T, H * K]`
    pub dg: Vec<F>,
}

/// The corrected and gated outputs, `[B, T, H * K]`.
pub fn gate_output_correction_fwd<F: Float>(
    shape: &GateOutputCorrectionShape,
    x: &GateOutputCorrectionInputs<F>,
) -> Vec<F> {
    unimplemented!()
}

/// Gradients of [`gate_output_correction_fwd`] from `d_out`, `[B, T, H * K]`.
pub fn gate_output_correction_bwd<F: Float>(
    shape: &GateOutputCorrectionShape,
    x: &GateOutputCorrectionInputs<F>,
    d_out: &[F],
) -> GateOutputCorrectionGrads<F> {
    unimplemented!()
}
