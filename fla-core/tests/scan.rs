//! Cumulative sums over the rows of a chunk against loops.

#[path = "kernels/support.rs"]
mod support;

use std::mem::offset_of;
use std::sync::Arc;

use fla_core::cudarc::driver::CudaStream;
use fla_core::testing::{Guarded, gpu, run_cases};
use fla_core::{Device, Error, Field, Grid, Params, Ptr, PtrMut, Source, Unit};
use fla_reference::inputs::Rng;

const SOURCE: Source = Source { name: "fla/test/scan.cu", text: include_str!("kernels/scan.cu") };

/// Channels of the sums by column.
const K: usize = 48;

/// Twin of `fla::test::ScanParams`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct ScanParams {
    x: Ptr<f32>,
    x_columns: Ptr<f32>,
    y: PtrMut<f32>,
    y_columns: PtrMut<f32>,
    n: i32,
}

// SAFETY: `#[repr(C)]`, and the fields are listed in order.
unsafe impl Params for ScanParams {
    const CUDA_TYPE: &'static str = "fla::test::ScanParams";
    const FIELDS: &'static [Field] = &[
        Field::new("x", "const float*", offset_of!(Self, x)),
        Field::new("x_columns", "const float*", offset_of!(Self, x_columns)),
        Field::new("y", "float*", offset_of!(Self, y)),
        Field::new("y_columns", "float*", offset_of!(Self, y_columns)),
        Field::new("n", "fla::i32", offset_of!(Self, n)),
    ];
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Direction {
    Forward,
    Reverse,
}

#[derive(Clone, Copy, Debug)]
enum Values {
    /// Both signs, about 1.
    Normal,
    /// Each row a thousandth of the row before: what a difference of large sums would lose.
    Falling,
}

#[derive(Clone, Copy)]
struct Case {
    /// Rows of a whole chunk.
    c: usize,
    /// Rows that are there.
    n: usize,
    direction: Direction,
    values: Values,
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for direction in [Direction::Forward, Direction::Reverse] {
        for values in [Values::Normal, Values::Falling] {
            for (c, n) in
                [(16, 1), (16, 15), (16, 16), (32, 17), (32, 32), (64, 1), (64, 17), (64, 63), (64, 64)]
            {
                cases.push(Case { c, n, direction, values });
            }
        }
    }
    cases
}

impl Case {
    fn name(&self) -> String {
        format!("{} rows of a chunk of {}, {:?}, {:?}", self.n, self.c, self.direction, self.values)
    }

    fn unit(&self) -> Unit {
        Unit::new::<ScanParams>("test", "scan", SOURCE, 128)
            .with("C", self.c as i32)
            .with("REVERSE", self.direction == Direction::Reverse)
    }

    fn run(
        &self,
        device: &Device,
        stream: &Arc<CudaStream>,
        x: &[f32],
        x_columns: &[f32],
    ) -> Result<Vec<Vec<f32>>, Error> {
        let kernel = device.kernel::<ScanParams>(&self.unit())?;
        let x = Guarded::input(stream, "x", x);
        let x_columns = Guarded::input(stream, "x_columns", x_columns);
        let mut y = Guarded::<f32>::output(stream, "y", self.c);
        let mut y_columns = Guarded::<f32>::output(stream, "y_columns", self.c * K);
        let (x_view, x_columns_view) = (x.view(), x_columns.view());
        let (mut y_view, mut y_columns_view) = (y.view_mut(), y_columns.view_mut());
        kernel.launch(stream, Grid::x(1), |bind| ScanParams {
            x: bind.read("x", &x_view),
            x_columns: bind.read("x_columns", &x_columns_view),
            y: bind.write("y", &mut y_view),
            y_columns: bind.write("y_columns", &mut y_columns_view),
            n: self.n as i32,
        })?;
        Ok(vec![y.read(), y_columns.read()])
    }

    fn draw(&self, channels: usize) -> Vec<f32> {
        let x = Rng::new(9).normal::<f32>(self.n * channels, 1.0);
        match self.values {
            Values::Normal => x,
            // From 1 down to 1e-33 within 12 rows, and then from 1 again.
            Values::Falling => {
                x.iter().enumerate().map(|(i, x)| x * 1e-3f32.powi((i / channels % 12) as i32)).collect()
            }
        }
    }

    fn compare(&self, name: &str, got: &[f32], x: &[f32], channels: usize) -> Result<(), String> {
        let mut want = vec![0.0; self.c * channels];
        let mut limit = vec![0.0; self.c * channels];
        for i in 0..self.c {
            let rows = match self.direction {
                Direction::Forward => 0..self.n.min(i + 1),
                Direction::Reverse => i.min(self.n)..self.n,
            };
            for row in rows {
                for j in 0..channels {
                    let x = f64::from(x[row * channels + j]);
                    want[i * channels + j] += x;
                    // Of C additions at most, each rounds to half a unit of a sum of some of these terms alone.
                    limit[i * channels + j] += self.c as f64 * f64::from(f32::EPSILON) / 2.0 * x.abs();
                }
            }
        }
        support::within(name, got, &want, |i| limit[i])
    }

    fn check(&self, device: &Device, stream: &Arc<CudaStream>) -> Result<(), String> {
        let (x, x_columns) = (self.draw(1), self.draw(K));
        let y = support::twice(|| self.run(device, stream, &x, &x_columns))?;
        self.compare("y", &y[0], &x, 1)?;
        self.compare("y_columns", &y[1], &x_columns, K)
    }
}

#[test]
fn cumulative_sums_match_loops() {
    let Some((device, stream)) = gpu("cumulative_sums_match_loops") else { return };
    run_cases(&cases(), Case::name, |case| case.check(&device, &stream));
}

#[test]
fn scan_compiles_everywhere() {
    let mut units = Vec::new();
    for c in [16, 32, 64] {
        for direction in [Direction::Forward, Direction::Reverse] {
            units.push(Case { c, n: c, direction, values: Values::Normal }.unit());
        }
    }
    support::compile_everywhere("scan_compiles_everywhere", &units, |_| true);
}
