//! Where this program works: in a checkout of the workspace, or in a bundle that was carried to another machine.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::Result;
use crate::tree::workspace_root;

/// The list of what a bundle holds, beside the executable of this program.
pub(crate) const MANIFEST: &str = "bundle.json";

/// The folder of conformance cases in a bundle.
pub(crate) const BUNDLED_VECTORS: &str = "vectors";

/// The project's own conformance cases in a checkout.
pub(crate) const VECTORS: &str = "fla-reference/tests/vectors";

/// A checkout or a bundle.
#[derive(Debug)]
pub(crate) enum Home {
    Workspace(PathBuf),
    Bundle(Bundle),
}

/// A folder of executables that need neither cargo nor the sources.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Bundle {
    pub(crate) root: PathBuf,
    /// The commit that it was built from, with `-dirty` when the checkout held more than that.
    pub(crate) commit: String,
    pub(crate) executables: Vec<Executable>,
}

/// A test or bench executable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Executable {
    /// The stem of its source: `recurrent_fwd`.
    pub(crate) name: String,
    /// The crate that it belongs to: `fla-dplr`.
    pub(crate) krate: String,
    pub(crate) kind: Kind,
    /// Its path from the root of the bundle.
    pub(crate) file: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Test,
    Bench,
}

impl Kind {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Kind::Test => "test",
            Kind::Bench => "bench",
        }
    }

    fn parse(name: &str) -> Option<Kind> {
        [Kind::Test, Kind::Bench].into_iter().find(|kind| kind.name() == name)
    }
}

impl Home {
    /// A bundle when its manifest lies beside this executable, otherwise the checkout.
    pub(crate) fn find() -> Result<Home> {
        let program =
            env::current_exe().map_err(|source| format!("cannot find this executable: {source}"))?;
        let manifest = program.with_file_name(MANIFEST);
        if !manifest.is_file() {
            return Ok(Home::Workspace(workspace_root()));
        }
        let text = fs::read_to_string(&manifest)
            .map_err(|source| format!("cannot read {}: {source}", manifest.display()))?;
        let root = program.parent().unwrap_or(Path::new(".")).to_path_buf();
        let bundle = Bundle::from_json(root, &text)
            .map_err(|why| format!("{} is not a list of a bundle: {why}", manifest.display()))?;
        Ok(Home::Bundle(bundle))
    }

    /// The folder that relative paths start from.
    pub(crate) fn root(&self) -> &Path {
        match self {
            Home::Workspace(root) => root,
            Home::Bundle(bundle) => &bundle.root,
        }
    }

    pub(crate) fn is_bundle(&self) -> bool {
        matches!(self, Home::Bundle(_))
    }

    /// The project's own conformance cases.
    pub(crate) fn vectors(&self) -> PathBuf {
        match self {
            Home::Workspace(root) => root.join(VECTORS),
            Home::Bundle(bundle) => bundle.root.join(BUNDLED_VECTORS),
        }
    }
}

impl Bundle {
    /// The manifest as text.
    pub(crate) fn to_json(&self) -> String {
        let executables: Vec<Value> = self
            .executables
            .iter()
            .map(|executable| {
                let Executable { name, krate, kind, file } = executable;
                json!({ "name": name, "crate": krate, "kind": kind.name(), "file": file })
            })
            .collect();
        format!("{:#}\n", json!({ "commit": self.commit, "executables": executables }))
    }

    fn from_json(root: PathBuf, text: &str) -> Result<Bundle> {
        let manifest: Value = serde_json::from_str(text)?;
        let string = |value: &Value, key: &str| -> Result<String> {
            let found = value[key].as_str().ok_or_else(|| format!("`{key}` is missing"))?;
            Ok(found.to_owned())
        };
        let mut executables = Vec::new();
        for entry in manifest["executables"].as_array().ok_or("`executables` is missing")? {
            let kind = string(entry, "kind")?;
            let kind = Kind::parse(&kind).ok_or_else(|| format!("`{kind}` is not a kind of executable"))?;
            executables.push(Executable {
                name: string(entry, "name")?,
                krate: string(entry, "crate")?,
                kind,
                file: string(entry, "file")?,
            });
        }
        Ok(Bundle { root, commit: string(&manifest, "commit")?, executables })
    }

    /// The executables of one kind.
    pub(crate) fn of_kind(&self, kind: Kind) -> impl Iterator<Item = &Executable> {
        self.executables.iter().filter(move |executable| executable.kind == kind)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manifest_is_read_as_it_was_written() {
        let executable = |name: &str, kind| Executable {
            name: name.to_owned(),
            krate: "fla-dplr".to_owned(),
            kind,
            file: format!("bin/{name}"),
        };
        let bundle = Bundle {
            root: PathBuf::from("here"),
            commit: "abc-dirty".to_owned(),
            executables: vec![executable("a", Kind::Test), executable("b", Kind::Bench)],
        };
        let read = Bundle::from_json(PathBuf::from("here"), &bundle.to_json()).unwrap();
        assert_eq!(read, bundle);
        assert_eq!(read.of_kind(Kind::Bench).count(), 1);
    }

    #[test]
    fn a_broken_manifest_says_what_is_missing() {
        for (text, missing) in [
            ("{}", "executables"),
            ("{\"executables\": []}", "commit"),
            ("{\"commit\": \"a\", \"executables\": [{\"kind\": \"tool\"}]}", "tool"),
        ] {
            let error = Bundle::from_json(PathBuf::new(), text).unwrap_err().to_string();
            assert!(error.contains(missing), "{text}: {error}");
        }
    }
}
