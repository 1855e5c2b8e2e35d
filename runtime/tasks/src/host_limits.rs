//! Limits of a container that apply to its sandbox on the host: CPU time, CPU sets, disks and huge pages, as files of the
//! sandbox's control group (Linux, admin-guide/cgroup-v2).
//!
//! The memory limit is [`cgroup::memory`](crate::cgroup::memory), which includes the overhead of the virtual machine. The
//! limit of processes applies only in the guest: on the host a sandbox has a limit for all of its threads instead.

use crate::cgroup::{self, is_ours};
use crate::size::PERIOD;
use anyhow::Result;
use koya::oci_spec::runtime as oci;
use std::fs;
use std::path::Path;

/// A file of a control group, and its value.
type Limit = (String, String);

/// Sets the limits of the sandbox's control group. Failures are logged.
///
/// # Errors
/// A disk limit or a CPU set that can't be set in the sandbox's own group, since nothing else enforces it.
pub(crate) fn apply(group: &Path, resources: &oci::LinuxResources) -> Result<()> {
    apply_those(group, resources, |_, _| true)
}

/// The same without limits of CPU time.
///
/// # Errors
/// As above.
pub(crate) fn apply_all_but_time(group: &Path, resources: &oci::LinuxResources) -> Result<()> {
    apply_those(group, resources, |file, _| !is_time(file))
}

/// Sets those limits of CPU time that leave the sandbox a whole CPU, which it has from the beginning. The guest has them,
/// too, so failures are only logged.
pub(crate) fn apply_shares(group: &Path, resources: &oci::LinuxResources) {
    apply_times(group, resources, |file, value| !is_slow(file, value));
}

/// Sets the other limits of CPU time, which would slow down the creation and the start of a container in the guest.
pub(crate) fn apply_slow(group: &Path, resources: &oci::LinuxResources) {
    apply_times(group, resources, is_slow);
}

fn apply_times(group: &Path, resources: &oci::LinuxResources, wanted: impl Fn(&str, &str) -> bool) {
    let wanted = |file: &str, value: &str| is_time(file) && wanted(file, value);
    if let Err(error) = apply_those(group, resources, wanted) {
        log::warn!("{error:#}");
    }
}

fn is_time(file: &str) -> bool {
    file.starts_with("cpu.")
}

/// Whether a limit of CPU time leaves less than a CPU. A burst is set after the quota that it belongs to.
fn is_slow(file: &str, value: &str) -> bool {
    let mut words = value.split_whitespace();
    let mut number = || words.next()?.parse::<u64>().ok();
    match file {
        "cpu.idle" => number() != Some(0),
        "cpu.max" => number().is_some_and(|quota| quota < number().unwrap_or(PERIOD)),
        "cpu.max.burst" => true,
        _ => false,
    }
}

/// Sets the limits in those files that are wanted.
fn apply_those(
    group: &Path,
    resources: &oci::LinuxResources,
    wanted: impl Fn(&str, &str) -> bool,
) -> Result<()> {
    let read = |file: &str| fs::read_to_string(group.join(file)).ok();
    let mut limits = limits(resources, &read);
    limits.retain(|(file, value)| wanted(file, value));
    set(group, &limits, is_ours(group))
}

fn set(group: &Path, limits: &[Limit], is_ours: bool) -> Result<()> {
    for (file, value) in limits {
        match cgroup::set(group, file, value) {
            Err(error) if is_ours && !is_time(file) => return Err(error),
            Err(error) => log::warn!("{error:#}"),
            Ok(()) => {}
        }
    }
    Ok(())
}

/// The limits to write, based on the current values in the group's files.
fn limits(resources: &oci::LinuxResources, read: &dyn Fn(&str) -> Option<String>) -> Vec<Limit> {
    let mut all = Vec::new();
    if let Some(cpu) = resources.cpu() {
        cpus(cpu, read, &mut all);
    }
    if let Some(io) = resources.block_io() {
        disks(io, read, &mut all);
    }
    huge_pages(resources, read, &mut all);
    let unified = resources.unified().iter().flatten();
    let mut unified: Vec<_> = unified.filter(|(file, _)| is_hosts(file)).collect();
    unified.sort();
    for (file, value) in unified {
        // These files take one line per write.
        let lines = value.lines().filter(|line| !line.trim().is_empty());
        all.extend(lines.map(|line| (file.clone(), line.to_owned())));
    }
    all
}

/// Whether a file in `unified` applies to the sandbox's group on the host. Its name becomes part of a path, and is written to
/// with the privileges of this process: names of these controllers have nothing but letters, digits, `_` and dots.
fn is_hosts(file: &str) -> bool {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "_.".contains(c);
    let controllers = ["cpu.", "cpuset.", "io."];
    file.chars().all(is_plain) && controllers.iter().any(|name| file.starts_with(name))
}

fn cpus(cpu: &oci::LinuxCpu, read: &dyn Fn(&str) -> Option<String>, all: &mut Vec<Limit>) {
    let mut add = |file: &str, value: String| all.push((file.to_owned(), value));
    // The weight before `cpu.idle`, since an idle group has none.
    if let Some(shares) = cpu.shares().filter(|shares| *shares > 0) {
        add("cpu.weight", weight(shares).to_string());
    }
    if let Some(idle) = cpu.idle() {
        add("cpu.idle", idle.to_string());
    }
    let quota = |quota: i64| match quota > 0 {
        true => quota.to_string(),
        false => "max".into(),
    };
    let quota = cpu.quota().filter(|known| *known != 0).map(quota);
    let period = cpu.period().filter(|period| *period > 0);
    if quota.is_some() || period.is_some() {
        let known = read("cpu.max").unwrap_or_default();
        let mut known = known.split_whitespace();
        let known_quota = known.next().unwrap_or("max").to_owned();
        let known_period = known.next().and_then(|period| period.parse().ok());
        let quota = quota.unwrap_or(known_quota);
        let period = period.or(known_period).unwrap_or(PERIOD);
        add("cpu.max", format!("{quota} {period}"));
    }
    if let Some(burst) = cpu.burst() {
        add("cpu.max.burst", burst.to_string());
    }
    for (file, value) in [("cpuset.cpus", cpu.cpus()), ("cpuset.mems", cpu.mems())] {
        if let Some(value) = value.as_ref().filter(|value| !value.is_empty()) {
            add(file, value.clone());
        }
    }
}

/// Converts CPU shares (2 to 262144) to a weight (1 to 10000) by the curve of runc and crun, which maps 1024 to 100. The
/// guest uses the same one.
fn weight(shares: u64) -> u64 {
    match shares {
        ..=2 => 1,
        262_144.. => 10_000,
        _ => {
            let log = (shares as f64).log2();
            let exponent = (log * log + 125.0 * log) / 612.0 - 7.0 / 34.0;
            (10_f64.powf(exponent).ceil() as u64).clamp(1, 10_000)
        }
    }
}

/// Disk limits: shared files are read and written by the sandbox's process.
fn disks(io: &oci::LinuxBlockIo, read: &dyn Fn(&str) -> Option<String>, all: &mut Vec<Limit>) {
    let has_bfq = read("io.bfq.weight").is_some();
    if let Some(weight) = io.weight().filter(|weight| *weight > 0) {
        all.push(match has_bfq {
            true => ("io.bfq.weight".into(), weight.to_string()),
            false => ("io.weight".into(), io_weight(weight).to_string()),
        });
    }
    for device in io.weight_device().iter().flatten() {
        if let Some(weight) = device.weight() {
            let (major, minor) = (device.major(), device.minor());
            all.push(("io.bfq.weight".into(), format!("{major}:{minor} {weight}")));
        }
    }
    let throttled = [
        ("rbps", io.throttle_read_bps_device()),
        ("wbps", io.throttle_write_bps_device()),
        ("riops", io.throttle_read_iops_device()),
        ("wiops", io.throttle_write_iops_device()),
    ];
    for (name, devices) in throttled {
        for device in devices.iter().flatten() {
            // 0 means no limit.
            let rate = match device.rate() {
                0 => "max".to_owned(),
                rate => rate.to_string(),
            };
            let (major, minor) = (device.major(), device.minor());
            all.push(("io.max".into(), format!("{major}:{minor} {name}={rate}")));
        }
    }
}

/// Limits of huge pages, for sizes that the host has a limit of. A guest has none of its own.
fn huge_pages(
    resources: &oci::LinuxResources,
    read: &dyn Fn(&str) -> Option<String>,
    all: &mut Vec<Limit>,
) {
    for limit in resources.hugepage_limits().iter().flatten() {
        let value = match u64::try_from(limit.limit()) {
            Ok(bytes) => bytes.to_string(),
            Err(_) => "max".into(),
        };
        for kind in ["max", "rsvd.max"] {
            let file = format!("hugetlb.{}.{kind}", limit.page_size());
            // A file of this group, not of another one.
            if !file.contains('/') && read(&file).is_some() {
                all.push((file, value.clone()));
            }
        }
    }
}

/// Converts a weight of version 1 (10 to 1000) to one of version 2 (1 to 10000).
fn io_weight(weight: u16) -> u64 {
    1 + (u64::from(weight).clamp(10, 1000) - 10) * 9999 / 990
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn of(resources: Value, files: &[(&str, &str)]) -> Vec<Limit> {
        let resources = serde_json::from_value(resources).unwrap();
        limits(&resources, &|file: &str| {
            let found = files.iter().find(|(name, _)| *name == file);
            found.map(|(_, text)| (*text).to_owned())
        })
    }

    fn pairs(all: &[(&str, &str)]) -> Vec<Limit> {
        let pairs = all.iter();
        pairs.map(|(f, v)| ((*f).into(), (*v).into())).collect()
    }

    #[test]
    fn time_of_cpus_is_the_hosts_too() {
        let cpu = json!({"cpu": {"quota": 150_000, "period": 100_000, "shares": 1024, "cpus": "0-1", "mems": "",
            "burst": 5000, "idle": 1}});
        let expected = [
            ("cpu.weight", "100"),
            ("cpu.idle", "1"),
            ("cpu.max", "150000 100000"),
            ("cpu.max.burst", "5000"),
            ("cpuset.cpus", "0-1"),
        ];
        assert_eq!(of(cpu, &[]), pairs(&expected));
        assert!(of(json!({}), &[]).is_empty());
        assert!(of(json!({"cpu": {"quota": 0, "shares": 0}}), &[]).is_empty());
        // runc's figures.
        for (shares, expected) in [(1, 1), (2, 1), (100, 17), (200, 29), (262_145, 10_000)] {
            assert_eq!(weight(shares), expected, "{shares}");
        }
    }

    #[test]
    fn what_leaves_a_cpu_does_not_wait_for_the_start() {
        for (file, value) in [
            ("cpu.weight", "1"),
            ("cpu.idle", "0"),
            ("cpu.max", "max 100000"),
            ("cpu.max", "100000 100000"),
            ("cpu.max", "100000"),
            ("cpu.max", "max"),
        ] {
            assert!(!is_slow(file, value), "{file}: {value}");
        }
        for (file, value) in [
            ("cpu.idle", "1"),
            ("cpu.max", "99999 100000"),
            ("cpu.max", "5000"),
            ("cpu.max.burst", "5000"),
        ] {
            assert!(is_slow(file, value), "{file}: {value}");
        }
        let dir = tempfile::tempdir().unwrap();
        let resources = json!({"cpu": {"shares": 1024, "idle": 1, "quota": 200_000}});
        let resources = serde_json::from_value(resources).unwrap();
        apply_shares(dir.path(), &resources);
        let read = |file: &str| fs::read_to_string(dir.path().join(file)).unwrap_or_default();
        let three = || ["cpu.weight", "cpu.max", "cpu.idle"].map(read);
        assert_eq!(three(), ["100", "200000 100000", ""]);
        apply_slow(dir.path(), &resources);
        assert_eq!(three(), ["100", "200000 100000", "1"]);
    }

    #[test]
    fn what_an_update_leaves_out_stays() {
        let before = [("cpu.max", "500000 1000000\n")];
        let max = |cpu: Value, before: &[(&str, &str)]| {
            let all = of(json!({"cpu": cpu}), before);
            all.first().map(|(_, value)| value.clone()).unwrap()
        };
        assert_eq!(max(json!({"period": 900_000}), &before), "500000 900000");
        assert_eq!(max(json!({"quota": 600_000}), &before), "600000 1000000");
        assert_eq!(max(json!({"quota": -1}), &before), "max 1000000");
        assert_eq!(max(json!({"quota": 5000}), &[]), "5000 100000");
        assert_eq!(max(json!({"period": 50_000}), &[]), "max 50000");
    }

    #[test]
    fn disks_are_the_hosts() {
        let io = json!({"blockIO": {
            "weight": 750,
            "throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 1000}],
            "throttleWriteIOPSDevice": [{"major": 8, "minor": 16, "rate": 0}],
        }});
        let expected = [
            ("io.weight", "7475"),
            ("io.max", "8:0 rbps=1000"),
            ("io.max", "8:16 wiops=max"),
        ];
        assert_eq!(of(io, &[]), pairs(&expected));
        let weights = json!({"blockIO": {"weight": 333,
            "weightDevice": [{"major": 7, "minor": 1, "weight": 444}]}});
        let bfq = [("io.bfq.weight", "default 100\n")];
        let expected = [("io.bfq.weight", "333"), ("io.bfq.weight", "7:1 444")];
        assert_eq!(of(weights, &bfq), pairs(&expected));
    }

    #[test]
    fn huge_pages_are_limited_where_the_host_can() {
        let limits = json!({"hugepageLimits": [
            {"pageSize": "2MB", "limit": 2_097_152},
            {"pageSize": "1GB", "limit": -1},
            {"pageSize": "../2MB", "limit": 0},
        ]});
        let files = [
            ("hugetlb.2MB.max", "max\n"),
            ("hugetlb.2MB.rsvd.max", "max\n"),
            ("hugetlb.1GB.max", "max\n"),
        ];
        let expected = [
            ("hugetlb.2MB.max", "2097152"),
            ("hugetlb.2MB.rsvd.max", "2097152"),
            ("hugetlb.1GB.max", "max"),
        ];
        assert_eq!(of(limits.clone(), &files), pairs(&expected));
        assert!(of(limits, &[]).is_empty());
    }

    #[test]
    fn of_named_files_the_guest_has_memory_and_processes() {
        let unified = json!({"unified": {
            "memory.high": "1", "pids.max": "9", "hugetlb.2MB.max": "0",
            "cpu.max": "5000 50000", "io.max": "7:0 riops=3\n7:1 riops=5\n",
        }});
        let expected = [
            ("cpu.max", "5000 50000"),
            ("io.max", "7:0 riops=3"),
            ("io.max", "7:1 riops=5"),
        ];
        assert_eq!(of(unified, &[]), pairs(&expected));
    }

    #[test]
    fn a_named_file_is_one_of_the_group() {
        let elsewhere = json!({"unified": {
            "cpu.x/../../cgroup.procs": "0", "io./../max": "1", "cpuset.cpus\n": "0", "cpu.\u{0}max": "1",
        }});
        assert!(of(elsewhere, &[]).is_empty());
        let plain = json!({"unified": {"cpuset.cpus.partition": "root", "cpu.max.burst": "1"}});
        assert_eq!(of(plain, &[]).len(), 2);
    }

    #[test]
    fn what_only_the_host_enforces_is_held_or_refused() {
        let dir = tempfile::tempdir().unwrap();
        let missing = dir.path().join("group");
        let cpu = pairs(&[("cpu.idle", "1")]);
        let disk = pairs(&[("io.max", "8:0 rbps=1")]);
        let set = |limits: &[Limit], is_ours| set(&missing, limits, is_ours);
        // The guest enforces it, too.
        set(&cpu, true).unwrap();
        // In a group of other processes a failure is not an error.
        set(&disk, false).unwrap();
        let refused = format!("{:#}", set(&disk, true).unwrap_err());
        assert!(refused.contains("io.max: 8:0 rbps=1"), "{refused}");
        super::set(dir.path(), &disk, true).unwrap();
        let set_of_cpus = pairs(&[("cpuset.cpus", "0-500")]);
        let refused = format!("{:#}", set(&set_of_cpus, true).unwrap_err());
        assert!(refused.contains("cpuset.cpus: 0-500"), "{refused}");
        let written = fs::read_to_string(dir.path().join("io.max")).unwrap();
        assert_eq!(written, "8:0 rbps=1");
    }
}
