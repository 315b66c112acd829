//! Bulk copies of tiles that lie inside, across and outside the edges of a matrix.

#[path = "kernels/support.rs"]
mod support;

use std::mem::offset_of;
use std::sync::Arc;

use fla_core::cudarc::driver::CudaStream;
use fla_core::testing::{Guarded, Poison, gpu, run_cases};
use fla_core::{
    Arch, Device, Error, Field, Grid, Matrix, Params, Ptr, PtrMut, Source, Swizzle, TensorMap, Unit,
};
use fla_reference::inputs::Rng;
use half::bf16;

const SOURCE: Source = Source { name: "fla/test/tma.cu", text: include_str!("kernels/tma.cu") };
const TILE: usize = 64;
const LINE: usize = 256;

/// Twin of `fla::test::TmaParams`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct TmaParams {
    x: TensorMap,
    y: TensorMap,
    line: Ptr<f32>,
    line_y: PtrMut<f32>,
    seen: PtrMut<f32>,
    row: i32,
    col: i32,
}

// SAFETY: `#[repr(C)]`, and the fields are listed in order.
unsafe impl Params for TmaParams {
    const CUDA_TYPE: &'static str = "fla::test::TmaParams";
    const FIELDS: &'static [Field] = &[
        Field::new("x", "fla::TensorMap", offset_of!(Self, x)),
        Field::new("y", "fla::TensorMap", offset_of!(Self, y)),
        Field::new("line", "const float*", offset_of!(Self, line)),
        Field::new("line_y", "float*", offset_of!(Self, line_y)),
        Field::new("seen", "float*", offset_of!(Self, seen)),
        Field::new("row", "fla::i32", offset_of!(Self, row)),
        Field::new("col", "fla::i32", offset_of!(Self, col)),
    ];
}

struct Case {
    name: &'static str,
    rows: usize,
    cols: usize,
    row_stride: usize,
    /// Where the tile starts.
    row: i32,
    col: i32,
}

const BASE: Case = Case { name: "the whole matrix", rows: 64, cols: 64, row_stride: 64, row: 0, col: 0 };
const CASES: &[Case] = &[
    BASE,
    Case { name: "in the middle", rows: 200, cols: 256, row_stride: 256, row: 101, col: 96 },
    Case { name: "one row", rows: 1, ..BASE },
    Case { name: "a tail of rows", rows: 100, row: 64, ..BASE },
    Case { name: "a tail of columns", rows: 100, cols: 200, row_stride: 208, row: 7, col: 192 },
    Case { name: "the last element", rows: 77, cols: 88, row_stride: 96, row: 76, col: 80 },
    Case { name: "before the first row", rows: 90, cols: 88, row_stride: 96, row: -9, col: 0 },
    Case { name: "before the first column", rows: 90, cols: 88, row_stride: 96, row: 0, col: -24 },
    Case { name: "before the first element", rows: 90, cols: 88, row_stride: 96, row: -9, col: -24 },
    Case { name: "outside", rows: 64, cols: 64, row: 64, col: 0, ..BASE },
];

impl Case {
    fn matrix(&self) -> Matrix {
        let &Self { rows, cols, row_stride, .. } = self;
        Matrix { rows, cols, row_stride, tile_rows: TILE, tile_cols: TILE, swizzle: Swizzle::Bytes128 }
    }

    /// Where element (`row`, `col`) of the tile is in memory, when it is in the matrix.
    fn place(&self, row: usize, col: usize) -> Option<usize> {
        let row = usize::try_from(self.row + row as i32).ok().filter(|row| *row < self.rows)?;
        let col = usize::try_from(self.col + col as i32).ok().filter(|col| *col < self.cols)?;
        Some(row * self.row_stride + col)
    }

    fn run(
        &self,
        device: &Device,
        stream: &Arc<CudaStream>,
        x: &[bf16],
        line: &[f32],
    ) -> Result<Vec<Vec<f32>>, Error> {
        let kernel = device.kernel::<TmaParams>(&unit())?;
        let x_in = Guarded::input(stream, "x", x);
        let line = Guarded::input(stream, "line", line);
        let mut y = Guarded::<bf16>::output(stream, "y", x.len());
        let mut line_y = Guarded::<f32>::output(stream, "line_y", LINE);
        let mut seen = Guarded::<f32>::output(stream, "seen", TILE * TILE);
        let (x_view, y_view, line_view) = (x_in.view(), y.view_mut(), line.view());
        let (mut line_y_view, mut seen_view) = (line_y.view_mut(), seen.view_mut());
        let (x_map, x_guard) = TensorMap::new(stream, &x_view, &self.matrix())?;
        let (y_map, y_guard) = TensorMap::new(stream, &y_view, &self.matrix())?;
        kernel.launch(stream, Grid::x(1), |bind| TmaParams {
            x: x_map,
            y: y_map,
            line: bind.read("line", &line_view),
            line_y: bind.write("line_y", &mut line_y_view),
            seen: bind.write("seen", &mut seen_view),
            row: self.row,
            col: self.col,
        })?;
        drop((x_guard, y_guard));
        let y = y.read().into_iter().map(bf16::to_f32).collect();
        Ok(vec![y, line_y.read(), seen.read()])
    }

    fn check(&self, device: &Device, stream: &Arc<CudaStream>) -> Result<(), String> {
        let mut rng = Rng::new(5);
        let line = rng.normal::<f32>(LINE, 1.0);
        // Between the rows of the matrix lies what no copy may read.
        let x: Vec<bf16> = rng
            .normal::<f32>(self.rows * self.row_stride, 1.0)
            .into_iter()
            .enumerate()
            .map(|(i, x)| if i % self.row_stride < self.cols { bf16::from_f32(x) } else { bf16::POISON })
            .collect();
        let y = support::twice(|| self.run(device, stream, &x, &line))?;

        let mut seen = vec![0.0; TILE * TILE];
        let mut written = vec![None; x.len()];
        for (i, seen) in seen.iter_mut().enumerate() {
            if let Some(place) = self.place(i / TILE, i % TILE) {
                *seen = f64::from(x[place].to_f32());
                if self.row >= 0 && self.col >= 0 {
                    written[place] = Some(2.0 * *seen);
                }
            }
        }
        support::within("seen", &y[2], &seen, |_| 0.0)?;
        let line: Vec<f64> = line.into_iter().map(f64::from).collect();
        support::within("line_y", &y[1], &line, |_| 0.0)?;
        for (i, (got, want)) in y[0].iter().zip(written).enumerate() {
            let right = match want {
                Some(want) => f64::from(*got) == want,
                None => got.to_bits() == bf16::POISON.to_f32().to_bits(),
            };
            if !right {
                return Err(format!(
                    "`y`: element {i} is {got:e} instead of {want:?}, where none is not written"
                ));
            }
        }
        Ok(())
    }
}

fn unit() -> Unit {
    Unit::new::<TmaParams>("test", "tma", SOURCE, 128)
}

#[test]
fn bulk_copies_move_tiles() {
    let Some((device, stream)) = gpu("bulk_copies_move_tiles") else { return };
    if !device.arch().has_tma() {
        eprintln!("bulk_copies_move_tiles: skipped, bulk copies need sm_90, this is {}", device.arch());
        return;
    }
    run_cases(CASES, |case| case.name.into(), |case| case.check(&device, &stream));
}

#[test]
fn tma_compiles_everywhere() {
    support::compile_everywhere("tma_compiles_everywhere", &[unit()], Arch::has_tma);
}
