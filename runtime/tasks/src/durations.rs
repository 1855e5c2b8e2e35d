//! Durations as in Go programs.

use std::time::Duration;

/// A duration in Go's syntax, a sum of numbers with units, such as `1h30m` or `1.5s`. `units` are the known ones, each with its
/// length in seconds.
pub fn parse_duration(text: &str, units: &[(&str, f64)]) -> Option<Duration> {
    let is_of_number = |c: char| c.is_ascii_digit() || c == '.';
    let mut seconds = 0.0;
    let mut rest = text;
    loop {
        let (number, after) = rest.split_at(rest.find(|c: char| !is_of_number(c))?);
        let (unit, after) = after.split_at(after.find(is_of_number).unwrap_or(after.len()));
        let (_, length) = units.iter().find(|(name, _)| *name == unit)?;
        seconds += number.parse::<f64>().ok()? * length;
        if after.is_empty() {
            return Duration::try_from_secs_f64(seconds).ok();
        }
        rest = after;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_sums_of_known_units() {
        let parse = |text| parse_duration(text, &[("m", 60.0), ("s", 1.0)]);
        assert_eq!(parse("1m30s"), Some(Duration::from_secs(90)));
        assert_eq!(parse(".5m1.5s"), Some(Duration::from_millis(31_500)));
        for bad in ["", "1", "m", "1h", "1m1", "1.1.1s", "1m 1s", "-1s"] {
            assert_eq!(parse(bad), None, "{bad:?}");
        }
        assert_eq!(parse(&format!("{}s", "9".repeat(400))), None);
    }
}
