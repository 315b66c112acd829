//! Two warps that hand values over through mbarriers and a named barrier.

#[path = "kernels/support.rs"]
mod support;

use std::mem::offset_of;
use std::sync::Arc;

use fla_core::cudarc::driver::CudaStream;
use fla_core::testing::{Guarded, gpu, run_cases};
use fla_core::{Arch, Device, Error, Field, Grid, Params, Ptr, PtrMut, Source, Unit};
use fla_reference::inputs::Rng;

const SOURCE: Source = Source { name: "fla/test/barrier.cu", text: include_str!("kernels/barrier.cu") };

/// Rounds through a ring of two: none, less than the ring, and enough for every parity to come back.
const CASES: [usize; 6] = [0, 1, 2, 3, 4, 257];

/// Twin of `fla::test::BarrierParams`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct BarrierParams {
    x: Ptr<f32>,
    y: PtrMut<f32>,
    z: PtrMut<f32>,
    n: i32,
}

// SAFETY: `#[repr(C)]`, and the fields are listed in order.
unsafe impl Params for BarrierParams {
    const CUDA_TYPE: &'static str = "fla::test::BarrierParams";
    const FIELDS: &'static [Field] = &[
        Field::new("x", "const float*", offset_of!(Self, x)),
        Field::new("y", "float*", offset_of!(Self, y)),
        Field::new("z", "float*", offset_of!(Self, z)),
        Field::new("n", "fla::i32", offset_of!(Self, n)),
    ];
}

fn unit() -> Unit {
    Unit::new::<BarrierParams>("test", "barrier", SOURCE, 64)
}

fn run(device: &Device, stream: &Arc<CudaStream>, x: &[f32]) -> Result<Vec<Vec<f32>>, Error> {
    let kernel = device.kernel::<BarrierParams>(&unit())?;
    let n = x.len() / 32;
    let x = Guarded::input(stream, "x", x);
    let mut y = Guarded::<f32>::output(stream, "y", 32 * n);
    let mut z = Guarded::<f32>::output(stream, "z", 32);
    let (x_view, mut y_view, mut z_view) = (x.view(), y.view_mut(), z.view_mut());
    let grid = Grid::x(1).with_dependent_launch(true);
    kernel.launch(stream, grid, |bind| BarrierParams {
        x: bind.read("x", &x_view),
        y: bind.write("y", &mut y_view),
        z: bind.write("z", &mut z_view),
        n: n as i32,
    })?;
    Ok(vec![y.read(), z.read()])
}

fn check(device: &Device, stream: &Arc<CudaStream>, n: usize) -> Result<(), String> {
    let x = Rng::new(4).normal::<f32>(32 * n, 1.0);
    let y = support::twice(|| run(device, stream, &x))?;

    let mut values = vec![0.0; 32 * n];
    let (mut sums, mut magnitudes) = (vec![0.0; 32], vec![0.0; 32]);
    for i in 0..n {
        for lane in 0..32 {
            let value = 2.0 * f64::from(x[32 * i + 31 - lane]);
            values[32 * i + lane] = value;
            sums[31 - lane] += value;
            magnitudes[31 - lane] += value.abs();
        }
    }
    support::within("y", &y[0], &values, |_| 0.0)?;
    // One rounding of half a unit per addition.
    let limit = n as f64 * f64::from(f32::EPSILON) / 2.0;
    support::within("z", &y[1], &sums, |i| limit * magnitudes[i])
}

#[test]
fn barriers_hand_over_in_order() {
    let Some((device, stream)) = gpu("barriers_hand_over_in_order") else { return };
    if !device.arch().has_tma() {
        eprintln!(
            "barriers_hand_over_in_order: skipped, mbarriers that wait need sm_90, this is {}",
            device.arch()
        );
        return;
    }
    run_cases(&CASES, |n| format!("{n} rounds"), |&n| check(&device, &stream, n));
}

#[test]
fn barrier_compiles_everywhere() {
    support::compile_everywhere("barrier_compiles_everywhere", &[unit()], Arch::has_tma);
}
