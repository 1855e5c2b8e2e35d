//! Values of options in the syntax of Go programs: flags, sizes, durations.

use anyhow::{Context, Result};
use clap::{Arg, ArgAction};
use koya_tasks::parse_duration;
use std::time::Duration;

/// A flag as in Go programs: `--flag`, `--flag=true` or `--flag=false`. The help text has only the first form.
pub(crate) fn valued(arg: Arg) -> Arg {
    match matches!(arg.get_action(), ArgAction::SetTrue) {
        true => arg
            .action(ArgAction::Set)
            .num_args(0..=1)
            .require_equals(true)
            .default_value("false")
            .default_missing_value("true")
            .value_parser(truth),
        false => arg,
    }
}

/// A truth value in the syntax of Go.
fn truth(text: &str) -> Result<bool, String> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err("neither true nor false".to_owned()),
    }
}

/// A size in the syntax of runc: `1024`, `50M`, `1.5g`, `2GiB`, `-1`.
pub(crate) fn bytes(text: &str) -> Result<i64, String> {
    let lower = text.to_lowercase();
    let number = lower.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match &lower[number.len()..] {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        "p" | "pb" | "pib" => 50,
        unit => return Err(format!("unknown unit {unit:?}")),
    };
    let too_large = || "too large".to_owned();
    if let Ok(number) = number.parse::<i64>() {
        if number < 0 {
            return Ok(-1);
        }
        return number.checked_mul(1 << shift).ok_or_else(too_large);
    }
    let number: f64 = number.parse().map_err(|_| "not a number of bytes")?;
    if number.is_sign_negative() {
        return Err("not a number of bytes".to_owned());
    }
    let product = number * (1_i64 << shift) as f64;
    match product < i64::MAX as f64 {
        true => Ok(product as i64),
        false => Err(too_large()),
    }
}

/// Go's units of time, in seconds. There are two spellings of a microsecond: with the micro sign, and with the Greek letter.
const UNITS: [(&str, f64); 8] = [
    ("ns", 1e-9),
    ("us", 1e-6),
    ("\u{b5}s", 1e-6),
    ("\u{3bc}s", 1e-6),
    ("ms", 1e-3),
    ("s", 1.0),
    ("m", 60.0),
    ("h", 3600.0),
];

/// A duration in Go's syntax: `5s`, `500ms`, `1m30s`, `1.5h`.
pub(crate) fn duration(option: &str, text: &str) -> Result<Duration> {
    let parsed = parse_duration(text.strip_prefix('+').unwrap_or(text), &UNITS);
    let parsed = parsed.filter(|time| !time.is_zero());
    parsed.with_context(|| format!("{option} {text}: a time like 5s or 1m30s is expected"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        assert_eq!(bytes("1024"), Ok(1024));
        assert_eq!(bytes("50M"), Ok(50 << 20));
        assert_eq!(bytes("2GiB"), Ok(2 << 30));
        assert_eq!(bytes("-1"), Ok(-1));
        assert_eq!(bytes("1.5g"), Ok(3 << 29));
        assert_eq!(bytes("1.5"), Ok(1));
        assert_eq!(bytes(".5KiB"), Ok(512));
        let bad = [
            "",
            "M",
            "1x",
            "1.5.5",
            "-1.5",
            "9223372036854775807k",
            "99999999.5p",
        ];
        for bad in bad {
            assert!(bytes(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn times_are_those_of_go() {
        let duration = |text: &str| duration("--interval", text);
        assert_eq!(duration("5s").unwrap(), Duration::from_secs(5));
        assert_eq!(duration("250ms").unwrap(), Duration::from_millis(250));
        assert_eq!(duration("1.5s").unwrap(), Duration::from_millis(1500));
        assert_eq!(duration("1m30s").unwrap(), Duration::from_secs(90));
        assert_eq!(duration("1h0.5m").unwrap(), Duration::from_secs(3630));
        assert_eq!(duration("+.5us").unwrap(), Duration::from_nanos(500));
        for bad in [
            "", "5", "0s", "-1s", "x", "s", "1s5", "1.1.1s", "1d", "1s ", "9e9h",
        ] {
            assert!(duration(bad).is_err(), "{bad:?}");
        }
    }
}
