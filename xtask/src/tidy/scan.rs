//! Tells code, strings and comments apart in Rust and CUDA sources.

/// A source in two halves of the same lines: what is not in a half is blank there.
#[derive(Debug)]
pub(crate) struct Split {
    /// Everything that the compiler reads, with the insides of strings blanked.
    pub(crate) code: String,
    /// The comments, documentation included, with their markers.
    pub(crate) comments: String,
}

impl Split {
    /// The lines of the code, numbered from 1.
    pub(crate) fn code_lines(&self) -> impl Iterator<Item = (usize, &str)> {
        self.code.lines().enumerate().map(|(number, line)| (number + 1, line))
    }
}

/// Splits a `.rs`, `.cu` or `.cuh` file; the two languages agree on all that matters here.
pub(crate) fn split(text: &str) -> Split {
    let chars: Vec<char> = text.chars().collect();
    let mut halves = Halves { code: String::new(), comments: String::new() };
    let mut at = 0;
    while at < chars.len() {
        let rest = &chars[at..];
        let len = match (rest[0], rest.get(1).copied()) {
            ('/', Some('/')) => rest.iter().position(|&c| c == '\n').unwrap_or(rest.len()),
            ('/', Some('*')) => block_comment(rest),
            _ => 0,
        };
        if len > 0 {
            halves.comment(&rest[..len]);
            at += len;
            continue;
        }
        let previous = if at == 0 { ' ' } else { chars[at - 1] };
        let len = literal(rest, previous);
        halves.code(&rest[..len.max(1)], len > 0);
        at += len.max(1);
    }
    Split { code: halves.code, comments: halves.comments }
}

struct Halves {
    code: String,
    comments: String,
}

impl Halves {
    fn comment(&mut self, text: &[char]) {
        for &c in text {
            self.comments.push(c);
            self.code.push(if c == '\n' { '\n' } else { ' ' });
        }
    }

    /// Code, or a literal of which only the first and the last character stay.
    fn code(&mut self, text: &[char], is_literal: bool) {
        for (i, &c) in text.iter().enumerate() {
            let inside = is_literal && i > 0 && i + 1 < text.len();
            self.code.push(if inside && c != '\n' { ' ' } else { c });
            self.comments.push(if c == '\n' { '\n' } else { ' ' });
        }
    }
}

/// Length of the block comment that `text` starts with; Rust's nest.
fn block_comment(text: &[char]) -> usize {
    let (mut depth, mut at) = (0, 0);
    while at < text.len() {
        match (text[at], text.get(at + 1)) {
            ('/', Some('*')) => {
                depth += 1;
                at += 2;
            }
            ('*', Some('/')) => {
                depth -= 1;
                at += 2;
                if depth == 0 {
                    return at;
                }
            }
            _ => at += 1,
        }
    }
    text.len()
}

/// Length of the string or character literal that `text` starts with; 0 when it starts with none.
fn literal(text: &[char], previous: char) -> usize {
    match text[0] {
        '"' => quoted(text, '"'),
        // Neither a lifetime nor the separator in `1'000` has a closing quote at this distance.
        '\'' if !previous.is_alphanumeric() && text.get(1) == Some(&'\\') => quoted(text, '\''),
        '\'' if !previous.is_alphanumeric() && text.get(2) == Some(&'\'') => 3,
        'r' if !previous.is_alphanumeric() && previous != '_' || previous == 'b' || previous == 'c' => {
            raw(text)
        }
        _ => 0,
    }
}

fn quoted(text: &[char], quote: char) -> usize {
    let mut at = 1;
    while at < text.len() {
        match text[at] {
            '\\' => at += 2,
            c if c == quote => return at + 1,
            _ => at += 1,
        }
    }
    text.len()
}

fn raw(text: &[char]) -> usize {
    if text[0] != 'r' {
        return 0;
    }
    let hashes = text[1..].iter().take_while(|&&c| c == '#').count();
    if text.get(1 + hashes) != Some(&'"') {
        return 0;
    }
    let mut end = vec!['"'];
    end.resize(1 + hashes, '#');
    let start = 2 + hashes;
    let close = text[start..].windows(end.len()).position(|window| window == end);
    close.map_or(text.len(), |at| start + at + end.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_and_comments_are_not_code() {
        let text = "let a = \"// no\\\" asm\"; // yes \"asm\"\nlet b = r#\"x \" asm\"#;\n/* a /* asm */ b */ let c;\n";
        let split = split(text);
        assert!(!split.code.contains("asm"), "{}", split.code);
        assert_eq!(split.comments.matches("asm").count(), 2, "{}", split.comments);
        assert!(split.code.contains("let b") && split.code.contains("let c"), "{}", split.code);
        assert_eq!(split.code.lines().count(), text.lines().count());
        assert_eq!(split.comments.lines().count(), text.lines().count());
    }

    #[test]
    fn neither_lifetimes_nor_characters_open_a_string() {
        for text in
            ["fn f<'a>(x: &'a str) { asm }", "int x = 1'000; asm", "let q = '\"'; asm", "let q = '\\\"'; asm"]
        {
            assert!(split(text).code.contains("asm"), "{text}");
        }
    }
}
