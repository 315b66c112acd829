//! The key after its rate: `out = k * (1 + (a - 1) * ka)`.

use num_traits::Float;

use crate::check;

/// Dimensions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KUpdateShape {
    /// Rows (B * T).
    pub tokens: usize,
    /// Channels of a row (D).
    pub d: usize,
}

/// Tensors of the forward pass.
#[derive(Clone, Copy, Debug)]
pub struct KUpdateInputs<'a, F> {
    /// `[B, T, D]`  keys
    pub k: &'a [F],
    /// `[B, T, D]`  rates
    pub a: &'a [F],
    /// `[D]`  how far a rate below 1 shrinks the key
    pub ka: &'a [F],
}

/// Gradients of the inputs.
#[derive(Clone, Debug, PartialEq)]
pub struct KUpdateGrads<F> {
    /// `[B, T, D]`
    pub dk: Vec<F>,
    /// `[B, T, D]`
    pub da: Vec<F>,
    /// `[D]`
    pub dka: Vec<F>,
}

/// The updated keys, `[B, T, D]`: `out = k * (1 + (a - 1) * ka)`.
///
/// # Panics
///
/// When the length of a tensor does not fit the shape.
pub fn k_update_fwd<F: Float>(shape: &KUpdateShape, x: &KUpdateInputs<F>) -> Vec<F> {
    x.check(shape);
    let one = F::one();
    let factors = x.ka.iter().cycle();
    x.k.iter().zip(x.a).zip(factors).map(|((&k, &a), &ka)| k * (one + (a - one) * ka)).collect()
}

/// Gradients of [`k_update_fwd`] from `d_out`, `[B, T, D]`.
///
/// ```text
/// dk = d_out * (1 + (a - 1) * ka)        da = d_out * k * ka        dka = sum over tokens of d_out * k * (a - 1)
/// ```
///
/// # Panics
///
/// When the length of a tensor does not fit the shape.
pub fn k_update_bwd<F: Float>(shape: &KUpdateShape, x: &KUpdateInputs<F>, d_out: &[F]) -> KUpdateGrads<F> {
    x.check(shape);
    check::len("d_out", d_out, &[shape.tokens, shape.d]);
    let one = F::one();
    let mut dx = KUpdateGrads {
        dk: vec![F::zero(); x.k.len()],
        da: vec![F::zero(); x.a.len()],
        dka: vec![F::zero(); x.ka.len()],
    };
    for (i, &d_out) in d_out.iter().enumerate() {
        let i_d = i % shape.d;
        dx.dk[i] = d_out * (one + (x.a[i] - one) * x.ka[i_d]);
        dx.da[i] = d_out * x.k[i] * x.ka[i_d];
        dx.dka[i_d] = dx.dka[i_d] + d_out * x.k[i] * (x.a[i] - one);
    }
    dx
}

impl<F> KUpdateInputs<'_, F> {
    #[track_caller]
    fn check(&self, shape: &KUpdateShape) {
        let KUpdateShape { tokens, d } = *shape;
        check::len("k", self.k, &[tokens, d]);
        check::len("a", self.a, &[tokens, d]);
        check::len("ka", self.ka, &[d]);
    }
}
