//! Runs every test that needs a GPU, from a checkout with cargo or from a bundle without.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use fla_core::Device;

use crate::Result;
use crate::flags::TestGpuArgs;
use crate::home::{Executable, Home, Kind};
use crate::steps::{Step, Steps};
use crate::toolchain::Toolchain;
use crate::tree::{Tree, stem};

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
        tests += started(&run.run(step)?);
    }
    if tests == 0 {
        let filter = args.filter.as_deref().unwrap_or_default();
        return Err(format!("no test has `{filter}` in its name or in that of its file").into());
    }
    println!("{tests} tests ran");
    Ok(run.finish())
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
    let mut files = files(home)?;
    let mut filter = args.filter.as_deref();
    // The name of a file stands for all of its tests; anything else is looked for in the names of tests.
    let by_file = |file: &TestFile| filter.is_some_and(|filter| file.name.contains(filter));
    if files.iter().any(by_file) {
        files.retain(by_file);
        filter = None;
    }
    let mut steps = Vec::new();
    for TestFile { krate, name, mut command } in files {
        // One GPU, one test at a time: two at once would share its memory and disturb each other's timing.
        command.arg("--test-threads=1").args(filter);
        steps.push(Step::new(format!("{krate} {name}"), command));
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

/// A file of tests, and the command that runs them.
struct TestFile {
    krate: String,
    name: String,
    command: Command,
}

/// The files of every crate that runs on the GPU; `lib` stands for the unit tests in the sources.
fn files(home: &Home) -> Result<Vec<TestFile>> {
    let mut files = Vec::new();
    match home {
        Home::Workspace(root) => {
            let tree = Tree::load(root)?;
            for krate in tree.crates().into_iter().filter(|krate| runs_on_the_gpu(krate)) {
                let tests = format!("{krate}/tests/");
                let is_root = |path: &str| path.ends_with(".rs") && !path[tests.len()..].contains('/');
                let paths = tree.under(&tests).map(|(path, _)| path).filter(|path| is_root(path));
                for name in ["lib"].into_iter().chain(paths.map(stem)) {
                    let mut command = cargo(root);
                    command.args(["test", "--package", krate]);
                    match name {
                        "lib" => command.arg("--lib"),
                        name => command.args(["--test", name]),
                    };
                    command.arg("--");
                    files.push(TestFile { krate: krate.to_owned(), name: name.to_owned(), command });
                }
            }
        }
        Home::Bundle(bundle) => {
            for Executable { name, krate, file, .. } in bundle.of_kind(Kind::Test) {
                let mut command = Command::new(bundle.root.join(file));
                command.current_dir(&bundle.root);
                files.push(TestFile { krate: krate.clone(), name: name.clone(), command });
            }
        }
    }
    Ok(files)
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

/// How many tests the output of libtest says it started.
fn started(output: &str) -> usize {
    output
        .lines()
        .filter_map(|line| line.strip_prefix("running ")?.split_once(" test")?.0.parse::<usize>().ok())
        .sum()
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::home::Bundle;

    #[test]
    fn tests_are_counted_over_all_executables() {
        let output = "running 2 tests\ntest result: ok. 2 passed; 0 failed; 0 ignored\n\
                      running 1 test\ntest result: FAILED. 0 passed; 1 failed; 0 ignored\n";
        assert_eq!(started(output), 3);
        assert_eq!(started("running 0 tests\ntest result: ok. 0 passed; 0 failed; 9 filtered out\n"), 0);
    }

    #[test]
    fn a_filter_names_files_before_it_names_tests() {
        let executable = |name: &str| Executable {
            name: name.to_owned(),
            krate: "fla-core".to_owned(),
            kind: Kind::Test,
            file: format!("bin/{name}"),
        };
        let executables = vec![executable("mma"), executable("wgmma"), executable("scan")];
        let home = Home::Bundle(Bundle { root: PathBuf::from("here"), commit: String::new(), executables });
        let titles = |filter: Option<&str>| -> Vec<String> {
            let args = TestGpuArgs { filter: filter.map(str::to_owned) };
            let steps = steps(&home, &Toolchain::default(), &args).unwrap();
            steps
                .into_iter()
                .map(|step| format!("{} {}", step.title, step.command.get_args().count()))
                .collect()
        };
        assert_eq!(titles(Some("mma")), ["fla-core mma 1", "fla-core wgmma 1"]);
        assert_eq!(titles(Some("matches")), ["fla-core mma 2", "fla-core wgmma 2", "fla-core scan 2"]);
        assert_eq!(titles(None).len(), 4);
    }
}
