//! The commands of this workspace: `cargo xtask help` lists them.

use std::process::ExitCode;

use clap::Parser;

use crate::flags::{Command, Flags};

mod bench_gpu;
mod bundle;
mod conformance;
mod demo;
mod find;
mod flags;
mod home;
mod kernels;
mod names;
mod steps;
mod test;
mod test_gpu;
mod tidy;
mod toolchain;
mod tree;

/// Why a command could not do its work; a failed check is an outcome, not an error.
pub(crate) type Error = Box<dyn std::error::Error + Send + Sync>;

/// `Ok(true)` when everything passed, `Ok(false)` when something was checked and failed.
pub(crate) type Result<T> = std::result::Result<T, Error>;

fn main() -> ExitCode {
    match run(Flags::parse().command) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(2)
        }
    }
}

fn run(command: Command) -> Result<bool> {
    match command {
        Command::Demo(args) => demo::run(&args),
        Command::Test => test::run(),
        Command::TestGpu(args) => test_gpu::run(&args),
        Command::BenchGpu(args) => bench_gpu::run(&args),
        Command::Conformance(args) => conformance::run(&args),
        Command::Kernels(args) => kernels::run(&args),
        Command::Tidy => tidy::run(),
        Command::Find(args) => find::run(&args),
        Command::Bundle(args) => bundle::run(&args),
    }
}
