//! Operands in one part and two and in tf32, loaded in every way, and products of them against loops.

#[path = "kernels/support.rs"]
mod support;

use std::mem::offset_of;
use std::sync::Arc;

use fla_core::cudarc::driver::CudaStream;
use fla_core::testing::{Guarded, Poison, gpu, run_cases};
use fla_core::{DType, Device, Element, Error, Field, Grid, Params, Ptr, PtrMut, Source, Unit};
use fla_reference::inputs::Rng;
use half::{bf16, f16};

const SOURCE: Source = Source { name: "fla/test/blocks.cu", text: include_str!("kernels/blocks.cu") };

/// Rows of a tile, and of a result.
const ROWS: usize = 16;

/// Results of the kernel.
const RESULTS: usize = 9;

/// Twin of `fla::test::BlocksParams`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct BlocksParams<T> {
    a: Ptr<T>,
    b: Ptr<T>,
    y: PtrMut<f32>,
}

// SAFETY: `#[repr(C)]`, and the fields are listed in order.
unsafe impl<T: Element> Params for BlocksParams<T> {
    const CUDA_TYPE: &'static str = "fla::test::BlocksParams<Cfg::T>";
    const FIELDS: &'static [Field] = &[
        Field::new("a", "const Cfg::T*", offset_of!(Self, a)),
        Field::new("b", "const Cfg::T*", offset_of!(Self, b)),
        Field::new("y", "float*", offset_of!(Self, y)),
    ];
}

#[derive(Clone, Copy, Debug)]
struct Case {
    dtype: DType,
    parts: usize,
    cols: usize,
    /// Whether the product of both low parts counts.
    whole: bool,
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for dtype in [DType::Bf16, DType::F16, DType::F32] {
        for cols in [16, 48, 64] {
            cases.push(Case { dtype, parts: 1, cols, whole: false });
            cases.extend([false, true].map(|whole| Case { dtype, parts: 2, cols, whole }));
        }
    }
    cases
}

/// A result in double precision with a bound for the error of each element.
struct Bounded {
    value: Vec<f64>,
    error: Vec<f64>,
}

impl Case {
    fn unit(&self) -> Unit {
        match self.dtype {
            DType::F32 => self.typed_unit::<f32>(),
            DType::Bf16 => self.typed_unit::<bf16>(),
            DType::F16 => self.typed_unit::<f16>(),
        }
    }

    fn typed_unit<T: Element>(&self) -> Unit {
        Unit::new::<BlocksParams<T>>("test", "blocks", SOURCE, 32)
            .with("T", T::DTYPE)
            .with("PARTS", self.parts as i32)
            .with("COLS", self.cols as i32)
            .with("WHOLE", self.whole)
    }

    fn run<T: Poison>(
        &self,
        device: &Device,
        stream: &Arc<CudaStream>,
        a: &[T],
        b: &[T],
    ) -> Result<Vec<Vec<f32>>, Error> {
        let kernel = device.kernel::<BlocksParams<T>>(&self.unit())?;
        let (a, b) = (Guarded::input(stream, "a", a), Guarded::input(stream, "b", b));
        let mut y = Guarded::<f32>::output(stream, "y", RESULTS * ROWS * ROWS);
        let (a_view, b_view, mut y_view) = (a.view(), b.view(), y.view_mut());
        kernel.launch(stream, Grid::x(1), |bind| BlocksParams {
            a: bind.read("a", &a_view),
            b: bind.read("b", &b_view),
            y: bind.write("y", &mut y_view),
        })?;
        Ok(y.read().chunks(ROWS * ROWS).map(<[f32]>::to_vec).collect())
    }

    /// What an operand misses of a number, relative to it: half a unit in the last place of its parts, or nothing.
    fn operand_error(&self) -> f64 {
        let bits = 8 * self.parts as i32;
        match self.dtype {
            DType::Bf16 => 0.0,
            DType::F16 if self.parts == 2 => 0.0,
            DType::F16 | DType::F32 => 0.5f64.powi(bits),
        }
    }

    /// What tf32 misses of a number, relative to it: its 11 significant bits hold those of 16-bit floats.
    fn tf32_error(&self) -> f64 {
        if self.dtype == DType::F32 { 0.5f64.powi(11) } else { 0.0 }
    }

    /// y[i, j] = sum of `terms(i, j)`, pairs of factors, as operands in parts.
    fn product(&self, terms: impl Fn(usize, usize) -> Vec<(f64, f64)>) -> Bounded {
        let operand = self.operand_error();
        // What both factors miss, and the product of low parts, each at most 2^-8 of its number.
        let low = if self.parts == 2 && !self.whole { 0.5f64.powi(16) } else { 0.0 };
        Self::sums((2.0 + operand) * operand + low, self.parts * self.parts, terms)
    }

    /// The same with this relative error of a product, each of which is so many.
    fn sums(relative: f64, products: usize, terms: impl Fn(usize, usize) -> Vec<(f64, f64)>) -> Bounded {
        let (mut value, mut error) = (Vec::new(), Vec::new());
        for (i, j) in (0..ROWS).flat_map(|i| (0..ROWS).map(move |j| (i, j))) {
            let terms = terms(i, j);
            let magnitude: f64 = terms.iter().map(|(x, y)| (x * y).abs()).sum();
            // Products of parts are exact; each addition may cut off a unit in the last place of the sum.
            let additions = (products * terms.len() + 1) as f64 * f64::from(f32::EPSILON);
            value.push(terms.iter().map(|(x, y)| x * y).sum());
            error.push((relative + additions * (1.0 + relative)) * magnitude);
        }
        Bounded { value, error }
    }

    /// Every result of the kernel.
    fn want(&self, a: impl Fn(usize, usize) -> f64, b: impl Fn(usize, usize) -> f64) -> [Bounded; RESULTS] {
        let last = self.cols - ROWS;
        let over_cols = || self.product(|i, j| (0..self.cols).map(|l| (a(i, l), b(j, l))).collect());
        let over_rows = || self.product(|i, j| (0..ROWS).map(|l| (a(l, i), b(l, last + j))).collect());
        let tril = self.product(|i, j| (0..=j).map(|l| (a(i, l), b(j, l))).collect());
        let values = |of: &dyn Fn(usize, usize) -> f64, relative: f64| {
            let value: Vec<f64> = (0..ROWS * ROWS).map(|i| of(i / ROWS, i % ROWS)).collect();
            Bounded { error: value.iter().map(|x| x.abs() * relative).collect(), value }
        };
        let transposed = values(&|i, j| a(j, i), 0.0);
        let operand = values(&a, self.operand_error());
        let tf32 = self.tf32_error();
        let in_tf32 =
            Self::sums((2.0 + tf32) * tf32, 1, |i, j| (0..ROWS).map(|l| (a(i, l), b(j, l))).collect());
        let seen = values(&a, tf32);
        [over_cols(), over_cols(), over_rows(), over_rows(), tril, transposed, operand, in_tf32, seen]
    }

    fn check<T: Poison>(&self, device: &Device, stream: &Arc<CudaStream>) -> Result<(), String> {
        let mut rng = Rng::new(9);
        let mut draw = || {
            let numbers = rng.normal::<f32>(ROWS * self.cols, 1.0);
            numbers.into_iter().map(T::from_f32).collect::<Vec<T>>()
        };
        let (a, b) = (draw(), draw());
        let y = support::twice(|| self.run(device, stream, &a, &b))?;
        let at = |x: &[T], row: usize, col: usize| f64::from(x[row * self.cols + col].to_f32());
        let want = self.want(|row, col| at(&a, row, col), |row, col| at(&b, row, col));
        for (i, (got, want)) in y.iter().zip(&want).enumerate() {
            support::within(&format!("y_{i}"), got, &want.value, |i| want.error[i])?;
        }
        Ok(())
    }
}

#[test]
fn products_of_operands_match_loops() {
    let Some((device, stream)) = gpu("products_of_operands_match_loops") else { return };
    run_cases(
        &cases(),
        |case| format!("{case:?}"),
        |case| match case.dtype {
            DType::F32 => case.check::<f32>(&device, &stream),
            DType::Bf16 => case.check::<bf16>(&device, &stream),
            DType::F16 => case.check::<f16>(&device, &stream),
        },
    );
}

#[test]
fn blocks_compile_everywhere() {
    let units: Vec<Unit> = cases().iter().map(Case::unit).collect();
    support::compile_everywhere("blocks_compile_everywhere", &units, |_| true);
}
