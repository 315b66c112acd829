//! How one stem is spelt in every layer of a crate, and where each spelling is declared.

use crate::tree::{Tree, stem};

/// One layer of a crate: what the stem is called there, and every place that declares it.
#[derive(Debug)]
pub(crate) struct Layer {
    pub(crate) kind: Kind,
    /// The name that belongs there.
    pub(crate) name: String,
    pub(crate) places: Vec<Place>,
}

/// The layers, in the order in which a name travels from Rust to the device and on to its evidence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Plan,
    Inputs,
    Outputs,
    OneCall,
    HostParams,
    CudaHeader,
    CudaFile,
    CudaParams,
    Symbol,
    Reference,
    Test,
    Tolerance,
    Bench,
}

impl Kind {
    /// The name of the layer in a table.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Kind::Plan => "plan",
            Kind::Inputs => "inputs",
            Kind::Outputs => "outputs",
            Kind::OneCall => "one call",
            Kind::HostParams => "params, Rust",
            Kind::CudaHeader => "CUDA header",
            Kind::CudaFile => "CUDA file",
            Kind::CudaParams => "params, CUDA",
            Kind::Symbol => "symbol",
            Kind::Reference => "reference",
            Kind::Test => "test",
            Kind::Tolerance => "tolerance",
            Kind::Bench => "bench",
        }
    }
}

/// A line of a file; the whole file where `line` is 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) path: String,
    pub(crate) line: usize,
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.line {
            0 => f.write_str(&self.path),
            line => write!(f, "{}:{line}", self.path),
        }
    }
}

/// Every layer of the crate in `folder` under the name `wanted`; a layer that has nothing has no places.
pub(crate) fn layers(tree: &Tree, folder: &str, wanted: &str) -> Vec<Layer> {
    let model = model(folder);
    let camel = camel(wanted);
    let src = format!("{folder}/src/");
    let mut layers = Vec::new();
    let mut push = |kind, name: String, places| layers.push(Layer { kind, name, places });

    for (kind, end) in [(Kind::Plan, ""), (Kind::Inputs, "Inputs"), (Kind::Outputs, "Outputs")] {
        let name = format!("{camel}{end}");
        let places = declared(tree, &src, &format!("pub struct {name}"));
        push(kind, name, places);
    }
    push(Kind::OneCall, wanted.to_owned(), declared(tree, &src, &format!("pub fn {wanted}")));

    let kernels = kernels(tree, folder, wanted);
    let twins: Vec<String> = kernels.iter().map(|path| params(path)).collect();
    let twin_names = if twins.is_empty() { format!("{camel}Params") } else { twins.join(", ") };
    let host = twins
        .iter()
        .flat_map(|twin| declared(tree, &format!("{folder}/"), &format!("struct {twin}")))
        .filter(|place| place.path.ends_with(".rs"));
    push(Kind::HostParams, twin_names.clone(), host.collect());
    push(Kind::CudaHeader, format!("{wanted}.cuh"), whole(tree, format!("{folder}/kernels/{wanted}.cuh")));
    let files = kernels.iter().map(|path| Place { path: path.to_string(), line: 0 }).collect();
    push(Kind::CudaFile, format!("{wanted}.cu, {wanted}_*.cu"), files);
    let device = kernels.iter().zip(&twins);
    let device = device.flat_map(|(path, twin)| declared(tree, path, &format!("struct {twin}")));
    push(Kind::CudaParams, twin_names, device.collect());
    let entries = kernels.iter().flat_map(|path| declared(tree, path, &format!("void {}", entry(path))));
    let symbols: Vec<String> = kernels.iter().map(|path| format!("{model}_{}", stem(path))).collect();
    let symbol = if symbols.is_empty() { format!("{model}_{wanted}") } else { symbols.join(", ") };
    push(Kind::Symbol, symbol, entries.collect());

    // The core's building blocks have their references wherever the mathematics belongs.
    let references = if model == "core" { "fla-reference/src/".to_owned() } else { reference_file(&model) };
    push(
        Kind::Reference,
        format!("fla_reference::{}::{wanted}", if model == "core" { "*" } else { &model }),
        declared(tree, &references, &format!("pub fn {wanted}")),
    );
    push(Kind::Test, format!("tests/{wanted}.rs"), whole(tree, format!("{folder}/tests/{wanted}.rs")));
    push(Kind::Tolerance, format!("{model}, {wanted}"), tolerance_rows(tree, &model, wanted));
    push(Kind::Bench, format!("benches/{wanted}.rs"), whole(tree, format!("{folder}/benches/{wanted}.rs")));
    layers
}

/// The name of a crate's model, as it stands in modules, symbols and tables: `fla-rwkv7` is `rwkv7`.
pub(crate) fn model(folder: &str) -> String {
    folder.strip_prefix("fla-").unwrap_or(folder).replace('-', "_")
}

/// The file of a model's references.
pub(crate) fn reference_file(model: &str) -> String {
    format!("fla-reference/src/{model}.rs")
}

/// `chunk_fwd_intra` as a Rust or CUDA type name: `ChunkFwdIntra`.
pub(crate) fn camel(stem: &str) -> String {
    let word = |word: &str| {
        let mut letters = word.chars();
        letters
            .next()
            .map_or_else(String::new, |first| first.to_ascii_uppercase().to_string() + letters.as_str())
    };
    stem.split('_').map(word).collect()
}

/// The stem of the entry function of the `.cu` file at `path`: its own stem without an architecture.
pub(crate) fn entry(path: &str) -> &str {
    let stem = stem(path);
    match stem.rsplit_once("_sm") {
        Some((entry, arch)) if !arch.is_empty() && arch.bytes().all(|b| b.is_ascii_digit()) => entry,
        _ => stem,
    }
}

/// The name of the parameter struct of the `.cu` file at `path`.
pub(crate) fn params(path: &str) -> String {
    format!("{}Params", camel(entry(path)))
}

/// Places under the path prefix `under` whose line declares `declaration` and not merely a longer name.
pub(crate) fn declared(tree: &Tree, under: &str, declaration: &str) -> Vec<Place> {
    let mut places = Vec::new();
    for (path, text) in tree.under(under) {
        for (number, line) in text.lines().enumerate() {
            if !line.trim_start().starts_with("//") && has_words(line, declaration) {
                places.push(Place { path: path.to_owned(), line: number + 1 });
            }
        }
    }
    places
}

/// Whether `words` occurs in `line` and neither end of it cuts an identifier.
pub(crate) fn has_words(line: &str, words: &str) -> bool {
    let part_of_name = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(words).any(|(at, _)| {
        let before = line[..at].chars().next_back().is_some_and(part_of_name);
        let after = line[at + words.len()..].chars().next().is_some_and(part_of_name);
        !before && !after
    })
}

fn kernels<'a>(tree: &'a Tree, folder: &str, wanted: &str) -> Vec<&'a str> {
    let starts = format!("{wanted}_");
    tree.with_extension(&["cu"])
        .map(|(path, _)| path)
        .filter(|path| path.starts_with(&format!("{folder}/")))
        .filter(|path| stem(path) == wanted || stem(path).starts_with(&starts))
        .collect()
}

fn whole(tree: &Tree, path: String) -> Vec<Place> {
    if tree.text(&path).is_some() { vec![Place { path, line: 0 }] } else { Vec::new() }
}

/// Rows of the tolerance table that name both the model and the pass; a row may be spread over lines.
fn tolerance_rows(tree: &Tree, model: &str, wanted: &str) -> Vec<Place> {
    let path = "fla-reference/src/tolerance.rs";
    let (model, wanted) = (camel(model), camel(wanted));
    let mut places = Vec::new();
    let mut row = (0, String::new());
    let mut inside = false;
    for (number, line) in tree.text(path).unwrap_or_default().lines().enumerate() {
        if !inside {
            row = (number + 1, String::new());
        }
        row.1 += line;
        row.1 += "\n";
        inside = match line.trim() {
            "Row {" => true,
            "}," => false,
            _ => inside,
        };
        if !inside && has_words(&row.1, &model) && has_words(&row.1, &wanted) {
            places.push(Place { path: path.to_owned(), line: row.0 });
        }
    }
    places
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_stem_is_found_in_every_layer() {
        let tree = Tree::of(&[
            (
                "fla-gated-delta/src/chunk_fwd.rs",
                "pub struct ChunkFwd;\npub struct ChunkFwdInputs;\npub struct ChunkFwdOutputs;\n\
                 pub fn chunk_fwd() {}\nstruct ChunkFwdIntraParams {}\n",
            ),
            (
                "fla-gated-delta/kernels/chunk_fwd_intra.cu",
                "// chunk_fwd_intra: x\nstruct ChunkFwdIntraParams {\n__device__ void chunk_fwd_intra(\n",
            ),
            ("fla-gated-delta/tests/chunk_fwd.rs", ""),
            ("fla-gated-delta/benches/chunk_fwd.rs", ""),
            (
                "fla-reference/src/gated_delta.rs",
                "//! x\npub fn chunk_fwd<F>() {}\npub fn chunk_fwd_other() {}\n",
            ),
            (
                "fla-reference/src/tolerance.rs",
                "Row {\n models: &[Model::Dplr],\n passes: &[Pass::ChunkFwd],\n},\n\
                 Row {\n models: &[Model::GatedDelta],\n passes: &[Pass::ChunkFwd],\n},\n",
            ),
        ]);
        let found = layers(&tree, "fla-gated-delta", "chunk_fwd");
        for layer in &found {
            let wanted = if layer.kind == Kind::CudaHeader { 0 } else { 1 };
            assert_eq!(layer.places.len(), wanted, "{layer:?}");
        }
        let symbol = found.iter().find(|layer| layer.kind == Kind::Symbol).unwrap();
        assert_eq!(symbol.name, "gated_delta_chunk_fwd_intra");
        let row = found.iter().find(|layer| layer.kind == Kind::Tolerance).unwrap();
        assert_eq!(row.places[0].line, 5);
        assert_eq!(symbol.places[0].to_string(), "fla-gated-delta/kernels/chunk_fwd_intra.cu:3");
    }

    #[test]
    fn a_longer_name_is_another_name() {
        assert!(has_words("pub fn chunk_fwd<F>(", "pub fn chunk_fwd"));
        assert!(!has_words("pub fn chunk_fwd_intra(", "pub fn chunk_fwd"));
        assert!(!has_words("xpub fn chunk_fwd(", "pub fn chunk_fwd"));
    }

    #[test]
    fn an_architecture_suffix_belongs_to_the_file_alone() {
        assert_eq!(entry("fla-dplr/kernels/chunk_fwd_intra_sm90.cu"), "chunk_fwd_intra");
        assert_eq!(params("fla-dplr/kernels/chunk_fwd_intra_sm90.cu"), "ChunkFwdIntraParams");
        assert_eq!(entry("fla-dplr/kernels/chunk_smooth.cu"), "chunk_smooth");
    }
}
