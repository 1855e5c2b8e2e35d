//! Signals that this command was started to ignore, as nohup(1) and a shell's background jobs ask it to.
//! They stay ignored; the container's own processes start with every signal at its default.

use std::sync::OnceLock;

/// Of `signals`, those that are not ignored.
pub(super) fn heeded(signals: &[i32]) -> Vec<i32> {
    let ignored = mask();
    let mut heeded = signals.to_vec();
    heeded.retain(|signal| ignored & bit(*signal) == 0);
    heeded
}

fn bit(signal: i32) -> u64 {
    1 << (signal - 1)
}

/// As it was when it was first asked for: before this process has handlers of its own.
fn mask() -> u64 {
    static MASK: OnceLock<u64> = OnceLock::new();
    *MASK.get_or_init(|| {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        parse(&status)
    })
}

/// The `SigIgn` of a process's status (proc_pid_status(5)).
fn parse(status: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    line.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ignored_signals_are_known() {
        let mask = parse("Name:\tkoya\nSigBlk:\t0000000000000006\nSigIgn:\t0000000000001005\n");
        assert_eq!(
            mask,
            bit(libc::SIGHUP) | bit(libc::SIGQUIT) | bit(libc::SIGPIPE)
        );
        assert_eq!(parse("Name:\tkoya\n"), 0);
        // Rust's runtime ignores SIGPIPE in every program.
        assert_eq!(heeded(&[libc::SIGPIPE, libc::SIGUSR1]), [libc::SIGUSR1]);
    }
}
