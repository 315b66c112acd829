//! What documents and comments name in backticks exists: paths, symbols, commands.

use std::collections::{HashMap, HashSet};

use clap::CommandFactory;

use super::Finding;
use super::cuda::included_file;
use super::scan::split;
use crate::flags::Flags;
use crate::tree::Tree;

/// File names with these endings are files of this workspace.
const OWN_FILES: &[&str] = &["rs", "cu", "cuh", "md", "toml"];

/// Folders of a crate, which its own documents name without the crate.
const CRATE_FOLDERS: &[&str] = &["src", "tests", "benches", "kernels", "examples"];

/// Folders that exist only after a build.
const GENERATED: &[&str] = &["target", "bundle"];

/// Every path in backticks exists.
pub(super) fn paths(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for Span { path, line, words } in spans(tree) {
        if looks_like_a_path(tree, &words) && !path_exists(tree, path, &words) {
            findings.push(Finding::new(path, line, format!("`{words}` does not exist")));
        }
    }
    findings
}

/// Every `fla_<crate>::name` and `fla::<crate>::name` in backticks is spelt in the code of that crate.
pub(super) fn symbols(tree: &Tree) -> Vec<Finding> {
    let mut known: HashMap<String, HashSet<String>> = HashMap::new();
    let mut findings = Vec::new();
    for Span { path, line, words } in spans(tree) {
        let name = words.trim_end_matches("()");
        let Some((krate, rest)) = crate_of(tree, name) else { continue };
        let identifiers = known.entry(krate).or_insert_with_key(|krate| identifiers(tree, krate));
        // A generic, a placeholder or a list in braces is left to the reader.
        let is_identifier = |part: &str| part.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
        let plain = name.split("::").all(|part| !part.is_empty() && is_identifier(part));
        let missing = rest.split("::").find(|part| !identifiers.contains(*part));
        if let (true, Some(missing)) = (plain, missing) {
            findings.push(Finding::new(
                path,
                line,
                format!("`{words}`: there is no `{missing}` in that crate"),
            ));
        }
    }
    findings
}

/// Every `cargo xtask <command>` is a command.
pub(super) fn commands(tree: &Tree) -> Vec<Finding> {
    let flags = Flags::command();
    let mut findings = Vec::new();
    let documents = tree.files.iter().filter(|(path, _)| path.ends_with(".md") || path.as_str() == ".ci/run");
    for (path, text) in documents {
        for (number, line) in text.lines().enumerate() {
            for (at, start) in line.match_indices("cargo xtask ") {
                let rest = &line[at + start.len()..];
                let name =
                    rest.split(|c: char| !c.is_ascii_lowercase() && c != '-').next().unwrap_or_default();
                let known = name == "help" || flags.find_subcommand(name).is_some();
                if !name.is_empty() && !known {
                    let message = format!("there is no command `cargo xtask {name}`");
                    findings.push(Finding::new(path, number + 1, message));
                }
            }
        }
    }
    findings
}

/// Words in backticks.
struct Span<'a> {
    path: &'a str,
    line: usize,
    words: String,
}

/// The code spans of every document and comment; fenced blocks are examples and are not read.
fn spans(tree: &Tree) -> Vec<Span<'_>> {
    let mut spans = Vec::new();
    for (path, text) in tree.with_extension(&["md", "rs", "cu", "cuh"]) {
        let text = if path.ends_with(".md") { text.to_owned() } else { split(text).comments };
        let mut fenced = false;
        for (number, line) in text.lines().enumerate() {
            let content = line.trim().trim_start_matches(['/', '!']).trim();
            if content.starts_with("```") {
                fenced = !fenced;
                continue;
            }
            if fenced {
                continue;
            }
            for words in line.split('`').skip(1).step_by(2) {
                spans.push(Span { path, line: number + 1, words: words.to_owned() });
            }
        }
    }
    spans
}

fn looks_like_a_path(tree: &Tree, words: &str) -> bool {
    let plain = words.chars().all(|c| c.is_ascii_alphanumeric() || "_-./".contains(c));
    if !plain || words.starts_with(['/', '-']) || !words.contains(['/', '.']) {
        return false;
    }
    let first = words.split('/').next().unwrap_or_default();
    if GENERATED.contains(&first) {
        return false;
    }
    let own_file =
        words.rsplit_once('.').is_some_and(|(name, end)| !name.is_empty() && OWN_FILES.contains(&end));
    let own_folder = CRATE_FOLDERS.contains(&first) || (tree.exists(first) && first != ".");
    own_file || (words.contains('/') && own_folder)
}

/// Whether `words`, in the file at `path`, is a path from the root, from the file, or from its crate.
fn path_exists(tree: &Tree, path: &str, words: &str) -> bool {
    if let Some(file) = included_file(words) {
        return tree.exists(&file);
    }
    let folder = path.rsplit_once('/').map_or("", |(folder, _)| folder);
    if tree.exists(words) || tree.exists(&joined(folder, words)) {
        return true;
    }
    let krate = path.split('/').next().unwrap_or_default();
    let in_crate_folder = CRATE_FOLDERS.contains(&words.split('/').next().unwrap_or_default());
    let ends = format!("/{}", words.trim_start_matches("./").trim_end_matches('/'));
    let inner = format!("{ends}/");
    // A folder of a crate is that of the crate it is named in; the documents of the workspace and `xtask` speak of
    // any crate, and so does a bare name.
    let any_crate = !in_crate_folder || !path.contains('/') || krate == "xtask";
    tree.files
        .keys()
        .filter(|file| any_crate || file.starts_with(&format!("{krate}/")))
        .any(|file| file.ends_with(&ends) || file.contains(&inner))
}

/// `words` from `folder`, with `.` and `..` resolved.
fn joined(folder: &str, words: &str) -> String {
    let mut parts: Vec<&str> = folder.split('/').filter(|part| !part.is_empty()).collect();
    for part in words.split('/') {
        match part {
            "." | "" => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    parts.join("/")
}

/// The folder of the crate that a path of Rust or CUDA starts in, and the rest of the path.
fn crate_of<'a>(tree: &Tree, name: &'a str) -> Option<(String, &'a str)> {
    let (krate, rest) = match name.strip_prefix("fla::") {
        Some(cuda) => match cuda.split_once("::") {
            Some((krate, rest)) if tree.exists(&folder_of(krate)) => (folder_of(krate), rest),
            _ => ("fla-core".to_owned(), cuda),
        },
        None => {
            let (krate, rest) = name.strip_prefix("fla_")?.split_once("::")?;
            (folder_of(krate), rest)
        }
    };
    Some((krate, rest))
}

fn folder_of(krate: &str) -> String {
    format!("fla-{}", krate.replace('_', "-"))
}

fn identifiers(tree: &Tree, krate: &str) -> HashSet<String> {
    let folder = format!("{krate}/");
    let sources = tree.with_extension(&["rs", "cu", "cuh"]).filter(|(path, _)| path.starts_with(&folder));
    let mut identifiers = HashSet::new();
    for (path, text) in sources {
        // A module is named by its file.
        identifiers.insert(crate::tree::stem(path).to_owned());
        let code = split(text).code;
        let words = code.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        identifiers.extend(words.map(str::to_owned));
    }
    identifiers
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(document: &str) -> Tree {
        Tree::of(&[
            ("README.md", document),
            ("fla-core/Cargo.toml", ""),
            ("fla-core/src/unit.rs", "pub struct Unit;\n"),
            ("fla-core/kernels/prelude.cuh", "namespace fla { struct bf16 {}; }\n"),
            ("fla-dplr/src/config.rs", "//! Like `src/unit.rs`.\n"),
        ])
    }

    fn lines(check: fn(&Tree) -> Vec<Finding>, document: &str) -> Vec<(String, usize)> {
        check(&tree(document)).into_iter().map(|finding| (finding.path, finding.line)).collect()
    }

    #[test]
    fn a_path_that_is_not_there_is_found() {
        let good = "`fla-core/src/unit.rs` `fla-core` `src/config.rs` `unit.rs` `fla/core/prelude.cuh` `kernels/`\n\
                    `target/cuda/x.toml` `half/num-traits` `T/C` `1.5` `<crate>/README.md` `README.md`\n\
                    ```text\n`fla-core/src/none.rs`\n```\n";
        // The comment of fla-dplr names a file that another crate has.
        let elsewhere = ("fla-dplr/src/config.rs".to_owned(), 1);
        assert_eq!(lines(paths, good), [elsewhere]);
        for bad in [
            "`fla-core/src/none.rs`",
            "`none.rs`",
            "`src/none.rs`",
            "`fla/core/none.cuh`",
            "`fla-core/none/`",
        ] {
            assert!(lines(paths, bad).contains(&("README.md".to_owned(), 1)), "{bad}");
        }
    }

    #[test]
    fn a_symbol_that_is_not_there_is_found() {
        let none: [(String, usize); 0] = [];
        let good = "`fla_core::Unit` `fla_core::unit::Unit` `fla::bf16` `fla_core::Unit<P>` `std::fmt`\n";
        assert_eq!(lines(symbols, good), none);
        for bad in ["`fla_core::None`", "`fla_core::none::Unit`", "`fla::core::none`", "`fla_core::none()`"] {
            assert_eq!(lines(symbols, bad), [("README.md".to_owned(), 1)], "{bad}");
        }
    }

    #[test]
    fn a_command_that_is_not_there_is_found() {
        let text = "`cargo xtask find x`\n```sh\ncargo xtask nothing\n```\n`cargo xtask <command>`\n";
        assert_eq!(lines(commands, text), [("README.md".to_owned(), 3)]);
    }
}
