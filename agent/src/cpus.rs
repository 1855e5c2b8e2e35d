//! The guest's CPUs, through /sys/devices/system/cpu (Documentation/core-api/cpu_hotplug.rst).

use anyhow::{Context, Result, bail};
use koya_protocol::ErrorReason;
use std::fs;

const CPUS: &str = "/sys/devices/system/cpu";

/// Parses a CPU list of the kernel: `0-3,5`.
fn parse_list(text: &str) -> Option<Vec<u32>> {
    let mut all = Vec::new();
    for part in text.trim().split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        all.extend(first..=last);
    }
    Some(all)
}

fn list(name: &str) -> Result<Vec<u32>> {
    let path = format!("{CPUS}/{name}");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    parse_list(&text).with_context(|| format!("{path} says {text:?}"))
}

/// Number of online CPUs.
pub(crate) fn online() -> Result<u32> {
    Ok(list("online")?.len() as u32)
}

/// Turns CPUs on, the first ones first, or off, the last ones first, until `count` are on.
pub(crate) fn set_online(count: u32) -> Result<()> {
    let present = list("present")?;
    if count == 0 || count as usize > present.len() {
        let reason = format!("{count} CPUs can't be on: there are {}", present.len());
        bail!(ErrorReason::Invalid(reason));
    }
    let (on, off) = present.split_at(count as usize);
    let online = list("online")?;
    for cpu in on.iter().filter(|cpu| !online.contains(cpu)) {
        turn(*cpu, "1")?;
    }
    for cpu in off.iter().rev().filter(|cpu| online.contains(cpu)) {
        turn(*cpu, "0")?;
    }
    Ok(())
}

fn turn(cpu: u32, state: &str) -> Result<()> {
    let path = format!("{CPUS}/cpu{cpu}/online");
    fs::write(&path, state).with_context(|| format!("cannot write {state} to {path}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_parsed() {
        assert_eq!(parse_list("0\n"), Some(vec![0]));
        assert_eq!(parse_list("0-2,5,7-8\n"), Some(vec![0, 1, 2, 5, 7, 8]));
        assert_eq!(parse_list("\n"), Some(vec![]));
        assert_eq!(parse_list("x"), None);
    }
}
