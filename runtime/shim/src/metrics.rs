//! Statistics of a container in containerd's format for control groups, version 2.

use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, HugeTlbStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PidsStat,
};
use koya::ContainerStats;

/// Type name used by containerd and its clients.
pub(crate) const NAME: &str = "io.containerd.cgroups.v2.Metrics";

pub(crate) fn metrics(stats: &ContainerStats) -> Metrics {
    let pids = PidsStat {
        current: stats.pids,
        limit: limit(stats.pids_limit),
        ..Default::default()
    };
    let cpu = CPUStat {
        usage_usec: stats.cpu.usage,
        user_usec: stats.cpu.user,
        system_usec: stats.cpu.system,
        nr_periods: stats.cpu.periods,
        nr_throttled: stats.cpu.throttled_periods,
        throttled_usec: stats.cpu.throttled,
        ..Default::default()
    };
    let events = |name: &str| stats.memory_events.get(name).copied().unwrap_or(0);
    let memory_events = MemoryEvents {
        low: events("low"),
        high: events("high"),
        max: events("max"),
        oom: events("oom"),
        oom_kill: events("oom_kill"),
        ..Default::default()
    };
    let io = |device: &koya::DeviceIo| IOEntry {
        major: device.major,
        minor: device.minor,
        rbytes: device.read_bytes,
        wbytes: device.written_bytes,
        rios: device.reads,
        wios: device.writes,
        ..Default::default()
    };
    let io = IOStat {
        usage: stats.io.iter().map(io).collect(),
        ..Default::default()
    };
    let huge_pages = |(size, pages): (&String, &koya::HugePageUse)| HugeTlbStat {
        current: pages.usage,
        pagesize: size.clone(),
        failcnt: pages.failures,
        ..Default::default()
    };
    Metrics {
        hugetlb: stats.huge_pages.iter().map(huge_pages).collect(),
        pids: Some(pids).into(),
        cpu: Some(cpu).into(),
        memory: Some(memory(stats)).into(),
        memory_events: Some(memory_events).into(),
        io: Some(io).into(),
        ..Default::default()
    }
}

/// Here zero means no limit of processes.
fn limit(value: u64) -> u64 {
    if value == u64::MAX { 0 } else { value }
}

fn memory(stats: &ContainerStats) -> MemoryStat {
    let of = |name: &str| stats.memory_details.get(name).copied().unwrap_or(0);
    MemoryStat {
        anon: of("anon"),
        file: of("file"),
        kernel_stack: of("kernel_stack"),
        slab: of("slab"),
        sock: of("sock"),
        shmem: of("shmem"),
        file_mapped: of("file_mapped"),
        file_dirty: of("file_dirty"),
        file_writeback: of("file_writeback"),
        anon_thp: of("anon_thp"),
        inactive_anon: of("inactive_anon"),
        active_anon: of("active_anon"),
        inactive_file: of("inactive_file"),
        active_file: of("active_file"),
        unevictable: of("unevictable"),
        slab_reclaimable: of("slab_reclaimable"),
        slab_unreclaimable: of("slab_unreclaimable"),
        pgfault: of("pgfault"),
        pgmajfault: of("pgmajfault"),
        workingset_refault: of("workingset_refault_anon")
            .saturating_add(of("workingset_refault_file")),
        workingset_activate: of("workingset_activate_anon")
            .saturating_add(of("workingset_activate_file")),
        workingset_nodereclaim: of("workingset_nodereclaim"),
        pgrefill: of("pgrefill"),
        pgscan: of("pgscan"),
        pgsteal: of("pgsteal"),
        pgactivate: of("pgactivate"),
        pgdeactivate: of("pgdeactivate"),
        pglazyfree: of("pglazyfree"),
        pglazyfreed: of("pglazyfreed"),
        thp_fault_alloc: of("thp_fault_alloc"),
        thp_collapse_alloc: of("thp_collapse_alloc"),
        usage: stats.memory,
        usage_limit: stats.memory_limit,
        swap_usage: stats.swap,
        swap_limit: stats.swap_limit,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use protobuf::MessageFull;

    #[test]
    fn the_name_is_the_one_that_clients_look_for() {
        assert_eq!(Metrics::descriptor().full_name(), NAME);
    }
}
