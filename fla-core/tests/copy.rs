//! Vector loads and stores and asynchronous copies, bit by bit.

#[path = "kernels/support.rs"]
mod support;

use std::mem::offset_of;
use std::sync::Arc;

use fla_core::cudarc::driver::CudaStream;
use fla_core::testing::{Guarded, Poison, gpu, run_cases};
use fla_core::{DType, Device, Element, Error, Field, Grid, Params, Ptr, PtrMut, Source, Unit};
use fla_reference::inputs::Rng;
use half::{bf16, f16};

const SOURCE: Source = Source { name: "fla/test/copy.cu", text: include_str!("kernels/copy.cu") };
const THREADS: usize = 64;

/// Twin of `fla::test::CopyParams`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct CopyParams<T> {
    x: Ptr<T>,
    y: PtrMut<T>,
    z: PtrMut<T>,
}

// SAFETY: `#[repr(C)]`, and the fields are listed in order.
unsafe impl<T: Element> Params for CopyParams<T> {
    const CUDA_TYPE: &'static str = "fla::test::CopyParams<Cfg::T>";
    const FIELDS: &'static [Field] = &[
        Field::new("x", "const Cfg::T*", offset_of!(Self, x)),
        Field::new("y", "Cfg::T*", offset_of!(Self, y)),
        Field::new("z", "Cfg::T*", offset_of!(Self, z)),
    ];
}

#[derive(Clone, Copy)]
enum Hint {
    ReadOnly,
    Stream,
}

#[derive(Clone, Copy)]
struct Case {
    dtype: DType,
    /// Elements of a vector.
    n: usize,
    hint: Hint,
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (dtype, widths) in [(DType::Bf16, [2, 4, 8]), (DType::F16, [2, 4, 8]), (DType::F32, [1, 2, 4])] {
        for n in widths {
            cases.extend([Hint::ReadOnly, Hint::Stream].map(|hint| Case { dtype, n, hint }));
        }
    }
    cases
}

impl Case {
    fn name(&self) -> String {
        let hint = match self.hint {
            Hint::ReadOnly => "read-only",
            Hint::Stream => "streaming",
        };
        format!("{hint} vectors of {} {}", self.n, self.dtype.name())
    }

    fn unit(&self) -> Unit {
        match self.dtype {
            DType::F32 => self.typed_unit::<f32>(),
            DType::Bf16 => self.typed_unit::<bf16>(),
            DType::F16 => self.typed_unit::<f16>(),
        }
    }

    fn typed_unit<T: Element>(&self) -> Unit {
        Unit::new::<CopyParams<T>>("test", "copy", SOURCE, THREADS as u32)
            .with("T", T::DTYPE)
            .with("N", self.n as i32)
            .with("STREAM", matches!(self.hint, Hint::Stream))
    }

    fn run<T: Poison>(
        &self,
        device: &Device,
        stream: &Arc<CudaStream>,
        x: &[T],
    ) -> Result<Vec<Vec<f32>>, Error> {
        let kernel = device.kernel::<CopyParams<T>>(&self.unit())?;
        let x = Guarded::input(stream, "x", x);
        let mut y = Guarded::<T>::output(stream, "y", x.view().len());
        let mut z = Guarded::<T>::output(stream, "z", x.view().len());
        let (x_view, mut y_view, mut z_view) = (x.view(), y.view_mut(), z.view_mut());
        kernel.launch(stream, Grid::x(1), |bind| CopyParams {
            x: bind.read("x", &x_view),
            y: bind.write("y", &mut y_view),
            z: bind.write("z", &mut z_view),
        })?;
        Ok([y.read(), z.read()].map(|y| y.into_iter().map(T::to_f32).collect()).into())
    }

    fn check<T: Poison>(&self, device: &Device, stream: &Arc<CudaStream>) -> Result<(), String> {
        let piece = 16 / size_of::<T>();
        let drawn = Rng::new(3).normal::<f32>(THREADS * piece, 1.0);
        let x: Vec<T> = drawn.into_iter().map(T::from_f32).collect();
        let y = support::twice(|| self.run(device, stream, &x))?;

        let x: Vec<f64> = x.into_iter().map(|x| f64::from(x.to_f32())).collect();
        let reversed: Vec<f64> = x.chunks(self.n).flat_map(|vector| vector.iter().rev().copied()).collect();
        support::within("y", &y[0], &reversed, |_| 0.0)?;
        let cut: Vec<f64> =
            (0..x.len()).map(|i| if i % piece < i / piece % (piece + 1) { x[i] } else { 0.0 }).collect();
        support::within("z", &y[1], &cut, |_| 0.0)
    }
}

#[test]
fn copies_keep_every_bit() {
    let Some((device, stream)) = gpu("copies_keep_every_bit") else { return };
    run_cases(&cases(), Case::name, |case| match case.dtype {
        DType::F32 => case.check::<f32>(&device, &stream),
        DType::Bf16 => case.check::<bf16>(&device, &stream),
        DType::F16 => case.check::<f16>(&device, &stream),
    });
}

#[test]
fn copy_compiles_everywhere() {
    let units: Vec<Unit> = cases().iter().map(Case::unit).collect();
    support::compile_everywhere("copy_compiles_everywhere", &units, |_| true);
}
