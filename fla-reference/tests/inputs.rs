//! Generators give the numbers they promise, and rounding is to the nearest value of the format.

use fla_reference::inputs::{Gates, REGIMES, Rng, round_to};
use half::{bf16, f16};

#[test]
fn bits_are_those_of_splitmix64() {
    // The first outputs for seed 0 as its author publishes them.
    let mut rng = Rng::new(0);
    assert_eq!(rng.bits(), 0xe220_a839_7b1d_cdaf);
    assert_eq!(rng.bits(), 0x6e78_9e6a_a1b9_65f4);
}

#[test]
fn distributions_have_their_moments() {
    const N: usize = 100_000;
    let mean = |x: &[f64]| x.iter().sum::<f64>() / x.len() as f64;
    let mean_square = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    let normal: Vec<f64> = Rng::new(1).normal(N, 2.0);
    // Six standard errors: 2 / sqrt(N) for the mean, sqrt(2) * 4 / sqrt(N) for the square.
    assert!(mean(&normal).abs() < 0.038, "{}", mean(&normal));
    assert!((mean_square(&normal) - 4.0).abs() < 0.11, "{}", mean_square(&normal));
    let uniform: Vec<f64> = Rng::new(1).uniform(N, -1.0, 3.0);
    assert!(uniform.iter().all(|x| (-1.0..3.0).contains(x)));
    assert!((mean(&uniform) - 1.0).abs() < 0.022, "{}", mean(&uniform));
}

#[test]
fn unit_rows_have_unit_length() {
    let mut rng = Rng::new(1);
    let rows: Vec<f64> = rng.unit_rows(5, 7);
    for row in rows.chunks(7) {
        assert!((row.iter().map(|x| x * x).sum::<f64>() - 1.0).abs() < 1e-14);
    }
    assert_ne!(rows[..7], rows[7..14]);
    let repeated: Vec<f64> = rng.repeated_unit_rows(5, 7);
    assert!(repeated.chunks(7).all(|row| *row == repeated[..7]));
}

#[test]
fn gates_lie_in_their_regime() {
    for &regime in REGIMES.iter().chain(&[Gates::Weak, Gates::Strong, Gates::Extreme]) {
        let gates: Vec<f64> = Rng::new(1).gates(1000, regime);
        assert!(gates.iter().all(|g| g.is_finite() && *g <= 0.0), "{regime:?}");
        match regime {
            Gates::Constant(g) => assert!(gates.iter().all(|&x| x == g)),
            Gates::Rwkv7 => assert!(gates.iter().all(|g| (-0.6066..0.0).contains(g))),
            Gates::LogSigmoid => assert!(gates.iter().any(|g| *g < -1.0) && gates.iter().any(|g| *g > -0.3)),
            Gates::Mixed => {
                for g in [0.0, -1e-6, -20.0, -70.0] {
                    assert!(gates.contains(&g), "{g} is among mixed gates");
                }
            }
            Gates::Weak => assert!(gates.iter().all(|g| *g > -0.01) && gates.iter().any(|g| *g < -1e-3)),
            Gates::Strong => assert!(gates.iter().all(|g| (-5.5..=-4.5).contains(g))),
            Gates::Extreme => {
                let strongest = gates.iter().filter(|g| **g == -20.0).count();
                assert!((250..370).contains(&strongest), "{strongest}");
                assert!(gates.iter().all(|g| *g == -20.0 || *g > -1.0));
            }
        }
    }
}

#[test]
fn rounding_is_to_nearest_ties_to_even() {
    let (up, tiny) = (f64::powi(2.0, -7), f64::powi(2.0, -40));
    for sign in [1.0, -1.0] {
        for (x, want) in [
            (1.0 + up / 2.0, 1.0),
            (1.0 + 3.0 * up / 2.0, 1.0 + 2.0 * up),
            // A little past a tie: rounding to f32 first lands on the tie.
            (1.0 + up / 2.0 + tiny, 1.0 + up),
            (1.0 + 3.0 * up / 2.0 - tiny, 1.0 + up),
            (0.0, 0.0),
            (f64::MAX, f64::INFINITY),
            (1e-60, 0.0),
        ] {
            assert_eq!(round_to::<bf16, f64>(&[sign * x]), [sign * want], "{x} in bf16");
        }
    }
    let up = f64::powi(2.0, -10);
    for (x, want) in [
        (1.0 + up / 2.0, 1.0),
        (1.0 + up / 2.0 + tiny, 1.0 + up),
        (1.0 + 3.0 * up / 2.0 - tiny, 1.0 + up),
        (65519.9, 65504.0),
        (65520.0, f64::INFINITY),
        (f64::powi(2.0, -25), 0.0),
        (f64::powi(2.0, -25) * (1.0 + tiny), f64::powi(2.0, -24)),
    ] {
        assert_eq!(round_to::<f16, f64>(&[x]), [want], "{x} in f16");
    }
    assert_eq!(round_to::<f32, f64>(&[0.1]), [f64::from(0.1f32)]);
    assert_eq!(round_to::<f64, f64>(&[0.1]), [0.1]);
    assert!(round_to::<bf16, f32>(&[f32::NAN])[0].is_nan());
}

#[test]
fn rounded_values_stay() {
    let x: Vec<f32> = round_to::<bf16, f32>(&Rng::new(1).normal(1000, 3.0));
    assert!(x.iter().all(|&x| bf16::from_f32(x).to_f32() == x));
    assert_eq!(round_to::<bf16, f32>(&x), x);
}
