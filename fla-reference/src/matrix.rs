//! Small dense matrices, and the two vector loops that everything else is made of.

use num_traits::Float;

/// Rows of equal length, one after the other.
#[derive(Clone, Debug)]
pub(crate) struct Matrix<F> {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) data: Vec<F>,
}

impl<F: Float> Matrix<F> {
    pub(crate) fn zeros(rows: usize, cols: usize) -> Matrix<F> {
        Matrix { rows, cols, data: vec![F::zero(); rows * cols] }
    }

    pub(crate) fn new(rows: usize, cols: usize, data: &[F]) -> Matrix<F> {
        assert_eq!(data.len(), rows * cols, "{rows} rows of {cols} elements");
        Matrix { rows, cols, data: data.to_vec() }
    }

    pub(crate) fn row(&self, i: usize) -> &[F] {
        &self.data[i * self.cols..][..self.cols]
    }

    pub(crate) fn row_mut(&mut self, i: usize) -> &mut [F] {
        &mut self.data[i * self.cols..][..self.cols]
    }

    pub(crate) fn at(&self, i: usize, j: usize) -> F {
        self.row(i)[j]
    }

    pub(crate) fn set(&mut self, i: usize, j: usize, x: F) {
        self.row_mut(i)[j] = x;
    }

    pub(crate) fn transpose(&self) -> Matrix<F> {
        let mut out = Matrix::zeros(self.cols, self.rows);
        for i in 0..self.rows {
            for j in 0..self.cols {
                out.set(j, i, self.at(i, j));
            }
        }
        out
    }

    /// `self * other`
    pub(crate) fn times(&self, other: &Matrix<F>) -> Matrix<F> {
        debug_assert_eq!(self.cols, other.rows, "inner dimensions");
        let mut out = Matrix::zeros(self.rows, other.cols);
        for i in 0..self.rows {
            for (j, &x) in self.row(i).iter().enumerate() {
                axpy(out.row_mut(i), x, other.row(j));
            }
        }
        out
    }

    /// `self^T * other`
    pub(crate) fn t_times(&self, other: &Matrix<F>) -> Matrix<F> {
        debug_assert_eq!(self.rows, other.rows, "inner dimensions");
        let mut out = Matrix::zeros(self.cols, other.cols);
        for i in 0..self.rows {
            for (j, &x) in self.row(i).iter().enumerate() {
                axpy(out.row_mut(j), x, other.row(i));
            }
        }
        out
    }

    /// `self * other^T`
    pub(crate) fn times_t(&self, other: &Matrix<F>) -> Matrix<F> {
        self.times(&other.transpose())
    }

    /// Adds `other`.
    pub(crate) fn plus(mut self, other: &Matrix<F>) -> Matrix<F> {
        axpy(&mut self.data, F::one(), &other.data);
        self
    }

    /// Subtracts `other`.
    pub(crate) fn minus(mut self, other: &Matrix<F>) -> Matrix<F> {
        axpy(&mut self.data, -F::one(), &other.data);
        self
    }

    /// Multiplies every element.
    pub(crate) fn scaled(mut self, factor: F) -> Matrix<F> {
        for x in &mut self.data {
            *x = *x * factor;
        }
        self
    }

    /// Multiplies row i by element i.
    pub(crate) fn rows_scaled(mut self, factors: &[F]) -> Matrix<F> {
        debug_assert_eq!(self.rows, factors.len(), "one factor per row");
        for (i, &factor) in factors.iter().enumerate() {
            for x in self.row_mut(i) {
                *x = *x * factor;
            }
        }
        self
    }

    /// Multiplies element by element.
    pub(crate) fn hadamard(mut self, other: &Matrix<F>) -> Matrix<F> {
        debug_assert_eq!((self.rows, self.cols), (other.rows, other.cols), "equal dimensions");
        for (x, &y) in self.data.iter_mut().zip(&other.data) {
            *x = *x * y;
        }
        self
    }

    /// Keeps what is below the diagonal.
    pub(crate) fn strictly_lower(mut self) -> Matrix<F> {
        for i in 0..self.rows {
            for x in self.row_mut(i).iter_mut().skip(i) {
                *x = F::zero();
            }
        }
        self
    }

    /// Sum of each row of `self * other`, element by element.
    pub(crate) fn row_dots(&self, other: &Matrix<F>) -> Vec<F> {
        (0..self.rows).map(|i| dot(self.row(i), other.row(i))).collect()
    }

    /// Sum of each column.
    pub(crate) fn col_sums(&self) -> Vec<F> {
        let mut out = vec![F::zero(); self.cols];
        for i in 0..self.rows {
            axpy(&mut out, F::one(), self.row(i));
        }
        out
    }
}

/// `y += factor * x`
pub(crate) fn axpy<F: Float>(y: &mut [F], factor: F, x: &[F]) {
    for (y, &x) in y.iter_mut().zip(x) {
        *y = *y + factor * x;
    }
}

/// Sum of `x * y`, in eight partial sums, which a compiler can keep in vector registers.
pub(crate) fn dot<F: Float>(x: &[F], y: &[F]) -> F {
    const LANES: usize = 8;
    let (x_blocks, x_rest) = x.as_chunks::<LANES>();
    let (y_blocks, y_rest) = y.as_chunks::<LANES>();
    let mut sums = [F::zero(); LANES];
    for (x, y) in x_blocks.iter().zip(y_blocks) {
        for i in 0..LANES {
            sums[i] = sums[i] + x[i] * y[i];
        }
    }
    let rest = x_rest.iter().zip(y_rest).fold(F::zero(), |sum, (&x, &y)| sum + x * y);
    sums.iter().fold(rest, |sum, &x| sum + x)
}

/// Sum of `x * y * z`
pub(crate) fn dot3<F: Float>(x: &[F], y: &[F], z: &[F]) -> F {
    x.iter().zip(y).zip(z).fold(F::zero(), |sum, ((&x, &y), &z)| sum + x * y * z)
}

/// `out += factor * x * y`, element by element.
pub(crate) fn axpy2<F: Float>(out: &mut [F], factor: F, x: &[F], y: &[F]) {
    for ((out, &x), &y) in out.iter_mut().zip(x).zip(y) {
        *out = *out + factor * x * y;
    }
}
