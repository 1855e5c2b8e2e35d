//! `koya stats`: resource usage of containers, in the guest and on the host.

use super::client;
use super::control::{Answer, Request};
use super::output::{complain, say};
use super::state::Directory;
use super::{FAILED, Outcome};
use anyhow::{Result, bail};
use clap::Args;
use koya::Sandbox;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use serde::{Deserialize, Serialize};
use std::sync::atomic::{AtomicU64, Ordering};

#[derive(Args)]
pub(super) struct StatsArgs {
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// The containers (default: all running ones)
    names: Vec<String>,
}

/// Resource usage of a sandbox. Sizes in bytes.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Stats {
    /// CPU time of the sandbox's process, guest included, in milliseconds.
    cpu_ms: u64,
    /// Memory of the guest, as seen by its kernel.
    guest_total: u64,
    /// Part of it used by programs and kernel.
    guest_used: u64,
    /// Part of it that is resident on the host.
    host_guest: u64,
    /// Memory of the sandbox's process beyond that.
    host_overhead: u64,
    /// Processes in the guest.
    processes: u32,
    /// Bytes received by the guest over its networks.
    net_received: u64,
    /// Bytes sent by the guest.
    net_sent: u64,
    /// Bytes read from its disks.
    disk_read: u64,
    /// Bytes written to its disks.
    disk_written: u64,
    /// Requests for shared files.
    file_requests: u64,
    /// Bytes read from shared files.
    file_read: u64,
    /// Bytes written to shared files.
    file_written: u64,
}

impl Stats {
    pub(super) fn of(sandbox: &Sandbox) -> Result<Self> {
        let guest = sandbox.stats()?;
        let machine = sandbox.machine();
        let memory = machine.memory_usage()?;
        let used = getrusage(UsageWho::RUSAGE_SELF)?;
        let cpu = used.user_time() + used.system_time();
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let files = sandbox.file_metrics();
        let mut stats = Self {
            cpu_ms: cpu.num_milliseconds() as u64,
            guest_total: guest.memory_total,
            guest_used: guest.memory_total.saturating_sub(guest.memory_available),
            host_guest: memory.guest,
            host_overhead: memory.overhead,
            processes: guest.processes,
            net_received: 0,
            net_sent: 0,
            disk_read: 0,
            disk_written: 0,
            file_requests: load(&files.requests),
            file_read: load(&files.read_bytes),
            file_written: load(&files.written_bytes),
        };
        for network in machine.networks() {
            stats.net_received += load(&network.metrics().received_bytes);
            stats.net_sent += load(&network.metrics().sent_bytes);
        }
        let attached = machine.attached_disks();
        for disk in machine
            .disks()
            .iter()
            .chain(attached.iter().map(|a| &a.disk))
        {
            stats.disk_read += load(&disk.metrics().read_bytes);
            stats.disk_written += load(&disk.metrics().written_bytes);
        }
        Ok(stats)
    }
}

pub(super) fn main(args: &StatsArgs) -> Outcome {
    let named = !args.names.is_empty();
    let names = match named {
        true => args.names.clone(),
        false => running()?,
    };
    let mut rows = Vec::new();
    let mut worst = 0;
    for name in names {
        match ask(&name) {
            Ok(stats) => rows.push((name, stats)),
            // A container that has just ended is an error only if it was named.
            Err(error) if named => {
                complain!("koya: {error:#}");
                worst = FAILED;
            }
            Err(error) => log::debug!("{error:#}"),
        }
    }
    if args.json {
        let rows: Vec<_> = rows
            .iter()
            .map(|(name, stats)| Row { name, stats })
            .collect();
        say!("{}", serde_json::to_string_pretty(&rows)?)?;
    } else {
        print(&rows)?;
    }
    Ok(worst)
}

#[derive(Serialize)]
struct Row<'a> {
    name: &'a str,
    #[serde(flatten)]
    stats: &'a Stats,
}

fn running() -> Result<Vec<String>> {
    let directories = Directory::all()?.into_iter().filter(Directory::is_running);
    Ok(directories
        .filter_map(|directory| Some(directory.read().ok()?.name))
        .collect())
}

fn ask(name: &str) -> Result<Stats> {
    match client::ask(name, &Request::Stats)? {
        Answer::Stats(stats) => Ok(*stats),
        other => bail!("unexpected reply from container {name}: {other:?}"),
    }
}

fn print(rows: &[(String, Stats)]) -> Result<()> {
    say!(
        "{:<20} {:>9} {:>19} {:>9} {:>9} {:>5} {:>19} {:>19} {:>19}",
        "NAME",
        "CPU",
        "GUEST USED/ALL",
        "ON HOST",
        "OVERHEAD",
        "PIDS",
        "NET IN/OUT",
        "DISK READ/WRITTEN",
        "FILES READ/WRITTEN"
    )?;
    for (name, stats) in rows {
        let pair = |a, b| format!("{} / {}", size(a), size(b));
        say!(
            "{name:<20} {:>7.1} s {:>19} {:>9} {:>9} {:>5} {:>19} {:>19} {:>19}",
            stats.cpu_ms as f64 / 1000.0,
            pair(stats.guest_used, stats.guest_total),
            size(stats.host_guest),
            size(stats.host_overhead),
            stats.processes,
            pair(stats.net_received, stats.net_sent),
            pair(stats.disk_read, stats.disk_written),
            pair(stats.file_read, stats.file_written),
        )?;
    }
    Ok(())
}

/// Formats a size with three digits and a unit.
fn size(bytes: u64) -> String {
    let mut value = bytes as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if value < 1000.0 {
            let digits = usize::from(value < 10.0 && unit != "B");
            return format!("{value:.digits$} {unit}");
        }
        value /= 1024.0;
    }
    format!("{value:.1} TiB")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_short() {
        assert_eq!(size(0), "0 B");
        assert_eq!(size(999), "999 B");
        assert_eq!(size(1 << 20), "1.0 MiB");
        assert_eq!(size(256 << 20), "256 MiB");
        assert_eq!(size(3 << 40), "3.0 TiB");
    }
}
