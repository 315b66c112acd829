//! How far a result is from what was expected: one metric for everybody.

use num_traits::ToPrimitive;

/// Root of the mean square of `got - want`, relative to that of `want`.
///
/// The largest magnitude of `got` when `want` is zero throughout, and infinity when `got` holds a value that is not finite.
pub fn relative_rms<A: ToPrimitive, B: ToPrimitive>(got: &[A], want: &[B]) -> f64 {
    unimplemented!()
}

/// The largest [`relative_rms`] among `groups` equal, contiguous parts of the tensors: a wrong head or sequence
/// that the whole tensor hides.
pub fn worst_relative_rms<A: ToPrimitive, B: ToPrimitive>(got: &[A], want: &[B], groups: usize) -> f64 {
    unimplemented!()
}

/// The largest magnitude of `got - want`; infinity when `got` holds a value that is not finite.
pub fn max_abs<A: ToPrimitive, B: ToPrimitive>(got: &[A], want: &[B]) -> f64 {
    unimplemented!()
}

/// Index of the first value that is infinite or not a number.
pub fn first_non_finite<A: ToPrimitive>(x: &[A]) -> Option<usize> {
    unimplemented!()
}
