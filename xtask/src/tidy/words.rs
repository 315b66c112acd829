//! Words that do not belong into the tree: versions in names, unfinished work, the machine of whoever wrote it.

use super::Finding;
use super::scan::split;
use crate::tree::{Tree, stem};

/// This file spells out what it looks for.
const SELF: &str = "xtask/src/tidy/words.rs";

/// Endings that tell history, which is git's business.
const FILE_ENDINGS: &[&str] = &["_new", "_old", "_opt", "_wip", "_tmp", "_final", "_copy", "_fixed"];

/// Notes to oneself.
const MARKERS: &[&str] = &["TODO", "FIXME", "XXX", "HACK"];

/// Folders and package sources that exist for one person or one machine.
const HOSTS: &[&str] = &[
    "/home/",
    "/root/",
    "/Users/",
    "/mnt/",
    "/work/",
    "../shared",
    "--index-url",
    "--extra-index-url",
    "pip.conf",
];

/// No version in the name of a file, a function or a type.
pub(super) fn versions(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (path, text) in tree.with_extension(&["rs", "cu", "cuh"]) {
        let name = stem(path);
        if is_version(name) || FILE_ENDINGS.iter().any(|end| name.ends_with(end)) {
            findings.push(Finding::new(path, 1, "a version in a file name: history is in git"));
        }
        for (number, line) in split(text).code_lines() {
            // A function for C has the name that C gave it.
            if line.contains("extern \"") {
                continue;
            }
            for word in ["fn ", "struct ", "enum ", "trait ", "mod ", "void "] {
                let name = line.split_once(word).map(|(_, rest)| identifier(rest)).unwrap_or_default();
                if is_version(name) || name.ends_with("_wip") {
                    findings.push(Finding::new(path, number, format!("a version in the name `{name}`")));
                }
            }
        }
    }
    findings
}

/// No note about unfinished work without a link, an issue or a version that finishes it.
pub(super) fn unfinished(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (path, text) in tree.with_extension(&["rs", "cu", "cuh", "md"]) {
        if path == SELF {
            continue;
        }
        let text = if path.ends_with(".md") { text.to_owned() } else { split(text).comments };
        for (number, line) in text.lines().enumerate() {
            let mut words = line.split(|c: char| !c.is_alphanumeric() && c != '_');
            let Some(marker) = words.find(|word| MARKERS.contains(word)) else { continue };
            // A document may name the rule itself, in backticks.
            if !line.contains(&format!("`{marker}`")) && !has_address(line) {
                findings.push(Finding::new(
                    path,
                    number + 1,
                    format!("{marker} without a link or a version"),
                ));
            }
        }
    }
    findings
}

/// No folder of one machine, and no package source of one network.
pub(super) fn hosts(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (path, text) in &tree.files {
        if path == SELF || path == "Cargo.lock" {
            continue;
        }
        for (number, line) in text.lines().enumerate() {
            for host in HOSTS {
                // `https://x.org/home/` and `a/work/` are parts of something longer.
                let part_of_more = |c: char| c.is_alphanumeric() || "_-.".contains(c);
                let found = line.match_indices(host).any(|(at, _)| {
                    let before = line[..at].chars().next_back();
                    !(host.starts_with('/') && before.is_some_and(part_of_more))
                });
                if found {
                    let message = format!("`{host}` belongs to one machine or network");
                    findings.push(Finding::new(path, number + 1, message));
                }
            }
        }
    }
    findings
}

fn identifier(text: &str) -> &str {
    text.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or_default()
}

/// `_v` and digits at the end.
fn is_version(name: &str) -> bool {
    let digits = name.rsplit_once("_v").map_or("", |(_, digits)| digits);
    !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit())
}

fn has_address(line: &str) -> bool {
    let digit_after = |mark: char| {
        line.match_indices(mark).any(|(at, _)| line[at + 1..].starts_with(|c: char| c.is_ascii_digit()))
    };
    let version = line.split_whitespace().any(|word| {
        let mut parts = word.trim_matches(|c: char| !c.is_ascii_digit()).split('.');
        parts.clone().count() >= 2 && parts.all(|part| part.parse::<u32>().is_ok())
    });
    line.contains("http") || digit_after('#') || version
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_found_in_files_and_symbols() {
        let tree = Tree::of(&[
            ("a/kernels/wkv_v2.cu", ""),
            ("a/src/fast_wip.rs", ""),
            (
                "a/src/good.rs",
                "// fn f_v2\nextern \"C\" fn cuFree_v2() {}\nfn read_opt() {}\nlet x_v = k_v1;\n",
            ),
            ("a/src/x.rs", "fn f_v12() {}\nstruct S;\n"),
        ]);
        let found: Vec<String> = versions(&tree).into_iter().map(|finding| finding.path).collect();
        assert_eq!(found, ["a/kernels/wkv_v2.cu", "a/src/fast_wip.rs", "a/src/x.rs"]);
    }

    #[test]
    fn a_note_needs_an_address() {
        let text = "// TODO: later\n// TODO: https://x.org/1\n// TODO(#12) this\n// TODO in 0.2\nlet todo = \"TODO\";\n";
        let found = unfinished(&Tree::of(&[("a.rs", text), ("b.md", "The rule on `TODO`.\nFIXME\n")]));
        let found: Vec<(&str, usize)> = found.iter().map(|f| (f.path.as_str(), f.line)).collect();
        assert_eq!(found, [("a.rs", 1), ("b.md", 2)]);
    }

    #[test]
    fn folders_of_one_machine_are_found() {
        let text = "see /home/me/x\nhttps://x.org/home/\n$WORK/work/\npip --index-url x\n/usr/local/cuda\n";
        let found: Vec<usize> =
            hosts(&Tree::of(&[("run", text)])).iter().map(|finding| finding.line).collect();
        assert_eq!(found, [1, 4]);
    }
}
