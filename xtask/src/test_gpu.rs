//! Runs every test that needs a GPU, from a checkout with cargo or from a bundle without.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use fla_core::Device;

use crate::Result;
use crate::flags::TestGpuArgs;
use crate::home::{Home, Kind};
use crate::steps::{Step, Steps};
use crate::toolchain::Toolchain;
use crate::tree::Tree;

/// Runs the tests; an error when there is no GPU.
pub(crate) fn run(args: &TestGpuArgs) -> Result<bool> {
    let device = Device::new(0)?;
    let home = Home::find()?;
    let toolchain = Toolchain::find(home.root())?;
    println!("{}, {}", device.arch(), toolchain.description);
    let steps = steps(&home, &toolchain, args)?;
    let mut run = Steps::new(logs(&home), steps.len())?;
    let mut tests = 0;
    for step in steps {
        tests += passed(&run.run(step)?);
    }
    println!("{tests} tests ran");
    let passed = run.finish();
    if tests == 0 {
        let filter = args.filter.as_deref().unwrap_or_default();
        return Err(format!("no test has `{filter}` in its name").into());
    }
    Ok(passed)
}

/// Where the output of the steps goes.
pub(crate) fn logs(home: &Home) -> PathBuf {
    match home {
        Home::Workspace(root) => root.join("target/xtask"),
        Home::Bundle(bundle) => bundle.root.join("logs"),
    }
}

/// The test executables one after the other, then the conformance cases.
pub(crate) fn steps(home: &Home, toolchain: &Toolchain, args: &TestGpuArgs) -> Result<Vec<Step>> {
    // One GPU, one test at a time: two at once would share its memory and disturb each other's timing.
    let mut libtest = vec!["--test-threads=1"];
    libtest.extend(args.filter.as_deref());
    let mut steps = Vec::new();
    match home {
        Home::Workspace(root) => {
            for krate in Tree::load(root)?.crates().into_iter().filter(|krate| runs_on_the_gpu(krate)) {
                let mut command = cargo(root);
                command
                    .args(["test", "--no-fail-fast", "--package", krate, "--lib", "--tests", "--"])
                    .args(&libtest);
                steps.push(Step::new(format!("GPU tests of {krate}"), command));
            }
        }
        Home::Bundle(bundle) => {
            for executable in bundle.of_kind(Kind::Test) {
                let mut command = Command::new(bundle.root.join(&executable.file));
                command.args(&libtest).current_dir(&bundle.root);
                steps.push(Step::new(format!("{} {}", executable.krate, executable.name), command));
            }
        }
    }
    if args.filter.is_none() {
        let mut command = Command::new(env::current_exe()?);
        command.arg("conformance").arg(home.vectors()).args(["--backend", "gpu"]);
        steps.push(Step::new("conformance on the GPU", command));
    }
    for step in &mut steps {
        // A test that finds no GPU, or no compiler, must fail here and not skip.
        step.command.env("FLA_REQUIRE_GPU", "1").env("FLA_REQUIRE_NVRTC", "1");
        toolchain.apply(&mut step.command);
    }
    Ok(steps)
}

/// The cargo that runs this program, in the workspace.
pub(crate) fn cargo(root: &Path) -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root);
    command
}

/// Whether a crate has tests for the GPU at all.
pub(crate) fn runs_on_the_gpu(krate: &str) -> bool {
    krate.starts_with("fla-") && krate != "fla-reference"
}

/// How many tests the output of libtest says have passed.
fn passed(output: &str) -> usize {
    output
        .lines()
        .filter_map(|line| line.strip_prefix("test result: "))
        .filter_map(|line| line.split_once(". ")?.1.split_once(" passed")?.0.parse::<usize>().ok())
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passed_tests_are_counted_over_all_executables() {
        let output = "running 2 tests\ntest result: ok. 2 passed; 0 failed; 0 ignored\n\
                      test result: FAILED. 3 passed; 1 failed; 0 ignored\n";
        assert_eq!(passed(output), 5);
        assert_eq!(passed("running 0 tests\ntest result: ok. 0 passed; 0 failed; 9 filtered out\n"), 0);
    }
}
