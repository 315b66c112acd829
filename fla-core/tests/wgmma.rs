//! One product of a warpgroup for every width, element type and place of its operands, against a loop.

#[path = "kernels/support.rs"]
mod support;

use std::mem::offset_of;
use std::sync::Arc;

use fla_core::cudarc::driver::CudaStream;
use fla_core::testing::{Guarded, Poison, gpu, run_cases};
use fla_core::{Arch, DType, Device, Element, Error, Field, Grid, Params, Ptr, PtrMut, Source, Unit};
use fla_reference::inputs::Rng;
use half::{bf16, f16};

const SOURCE: Source = Source { name: "fla/test/wgmma.cu", text: include_str!("kernels/wgmma.cu") };
const M: usize = 64;
const K: usize = 128;

/// Twin of `fla::test::WgmmaParams`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct WgmmaParams<T> {
    a: Ptr<T>,
    b: Ptr<T>,
    y: PtrMut<f32>,
}

// SAFETY: `#[repr(C)]`, and the fields are listed in order.
unsafe impl<T: Element> Params for WgmmaParams<T> {
    const CUDA_TYPE: &'static str = "fla::test::WgmmaParams<Cfg::T>";
    const FIELDS: &'static [Field] = &[
        Field::new("a", "const Cfg::T*", offset_of!(Self, a)),
        Field::new("b", "const Cfg::T*", offset_of!(Self, b)),
        Field::new("y", "float*", offset_of!(Self, y)),
    ];
}

/// Where the left operand lies: in shared memory with the inner dim contiguous or not, or in registers.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Left {
    KMajor,
    MMajor,
    Registers,
}

/// Where the right operand lies; with N contiguous it starts at a column of its tile.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Right {
    KMajor,
    NMajor { col: usize },
}

#[derive(Clone, Copy, Debug)]
struct Case {
    dtype: DType,
    n: usize,
    left: Left,
    right: Right,
    /// Warpgroups that multiply; with two, a third one gives them its registers first.
    warpgroups: usize,
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for dtype in [DType::Bf16, DType::F16] {
        for n in [16, 32, 64, 128] {
            for left in [Left::KMajor, Left::MMajor, Left::Registers] {
                for right in [Right::KMajor, Right::NMajor { col: 0 }] {
                    cases.push(Case { dtype, n, left, right, warpgroups: 1 });
                }
            }
            if n < 64 {
                let right = Right::NMajor { col: 64 - n };
                cases.push(Case { dtype, n, left: Left::KMajor, right, warpgroups: 1 });
            }
        }
    }
    let right = Right::NMajor { col: 0 };
    cases.push(Case { dtype: DType::Bf16, n: 128, left: Left::Registers, right, warpgroups: 2 });
    cases
}

impl Case {
    fn name(&self) -> String {
        let Self { dtype, n, left, right, warpgroups } = self;
        format!("{}, N {n}, left {left:?}, right {right:?}, {warpgroups} warpgroups", dtype.name())
    }

    /// Columns of the right operand's tile when N is contiguous.
    fn tile_cols(&self) -> usize {
        self.n.max(64)
    }

    fn unit(&self) -> Unit {
        match self.dtype {
            DType::F32 => self.typed_unit::<f32>(),
            DType::Bf16 => self.typed_unit::<bf16>(),
            DType::F16 => self.typed_unit::<f16>(),
        }
    }

    fn typed_unit<T: Element>(&self) -> Unit {
        let col = match self.right {
            Right::KMajor => 0,
            Right::NMajor { col } => col,
        };
        let threads = if self.warpgroups == 2 { 3 * 128 } else { 128 };
        Unit::new::<WgmmaParams<T>>("test", "wgmma", SOURCE, threads)
            .with("T", T::DTYPE)
            .with("N", self.n as i32)
            .with("A_MN", self.left == Left::MMajor)
            .with("A_REGISTERS", self.left == Left::Registers)
            .with("B_MN", self.right != Right::KMajor)
            .with("B_COL", col as i32)
            .with("SETMAXNREG", self.warpgroups == 2)
    }

    fn run<T: Poison>(
        &self,
        device: &Device,
        stream: &Arc<CudaStream>,
        a: &[T],
        b: &[T],
    ) -> Result<Vec<Vec<f32>>, Error> {
        let kernel = device.kernel::<WgmmaParams<T>>(&self.unit())?;
        let a = Guarded::input(stream, "a", a);
        let b = Guarded::input(stream, "b", b);
        let mut y = Guarded::<f32>::output(stream, "y", self.warpgroups * M * self.n);
        let (a_view, b_view, mut y_view) = (a.view(), b.view(), y.view_mut());
        kernel.launch(stream, Grid::x(1), |bind| WgmmaParams {
            a: bind.read("a", &a_view),
            b: bind.read("b", &b_view),
            y: bind.write("y", &mut y_view),
        })?;
        Ok(vec![y.read()])
    }

    fn check<T: Poison>(&self, device: &Device, stream: &Arc<CudaStream>) -> Result<(), String> {
        let n = self.n;
        let b_len = if self.right == Right::KMajor { n * K } else { K * self.tile_cols() };
        let mut rng = Rng::new(7);
        let mut draw =
            |len: usize| rng.normal::<f32>(len, 1.0).into_iter().map(T::from_f32).collect::<Vec<T>>();
        let (a, b) = (draw(M * K), draw(b_len));
        let y = support::twice(|| self.run(device, stream, &a, &b))?;

        let mut want = vec![0.0; M * n];
        let mut limit = vec![0.0; M * n];
        for i in 0..M {
            for j in 0..n {
                for k in 0..K {
                    let a = a[if self.left == Left::MMajor { k * M + i } else { i * K + k }];
                    let b = b[match self.right {
                        Right::KMajor => j * K + k,
                        Right::NMajor { col } => k * self.tile_cols() + col + j,
                    }];
                    let product = f64::from(a.to_f32()) * f64::from(b.to_f32());
                    want[i * n + j] += product;
                    // Products are exact; each addition may cut off a unit in the last place of the sum.
                    limit[i * n + j] += K as f64 * f64::from(f32::EPSILON) * product.abs();
                }
            }
        }
        let want = want.repeat(self.warpgroups);
        support::within("y", &y[0], &want, |i| limit[i % (M * n)])
    }
}

#[test]
fn wgmma_matches_loops() {
    let Some((device, stream)) = gpu("wgmma_matches_loops") else { return };
    if !device.arch().has_wgmma() {
        eprintln!("wgmma_matches_loops: skipped, wgmma needs sm_90a, this is {}", device.arch());
        return;
    }
    run_cases(&cases(), Case::name, |case| match case.dtype {
        DType::F32 => Err("there is no such product of f32".into()),
        DType::Bf16 => case.check::<bf16>(&device, &stream),
        DType::F16 => case.check::<f16>(&device, &stream),
    });
}

#[test]
fn wgmma_compiles_everywhere() {
    let units: Vec<Unit> = cases().iter().map(Case::unit).collect();
    support::compile_everywhere("wgmma_compiles_everywhere", &units, Arch::has_wgmma);
}
