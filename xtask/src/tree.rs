//! The files of the workspace as text, which is what `tidy` and `find` read.

use std::collections::BTreeMap;
use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Result;

/// The root of the workspace that `cargo xtask` was called in, or else that this program was built from.
pub(crate) fn workspace_root() -> PathBuf {
    let xtask = env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    let xtask = Path::new(&xtask);
    xtask.parent().unwrap_or(xtask).to_path_buf()
}

/// Every file of the workspace that git does not ignore, by its path from the root with `/` between parts.
///
/// A file that is not text has the empty string as its text.
#[derive(Debug, Default)]
pub(crate) struct Tree {
    pub(crate) files: BTreeMap<String, String>,
}

impl Tree {
    /// Reads the workspace at `root`.
    pub(crate) fn load(root: &Path) -> Result<Tree> {
        let output = Command::new("git")
            .args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"])
            .current_dir(root)
            .output()
            .map_err(|source| format!("cannot run git to list the files of {}: {source}", root.display()))?;
        if !output.status.success() {
            let why = String::from_utf8_lossy(&output.stderr);
            return Err(format!("git cannot list the files of {}: {}", root.display(), why.trim()).into());
        }
        let mut tree = Tree::default();
        for path in String::from_utf8_lossy(&output.stdout).split_terminator('\0') {
            // A file that is deleted but not yet committed is still listed.
            let Ok(bytes) = std::fs::read(root.join(path)) else { continue };
            tree.files.insert(path.to_owned(), String::from_utf8(bytes).unwrap_or_default());
        }
        Ok(tree)
    }

    /// The text of the file at `path`.
    pub(crate) fn text(&self, path: &str) -> Option<&str> {
        self.files.get(path).map(String::as_str)
    }

    /// Whether a file or a folder lies at `path`.
    pub(crate) fn exists(&self, path: &str) -> bool {
        let path = path.trim_end_matches('/');
        let folder = format!("{path}/");
        self.files.contains_key(path) || self.under(&folder).next().is_some()
    }

    /// The files whose path starts with `prefix`.
    pub(crate) fn under<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = (&'a str, &'a str)> {
        self.files
            .range(prefix.to_owned()..)
            .take_while(move |(path, _)| path.starts_with(prefix))
            .map(|(path, text)| (path.as_str(), text.as_str()))
    }

    /// The files whose name ends in `.` and one of `extensions`.
    pub(crate) fn with_extension<'a>(
        &'a self,
        extensions: &'a [&'a str],
    ) -> impl Iterator<Item = (&'a str, &'a str)> {
        self.files
            .iter()
            .filter(|(path, _)| path.rsplit_once('.').is_some_and(|(_, end)| extensions.contains(&end)))
            .map(|(path, text)| (path.as_str(), text.as_str()))
    }

    /// The folders at the root that hold a crate.
    pub(crate) fn crates(&self) -> Vec<&str> {
        self.files
            .keys()
            .filter_map(|path| path.strip_suffix("/Cargo.toml"))
            .filter(|folder| !folder.contains('/'))
            .collect()
    }
}

#[cfg(test)]
impl Tree {
    /// A tree for a test, from pairs of path and text.
    pub(crate) fn of(files: &[(&str, &str)]) -> Tree {
        let files = files.iter().map(|(path, text)| (path.to_string(), text.to_string())).collect();
        Tree { files }
    }
}

/// The stem of a file: its name without folder and without extension.
pub(crate) fn stem(path: &str) -> &str {
    let name = path.rsplit('/').next().unwrap_or(path);
    name.rsplit_once('.').map_or(name, |(stem, _)| stem)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_exists_when_a_file_lies_in_it() {
        let tree = Tree::of(&[("fla-core/src/lib.rs", ""), ("fla-core/Cargo.toml", "")]);
        for path in ["fla-core", "fla-core/", "fla-core/src", "fla-core/src/lib.rs"] {
            assert!(tree.exists(path), "{path}");
        }
        for path in ["fla-cor", "fla-core/sr", "fla-core/src/lib.r"] {
            assert!(!tree.exists(path), "{path}");
        }
        assert_eq!(tree.crates(), ["fla-core"]);
    }

    #[test]
    fn the_stem_has_neither_folder_nor_extension() {
        assert_eq!(stem("fla-dplr/kernels/recurrent_fwd.cu"), "recurrent_fwd");
        assert_eq!(stem("run"), "run");
    }
}
