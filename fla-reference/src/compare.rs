//! How far a result is from what was expected: one metric for everybody.

use num_traits::ToPrimitive;

/// Root of the mean square of `got - want`, relative to that of `want`, in double precision.
///
/// The largest magnitude of `got` when `want` is zero throughout, and infinity when either holds a value that is not
/// finite: such a result is never close to anything.
///
/// # Panics
///
/// When the lengths differ.
pub fn relative_rms<A: ToPrimitive, B: ToPrimitive>(got: &[A], want: &[B]) -> f64 {
    relative_rms_beyond(got, want, 0.0)
}

/// Half the distance of f16's smallest numbers, which no rounding to f16 can beat: gradients of vanished decays lie there.
pub const F16_SPACING: f64 = 1.0 / 33_554_432.0;

/// The same, with `slack` taken off every difference: what storing a result cannot but lose.
///
/// # Panics
///
/// When the lengths differ.
pub fn relative_rms_beyond<A: ToPrimitive, B: ToPrimitive>(got: &[A], want: &[B], slack: f64) -> f64 {
    assert_eq!(got.len(), want.len(), "got and want have the same length");
    // Scaled by the largest magnitude, so that squares neither overflow nor vanish.
    let scale = want.iter().map(magnitude).fold(0.0, f64::max);
    if !(scale.is_finite() && first_non_finite(got).is_none()) {
        return f64::INFINITY;
    }
    if scale == 0.0 {
        return (got.iter().map(magnitude).fold(0.0, f64::max) - slack).max(0.0);
    }
    let mut error = 0.0;
    let mut size = 0.0;
    for (got, want) in got.iter().zip(want) {
        let want = number(want) / scale;
        let difference = ((number(got) / scale - want).abs() - slack / scale).max(0.0);
        error += difference * difference;
        size += want * want;
    }
    (error / size).sqrt()
}

/// The largest [`relative_rms`] among `groups` equal, contiguous parts of the tensors, so that one wrong sequence
/// cannot hide in the whole.
///
/// # Panics
///
/// When the lengths differ or are no multiple of `groups`.
pub fn worst_relative_rms<A: ToPrimitive, B: ToPrimitive>(got: &[A], want: &[B], groups: usize) -> f64 {
    assert_eq!(got.len(), want.len(), "got and want have the same length");
    assert!(
        groups > 0 && got.len().is_multiple_of(groups),
        "{} elements in {groups} equal groups",
        got.len()
    );
    let len = (got.len() / groups).max(1);
    got.chunks(len).zip(want.chunks(len)).map(|(got, want)| relative_rms(got, want)).fold(0.0, f64::max)
}

/// The largest magnitude of `got - want`; infinity when either holds a value that is not finite.
///
/// # Panics
///
/// When the lengths differ.
pub fn max_abs<A: ToPrimitive, B: ToPrimitive>(got: &[A], want: &[B]) -> f64 {
    assert_eq!(got.len(), want.len(), "got and want have the same length");
    got.iter().zip(want).map(|(got, want)| (number(got) - number(want)).abs()).fold(
        0.0,
        |worst, difference| if difference.is_nan() { f64::INFINITY } else { worst.max(difference) },
    )
}

/// Index of the first value that is infinite or not a number.
pub fn first_non_finite<A: ToPrimitive>(x: &[A]) -> Option<usize> {
    x.iter().position(|x| !number(x).is_finite())
}

/// What has no double of its own counts as not a number.
fn number<A: ToPrimitive>(x: &A) -> f64 {
    x.to_f64().unwrap_or(f64::NAN)
}

/// Magnitude, with infinity for what is not a number, which a maximum would pass over.
fn magnitude<A: ToPrimitive>(x: &A) -> f64 {
    let x = number(x).abs();
    if x.is_nan() { f64::INFINITY } else { x }
}
