//! Resource usage of a container.

use koya_protocol::messages;
use std::collections::BTreeMap;

/// Statistics of a container's control group in the guest. [`u64::MAX`] means no limit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ContainerStats {
    /// Number of processes and threads.
    pub pids: u64,
    /// Maximum of `pids`.
    pub pids_limit: u64,
    /// CPU time.
    pub cpu: CpuStats,
    /// Memory in bytes.
    pub memory: u64,
    /// Maximum of `memory`.
    pub memory_limit: u64,
    /// Swap in bytes.
    pub swap: u64,
    /// Maximum of `swap`.
    pub swap_limit: u64,
    /// Breakdown of memory by the kernel's names (`memory.stat`), in bytes or events.
    pub memory_details: BTreeMap<String, u64>,
    /// Events at memory limits, by the kernel's names (`memory.events`).
    pub memory_events: BTreeMap<String, u64>,
    /// Requests to the guest's disks.
    pub io: Vec<DeviceIo>,
    /// Use of huge pages by their size, in the kernel's notation (`2MB`).
    pub huge_pages: BTreeMap<String, HugePageUse>,
}

/// Use of huge pages of one size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HugePageUse {
    /// In bytes.
    pub usage: u64,
    /// Number of allocations that failed because of the limit.
    pub failures: u64,
}

/// CPU time, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuStats {
    /// Total.
    pub usage: u64,
    /// In user mode.
    pub user: u64,
    /// In the guest kernel.
    pub system: u64,
    /// Number of elapsed quota periods.
    pub periods: u64,
    /// Number of periods in which it was throttled.
    pub throttled_periods: u64,
    /// Time for which it was throttled.
    pub throttled: u64,
}

/// I/O statistics of one disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceIo {
    /// Major number of the device in the guest.
    pub major: u64,
    /// Minor number.
    pub minor: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Read requests.
    pub reads: u64,
    /// Write requests.
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
