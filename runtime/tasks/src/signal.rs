//! Signals by name, as in Docker and runc.

use nix::sys::signal::Signal;

/// The first real-time signal of glibc.
const RTMIN: i32 = 34;
/// The last signal.
pub const LAST: i32 = 64;

/// Other names of signals, from Docker's list.
const ALIASES: [(&str, Signal); 3] = [
    ("CLD", Signal::SIGCHLD),
    ("IOT", Signal::SIGABRT),
    ("POLL", Signal::SIGIO),
];

/// A signal by name, in upper or lower case, with or without `SIG`: `TERM`, `SIGHUP`, `RTMIN+3`.
pub fn by_name(text: &str) -> Option<i32> {
    let name = text.to_uppercase();
    let name = name.strip_prefix("SIG").unwrap_or(&name);
    let step = |rest: &str, sign: char| match rest {
        "" => Some(0),
        rest => rest.strip_prefix(sign)?.parse::<u8>().ok().map(i32::from),
    };
    let real_time = match (name.strip_prefix("RTMIN"), name.strip_prefix("RTMAX")) {
        (Some(rest), _) => step(rest, '+').map(|n| RTMIN + n),
        (_, Some(rest)) => step(rest, '-').map(|n| LAST - n),
        _ => None,
    };
    let alias = || ALIASES.iter().find(|(alias, _)| *alias == name);
    real_time
        .filter(|number| (RTMIN..=LAST).contains(number))
        .or_else(|| Some(format!("SIG{name}").parse::<Signal>().ok()? as i32))
        .or_else(|| alias().map(|(_, signal)| *signal as i32))
}

/// Whether the default action of a signal ends a process (signal(7)).
pub(crate) fn terminates(signal: u32) -> bool {
    let others = [
        Signal::SIGCHLD,
        Signal::SIGCONT,
        Signal::SIGSTOP,
        Signal::SIGTSTP,
        Signal::SIGTTIN,
        Signal::SIGTTOU,
        Signal::SIGURG,
        Signal::SIGWINCH,
    ];
    signal != 0 && !others.iter().any(|other| *other as u32 == signal)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn most_signals_end_a_process() {
        for ends in [1, 2, 3, 6, 9, 10, 12, 15, 29, 31, 34, 64] {
            assert!(terminates(ends), "{ends}");
        }
        for ignored in [0, 17, 18, 19, 20, 21, 22, 23, 28] {
            assert!(!terminates(ignored), "{ignored}");
        }
    }

    #[test]
    fn signals_have_names() {
        for (text, number) in [
            ("KILL", 9),
            ("SIGTERM", 15),
            ("term", 15),
            ("SIGPWR", 30),
            ("stkflt", 16),
            ("SIGIOT", 6),
            ("POLL", 29),
            ("IO", 29),
            ("SIGCLD", 17),
            ("SIGRTMIN+3", 37),
            ("RTMAX-1", 63),
        ] {
            assert_eq!(by_name(text), Some(number), "{text}");
        }
        for signal in Signal::iterator() {
            assert_eq!(by_name(signal.as_str()), Some(signal as i32));
        }
        for bad in [
            "",
            "SIG",
            "9",
            "SIGSIGTERM",
            "RTMIN+31",
            "RTMIN-1",
            "RTMAX-40",
        ] {
            assert_eq!(by_name(bad), None, "{bad}");
        }
    }
}
