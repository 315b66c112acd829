//! Results of a forward pass over a matrix state, and the gradients that arrive for them.

/// Outputs of a forward pass.
#[derive(Clone, Debug, PartialEq)]
pub struct Outputs<F> {
    /// `[B, T, H, V]`  outputs (with HV heads for the gated delta rule)
    pub o: Vec<F>,
    /// `[N, H, K, V]`  state after the last token of each sequence
    pub final_state: Vec<F>,
}

/// Gradients of the loss with respect to the outputs: what a backward pass starts from.
#[derive(Clone, Copy, Debug)]
pub struct OutputGrads<'a, F> {
    /// `[B, T, H, V]`  gradient of `o`
    pub d_o: &'a [F],
    /// `[N, H, K, V]`  gradient of the final state; zero when absent
    pub d_final_state: Option<&'a [F]>,
}
