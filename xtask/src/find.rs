//! Prints where one stem lives in every layer of every crate.

use crate::Result;
use crate::flags::FindArgs;
use crate::names::{Layer, layers};
use crate::tree::{Tree, workspace_root};

/// Prints the table; `Ok(false)` when no crate knows the stem.
pub(crate) fn run(args: &FindArgs) -> Result<bool> {
    let tree = Tree::load(&workspace_root())?;
    let text = table(&tree, &args.stem);
    if text.is_empty() {
        println!("no crate knows `{}`", args.stem);
        return Ok(false);
    }
    print!("{text}");
    Ok(true)
}

/// One paragraph for each crate that has the stem in a layer of its own.
fn table(tree: &Tree, stem: &str) -> String {
    let mut text = String::new();
    let libraries = tree.crates().into_iter().filter(|folder| !["fla-reference", "xtask"].contains(folder));
    for folder in libraries {
        let layers = layers(tree, folder, stem);
        let own =
            |layer: &Layer| layer.places.iter().any(|place| place.path.starts_with(&format!("{folder}/")));
        if !layers.iter().any(own) {
            continue;
        }
        // A building block of the core has no pass; what a model lacks is worth a line.
        let layers: Vec<Layer> =
            layers.into_iter().filter(|layer| folder != "fla-core" || !layer.places.is_empty()).collect();
        text += &format!("{folder}\n");
        let width = layers.iter().map(|layer| layer.name.len()).max().unwrap_or(0);
        for layer in &layers {
            let places: Vec<String> = layer.places.iter().map(ToString::to_string).collect();
            let places = if places.is_empty() { "-".to_owned() } else { places.join("  ") };
            text += &format!("  {:<13} {:<width$}  {places}\n", layer.kind.label(), layer.name);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_core_is_not_asked_for_what_only_a_pass_has() {
        let tree = Tree::of(&[("fla-core/Cargo.toml", ""), ("fla-core/kernels/mma.cuh", "")]);
        assert_eq!(table(&tree, "mma"), "fla-core\n  CUDA header   mma.cuh  fla-core/kernels/mma.cuh\n");
    }

    #[test]
    fn the_table_names_the_line_and_skips_crates_without_the_stem() {
        let tree = Tree::of(&[
            ("fla-dplr/Cargo.toml", ""),
            ("fla-dplr/src/recurrent_fwd.rs", "//! x\n\npub fn recurrent_fwd() {}\n"),
            ("fla-rwkv4/Cargo.toml", ""),
            ("fla-reference/Cargo.toml", ""),
            ("fla-reference/src/rwkv4.rs", "pub fn recurrent_fwd() {}\n"),
        ]);
        let text = table(&tree, "recurrent_fwd");
        assert!(text.contains("fla-dplr/src/recurrent_fwd.rs:3"), "{text}");
        assert!(!text.contains("fla-rwkv4"), "{text}");
        assert_eq!(table(&tree, "chunk_fwd"), "");
    }
}
