//! Group sums and maxima of a warp against loops.

#[path = "kernels/support.rs"]
mod support;

use std::mem::offset_of;
use std::sync::Arc;

use fla_core::cudarc::driver::CudaStream;
use fla_core::testing::{Guarded, gpu, run_cases};
use fla_core::{Device, Error, Field, Grid, Params, Ptr, PtrMut, Source, Unit};
use fla_reference::inputs::Rng;

const SOURCE: Source = Source { name: "fla/test/warp.cu", text: include_str!("kernels/warp.cu") };

/// Lanes of a group.
const CASES: [usize; 6] = [1, 2, 4, 8, 16, 32];

/// Twin of `fla::test::WarpParams`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct WarpParams {
    x: Ptr<f32>,
    y: PtrMut<f32>,
}

// SAFETY: `#[repr(C)]`, and the fields are listed in order.
unsafe impl Params for WarpParams {
    const CUDA_TYPE: &'static str = "fla::test::WarpParams";
    const FIELDS: &'static [Field] = &[
        Field::new("x", "const float*", offset_of!(Self, x)),
        Field::new("y", "float*", offset_of!(Self, y)),
    ];
}

fn unit(lanes: usize) -> Unit {
    Unit::new::<WarpParams>("test", "warp", SOURCE, 32).with("LANES", lanes as i32)
}

fn run(device: &Device, stream: &Arc<CudaStream>, lanes: usize, x: &[f32]) -> Result<Vec<Vec<f32>>, Error> {
    let kernel = device.kernel::<WarpParams>(&unit(lanes))?;
    let x = Guarded::input(stream, "x", x);
    let mut y = Guarded::<f32>::output(stream, "y", 3 * 32);
    let (x_view, mut y_view) = (x.view(), y.view_mut());
    kernel.launch(stream, Grid::x(1), |bind| WarpParams {
        x: bind.read("x", &x_view),
        y: bind.write("y", &mut y_view),
    })?;
    Ok(vec![y.read()])
}

fn check(device: &Device, stream: &Arc<CudaStream>, lanes: usize) -> Result<(), String> {
    let x = Rng::new(2).normal::<f32>(32 * lanes, 1.0);
    let y = support::twice(|| run(device, stream, lanes, &x))?;
    let mut want = vec![0.0; 3 * 32];
    let mut magnitude = vec![0.0; 3 * 32];
    for lane in 0..32 {
        want[32 + lane] = f64::NEG_INFINITY;
        for m in lane / lanes * lanes..(lane / lanes + 1) * lanes {
            let (first, own) = (f64::from(x[m * lanes]), f64::from(x[m * lanes + lane % lanes]));
            want[lane] += first;
            magnitude[lane] += first.abs();
            want[32 + lane] = want[32 + lane].max(first);
            want[64 + lane] += own;
            magnitude[64 + lane] += own.abs();
        }
    }
    // A tree of log2(LANES) additions, each of which rounds to half a unit in the last place; a maximum is exact.
    let limit = f64::from(lanes.ilog2()) * f64::from(f32::EPSILON) / 2.0;
    support::within("y", &y[0], &want, |i| limit * magnitude[i])
}

#[test]
fn group_functions_match_loops() {
    let Some((device, stream)) = gpu("group_functions_match_loops") else { return };
    run_cases(&CASES, |lanes| format!("{lanes} lanes"), |&lanes| check(&device, &stream, lanes));
}

#[test]
fn warp_compiles_everywhere() {
    support::compile_everywhere("warp_compiles_everywhere", &CASES.map(unit), |_| true);
}
