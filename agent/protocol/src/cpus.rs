//! CPU lists, as in `process.execCPUAffinity`.

use std::collections::BTreeSet;

/// Upper bound of CPU numbers.
pub const MAX_CPUS: usize = 1024;

/// Parses a list such as `0-3,7`: each CPU once, in ascending order.
///
/// # Errors
/// The invalid part of the list.
pub fn parse(list: &str) -> Result<Vec<usize>, String> {
    let number = |text: &str| {
        let number = text.trim().parse::<usize>().ok();
        number
            .filter(|cpu| *cpu < MAX_CPUS)
            .ok_or_else(|| format!("{text:?} is no CPU's number"))
    };
    let mut cpus = BTreeSet::new();
    for part in list.split(',').filter(|part| !part.trim().is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (number(first)?, number(last)?);
        if first > last {
            return Err(format!("the range {part:?} has its end first"));
        }
        cpus.extend(first..=last);
    }
    match cpus.is_empty() {
        true => Err(format!("{list:?} names no CPU")),
        false => Ok(cpus.into_iter().collect()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_has_numbers_and_ranges() {
        assert_eq!(parse("0-2,7, 9 ,").unwrap(), [0, 1, 2, 7, 9]);
        assert_eq!(parse("5,1-3,2-4,1").unwrap(), [1, 2, 3, 4, 5]);
        assert!(parse("3-1").unwrap_err().contains("3-1"));
        for wrong in ["", ",", "a", "-1", "1-", "0-1024", "0-99999999999999999999"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
