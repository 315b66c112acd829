//! The feed-forward half of an RWKV-7 block: token shift, two matrix products and a squared rectifier.

use num_traits::Float;

use crate::matrix::{Matrix, axpy, axpy2};
use crate::{SeqLens, check, token_shift};

/// Dimensions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChannelMixingShape {
    /// Sequences and their tokens.
    pub seqs: SeqLens,
    /// Channels of a token (C of the model, not of a chunk).
    pub c: usize,
    /// Channels of the hidden layer (F).
    pub f: usize,
}

/// Tensors of the forward pass.
#[derive(Clone, Copy, Debug)]
pub struct ChannelMixingInputs<'a, F> {
    /// `[B, T, C]`  tokens
    pub x: &'a [F],
    /// `[N, C]`  token before the first of each sequence; zero when absent
    pub x_prev: Option<&'a [F]>,
    /// `[C]`  how far each channel is mixed with its predecessor
    pub x_k: &'a [F],
    /// `[C, F]`
    pub key_weight: &'a [F],
    /// `[F, C]`
    pub value_weight: &'a [F],
}

/// Results of the forward pass.
#[derive(Clone, Debug, PartialEq)]
pub struct ChannelMixingOutputs<F> {
    /// `[B, T, C]`
    pub out: Vec<F>,
    /// `[N, C]`  last token of each sequence: `x_prev` of the next call
    pub x_last: Vec<F>,
}

/// Gradients of the results.
#[derive(Clone, Copy, Debug)]
pub struct ChannelMixingOutputGrads<'a, F> {
    /// `[B, T, C]`
    pub d_out: &'a [F],
    /// `[N, C]`  zero when absent
    pub d_x_last: Option<&'a [F]>,
}

/// Gradients of the inputs.
#[derive(Clone, Debug, PartialEq)]
pub struct ChannelMixingGrads<F> {
    /// `[B, T, C]`
    pub dx: Vec<F>,
    /// `[N, C]`
    pub dx_prev: Vec<F>,
    /// `[C]`
    pub dx_k: Vec<F>,
    /// `[C, F]`
    pub d_key_weight: Vec<F>,
    /// `[F, C]`
    pub d_value_weight: Vec<F>,
}

/// Mixes the channels of every token.
///
/// ```text
/// m_t = x_t + (x_{t-1} - x_t) * x_k        out = relu(m key_weight)^2 value_weight
/// ```
///
/// # Panics
///
/// When the length of a tensor does not fit the shape.
pub fn channel_mixing_fwd<F: Float>(
    shape: &ChannelMixingShape,
    x: &ChannelMixingInputs<F>,
) -> ChannelMixingOutputs<F> {
    let hidden = Hidden::new(shape, x);
    ChannelMixingOutputs { out: hidden.squared().times(&x.value_weight(shape)).data, x_last: hidden.x_last }
}

/// Gradients of [`channel_mixing_fwd`].
///
/// # Panics
///
/// When the length of a tensor does not fit the shape.
pub fn channel_mixing_bwd<F: Float>(
    shape: &ChannelMixingShape,
    x: &ChannelMixingInputs<F>,
    dy: &ChannelMixingOutputGrads<F>,
) -> ChannelMixingGrads<F> {
    let tokens = shape.seqs.tokens();
    check::len("d_out", dy.d_out, &[tokens, shape.c]);
    let hidden = Hidden::new(shape, x);
    let d_out = Matrix::new(tokens, shape.c, dy.d_out);
    let two = F::one() + F::one();
    // d relu(z)^2 = 2 relu(z) dz
    let d_hidden = d_out.times_t(&x.value_weight(shape)).hadamard(&hidden.relu).scaled(two);
    let d_mixed = d_hidden.times_t(&x.key_weight(shape));

    let mut dx_k = vec![F::zero(); shape.c];
    let mut d_delta = Vec::with_capacity(d_mixed.data.len());
    for i in 0..tokens {
        axpy2(&mut dx_k, F::one(), d_mixed.row(i), hidden.delta.row(i));
        d_delta.extend(d_mixed.row(i).iter().zip(x.x_k).map(|(&d_mixed, &x_k)| d_mixed * x_k));
    }
    let shift = token_shift::bwd(
        &shape.shift(),
        &x.shift(),
        &token_shift::OutputGrads { dy: &d_delta, d_cache_out: dy.d_x_last },
    );
    let mut dx = shift.dx;
    axpy(&mut dx, F::one(), &d_mixed.data);
    ChannelMixingGrads {
        dx,
        dx_prev: shift.d_cache,
        dx_k,
        d_key_weight: hidden.mixed.t_times(&d_hidden).data,
        d_value_weight: hidden.squared().t_times(&d_out).data,
    }
}

impl ChannelMixingShape {
    fn shift(&self) -> token_shift::Shape {
        token_shift::Shape { seqs: self.seqs.clone(), d: self.c }
    }
}

impl<'a, F: Float> ChannelMixingInputs<'a, F> {
    fn shift(&self) -> token_shift::Inputs<'a, F> {
        token_shift::Inputs { x: self.x, cache: self.x_prev }
    }

    fn key_weight(&self, shape: &ChannelMixingShape) -> Matrix<F> {
        check::len("key_weight", self.key_weight, &[shape.c, shape.f]);
        Matrix::new(shape.c, shape.f, self.key_weight)
    }

    fn value_weight(&self, shape: &ChannelMixingShape) -> Matrix<F> {
        check::len("value_weight", self.value_weight, &[shape.f, shape.c]);
        Matrix::new(shape.f, shape.c, self.value_weight)
    }
}

/// What both directions need.
#[derive(Clone, Debug)]
struct Hidden<F> {
    /// `[B * T, C]`  x_{t-1} - x_t
    delta: Matrix<F>,
    /// `[B * T, C]`  m
    mixed: Matrix<F>,
    /// `[B * T, F]`  relu(m key_weight)
    relu: Matrix<F>,
    /// `[N, C]`
    x_last: Vec<F>,
}

impl<F: Float> Hidden<F> {
    fn new(shape: &ChannelMixingShape, x: &ChannelMixingInputs<F>) -> Hidden<F> {
        let tokens = shape.seqs.tokens();
        check::len("x_k", x.x_k, &[shape.c]);
        let shifted = token_shift::fwd(&shape.shift(), &x.shift());
        let delta = Matrix::new(tokens, shape.c, &shifted.y);
        let mut mixed = Matrix::new(tokens, shape.c, x.x);
        for i in 0..tokens {
            axpy2(mixed.row_mut(i), F::one(), delta.row(i), x.x_k);
        }
        let mut relu = mixed.times(&x.key_weight(shape));
        for z in &mut relu.data {
            *z = z.max(F::zero());
        }
        Hidden { delta, mixed, relu, x_last: shifted.cache_out }
    }

    fn squared(&self) -> Matrix<F> {
        self.relu.clone().hadamard(&self.relu)
    }
}
