//! The commands and their flags, which are also the help.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::conformance::ConformanceArgs;
use crate::demo::DemoArgs;

use crate::kernels::ARCHS;

/// The commands of this workspace.
///
/// Exit code 0: everything passed. 1: something was checked and failed. 2: the command could not run.
#[derive(Debug, Parser)]
#[command(name = "xtask", bin_name = "cargo xtask", max_term_width = 110)]
pub(crate) struct Flags {
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What can be asked for, in the order in which a newcomer meets it.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Demo(DemoArgs),
    /// Check everything that needs no GPU, and the GPU tests when there is one.
    ///
    /// Format, house rules, clippy, documentation, every kernel compiled for every architecture, tests, the conformance
    /// cases on the reference, and the packages. Every step runs, also after a failure; the last line counts them. NVRTC
    /// is fetched from PyPI into `target/cuda` when no CUDA toolkit is found.
    Test,
    TestGpu(TestGpuArgs),
    BenchGpu(BenchGpuArgs),
    Conformance(ConformanceArgs),
    Kernels(KernelsArgs),
    /// Check the house rules that a program can check, and print `path:line: message`.
    ///
    /// Opening sentences, imports, headers of CUDA files, parameter twins, dependency edges, one name in every
    /// layer, and whether the paths, symbols and commands that documents name exist.
    Tidy,
    Find(FindArgs),
    Bundle(BundleArgs),
}

/// Run every GPU test and the conformance cases on the GPU; a missing GPU is an error.
///
/// Runs cargo in a checkout, and the executables that lie beside it in a bundle.
#[derive(Debug, Args)]
pub(crate) struct TestGpuArgs {
    /// Run only the files of tests whose name contains this, or else the tests; the conformance cases are left out.
    pub(crate) filter: Option<String>,
}

/// Time every pass on the GPU: verified first, then timed, then appended to the records.
///
/// Prints median and quantiles, bandwidth, FLOP/s, the share of the case's floor (bytes at the copy rate that the run
/// itself measures), the error and the extra memory. Runs cargo in a checkout, and the executables that lie beside it
/// in a bundle.
#[derive(Debug, Args)]
pub(crate) struct BenchGpuArgs {
    /// Time only the cases whose name contains this, such as `rwkv7/recurrent_fwd`.
    pub(crate) filter: Option<String>,
    /// Write every number into this file too.
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// The folder of records; `records` at the root of the workspace or the bundle when absent.
    #[arg(long, value_name = "DIR")]
    pub(crate) records: Option<PathBuf>,
}

/// Compile every kernel for every architecture: registers, spills, shared memory, size, time.
///
/// Needs NVRTC but no GPU. For architectures that nothing is tuned for, one unit of each kernel stands for all unless they
/// are asked for. The numbers for sm_90a are compared with those in `xtask/kernels.sm_90a.txt` when they come
/// from the same NVRTC; a difference fails, and so does a spill.
#[derive(Debug, Args)]
pub(crate) struct KernelsArgs {
    /// Compile only the kernels whose symbol contains this; nothing is then compared.
    pub(crate) filter: Option<String>,
    /// The architectures to compile for.
    #[arg(long, value_delimiter = ',', default_values = ARCHS)]
    pub(crate) arch: Vec<String>,
    /// Compile every unit for every architecture, and not one of each kernel for those that are not tuned for.
    #[arg(long)]
    pub(crate) every: bool,
    /// Write each cubin and its assembly into this folder.
    #[arg(long, value_name = "DIR")]
    pub(crate) sass: Option<PathBuf>,
    /// Write the numbers for sm_90a into the committed table instead of comparing them with it.
    #[arg(long, conflicts_with = "filter")]
    pub(crate) write: bool,
}

/// Print where a name lives in every layer of every crate.
///
/// One stem names a thing everywhere: the plan and the one-call function in Rust, the CUDA file, the
/// parameter twins, the reference, the test, the tolerance and the bench. Give a pass (`recurrent_fwd`),
/// a pass with its stage (`chunk_fwd_intra`) or a building block (`tri_inverse`).
#[derive(Debug, Args)]
pub(crate) struct FindArgs {
    /// The stem, in snake case.
    pub(crate) stem: String,
}

/// Put test and bench executables into one folder, for a GPU machine without Rust and without a network.
///
/// The folder holds the stripped executables, this program, the conformance cases and `run.sh`, and stays below 160 MiB.
/// The GPU machine needs the NVIDIA driver and NVRTC.
#[derive(Debug, Args)]
pub(crate) struct BundleArgs {
    /// The folder to fill; `bundle` at the root of the workspace when absent.
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,
}
