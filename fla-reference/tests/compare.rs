//! The error metric on values that can be checked by hand.

use fla_reference::compare::{
    F16_SPACING, first_non_finite, max_abs, relative_rms, relative_rms_beyond, worst_relative_rms,
};
use half::{bf16, f16};

#[test]
fn relative_rms_is_the_ratio_of_norms() {
    assert_eq!(relative_rms(&[3.0, 4.0], &[3.0, 4.0]), 0.0);
    assert_eq!(relative_rms(&[3.0, 5.0], &[3.0, 4.0]), 0.2);
    assert_eq!(relative_rms(&[3.0f32, 5.0], &[3.0, 4.0]), 0.2);
    assert_eq!(relative_rms(&[bf16::from_f32(3.0), bf16::from_f32(5.0)], &[3.0, 4.0]), 0.2);
    assert_eq!(relative_rms::<f64, f64>(&[], &[]), 0.0);
}

#[test]
fn relative_rms_survives_values_whose_squares_do_not() {
    for size in [1e-300, 1e300] {
        let error = relative_rms(&[3.0 * size, 5.0 * size], &[3.0 * size, 4.0 * size]);
        assert!((error - 0.2).abs() < 1e-15, "{error}");
    }
}

#[test]
fn what_storing_must_lose_is_no_error() {
    assert_eq!(relative_rms_beyond(&[3.0, 5.5], &[3.0, 4.0], 0.5), 0.2);
    let tiny = [1e-9, 3e-8, 4.2e-7, 1e-6];
    let stored: Vec<f64> = tiny.iter().map(|x| f16::from_f64(*x).to_f64()).collect();
    assert!(relative_rms(&stored, &tiny) > 1e-2);
    assert_eq!(relative_rms_beyond(&stored, &tiny, F16_SPACING), 0.0);
    assert_eq!(relative_rms_beyond(&[F16_SPACING, 1.0], &[0.0, 0.0], F16_SPACING), 1.0 - F16_SPACING);
}

#[test]
fn against_zero_the_largest_magnitude_counts() {
    assert_eq!(relative_rms(&[0.5, -2.0], &[0.0, 0.0]), 2.0);
}

#[test]
fn what_is_not_finite_is_infinitely_wrong() {
    for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        assert_eq!(relative_rms(&[1.0, bad], &[1.0, 1.0]), f64::INFINITY);
        assert_eq!(relative_rms(&[1.0, bad], &[0.0, 0.0]), f64::INFINITY);
        assert_eq!(relative_rms(&[1.0, bad], &[1.0, bad]), f64::INFINITY, "nor does it equal itself");
        assert_eq!(relative_rms(&[1.0, 1.0], &[1.0, bad]), f64::INFINITY);
        assert_eq!(max_abs(&[1.0, bad], &[1.0, 1.0]), f64::INFINITY);
        assert_eq!(max_abs(&[1.0, bad], &[1.0, bad]), f64::INFINITY);
        assert_eq!(worst_relative_rms(&[1.0, bad], &[1.0, 1.0], 2), f64::INFINITY);
        assert_eq!(first_non_finite(&[1.0, bad, bad]), Some(1));
    }
    assert_eq!(first_non_finite(&[1.0, f64::MAX]), None);
}

#[test]
fn one_wrong_part_cannot_hide() {
    let want = [1e6, 1e6, 1.0, 1.0];
    let got = [1e6, 1e6, 1.0, 2.0];
    assert!(relative_rms(&got, &want) < 1e-6);
    assert!(worst_relative_rms(&got, &want, 2) > 0.5);
    assert_eq!(worst_relative_rms::<f64, f64>(&[], &[], 3), 0.0);
}

#[test]
fn max_abs_is_the_largest_difference() {
    assert_eq!(max_abs(&[1.0, -2.0, 3.0], &[1.5, 2.0, 3.0]), 4.0);
}
