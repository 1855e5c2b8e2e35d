//! Sanitizes text written by a guest for terminals, logs and events: bounds its length and removes control
//! sequences and invisible characters.
//!
//! Call this before showing any text from a guest. The exceptions are a container's own streams and the
//! console of its followers, which are passed on unchanged.

pub use koya_host::limited::Warnings;

use std::iter::Peekable;
use std::str::Chars;

/// Maximum length of a single text, such as an error, in bytes.
pub const MAX_LINE: usize = 4 << 10;

/// Maximum length of a log, in bytes; the excerpt of a panic log is 80 lines.
pub const MAX_LINES: usize = 16 << 10;

/// Sanitizes a single line: line breaks become spaces, and the end is cut off beyond [`MAX_LINE`].
pub fn sanitize_line(text: impl AsRef<[u8]>) -> String {
    let bytes = text.as_ref();
    let cut = &bytes[..bytes.len().min(MAX_LINE)];
    let mut line = clean(&String::from_utf8_lossy(cut), ' ');
    shorten(&mut line, MAX_LINE);
    line
}

/// Sanitizes several lines and keeps the last ones.
pub fn sanitize_lines(text: impl AsRef<[u8]>) -> String {
    let bytes = text.as_ref();
    let cut = &bytes[bytes.len().saturating_sub(MAX_LINES)..];
    let mut lines = clean(&String::from_utf8_lossy(cut), '\n');
    // The replacement of an invalid byte is longer than the byte.
    let mut excess = lines.len().saturating_sub(MAX_LINES);
    while !lines.is_char_boundary(excess) {
        excess += 1;
    }
    lines.drain(..excess);
    lines
}

/// Sanitizes all lines of a text whose length is already bounded.
pub fn sanitize(text: impl AsRef<[u8]>) -> String {
    clean(&String::from_utf8_lossy(text.as_ref()), '\n')
}

fn shorten(text: &mut String, limit: usize) {
    let mut end = text.len().min(limit);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
}

fn clean(text: &str, line_end: char) -> String {
    let mut clean = String::with_capacity(text.len());
    let mut chars = text.chars().peekable();
    while let Some(char) = chars.next() {
        match char {
            '\x1b' => skip_escape(&mut chars),
            '\u{9b}' => skip_control_sequence(&mut chars),
            '\n' | '\u{2028}' | '\u{2029}' => clean.push(line_end),
            '\t' if line_end == '\n' => clean.push('\t'),
            '\t' => clean.push(' '),
            _ if char.is_control() || is_invisible(char) => {}
            _ => clean.push(char),
        }
    }
    clean
}

/// Characters that change the direction of text or that are invisible.
fn is_invisible(char: char) -> bool {
    matches!(
        char,
        '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}'
            | '\u{e0000}'..='\u{e0fff}'
    )
}

/// Skips the rest of an escape sequence (ECMA-48, section 5.3).
fn skip_escape(chars: &mut Peekable<Chars<'_>>) {
    match chars.peek() {
        Some('[') => {
            chars.next();
            skip_control_sequence(chars);
        }
        // Strings end at BEL or ST; an unterminated one ends with its line.
        Some(']' | 'P' | 'X' | '^' | '_') => {
            while let Some(char) = chars.next_if(|char| *char != '\n') {
                if matches!(char, '\x07' | '\u{9c}') {
                    return;
                }
                if char == '\x1b' {
                    chars.next_if_eq(&'\\');
                    return;
                }
            }
        }
        _ => {
            while chars.next_if(|char| matches!(char, ' '..='/')).is_some() {}
            chars.next_if(|char| matches!(char, '0'..='~'));
        }
    }
}

/// Skips parameter and intermediate bytes and the final byte (ECMA-48, section 5.4).
fn skip_control_sequence(chars: &mut Peekable<Chars<'_>>) {
    while chars.next_if(|char| matches!(char, ' '..='?')).is_some() {}
    chars.next_if(|char| matches!(char, '@'..='~'));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_a_terminal_obeys_is_left() {
        let cases: &[(&[u8], &str)] = &[
            (b"plain: caf\xc3\xa9", "plain: caf\u{e9}"),
            (b"\x1b[2J\x1b[31;1mred\x1b[0m", "red"),
            (b"\x1b]0;title\x07after", "after"),
            (b"\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
            (b"\x1bPdevice\x1b\\x", "x"),
            (b"\x1bc\x1b(Bx\x1b", "x"),
            ("\u{9b}2Jx\u{85}\u{90}".as_bytes(), "x"),
            ("a\u{202e}b\u{2066}c\u{200b}d\u{feff}".as_bytes(), "abcd"),
            (b"bell\x07 back\x08 del\x7f nul\0", "bell back del nul"),
            (b"a\r\nb\tc", "a b c"),
            (b"bad \xff\xfe", "bad \u{fffd}\u{fffd}"),
        ];
        for (text, expected) in cases {
            assert_eq!(sanitize_line(text), *expected, "{text:?}");
        }
        assert_eq!(
            sanitize_lines(b"a\r\n\x1b]endless\nb\tc\x1b[1m"),
            "a\n\nb\tc"
        );
    }

    #[test]
    fn length_is_bounded_whatever_it_is_made_of() {
        for piece in ["x", "\u{20ac}", "\x1b["] {
            let text = piece.repeat(1 << 20);
            assert!(sanitize_line(&text).len() <= MAX_LINE);
            assert!(sanitize_lines(&text).len() <= MAX_LINES);
        }
        let broken = vec![0xff; 1 << 20];
        assert!(sanitize_line(&broken).len() <= MAX_LINE);
        assert!(sanitize_lines(&broken).len() <= MAX_LINES);
        let mut long = "x".repeat(MAX_LINES);
        long.push_str("\nthe end");
        assert!(sanitize_lines(&long).ends_with("x\nthe end"));
    }
}
