//! Launches with clusters and with programmatic dependence, on the caller's context and stream.

#[path = "kernels/support.rs"]
mod support;

use std::mem::offset_of;
use std::sync::Arc;

use fla_core::cudarc::driver::CudaStream;
use fla_core::testing::{Guarded, gpu, run_cases};
use fla_core::{Arch, Device, Error, Field, Grid, Kernel, Params, Ptr, PtrMut, Source, Unit};

const SOURCE: Source = Source { name: "fla/test/launch.cu", text: include_str!("kernels/launch.cu") };

/// Twin of `fla::test::LaunchParams`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct LaunchParams {
    x: Ptr<f32>,
    y: PtrMut<f32>,
    rank: PtrMut<f32>,
    n: i32,
}

// SAFETY: `#[repr(C)]`, and the fields are listed in order.
unsafe impl Params for LaunchParams {
    const CUDA_TYPE: &'static str = "fla::test::LaunchParams";
    const FIELDS: &'static [Field] = &[
        Field::new("x", "const float*", offset_of!(Self, x)),
        Field::new("y", "float*", offset_of!(Self, y)),
        Field::new("rank", "float*", offset_of!(Self, rank)),
        Field::new("n", "fla::i32", offset_of!(Self, n)),
    ];
}

struct Case {
    name: &'static str,
    cluster: u32,
    dependent: bool,
}

const CASES: &[Case] = &[
    Case { name: "plain", cluster: 1, dependent: false },
    Case { name: "dependent", cluster: 1, dependent: true },
    Case { name: "clusters of 2", cluster: 2, dependent: false },
    Case { name: "clusters of 8, dependent", cluster: 8, dependent: true },
];

/// Blocks enough that a launch does not fit the device at once.
const BLOCKS: usize = 8192;
const LEN: usize = BLOCKS * 128 - 5;
/// Launches of a chain, each of which reads what the one before it wrote.
const CHAIN: usize = 64;

fn unit() -> Unit {
    Unit::new::<LaunchParams>("test", "launch", SOURCE, 128)
}

/// The end of the chain, and what the blocks said of their clusters.
fn run(kernel: &Kernel<LaunchParams>, stream: &Arc<CudaStream>, case: &Case) -> Result<Vec<Vec<f32>>, Error> {
    let mut buffers = [Guarded::input(stream, "even", &start()), Guarded::<f32>::output(stream, "odd", LEN)];
    let mut rank = Guarded::<f32>::output(stream, "rank", BLOCKS);
    let grid = Grid::x(BLOCKS as u32).with_cluster(case.cluster).with_dependent_launch(case.dependent);
    for _ in 0..CHAIN {
        let [from, to] = &mut buffers;
        {
            let (x, mut y, mut rank) = (from.view(), to.view_mut(), rank.view_mut());
            kernel.launch(stream, grid, |bind| LaunchParams {
                x: bind.read("x", &x),
                y: bind.write("y", &mut y),
                rank: bind.write("rank", &mut rank),
                n: LEN as i32,
            })?;
        }
        buffers.swap(0, 1);
    }
    Ok(vec![buffers[0].read(), rank.read()])
}

fn start() -> Vec<f32> {
    (0..LEN).map(|i| (i % 1000) as f32).collect()
}

fn check(kernel: &Kernel<LaunchParams>, stream: &Arc<CudaStream>, case: &Case) -> Result<(), String> {
    let got = support::twice(|| run(kernel, stream, case))?;
    let want: Vec<f64> = start().iter().map(|x| f64::from(*x) + CHAIN as f64).collect();
    support::within("the end of the chain", &got[0], &want, |_| 0.0)?;
    let blocks = case.cluster as usize;
    let want: Vec<f64> = (0..BLOCKS).map(|i| (100 * blocks + i % blocks) as f64).collect();
    support::within("rank", &got[1], &want, |_| 0.0)
}

#[test]
fn launches_keep_their_order_and_their_clusters() {
    let Some((device, stream)) = gpu("launches_keep_their_order_and_their_clusters") else { return };
    if !device.arch().has_tma() {
        eprintln!("launches_keep_their_order_and_their_clusters: skipped, clusters need sm_90");
        return;
    }
    let kernel = device.kernel(&unit()).expect("compiles");
    run_cases(CASES, |case| case.name.into(), |case| check(&kernel, &stream, case));
}

#[test]
fn a_context_that_the_caller_has_is_taken() {
    let Some((device, _)) = gpu("a_context_that_the_caller_has_is_taken") else { return };
    if !device.arch().has_tma() {
        eprintln!("a_context_that_the_caller_has_is_taken: skipped, its kernel needs sm_90");
        return;
    }
    let own = Device::from_context(device.context().clone()).expect("the same device");
    assert_eq!(own.arch(), device.arch());
    // The null stream of the context, which is not one that this crate made.
    let stream = own.context().default_stream();
    let kernel = own.kernel(&unit()).expect("compiles");
    assert_eq!(check(&kernel, &stream, &CASES[0]), Ok(()));
}

#[test]
fn a_kernel_takes_its_own_parameters_only() {
    #[repr(C)]
    #[derive(Clone, Copy)]
    struct OtherParams {
        n: i32,
    }
    // SAFETY: `#[repr(C)]`, and the fields are listed in order.
    unsafe impl Params for OtherParams {
        const CUDA_TYPE: &'static str = "fla::test::OtherParams";
        const FIELDS: &'static [Field] = &[Field::new("n", "fla::i32", offset_of!(Self, n))];
    }
    let Some((device, _)) = gpu("a_kernel_takes_its_own_parameters_only") else { return };
    let error = device.kernel::<OtherParams>(&unit()).err();
    assert!(matches!(error, Some(Error::Option { option: "P", .. })), "{error:?}");
}

#[test]
fn launch_compiles_everywhere() {
    support::compile_everywhere("launch_compiles_everywhere", &[unit()], Arch::has_tma);
}
