//! The five or six mixes of a token with its shifted neighbour: `out_i = hidden + delta * x_i`.

use num_traits::Float;

use crate::check;
use crate::matrix::{axpy, axpy2};

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
///
/// ```text
/// out_i = hidden + delta * x_i        for i in r, w, k, v, a and, if given, g
/// ```
///
/// # Panics
///
/// When the length of a tensor does not fit the shape.
pub fn addcmul_fwd<F: Float>(shape: &AddcmulShape, x: &AddcmulInputs<F>) -> AddcmulOutputs<F> {
    x.check(shape);
    let mix = |factors: &[F]| {
        let mut out = x.hidden.to_vec();
        for (out, delta) in out.chunks_mut(shape.d).zip(x.delta.chunks(shape.d)) {
            axpy2(out, F::one(), delta, factors);
        }
        out
    };
    AddcmulOutputs {
        out_r: mix(x.xr),
        out_w: mix(x.xw),
        out_k: mix(x.xk),
        out_v: mix(x.xv),
        out_a: mix(x.xa),
        out_g: x.xg.map(mix),
    }
}

/// Gradients of [`addcmul_fwd`].
///
/// ```text
/// d_hidden = sum_i d_out_i        d_delta = sum_i d_out_i * x_i        dx_i = sum over tokens of d_out_i * delta
/// ```
///
/// # Panics
///
/// When the length of a tensor does not fit the shape, or only one of `xg` and the gradient of its mix is given.
pub fn addcmul_bwd<F: Float>(
    shape: &AddcmulShape,
    x: &AddcmulInputs<F>,
    dy: &AddcmulOutputGrads<F>,
) -> AddcmulGrads<F> {
    x.check(shape);
    assert_eq!(x.xg.is_some(), dy.d_out_g.is_some(), "`xg` and `d_out_g` come together");
    let mut d_hidden = vec![F::zero(); x.hidden.len()];
    let mut d_delta = vec![F::zero(); x.hidden.len()];
    let mut mix = |factors: &[F], d_out: &[F]| {
        check::len("d_out", d_out, &[shape.tokens, shape.d]);
        let mut dx = vec![F::zero(); shape.d];
        axpy(&mut d_hidden, F::one(), d_out);
        let rows = d_out.chunks(shape.d).zip(x.delta.chunks(shape.d)).zip(d_delta.chunks_mut(shape.d));
        for ((d_out, delta), d_delta) in rows {
            axpy2(d_delta, F::one(), d_out, factors);
            axpy2(&mut dx, F::one(), d_out, delta);
        }
        dx
    };
    let dxr = mix(x.xr, dy.d_out_r);
    let dxw = mix(x.xw, dy.d_out_w);
    let dxk = mix(x.xk, dy.d_out_k);
    let dxv = mix(x.xv, dy.d_out_v);
    let dxa = mix(x.xa, dy.d_out_a);
    let dxg = x.xg.zip(dy.d_out_g).map(|(xg, d_out)| mix(xg, d_out));
    AddcmulGrads { d_hidden, d_delta, dxr, dxw, dxk, dxv, dxa, dxg }
}

impl<F> AddcmulInputs<'_, F> {
    #[track_caller]
    fn check(&self, shape: &AddcmulShape) {
        let AddcmulShape { tokens, d } = *shape;
        assert!(d > 0, "a row has at least 1 channel");
        check::len("hidden", self.hidden, &[tokens, d]);
        check::len("delta", self.delta, &[tokens, d]);
        check::len("xr", self.xr, &[d]);
        check::len("xw", self.xw, &[d]);
        check::len("xk", self.xk, &[d]);
        check::len("xv", self.xv, &[d]);
        check::len("xa", self.xa, &[d]);
        check::len_opt("xg", self.xg, &[d]);
    }
}
