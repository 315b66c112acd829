//! Rules for `.rs` files: the opening sentence, imports, macros, test attributes.

use super::Finding;
use super::scan::split;
use crate::names::has_words;
use crate::tree::Tree;

/// Every `.rs` file starts with one `//!` sentence; a crate root may include its README instead.
pub(super) fn opening_sentence(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (path, text) in tree.with_extension(&["rs"]) {
        let includes_readme = path.ends_with("/src/lib.rs") && text.starts_with("#![doc = include_str!(");
        let opening: Vec<&str> = text
            .lines()
            .map_while(|line| line.strip_prefix("//!"))
            .map(str::trim)
            .take_while(|line| !line.is_empty())
            .collect();
        let sentence = opening.join(" ");
        if includes_readme {
            continue;
        } else if sentence.is_empty() {
            findings.push(Finding::new(
                path,
                1,
                "does not start with a `//!` sentence that says what the file is",
            ));
        } else if !sentence.ends_with('.') {
            findings.push(Finding::new(
                path,
                1,
                "the opening `//!` paragraph is not a sentence: no full stop",
            ));
        }
    }
    findings
}

/// No wildcard imports; `use super::*` in unit tests alone.
pub(super) fn imports(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (path, text) in tree.with_extension(&["rs"]) {
        let split = split(text);
        let mut in_tests = false;
        let mut import: Option<(usize, String)> = None;
        for (number, line) in split.code_lines() {
            in_tests |= line.contains("#[cfg(test)]");
            let words = line.trim();
            let starts = words.starts_with("use ")
                || (words.starts_with("pub") && has_words(words, "use") && !words.contains("fn "));
            if starts {
                import = Some((number, String::new()));
            }
            let Some((first, whole)) = &mut import else { continue };
            *whole += words;
            if !words.ends_with(';') {
                continue;
            }
            let glob = whole.contains("::*")
                || whole.contains("{*")
                || whole.contains(",*")
                || whole.contains(", *");
            if glob && !(in_tests && whole == "use super::*;") {
                findings.push(Finding::new(path, *first, "wildcard import: name what is used"));
            }
            import = None;
        }
    }
    findings
}

/// No macros of our own: a function, a generic or a table does it.
pub(super) fn macros(tree: &Tree) -> Vec<Finding> {
    let message = "`macro_rules!`: write a function, a generic or a const table";
    in_code(tree, "macro_rules", message)
}

/// No test that is switched off, and none that is content with any panic.
pub(super) fn test_attributes(tree: &Tree) -> Vec<Finding> {
    let mut findings = in_code(tree, "#[ignore", "an ignored test is no test: delete it or repair it");
    findings.extend(in_code(tree, "#[should_panic", "assert on an `Err` or on the message instead"));
    findings
}

fn in_code(tree: &Tree, words: &str, message: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (path, text) in tree.with_extension(&["rs"]) {
        for (number, line) in split(text).code_lines() {
            if has_words(line, words) {
                findings.push(Finding::new(path, number, message));
            }
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(check: fn(&Tree) -> Vec<Finding>, path: &str, text: &str) -> Vec<usize> {
        check(&Tree::of(&[(path, text)])).iter().map(|finding| finding.line).collect()
    }

    #[test]
    fn a_file_opens_with_a_sentence() {
        let none: [usize; 0] = [];
        assert_eq!(lines(opening_sentence, "a/src/x.rs", "//! What it is.\n\nfn f() {}\n"), none);
        assert_eq!(lines(opening_sentence, "a/src/x.rs", "//! What it\n//! is.\n//!\n//! More\n"), none);
        assert_eq!(
            lines(opening_sentence, "a/src/lib.rs", "#![doc = include_str!(\"../README.md\")]\n"),
            none
        );
        assert_eq!(lines(opening_sentence, "a/src/x.rs", "#![doc = include_str!(\"../README.md\")]\n"), [1]);
        assert_eq!(lines(opening_sentence, "a/src/x.rs", "fn f() {}\n"), [1]);
        assert_eq!(lines(opening_sentence, "a/src/x.rs", "//! What it is\n"), [1]);
    }

    #[test]
    fn wildcards_are_found_wherever_they_hide() {
        let bad = "use a::*;\nuse b::{\n    c,\n    *,\n};\npub(crate) use d::*;\nuse super::*;\nuse e::f;\n";
        assert_eq!(lines(imports, "x.rs", bad), [1, 2, 6, 7]);
        let good = "#[cfg(test)]\nmod tests {\n    use super::*;\n}\n// use a::*;\n";
        assert_eq!(lines(imports, "x.rs", good), [0; 0]);
        assert_eq!(lines(imports, "x.rs", "#[cfg(test)]\nmod tests {\n    use a::*;\n}\n"), [3]);
    }

    #[test]
    fn macros_and_switched_off_tests_are_found_in_code_alone() {
        assert_eq!(lines(macros, "x.rs", "// macro_rules! is banned\nmacro_rules! m {}\n"), [2]);
        assert_eq!(
            lines(test_attributes, "x.rs", "let s = \"#[ignore]\";\n#[ignore]\n#[should_panic]\n"),
            [2, 3]
        );
    }
}
