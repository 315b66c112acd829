//! Products of tiles, chained through registers, against loops.

#[path = "kernels/support.rs"]
mod support;

use std::mem::offset_of;
use std::sync::Arc;

use fla_core::cudarc::driver::CudaStream;
use fla_core::testing::{Guarded, Poison, gpu, run_cases};
use fla_core::{DType, Device, Element, Error, Field, Grid, Params, Ptr, PtrMut, Source, Unit};
use fla_reference::inputs::Rng;
use half::{bf16, f16};

const SOURCE: Source = Source { name: "fla/test/tile.cu", text: include_str!("kernels/tile.cu") };

/// Twin of `fla::test::TileParams`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct TileParams<T> {
    a: Ptr<T>,
    b: Ptr<T>,
    c: Ptr<T>,
    d: Ptr<f32>,
    y: PtrMut<f32>,
    z: PtrMut<T>,
    w: PtrMut<f32>,
    rows: i32,
}

// SAFETY: `#[repr(C)]`, and the fields are listed in order.
unsafe impl<T: Element> Params for TileParams<T> {
    const CUDA_TYPE: &'static str = "fla::test::TileParams<Cfg::T>";
    const FIELDS: &'static [Field] = &[
        Field::new("a", "const Cfg::T*", offset_of!(Self, a)),
        Field::new("b", "const Cfg::T*", offset_of!(Self, b)),
        Field::new("c", "const Cfg::T*", offset_of!(Self, c)),
        Field::new("d", "const float*", offset_of!(Self, d)),
        Field::new("y", "float*", offset_of!(Self, y)),
        Field::new("z", "Cfg::T*", offset_of!(Self, z)),
        Field::new("w", "float*", offset_of!(Self, w)),
        Field::new("rows", "fla::i32", offset_of!(Self, rows)),
    ];
}

/// In the order of the enum in the kernel.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Mask {
    None,
    Tril,
    StrictTril,
}

impl Mask {
    /// Where the tile begins in the matrix that the diagonal belongs to.
    const ROW: usize = 16;
    const COL: usize = 8;

    fn keeps(self, row: usize, col: usize) -> bool {
        match self {
            Self::None => true,
            Self::Tril => Self::ROW + row >= Self::COL + col,
            Self::StrictTril => Self::ROW + row > Self::COL + col,
        }
    }
}

struct Case {
    name: &'static str,
    dtype: DType,
    m: usize,
    n: usize,
    k: usize,
    a: Stored,
    b: Stored,
    mask: Mask,
    /// Rows that are there, of `d` and of `a` as it is stored.
    rows: usize,
}

/// How an operand lies in memory.
#[derive(Clone, Copy, PartialEq)]
enum Stored {
    AsIs,
    Transposed,
}

const BASE: Case = Case {
    name: "padded rows",
    dtype: DType::Bf16,
    m: 16,
    n: 16,
    k: 16,
    a: Stored::AsIs,
    b: Stored::AsIs,
    mask: Mask::None,
    rows: 16,
};
const CASES: &[Case] = &[
    BASE,
    Case { name: "padded rows, f16", dtype: DType::F16, ..BASE },
    Case { name: "padded rows, a transposed", a: Stored::Transposed, ..BASE },
    Case { name: "padded rows, b transposed", b: Stored::Transposed, ..BASE },
    Case { name: "padded rows of 48", m: 48, n: 32, k: 48, a: Stored::Transposed, rows: 48, ..BASE },
    Case { name: "swizzled", m: 32, n: 64, k: 64, rows: 32, ..BASE },
    Case { name: "swizzled, tril", m: 32, n: 64, k: 64, mask: Mask::Tril, rows: 32, ..BASE },
    Case { name: "swizzled, strict tril", m: 32, n: 64, k: 64, mask: Mask::StrictTril, rows: 32, ..BASE },
    Case { name: "swizzled, a transposed", m: 64, n: 32, k: 32, a: Stored::Transposed, rows: 32, ..BASE },
    Case { name: "swizzled, b transposed", m: 32, n: 32, k: 64, b: Stored::Transposed, rows: 32, ..BASE },
    Case { name: "swizzled, f16", dtype: DType::F16, m: 32, n: 64, k: 64, rows: 32, ..BASE },
    Case { name: "two panels", m: 16, n: 16, k: 128, b: Stored::Transposed, ..BASE },
    Case { name: "one row", m: 32, n: 64, k: 64, rows: 1, ..BASE },
    Case { name: "a tail of rows", m: 32, n: 32, k: 64, rows: 17, mask: Mask::Tril, ..BASE },
    Case { name: "no rows", m: 16, n: 32, k: 64, rows: 0, ..BASE },
];

struct Inputs<T> {
    a: Vec<T>,
    b: Vec<T>,
    c: Vec<T>,
    d: Vec<f32>,
}

/// A result in double precision with a bound for the error of each element.
struct Bounded {
    value: Vec<f64>,
    error: Vec<f64>,
}

impl Bounded {
    fn zeros(len: usize) -> Self {
        Self { value: vec![0.0; len], error: vec![0.0; len] }
    }
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
        Unit::new::<TileParams<T>>("test", "tile", SOURCE, 32)
            .with("T", T::DTYPE)
            .with("M", self.m as i32)
            .with("N", self.n as i32)
            .with("K", self.k as i32)
            .with("A_TRANS", self.a == Stored::Transposed)
            .with("B_TRANS", self.b == Stored::Transposed)
            .with("MASK", self.mask as i32)
    }

    /// Rows of `d` and of the results that are read and written.
    fn rows_out(&self) -> usize {
        self.rows.min(self.m)
    }

    fn run<T: Poison>(
        &self,
        device: &Device,
        stream: &Arc<CudaStream>,
        inputs: &Inputs<T>,
    ) -> Result<Vec<Vec<f32>>, Error> {
        let kernel = device.kernel::<TileParams<T>>(&self.unit())?;
        let a = Guarded::input(stream, "a", &inputs.a);
        let b = Guarded::input(stream, "b", &inputs.b);
        let c = Guarded::input(stream, "c", &inputs.c);
        let d = Guarded::input(stream, "d", &inputs.d);
        let mut y = Guarded::<f32>::output(stream, "y", self.rows_out() * self.n);
        let mut z = Guarded::<T>::output(stream, "z", self.rows_out() * self.n);
        let mut w = Guarded::<f32>::output(stream, "w", self.n * self.m);
        let (a_view, b_view, c_view, d_view) = (a.view(), b.view(), c.view(), d.view());
        let (mut y_view, mut z_view, mut w_view) = (y.view_mut(), z.view_mut(), w.view_mut());
        kernel.launch(stream, Grid::x(1), |bind| TileParams {
            a: bind.read("a", &a_view),
            b: bind.read("b", &b_view),
            c: bind.read("c", &c_view),
            d: bind.read("d", &d_view),
            y: bind.write("y", &mut y_view),
            z: bind.write("z", &mut z_view),
            w: bind.write("w", &mut w_view),
            rows: self.rows as i32,
        })?;
        let z = z.read().into_iter().map(T::to_f32).collect();
        Ok(vec![y.read(), z, w.read()])
    }

    /// x = mask(d + a b), where rows that are not there count as 0.
    fn product<T: Element>(&self, inputs: &Inputs<T>) -> Bounded {
        let &Self { m, n, k, .. } = self;
        let mut x = Bounded::zeros(m * n);
        for i in 0..m {
            for j in (0..n).filter(|&j| self.mask.keeps(i, j)) {
                let d = if i < self.rows { f64::from(inputs.d[i * n + j]) } else { 0.0 };
                let (mut sum, mut magnitude) = (d, d.abs());
                for l in 0..k {
                    let (row, place) = match self.a {
                        Stored::AsIs => (i, i * k + l),
                        Stored::Transposed => (l, l * m + i),
                    };
                    if row >= self.rows {
                        continue;
                    }
                    let b = match self.b {
                        Stored::AsIs => inputs.b[l * n + j],
                        Stored::Transposed => inputs.b[j * k + l],
                    };
                    let term = f64::from(inputs.a[place].to_f32()) * f64::from(b.to_f32());
                    sum += term;
                    magnitude += term.abs();
                }
                x.value[i * n + j] = sum;
                // Products are exact; each addition may cut off a unit in the last place of the sum.
                x.error[i * n + j] = (k + 1) as f64 * f64::from(f32::EPSILON) * magnitude;
            }
        }
        x
    }

    fn check<T: Poison>(&self, device: &Device, stream: &Arc<CudaStream>) -> Result<(), String> {
        let &Self { m, n, k, .. } = self;
        let mut rng = Rng::new(8);
        // Rows that are not there are not in memory either: reading them would meet the poison around.
        let a_len = match self.a {
            Stored::AsIs => self.rows.min(m) * k,
            Stored::Transposed => self.rows.min(k) * m,
        };
        let mut draw =
            |len: usize| rng.normal::<f32>(len, 1.0).into_iter().map(T::from_f32).collect::<Vec<T>>();
        let (a, b, c) = (draw(a_len), draw(k * n), draw(n * n));
        let inputs = Inputs { a, b, c, d: rng.normal(self.rows_out() * n, 1.0) };
        let y = support::twice(|| self.run(device, stream, &inputs))?;

        let x = self.product(&inputs);
        let out = self.rows_out() * n;
        support::within("y", &y[0], &x.value[..out], |i| x.error[i])?;

        // Rounding x to T: half a unit in its last place, 2^-8 or 2^-11 of it, above what x is off by itself.
        let half_unit = if self.dtype == DType::Bf16 { 0.5f64.powi(8) } else { 0.5f64.powi(11) };
        let mut z = Bounded::zeros(m * n);
        let mut w = Bounded::zeros(n * m);
        for i in 0..m {
            for j in 0..n {
                for l in 0..n {
                    let x_error = x.error[i * n + l];
                    let x_error = x_error + half_unit * (x.value[i * n + l].abs() + x_error);
                    let x = x.value[i * n + l];
                    let right = f64::from(inputs.c[l * n + j].to_f32());
                    let left = f64::from(inputs.c[j * n + l].to_f32());
                    z.value[i * n + j] += x * right;
                    w.value[j * m + i] += left * x;
                    let accumulation = (n + 1) as f64 * f64::from(f32::EPSILON) * (x.abs() + x_error);
                    z.error[i * n + j] += (x_error + accumulation) * right.abs();
                    w.error[j * m + i] += (x_error + accumulation) * left.abs();
                }
            }
        }
        support::within("z", &y[1], &z.value[..out], |i| {
            z.error[i] + half_unit * (z.value[i].abs() + z.error[i])
        })?;
        support::within("w", &y[2], &w.value, |i| w.error[i])
    }
}

#[test]
fn tiles_match_loops() {
    let Some((device, stream)) = gpu("tiles_match_loops") else { return };
    run_cases(
        CASES,
        |case| case.name.into(),
        |case| match case.dtype {
            DType::F32 => Err("tiles of f32 are no operands".into()),
            DType::Bf16 => case.check::<bf16>(&device, &stream),
            DType::F16 => case.check::<f16>(&device, &stream),
        },
    );
}

#[test]
fn tile_compiles_everywhere() {
    let units: Vec<Unit> = CASES.iter().map(Case::unit).collect();
    support::compile_everywhere("tile_compiles_everywhere", &units, |_| true);
}
