//! The five or six mixes of a token with its shifted neighbour: `out_i = hidden + delta * x_i`.

use num_traits::Float;

/// Dimensions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AddcmulShape {
    /// Rows (B * T).
    pub tokens: usize,
    /// Channels of a row (D).
    pub d: usize,
}

/// Tensors of the forward pass.
#[derive(Clone, Copy, Debug)]
pub struct AddcmulInputs<'a, F> {
    /// `[B, T, D]`  tokens
    pub hidden: &'a [F],
    /// `[B, T, D]`  token shift of `hidden`
    pub delta: &'a [F],
    /// `[D]`  mix of the receptance
    pub xr: &'a [F],
    /// `[D]`  mix of the decay
    pub xw: &'a [F],
    /// `[D]`  mix of the key
    pub xk: &'a [F],
    /// `[D]`  mix of the value
    pub xv: &'a [F],
    /// `[D]`  mix of the rate
    pub xa: &'a [F],
    /// `[D]`  mix of the output gate; absent when the model has none
    pub xg: Option<&'a [F]>,
}

/// The mixes.
#[derive(Clone, Debug, PartialEq)]
pub struct AddcmulOutputs<F> {
    /// `[B, T, D]`
    pub out_r: Vec<F>,
    /// `[B, T, D]`
    pub out_w: Vec<F>,
    /// `[B, T, D]`
    pub out_k: Vec<F>,
    /// `[B, T, D]`
    pub out_v: Vec<F>,
    /// `[B, T, D]`
    pub out_a: Vec<F>,
    /// `[B, T, D]`  present when `xg` was
    pub out_g: Option<Vec<F>>,
}

/// Gradients of the mixes.
#[derive(Clone, Copy, Debug)]
pub struct AddcmulOutputGrads<'a, F> {
    /// `[B, T, D]`
    pub d_out_r: &'a [F],
    /// `[B, T, D]`
    pub d_out_w: &'a [F],
    /// `[B, T, D]`
    pub d_out_k: &'a [F],
    /// `[B, T, D]`
    pub d_out_v: &'a [F],
    /// `[B, T, D]`
    pub d_out_a: &'a [F],
    /// `[B, T, D]`  present exactly when `xg` is
    pub d_out_g: Option<&'a [F]>,
}

/// Gradients of the inputs.
#[derive(Clone, Debug, PartialEq)]
pub struct AddcmulGrads<F> {
    /// `[B, T, D]`
    pub d_hidden: Vec<F>,
    /// `[B, T, D]`
    pub d_delta: Vec<F>,
    /// `[D]`
    pub dxr: Vec<F>,
    /// `[D]`
    pub dxw: Vec<F>,
    /// `[D]`
    pub dxk: Vec<F>,
    /// `[D]`
    pub dxv: Vec<F>,
    /// `[D]`
    pub dxa: Vec<F>,
    /// `[D]`  present when `xg` was
    pub dxg: Option<Vec<F>>,
}

/// Forms the mixes.
pub fn addcmul_fwd<F: Float>(shape: &AddcmulShape, x: &AddcmulInputs<F>) -> AddcmulOutputs<F> {
    unimplemented!()
}

/// Gradients of [`addcmul_fwd`].
pub fn addcmul_bwd<F: Float>(
    shape: &AddcmulShape,
    x: &AddcmulInputs<F>,
    dy: &AddcmulOutputGrads<F>,
) -> AddcmulGrads<F> {
    unimplemented!()
}
