//! Changes of the agent to a container's OCI configuration: values known only in the guest, and workarounds for
//! libcontainer.

use crate::device_rules;
use crate::disks;
use crate::places;
use anyhow::{Context, Result};
use koya_protocol::is_terminal;
use koya_protocol::messages::BlockDevice;
use koya_rootfs::says_read_only;
use oci_spec::runtime::{
    Hook, LinuxDevice, LinuxDeviceBuilder, LinuxDeviceCgroup, LinuxDeviceCgroupBuilder,
    LinuxDeviceType, LinuxIdMapping, LinuxNamespaceType, LinuxResources, LinuxSeccomp,
    LinuxSeccompArg, LinuxSeccompArgBuilder, LinuxSeccompOperator, Mount, Process, Spec,
};
use rustix::fs::{FileType, Gid, Uid, major, minor};
use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Sets the values that the guest determines, whatever the configuration contains.
pub(crate) fn adapt(spec: &mut Spec, id: &str) -> Result<()> {
    if let Some(linux) = spec.linux_mut() {
        linux.set_cgroups_path(Some(PathBuf::from(places::cgroup(id))));
        // A label for the host's security module, without meaning in the guest.
        linux.set_mount_label(None);
        // libcontainer would mask a duplicate path twice.
        let mut masked = linux.masked_paths().clone().unwrap_or_default();
        let mut known = HashSet::new();
        masked.retain(|path| known.insert(path.clone()));
        linux.set_masked_paths(Some(masked));
        if let Some(seccomp) = linux.seccomp_mut() {
            exchange_masks(seccomp)?;
        }
    }
    if let Some(process) = spec.process_mut() {
        process.set_apparmor_profile(None);
        process.set_selinux_label(None);
        // With "false", libcontainer loads the seccomp filter too late.
        if process.no_new_privileges() == Some(false) {
            process.set_no_new_privileges(None);
        }
    }
    Ok(())
}

/// A masked comparison has the mask first and then the expected value. libcontainer exchanges the two: with an expected
/// value of zero, as in the usual rule on the namespaces of clone(2), everything would match.
fn exchange_masks(seccomp: &mut LinuxSeccomp) -> Result<()> {
    let mut syscalls = seccomp.syscalls().clone().unwrap_or_default();
    for syscall in &mut syscalls {
        let args = syscall.args().iter().flatten();
        let args = args.copied().map(exchange_mask);
        let args: Vec<_> = args.collect::<Result<_>>()?;
        if !args.is_empty() {
            syscall.set_args(Some(args));
        }
    }
    seccomp.set_syscalls(Some(syscalls));
    Ok(())
}

fn exchange_mask(arg: LinuxSeccompArg) -> Result<LinuxSeccompArg> {
    if arg.op() != LinuxSeccompOperator::ScmpCmpMaskedEq {
        return Ok(arg);
    }
    let exchanged = LinuxSeccompArgBuilder::default()
        .index(arg.index())
        .op(arg.op())
        .value(arg.value_two().unwrap_or(0))
        .value_two(arg.value())
        .build();
    Ok(exchanged?)
}

/// Whether the container has a pid namespace other than the agent's.
pub(crate) fn has_pids(spec: &Spec) -> bool {
    let linux = spec.linux().as_ref();
    let namespaces = linux.and_then(|linux| linux.namespaces().as_ref());
    let mut namespaces = namespaces.into_iter().flatten();
    namespaces.any(|namespace| namespace.typ() == LinuxNamespaceType::Pid)
}

/// Makes a container join the namespace behind this descriptor of PID 1, if its configuration has a namespace of that kind.
pub(crate) fn join(spec: &mut Spec, kind: LinuxNamespaceType, descriptor: i32) {
    let Some(linux) = spec.linux_mut() else {
        return;
    };
    let mut namespaces = linux.namespaces().clone().unwrap_or_default();
    for namespace in &mut namespaces {
        if namespace.typ() == kind {
            namespace.set_path(Some(format!("/proc/1/fd/{descriptor}").into()));
        }
    }
    linux.set_namespaces(Some(namespaces));
}

/// The configuration for exec processes. libcontainer reads it each time, so it is reduced to the required parts. They are
/// forked in another control group, since the pids limit of the container's own may forbid a fork; the program joins the
/// container's group as its last step, which no limit forbids.
pub(crate) fn for_added(spec: &Spec) -> Spec {
    let mut added = Spec::default();
    added.set_version(spec.version().clone());
    added.set_root(spec.root().clone());
    added.set_hostname(None).set_process(None);
    // An empty list: with mapped users libcontainer rejects a configuration without one.
    added.set_mounts(Some(Vec::new()));
    let mut linux = spec.linux().clone().unwrap_or_default();
    linux.set_cgroups_path(Some(places::ENTRY_CGROUP.into()));
    linux
        .set_resources(None)
        .set_seccomp(None)
        .set_devices(None);
    linux
        .set_sysctl(None)
        .set_masked_paths(None)
        .set_readonly_paths(None);
    added.set_linux(Some(linux));
    added
}

/// Takes limits that would forbid or slow down the creation of a container, which takes several processes and some time:
/// they are set once its process waits for its start, as by runc.
pub(crate) fn take_late_limits(spec: &mut Spec) -> Option<LinuxResources> {
    let resources = spec.linux_mut().as_mut()?.resources_mut().as_mut()?;
    let mut late = LinuxResources::default();
    late.set_cpu(resources.cpu().clone());
    late.set_pids(*resources.pids());
    late.set_unified(resources.unified().clone());
    resources.set_cpu(None).set_pids(None).set_unified(None);
    (late != LinuxResources::default()).then_some(late)
}

/// How a container's users are mapped to the agent's, if they are.
pub(crate) fn mapped_uids(spec: &Spec) -> Option<&Vec<LinuxIdMapping>> {
    spec.linux().as_ref()?.uid_mappings().as_ref()
}

/// UID of a container's user in the agent's user namespace.
pub(crate) fn guest_uid(spec: &Spec, process: &Process) -> u32 {
    mapped(mapped_uids(spec), process.user().uid())
}

/// UID and GID of a container's root in the agent's user namespace.
pub(crate) fn guest_root(spec: &Spec) -> (Uid, Gid) {
    let linux = spec.linux().as_ref();
    let uids = linux.and_then(|linux| linux.uid_mappings().as_ref());
    let gids = linux.and_then(|linux| linux.gid_mappings().as_ref());
    (
        Uid::from_raw(mapped(uids, 0)),
        Gid::from_raw(mapped(gids, 0)),
    )
}

pub(crate) fn mapped(mappings: Option<&Vec<LinuxIdMapping>>, id: u32) -> u32 {
    let find = |mapping: &LinuxIdMapping| {
        let offset = id.checked_sub(mapping.container_id())?;
        (offset < mapping.size()).then(|| mapping.host_id().saturating_add(offset))
    };
    mappings
        .and_then(|all| all.iter().find_map(find))
        .unwrap_or(id)
}

/// Whether a mount is a bind mount: by its type, or, with any type, by an option.
pub(crate) fn is_bind(mount: &Mount) -> bool {
    let mut options = mount.options().iter().flatten();
    mount.typ().as_deref() == Some("bind") || options.any(|o| o == "bind" || o == "rbind")
}

pub(crate) fn is_read_only(mount: &Mount) -> bool {
    says_read_only(mount.options().as_deref().unwrap_or_default())
}

/// Bind-mounts a file of the guest into a container.
pub(crate) fn bind(spec: &mut Spec, source: &Path, destination: &Path) {
    let mut mount = Mount::default();
    mount.set_destination(destination.into());
    mount.set_typ(Some("bind".into()));
    mount.set_source(Some(source.into()));
    mount.set_options(Some(["rbind", "rprivate"].map(String::from).into()));
    let mounts = spec.mounts().clone().unwrap_or_default();
    spec.set_mounts(Some(mounts.into_iter().chain([mount]).collect()));
}

/// Adds a hook that creates the working directory after the container's mounts.
pub(crate) fn make_working_directory(spec: &mut Spec) {
    let (Some(process), Some(root)) = (spec.process(), spec.root()) else {
        return;
    };
    let (uid, gid) = (process.user().uid(), process.user().gid());
    let (root, cwd) = (
        root.path().to_string_lossy(),
        process.cwd().to_string_lossy(),
    );
    let args = [
        root.into_owned(),
        cwd.into_owned(),
        uid.to_string(),
        gid.to_string(),
    ];
    let mut all = vec![places::WORKING_DIRECTORY];
    all.extend(args.iter().map(String::as_str));
    add_hook(spec, &all);
}

/// Adds a hook that runs a helper with these arguments in the container's mount namespace, after the container's mounts and
/// earlier hooks.
pub(crate) fn add_hook(spec: &mut Spec, args: &[&str]) {
    let all = [places::ARGUMENT, places::ARGUMENT].iter().chain(args);
    let mut hook = Hook::default();
    hook.set_path("/proc/self/exe".into());
    hook.set_args(Some(all.map(|&word| word.to_owned()).collect()));
    let mut hooks = spec.hooks().clone().unwrap_or_default();
    let mut list = hooks.create_container().clone().unwrap_or_default();
    list.push(hook);
    hooks.set_create_container(Some(list));
    spec.set_hooks(Some(hooks));
}

/// Changes a container's devices: nodes, and rules.
pub(crate) fn change_devices(
    spec: &mut Spec,
    change: impl FnOnce(&mut Vec<LinuxDevice>, &mut Vec<LinuxDeviceCgroup>),
) -> Result<()> {
    let mut rules = device_rules::of(spec);
    let linux = spec.linux_mut().as_mut();
    let linux = linux.context("no Linux configuration")?;
    let mut nodes = linux.devices().clone().unwrap_or_default();
    change(&mut nodes, &mut rules);
    linux.set_devices(Some(nodes));
    let mut resources = linux.resources().clone().unwrap_or_default();
    resources.set_devices(Some(rules));
    linux.set_resources(Some(resources));
    Ok(())
}

/// Adds a disk of the guest to the configuration, with its device number in the guest.
pub(crate) fn add_disk(spec: &mut Spec, device: &BlockDevice) -> Result<()> {
    let (major, minor) = disks::number(device)?;
    let node = LinuxDeviceBuilder::default()
        .typ(LinuxDeviceType::B)
        .path(&device.path)
        .major(major)
        .minor(minor)
        .file_mode(match device.mode {
            0 => 0o660,
            mode => mode & 0o777,
        })
        .uid(device.uid)
        .gid(device.gid)
        .build()?;
    let rule = LinuxDeviceCgroupBuilder::default()
        .allow(true)
        .typ(LinuxDeviceType::B)
        .major(major)
        .minor(minor)
        .access(if device.read_only { "rm" } else { "rwm" })
        .build()?;
    change_devices(spec, |nodes, rules| {
        nodes.push(node);
        // The last match wins, so a rule that allows everything must stay the last.
        let at = rules.len() - usize::from(rules.last().is_some_and(|r| r.allow()));
        rules.insert(at, rule);
    })
}

/// Adds a device node for every device of the guest, with or without terminals, except at paths where the container has a
/// node already.
pub(crate) fn add_guest_devices(spec: &mut Spec, dev: &Path, has_terminals: bool) -> Result<()> {
    let mut found = Vec::new();
    nodes_in(dev, Path::new("/dev"), &mut found)?;
    found.retain(|node| has_terminals || !is_terminal(node.path()));
    if found
        .iter()
        .any(|node| node.path() == Path::new("/dev/loop-control"))
    {
        add_loop_devices(&mut found)?;
    }
    change_devices(spec, |nodes, _| {
        found.retain(|new| !nodes.iter().any(|node| node.path() == new.path()));
        nodes.append(&mut found);
    })
}

/// Loop devices are created on demand by loop-control, and would then be missing in a container's `/dev`.
fn add_loop_devices(found: &mut Vec<LinuxDevice>) -> Result<()> {
    const MAJOR: i64 = 7;
    for minor in 0..8 {
        let path = PathBuf::from(format!("/dev/loop{minor}"));
        if found.iter().any(|node| *node.path() == path) {
            continue;
        }
        let node = LinuxDeviceBuilder::default()
            .typ(LinuxDeviceType::B)
            .path(path)
            .major(MAJOR)
            .minor(minor)
            .file_mode(0o660_u32)
            .uid(0_u32)
            .gid(0_u32)
            .build()?;
        found.push(node);
    }
    Ok(())
}

/// Names in `/dev` that belong to the container: terminals, and its own mounts.
const OWN: &[&str] = &["console", "mqueue", "ptmx", "pts", "shm"];

fn nodes_in(dir: &Path, at: &Path, found: &mut Vec<LinuxDevice>) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        if OWN.iter().any(|own| *own == name) {
            continue;
        }
        let (path, place) = (entry.path(), at.join(&name));
        // A disk may be removed meanwhile.
        let Ok(data) = path.symlink_metadata() else {
            continue;
        };
        let kind = match FileType::from_raw_mode(data.mode()) {
            FileType::Directory => {
                nodes_in(&path, &place, found)?;
                continue;
            }
            FileType::BlockDevice => LinuxDeviceType::B,
            FileType::CharacterDevice => LinuxDeviceType::C,
            _ => continue,
        };
        let node = LinuxDeviceBuilder::default()
            .typ(kind)
            .path(place)
            .major(i64::from(major(data.rdev())))
            .minor(i64::from(minor(data.rdev())))
            .file_mode(data.mode() & 0o7777)
            .uid(data.uid())
            .gid(data.gid())
            .build()?;
        found.push(node);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(text: &str) -> Spec {
        serde_json::from_str(text).unwrap()
    }

    const SPEC: &str = r#"{"ociVersion": "1.2.0", "hostname": "h", "root": {"path": "/r"},
        "process": {"cwd": "/w", "user": {"uid": 5, "gid": 6}, "args": ["x"], "noNewPrivileges": false,
            "capabilities": {"bounding": ["CAP_KILL"]}},
        "mounts": [{"destination": "/proc", "type": "proc"}],
        "linux": {"namespaces": [{"type": "pid"}, {"type": "uts"}, {"type": "user"}],
            "uidMappings": [{"containerID": 0, "hostID": 1000, "size": 4}, {"containerID": 4, "hostID": 9000, "size": 9}],
            "maskedPaths": ["/x"], "seccomp": {"defaultAction": "SCMP_ACT_ALLOW"}}}"#;

    #[test]
    fn the_agents_words_are_in_the_configuration() {
        let mut spec = spec(SPEC);
        adapt(&mut spec, "c").unwrap();
        join(&mut spec, LinuxNamespaceType::Pid, 7);
        bind(&mut spec, Path::new("/f"), Path::new("/etc/hosts"));
        make_working_directory(&mut spec);
        let all = serde_json::to_value(&spec).unwrap();
        assert_eq!(all["linux"]["cgroupsPath"], "/koya/c");
        assert_eq!(all["linux"]["namespaces"][0]["path"], "/proc/1/fd/7");
        assert!(all["process"]["noNewPrivileges"].is_null());
        assert_eq!(all["mounts"][1]["source"], "/f");
        let args = &all["hooks"]["createContainer"][0]["args"];
        assert_eq!(args[2], places::WORKING_DIRECTORY);
        assert_eq!(
            (&args[3], &args[4], &args[5], &args[6]),
            (&"/r".into(), &"/w".into(), &"5".into(), &"6".into())
        );
        assert_eq!(guest_uid(&spec, spec.process().as_ref().unwrap()), 9001);
    }

    #[test]
    fn limits_that_forbid_the_creation_are_set_after_it() {
        let mut spec = spec(
            r#"{"ociVersion": "1.2.0", "linux": {"resources": {"pids": {"limit": 1}, "cpu": {"quota": 1000},
                "unified": {"pids.max": "1"}, "memory": {"limit": 4096}, "devices": [{"allow": false}]}}}"#,
        );
        let late = take_late_limits(&mut spec).unwrap();
        let late = serde_json::to_value(&late).unwrap();
        assert_eq!(late["pids"]["limit"], 1);
        assert_eq!(late["cpu"]["quota"], 1000);
        assert_eq!(late["unified"]["pids.max"], "1");
        assert!(late["memory"].is_null() && late["devices"].is_null());
        let left = serde_json::to_value(&spec).unwrap();
        let left = &left["linux"]["resources"];
        assert!(left["pids"].is_null() && left["cpu"].is_null() && left["unified"].is_null());
        assert_eq!(left["memory"]["limit"], 4096);
        assert_eq!(left["devices"][0]["allow"], false);
    }

    #[test]
    fn masked_comparisons_are_as_libcontainer_reads_them() {
        let mut spec = spec(
            r#"{"ociVersion": "1.2.0", "linux": {"seccomp": {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [
                {"names": ["clone"], "action": "SCMP_ACT_ALLOW", "args": [
                    {"index": 0, "value": 2114060288, "op": "SCMP_CMP_MASKED_EQ"},
                    {"index": 1, "value": 6, "valueTwo": 4, "op": "SCMP_CMP_MASKED_EQ"},
                    {"index": 2, "value": 7, "op": "SCMP_CMP_EQ"}]},
                {"names": ["read"], "action": "SCMP_ACT_ALLOW"}]}}}"#,
        );
        adapt(&mut spec, "c").unwrap();
        let all = serde_json::to_value(&spec).unwrap();
        let syscalls = &all["linux"]["seccomp"]["syscalls"];
        let value = |index: usize, name: &str| syscalls[0]["args"][index][name].as_u64();
        let both = |index| (value(index, "value"), value(index, "valueTwo"));
        assert_eq!(both(0), (Some(0), Some(2_114_060_288)));
        assert_eq!(both(1), (Some(4), Some(6)));
        assert_eq!(both(2), (Some(7), None));
        assert!(syscalls[1]["args"].is_null());
    }

    #[test]
    fn what_an_added_process_needs_of_its_container_is_kept() {
        let mut whole = spec(SPEC);
        adapt(&mut whole, "c").unwrap();
        let added = serde_json::to_value(for_added(&whole)).unwrap();
        assert_eq!(added["linux"]["cgroupsPath"], places::ENTRY_CGROUP);
        assert_eq!(added["linux"]["namespaces"].as_array().unwrap().len(), 3);
        assert_eq!(added["linux"]["uidMappings"][1]["hostID"], 9000);
        assert_eq!(added["root"]["path"], "/r");
        // A missing list would be an error with mapped users.
        assert_eq!(added["mounts"].as_array().map(Vec::len), Some(0));
        for left_out in [
            "/process",
            "/hostname",
            "/linux/seccomp",
            "/linux/maskedPaths",
        ] {
            assert!(added.pointer(left_out).is_none(), "{left_out}");
        }
    }

    #[test]
    fn a_container_gets_the_nodes_of_the_guests_devices() {
        let mut spec = spec(
            r#"{"ociVersion": "1.2.0", "linux": {"devices": [{"path": "/dev/null", "type": "c",
            "major": 1, "minor": 3, "fileMode": 384}]}}"#,
        );
        // The test machine has these.
        add_guest_devices(&mut spec, Path::new("/dev"), false).unwrap();
        let nodes = spec.linux().as_ref().unwrap().devices().clone().unwrap();
        let at = |path: &str| {
            nodes
                .iter()
                .filter(|node| node.path() == Path::new(path))
                .count()
        };
        assert_eq!(
            (at("/dev/null"), at("/dev/zero"), at("/dev/ptmx")),
            (1, 1, 0)
        );
        let has_loops = Path::new("/dev/loop-control").exists();
        assert!(!has_loops || at("/dev/loop0") == 1 && at("/dev/loop7") == 1);
        assert!(!nodes.iter().any(|node| node.path().starts_with("/dev/pts")));
        assert!(!nodes.iter().any(|node| is_terminal(node.path())));
        let null = nodes
            .iter()
            .find(|node| node.path() == Path::new("/dev/null"))
            .unwrap();
        assert_eq!(null.file_mode(), Some(384));
    }
}
