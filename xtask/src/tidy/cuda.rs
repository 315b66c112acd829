//! Rules for `.cu` and `.cuh` files: header, entry, twins, assembly, preprocessor, includes.

use super::Finding;
use super::edges::lender;
use super::scan::split;
use crate::names::{declared, entry, has_words, params};
use crate::tree::{Tree, stem};

/// The headers below everything else: one instruction per function, and the only place for `asm`.
const LEAF_HEADERS: &[&str] = &["prelude", "math", "warp", "copy", "barrier", "tma", "mma", "wgmma"];

/// What the Reference line says when a kernel exists to test a building block.
const NO_REFERENCE: &str = "none: building block test";

/// Every `.cu` opens with stem and purpose, equation, Reference, Launch, and the FLA counterpart or `-`.
pub(super) fn headers(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (path, text) in tree.with_extension(&["cu"]) {
        let header: Vec<&str> = text.lines().map_while(|line| line.strip_prefix("//")).collect();
        let stem = stem(path);
        let title = header.first().and_then(|line| line.strip_prefix(&format!(" {stem}: ")));
        if title.is_none_or(|purpose| purpose.trim().is_empty()) {
            findings.push(Finding::new(
                path,
                1,
                format!("the header does not open with `// {stem}: <purpose>`"),
            ));
        }
        if !header.iter().any(|line| line.starts_with("   ") && !line.trim().is_empty()) {
            findings.push(Finding::new(
                path,
                1,
                "the header has no equation (a line indented by three spaces)",
            ));
        }
        for key in ["Reference", "Launch", "FLA"] {
            let line = header.iter().position(|line| value(line, key).is_some());
            let Some(line) = line else {
                findings.push(Finding::new(path, 1, format!("the header has no line `// {key}  ...`")));
                continue;
            };
            let value = value(header[line], key).unwrap_or_default();
            if key == "Reference" && value != NO_REFERENCE && !reference_exists(tree, value) {
                let message = format!("the reference `{value}` is not a `pub fn` of fla-reference");
                findings.push(Finding::new(path, line + 1, message));
            }
        }
    }
    findings
}

/// One entry, named after the file, with one parameter struct, named after the entry.
pub(super) fn entries(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (path, text) in tree.with_extension(&["cu"]) {
        let split = split(text);
        let count =
            |wanted: &dyn Fn(&str) -> bool| split.code_lines().filter(|(_, line)| wanted(line)).count();
        let (entry, params) = (format!("void {}", entry(path)), params(path));
        match count(&|line| has_words(line, &entry)) {
            1 => {}
            found => {
                findings.push(Finding::new(path, 1, format!("wants one function `{entry}`, has {found}")))
            }
        }
        let is_params = |line: &str| {
            let name = line.trim().strip_prefix("struct ").map(|rest| rest.split([' ', '{', ';']).next());
            name.flatten().is_some_and(|name| name.ends_with("Params"))
        };
        let own = format!("struct {params}");
        if count(&is_params) != 1 || count(&|line| has_words(line, &own)) != 1 {
            findings.push(Finding::new(path, 1, format!("wants one parameter struct, `{params}`")));
        }
        for (number, line) in split.code_lines().filter(|(_, line)| has_words(line, "__global__")) {
            let message = format!("the unit declares the entry, not the file: `{}`", line.trim());
            findings.push(Finding::new(path, number, message));
        }
    }
    findings
}

/// The Rust side of every `.cu`: the twin of its parameter struct, and the unit that includes its text.
pub(super) fn twins(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (path, _) in tree.with_extension(&["cu"]) {
        let folder = path.split('/').next().unwrap_or_default();
        let rust: Vec<(&str, &str)> = tree
            .with_extension(&["rs"])
            .filter(|(path, _)| path.starts_with(&format!("{folder}/")))
            .collect();
        let twin = format!("struct {}", params(path));
        if !rust.iter().any(|(path, _)| !declared(tree, path, &twin).is_empty()) {
            findings.push(Finding::new(
                path,
                1,
                format!("no Rust file of {folder} declares its twin, `{twin}`"),
            ));
        }
        let name = format!("kernels/{}.cu\")", stem(path));
        if !rust.iter().any(|(_, text)| text.contains("include_str!(") && text.contains(&name)) {
            findings.push(Finding::new(path, 1, format!("no Rust file of {folder} includes its text")));
        }
    }
    findings
}

/// `asm` in leaf headers alone.
pub(super) fn assembly(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (path, text) in tree.with_extension(&["cu", "cuh"]) {
        if is_leaf(path) {
            continue;
        }
        for (number, line) in split(text).code_lines() {
            if has_words(line, "asm") {
                let message = "`asm` outside a leaf header: add a function named after the instruction there";
                findings.push(Finding::new(path, number, message));
            }
        }
    }
    findings
}

/// Nothing of the preprocessor but `#pragma once`, `#pragma unroll` and `#include <...>`; no `using namespace`.
pub(super) fn preprocessor(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (path, text) in tree.with_extension(&["cu", "cuh"]) {
        for (number, line) in split(text).code_lines() {
            let line = line.trim();
            let allowed = ["#pragma once", "#pragma unroll", "#include <"];
            if line.starts_with('#') && !allowed.iter().any(|start| line.starts_with(start)) {
                let message =
                    format!("`{line}`: use constexpr, a concept, a file per arch, or an include in <>");
                findings.push(Finding::new(path, number, message));
            }
            if has_words(line, "using namespace") {
                findings.push(Finding::new(path, number, "`using namespace`: write the namespace"));
            }
        }
    }
    findings
}

/// Includes go one way: leaf headers, then headers over them, then entries; and only along the edges of crates.
pub(super) fn include_direction(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (path, text) in tree.with_extension(&["cu", "cuh"]) {
        let folder = path.split('/').next().unwrap_or_default();
        for (number, line) in split(text).code_lines() {
            let included = line.trim().strip_prefix("#include <").and_then(|rest| rest.strip_suffix('>'));
            let Some(included) = included else { continue };
            let mut wrong =
                |why: &str| findings.push(Finding::new(path, number, format!("<{included}>: {why}")));
            let Some(target) = included_file(included) else {
                wrong("only headers of this workspace travel with the kernels, as <fla/crate/name.cuh>");
                continue;
            };
            let home = target.split('/').next().unwrap_or_default();
            if tree.text(&target).is_none() {
                wrong(&format!("there is no {target}"));
            } else if home != folder && home != "fla-core" && lender(folder) != Some(home) {
                wrong("no edge leads to that crate");
            } else if level(&target) == Level::Entry {
                wrong("an entry is included by its unit alone");
            } else if level(&target) > level(path) {
                wrong("a leaf header includes leaf headers only");
            } else if path == "fla-core/kernels/prelude.cuh" {
                wrong("the prelude includes nothing");
            }
        }
    }
    findings
}

/// The file that `<fla/core/prelude.cuh>` stands for: `fla-core/kernels/prelude.cuh`.
pub(super) fn included_file(included: &str) -> Option<String> {
    let (krate, file) = included.strip_prefix("fla/")?.split_once('/')?;
    Some(format!("fla-{}/kernels/{file}", krate.replace('_', "-")))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Level {
    Leaf,
    Header,
    Entry,
}

fn level(path: &str) -> Level {
    match path {
        _ if is_leaf(path) => Level::Leaf,
        _ if path.ends_with(".cuh") => Level::Header,
        _ => Level::Entry,
    }
}

fn is_leaf(path: &str) -> bool {
    let name = path.strip_prefix("fla-core/kernels/").and_then(|name| name.strip_suffix(".cuh"));
    name.is_some_and(|name| LEAF_HEADERS.contains(&name))
}

/// The value of a header line `// Key  value`, from the text after the slashes.
fn value<'a>(line: &'a str, key: &str) -> Option<&'a str> {
    let value = line.strip_prefix(' ')?.strip_prefix(key)?;
    (value.starts_with("  ") && !value.trim().is_empty()).then(|| value.trim())
}

/// Whether a path from `fla_reference` on is a public function of that module or of a file below it.
fn reference_exists(tree: &Tree, path: &str) -> bool {
    let Some((module, function)) =
        path.strip_prefix("fla_reference::").and_then(|path| path.split_once("::"))
    else {
        return false;
    };
    let function = format!("pub fn {}", function.rsplit("::").next().unwrap_or(function));
    let file = format!("fla-reference/src/{module}.rs");
    let folder = format!("fla-reference/src/{module}/");
    [file, folder].iter().any(|under| !declared(tree, under, &function).is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "\
// chunk_cumsum: inclusive sum of the log decay inside each chunk.
//
//   g2 = sum of g
//
// Reference  fla_reference::chunk::cumsum
// Launch     grid (NT, H, B), block C
// FLA        -
#pragma once
#include <fla/core/prelude.cuh>
struct ChunkCumsumParams {
    const float* g;
};
__device__ void chunk_cumsum(const ChunkCumsumParams& p) {
    #pragma unroll
}
";
    const PATH: &str = "fla-core/kernels/chunk_cumsum.cu";
    const RUST: &str =
        "const TEXT: &str = include_str!(\"../kernels/chunk_cumsum.cu\");\nstruct ChunkCumsumParams {}\n";

    /// Messages of `check` on a small workspace whose one kernel is `text`.
    fn messages(check: fn(&Tree) -> Vec<Finding>, text: &str) -> Vec<String> {
        let tree = Tree::of(&[
            (PATH, text),
            ("fla-core/kernels/prelude.cuh", "// prelude\n"),
            ("fla-core/src/cumsum.rs", RUST),
            ("fla-reference/src/chunk.rs", "pub fn cumsum() {}\nfn hidden() {}\n"),
        ]);
        check(&tree).into_iter().map(|finding| finding.message).collect()
    }

    fn assert_one(check: fn(&Tree) -> Vec<Finding>, from: &str, to: &str, wanted: &str) {
        assert!(GOOD.contains(from), "{from}");
        let found = messages(check, &GOOD.replace(from, to));
        assert!(found.len() == 1 && found[0].contains(wanted), "{from} -> {to}: {found:?}");
    }

    #[test]
    fn a_good_kernel_has_no_findings() {
        for check in [headers, entries, twins, assembly, preprocessor, include_direction] {
            assert_eq!(messages(check, GOOD), [""; 0]);
        }
        let building_block = GOOD.replace("fla_reference::chunk::cumsum", NO_REFERENCE);
        assert_eq!(messages(headers, &building_block), [""; 0]);
    }

    #[test]
    fn each_of_the_five_parts_is_asked_for() {
        assert_one(headers, "// chunk_cumsum: ", "// chunk_sum: ", "chunk_cumsum: <purpose>");
        assert_one(headers, "//   g2", "// g2", "equation");
        assert_one(headers, "// Reference  ", "// Source  ", "Reference");
        assert_one(headers, "// Launch     grid (NT, H, B), block C", "// Launch", "Launch");
        assert_one(headers, "// FLA        -\n", "", "FLA");
    }

    #[test]
    fn the_reference_is_a_public_function() {
        for to in ["fla_reference::chunk::hidden", "fla_reference::wy::cumsum", "chunk::cumsum", "none"] {
            assert_one(headers, "fla_reference::chunk::cumsum", to, "is not a `pub fn`");
        }
    }

    #[test]
    fn entry_params_and_twin_carry_the_stem() {
        assert_one(entries, "void chunk_cumsum(", "void cumsum(", "has 0");
        assert_one(entries, "struct ChunkCumsumParams", "struct CumsumParams", "`ChunkCumsumParams`");
        assert_one(entries, "__device__ void", "__global__ void", "the unit declares");
        let found = twins(&Tree::of(&[(PATH, GOOD), ("fla-dplr/src/x.rs", RUST)]));
        assert_eq!(found.len(), 2, "{found:?}");
    }

    #[test]
    fn asm_and_macros_stay_where_they_belong() {
        assert_one(assembly, "    #pragma unroll", "    asm(\"\");", "leaf header");
        assert_one(preprocessor, "#pragma once", "#define CHUNK 64", "#define");
        assert_one(preprocessor, "<fla/core/prelude.cuh>", "\"prelude.cuh\"", "<>");
        assert_one(preprocessor, "#pragma once", "using namespace fla;", "using namespace");
        let leaf =
            Tree::of(&[("fla-core/kernels/mma.cuh", "asm(\"\");\n"), ("fla-dplr/kernels/mma.cuh", "asm;\n")]);
        assert_eq!(assembly(&leaf).len(), 1);
    }

    #[test]
    fn includes_go_one_way() {
        let prelude = "fla/core/prelude.cuh";
        assert_one(include_direction, prelude, "cuda_bf16.h", "travel");
        assert_one(include_direction, prelude, "fla/core/tile.cuh", "there is no");
        let other = "#include <fla/dplr/pair.cuh>\n";
        let tree = Tree::of(&[
            ("fla-dplr/kernels/pair.cuh", ""),
            ("fla-dplr/kernels/chunk_fwd.cu", ""),
            ("fla-core/kernels/tile.cuh", other),
            ("fla-core/kernels/mma.cuh", "#include <fla/core/tile.cuh>\n"),
            ("fla-rwkv6/kernels/chunk_fwd_intra.cu", other),
            ("fla-rwkv7/kernels/fused_gate.cu", other),
            ("fla-rwkv7/kernels/fused_norm.cu", "#include <fla/dplr/chunk_fwd.cu>\n"),
        ]);
        let found: Vec<String> = include_direction(&tree).into_iter().map(|finding| finding.path).collect();
        let wanted = [
            "fla-core/kernels/mma.cuh",
            "fla-core/kernels/tile.cuh",
            "fla-rwkv6/kernels/chunk_fwd_intra.cu",
            "fla-rwkv7/kernels/fused_norm.cu",
        ];
        assert_eq!(found, wanted);
    }
}
