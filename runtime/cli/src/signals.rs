//! Signals that were already ignored when this command was started, by nohup(1) or for background jobs of a shell.
//! They stay ignored; processes of the container start with default handling of all signals.

use std::sync::OnceLock;

/// Signals that a command forwards to a process in a container: all that are not ignored, except those that can't be caught,
/// report faults, or concern this command's own children, terminal, streams and files.
pub(super) fn forwarded_signals() -> Vec<i32> {
    const OWN: [i32; 18] = [
        libc::SIGILL,
        libc::SIGTRAP,
        libc::SIGABRT,
        libc::SIGBUS,
        libc::SIGFPE,
        libc::SIGKILL,
        libc::SIGSEGV,
        libc::SIGPIPE,
        libc::SIGCHLD,
        libc::SIGCONT,
        libc::SIGSTOP,
        libc::SIGTSTP,
        libc::SIGTTIN,
        libc::SIGTTOU,
        libc::SIGURG,
        libc::SIGXFSZ,
        libc::SIGWINCH,
        libc::SIGSYS,
    ];
    // Those between the two ranges belong to the C library.
    let all = (1..=libc::SIGSYS).chain(libc::SIGRTMIN()..=libc::SIGRTMAX());
    let ignored = mask();
    all.filter(|signal| !OWN.contains(signal) && ignored & bit(*signal) == 0)
        .collect()
}

fn bit(signal: i32) -> u64 {
    1 << (signal - 1)
}

/// The mask at the first call, before this process installs handlers.
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
        // containers/podman 10462: systemd is stopped by SIGRTMIN+3.
        let all = forwarded_signals();
        for signal in [
            libc::SIGUSR1,
            libc::SIGALRM,
            libc::SIGRTMIN() + 3,
            libc::SIGRTMAX(),
        ] {
            assert!(all.contains(&signal), "{signal}");
        }
        assert!(!all.contains(&libc::SIGPIPE) && !all.contains(&libc::SIGCHLD));
        // All of them can be caught.
        signal_hook::iterator::Signals::new(&all).unwrap();
    }
}
