//! Counters of the host: its clock, CPU time, and KVM's statistics of a virtual machine.

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use nix::time::{ClockId, clock_gettime};
use std::collections::BTreeMap;
use std::error::Error;
use std::fs;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Nanoseconds of the clock shared by all processes and KVM's traces.
///
/// # Errors
/// If the host has no such clock.
pub fn now_ns() -> Result<u64> {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC)?;
    Ok(u64::try_from(now.num_nanoseconds())?)
}

/// Microseconds of CPU time, user and system, including guests.
///
/// # Errors
/// If the host does not provide the figure.
pub fn cpu_us(who: UsageWho) -> Result<u64> {
    let usage = getrusage(who)?;
    let times = [usage.user_time(), usage.system_time()];
    let micros: i64 = times.iter().map(|time| time.num_microseconds()).sum();
    Ok(u64::try_from(micros)?)
}

/// KVM's statistics of a process's virtual machine, by the names in debugfs, including `exits`.
///
/// # Errors
/// If debugfs has no entry for this process.
pub fn of_kvm(pid: u32) -> Result<BTreeMap<String, u64>> {
    let prefix = format!("{pid}-");
    let directories = fs::read_dir("/sys/kernel/debug/kvm").into_iter().flatten();
    let own = directories.flatten().find(|entry| {
        let name = entry.file_name();
        name.to_string_lossy().starts_with(&prefix)
    });
    let files = own.and_then(|own| fs::read_dir(own.path()).ok());
    let files = files.into_iter().flatten().flatten();
    let count = |file: fs::DirEntry| {
        let count = fs::read_to_string(file.path()).ok()?.trim().parse().ok()?;
        Some((file.file_name().to_string_lossy().into_owned(), count))
    };
    let counts: BTreeMap<_, _> = files.filter_map(count).collect();
    match counts.contains_key("exits") {
        true => Ok(counts),
        false => Err("KVM tells nothing in debugfs".into()),
    }
}
