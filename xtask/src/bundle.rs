//! Puts the test and bench executables and this program into one folder, for a GPU machine that has neither Rust nor
//! a network.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::Result;
use crate::flags::BundleArgs;
use crate::home::{BUNDLED_VECTORS, Bundle, Executable, Kind, MANIFEST, VECTORS};
use crate::test_gpu::{cargo, runs_on_the_gpu};
use crate::tree::{Tree, workspace_root};

/// The most that the folder may hold, so that it is copied in a minute over a slow line; packed it is a third of that.
const LIMIT_BYTES: u64 = 160 << 20;

/// The folder of the test and bench executables in the bundle.
const EXECUTABLES: &str = "bin";

/// The documents and sources that the demo reads when it is given no file.
const TEXT: &str = "text";

const SCRIPT: &str = r#"#!/usr/bin/env bash
# Runs what lies here on a GPU; a missing GPU is an error.
#
#   ./run.sh [all]              test, then bench, then demo
#   ./run.sh test [filter]      every GPU test, and the conformance cases
#   ./run.sh bench [filter]     every benchmark
#   ./run.sh demo [file]        the operators on a text
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
export FLA_REQUIRE_GPU=1
command="${1:-all}"
shift || true
case "$command" in
    test) exec ./xtask test-gpu "$@" ;;
    bench) exec ./xtask bench-gpu "$@" ;;
    demo) exec ./xtask demo "$@" ;;
    all)
        ./xtask test-gpu
        ./xtask bench-gpu
        ./xtask demo
        ;;
    *)
        echo "unknown command '$command': test, bench, demo or all" >&2
        exit 2
        ;;
esac
"#;

/// Builds and fills the folder, and lists what it holds; an error when it is too large.
pub(crate) fn run(args: &BundleArgs) -> Result<bool> {
    let root = workspace_root();
    let out = args.out.clone().unwrap_or_else(|| root.join("bundle"));
    let executables = build(&root)?;
    clear(&out)?;
    for (executable, built) in &executables {
        copy(built, &out.join(&executable.file))?;
    }
    copy(&build_xtask(&root)?, &out.join("xtask"))?;
    copy_folder(&root.join(VECTORS), &out.join(BUNDLED_VECTORS))?;
    copy_text(&root, &out.join(TEXT))?;

    let executables = executables.into_iter().map(|(executable, _)| executable).collect();
    let bundle = Bundle { root: out.clone(), commit: commit(&root)?, executables };
    write(&out.join(MANIFEST), bundle.to_json().as_bytes())?;
    let script = out.join("run.sh");
    write(&script, SCRIPT.as_bytes())?;
    make_executable(&script)?;
    for executable in bundle.of_kind(Kind::Test) {
        starts_alone(&bundle, executable)?;
    }

    let sizes = sizes(&out)?;
    let total: u64 = sizes.iter().map(|size| size.bytes).sum();
    print!("{}", table(&sizes));
    println!("{} of {} at {}", mebibytes(total), bundle.commit, out.display());
    if total > LIMIT_BYTES {
        let limit = mebibytes(LIMIT_BYTES);
        return Err(format!("the bundle holds {}, more than {limit}", mebibytes(total)).into());
    }
    Ok(true)
}

/// Cargo with the profile of the bundle, in a folder of its own so that nothing else has to be built again.
fn release(root: &Path, subcommand: &str) -> Command {
    let mut command = cargo(root);
    command
        .args([subcommand, "--release", "--message-format", "json-render-diagnostics", "--target-dir"])
        .arg(root.join("target/bundle"))
        .env("CARGO_PROFILE_RELEASE_STRIP", "symbols")
        .env("CARGO_PROFILE_RELEASE_DEBUG", "false");
    command
}

/// The tests and benches of the crates that run on a GPU, each with the file that cargo built.
fn build(root: &Path) -> Result<Vec<(Executable, PathBuf)>> {
    let mut command = release(root, "test");
    command.args(["--no-run", "--lib", "--tests", "--benches"]);
    for krate in Tree::load(root)?.crates().into_iter().filter(|krate| runs_on_the_gpu(krate)) {
        command.args(["--package", krate]);
    }
    let mut executables: Vec<(Executable, PathBuf)> =
        artifacts(&mut command)?.iter().filter_map(executable).collect();
    executables.sort_by(|(a, _), (b, _)| a.file.cmp(&b.file));
    executables.dedup_by(|(a, _), (b, _)| a.file == b.file);
    Ok(executables)
}

fn build_xtask(root: &Path) -> Result<PathBuf> {
    let artifacts = artifacts(release(root, "build").args(["--package", "xtask"]))?;
    let built = artifacts.iter().find_map(|artifact| artifact["executable"].as_str());
    built.map(PathBuf::from).ok_or_else(|| "cargo built no xtask".into())
}

/// What cargo says it built; its own messages go to the terminal.
fn artifacts(command: &mut Command) -> Result<Vec<Value>> {
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .map_err(|source| format!("cannot start cargo: {source}"))?;
    if !output.status.success() {
        return Err(format!("cargo: {}", output.status).into());
    }
    let messages = String::from_utf8_lossy(&output.stdout);
    let messages =
        messages.lines().map(serde_json::from_str).collect::<std::result::Result<Vec<Value>, _>>()?;
    Ok(messages.into_iter().filter(|message| message["reason"] == "compiler-artifact").collect())
}

/// The test or bench that an artifact of cargo is, if it is one.
fn executable(artifact: &Value) -> Option<(Executable, PathBuf)> {
    let built = PathBuf::from(artifact["executable"].as_str()?);
    let target = &artifact["target"];
    let (kind, name) = match target["kind"][0].as_str()? {
        "test" => (Kind::Test, target["name"].as_str()?),
        "bench" => (Kind::Bench, target["name"].as_str()?),
        "lib" => (Kind::Test, "lib"),
        _ => return None,
    };
    // The folder of the manifest is the name of the crate.
    let krate = Path::new(artifact["manifest_path"].as_str()?).parent()?.file_name()?.to_str()?.to_owned();
    let file = format!("{EXECUTABLES}/{krate}-{}-{name}", kind.name());
    Some((Executable { name: name.to_owned(), krate, kind, file }, built))
}

/// Makes the folder empty, unless somebody else's files are in it.
fn clear(out: &Path) -> Result<()> {
    let is_empty = fs::read_dir(out).map(|mut entries| entries.next().is_none()).unwrap_or(true);
    if !is_empty && !out.join(MANIFEST).is_file() {
        return Err(format!("{} is not empty and is not a bundle: name another folder", out.display()).into());
    }
    if out.exists() {
        fs::remove_dir_all(out).map_err(|source| format!("cannot remove {}: {source}", out.display()))?;
    }
    fs::create_dir_all(out).map_err(|source| format!("cannot create {}: {source}", out.display()).into())
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    let folder = to.parent().unwrap_or(to);
    let copied = fs::create_dir_all(folder).and_then(|()| fs::copy(from, to));
    copied.map_err(|source| format!("cannot copy {} to {}: {source}", from.display(), to.display()))?;
    Ok(())
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    fs::write(path, bytes).map_err(|source| format!("cannot write {}: {source}", path.display()).into())
}

fn copy_folder(from: &Path, to: &Path) -> Result<()> {
    let mut entries =
        fs::read_dir(from).map_err(|source| format!("cannot read {}: {source}", from.display()))?;
    let copied = entries.try_fold(0, |copied, entry| -> Result<usize> {
        let entry = entry?;
        copy(&entry.path(), &to.join(entry.file_name()))?;
        Ok(copied + 1)
    })?;
    if copied == 0 {
        return Err(format!("there is nothing in {}", from.display()).into());
    }
    Ok(())
}

fn copy_text(root: &Path, to: &Path) -> Result<()> {
    for (path, _) in Tree::load(root)?.with_extension(&["md", "rs", "cu", "cuh"]) {
        copy(&root.join(path), &to.join(path))?;
    }
    Ok(())
}

#[cfg(unix)]
fn make_executable(path: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let changed = fs::set_permissions(path, fs::Permissions::from_mode(0o755));
    changed.map_err(|source| format!("cannot make {} executable: {source}", path.display()).into())
}

#[cfg(not(unix))]
fn make_executable(_path: &Path) -> Result<()> {
    Ok(())
}

/// Lists the tests of an executable from the bundle, without what cargo puts into the environment.
fn starts_alone(bundle: &Bundle, executable: &Executable) -> Result<()> {
    let mut command = Command::new(fs::canonicalize(bundle.root.join(&executable.file))?);
    command.arg("--list").current_dir(&bundle.root);
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("CARGO") {
            command.env_remove(name);
        }
    }
    let output = command.output().map_err(|source| format!("cannot start {}: {source}", executable.file))?;
    if !output.status.success() {
        let why = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{} does not start outside of cargo: {}", executable.file, why.trim()).into());
    }
    Ok(())
}

/// The commit at `root`, marked when the files are not those of the commit.
pub(crate) fn commit(root: &Path) -> Result<String> {
    let git = |args: &[&str]| -> Result<String> {
        let output = Command::new("git")
            .args(args)
            .current_dir(root)
            .output()
            .map_err(|source| format!("cannot run git: {source}"))?;
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let commit = git(&["rev-parse", "--short=12", "HEAD"])?;
    let is_clean = git(&["status", "--porcelain"])?.is_empty();
    Ok(if is_clean { commit } else { format!("{commit}-dirty") })
}

struct Size {
    path: String,
    bytes: u64,
}

/// Every file at the top of the bundle, every executable, and every other folder as a whole; the largest first.
fn sizes(out: &Path) -> Result<Vec<Size>> {
    let mut sizes = Vec::new();
    for entry in fs::read_dir(out)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name == EXECUTABLES {
            for file in fs::read_dir(entry.path())? {
                let file = file?;
                let path = format!("{name}/{}", file.file_name().to_string_lossy());
                sizes.push(Size { path, bytes: file.metadata()?.len() });
            }
        } else {
            sizes.push(Size { path: name, bytes: bytes_of(&entry.path())? });
        }
    }
    sizes.sort_by_key(|size| std::cmp::Reverse(size.bytes));
    Ok(sizes)
}

/// Bytes of a file, or of all files in a folder.
fn bytes_of(path: &Path) -> Result<u64> {
    if path.is_file() {
        return Ok(path.metadata()?.len());
    }
    fs::read_dir(path)?.map(|entry| bytes_of(&entry?.path())).sum()
}

fn table(sizes: &[Size]) -> String {
    sizes.iter().map(|size| format!("{:>10}  {}\n", mebibytes(size.bytes), size.path)).collect()
}

fn mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_artifact_is_named_by_crate_kind_and_stem() {
        let artifact = |kind: &str, executable: &str| {
            serde_json::from_str::<Value>(&format!(
                "{{\"manifest_path\": \"/x/fla-dplr/Cargo.toml\", \"executable\": {executable}, \
                 \"target\": {{\"kind\": [\"{kind}\"], \"name\": \"recurrent_fwd\"}}}}"
            ))
            .unwrap()
        };
        let (bench, built) = executable(&artifact("bench", "\"/x/target/recurrent_fwd-1\"")).unwrap();
        assert_eq!(bench.file, "bin/fla-dplr-bench-recurrent_fwd");
        assert_eq!(built, Path::new("/x/target/recurrent_fwd-1"));
        let (unit, _) = executable(&artifact("lib", "\"/x/target/fla_dplr-1\"")).unwrap();
        assert_eq!((unit.file.as_str(), unit.kind), ("bin/fla-dplr-test-lib", Kind::Test));
        assert!(executable(&artifact("lib", "null")).is_none());
    }

    #[test]
    fn a_folder_with_other_files_is_left_alone() {
        let out = std::env::temp_dir().join(format!("xtask-bundle-{}", std::process::id()));
        fs::create_dir_all(&out).unwrap();
        clear(&out).unwrap();
        let file = out.join("file");
        fs::write(&file, "12345").unwrap();
        assert!(clear(&out).is_err());
        assert_eq!(sizes(&out).unwrap()[0].bytes, 5);
        fs::write(out.join(MANIFEST), "{}").unwrap();
        clear(&out).unwrap();
        assert!(out.is_dir() && !file.exists());
        fs::remove_dir_all(out).unwrap();
    }
}
