//! Resource usage of the guest and the agent.

use crate::cpus;
use anyhow::Result;
use koya_protocol::messages::GuestDetails;
use std::fs;

/// Nanoseconds since the kernel's start.
pub(crate) fn uptime_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// Reads the current values.
pub(crate) fn read() -> Result<GuestDetails> {
    let uname = rustix::system::uname();
    let meminfo = fs::read_to_string("/proc/meminfo")?;
    let kib = |name: &str| -> u64 {
        let line = meminfo.lines().find_map(|l| l.strip_prefix(name));
        line.and_then(|l| l.split_whitespace().next()?.parse().ok())
            .unwrap_or(0)
    };
    let numeric = |dir: &str| -> u32 {
        fs::read_dir(dir).map_or(0, |entries| {
            entries
                .filter_map(|e| e.ok()?.file_name().to_str()?.parse::<u32>().ok())
                .count() as u32
        })
    };
    Ok(GuestDetails {
        agent_version: env!("CARGO_PKG_VERSION").into(),
        kernel_release: uname.release().to_string_lossy().into_owned(),
        uptime_ns: uptime_ns(),
        mem_total_bytes: kib("MemTotal:") * 1024,
        mem_available_bytes: kib("MemAvailable:") * 1024,
        cpus_online: cpus::online()?,
        processes: numeric("/proc"),
        agent_fds: numeric("/proc/self/fd"),
        agent_threads: numeric("/proc/self/task"),
        ..Default::default()
    })
}
