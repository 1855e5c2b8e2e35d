//! Signals by number or name.

use anyhow::{Context, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGWINCH};

/// What a process on the host passes on to the one in the guest that it stands for; a new size of the terminal as such.
pub(crate) const PASSED: [i32; 7] = [SIGTERM, SIGINT, SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2, SIGWINCH];

const RTMIN: i32 = 34;
const RTMAX: i32 = 64;

/// `9`, `KILL`, `SIGKILL`, `RTMIN+3`; 0 asks whether there is a process.
///
/// # Errors
/// If there is no such signal.
pub(crate) fn parse(text: &str) -> Result<u32> {
    let unknown = || format!("unknown signal {text:?}");
    if let Ok(number) = text.parse::<i32>() {
        let valid = (0..=RTMAX).contains(&number).then_some(number as u32);
        return valid.with_context(unknown);
    }
    let name = text.to_uppercase();
    let name = name.strip_prefix("SIG").unwrap_or(&name);
    let step = |rest: &str, sign: char| match rest {
        "" => Some(0),
        rest => rest.strip_prefix(sign)?.parse::<u8>().ok().map(i32::from),
    };
    let real_time = match (name.strip_prefix("RTMIN"), name.strip_prefix("RTMAX")) {
        (Some(rest), _) => step(rest, '+').map(|n| RTMIN + n),
        (_, Some(rest)) => step(rest, '-').map(|n| RTMAX - n),
        _ => None,
    };
    let full = format!("SIG{name}");
    let named =
        || (1..=31).find(|n| signal_hook::low_level::signal_name(*n) == Some(full.as_str()));
    real_time
        .filter(|number| (RTMIN..=RTMAX).contains(number))
        .or_else(named)
        .map(|number| number as u32)
        .with_context(unknown)
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
