//! The checks that a reader cannot make: names, headers, edges, imports, paths in documents.

use std::fmt;

use crate::Result;
use crate::tree::{Tree, workspace_root};

mod cuda;
mod documents;
mod edges;
mod passes;
mod rust;
mod scan;
mod words;

/// One violation of a house rule.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Finding {
    path: String,
    line: usize,
    message: String,
}

impl Finding {
    fn new(path: &str, line: usize, message: impl Into<String>) -> Finding {
        Finding { path: path.to_owned(), line, message: message.into() }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.path, self.line, self.message)
    }
}

/// A house rule as a program.
type Check = fn(&Tree) -> Vec<Finding>;

const CHECKS: &[Check] = &[
    rust::opening_sentence,
    rust::imports,
    rust::macros,
    rust::test_attributes,
    cuda::headers,
    cuda::entries,
    cuda::twins,
    cuda::assembly,
    cuda::preprocessor,
    cuda::include_direction,
    edges::between_crates,
    edges::core_names_no_model,
    passes::rows,
    passes::kernel_names,
    documents::paths,
    documents::symbols,
    documents::commands,
    words::versions,
    words::unfinished,
    words::hosts,
];

/// Prints every finding as `path:line: message`; `Ok(true)` when there is none.
pub(crate) fn run() -> Result<bool> {
    let tree = Tree::load(&workspace_root())?;
    let mut findings: Vec<Finding> = CHECKS.iter().flat_map(|check| check(&tree)).collect();
    findings.sort();
    findings.dedup();
    for finding in &findings {
        println!("{finding}");
    }
    println!("tidy: {} files, {} checks, {} findings", tree.files.len(), CHECKS.len(), findings.len());
    Ok(findings.is_empty())
}
