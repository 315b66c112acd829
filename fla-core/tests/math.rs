//! Every function of `math.cuh` against double precision.

#[path = "kernels/support.rs"]
mod support;

use std::mem::offset_of;
use std::sync::Arc;

use fla_core::cudarc::driver::CudaStream;
use fla_core::testing::{Guarded, gpu, run_cases};
use fla_core::{Device, Error, Field, Grid, Params, Ptr, PtrMut, Source, Unit};
use fla_reference::inputs::Rng;

const SOURCE: Source = Source { name: "fla/test/math.cu", text: include_str!("kernels/math.cu") };
const THREADS: u32 = 128;

/// Twin of `fla::test::MathParams`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct MathParams {
    x: Ptr<f32>,
    y: PtrMut<f32>,
    n: i32,
}

// SAFETY: `#[repr(C)]`, and the fields are listed in order.
unsafe impl Params for MathParams {
    const CUDA_TYPE: &'static str = "fla::test::MathParams";
    const FIELDS: &'static [Field] = &[
        Field::new("x", "const float*", offset_of!(Self, x)),
        Field::new("y", "float*", offset_of!(Self, y)),
        Field::new("n", "fla::i32", offset_of!(Self, n)),
    ];
}

/// In the order of the enum in the kernel.
#[derive(Clone, Copy)]
enum Function {
    Exp2Approx,
    Log2Approx,
    RcpApprox,
    ExpApprox,
    SigmoidApprox,
    Sigmoid,
    Softplus,
    Silu,
}

/// Arguments are drawn from `low` to `high`, and `special` ones come first. The limits are the ones that `math.cuh`
/// states; `smallest` is how far results near 0 may be off, because a function flushes them or they are subnormal.
struct Case {
    name: &'static str,
    function: Function,
    low: f64,
    high: f64,
    special: &'static [f32],
    exact: fn(f64) -> f64,
    /// Largest error in relation to the result, or to 1 when the result is a small logarithm.
    relative: fn(f64) -> f64,
    smallest: f64,
}

const UNIT: f64 = 1.0 / 8_388_608.0; // 2^-23
const NORMAL: f64 = f32::MIN_POSITIVE as f64;
const SUBNORMAL: f64 = NORMAL * UNIT;

const CASES: &[Case] = &[
    Case {
        name: "exp2_approx",
        function: Function::Exp2Approx,
        low: -130.0,
        high: 127.9,
        special: &[0.0, -0.0, 1.0, -1.0, 127.0, -126.0, -127.0, -1e4, f32::NEG_INFINITY, 1e-30, -1e-30],
        exact: f64::exp2,
        relative: |_| 2.0 * UNIT,
        smallest: NORMAL,
    },
    Case {
        name: "log2_approx around 1",
        function: Function::Log2Approx,
        low: 0.5,
        high: 2.0,
        special: &[1.0, 0.5, 2.0, 0.999_999_94, 1.000_000_1],
        exact: f64::log2,
        relative: |_| 0.0,
        smallest: 2.0 * UNIT,
    },
    Case {
        name: "log2_approx of large arguments",
        function: Function::Log2Approx,
        low: 2.0,
        high: 3e38,
        special: &[3.0, 1e-30, 1e30, f32::MIN_POSITIVE, f32::MAX, f32::INFINITY, 0.0],
        exact: f64::log2,
        relative: |_| 2.0 * UNIT,
        smallest: 0.0,
    },
    Case {
        name: "rcp_approx",
        function: Function::RcpApprox,
        low: -50.0,
        high: 50.0,
        special: &[1.0, -1.0, 3.0, 1e30, -1e-30, f32::MIN_POSITIVE, f32::MAX, f32::INFINITY],
        exact: f64::recip,
        relative: |_| UNIT,
        smallest: NORMAL,
    },
    Case {
        name: "exp_approx",
        function: Function::ExpApprox,
        low: -90.0,
        high: 88.0,
        special: &[0.0, -0.0, 1.0, -1.0, -1e4, f32::NEG_INFINITY, 1e-20, -87.0],
        exact: f64::exp,
        relative: |x| (x.abs().min(1e4) + 4.0) * UNIT,
        smallest: NORMAL,
    },
    Case {
        name: "sigmoid_approx",
        function: Function::SigmoidApprox,
        low: -90.0,
        high: 90.0,
        special: &[0.0, -0.0, 1e-20, -20.0, 20.0, -1e4, 1e4, f32::NEG_INFINITY, f32::INFINITY],
        exact: sigmoid,
        relative: |x| (x.abs().min(1e4) + 8.0) * UNIT,
        smallest: NORMAL,
    },
    Case {
        name: "sigmoid",
        function: Function::Sigmoid,
        low: -100.0,
        high: 100.0,
        special: &[0.0, -0.0, 1e-20, -16.0, -20.0, 20.0, -87.0, -1e4, 1e4, f32::NEG_INFINITY, f32::INFINITY],
        exact: sigmoid,
        relative: |_| 4.0 * UNIT,
        smallest: 2.0 * SUBNORMAL,
    },
    Case {
        name: "softplus",
        function: Function::Softplus,
        low: -100.0,
        high: 100.0,
        special: &[0.0, -0.0, -15.9, -16.0, -16.1, -17.0, 19.9, 20.0, 20.1, 1e30, -1e4, -87.0, f32::INFINITY],
        exact: |x| x.max(0.0) + (-x.abs()).exp().ln_1p(),
        relative: |_| 4.0 * UNIT,
        smallest: 2.0 * SUBNORMAL,
    },
    Case {
        name: "silu",
        function: Function::Silu,
        low: -100.0,
        high: 100.0,
        special: &[0.0, -0.0, 1e-20, -16.0, 20.0, -87.0, 1e4],
        exact: |x| x * sigmoid(x),
        relative: |_| 8.0 * UNIT,
        // 100 times what the sigmoid may be off.
        smallest: 200.0 * SUBNORMAL,
    },
];

/// Without overflow on either side, and accurate where the result is small.
fn sigmoid(x: f64) -> f64 {
    let e = (-x.abs()).exp();
    if x < 0.0 { e / (1.0 + e) } else { 1.0 / (1.0 + e) }
}

fn unit(function: Function) -> Unit {
    Unit::new::<MathParams>("test", "math", SOURCE, THREADS).with("FUNCTION", function as i32)
}

fn run(
    device: &Device,
    stream: &Arc<CudaStream>,
    function: Function,
    x: &[f32],
) -> Result<Vec<Vec<f32>>, Error> {
    let kernel = device.kernel::<MathParams>(&unit(function))?;
    let x_in = Guarded::input(stream, "x", x);
    let mut y = Guarded::<f32>::output(stream, "y", x.len());
    let (x_view, mut y_view) = (x_in.view(), y.view_mut());
    let blocks = (x.len() as u32).div_ceil(THREADS);
    kernel.launch(stream, Grid::x(blocks), |bind| MathParams {
        x: bind.read("x", &x_view),
        y: bind.write("y", &mut y_view),
        n: x.len() as i32,
    })?;
    Ok(vec![y.read()])
}

fn check(device: &Device, stream: &Arc<CudaStream>, case: &Case) -> Result<(), String> {
    let mut x = case.special.to_vec();
    x.extend(Rng::new(1).uniform::<f32>(10_000, case.low, case.high));
    let y = support::twice(|| run(device, stream, case.function, &x))?;
    let want: Vec<f64> = x.iter().map(|&x| (case.exact)(f64::from(x))).collect();
    support::within(case.name, &y[0], &want, |i| {
        // An infinite result has to be exactly that, and so has the result of an infinite argument.
        let exact = x[i].is_infinite() || want[i].is_infinite();
        if exact { 0.0 } else { (case.relative)(f64::from(x[i])) * want[i].abs() + case.smallest }
    })
}

#[test]
fn math_matches_double_precision() {
    let Some((device, stream)) = gpu("math_matches_double_precision") else { return };
    run_cases(CASES, |case| case.name.into(), |case| check(&device, &stream, case));
}

#[test]
fn math_compiles_everywhere() {
    let units: Vec<Unit> = CASES.iter().map(|case| unit(case.function)).collect();
    support::compile_everywhere("math_compiles_everywhere", &units, |_| true);
}
