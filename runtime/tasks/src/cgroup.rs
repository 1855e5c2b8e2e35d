//! The control group of a sandbox on the host (version 2), from `linux.cgroupsPath` of a configuration. The sandbox's
//! process is in it, with limits for the sandbox as a whole: the limits of the container, plus the overhead of a virtual
//! machine, and as many threads as it may need.

use crate::Error;
use anyhow::{Context, anyhow};
use koya::vmm::MAX_CPUS;
use koya::vmm::devices::vsock::muxer::MAX_CONNECTIONS;
use rustix::thread::{CpuSet, sched_setaffinity};
use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

const ROOT: &str = "/sys/fs/cgroup";

/// The slice of a systemd path that names none, as with runc.
const DEFAULT_SLICE: &str = "system.slice";

/// Overhead of a sandbox on the host beyond its guest's memory, in MiB: the monitor, and file data in transit. At rest it
/// takes a few MiB (`docs/devices.md`).
const MONITOR_MIB: u64 = 32;
/// Guest memory per unit of page tables, those of the process and of KVM with pages of 4 KiB: two of 512, and the levels
/// above them.
const TABLES: u64 = 128;
/// Memory for the files that the guest remembers, as a fraction of its memory: a node takes some 400 bytes here, plus an
/// inode and a descriptor in the host kernel, while the guest kernel takes 1 KiB for it.
const NODES: u64 = 4;

/// Threads and processes of a sandbox on the host, at most. A guest determines the number of many of them, by its connections:
/// each of these has a limit of its own.
const TASKS: [(u64, &str); 7] = [
    (MAX_CPUS as u64, "virtual CPUs"),
    (256, "devices, and the sandbox itself"),
    (
        4 * MAX_CONNECTIONS as u64,
        "one for each stream of a process, which is a connection, and up to three for the process",
    ),
    (768, "256 connections to a pod's loopback"),
    (192, "queries to Docker's name server, and its own"),
    (
        768,
        "256 requests of containerd, and the threads that answer them",
    ),
    (1024, "hooks and loggers, and the programs that they start"),
];

/// Directory of a configuration's group. `slice:prefix:name` is the systemd form. As with runc, `..` never leads outside.
///
/// `None` for the root, an empty path, and on a host without control groups of version 2.
pub(crate) fn directory(path: &Path) -> Option<PathBuf> {
    if !Path::new(ROOT).join("cgroup.controllers").exists() {
        return None;
    }
    below(Path::new(ROOT), path)
}

fn below(root: &Path, path: &Path) -> Option<PathBuf> {
    let text = path.to_str()?;
    let path = match text.split(':').collect::<Vec<_>>().as_slice() {
        [slice, prefix, name] => {
            let scope = match prefix.is_empty() {
                true => (*name).to_owned(),
                false => format!("{prefix}-{name}.scope"),
            };
            let slice = match slice.is_empty() {
                true => DEFAULT_SLICE,
                false => *slice,
            };
            slices(slice).join(scope)
        }
        _ => PathBuf::from(text),
    };
    let mut group = root.to_owned();
    for component in path.components() {
        match component {
            Component::Normal(name) => group.push(name),
            Component::ParentDir if group != root => {
                group.pop();
            }
            _ => {}
        }
    }
    (group != root).then_some(group)
}

/// Path of a slice: `a-b.slice` is in `a.slice` (systemd.slice(5)).
fn slices(slice: &str) -> PathBuf {
    let mut path = PathBuf::new();
    let name = slice.strip_suffix(".slice").unwrap_or(slice);
    let mut so_far = String::new();
    for part in name.split('-').filter(|part| !part.is_empty()) {
        if !so_far.is_empty() {
            so_far.push('-');
        }
        so_far += part;
        path.push(format!("{so_far}.slice"));
    }
    path
}

/// Whether this process is in the group, so that its limits are the sandbox's. It may not be, without root or if another
/// process moved it.
pub(crate) fn is_ours(group: &Path) -> bool {
    let groups = fs::read_to_string("/proc/self/cgroup");
    groups.is_ok_and(|groups| is_in(&groups, group))
}

/// The same, from the contents of `/proc/PID/cgroup` (cgroups(7)).
fn is_in(groups: &str, group: &Path) -> bool {
    let path = groups.lines().find_map(|line| line.strip_prefix("0::/"));
    path.is_some_and(|path| Path::new(ROOT).join(path) == group)
}

/// Checks that an existing group is free for a sandbox: in a frozen group the process would not run, and in one with other
/// processes it would share their limits.
///
/// # Errors
/// The error in runc's wording.
pub fn check_unused(group: &Path) -> Result<(), Error> {
    let events = fs::read_to_string(group.join("cgroup.events")).unwrap_or_default();
    let freeze = fs::read_to_string(group.join("cgroup.freeze")).unwrap_or_default();
    match why_used(&events, &freeze) {
        Some(why) => Err(anyhow!("container's cgroup {why}: {}", group.display()).into()),
        None => Ok(()),
    }
}

/// The reason from the contents of its files (Linux, admin-guide/cgroup-v2).
fn why_used(events: &str, freeze: &str) -> Option<&'static str> {
    let holds = |line: &str| events.lines().any(|known| known == line);
    if holds("populated 1") {
        return Some("is not empty");
    }
    (holds("frozen 1") || freeze.trim() == "1").then_some("unexpectedly frozen")
}

/// Moves this process with all of its threads into the group, which is created if missing.
///
/// # Errors
/// The error from the host.
pub fn enter(group: &Path) -> io::Result<()> {
    make(group)?;
    fs::write(group.join("cgroup.procs"), std::process::id().to_string())
}

/// Allows the calling thread, and those that it starts, to use all CPUs of its control group. An affinity of the parent is
/// not inherited, as with runc: the containers of an engine with restricted CPUs (`CPUAffinity=` of its service) are not
/// restricted.
pub fn have_all_cpus() {
    let mut all = CpuSet::new();
    for cpu in 0..CpuSet::MAX_CPU {
        all.set(cpu);
    }
    if let Err(error) = sched_setaffinity(None, &all) {
        log::debug!("the CPUs of the caller stay: {error}");
    }
}

/// Creates the group with all controllers of its parent groups, like runc.
fn make(group: &Path) -> io::Result<()> {
    let Ok(below) = group.strip_prefix(ROOT) else {
        return Ok(());
    };
    let mut at = PathBuf::from(ROOT);
    for name in below {
        let controllers = fs::read_to_string(at.join("cgroup.controllers")).unwrap_or_default();
        for controller in controllers.split_whitespace() {
            // A group that contains processes can't enable controllers for children.
            fs::write(at.join("cgroup.subtree_control"), format!("+{controller}")).ok();
        }
        at.push(name);
        match fs::create_dir(&at) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// The memory limits of a sandbox whose guest has this much memory, not counting its kernel's part: files and values. A
/// guest is not swapped out: it has all of its memory, or is made smaller.
pub(crate) fn memory(mib: u64, kernel_mib: u64) -> [(&'static str, String); 2] {
    let guest = mib.saturating_add(kernel_mib);
    let (tables, nodes) = (guest.div_ceil(TABLES), guest / NODES);
    log::info!(
        "memory in MiB: {mib} for the guest, {kernel_mib} for its kernel, {tables} for page tables, \
         {MONITOR_MIB} for the monitor, up to {nodes} for inodes of shared files"
    );
    let all = [tables, MONITOR_MIB, nodes].into_iter();
    let all = all.fold(guest, u64::saturating_add);
    // A configuration may say any number.
    let bytes = all.saturating_mul(1 << 20);
    [
        ("memory.max", bytes.to_string()),
        ("memory.swap.max", "0".to_owned()),
    ]
}

/// The limit of threads and processes, for the sandbox as a whole. That of a container applies in the guest.
fn tasks() -> (&'static str, String) {
    let all: u64 = TASKS.iter().map(|(most, _)| most).sum();
    ("pids.max", all.to_string())
}

/// Sets the limits from [`memory`] and [`tasks`] if the group is this process's. Otherwise the guest's own limits apply.
pub(crate) fn bound(group: &Path, mib: u64, kernel_mib: u64) {
    if !is_ours(group) {
        log::debug!("no limits: {} is not ours", group.display());
        return;
    }
    for (file, value) in memory(mib, kernel_mib).into_iter().chain([tasks()]) {
        if !group.join(file).exists() {
            log::debug!("{} has no {file}", group.display());
        } else if let Err(error) = set(group, file, &value) {
            // The guest has limits of its own.
            log::warn!("{error:#}");
        }
    }
}

/// Sets a limit: writes a file of the group.
///
/// # Errors
/// The error from the kernel, with the file and the value.
pub(crate) fn set(group: &Path, file: &str, value: &str) -> anyhow::Result<()> {
    let limit = || format!("{}/{file}: {value}", group.display());
    fs::write(group.join(file), value).with_context(limit)?;
    log::info!("{}", limit());
    Ok(())
}

/// Moves this process out of the group, so that the group can be removed.
pub fn leave(group: &Path) {
    let root = Path::new(ROOT).join("cgroup.procs");
    if let Err(error) = fs::write(root, std::process::id().to_string()) {
        log::debug!("cannot leave {}: {error}", group.display());
    }
    remove(group);
}

/// Removes the group, once it is empty.
pub fn remove(group: &Path) {
    if let Err(error) = fs::remove_dir(group) {
        log::debug!("{}: {error}", group.display());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_that_are_frozen_or_not_empty_are_told() {
        let said = |events: &str, freeze: &str| why_used(events, freeze);
        assert_eq!(said("populated 0\nfrozen 0\n", "0\n"), None);
        // The files are missing, or have no such line.
        assert_eq!(said("", ""), None);
        assert_eq!(said("populated 1\nfrozen 0\n", "0\n"), Some("is not empty"));
        let frozen = Some("unexpectedly frozen");
        assert_eq!(said("populated 0\nfrozen 1\n", "0\n"), frozen);
        assert_eq!(said("populated 0\nfrozen 0\n", "1\n"), frozen);
    }

    #[test]
    fn a_bound_parent_has_sandboxes_that_are_not() {
        use rustix::thread::sched_getaffinity;
        let all = sched_getaffinity(None).unwrap();
        let first = (0..CpuSet::MAX_CPU).find(|cpu| all.is_set(*cpu)).unwrap();
        let mut one = CpuSet::new();
        one.set(first);
        let thread = std::thread::spawn(move || {
            sched_setaffinity(None, &one).unwrap();
            have_all_cpus();
            let own = std::thread::spawn(|| sched_getaffinity(None).unwrap());
            own.join().unwrap()
        });
        let own = thread.join().unwrap();
        for cpu in (0..CpuSet::MAX_CPU).filter(|cpu| all.is_set(*cpu)) {
            assert!(own.is_set(cpu), "{cpu}");
        }
    }

    #[test]
    fn groups_are_found_by_both_ways_of_naming_them() {
        let at = |path: &str| below(Path::new("/c"), Path::new(path));
        assert_eq!(at("/default/foo"), Some("/c/default/foo".into()));
        assert_eq!(
            at("kubepods-pod1.slice:cri-containerd:abc"),
            Some("/c/kubepods.slice/kubepods-pod1.slice/cri-containerd-abc.scope".into())
        );
        assert_eq!(at(":koya:a"), Some("/c/system.slice/koya-a.scope".into()));
        for cleaned in [
            "/../etc",
            "../../etc",
            "/a/b/../../etc",
            "/./etc/",
            "a/../../etc",
        ] {
            assert_eq!(at(cleaned), Some("/c/etc".into()), "{cleaned}");
        }
        for root in ["/", "", ".", "/..", "a/.."] {
            assert_eq!(at(root), None, "{root}");
        }
    }

    #[test]
    fn memory_is_the_containers_and_the_virtual_machines() {
        let [max, swap] = memory(280, 20);
        assert_eq!(max, ("memory.max", ((300 + 3 + 32 + 75) << 20).to_string()));
        assert_eq!(swap, ("memory.swap.max", "0".to_owned()));
        for huge in [(u64::MAX, 20), (20, u64::MAX), (1 << 44, 0)] {
            let [max, _] = memory(huge.0, huge.1);
            assert_eq!(max.1, u64::MAX.to_string(), "{huge:?}");
        }
    }

    #[test]
    fn a_sandbox_has_threads_for_all_that_is_limited_elsewhere() {
        let (file, most) = tasks();
        assert_eq!(file, "pids.max");
        let most: u64 = most.parse().unwrap();
        // Every connection that a guest may have, and the CPUs of the largest one.
        assert!(most > MAX_CONNECTIONS as u64 + u64::from(MAX_CPUS));
        // A quarter of the process IDs of a host that has not raised their number (32,768) is left.
        assert!(most <= 3 << 13, "{most}");
        assert!(
            TASKS
                .iter()
                .all(|(most, what)| *most > 0 && !what.is_empty())
        );
    }

    #[test]
    fn a_group_is_ours_if_this_process_is_in_it() {
        let is_in = |groups: &str| super::is_in(groups, Path::new("/sys/fs/cgroup/kubepods/a"));
        assert!(is_in("0::/kubepods/a\n"));
        assert!(is_in("1:name=systemd:/x\n0::/kubepods/a\n"));
        for other in [
            "0::/\n",
            "0::/kubepods\n",
            "0::/kubepods/a/b\n",
            "4:memory:/kubepods/a\n",
            "",
        ] {
            assert!(!is_in(other), "{other}");
        }
    }
}
