//! One stem in every layer: what a pass of a model crate must have.

use super::Finding;
use super::edges::lender;
use crate::names::{Kind, camel, declared, layers, model, reference_file};
use crate::tree::{Tree, stem};

/// Passes over sequences; `fused` holds elementwise functions and has rules of its own.
const PASSES: &[&str] = &["chunk_fwd", "chunk_bwd", "recurrent_fwd", "recurrent_bwd"];

/// Steps of a pass that are a kernel of their own.
const STAGES: &[&str] = &["cumsum", "intra", "wy", "state", "output"];

/// Layers of a crate that launches another crate's kernels.
const BORROWED: &[Kind] = &[Kind::HostParams, Kind::CudaFile, Kind::CudaParams, Kind::Symbol];

/// Every pass of every model crate has its name in every layer.
pub(super) fn rows(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for folder in models(tree) {
        for pass in PASSES {
            let path = format!("{folder}/src/{pass}.rs");
            if tree.text(&path).is_none() {
                continue;
            }
            for layer in layers(tree, folder, pass) {
                let needless = layer.kind == Kind::CudaHeader
                    || (lender(folder).is_some() && BORROWED.contains(&layer.kind));
                if layer.places.is_empty() && !needless {
                    let message = format!("this pass has no {}: `{}`", layer.kind.label(), layer.name);
                    findings.push(Finding::new(&path, 1, message));
                }
            }
        }
        findings.extend(fused(tree, folder));
    }
    findings
}

/// Every elementwise function has its plan, kernel and reference; all together have a test, tolerances and a bench.
///
/// They are in `src/fused.rs`, or in a file for each noun below `src/fused`.
fn fused(tree: &Tree, folder: &str) -> Vec<Finding> {
    let path = format!("{folder}/src/fused.rs");
    if tree.text(&path).is_none() {
        return Vec::new();
    }
    let model = model(folder);
    let below = format!("{folder}/src/fused/");
    let mut findings = Vec::new();
    for (path, text) in tree.with_extension(&["rs"]).filter(|(p, _)| *p == path || p.starts_with(&below)) {
        for (number, line) in text.lines().enumerate() {
            let Some(rest) = line.strip_prefix("pub fn fused_") else { continue };
            let noun = rest.split(['(', '<']).next().unwrap_or_default();
            let plan = format!("pub struct Fused{}", camel(noun));
            let kernel = format!("{folder}/kernels/fused_{noun}.cu");
            let layers = [
                ("plan", !declared(tree, path, &plan).is_empty(), plan),
                ("CUDA file", tree.text(&kernel).is_some(), kernel),
                (
                    "reference",
                    fused_reference_exists(tree, &model, noun),
                    format!("fla_reference::{model}::{noun}_fwd"),
                ),
            ];
            for (layer, present, name) in layers {
                if !present {
                    let message = format!("`fused_{noun}` has no {layer}: `{name}`");
                    findings.push(Finding::new(path, number + 1, message));
                }
            }
        }
    }
    for layer in layers(tree, folder, "fused") {
        let wanted = [Kind::Test, Kind::Tolerance, Kind::Bench].contains(&layer.kind);
        if wanted && layer.places.is_empty() {
            let message = format!("this pass has no {}: `{}`", layer.kind.label(), layer.name);
            findings.push(Finding::new(&path, 1, message));
        }
    }
    findings
}

/// The reference of an elementwise function: among those of the model, or a module of its own with `fwd` and `bwd`.
fn fused_reference_exists(tree: &Tree, model: &str, noun: &str) -> bool {
    let under = reference_file(model);
    let under = under.strip_suffix(".rs").unwrap_or(&under);
    let of_model = [format!("pub fn fused_{noun}"), format!("pub fn {noun}"), format!("pub fn {noun}_fwd")];
    let (module, direction) = noun.strip_suffix("_bwd").map_or((noun, "fwd"), |module| (module, "bwd"));
    let own = declared(tree, &format!("fla-reference/src/{module}.rs"), &format!("pub fn {direction}"));
    !own.is_empty() || of_model.iter().any(|name| !declared(tree, under, name).is_empty())
}

/// The name of a model's kernel is a pass, a pass with a stage, a stage of both directions, or `fused_<noun>`.
pub(super) fn kernel_names(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (path, _) in tree.with_extension(&["cu"]) {
        let folder = path.split('/').next().unwrap_or_default();
        if !models(tree).contains(&folder) || !path.starts_with(&format!("{folder}/kernels/")) {
            continue;
        }
        let entry = crate::names::entry(path);
        let staged = PASSES.iter().chain(&["chunk"]).any(|pass| {
            let stage = entry.strip_prefix(pass).and_then(|rest| rest.strip_prefix('_'));
            stage.is_some_and(|stage| STAGES.contains(&stage))
        });
        if !PASSES.contains(&entry) && !staged && !entry.starts_with("fused_") {
            let message = format!("`{}` is not a pass, a pass with a stage, or fused_<noun>", stem(path));
            findings.push(Finding::new(path, 1, message));
        }
    }
    findings
}

fn models(tree: &Tree) -> Vec<&str> {
    let others = ["fla-core", "fla-reference", "xtask"];
    tree.crates().into_iter().filter(|folder| !others.contains(folder)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const RUST: &str = "pub struct RecurrentFwd;\npub struct RecurrentFwdInputs;\npub struct RecurrentFwdOutputs;\n\
                        pub fn recurrent_fwd() {}\nstruct RecurrentFwdParams {}\n";
    const CUDA: &str = "struct RecurrentFwdParams {\n};\n__device__ void recurrent_fwd(\n";

    /// A workspace with one complete pass, less the files whose path contains `without`.
    fn workspace(without: &str) -> Tree {
        let files = [
            ("fla-dplr/Cargo.toml", ""),
            ("fla-dplr/src/recurrent_fwd.rs", RUST),
            ("fla-dplr/kernels/recurrent_fwd.cu", CUDA),
            ("fla-dplr/tests/recurrent_fwd.rs", ""),
            ("fla-dplr/benches/recurrent_fwd.rs", ""),
            ("fla-rwkv7/Cargo.toml", ""),
            ("fla-reference/src/dplr.rs", "pub fn recurrent_fwd() {}\npub fn gate_fwd() {}\n"),
            ("fla-reference/src/tolerance.rs", "row(Model::Dplr, Pass::RecurrentFwd),\n"),
        ];
        let kept: Vec<(&str, &str)> =
            files.into_iter().filter(|(path, _)| without.is_empty() || !path.contains(without)).collect();
        Tree::of(&kept)
    }

    #[test]
    fn every_layer_is_asked_for() {
        assert_eq!(rows(&workspace("")), []);
        for (without, missing) in [
            ("fla-dplr/tests", "test"),
            ("fla-dplr/benches", "bench"),
            ("tolerance", "tolerance"),
            ("fla-reference/src/dplr", "reference"),
        ] {
            let found = rows(&workspace(without));
            assert!(found.len() == 1 && found[0].message.contains(missing), "{without}: {found:?}");
        }
        // Without the kernel: no file, no twin to look for on either side, no symbol.
        assert_eq!(rows(&workspace("kernels")).len(), 4);
    }

    #[test]
    fn the_thin_crate_needs_no_kernel_of_its_own() {
        let mut tree = workspace("");
        tree.files.insert("fla-rwkv7/src/recurrent_fwd.rs".to_owned(), RUST.to_owned());
        let found: Vec<String> = rows(&tree).into_iter().map(|finding| finding.message).collect();
        assert_eq!(found.len(), 4, "{found:?}");
        for missing in ["reference", "test", "tolerance", "bench"] {
            assert!(found.iter().any(|message| message.contains(missing)), "{missing}: {found:?}");
        }
    }

    #[test]
    fn fused_functions_have_plan_kernel_and_reference() {
        let mut tree = workspace("");
        let text = "pub struct FusedGate;\npub fn fused_gate() {}\npub fn fused_norm() {}\n";
        tree.files.insert("fla-dplr/src/fused.rs".to_owned(), text.to_owned());
        tree.files.insert("fla-dplr/kernels/fused_gate.cu".to_owned(), String::new());
        let found = rows(&tree);
        assert_eq!(found.iter().filter(|finding| finding.line == 3).count(), 3, "{found:?}");
        assert_eq!(found.iter().filter(|finding| finding.line == 1).count(), 3, "{found:?}");
        assert_eq!(found.len(), 6, "{found:?}");
    }

    #[test]
    fn fused_functions_may_have_a_file_each_and_a_reference_of_their_own() {
        let mut tree = workspace("");
        tree.files.insert("fla-dplr/src/fused.rs".to_owned(), "mod shift;\n".to_owned());
        let text = "pub struct FusedShift;\npub fn fused_shift() {}\npub struct FusedShiftBwd;\npub fn fused_shift_bwd() {}\n";
        tree.files.insert("fla-dplr/src/fused/shift.rs".to_owned(), text.to_owned());
        tree.files.insert("fla-dplr/kernels/fused_shift.cu".to_owned(), String::new());
        tree.files.insert("fla-reference/src/shift.rs".to_owned(), "pub fn fwd() {}\n".to_owned());
        let found: Vec<Finding> =
            rows(&tree).into_iter().filter(|finding| finding.path.ends_with("shift.rs")).collect();
        // Forward is complete, backward has neither kernel nor reference.
        assert!(found.len() == 2 && found.iter().all(|finding| finding.line == 4), "{found:?}");
    }

    #[test]
    fn kernels_are_named_from_closed_lists() {
        let mut tree = workspace("");
        for name in
            ["chunk_fwd_intra", "chunk_cumsum", "fused_gate", "chunk_fwd_intra_sm90", "chunk_dhu", "wkv"]
        {
            tree.files.insert(format!("fla-dplr/kernels/{name}.cu"), String::new());
        }
        let found: Vec<String> = kernel_names(&tree).into_iter().map(|finding| finding.path).collect();
        assert_eq!(found, ["fla-dplr/kernels/chunk_dhu.cu", "fla-dplr/kernels/wkv.cu"]);
    }
}
