//! Uses of the keyword `unsafe`: which directories may have them, and how many. Both are recorded in the table of
//! `docs/security.md`. Used by `cargo xtask unsafe` and by the rules of the repository (`tests/tests/house.rs`).

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

const DOCUMENT: &str = "docs/security.md";
/// Line before the table.
const BEGIN: &str = "<!-- unsafe -->\n";
/// Line after it.
const END: &str = "<!-- end -->\n";
const HEAD: &str = "| place | blocks | functions, implementations |\n|---|---|---|\n";

/// A use of the keyword.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Use {
    /// Its line, from 1.
    pub(crate) line: usize,
    /// Whether a block follows, and not a function, an implementation or a type.
    pub(crate) is_block: bool,
}

/// The uses in Rust code, without those in comments, literals and attributes (`#[unsafe(no_mangle)]`).
pub(crate) fn uses(code: &str) -> Vec<Use> {
    let tokens = tokens(code);
    let next = tokens.iter().skip(1);
    let pairs = tokens.iter().zip(next);
    let uses = pairs.filter(|((_, token), (_, next))| token == "unsafe" && next != "(");
    let uses = uses.map(|((line, _), (_, next))| Use {
        line: *line,
        is_block: next == "{",
    });
    uses.collect()
}

/// Words and punctuation with their lines. A literal is one token, a quotation mark.
fn tokens(code: &str) -> Vec<(usize, String)> {
    let code: Vec<char> = code.chars().collect();
    let (mut at, mut line) = (0, 1);
    let mut tokens = Vec::new();
    while at < code.len() {
        let (token, end) = token(&code, at);
        if let Some(token) = token {
            tokens.push((line, token));
        }
        line += code[at..end].iter().filter(|c| **c == '\n').count();
        at = end;
    }
    tokens
}

/// The token at a position, `None` for a space or a comment, and its end.
fn token(code: &[char], at: usize) -> (Option<String>, usize) {
    let rest = &code[at..];
    let literal = |end| (Some("\"".to_owned()), end);
    match rest {
        ['/', '/', ..] => {
            let len = rest.iter().position(|c| *c == '\n');
            (None, at + len.unwrap_or(rest.len()))
        }
        ['/', '*', ..] => (None, end_of_comment(code, at)),
        ['"', ..] => literal(end_of_text(code, at, '"')),
        ['\'', '\\', ..] => literal(end_of_text(code, at, '\'')),
        ['\'', _, '\'', ..] => literal(at + 3),
        [first, ..] if is_of_word(*first) => {
            let len = rest.iter().position(|c| !is_of_word(*c));
            let end = at + len.unwrap_or(rest.len());
            let word: String = code[at..end].iter().collect();
            match (word.as_str(), code.get(end)) {
                ("b" | "c", Some('"')) => literal(end_of_text(code, end, '"')),
                ("b", Some('\'')) => literal(end_of_text(code, end, '\'')),
                ("r" | "br" | "cr", Some('"' | '#')) => match end_of_raw_text(code, end) {
                    Some(end) => literal(end),
                    // A raw identifier.
                    None => (Some(word), end),
                },
                _ => (Some(word), end),
            }
        }
        // Also the mark of a lifetime, whose name is the next token.
        [other, ..] => {
            let token = (!other.is_whitespace()).then(|| other.to_string());
            (token, at + 1)
        }
        [] => (None, at),
    }
}

fn is_of_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// The end of a comment of this kind, in which there may be others.
fn end_of_comment(code: &[char], mut at: usize) -> usize {
    let mut depth = 0;
    while at < code.len() {
        let step = match &code[at..] {
            ['/', '*', ..] => {
                depth += 1;
                2
            }
            ['*', '/', ..] => {
                depth -= 1;
                2
            }
            _ => 1,
        };
        at += step;
        if depth == 0 {
            return at;
        }
    }
    code.len()
}

/// The end of a literal that begins with this mark and may contain escapes.
fn end_of_text(code: &[char], begin: usize, mark: char) -> usize {
    let mut at = begin + 1;
    while at < code.len() {
        match code[at] {
            '\\' => at += 2,
            c if c == mark => return at + 1,
            _ => at += 1,
        }
    }
    code.len()
}

/// The end of a raw literal whose number signs and quotation mark begin here, if it is one.
fn end_of_raw_text(code: &[char], begin: usize) -> Option<usize> {
    let signs = code[begin..].iter().take_while(|c| **c == '#').count();
    if code.get(begin + signs) != Some(&'"') {
        return None;
    }
    let mut end = vec!['#'; signs + 1];
    end[0] = '"';
    let text = &code[begin + signs + 1..];
    let len = text.windows(end.len()).position(|window| window == end);
    Some(len.map_or(code.len(), |len| begin + signs + 1 + len + end.len()))
}

/// Number of uses in a place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Count {
    blocks: usize,
    others: usize,
}

/// Compares the uses in the repository with the recorded ones. Returns their table.
///
/// # Errors
/// Uses elsewhere, or in another number: fewer must be recorded too, so that the number does not grow again.
pub(crate) fn check(root: &Path) -> Result<String, String> {
    let text = fs::read_to_string(root.join(DOCUMENT)).map_err(|e| format!("{DOCUMENT}: {e}"))?;
    let table = text.split_once(BEGIN).and_then(|(_, rest)| {
        let (table, _) = rest.split_once(END)?;
        Some(table)
    });
    let recorded = table.ok_or_else(|| format!("{DOCUMENT} has no table of unsafe code"))?;
    let mut places: BTreeMap<&str, Count> = recorded
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split('`').next())
        .map(|place| (place, Count::default()))
        .collect();
    let mut files = Vec::new();
    walk(root, &mut files).map_err(|e| format!("{}: {e}", root.display()))?;
    files.sort();
    let mut elsewhere = Vec::new();
    for file in files {
        let code = fs::read_to_string(&file).map_err(|e| format!("{}: {e}", file.display()))?;
        let path = file.strip_prefix(root).unwrap_or(&file).to_string_lossy();
        let mut place = places
            .iter_mut()
            .find(|(place, _)| path.starts_with(**place));
        for Use { line, is_block } in uses(&code) {
            match &mut place {
                Some((_, count)) if is_block => count.blocks += 1,
                Some((_, count)) => count.others += 1,
                None => elsewhere.push(format!("{path}:{line}: unsafe code is not allowed here")),
            }
        }
    }
    if !elsewhere.is_empty() {
        return Err(elsewhere.join("\n"));
    }
    let mut found = HEAD.to_owned();
    for (place, Count { blocks, others }) in &places {
        writeln!(found, "| `{place}` | {blocks} | {others} |").map_err(|e| e.to_string())?;
    }
    match found == recorded {
        true => Ok(found),
        false => Err(format!(
            "{DOCUMENT} records other numbers of unsafe blocks than these: reduce them, or record them with a reason\n{found}"
        )),
    }
}

/// The Rust files below a directory.
fn walk(directory: &Path, found: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let is_skipped = path.ends_with("target") || path.ends_with(".git");
        if path.is_dir() && !path.is_symlink() && !is_skipped {
            walk(&path, found)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_code_is_counted() {
        let code = r####"
            // unsafe { in a comment }
            /* unsafe { /* and unsafe { */ there } */
            const A: &str = "unsafe { \" unsafe {";
            const B: &str = r#"unsafe { " unsafe {"#;
            const C: &[u8] = br"unsafe {";
            const D: [char; 3] = ['"', '\'', 'é'];
            #[unsafe(no_mangle)]
            fn f<'a>(r#unsafe_code: &'a str) -> u8 { unsafe { b'"' } }
            unsafe
            {
            }
            unsafe impl Send for A {}
            type F = unsafe extern "C" fn();
        "####;
        let found: Vec<_> = uses(code).iter().map(|u| (u.line, u.is_block)).collect();
        assert_eq!(found, [(9, true), (10, true), (13, false), (14, false)]);
    }

    #[test]
    fn a_text_without_an_end_ends_with_the_file() {
        for code in ["\"unsafe {", "/* unsafe {", "r#\"unsafe {", "'\\", "r#"] {
            assert_eq!(uses(code), [], "{code}");
        }
    }
}
