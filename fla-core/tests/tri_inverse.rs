//! Inverses of unit lower triangular matrices against substitution in double precision.

#[path = "kernels/support.rs"]
mod support;

use std::mem::offset_of;
use std::sync::Arc;

use fla_core::cudarc::driver::CudaStream;
use fla_core::testing::{Guarded, gpu, run_cases};
use fla_core::{Device, Error, Field, Grid, Params, Ptr, PtrMut, Source, Unit};
use fla_reference::inputs::Rng;

const SOURCE: Source =
    Source { name: "fla/test/tri_inverse.cu", text: include_str!("kernels/tri_inverse.cu") };

/// Twin of `fla::test::TriInverseParams`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct TriInverseParams {
    l: Ptr<f32>,
    y: PtrMut<f32>,
}

// SAFETY: `#[repr(C)]`, and the fields are listed in order.
unsafe impl Params for TriInverseParams {
    const CUDA_TYPE: &'static str = "fla::test::TriInverseParams";
    const FIELDS: &'static [Field] = &[
        Field::new("l", "const float*", offset_of!(Self, l)),
        Field::new("y", "float*", offset_of!(Self, y)),
    ];
}

/// What L is made of.
#[derive(Clone, Copy, Debug)]
enum Keys {
    /// L is 0.
    Zero,
    /// Products of keys of unit length in random directions, with write strengths in [0, 1].
    Random,
    /// The same with keys about one direction: a cosine of 0.9 between any two.
    Correlated,
    /// One key again and again with write strength 1: every element is 1.
    Repeated,
    /// Repeated keys of alternating sign: elements 1 and -1.
    Alternating,
}

/// How merges round; the enum of the kernels.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Merge {
    Tf32,
    Tf32x3,
}

#[derive(Clone, Copy)]
struct Case {
    c: usize,
    keys: Keys,
    merge: Merge,
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for c in [16, 32, 64] {
        for merge in [Merge::Tf32, Merge::Tf32x3] {
            let keys = [Keys::Zero, Keys::Random, Keys::Correlated, Keys::Repeated, Keys::Alternating];
            cases.extend(keys.map(|keys| Case { c, keys, merge }));
        }
    }
    cases
}

impl Case {
    fn name(&self) -> String {
        format!("{} rows, {:?}, {:?}", self.c, self.keys, self.merge)
    }

    fn unit(&self) -> Unit {
        Unit::new::<TriInverseParams>("test", "tri_inverse", SOURCE, if self.c == 64 { 64 } else { 32 })
            .with("C", self.c as i32)
            .with("TF32X3", self.merge == Merge::Tf32x3)
    }

    fn run(&self, device: &Device, stream: &Arc<CudaStream>, l: &[f32]) -> Result<Vec<Vec<f32>>, Error> {
        let kernel = device.kernel::<TriInverseParams>(&self.unit())?;
        let l_in = Guarded::input(stream, "l", l);
        let mut y = Guarded::<f32>::output(stream, "y", l.len());
        let (l_view, mut y_view) = (l_in.view(), y.view_mut());
        kernel.launch(stream, Grid::x(1), |bind| TriInverseParams {
            l: bind.read("l", &l_view),
            y: bind.write("y", &mut y_view),
        })?;
        Ok(vec![y.read()])
    }

    /// L, with what must not be read on and above the diagonal.
    fn lower(&self) -> Vec<f32> {
        const WIDTH: usize = 64;
        let c = self.c;
        let mut rng = Rng::new(10);
        let directions = rng.unit_rows::<f64>(c + 1, WIDTH);
        let strength: Vec<f64> = rng.uniform(c, 0.0, 1.0);
        let key = |i: usize, shared: f64| -> Vec<f64> {
            let common = &directions[c * WIDTH..];
            let own = &directions[i * WIDTH..(i + 1) * WIDTH];
            let key: Vec<f64> = common
                .iter()
                .zip(own)
                .map(|(common, own)| shared.sqrt() * common + (1.0 - shared).sqrt() * own)
                .collect();
            let length = key.iter().map(|x| x * x).sum::<f64>().sqrt();
            key.into_iter().map(|x| x / length).collect()
        };
        let product = |i: usize, j: usize, shared: f64| -> f64 {
            key(i, shared).iter().zip(key(j, shared)).map(|(a, b)| a * b).sum()
        };
        let mut l = vec![f32::NAN; c * c];
        for i in 0..c {
            for j in 0..i {
                l[i * c + j] = match self.keys {
                    Keys::Zero => 0.0,
                    Keys::Random => strength[i] * product(i, j, 0.0),
                    Keys::Correlated => strength[i] * product(i, j, 0.9),
                    Keys::Repeated => 1.0,
                    Keys::Alternating => 1.0 - 2.0 * ((i + j) % 2) as f64,
                } as f32;
            }
        }
        l
    }

    /// Largest error of an element as a multiple of the product |X| |I + L| |X|, which bounds how far roundings of
    /// the elements of the factors by one unit move the inverse X.
    fn limit(&self) -> f64 {
        // Substitution of 16 rows: 16 roundings of half a unit.
        let substitution = 16.0 * 0.5f64.powi(24);
        // The two products of a merge, each over C / 2 terms whose additions may cut off a unit of f32, with both
        // operands rounded: by half a unit of 11 bits, or of twice as many; three such products in a merge's two
        // levels meet in one element at most.
        let rounding = if self.merge == Merge::Tf32 { 2.0 * 0.5f64.powi(11) } else { 4.0 * 0.5f64.powi(22) };
        let merge = 2.0 * (rounding + self.c as f64 / 2.0 * 0.5f64.powi(23));
        match self.c {
            16 => substitution,
            32 => substitution + merge,
            _ => substitution + 2.0 * merge,
        }
    }

    fn check(&self, device: &Device, stream: &Arc<CudaStream>) -> Result<(), String> {
        let c = self.c;
        let l = self.lower();
        let y = support::twice(|| self.run(device, stream, &l))?;
        let unit_lower = |i: usize, j: usize| match i.cmp(&j) {
            std::cmp::Ordering::Less => 0.0,
            std::cmp::Ordering::Equal => 1.0,
            std::cmp::Ordering::Greater => f64::from(l[i * c + j]),
        };
        let mut x = vec![0.0; c * c];
        for j in 0..c {
            x[j * c + j] = 1.0;
            for i in j + 1..c {
                x[i * c + j] = -(j..i).map(|k| unit_lower(i, k) * x[k * c + j]).sum::<f64>();
            }
        }
        let product = |a: &dyn Fn(usize, usize) -> f64, b: &dyn Fn(usize, usize) -> f64| -> Vec<f64> {
            let sum = |i: usize, j: usize| (0..c).map(|k| (a(i, k) * b(k, j)).abs()).sum();
            (0..c * c).map(|place| sum(place / c, place % c)).collect()
        };
        let inverse = |i: usize, j: usize| x[i * c + j];
        let left = product(&inverse, &unit_lower);
        let condition = product(&|i, j| left[i * c + j], &inverse);
        // Above the diagonal the bound is 0: those elements are exact zeros.
        support::within("y", &y[0], &x, |place| self.limit() * condition[place])
    }
}

#[test]
fn inverses_match_substitution() {
    let Some((device, stream)) = gpu("inverses_match_substitution") else { return };
    run_cases(&cases(), Case::name, |case| case.check(&device, &stream));
}

#[test]
fn tri_inverse_compiles_everywhere() {
    let mut units = Vec::new();
    for c in [16, 32, 64] {
        units.extend([Merge::Tf32, Merge::Tf32x3].map(|merge| Case { c, keys: Keys::Zero, merge }.unit()));
    }
    support::compile_everywhere("tri_inverse_compiles_everywhere", &units, |_| true);
}
