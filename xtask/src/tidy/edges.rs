//! Who may depend on whom.

use super::Finding;
use super::scan::split;
use crate::tree::Tree;

/// What one crate may see of the others.
struct Edges {
    krate: &'static str,
    /// In ordinary builds.
    dependencies: &'static [&'static str],
    /// In tests and benches.
    dev_dependencies: &'static [&'static str],
}

const TEST_HELP: &[&str] = &["fla-core", "fla-reference"];

/// The whole graph; `xtask` may depend on everything, and nothing on it.
const EDGES: &[Edges] = &[
    Edges { krate: "fla-core", dependencies: &[], dev_dependencies: TEST_HELP },
    Edges { krate: "fla-reference", dependencies: &[], dev_dependencies: &[] },
    Edges { krate: "fla-rwkv4", dependencies: &["fla-core"], dev_dependencies: TEST_HELP },
    Edges { krate: "fla-rwkv6", dependencies: &["fla-core"], dev_dependencies: TEST_HELP },
    Edges { krate: "fla-rwkv7", dependencies: &["fla-core", "fla-dplr"], dev_dependencies: TEST_HELP },
    Edges { krate: "fla-gated-delta", dependencies: &["fla-core"], dev_dependencies: TEST_HELP },
    Edges { krate: "fla-dplr", dependencies: &["fla-core"], dev_dependencies: TEST_HELP },
];

/// The crate whose kernels the crate in `folder` launches instead of its own.
pub(super) fn lender(folder: &str) -> Option<&'static str> {
    let edges = EDGES.iter().find(|edges| edges.krate == folder)?;
    edges.dependencies.iter().copied().find(|&krate| krate != "fla-core")
}

/// Every dependency between the crates here is in the list.
pub(super) fn between_crates(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for folder in tree.crates() {
        if folder == "xtask" {
            continue;
        }
        let path = format!("{folder}/Cargo.toml");
        let Some(edges) = EDGES.iter().find(|edges| edges.krate == folder) else {
            findings.push(Finding::new(&path, 1, "this crate is not in the list of edges of `tidy`"));
            continue;
        };
        let mut section = "";
        for (number, line) in tree.text(&path).unwrap_or_default().lines().enumerate() {
            let line = line.trim();
            if line.starts_with('[') {
                section = line.trim_matches(['[', ']']);
            }
            // Either a key in a table of dependencies, or a table of its own.
            let (table, name) = match section.rsplit_once('.') {
                Some((table, name)) if table.ends_with("dependencies") && line.starts_with('[') => {
                    (table, name)
                }
                _ => (section, line.split(['.', '=', ' ']).next().unwrap_or_default()),
            };
            if !name.starts_with("fla-") && name != "xtask" {
                continue;
            }
            let allowed = match table {
                "dev-dependencies" => edges.dev_dependencies,
                _ if table.ends_with("dependencies") => edges.dependencies,
                _ => continue,
            };
            if !allowed.contains(&name) {
                let message = format!("{folder} must not depend on {name} in [{table}]");
                findings.push(Finding::new(&path, number + 1, message));
            }
        }
    }
    findings
}

/// The core serves every model and knows none.
pub(super) fn core_names_no_model(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (path, text) in tree.under("fla-core/").filter(|(path, _)| is_source(path)) {
        for (number, line) in split(text).code_lines() {
            for name in ["rwkv", "gated_delta", "dplr", "Rwkv", "GatedDelta", "Dplr"] {
                // A test may lean on the references of a model.
                if line.contains(name) && !path.starts_with("fla-core/tests/") {
                    findings.push(Finding::new(path, number, format!("the core names a model: {name}")));
                }
            }
        }
    }
    findings
}

fn is_source(path: &str) -> bool {
    [".rs", ".cu", ".cuh"].iter().any(|end| path.ends_with(end))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_edge_that_is_not_listed_is_found_in_every_spelling() {
        let tree = Tree::of(&[
            (
                "fla-dplr/Cargo.toml",
                "[package]\nname = \"fla-dplr\"\n[dependencies]\nfla-core.workspace = true\n\
                 fla-rwkv7 = { workspace = true }\nfla-reference.workspace = true\n\
                 [dev-dependencies]\nfla-reference.workspace = true\n[dependencies.fla-rwkv4]\nversion = \"1\"\n",
            ),
            ("fla-rwkv7/Cargo.toml", "[dependencies]\nfla-dplr.workspace = true\n"),
            ("fla-new/Cargo.toml", ""),
            ("xtask/Cargo.toml", "[dependencies]\nfla-dplr.workspace = true\n"),
        ]);
        let found: Vec<(String, usize)> =
            between_crates(&tree).into_iter().map(|finding| (finding.path, finding.line)).collect();
        let dplr = "fla-dplr/Cargo.toml".to_owned();
        let new = "fla-new/Cargo.toml".to_owned();
        assert_eq!(found, [(dplr.clone(), 5), (dplr.clone(), 6), (dplr, 9), (new, 1)]);
    }

    #[test]
    fn only_code_of_the_core_is_asked_for_models() {
        let text = "//! Not for rwkv7.\nfn f(x: Rwkv7) {}\n";
        let tree = Tree::of(&[("fla-core/src/a.rs", text), ("fla-core/tests/a.rs", text)]);
        let found = core_names_no_model(&tree);
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].path.as_str(), found[0].line), ("fla-core/src/a.rs", 2));
    }

    #[test]
    fn only_rwkv7_borrows_kernels() {
        assert_eq!(lender("fla-rwkv7"), Some("fla-dplr"));
        assert_eq!(lender("fla-dplr"), None);
    }
}
