//! Everything that can be checked without a GPU, and the GPU tests when there is one.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use fla_core::Device;

use crate::Result;
use crate::flags::TestGpuArgs;
use crate::home::{Home, VECTORS};
use crate::steps::{Step, Steps};
use crate::test_gpu::{self, cargo};
use crate::toolchain::Toolchain;
use crate::tree::workspace_root;

/// Runs all steps, also after one has failed, and prints the count at the end.
pub(crate) fn run() -> Result<bool> {
    let root = workspace_root();
    let home = Home::Workspace(root.clone());
    let toolchain = Toolchain::find(&root);
    let gpu = Device::new(0).map(|device| device.arch());

    let mut steps = source_steps(&root)?;
    steps.push(tests(&root, toolchain.as_ref().ok()));
    if let Ok(toolchain) = &toolchain {
        println!("{}", toolchain.description);
        let mut kernels = this_program(&["kernels"])?;
        toolchain.apply(&mut kernels);
        steps.push(Step::new("every kernel for every architecture", kernels));
        if gpu.is_ok() {
            steps.extend(test_gpu::steps(&home, toolchain, &TestGpuArgs { filter: None })?);
        }
    }
    let missing = usize::from(toolchain.is_err());
    let mut run = Steps::new(test_gpu::logs(&home), steps.len() + missing)?;
    if let Err(error) = &toolchain {
        run.fail("every kernel for every architecture", &error.to_string());
    }
    for step in steps {
        run.run(step)?;
    }
    match gpu {
        Ok(arch) => println!("GPU tests ran on {arch}"),
        Err(error) => println!("GPU tests did not run: {}", error.to_string().replace('\n', " ")),
    }
    Ok(run.finish())
}

/// What reads the sources, and what needs nothing but cargo.
fn source_steps(root: &Path) -> Result<Vec<Step>> {
    let mut format = cargo(root);
    format.args(["fmt", "--all", "--check"]);
    let mut clippy = cargo(root);
    clippy.args(["clippy", "--workspace", "--all-targets", "--", "--deny", "warnings"]);
    let mut doc = cargo(root);
    doc.args(["doc", "--workspace", "--no-deps"]).env("RUSTDOCFLAGS", "--deny warnings");
    Ok(vec![
        Step::new("format", format),
        Step::new("tidy", this_program(&["tidy"])?),
        Step::new("clippy", clippy),
        Step::new("documentation", doc),
        package(root)?,
        conformance(root, "f64")?,
        conformance(root, "f32")?,
    ])
}

/// Unit tests, integration tests and the examples of the documentation; those that compile kernels must not skip.
fn tests(root: &Path, toolchain: Option<&Toolchain>) -> Step {
    let mut command = cargo(root);
    command.args(["test", "--workspace", "--no-fail-fast"]);
    if let Some(toolchain) = toolchain {
        toolchain.apply(&mut command);
        command.env("FLA_REQUIRE_NVRTC", "1");
    }
    Step::new("tests", command)
}

/// What would be uploaded is built from its packages alone, which finds a file outside of them.
fn package(root: &Path) -> Result<Step> {
    // What cargo built of a package under the same version before, it would take for this one.
    let built = root.join("target/publish");
    if built.exists() {
        fs::remove_dir_all(&built)
            .map_err(|source| format!("cannot remove {}: {source}", built.display()))?;
    }
    forget_verified_sources(&cargo_home()?)?;
    let mut command = cargo(root);
    command.args(["publish", "--workspace", "--dry-run", "--target-dir"]).arg(built);
    let status = Command::new("git").args(["status", "--porcelain"]).current_dir(root).output();
    let is_clean = status.is_ok_and(|status| status.stdout.is_empty());
    if is_clean {
        return Ok(Step::new("package", command));
    }
    command.arg("--allow-dirty");
    Ok(Step::new("package, with uncommitted changes", command))
}

fn cargo_home() -> Result<PathBuf> {
    let home = env::var_os("CARGO_HOME").map(PathBuf::from);
    home.or_else(|| env::home_dir().map(|home| home.join(".cargo")))
        .ok_or_else(|| "there is no home folder".into())
}

/// Removes the sources that cargo verified packages of this workspace with.
///
/// It verifies a package against the others through a registry of its own, whose sources it keeps by the place of the
/// checkout and the version alone: a change under the same version would be verified against what was there before it.
/// Such registries have no host, so their folders have a name that starts with `-`.
fn forget_verified_sources(cargo_home: &Path) -> Result<()> {
    let Ok(registries) = fs::read_dir(cargo_home.join("registry/src")) else { return Ok(()) };
    for registry in registries.flatten() {
        if !registry.file_name().to_string_lossy().starts_with('-') {
            continue;
        }
        for source in fs::read_dir(registry.path())?.flatten() {
            if source.file_name().to_string_lossy().starts_with("fla-") {
                let path = source.path();
                fs::remove_dir_all(&path)
                    .map_err(|source| format!("cannot remove {}: {source}", path.display()))?;
            }
        }
    }
    Ok(())
}

/// The project's own cases, every pass of the reference.
fn conformance(root: &Path, dtype: &str) -> Result<Step> {
    let vectors = root.join(VECTORS);
    let mut command = this_program(&["conformance"])?;
    command.arg(vectors).args(["--backend", "reference", "--pass", "all", "--dtype", dtype]);
    Ok(Step::new(format!("conformance of the reference in {dtype}"), command))
}

fn this_program(args: &[&str]) -> Result<Command> {
    let mut command = Command::new(env::current_exe()?);
    command.args(args);
    Ok(command)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_sources_of_cargos_own_registries_are_removed() {
        let home = env::temp_dir().join(format!("xtask-cargo-home-{}", std::process::id()));
        let folder = |registry: &str, source: &str| home.join("registry/src").join(registry).join(source);
        let (stale, other) = (folder("-0123", "fla-core-0.1.0"), folder("-0123", "half-2.7.1"));
        let published = folder("index.crates.io-0123", "fla-core-0.1.0");
        for path in [&stale, &other, &published] {
            fs::create_dir_all(path).unwrap();
        }
        forget_verified_sources(&home).unwrap();
        assert_eq!([&stale, &other, &published].map(|path| path.exists()), [false, true, true]);
        fs::remove_dir_all(&home).unwrap();
        forget_verified_sources(&home).unwrap();
    }
}
