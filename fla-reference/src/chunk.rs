//! What the chunk forms share: chunk-local sums and decays, and the inverse of a unit lower triangular matrix.

use num_traits::Float;

use crate::matrix::{Matrix, axpy};
use crate::{SeqLens, check};

/// Which way a sum inside a chunk runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sum {
    /// Row t holds the sum of the rows of the chunk up to and including t.
    Prefix,
    /// Row t holds the sum of the rows of the chunk from t on.
    Suffix,
}

/// Dimensions of [`cumsum`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CumsumShape {
    /// Sequences and their tokens; chunks start anew with each sequence.
    pub seqs: SeqLens,
    /// Channels of a token: H, or H * K.
    pub d: usize,
    /// Rows of a chunk (C), at least 1.
    pub chunk: usize,
}

/// Sums `x`, `[B, T, D]`, inside each chunk of each sequence; the result has the shape of `x`.
///
/// # Panics
///
/// When a length does not fit the shape.
pub fn cumsum<F: Float>(shape: &CumsumShape, x: &[F], sum: Sum) -> Vec<F> {
    let CumsumShape { seqs, d, chunk } = shape;
    seqs.check();
    check::len("x", x, &[seqs.tokens(), *d]);
    let mut out = x.to_vec();
    for i_n in 0..seqs.n() {
        for tokens in chunks(seqs.range(i_n).collect(), *chunk) {
            let steps: Vec<usize> = match sum {
                Sum::Prefix => tokens,
                Sum::Suffix => tokens.into_iter().rev().collect(),
            };
            for step in steps.windows(2) {
                let summed = out[step[0] * d..][..*d].to_vec();
                axpy(&mut out[step[1] * d..][..*d], F::one(), &summed);
            }
        }
    }
    out
}

/// `(I + L)^-1` for a strictly lower triangular `l`, `[n, n]`; what lies on and above the diagonal is ignored.
///
/// The inverse is unit lower triangular. It is found row by row, by substitution, which stays accurate when the
/// powers of L grow although the inverse does not: equal keys with write strength 1 are such a case.
///
/// # Panics
///
/// When `l` does not hold n * n elements.
pub fn unit_lower_inverse<F: Float>(l: &[F], n: usize) -> Vec<F> {
    check::len("l", l, &[n, n]);
    let mut inverse = vec![F::zero(); n * n];
    for i in 0..n {
        let (done, rest) = inverse.split_at_mut(i * n);
        let row = &mut rest[..n];
        row[i] = F::one();
        for j in 0..i {
            axpy(row, -l[i * n + j], &done[j * n..][..n]);
        }
    }
    inverse
}

/// [`unit_lower_inverse`] of a matrix.
pub(crate) fn inverse<F: Float>(l: &Matrix<F>) -> Matrix<F> {
    Matrix { rows: l.rows, cols: l.cols, data: unit_lower_inverse(&l.data, l.rows) }
}

/// Divides tokens into runs of `chunk`, the last of which may be shorter.
pub(crate) fn chunks(tokens: Vec<usize>, chunk: usize) -> Vec<Vec<usize>> {
    assert!(chunk > 0, "a chunk has at least 1 row");
    tokens.chunks(chunk).map(<[usize]>::to_vec).collect()
}

/// Decays between the rows of one chunk, as products of the decays of single steps.
///
/// Each is `exp` of a difference of cumulative log decays. Formed as a product of factors that are at most 1 it is
/// exact for any decay: nothing overflows, no large sums are subtracted, and what is forgotten is exactly 0.
#[derive(Clone, Debug)]
pub(crate) struct Decays<F> {
    /// `[n, K]`  from the start of the chunk through row i
    pub(crate) start_through: Matrix<F>,
    /// `[n, K]`  from the start of the chunk until just before row i
    pub(crate) start_until: Matrix<F>,
    /// `[n, K]`  after row i, through the end of the chunk
    pub(crate) to_end: Matrix<F>,
    /// `[K]`  of the whole chunk
    pub(crate) whole: Vec<F>,
    /// `[n, K]`  of each row
    step: Matrix<F>,
}

/// A row i at or after a row j, and the decays between them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pair<'a, F> {
    pub(crate) i: usize,
    pub(crate) j: usize,
    /// `[K]`  after j, through i: 1 when they are equal
    pub(crate) through: &'a [F],
    /// `[K]`  after j, until just before i; without meaning when they are equal
    pub(crate) until: &'a [F],
}

impl<F: Float> Decays<F> {
    /// From log decays, `[n, K]`.
    pub(crate) fn new(g: &Matrix<F>) -> Decays<F> {
        let (n, k) = (g.rows, g.cols);
        let step = Matrix { rows: n, cols: k, data: g.data.iter().map(|g| g.exp()).collect() };
        let (mut start_until, mut start_through, mut to_end) =
            (Matrix::zeros(n, k), Matrix::zeros(n, k), Matrix::zeros(n, k));
        let mut product = vec![F::one(); k];
        for i in 0..n {
            start_until.row_mut(i).copy_from_slice(&product);
            multiply(&mut product, step.row(i));
            start_through.row_mut(i).copy_from_slice(&product);
        }
        let whole = product;
        let mut product = vec![F::one(); k];
        for i in (0..n).rev() {
            to_end.row_mut(i).copy_from_slice(&product);
            multiply(&mut product, step.row(i));
        }
        Decays { start_through, start_until, to_end, whole, step }
    }

    /// Visits every pair of rows.
    pub(crate) fn pairs(&self, mut visit: impl FnMut(Pair<F>)) {
        let (n, k) = (self.step.rows, self.step.cols);
        for j in 0..n {
            let mut until = vec![F::one(); k];
            let mut through = vec![F::one(); k];
            visit(Pair { i: j, j, through: &through, until: &until });
            for i in j + 1..n {
                until.copy_from_slice(&through);
                multiply(&mut through, self.step.row(i));
                visit(Pair { i, j, through: &through, until: &until });
            }
        }
    }
}

fn multiply<F: Float>(x: &mut [F], y: &[F]) {
    for (x, &y) in x.iter_mut().zip(y) {
        *x = *x * y;
    }
}

/// The sum of the rows of `x` from each row on.
pub(crate) fn suffix_sums<F: Float>(mut x: Matrix<F>) -> Matrix<F> {
    for i in (1..x.rows).rev() {
        let after = x.row(i).to_vec();
        axpy(x.row_mut(i - 1), F::one(), &after);
    }
    x
}
