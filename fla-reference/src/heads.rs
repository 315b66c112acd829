//! One head of a token-major tensor, and one state of a tensor of states.

use num_traits::Float;

use crate::matrix::Matrix;

/// Finds the rows of one head in `[B, T, H, width]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Head {
    /// Heads of the tensor.
    pub(crate) heads: usize,
    /// This head.
    pub(crate) i_h: usize,
    /// Elements of a row.
    pub(crate) width: usize,
}

impl Head {
    pub(crate) fn row<'a, F>(&self, x: &'a [F], i_t: usize) -> &'a [F] {
        &x[(i_t * self.heads + self.i_h) * self.width..][..self.width]
    }

    pub(crate) fn row_mut<'a, F>(&self, x: &'a mut [F], i_t: usize) -> &'a mut [F] {
        &mut x[(i_t * self.heads + self.i_h) * self.width..][..self.width]
    }

    /// The rows of the given tokens, one after the other.
    pub(crate) fn gather<F: Float>(&self, x: &[F], tokens: &[usize]) -> Matrix<F> {
        let mut out = Matrix::zeros(tokens.len(), self.width);
        for (i, &i_t) in tokens.iter().enumerate() {
            out.row_mut(i).copy_from_slice(self.row(x, i_t));
        }
        out
    }

    /// Puts rows where [`Head::gather`] takes them from.
    pub(crate) fn scatter<F: Float>(&self, x: &mut [F], tokens: &[usize], rows: &Matrix<F>) {
        for (i, &i_t) in tokens.iter().enumerate() {
            self.row_mut(x, i_t).copy_from_slice(rows.row(i));
        }
    }

    /// Adds rows to where [`Head::gather`] takes them from.
    pub(crate) fn scatter_add<F: Float>(&self, x: &mut [F], tokens: &[usize], rows: &Matrix<F>) {
        for (i, &i_t) in tokens.iter().enumerate() {
            crate::matrix::axpy(self.row_mut(x, i_t), F::one(), rows.row(i));
        }
    }
}

/// A copy of an optional tensor, or zeros.
pub(crate) fn or_zeros<F: Float>(x: Option<&[F]>, len: usize) -> Vec<F> {
    x.map_or_else(|| vec![F::zero(); len], <[F]>::to_vec)
}

/// State number `i` of a tensor of states with `len` elements each.
pub(crate) fn state<F>(states: &[F], i: usize, len: usize) -> &[F] {
    &states[i * len..][..len]
}

/// The same, to be written.
pub(crate) fn state_mut<F>(states: &mut [F], i: usize, len: usize) -> &mut [F] {
    &mut states[i * len..][..len]
}

/// Runs a recurrence backwards: calls `visit` with the states before and after every step, last step first.
///
/// States are kept at every sqrt(steps)-th step and recomputed in between, so that a long sequence needs the memory
/// of 2 sqrt(steps) states.
pub(crate) fn replay_backwards<F: Float>(
    initial_state: &[F],
    steps: usize,
    mut advance: impl FnMut(&mut [F], usize),
    mut visit: impl FnMut(Step<F>),
) {
    let stride = steps.isqrt().max(1);
    let mut state = initial_state.to_vec();
    let mut checkpoints = Vec::new();
    for i in 0..steps {
        if i % stride == 0 {
            checkpoints.push(state.clone());
        }
        advance(&mut state, i);
    }
    for (first, checkpoint) in (0..steps).step_by(stride).zip(checkpoints).rev() {
        let end = (first + stride).min(steps);
        let mut states = vec![checkpoint];
        for i in first..end {
            let mut state = states[i - first].clone();
            advance(&mut state, i);
            states.push(state);
        }
        for i in (first..end).rev() {
            visit(Step { i, before: &states[i - first], after: &states[i - first + 1] });
        }
    }
}

/// One step of a recurrence.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Step<'a, F> {
    pub(crate) i: usize,
    pub(crate) before: &'a [F],
    pub(crate) after: &'a [F],
}
