//! The feed-forward half of an RWKV-7 block: token shift, two matrix products and a squared rectifier.

use num_traits::Float;

use crate::SeqLens;

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
pub fn channel_mixing_fwd<F: Float>(
    shape: &ChannelMixingShape,
    x: &ChannelMixingInputs<F>,
) -> ChannelMixingOutputs<F> {
    unimplemented!()
}

/// Gradients of [`channel_mixing_fwd`].
pub fn channel_mixing_bwd<F: Float>(
    shape: &ChannelMixingShape,
    x: &ChannelMixingInputs<F>,
    dy: &ChannelMixingOutputGrads<F>,
) -> ChannelMixingGrads<F> {
    unimplemented!()
}
