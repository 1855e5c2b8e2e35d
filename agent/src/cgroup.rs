//! A container's control group (Documentation/admin-guide/cgroup-v2.rst): freezing, limits, statistics.

use crate::checks::invalid_json;
use crate::places;
use crate::sys;
use anyhow::{Context, Result, bail};
use koya_protocol::ErrorReason;
use koya_protocol::cpus;
use koya_protocol::messages::{ContainerStats, DeviceIo, HugePages};
use libcgroups::common::{
    CgroupConfig, CgroupManager as _, ControllerOpt, FreezerState, create_cgroup_manager,
};
use oci_spec::runtime::{LinuxMemory, LinuxResources};
use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

const ROOT: &str = "/sys/fs/cgroup";

/// Processes and threads reserved for the agent and the kernel, at most a quarter of all.
const RESERVE: u64 = 512;

/// Number of checks, ten milliseconds apart, for the end of killed processes.
const PATIENCE: u32 = 500;

/// Creates the parent group of all containers. Its limit of processes is lower than that of the guest: whatever containers
/// do, the agent can still end them, and add a process to them.
pub(crate) fn set_up() -> Result<()> {
    let all = Path::new(ROOT).join(places::CGROUPS.trim_start_matches('/'));
    fs::create_dir_all(&all)?;
    fs::create_dir_all(Path::new(ROOT).join(places::ENTRY_CGROUP.trim_start_matches('/')))?;
    let controllers = fs::read_to_string(all.join("cgroup.controllers"))?;
    let wanted: Vec<_> = controllers
        .split_whitespace()
        .map(|c| format!("+{c}"))
        .collect();
    fs::write(all.join("cgroup.subtree_control"), wanted.join(" "))?;
    let limits = ["/proc/sys/kernel/pid_max", "/proc/sys/kernel/threads-max"];
    let limits = limits.map(|path| fs::read_to_string(path).map(|text| single(&text)));
    let most = containers_pids(limits.into_iter().flatten());
    let limit = all.join("pids.max");
    // A guest kernel may lack that controller.
    if let Some(most) = most.filter(|_| limit.exists()) {
        fs::write(limit, most.to_string())?;
    }
    Ok(())
}

/// Maximum number of processes and threads of containers, given the kernel's limits.
fn containers_pids(limits: impl Iterator<Item = u64>) -> Option<u64> {
    let most = limits.filter(|limit| *limit > 0).min()?;
    Some(most - RESERVE.min(most / 4))
}

/// The files by which a process joins a container, to be tried in order: its control group; and that of its first process,
/// for containers that have created groups of their own. In that case the container's own group may have no processes
/// (cgroup-v2.rst, "No Internal Process Constraint").
pub(crate) fn join_files(id: &str, first: Option<i32>) -> Result<Vec<Arc<File>>> {
    let own = directory(id);
    let mut groups = vec![own.clone()];
    if let Some(pid) = first
        && let Ok(text) = fs::read_to_string(format!("/proc/{pid}/cgroup"))
        && let Some(group) = group_of(&text)
        && group != own
        && group.starts_with(&own)
    {
        groups.push(group);
    }
    let mut groups = groups.into_iter().map(open);
    let own = groups.next().transpose()?;
    // The second may have disappeared: its process can move to other groups.
    Ok(own.into_iter().chain(groups.flatten()).collect())
}

/// The file by which a process joins a control group below a container's.
pub(crate) fn join_file(id: &str, within: &str) -> Result<Arc<File>> {
    let path = Path::new(within.trim_start_matches('/'));
    if path.components().any(|part| part == Component::ParentDir) {
        bail!(ErrorReason::Invalid(format!(
            "bad sub cgroup path {within}"
        )));
    }
    open(directory(id).join(path)).with_context(|| format!("cgroup {within}"))
}

fn open(group: PathBuf) -> Result<Arc<File>> {
    let path = group.join("cgroup.procs");
    let file = OpenOptions::new().write(true).open(&path);
    file.map(Arc::new)
        .with_context(|| path.display().to_string())
}

/// Parses `/proc/PID/cgroup`: `0::/koya/ID/init`.
fn group_of(text: &str) -> Option<PathBuf> {
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let path = path.strip_suffix(" (deleted)").unwrap_or(path);
    Some(Path::new(ROOT).join(path))
}

/// Joins the first group that accepts this process. The kernel checks the credentials of the opener of the file.
pub(crate) fn join<'a, W: Write + 'a>(files: impl IntoIterator<Item = W>) -> io::Result<()> {
    let mut refused = io::Error::from(io::ErrorKind::NotFound);
    for mut file in files {
        // The writing process itself.
        match file.write_all(b"0") {
            // It has enabled controllers for child groups, or is a threaded group.
            Err(error)
                if [libc::EBUSY, libc::EOPNOTSUPP]
                    .map(Some)
                    .contains(&error.raw_os_error()) =>
            {
                refused = error;
            }
            joined => return joined,
        }
    }
    Err(refused)
}

/// Kills the processes of a container, and removes the groups that it created below its own.
pub(crate) fn end_nested(id: &str) -> Result<()> {
    let own = directory(id);
    if nested(&own).is_empty() {
        return Ok(());
    }
    signal_all(id, libc::SIGKILL)?;
    // A killed process is in its group until it has ended.
    for _ in 0..PATIENCE {
        nested(&own).into_iter().for_each(remove);
        if nested(&own).is_empty() {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    bail!("the control groups that container {id} made do not end")
}

fn nested(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let groups = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    groups.map(|entry| entry.path()).collect()
}

fn remove(group: PathBuf) {
    nested(&group).into_iter().for_each(remove);
    fs::remove_dir(group).ok();
}

/// Directory of a container's group.
pub(crate) fn directory(id: &str) -> PathBuf {
    Path::new(ROOT).join(places::cgroup(id).trim_start_matches('/'))
}

fn config(id: &str) -> CgroupConfig {
    CgroupConfig {
        cgroup_path: places::cgroup(id).into(),
        systemd_cgroup: false,
        container_name: id.into(),
    }
}

/// Freezes all processes of a container, or thaws them.
pub(crate) fn freeze(id: &str, frozen: bool) -> Result<()> {
    let state = match frozen {
        true => FreezerState::Frozen,
        false => FreezerState::Thawed,
    };
    let manager = create_cgroup_manager(config(id))?;
    let done = manager.freeze(state);
    if done.is_err() && frozen {
        // Reverts a partial freeze.
        manager.freeze(FreezerState::Thawed).ok();
    }
    Ok(done?)
}

/// Sets the limits in `linux.resources` of an OCI configuration; absent ones are not changed.
pub(crate) fn update(id: &str, resources: &[u8]) -> Result<()> {
    let mut resources: LinuxResources =
        serde_json::from_slice(resources).map_err(|error| invalid_json("resources", &error))?;
    if let Some(memory) = *resources.memory() {
        let read = |file| {
            let text = fs::read_to_string(directory(id).join(file));
            single(&text.unwrap_or_default())
        };
        check_memory(&memory, read("memory.current"))?;
        resources.set_memory(Some(with_limit(memory, read("memory.max"))));
    }
    // A set of the host replaces one that was also the guest's: then all CPUs are allowed here.
    if has_cpu_sets(&resources) {
        let online = online_cpus();
        retain_own_cpus(&mut resources, &online, Some(online.trim()));
    }
    set(id, &resources)
}

/// Sets these limits, except for CPUs and memory nodes that only the host has.
pub(crate) fn set(id: &str, resources: &LinuxResources) -> Result<()> {
    let mut resources = resources.clone();
    if has_cpu_sets(&resources) {
        retain_own_cpus(&mut resources, &online_cpus(), None);
    }
    let wanted = ControllerOpt {
        resources: &resources,
        disable_oom_killer: false,
        oom_score_adj: None,
        freezer_state: None,
    };
    Ok(create_cgroup_manager(config(id))?.apply(&wanted)?)
}

fn has_cpu_sets(resources: &LinuxResources) -> bool {
    let cpu = resources.cpu().as_ref();
    let mut files = resources.unified().iter().flatten();
    cpu.is_some_and(|cpu| cpu.cpus().is_some() || cpu.mems().is_some())
        || files.any(|(file, _)| file.starts_with("cpuset."))
}

/// The guest's CPUs, as a list of the kernel; empty without control groups for sets of CPUs.
fn online_cpus() -> String {
    let controllers = fs::read_to_string(Path::new(ROOT).join("cgroup.controllers"));
    let is_possible = controllers.is_ok_and(|all| all.split_whitespace().any(|c| c == "cpuset"));
    let online = is_possible.then(|| fs::read_to_string("/sys/devices/system/cpu/online").ok());
    online.flatten().unwrap_or_default()
}

/// Removes sets of CPUs and memory nodes that the guest does not have, as the numbers are those of the host; `other` takes
/// the place of such a set of CPUs. A guest has one memory node.
fn retain_own_cpus(resources: &mut LinuxResources, online: &str, other: Option<&str>) {
    let online = cpus::parse(online).unwrap_or_default();
    let has_all = |list: &str| {
        let wanted = cpus::parse(list);
        wanted.is_ok_and(|wanted| wanted.iter().all(|cpu| online.contains(cpu)))
    };
    let other = other.filter(|other| !other.is_empty());
    // An empty set is none.
    let own_cpus = |list: &String| match list.trim() {
        "" => None,
        _ if has_all(list) => Some(list.clone()),
        _ => other.map(str::to_owned),
    };
    let is_own_node = |list: &String| !online.is_empty() && list.trim() == "0";
    if let Some(mut cpu) = resources.cpu().clone() {
        let set = cpu.cpus().as_ref().and_then(own_cpus);
        let nodes = cpu.mems().clone().filter(is_own_node);
        cpu.set_cpus(set);
        cpu.set_mems(nodes);
        resources.set_cpu(Some(cpu));
    }
    if let Some(mut files) = resources.unified().clone() {
        if let Some(list) = files.remove("cpuset.cpus")
            && let Some(set) = own_cpus(&list)
        {
            files.insert("cpuset.cpus".into(), set);
        }
        files.retain(|file, value| file != "cpuset.mems" || is_own_node(value));
        resources.set_unified(Some(files));
    }
}

/// Adds the current memory limit to a limit of memory and swap alone, which libcontainer would not set.
fn with_limit(mut memory: LinuxMemory, known: u64) -> LinuxMemory {
    let known = i64::try_from(known).unwrap_or(-1);
    if memory.limit().is_none() && memory.swap().is_some_and(|swap| swap == -1 || known > 0) {
        memory.set_limit(Some(known));
    }
    memory
}

/// With `checkBeforeUpdate`, rejects a limit that is not above the current usage, since it would get processes killed. The
/// wording is runc's.
fn check_memory(memory: &LinuxMemory, usage: u64) -> Result<()> {
    if memory.check_before_update() != Some(true) {
        return Ok(());
    }
    let limits = [("memory+swap", memory.swap()), ("memory", memory.limit())];
    for (what, limit) in limits {
        if let Some(limit) = limit.and_then(|limit| u64::try_from(limit).ok())
            && limit > 0
            && limit <= usage
        {
            let reason = format!("rejecting {what} limit {limit} <= usage {usage}");
            bail!(ErrorReason::Invalid(reason));
        }
    }
    Ok(())
}

/// Signals every process of a container, including those in groups that it created.
pub(crate) fn signal_all(id: &str, signal: i32) -> Result<()> {
    let directory = directory(id);
    if signal == libc::SIGKILL {
        return fs::write(directory.join("cgroup.kill"), "1").context("cgroup.kill");
    }
    for pid in processes(&directory)? {
        // Errors for processes that have ended meanwhile are ignored.
        sys::kill(pid, signal).ok();
    }
    Ok(())
}

fn processes(directory: &Path) -> Result<Vec<i32>> {
    let path = directory.join("cgroup.procs");
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let mut all: Vec<i32> = text.lines().filter_map(|line| line.parse().ok()).collect();
    for entry in fs::read_dir(directory)?.flatten() {
        if entry.file_type()?.is_dir() {
            all.extend(processes(&entry.path())?);
        }
    }
    Ok(all)
}

/// Resource usage and limits of a container.
pub(crate) fn stats(id: &str) -> Result<ContainerStats> {
    let directory = directory(id);
    // Values of missing controllers are zero.
    let text = |name: &str| fs::read_to_string(directory.join(name)).unwrap_or_default();
    let stats = parse_stats(&text, &huge_page_sizes(&directory));
    // Checked last: without the group, all of its files are missing.
    if !directory.is_dir() {
        bail!(ErrorReason::NotFound(format!("no container {id}")));
    }
    Ok(stats)
}

/// The sizes of huge pages that the group has files for.
fn huge_page_sizes(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let mut sizes: Vec<String> = names
        .filter_map(|name| {
            let size = name.strip_prefix("hugetlb.")?.strip_suffix(".current")?;
            (!size.contains('.')).then(|| size.to_owned())
        })
        .collect();
    sizes.sort();
    sizes
}

/// The statistics in a group's files: `text` returns the contents of one of them by its name.
fn parse_stats(text: &dyn Fn(&str) -> String, huge_page_sizes: &[String]) -> ContainerStats {
    let number = |name: &str| single(&text(name));
    let cpu = keyed(&text("cpu.stat"));
    let of_cpu = |name: &str| cpu.get(name).copied().unwrap_or(0);
    let huge_pages = |size: &String| HugePages {
        size: size.clone(),
        usage: number(&format!("hugetlb.{size}.current")),
        failures: keyed(&text(&format!("hugetlb.{size}.events")))
            .get("max")
            .copied()
            .unwrap_or(0),
        ..Default::default()
    };
    ContainerStats {
        pids_current: number("pids.current"),
        pids_limit: number("pids.max"),
        cpu_usage_usec: of_cpu("usage_usec"),
        cpu_user_usec: of_cpu("user_usec"),
        cpu_system_usec: of_cpu("system_usec"),
        cpu_periods: of_cpu("nr_periods"),
        cpu_throttled_periods: of_cpu("nr_throttled"),
        cpu_throttled_usec: of_cpu("throttled_usec"),
        memory_usage: number("memory.current"),
        memory_limit: number("memory.max"),
        swap_usage: number("memory.swap.current"),
        swap_limit: number("memory.swap.max"),
        memory: keyed(&text("memory.stat")),
        memory_events: keyed(&text("memory.events")),
        io: device_io(&text("io.stat")),
        huge_pages: huge_page_sizes.iter().map(huge_pages).collect(),
        ..Default::default()
    }
}

/// One number, or `max`.
fn single(text: &str) -> u64 {
    match text.trim() {
        "max" => u64::MAX,
        number => number.parse().unwrap_or(0),
    }
}

/// Lines of a name and a number.
pub(crate) fn keyed(text: &str) -> HashMap<String, u64> {
    let pair = |line: &str| {
        let (name, value) = line.split_once(' ')?;
        Some((name.to_owned(), single(value)))
    };
    text.lines().filter_map(pair).collect()
}

/// Lines of a device and its I/O statistics: `8:0 rbytes=1 wbytes=2 rios=3 wios=4 ...`.
fn device_io(text: &str) -> Vec<DeviceIo> {
    let device = |line: &str| {
        let mut words = line.split(' ');
        let (major, minor) = words.next()?.split_once(':')?;
        let values: HashMap<&str, u64> = words
            .filter_map(|word| word.split_once('='))
            .map(|(name, value)| (name, single(value)))
            .collect();
        let of = |name: &str| values.get(name).copied().unwrap_or(0);
        Some(DeviceIo {
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
            read_bytes: of("rbytes"),
            written_bytes: of("wbytes"),
            reads: of("rios"),
            writes: of("wios"),
            ..Default::default()
        })
    };
    text.lines().filter_map(device).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A mock of a control group's file that returns this error.
    struct JoinFile(Option<i32>, bool);

    impl Write for &mut JoinFile {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            match self.0 {
                Some(error) => Err(io::Error::from_raw_os_error(error)),
                None => {
                    self.1 = true;
                    Ok(bytes.len())
                }
            }
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn sets_of_cpus_are_those_that_the_guest_has() {
        let of = |cpus: &str, mems: &str, online: &str, other: Option<&str>| {
            let text = format!(
                r#"{{"cpu": {{"cpus": "{cpus}", "mems": "{mems}", "shares": 9}},
                "unified": {{"cpuset.cpus": "{cpus}", "cpuset.mems": "{mems}", "memory.high": "1"}}}}"#
            );
            let mut resources: LinuxResources = serde_json::from_str(&text).unwrap();
            retain_own_cpus(&mut resources, online, other);
            let files = resources.unified().clone().unwrap();
            let cpu = resources.cpu().clone().unwrap();
            assert!(files.contains_key("memory.high") && cpu.shares() == Some(9));
            assert_eq!(files.get("cpuset.cpus"), cpu.cpus().as_ref());
            assert_eq!(files.get("cpuset.mems"), cpu.mems().as_ref());
            (
                cpu.cpus().clone().unwrap_or_default(),
                cpu.mems().clone().unwrap_or_default(),
            )
        };
        let pair = |cpus: &str, mems: &str| (cpus.to_owned(), mems.to_owned());
        assert_eq!(of("0-1", "0", "0-3\n", None), pair("0-1", "0"));
        assert_eq!(of("2-4", "1", "0-3\n", None), pair("", ""));
        assert_eq!(of("4", "0-1", "0-3\n", Some("0-3")), pair("0-3", ""));
        assert_eq!(of("", "", "0", Some("0")), pair("", ""));
        // A kernel without sets of CPUs.
        assert_eq!(of("0", "0", "", Some("")), pair("", ""));
    }

    #[test]
    fn a_container_with_groups_of_its_own_is_entered_by_that_of_its_first_process() {
        let joined = |own, first| {
            let mut files = [JoinFile(own, false), JoinFile(first, false)];
            let joined = join(files.iter_mut()).map_err(|error| error.raw_os_error());
            (joined, files.map(|file| file.1))
        };
        assert_eq!(joined(None, None), (Ok(()), [true, false]));
        assert_eq!(joined(Some(libc::EBUSY), None), (Ok(()), [false, true]));
        let busy = Err(Some(libc::EBUSY));
        assert_eq!(joined(Some(libc::EBUSY), Some(libc::EBUSY)).0, busy);
        // Other errors do not lead to the next group.
        assert_eq!(
            joined(Some(libc::EIO), None),
            (Err(Some(libc::EIO)), [false, false])
        );
        let of = |text| group_of(text);
        assert_eq!(
            of("0::/koya/c/init\n"),
            Some("/sys/fs/cgroup/koya/c/init".into())
        );
        assert_eq!(of("1:name=systemd:/\n"), None);
    }

    #[test]
    fn groups_within_a_containers_own_are_removed_from_the_innermost() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("a/b/c")).unwrap();
        fs::create_dir_all(dir.path().join("d")).unwrap();
        nested(dir.path()).into_iter().for_each(remove);
        assert!(nested(dir.path()).is_empty() && dir.path().exists());
    }

    #[test]
    fn sizes_of_huge_pages_are_those_that_the_kernel_counts() {
        let dir = tempfile::tempdir().unwrap();
        for name in [
            "hugetlb.2MB.current",
            "hugetlb.1GB.current",
            "hugetlb.2MB.rsvd.current",
            "memory.current",
        ] {
            fs::write(dir.path().join(name), "0").unwrap();
        }
        assert_eq!(huge_page_sizes(dir.path()), ["1GB", "2MB"]);
    }

    #[test]
    fn containers_leave_processes_to_the_agent() {
        assert_eq!(containers_pids([32_768, 30_000].into_iter()), Some(29_488));
        assert_eq!(containers_pids([32_768, 1000].into_iter()), Some(750));
        assert_eq!(containers_pids([0].into_iter()), None);
    }

    /// opencontainers/runc 3509.
    #[test]
    fn a_limit_below_what_is_used_is_refused_if_that_is_asked_for() {
        let check = |memory: &str| {
            let memory: LinuxMemory = serde_json::from_str(memory).unwrap();
            check_memory(&memory, 1000).map_err(|error| format!("{error:#}"))
        };
        let refused = check(r#"{"limit": 1000, "checkBeforeUpdate": true}"#).unwrap_err();
        assert!(
            refused.contains("rejecting memory limit 1000 <= usage 1000"),
            "{refused}"
        );
        let both = r#"{"limit": 10, "swap": 20, "checkBeforeUpdate": true}"#;
        let refused = check(both).unwrap_err();
        assert!(
            refused.contains("rejecting memory+swap limit 20"),
            "{refused}"
        );
        for taken in [
            r#"{"limit": 1000}"#,
            r#"{"limit": 1001, "checkBeforeUpdate": true}"#,
            r#"{"limit": -1, "swap": -1, "checkBeforeUpdate": true}"#,
        ] {
            assert_eq!(check(taken), Ok(()), "{taken}");
        }
    }

    #[test]
    fn a_limit_of_swap_alone_leaves_that_of_memory() {
        let limit = |swap: i64, known: u64| {
            let mut memory = LinuxMemory::default();
            memory.set_swap(Some(swap));
            with_limit(memory, known).limit()
        };
        assert_eq!(limit(2000, 1000), Some(1000));
        assert_eq!(limit(-1, 1000), Some(1000));
        assert_eq!(limit(-1, u64::MAX), Some(-1));
        // Without a memory limit there is none to add.
        assert_eq!(limit(2000, u64::MAX), None);
        assert_eq!(with_limit(LinuxMemory::default(), 1000).limit(), None);
    }

    #[test]
    fn the_kernels_texts_are_read() {
        let text = |name: &str| {
            match name {
                "pids.max" => "max\n",
                "pids.current" => "3\n",
                "cpu.stat" => "usage_usec 70\nuser_usec 50\nsystem_usec 20\n",
                "memory.max" => "1048576\n",
                "memory.events" => "low 0\noom_kill 2\n",
                "hugetlb.2MB.current" => "4194304\n",
                "hugetlb.2MB.events" => "max 3\n",
                "io.stat" => "254:0 rbytes=4096 wbytes=0 rios=1 wios=0 dbytes=0 dios=0\n7:0 \n",
                _ => "",
            }
            .to_owned()
        };
        let stats = parse_stats(&text, &["2MB".into()]);
        let huge = &stats.huge_pages[0];
        assert_eq!((huge.usage, huge.failures), (4 << 20, 3));
        assert_eq!((stats.pids_current, stats.pids_limit), (3, u64::MAX));
        assert_eq!((stats.cpu_usage_usec, stats.cpu_system_usec), (70, 20));
        assert_eq!(stats.memory_limit, 1 << 20);
        assert_eq!(stats.memory_events["oom_kill"], 2);
        assert_eq!((stats.io[0].major, stats.io[0].read_bytes), (254, 4096));
        assert_eq!(stats.io.len(), 2);
    }
}
