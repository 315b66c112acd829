//! The bonus of the current token and the output gate: `out = (o + (sum_k r k r_k) v) * g`.

use num_traits::Float;

use crate::check;
use crate::matrix::{axpy, axpy2, dot, dot3};

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
///
/// # Panics
///
/// When the length of a tensor does not fit the shape.
pub fn gate_output_correction_fwd<F: Float>(
    shape: &GateOutputCorrectionShape,
    x: &GateOutputCorrectionInputs<F>,
) -> Vec<F> {
    x.check(shape);
    let mut out = Vec::with_capacity(x.o.len());
    for row in x.rows(shape) {
        let bonus = dot3(row.r, row.k, row.r_k);
        out.extend(row.o.iter().zip(row.v).zip(row.g).map(|((&o, &v), &g)| (o + bonus * v) * g));
    }
    out
}

/// Gradients of [`gate_output_correction_fwd`] from `d_out`, `[B, T, H * K]`.
///
/// With s = sum_k r k r_k and ds = sum d_out g v:
///
/// ```text
/// do = d_out * g        dv = s do        dg = d_out * (o + s v)
/// dr = ds k * r_k       dk = ds r * r_k       dr_k = sum over tokens of ds r * k
/// ```
///
/// # Panics
///
/// When the length of a tensor does not fit the shape.
pub fn gate_output_correction_bwd<F: Float>(
    shape: &GateOutputCorrectionShape,
    x: &GateOutputCorrectionInputs<F>,
    d_out: &[F],
) -> GateOutputCorrectionGrads<F> {
    x.check(shape);
    check::len("d_out", d_out, &[shape.tokens, shape.h * shape.k]);
    let zeros = || vec![F::zero(); x.o.len()];
    let mut dx = GateOutputCorrectionGrads {
        d_o: d_out.iter().zip(x.g).map(|(&d_out, &g)| d_out * g).collect(),
        dr: zeros(),
        dk: zeros(),
        dr_k: vec![F::zero(); x.r_k.len()],
        dv: zeros(),
        dg: zeros(),
    };
    for (i, row) in x.rows(shape).enumerate() {
        let span = i * shape.k..(i + 1) * shape.k;
        let d_o = &dx.d_o[span.clone()];
        let bonus = dot3(row.r, row.k, row.r_k);
        let d_bonus = dot(d_o, row.v);
        axpy(&mut dx.dv[span.clone()], bonus, d_o);
        axpy2(&mut dx.dg[span.clone()], F::one(), &d_out[span.clone()], row.o);
        axpy2(&mut dx.dg[span.clone()], bonus, &d_out[span.clone()], row.v);
        axpy2(&mut dx.dr[span.clone()], d_bonus, row.k, row.r_k);
        axpy2(&mut dx.dk[span], d_bonus, row.r, row.r_k);
        axpy2(&mut dx.dr_k[i % shape.h * shape.k..][..shape.k], d_bonus, row.r, row.k);
    }
    dx
}

/// One head of one token.
#[derive(Clone, Copy, Debug)]
struct Row<'a, F> {
    o: &'a [F],
    r: &'a [F],
    k: &'a [F],
    r_k: &'a [F],
    v: &'a [F],
    g: &'a [F],
}

impl<F> GateOutputCorrectionInputs<'_, F> {
    #[track_caller]
    fn check(&self, shape: &GateOutputCorrectionShape) {
        let GateOutputCorrectionShape { tokens, h, k } = *shape;
        check::len("o", self.o, &[tokens, h * k]);
        check::len("r", self.r, &[tokens, h, k]);
        check::len("k", self.k, &[tokens, h, k]);
        check::len("r_k", self.r_k, &[h, k]);
        check::len("v", self.v, &[tokens, h, k]);
        check::len("g", self.g, &[tokens, h * k]);
    }

    fn rows(&self, shape: &GateOutputCorrectionShape) -> impl Iterator<Item = Row<'_, F>> {
        let GateOutputCorrectionShape { tokens, h, k } = *shape;
        (0..tokens * h).map(move |i| Row {
            o: &self.o[i * k..][..k],
            r: &self.r[i * k..][..k],
            k: &self.k[i * k..][..k],
            r_k: &self.r_k[i % h * k..][..k],
            v: &self.v[i * k..][..k],
            g: &self.g[i * k..][..k],
        })
    }
}
