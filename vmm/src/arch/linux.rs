//! What Linux is told on its command line, whatever the architecture.

use super::BootInfo;
use crate::panic_log;

/// Memory that is plugged is used at once, and as far as the kernel can do without it in a form that
/// it can give up again (Documentation/admin-guide/mm/memory-hotplug.rst).
const HOTPLUG: &str = " memhp_default_state=online memory_hotplug.online_policy=auto-movable";

/// Where the last words go, how many CPUs to start, what to do with memory that comes.
pub(super) fn words(info: &BootInfo<'_>) -> String {
    let mut words = panic_log::cmdline();
    if info.cpus.online < info.cpus.count {
        words += &format!(" maxcpus={}", info.cpus.online);
    }
    if info.memory.hotplug_bytes > 0 {
        words += HOTPLUG;
    }
    words
}

/// The owner's words, then these, which the kernel takes by what it has read so far, and last what is
/// init's.
pub(super) fn before_init(own: &str, words: &str) -> String {
    let (own, init) = own.split_at(words_for_init(own));
    format!("{own} {words} {init}")
}

/// Where in a command line the word is that all behind is init's, else its end: words as the kernel
/// divides them (`next_arg` in lib/cmdline.c), which may have blanks in quotes.
fn words_for_init(line: &str) -> usize {
    let mut is_quoted = false;
    let words = line.split(|c: char| {
        is_quoted ^= c == '"';
        c.is_ascii_whitespace() && !is_quoted
    });
    let mut at = 0;
    for word in words {
        if word == "--" {
            return at;
        }
        at += word.len() + 1;
    }
    line.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_asked_for_when_it_is_known_how_many() {
        for (words, line) in [
            ("", " EARLY "),
            ("quiet", "quiet EARLY "),
            ("quiet -- single", "quiet  EARLY -- single"),
            ("-- single", " EARLY -- single"),
            ("quiet --", "quiet  EARLY --"),
            ("a=b-- c -- d", "a=b-- c  EARLY -- d"),
            ("a=\"b -- c\" d", "a=\"b -- c\" d EARLY "),
        ] {
            assert_eq!(before_init(words, "EARLY"), line);
        }
    }
}
