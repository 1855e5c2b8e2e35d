//! Signals by number or name.

use anyhow::{Context, Result};
use koya_tasks::signal::{LAST, by_name};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGWINCH};

/// Signals that a process on the host forwards to the process in the guest; SIGWINCH becomes a new terminal size.
pub(crate) const PASSED: [i32; 7] = [SIGTERM, SIGINT, SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2, SIGWINCH];

/// `9`, `KILL`, `SIGKILL`, `RTMIN+3`; 0 checks whether the process exists.
///
/// # Errors
/// If there is no such signal.
pub(crate) fn parse(text: &str) -> Result<u32> {
    let found = match text.parse() {
        Ok(number) => (0..=LAST).contains(&number).then_some(number),
        Err(_) => by_name(text),
    };
    let number = found.with_context(|| format!("unknown signal {text:?}"))?;
    Ok(number as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_have_numbers_and_names() {
        for (text, number) in [
            ("9", 9),
            ("KILL", 9),
            ("SIGTERM", 15),
            ("term", 15),
            ("0", 0),
            ("RTMIN+3", 37),
        ] {
            assert_eq!(parse(text).unwrap(), number, "{text}");
        }
        for bad in ["-1", "65", "SIGNOTHING", "", "RTMAX-40"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
