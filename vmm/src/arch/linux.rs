//! Linux kernel parameters that do not depend on the architecture.

use super::BootInfo;
use crate::panic_log;

/// Onlines plugged memory immediately, in movable zones as far as the kernel can, so that it can be unplugged
/// again (Documentation/admin-guide/mm/memory-hotplug.rst).
const HOTPLUG: &str = " memhp_default_state=online memory_hotplug.online_policy=auto-movable";

/// Parameters for the panic log, the number of CPUs to start and memory hotplug.
pub(super) fn kernel_parameters(info: &BootInfo<'_>) -> String {
    let mut words = panic_log::cmdline();
    if info.cpus.online < info.cpus.count {
        words += &format!(" maxcpus={}", info.cpus.online);
    }
    if info.memory.hotplug_bytes > 0 {
        words += HOTPLUG;
    }
    words
}

/// Inserts kernel parameters behind the configured ones, because the kernel acts on each parameter as soon as it is parsed
/// (a console prints at the log level set so far); arguments for init come last.
pub(super) fn insert_before_init(own: &str, words: &str) -> String {
    let (own, init) = own.split_at(init_arguments(own));
    format!("{own} {words} {init}")
}

/// Offset of the `--` that begins the arguments for init, or the length of the line. Parameters are split as
/// the kernel does (`next_arg` in lib/cmdline.c): a quoted one may contain blanks.
fn init_arguments(line: &str) -> usize {
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
    fn parameters_are_inserted_before_the_arguments_of_init() {
        for (words, line) in [
            ("", " EARLY "),
            ("quiet", "quiet EARLY "),
            ("quiet -- single", "quiet  EARLY -- single"),
            ("-- single", " EARLY -- single"),
            ("quiet --", "quiet  EARLY --"),
            ("a=b-- c -- d", "a=b-- c  EARLY -- d"),
            ("a=\"b -- c\" d", "a=\"b -- c\" d EARLY "),
        ] {
            assert_eq!(insert_before_init(words, "EARLY"), line);
        }
    }
}
