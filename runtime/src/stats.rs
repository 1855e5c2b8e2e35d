//! What a container uses.

use koya_protocol::messages;
use std::collections::BTreeMap;

/// A container's control group in the guest. No limit is [`u64::MAX`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ContainerStats {
    /// Processes and threads.
    pub pids: u64,
    /// The most of them.
    pub pids_limit: u64,
    /// CPU time.
    pub cpu: CpuStats,
    /// Bytes of memory.
    pub memory: u64,
    /// The most of them.
    pub memory_limit: u64,
    /// Bytes of swap.
    pub swap: u64,
    /// The most of them.
    pub swap_limit: u64,
    /// What the memory is used for, by the kernel's names (`memory.stat`), in bytes or events.
    pub memory_details: BTreeMap<String, u64>,
    /// What happened at its limits, by the kernel's names (`memory.events`).
    pub memory_events: BTreeMap<String, u64>,
    /// Requests to the guest's disks.
    pub io: Vec<DeviceIo>,
    /// Huge pages, by their size as the kernel names it (`2MB`).
    pub huge_pages: BTreeMap<String, HugePageUse>,
}

/// Huge pages of one size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HugePageUse {
    /// Bytes.
    pub usage: u64,
    /// How often there were none within the limit.
    pub failures: u64,
}

/// CPU time, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuStats {
    /// All.
    pub usage: u64,
    /// In programs.
    pub user: u64,
    /// In the guest's kernel.
    pub system: u64,
    /// Periods of its quota that began.
    pub periods: u64,
    /// Those in which it was stopped.
    pub throttled_periods: u64,
    /// For how long it was stopped.
    pub throttled: u64,
}

/// What was asked of one disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceIo {
    /// The device's number in the guest.
    pub major: u64,
    /// See `major`.
    pub minor: u64,
    /// Bytes.
    pub read_bytes: u64,
    /// Bytes.
    pub written_bytes: u64,
    /// Requests.
    pub reads: u64,
    /// Requests.
    pub writes: u64,
}

impl From<messages::ContainerStats> for ContainerStats {
    fn from(stats: messages::ContainerStats) -> Self {
        let io = |device: &messages::DeviceIo| DeviceIo {
            major: device.major,
            minor: device.minor,
            read_bytes: device.read_bytes,
            written_bytes: device.written_bytes,
            reads: device.reads,
            writes: device.writes,
        };
        let huge_pages = |pages: messages::HugePages| {
            let (usage, failures) = (pages.usage, pages.failures);
            (pages.size, HugePageUse { usage, failures })
        };
        Self {
            pids: stats.pids_current,
            pids_limit: stats.pids_limit,
            cpu: CpuStats {
                usage: stats.cpu_usage_usec,
                user: stats.cpu_user_usec,
                system: stats.cpu_system_usec,
                periods: stats.cpu_periods,
                throttled_periods: stats.cpu_throttled_periods,
                throttled: stats.cpu_throttled_usec,
            },
            memory: stats.memory_usage,
            memory_limit: stats.memory_limit,
            swap: stats.swap_usage,
            swap_limit: stats.swap_limit,
            memory_details: stats.memory.into_iter().collect(),
            memory_events: stats.memory_events.into_iter().collect(),
            io: stats.io.iter().map(io).collect(),
            huge_pages: stats.huge_pages.into_iter().map(huge_pages).collect(),
        }
    }
}
