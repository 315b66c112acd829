//! Finds NVRTC and the disassembler, or takes NVIDIA's wheels into `target/cuda` once.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use fla_core::compile::{nvrtc_path, nvrtc_version};
use indicatif::{ProgressBar, ProgressStyle};

use crate::Result;

/// The variable by which every crate here is told where CUDA's libraries lie.
const LIB_DIR_VAR: &str = "FLA_CUDA_LIB_DIR";

/// What is taken when the machine has no CUDA toolkit. The committed table of registers belongs to this NVRTC.
const WHEELS: &[&str] = &["nvidia-cuda-nvrtc==13.0.88", "nvidia-cuda-nvdisasm==13.2.86"];

/// Where the wheels lie below the root of the workspace.
const FOLDER: &str = "target/cuda";

/// The NVRTC that kernels are compiled with.
#[derive(Clone, Debug, Default)]
pub(crate) struct Toolchain {
    /// The value of `FLA_CUDA_LIB_DIR` that finds it; absent when it is found without.
    lib_dir: Option<PathBuf>,
    /// For the reader: version and place.
    pub(crate) description: String,
}

impl Toolchain {
    /// The NVRTC of the environment, of the loader or of a toolkit; otherwise that of the wheels, which are fetched
    /// into the workspace at `root` when they are not there yet.
    pub(crate) fn find(root: &Path) -> Result<Toolchain> {
        // Which places are tried, and in which order, is the library's business: ask it.
        if let (Ok(version), Ok(path)) = (nvrtc_version(), nvrtc_path()) {
            let description = format!("NVRTC {version}, {}", path.display());
            return Ok(Toolchain { lib_dir: None, description });
        }
        if let Some(dir) = env::var_os(LIB_DIR_VAR) {
            let dir = Path::new(&dir).display();
            return Err(format!(
                "{LIB_DIR_VAR} is {dir}, but there is no usable NVRTC; unset it to have one fetched"
            )
            .into());
        }
        let folder = wheels(root)?;
        let lib_dir = lib_dir(&folder);
        let description = format!("NVRTC of {}, {}", WHEELS[0], lib_dir.display());
        Ok(Toolchain { lib_dir: Some(lib_dir), description })
    }

    /// Whether this process already sees the NVRTC, or a child of it would.
    pub(crate) fn is_visible_here(&self) -> bool {
        self.lib_dir.is_none()
    }

    /// Lets a child process find it.
    pub(crate) fn apply(&self, command: &mut Command) {
        if let Some(dir) = &self.lib_dir {
            command.env(LIB_DIR_VAR, dir);
        }
    }
}

/// The disassembler of the path, of a toolkit or of the wheels.
pub(crate) fn nvdisasm(root: &Path) -> Result<PathBuf> {
    let on_path: Vec<PathBuf> =
        env::var_os("PATH").map(|path| env::split_paths(&path).collect()).unwrap_or_default();
    let toolkits = ["CUDA_HOME", "CUDA_PATH"].iter().filter_map(env::var_os).map(PathBuf::from);
    let toolkits = toolkits.chain([PathBuf::from("/usr/local/cuda"), PathBuf::from("/opt/cuda")]);
    let installed = on_path.into_iter().chain(toolkits.map(|toolkit| toolkit.join("bin")));
    let found = installed.map(|folder| folder.join("nvdisasm")).find(|program| program.is_file());
    match found {
        Some(program) => Ok(program),
        None => Ok(wheels(root)?.join("nvidia/cu13/bin/nvdisasm")),
    }
}

fn lib_dir(folder: &Path) -> PathBuf {
    folder.join("nvidia/cu13/lib")
}

/// The folder of the unpacked wheels, after they were fetched if need be.
fn wheels(root: &Path) -> Result<PathBuf> {
    let folder = root.join(FOLDER);
    if is_complete(&folder) {
        return Ok(folder);
    }
    // Unpacked beside its place and renamed, so that an interrupted download is never taken for a finished one.
    let partial = root.join(format!("{FOLDER}.partial-{}", std::process::id()));
    let unpacked = fetch(&partial).and_then(|()| put(&partial, &folder));
    if partial.exists() {
        fs::remove_dir_all(&partial)
            .map_err(|source| format!("cannot remove {}: {source}", partial.display()))?;
    }
    unpacked.map(|()| folder)
}

/// Whether the folder holds what the wheels hold.
fn is_complete(folder: &Path) -> bool {
    let files = ["lib/libnvrtc.so.13", "lib/libnvrtc-builtins.so.13.0", "bin/nvdisasm"];
    files.iter().all(|file| folder.join("nvidia/cu13").join(file).is_file())
}

fn fetch(partial: &Path) -> Result<()> {
    let bar = ProgressBar::new_spinner()
        .with_style(ProgressStyle::with_template("{spinner} {msg} {elapsed}")?)
        .with_message(format!("fetching {} (95 MB, once)", WHEELS.join(" and ")));
    bar.enable_steady_tick(std::time::Duration::from_millis(100));
    let remedy = "install a CUDA toolkit of version 12.9 or later, or name a folder that holds libnvrtc.so in \
                  FLA_CUDA_LIB_DIR";
    let output = Command::new("python3")
        .args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--target"])
        .arg(partial)
        .args(WHEELS)
        .output()
        .map_err(|source| {
            format!(
                "there is no NVRTC, and python3, which would fetch it, cannot be started ({source}): {remedy}"
            )
        })?;
    bar.finish_and_clear();
    if !output.status.success() {
        let why = String::from_utf8_lossy(&output.stderr);
        let why = why.trim();
        return Err(format!(
            "there is no NVRTC, and `python3 -m pip install {}` failed; {remedy}. pip says:\n{why}",
            WHEELS.join(" ")
        )
        .into());
    }
    Ok(())
}

fn put(partial: &Path, folder: &Path) -> Result<()> {
    if !is_complete(partial) {
        return Err(format!("the wheels {} do not hold what they should", WHEELS.join(" and ")).into());
    }
    // Whatever is incomplete there is of no use; another process may meanwhile have put a complete one.
    if folder.exists() && !is_complete(folder) {
        fs::remove_dir_all(folder)
            .map_err(|source| format!("cannot remove {}: {source}", folder.display()))?;
    }
    match fs::rename(partial, folder) {
        Err(source) if !is_complete(folder) => {
            Err(format!("cannot rename {} to {}: {source}", partial.display(), folder.display()).into())
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_a_download_is_not_taken_for_a_whole_one() {
        let root = env::temp_dir().join(format!("xtask-toolchain-{}", std::process::id()));
        let (partial, folder) = (root.join("partial"), root.join("cuda"));
        let fill = |folder: &Path, files: &[&str]| {
            for file in files {
                let file = folder.join("nvidia/cu13").join(file);
                fs::create_dir_all(file.parent().unwrap()).unwrap();
                fs::write(file, "").unwrap();
            }
        };
        fill(&folder, &["lib/libnvrtc.so.13"]);
        assert!(!is_complete(&folder));
        fill(&partial, &["lib/libnvrtc.so.13", "bin/nvdisasm"]);
        assert!(put(&partial, &folder).is_err());
        fill(&partial, &["lib/libnvrtc-builtins.so.13.0"]);
        put(&partial, &folder).unwrap();
        assert!(is_complete(&folder) && !partial.exists());
        // A second process that comes late leaves the first one's in place.
        fill(&partial, &["lib/libnvrtc.so.13", "lib/libnvrtc-builtins.so.13.0", "bin/nvdisasm"]);
        put(&partial, &folder).unwrap();
        assert!(is_complete(&folder));
        fs::remove_dir_all(root).unwrap();
    }
}
