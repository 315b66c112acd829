//! Token shift and the mixes together: [`token_shift`](crate::token_shift) followed by the functions of `addcmul`.

use num_traits::Float;

use super::{
    AddcmulGrads, AddcmulInputs, AddcmulOutputGrads, AddcmulOutputs, AddcmulShape, addcmul_bwd, addcmul_fwd,
};
use crate::matrix::axpy;
use crate::token_shift;

/// Tensors of the forward pass.
#[derive(Clone, Copy, Debug)]
pub struct TokenShiftAddcmulInputs<'a, F> {
    /// `[B, T, D]`  tokens
    pub x: &'a [F],
    /// `[N, D]`  token before the first of each sequence; zero when absent
    pub cache: Option<&'a [F]>,
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

/// Results of the forward pass.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenShiftAddcmulOutputs<F> {
    /// The mixes.
    pub mixes: AddcmulOutputs<F>,
    /// `[N, D]`  last token of each sequence; an empty sequence hands its cache row through
    pub cache_out: Vec<F>,
}

/// Gradients of the inputs.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenShiftAddcmulGrads<F> {
    /// `[B, T, D]`
    pub dx: Vec<F>,
    /// `[N, D]`  also when there was no cache: the gradient at zero
    pub d_cache: Vec<F>,
    /// Those of the factors, and of tokens and differences apart.
    pub mixes: AddcmulGrads<F>,
}

/// Shifts and mixes.
///
/// ```text
/// out_i = x_t + (x_{t-1} - x_t) * x_i        x_{-1} = cache
/// ```
///
/// # Panics
///
/// When the length of a tensor does not fit the shape.
pub fn token_shift_addcmul_fwd<F: Float>(
    shape: &token_shift::Shape,
    x: &TokenShiftAddcmulInputs<F>,
) -> TokenShiftAddcmulOutputs<F> {
    let shifted = token_shift::fwd(shape, &x.shift());
    let mixes = addcmul_fwd(&rows(shape), &x.mixes(&shifted.y));
    TokenShiftAddcmulOutputs { mixes, cache_out: shifted.cache_out }
}

/// Gradients of [`token_shift_addcmul_fwd`]; `d_cache_out`, `[N, D]`, is zero when absent.
///
/// # Panics
///
/// When the length of a tensor does not fit the shape, or only one of `xg` and the gradient of its mix is given.
pub fn token_shift_addcmul_bwd<F: Float>(
    shape: &token_shift::Shape,
    x: &TokenShiftAddcmulInputs<F>,
    dy: &AddcmulOutputGrads<F>,
    d_cache_out: Option<&[F]>,
) -> TokenShiftAddcmulGrads<F> {
    let shifted = token_shift::fwd(shape, &x.shift());
    let mixes = addcmul_bwd(&rows(shape), &x.mixes(&shifted.y), dy);
    let d_shifted = token_shift::OutputGrads { dy: &mixes.d_delta, d_cache_out };
    let token_shift::Grads { mut dx, d_cache } = token_shift::bwd(shape, &x.shift(), &d_shifted);
    axpy(&mut dx, F::one(), &mixes.d_hidden);
    TokenShiftAddcmulGrads { dx, d_cache, mixes }
}

fn rows(shape: &token_shift::Shape) -> AddcmulShape {
    AddcmulShape { tokens: shape.seqs.tokens(), d: shape.d }
}

impl<'a, F> TokenShiftAddcmulInputs<'a, F> {
    fn shift(&self) -> token_shift::Inputs<'a, F> {
        token_shift::Inputs { x: self.x, cache: self.cache }
    }

    fn mixes(&self, delta: &'a [F]) -> AddcmulInputs<'a, F> {
        let Self { x, xr, xw, xk, xv, xa, xg, .. } = *self;
        AddcmulInputs { hidden: x, delta, xr, xw, xk, xv, xa, xg }
    }
}
