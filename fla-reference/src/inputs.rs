//! Seeded generators of inputs: the same numbers on every machine, and the regimes that break implementations.

use num_traits::Float;

use crate::maps::number;

/// A small, fast generator of pseudo-random numbers (SplitMix64).
#[derive(Clone, Debug)]
pub struct Rng {
    state: u64,
}

impl Rng {
    /// A generator whose numbers depend on `seed` alone.
    pub fn new(seed: u64) -> Rng {
        Rng { state: seed }
    }

    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number in [0, 1).
    pub fn unit(&mut self) -> f64 {
        // The upper 53 bits fill the significand of a double.
        (self.bits() >> 11) as f64 * (0.5f64).powi(53)
    }

    /// A number of the standard normal distribution.
    pub fn gauss(&mut self) -> f64 {
        // Box and Muller; 1 - unit() is never 0.
        let radius = (-2.0 * (1.0 - self.unit()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.unit()).cos()
    }

    /// `n` numbers in [`low`, `high`).
    pub fn uniform<F: Float>(&mut self, n: usize, low: f64, high: f64) -> Vec<F> {
        (0..n).map(|_| number(low + (high - low) * self.unit())).collect()
    }

    /// `n` numbers of the normal distribution with mean 0 and the given standard deviation.
    pub fn normal<F: Float>(&mut self, n: usize, deviation: f64) -> Vec<F> {
        (0..n).map(|_| number(deviation * self.gauss())).collect()
    }

    /// `rows` vectors of length 1 with `width` elements each.
    pub fn unit_rows<F: Float>(&mut self, rows: usize, width: usize) -> Vec<F> {
        let mut x = Vec::with_capacity(rows * width);
        for _ in 0..rows {
            let row: Vec<f64> = (0..width).map(|_| self.gauss()).collect();
            let norm = row.iter().map(|x| x * x).sum::<f64>().sqrt();
            x.extend(row.iter().map(|x| number::<F>(x / norm)));
        }
        x
    }

    /// The same vector of length 1 in every row: with write strength 1, the hardest case of a triangular inverse.
    pub fn repeated_unit_rows<F: Float>(&mut self, rows: usize, width: usize) -> Vec<F> {
        self.unit_rows(1, width).repeat(rows)
    }

    /// `n` log decays of the given regime.
    pub fn gates<F: Float>(&mut self, n: usize, regime: Gates) -> Vec<F> {
        (0..n)
            .map(|_| {
                number(match regime {
                    Gates::Constant(g) => g,
                    Gates::LogSigmoid => self.log_sigmoid(),
                    Gates::Rwkv7 => -0.606_530_659_712_633_4 / (1.0 + (-self.gauss()).exp()),
                    Gates::Weak => -1e-3 * self.gauss().abs(),
                    Gates::Strong => 0.5 * self.gauss().tanh() - 5.0,
                    Gates::Extreme => match self.gauss() {
                        x if x > 0.5 => -20.0,
                        x => -0.1 * x.abs(),
                    },
                    Gates::Mixed => match self.bits() % 5 {
                        0 => 0.0,
                        1 => -1e-6,
                        2 => -20.0,
                        3 => -70.0,
                        _ => self.log_sigmoid(),
                    },
                })
            })
            .collect()
    }

    fn log_sigmoid(&mut self) -> f64 {
        -(-self.gauss()).exp().ln_1p()
    }
}

/// Where log decays lie.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Gates {
    /// The same everywhere: 0 forgets nothing, -70 leaves nothing.
    Constant(f64),
    /// The logarithm of a sigmoid of a normal number, as gated models start out.
    LogSigmoid,
    /// RWKV-7's bounded decay, in (-0.6065, 0).
    Rwkv7,
    /// 0, -1e-6, -20, -70 and ordinary values side by side.
    Mixed,
    /// Some thousandths: what was written stays for a thousand tokens.
    Weak,
    /// From -5.5 to -4.5.
    Strong,
    /// -20 in about a third of all places, and some tenths in the others.
    Extreme,
}

/// The regimes that every pass has to survive.
pub const REGIMES: &[Gates] = &[
    Gates::Constant(0.0),
    Gates::Constant(-1e-6),
    Gates::Constant(-0.6065),
    Gates::Constant(-5.0),
    Gates::Constant(-20.0),
    Gates::Constant(-70.0),
    Gates::LogSigmoid,
    Gates::Rwkv7,
    Gates::Mixed,
];

/// A number format that inputs can be rounded to.
pub trait Storage {
    /// The nearest value of the format, ties to even.
    fn nearest(x: f64) -> f64;
}

impl Storage for f64 {
    fn nearest(x: f64) -> f64 {
        x
    }
}

impl Storage for f32 {
    fn nearest(x: f64) -> f64 {
        f64::from(x as f32)
    }
}

impl Storage for half::bf16 {
    fn nearest(x: f64) -> f64 {
        half::bf16::from_f32(to_odd(x)).to_f64()
    }
}

impl Storage for half::f16 {
    fn nearest(x: f64) -> f64 {
        half::f16::from_f32(to_odd(x)).to_f64()
    }
}

/// Rounds inputs to the format in which a kernel reads them, so that a reference reads the same numbers.
pub fn round_to<S: Storage, F: Float>(x: &[F]) -> Vec<F> {
    x.iter().map(|x| number(S::nearest(x.to_f64().unwrap_or(f64::NAN)))).collect()
}

/// Rounds to f32 so that a second rounding, to a narrower format, is that of `x` itself.
///
/// Rounding twice to nearest goes wrong when the first lands on a tie of the second. Here the first cuts off, and
/// marks what it cut off in the last bit, which no tie of a narrower format has set.
fn to_odd(x: f64) -> f32 {
    let nearest = x as f32;
    if f64::from(nearest) == x || x.is_nan() {
        return nearest;
    }
    let away = f64::from(nearest).abs() > x.abs();
    f32::from_bits((nearest.to_bits() - u32::from(away)) | 1)
}
