//! RWKV-7 from the unit key and its rate, as decoding calls it: `a = -kk` and `b = kk * rate` are formed inside.

use num_traits::Float;

use crate::rwkv7::{self, Grads, Inputs, Options, OutputGrads, Outputs};
use crate::{Shape, check};

/// Tensors of a pass.
#[derive(Clone, Copy, Debug)]
pub struct FusedMulInputs<'a, F> {
    /// `[B, T, H, K]`  receptance: the query
    pub r: &'a [F],
    /// `[B, T, H, K]`  log decay, natural base
    pub w: &'a [F],
    /// `[B, T, H, K]`  keys
    pub k: &'a [F],
    /// `[B, T, H, V]`  values
    pub v: &'a [F],
    /// `[B, T, H, K]`  unit keys
    pub kk: &'a [F],
    /// `[B, T, H, K]`  rates, in [0, 1]
    pub a: &'a [F],
    /// `[N, H, K, V]`  state before the first token; zero when absent
    pub initial_state: Option<&'a [F]>,
}

/// Gradients of the loss with respect to the inputs.
#[derive(Clone, Debug, PartialEq)]
pub struct FusedMulGrads<F> {
    /// `[B, T, H, K]`
    pub dr: Vec<F>,
    /// `[B, T, H, K]`  with respect to the log decay
    pub dw: Vec<F>,
    /// `[B, T, H, K]`
    pub dk: Vec<F>,
    /// `[B, T, H, V]`
    pub dv: Vec<F>,
    /// `[B, T, H, K]`
    pub dkk: Vec<F>,
    /// `[B, T, H, K]`  with respect to the rate
    pub da: Vec<F>,
    /// `[N, H, K, V]`  also when there was no initial state: the gradient at zero
    pub d_initial_state: Vec<F>,
}

/// The recurrence, token by token: [`rwkv7::recurrent_fwd`] with `a = -kk` and `b = kk * rate`.
///
/// # Panics
///
/// When the length of a tensor does not fit the shape.
pub fn fused_mul_recurrent_fwd<F: Float>(
    shape: &Shape,
    x: &FusedMulInputs<F>,
    options: &Options<F>,
) -> Outputs<F> {
    rwkv7::recurrent_fwd(shape, &Formed::new(shape, x).inputs(x), options)
}

/// Gradients of the recurrence: [`rwkv7::recurrent_bwd`], carried on to `kk` and the rate.
///
/// # Panics
///
/// When the length of a tensor does not fit the shape.
pub fn fused_mul_recurrent_bwd<F: Float>(
    shape: &Shape,
    x: &FusedMulInputs<F>,
    dy: &OutputGrads<F>,
    options: &Options<F>,
) -> FusedMulGrads<F> {
    x.grads(rwkv7::recurrent_bwd(shape, &Formed::new(shape, x).inputs(x), dy, options))
}

/// The chunk form: [`rwkv7::chunk_fwd`].
///
/// # Panics
///
/// When the length of a tensor does not fit the shape, or the chunk has no rows.
pub fn fused_mul_chunk_fwd<F: Float>(
    shape: &Shape,
    x: &FusedMulInputs<F>,
    options: &Options<F>,
) -> Outputs<F> {
    rwkv7::chunk_fwd(shape, &Formed::new(shape, x).inputs(x), options)
}

/// Gradients of the chunk form: [`rwkv7::chunk_bwd`], carried on to `kk` and the rate.
///
/// # Panics
///
/// When the length of a tensor does not fit the shape, or the chunk has no rows.
pub fn fused_mul_chunk_bwd<F: Float>(
    shape: &Shape,
    x: &FusedMulInputs<F>,
    dy: &OutputGrads<F>,
    options: &Options<F>,
) -> FusedMulGrads<F> {
    x.grads(rwkv7::chunk_bwd(shape, &Formed::new(shape, x).inputs(x), dy, options))
}

/// The two tensors that are formed inside.
#[derive(Clone, Debug)]
struct Formed<F> {
    /// `[B, T, H, K]`  -kk
    a: Vec<F>,
    /// `[B, T, H, K]`  kk * rate
    b: Vec<F>,
}

impl<F: Float> Formed<F> {
    #[track_caller]
    fn new(shape: &Shape, x: &FusedMulInputs<F>) -> Formed<F> {
        let keys = [shape.seqs.tokens(), shape.h, shape.k];
        check::len("kk", x.kk, &keys);
        check::len("a", x.a, &keys);
        Formed {
            a: x.kk.iter().map(|&kk| -kk).collect(),
            b: x.kk.iter().zip(x.a).map(|(&kk, &rate)| kk * rate).collect(),
        }
    }

    fn inputs<'a>(&'a self, x: &FusedMulInputs<'a, F>) -> Inputs<'a, F> {
        let FusedMulInputs { r, w, k, v, initial_state, .. } = *x;
        Inputs { r, w, k, v, a: &self.a, b: &self.b, initial_state }
    }
}

impl<F: Float> FusedMulInputs<'_, F> {
    fn grads(&self, grads: Grads<F>) -> FusedMulGrads<F> {
        let Grads { dr, dw, dk, dv, da, db, d_initial_state } = grads;
        FusedMulGrads {
            dr,
            dw,
            dk,
            dv,
            dkk: da.iter().zip(&db).zip(self.a).map(|((&da, &db), &rate)| db * rate - da).collect(),
            da: db.iter().zip(self.kk).map(|(&db, &kk)| db * kk).collect(),
            d_initial_state,
        }
    }
}
