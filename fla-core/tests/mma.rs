//! One product by `mma.sync` with every form of load and store, against a loop.

#[path = "kernels/support.rs"]
mod support;

use std::mem::offset_of;
use std::sync::Arc;

use fla_core::cudarc::driver::CudaStream;
use fla_core::testing::{Guarded, Poison, gpu, run_cases};
use fla_core::{Arch, DType, Device, Element, Error, Field, Grid, Params, Ptr, PtrMut, Source, Unit};
use fla_reference::inputs::Rng;
use half::{bf16, f16};

const SOURCE: Source = Source { name: "fla/test/mma.cu", text: include_str!("kernels/mma.cu") };

/// Rows and columns of the result.
const M: usize = 16;

/// Twin of `fla::test::MmaParams`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct MmaParams<T> {
    a: Ptr<T>,
    b: Ptr<T>,
    c: Ptr<f32>,
    y: PtrMut<f32>,
}

// SAFETY: `#[repr(C)]`, and the fields are listed in order.
unsafe impl<T: Element> Params for MmaParams<T> {
    const CUDA_TYPE: &'static str = "fla::test::MmaParams<Cfg::T>";
    const FIELDS: &'static [Field] = &[
        Field::new("a", "const Cfg::T*", offset_of!(Self, a)),
        Field::new("b", "const Cfg::T*", offset_of!(Self, b)),
        Field::new("c", "const float*", offset_of!(Self, c)),
        Field::new("y", "float*", offset_of!(Self, y)),
    ];
}

/// In the order of the enum in the kernel.
#[derive(Clone, Copy, Debug)]
enum Load {
    X4,
    X2,
    X1,
    X4Trans,
    X2Trans,
    X1Trans,
}

/// In the order of the enum in the kernel.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Store {
    Registers,
    Stmatrix,
    StmatrixTrans,
}

#[derive(Clone, Copy)]
struct Case {
    dtype: DType,
    load: Load,
    store: Store,
}

fn cases() -> Vec<Case> {
    let loads = [Load::X4, Load::X2, Load::X1, Load::X4Trans, Load::X2Trans, Load::X1Trans];
    let mut cases = vec![Case { dtype: DType::F32, load: Load::X4, store: Store::Registers }];
    for dtype in [DType::Bf16, DType::F16] {
        cases.extend(loads.map(|load| Case { dtype, load, store: Store::Registers }));
        cases.extend([Store::Stmatrix, Store::StmatrixTrans].map(|store| Case {
            dtype,
            load: Load::X4,
            store,
        }));
    }
    cases
}

/// What an operand keeps of its numbers, and how many of them one product takes: the inner dim.
struct Format {
    inner: usize,
    /// Rounds to what the product reads.
    round: fn(f32) -> f32,
    /// Largest relative error of a rounding to the type.
    half_unit: f64,
}

fn format(dtype: DType) -> Format {
    let half = |bits: i32| 0.5f64.powi(bits);
    match dtype {
        // tf32: 11 significant bits, ties away from zero.
        DType::F32 => Format {
            inner: 8,
            round: |x| f32::from_bits((x.to_bits() + 0x1000) & !0x1fff),
            half_unit: half(11),
        },
        DType::Bf16 => Format { inner: 16, round: |x| bf16::from_f32(x).to_f32(), half_unit: half(8) },
        DType::F16 => Format { inner: 16, round: |x| f16::from_f32(x).to_f32(), half_unit: half(11) },
    }
}

impl Case {
    fn name(&self) -> String {
        format!("{}, {:?}, {:?}", self.dtype.name(), self.load, self.store)
    }

    fn is_for(&self, arch: Arch) -> bool {
        self.store == Store::Registers || arch.major() >= 9
    }

    fn unit(&self) -> Unit {
        match self.dtype {
            DType::F32 => self.typed_unit::<f32>(),
            DType::Bf16 => self.typed_unit::<bf16>(),
            DType::F16 => self.typed_unit::<f16>(),
        }
    }

    fn typed_unit<T: Element>(&self) -> Unit {
        Unit::new::<MmaParams<T>>("test", "mma", SOURCE, 32)
            .with("T", T::DTYPE)
            .with("LOAD", self.load as i32)
            .with("STORE", self.store as i32)
    }

    fn run<T: Poison>(
        &self,
        device: &Device,
        stream: &Arc<CudaStream>,
        inputs: &Inputs<T>,
    ) -> Result<Vec<Vec<f32>>, Error> {
        let kernel = device.kernel::<MmaParams<T>>(&self.unit())?;
        let a = Guarded::input(stream, "a", &inputs.a);
        let b = Guarded::input(stream, "b", &inputs.b);
        let c = Guarded::input(stream, "c", &inputs.c);
        let mut y = Guarded::<f32>::output(stream, "y", M * M);
        let (a_view, b_view, c_view, mut y_view) = (a.view(), b.view(), c.view(), y.view_mut());
        kernel.launch(stream, Grid::x(1), |bind| MmaParams {
            a: bind.read("a", &a_view),
            b: bind.read("b", &b_view),
            c: bind.read("c", &c_view),
            y: bind.write("y", &mut y_view),
        })?;
        Ok(vec![y.read()])
    }

    fn check<T: Poison>(&self, device: &Device, stream: &Arc<CudaStream>) -> Result<(), String> {
        let Format { inner, round, half_unit } = format(self.dtype);
        let mut rng = Rng::new(6);
        let mut draw = |n: usize| rng.normal::<f32>(n, 1.0);
        let inputs = Inputs {
            a: draw(M * inner).into_iter().map(T::from_f32).collect(),
            b: draw(M * inner).into_iter().map(T::from_f32).collect(),
            c: draw(M * M),
        };
        let y = support::twice(|| self.run(device, stream, &inputs))?;

        let transposed = matches!(self.load, Load::X4Trans | Load::X2Trans | Load::X1Trans);
        let at = |x: &[T], i: usize, k: usize| {
            let place = if transposed { k * M + i } else { i * inner + k };
            f64::from(round(x[place].to_f32()))
        };
        let mut want = vec![0.0; M * M];
        let mut limit = vec![0.0; M * M];
        for i in 0..M {
            for j in 0..M {
                let c = f64::from(inputs.c[i * M + j]);
                let terms = (0..inner).map(|k| at(&inputs.a, i, k) * at(&inputs.b, j, k));
                let sum = c + terms.clone().sum::<f64>();
                let magnitude = c.abs() + terms.map(f64::abs).sum::<f64>();
                let place = if self.store == Store::StmatrixTrans { j * M + i } else { i * M + j };
                want[place] = sum;
                // Products are exact; each of the additions may cut off a unit in the last place of the sum.
                limit[place] = (inner + 1) as f64 * f64::from(f32::EPSILON) * magnitude;
                if self.store != Store::Registers {
                    limit[place] += half_unit * (sum.abs() + limit[place]);
                }
            }
        }
        support::within("y", &y[0], &want, |i| limit[i])
    }
}

struct Inputs<T> {
    a: Vec<T>,
    b: Vec<T>,
    c: Vec<f32>,
}

#[test]
fn mma_matches_loops() {
    let Some((device, stream)) = gpu("mma_matches_loops") else { return };
    let cases: Vec<Case> = cases().into_iter().filter(|case| case.is_for(device.arch())).collect();
    run_cases(&cases, Case::name, |case| match case.dtype {
        DType::F32 => case.check::<f32>(&device, &stream),
        DType::Bf16 => case.check::<bf16>(&device, &stream),
        DType::F16 => case.check::<f16>(&device, &stream),
    });
}

#[test]
fn mma_compiles_everywhere() {
    for case in cases() {
        support::compile_everywhere("mma_compiles_everywhere", &[case.unit()], |arch| case.is_for(arch));
    }
}
