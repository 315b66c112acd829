//! The text that the demo reads: a file, or the repository's own words.

use std::fs::File;
use std::io::{Cursor, Read};
use std::path::{Path, PathBuf};

use crate::Result;
use crate::home::Home;

/// Bytes read of the repository's own text unless asked otherwise: the whole demo, every operator and both forms on
/// the CPU, takes less than a minute on two cores.
pub(super) const DEFAULT_BYTES: u64 = 64 << 10;

/// Documents that come first; the sources follow, in the order of their paths.
const DOCUMENTS: &[&str] = &["README.md", "ARCHITECTURE.md", "STYLE.md", "NAMING.md", "CHANGELOG.md"];

/// This program's own words, for an executable that was carried to a machine without the repository.
const OWN_SOURCES: &[&str] = &[
    include_str!("../demo.rs"),
    include_str!("text.rs"),
    include_str!("memory.rs"),
    include_str!("score.rs"),
    include_str!("operators.rs"),
    include_str!("../conformance.rs"),
    include_str!("../conformance/schema.rs"),
    include_str!("../conformance/case.rs"),
    include_str!("../conformance/reference.rs"),
    include_str!("../conformance/report.rs"),
];

/// A text that is read piece by piece.
pub(super) struct Text {
    /// What it is, for the reader of the demo.
    pub(super) what: String,
    /// How many bytes will come.
    pub(super) bytes: u64,
    reader: Box<dyn Read>,
}

impl Text {
    /// Opens `file`, or the repository's own text, of which at most `bytes` are read.
    ///
    /// # Errors
    ///
    /// When the file cannot be opened, or there is nothing in it.
    pub(super) fn open(file: Option<&Path>, bytes: Option<u64>) -> Result<Text> {
        let text = match file {
            Some(path) => {
                let place = |error: std::io::Error| format!("{}: {error}", path.display());
                let reader = File::open(path).map_err(place)?;
                let metadata = reader.metadata().map_err(place)?;
                if !metadata.is_file() {
                    return Err(format!("{}: not a file", path.display()).into());
                }
                let limit = bytes.unwrap_or(u64::MAX);
                Text {
                    what: path.display().to_string(),
                    bytes: metadata.len().min(limit),
                    reader: Box::new(reader.take(limit)),
                }
            }
            None => own_text(bytes.unwrap_or(DEFAULT_BYTES))?,
        };
        if text.bytes == 0 {
            return Err(format!("{}: there is nothing to read", text.what).into());
        }
        Ok(text)
    }

    /// The next `n` bytes; fewer at the end, and none after it.
    pub(super) fn next(&mut self, n: usize) -> Result<Vec<u8>> {
        let mut piece = Vec::with_capacity(n);
        let limit = u64::try_from(n)?;
        self.reader
            .by_ref()
            .take(limit)
            .read_to_end(&mut piece)
            .map_err(|error| format!("{}: {error}", self.what))?;
        Ok(piece)
    }
}

/// The text of the checkout or bundle that this program belongs to, else of the current folder, else of the program.
fn own_text(limit: u64) -> Result<Text> {
    for root in [Home::find()?.root().to_path_buf(), PathBuf::from(".")] {
        let files = sources(&root);
        if files.is_empty() {
            continue;
        }
        let mut bytes = Vec::new();
        for file in &files {
            let left = limit.saturating_sub(u64::try_from(bytes.len())?);
            if left == 0 {
                break;
            }
            let place = |error: std::io::Error| format!("{}: {error}", file.display());
            File::open(file).map_err(place)?.take(left).read_to_end(&mut bytes).map_err(place)?;
        }
        return Ok(held(format!("the text of {}", root.display()), bytes));
    }
    let mut bytes = OWN_SOURCES.concat().into_bytes();
    bytes.truncate(usize::try_from(limit).unwrap_or(usize::MAX));
    Ok(held("the source text of this demo".to_owned(), bytes))
}

fn held(what: String, bytes: Vec<u8>) -> Text {
    Text { what, bytes: bytes.len() as u64, reader: Box::new(Cursor::new(bytes)) }
}

/// Documents, then Markdown, Rust and CUDA of a folder, without hidden and built things.
fn sources(root: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> =
        DOCUMENTS.iter().map(|name| root.join(name)).filter(|path| path.is_file()).collect();
    let mut found = Vec::new();
    walk(root, 0, &mut found);
    found.sort();
    found.retain(|path| !files.contains(path));
    files.extend(found);
    files
}

/// Deeper than any source of this workspace lies; a stray link to an ancestor must not be followed for ever.
const MAX_DEPTH: usize = 6;

fn walk(folder: &Path, depth: usize, found: &mut Vec<PathBuf>) {
    // A folder that cannot be read adds no text.
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    for entry in entries {
        let path = entry.path();
        let name = entry.file_name().to_string_lossy().into_owned();
        if path.is_dir() {
            if !name.starts_with('.') && name != "target" && depth < MAX_DEPTH {
                walk(&path, depth + 1, found);
            }
        } else if path.extension().is_some_and(|e| ["md", "rs", "cu", "cuh"].iter().any(|known| e == *known))
        {
            found.push(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::workspace_root;

    #[test]
    fn the_repository_is_read_up_to_the_limit_and_starts_with_its_readme() {
        let mut text = Text::open(None, Some(3000)).expect("the repository");
        assert_eq!(text.bytes, 3000);
        let mut bytes = text.next(2000).expect("text");
        bytes.extend(text.next(2000).expect("text"));
        assert_eq!(bytes.len(), 3000);
        assert!(text.next(2000).expect("the end").is_empty());
        let first = sources(&workspace_root()).into_iter().next().expect("a source");
        let whole = std::fs::read(first).expect("a source");
        let n = whole.len().min(bytes.len());
        assert_eq!(whole[..n], bytes[..n]);
    }

    #[test]
    fn a_missing_file_and_an_empty_one_are_named() {
        let folder = std::env::temp_dir().join(format!("fla-text-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder");
        let empty = folder.join("empty.txt");
        std::fs::write(&empty, "").expect("a file");
        let error = |path: &Path| Text::open(Some(path), None).err().map(|error| error.to_string());
        let errors = [error(&folder.join("absent.txt")), error(&empty), error(&folder)];
        std::fs::remove_dir_all(&folder).expect("the folder is ours");
        for (error, name) in errors.iter().zip(["absent.txt", "empty.txt", "fla-text"]) {
            assert!(error.as_ref().is_some_and(|error| error.contains(name)), "{error:?}");
        }
    }

    #[test]
    fn without_a_repository_the_program_has_words_of_its_own() {
        assert!(sources(Path::new("/nonexistent")).is_empty());
        assert!(OWN_SOURCES.iter().map(|text| text.len()).sum::<usize>() > 20_000);
    }
}
