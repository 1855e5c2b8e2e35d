//! A container from an OCI configuration that was written for the host: what of it is the guest's,
//! what must be shared with the guest, and what can't be had.
//!
//! Follows the OCI runtime specification 1.2. Paths of the host's become shares; namespaces that are
//! the sandbox's own (network, and those given by path) are the guest's; limits that only the host can
//! set are left out; what the guest can't do is refused by name.

use crate::Error;
use crate::account::{Account, Accounts};
use crate::direct_volume::{self, DirectVolume};
use crate::ephemeral;
use crate::spec::{DEFAULT_PATH, Share, guest_path, root_share};
use koya_protocol::messages::EphemeralVolume;
use koya_protocol::{SHARED_MEMORY_DIR, VOLUMES_DIR};
use koya_vmm::devices::fs::ShareOptions;
use oci_spec::runtime::{self as oci, LinuxDeviceType, LinuxNamespaceType, Mount, Spec};
use rustix::fs::FileType;
use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

/// A container's configuration and files, as an OCI runtime gets them.
#[derive(Clone, Debug)]
pub struct Bundle {
    /// `config.json`.
    pub spec: Spec,
    /// The folder that relative paths in it start from.
    pub folder: PathBuf,
    /// Its root file system, mounted: a directory.
    pub rootfs: PathBuf,
    /// Where its processes are, if its configuration names a pid namespace by path.
    pub pids: SharedPids,
}

/// What a pid namespace that is given by its path means: paths are the host's, processes the guest's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum SharedPids {
    /// Nothing that is known: it is refused.
    #[default]
    Unknown,
    /// The one that the sandbox's containers share.
    Sandbox,
    /// That of another container.
    Container(String),
}

/// What a container in the guest is made of.
pub(crate) struct Adapted {
    pub(crate) spec: Spec,
    pub(crate) shares: Vec<Share>,
    pub(crate) volumes: Vec<EphemeralVolume>,
    /// Block devices of the host's that it is to have.
    pub(crate) disks: Vec<HostDisk>,
    /// Those whose file systems the guest is to mount, by the numbers of their mounts.
    pub(crate) direct: Vec<(u32, DirectVolume)>,
    /// Where mounts go, each with whether that is a file; and the working directory.
    pub(crate) mount_points: Vec<(PathBuf, bool)>,
}

/// A block device of the host's, and where a container has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HostDisk {
    /// Major and minor.
    pub(crate) number: (i64, i64),
    pub(crate) path: PathBuf,
    pub(crate) read_only: bool,
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

impl HostDisk {
    fn of<'a>(
        device: &oci::LinuxDevice,
        rules: impl Iterator<Item = &'a oci::LinuxDeviceCgroup>,
    ) -> Self {
        let number = (device.major(), device.minor());
        Self {
            number,
            path: device.path().clone(),
            read_only: !may_write(rules, number),
            mode: device.file_mode().unwrap_or(0),
            uid: device.uid().unwrap_or(0),
            gid: device.gid().unwrap_or(0),
        }
    }

    /// Whether the host has a node of the same disk at the same path, as when all of the host's were listed. A
    /// disk may have several nodes.
    fn is_listing(&self) -> bool {
        let is_its_name = self.host().is_ok_and(|host| host == self.path);
        is_its_name || block_number(&self.path) == Some(self.number)
    }

    /// Where it is on the host: as its kernel names it.
    pub(crate) fn host(&self) -> io::Result<PathBuf> {
        let (major, minor) = self.number;
        let about = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/uevent"))?;
        let name = about.lines().find_map(|line| line.strip_prefix("DEVNAME="));
        let name = name.ok_or_else(|| io::Error::other("it has no name"))?;
        Ok(Path::new("/dev").join(name))
    }
}

/// Major and minor of the block device at a path of the host's, if there is one.
fn block_number(path: &Path) -> Option<(i64, i64)> {
    let found = rustix::fs::stat(path).ok()?;
    let is_block = FileType::from_raw_mode(found.st_mode) == FileType::BlockDevice;
    let (major, minor) = (
        rustix::fs::major(found.st_rdev),
        rustix::fs::minor(found.st_rdev),
    );
    is_block.then_some((major.into(), minor.into()))
}

/// What a mount of the guest's needs.
enum Needs {
    Nothing,
    Share(Share),
    Volume(EphemeralVolume),
    Direct(DirectVolume),
}

/// Character devices that every guest has, by number: memory, terminals, FUSE, TUN.
const GUEST_DEVICES: &[(i64, i64)] = &[
    (1, 3),
    (1, 5),
    (1, 7),
    (1, 8),
    (1, 9),
    (1, 11),
    (5, 0),
    (5, 2),
    (10, 200),
    (10, 229),
];

/// File systems that a guest mounts by itself.
const GUEST_MOUNTS: &[&str] = &[
    "proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2",
];

fn refuse(field: &'static str, reason: impl Into<String>) -> Error {
    Error::container(field, reason)
}

/// The guest's side of a container's configuration.
///
/// # Errors
/// What can't be had, by name.
pub(crate) fn adapt(id: &str, bundle: &Bundle, accounts: &Accounts) -> Result<Adapted, Error> {
    let mut spec = bundle.spec.clone();
    refuse_what_cannot_be_had(&spec)?;
    let root_read_only = spec
        .root()
        .as_ref()
        .and_then(oci::Root::readonly)
        .unwrap_or(false);
    let mut shares = vec![Share {
        name: root_share(id),
        path: bundle.rootfs.clone(),
        options: ShareOptions {
            read_only: root_read_only,
            follow_mounts: false,
        },
    }];
    let mut root = oci::Root::default();
    root.set_path(guest_path(&shares[0].name));
    root.set_readonly(Some(root_read_only));
    spec.set_root(Some(root));
    spec.set_hooks(None);

    let shared_ipc = shares_namespace(&spec, LinuxNamespaceType::Ipc);
    let mut mount_points = Vec::new();
    let mut mounts = Vec::new();
    let (mut volumes, mut direct) = (Vec::new(), Vec::new());
    for (number, mount) in spec.mounts().iter().flatten().enumerate() {
        let (mount, needs) = adapt_mount(id, number, bundle, mount, shared_ipc)?;
        let source = match &needs {
            Needs::Share(share) => Some(&share.path),
            _ => mount.source().as_ref(),
        };
        let is_file = source.is_some_and(|path| path.is_file());
        mount_points.push((mount.destination().clone(), is_file));
        mounts.push(mount);
        match needs {
            Needs::Nothing => {}
            Needs::Share(share) => shares.push(share),
            Needs::Volume(volume) => volumes.push(volume),
            Needs::Direct(volume) => direct.push((number as u32, volume)),
        }
    }
    if namespaces(&spec).any(|n| n.typ() == LinuxNamespaceType::User) {
        mounts.iter_mut().for_each(bind_sysfs);
    }
    spec.set_mounts(Some(mounts));
    let mut disks = Vec::new();
    if let Some(linux) = spec.linux_mut() {
        disks = adapt_linux(linux, &bundle.pids)?;
    }
    if let Some(process) = spec.process_mut() {
        mount_points.push((process.cwd().clone(), false));
        adapt_process(process, accounts)?;
    }
    Ok(Adapted {
        spec,
        shares,
        volumes,
        disks,
        direct,
        mount_points,
    })
}

/// The size of the file system in memory that a path is on, in bytes; none if it is on another.
fn memory_behind(path: &Path) -> Option<u64> {
    let found = rustix::fs::statfs(path).ok()?;
    // Kubernetes and others mount it there themselves; a folder of the host's in memory is a folder.
    let is_its_root =
        rustix::fs::stat(path).ok()?.st_dev != rustix::fs::stat(path.parent()?).ok()?.st_dev;
    (ephemeral::is_in_memory(&found) && is_its_root).then(|| found.f_blocks * found.f_bsize as u64)
}

/// Whether a namespace is one that exists, and not the container's own.
fn is_shared(namespace: &oci::LinuxNamespace) -> bool {
    let path = namespace.path().as_ref();
    path.is_some_and(|path| !path.as_os_str().is_empty())
}

fn namespaces(spec: &Spec) -> impl Iterator<Item = &oci::LinuxNamespace> {
    let linux = spec.linux().as_ref();
    let all = linux.and_then(|linux| linux.namespaces().as_ref());
    all.into_iter().flatten()
}

fn shares_namespace(spec: &Spec, kind: LinuxNamespaceType) -> bool {
    namespaces(spec).any(|n| n.typ() == kind && is_shared(n))
}

fn refuse_what_cannot_be_had(spec: &Spec) -> Result<(), Error> {
    if spec.process().is_none() {
        return Err(refuse("process", "there is none"));
    }
    if let Some(hooks) = spec.hooks() {
        let lists = [
            ("prestart", hooks.prestart()),
            ("createRuntime", hooks.create_runtime()),
            ("createContainer", hooks.create_container()),
            ("startContainer", hooks.start_container()),
            ("poststart", hooks.poststart()),
            ("poststop", hooks.poststop()),
        ];
        for (name, list) in lists {
            if list.as_ref().is_some_and(|list| !list.is_empty()) {
                return Err(refuse("hooks", format!("{name} hooks are not supported")));
            }
        }
    }
    let linux = spec.linux().as_ref();
    if linux.is_some_and(|linux| linux.intel_rdt().is_some()) {
        return Err(refuse("linux.intelRdt", "a guest has no such control"));
    }
    let needed = [
        (LinuxNamespaceType::Network, "network"),
        // Without one it would be in the agent's.
        (LinuxNamespaceType::Mount, "mount"),
    ];
    for (kind, name) in needed {
        if !namespaces(spec).any(|n| n.typ() == kind) {
            let reason = format!(
                "the host's {name} namespace can't be a guest's: give the container one of its own"
            );
            return Err(refuse("linux.namespaces", reason));
        }
    }
    Ok(())
}

/// sysfs may be mounted anew only by who owns the network namespace, which is the guest's: users of another
/// namespace get the guest's.
fn bind_sysfs(mount: &mut Mount) {
    if mount.typ().as_deref() == Some("sysfs") {
        mount.set_typ(Some("bind".into()));
        mount.set_source(Some("/sys".into()));
        let options = mount.options().clone().unwrap_or_default();
        let rbind = ["rbind".to_owned()].into_iter();
        mount.set_options(Some(rbind.chain(options).collect()));
    }
}

/// A mount as the guest makes it, and what must be shared for it.
fn adapt_mount(
    id: &str,
    number: usize,
    bundle: &Bundle,
    mount: &Mount,
    shared_ipc: bool,
) -> Result<(Mount, Needs), Error> {
    let destination = mount.destination().display();
    if mount.uid_mappings().is_some() || mount.gid_mappings().is_some() {
        let reason = format!("{destination}: mounts with mapped users are not supported");
        return Err(refuse("mounts", reason));
    }
    let kind = mount.typ().as_deref().unwrap_or_default();
    let has = |name: &str| {
        mount
            .options()
            .iter()
            .flatten()
            .any(|option| option == name)
    };
    if kind != "bind" && kind != "rbind" && !has("bind") && !has("rbind") {
        if GUEST_MOUNTS.contains(&kind) {
            return Ok((mount.clone(), Needs::Nothing));
        }
        let reason = format!("{destination}: the guest mounts no {kind:?} by itself");
        return Err(refuse("mounts", reason));
    }
    let source = mount.source().clone();
    let source = source.ok_or_else(|| refuse("mounts", format!("{destination}: no source")))?;
    let source = bundle.folder.join(source);
    let mut adapted = mount.clone();
    // Memory that processes share is the guest's: the sandbox's, where containers share ipc.
    if mount.destination() == Path::new("/dev/shm")
        && let Some(bytes) = memory_behind(&source)
    {
        if shared_ipc {
            adapted.set_source(Some(SHARED_MEMORY_DIR.into()));
            return Ok((adapted, Needs::Nothing));
        }
        adapted.set_typ(Some("tmpfs".into()));
        adapted.set_source(Some("shm".into()));
        let options = ["nosuid", "noexec", "nodev", "mode=1777"].map(String::from);
        let size = format!("size={bytes}");
        adapted.set_options(Some(options.into_iter().chain([size]).collect()));
        return Ok((adapted, Needs::Nothing));
    }
    for option in ["shared", "rshared"] {
        if has(option) {
            let reason =
                format!("{destination}: mounts of a guest can't reach the host ({option})");
            return Err(refuse("mounts", reason));
        }
    }
    // What the host's kernel makes up, the guest's does too.
    if ["/proc", "/sys"].iter().any(|dir| source.starts_with(dir)) {
        return Ok((adapted, Needs::Nothing));
    }
    // Where the guest has what it mounts itself.
    let own = Path::new(VOLUMES_DIR).join(id).join(number.to_string());
    if let Some(volume) = direct_volume::find(&source)? {
        adapted.set_source(Some(own));
        return Ok((adapted, Needs::Direct(volume)));
    }
    if let Some(volume) = ephemeral::behind(&source, number as u32) {
        adapted.set_source(Some(own));
        return Ok((adapted, Needs::Volume(volume)));
    }
    let wrong = |why: String| refuse("mounts", format!("{}: {why}", source.display()));
    let found = source
        .metadata()
        .map_err(|error| wrong(error.to_string()))?;
    if !found.is_dir() && !found.is_file() {
        let what = match found.file_type() {
            kind if kind.is_socket() => "a socket of the host's can't be used in a guest",
            kind if kind.is_fifo() => "a FIFO of the host's can't be used in a guest",
            _ => "a device of the host's can't be bound into a guest",
        };
        return Err(wrong(what.into()));
    }
    let share = Share {
        name: format!("{id}.mount{number}"),
        path: source,
        options: ShareOptions {
            read_only: has("ro") || has("rro"),
            follow_mounts: has("slave") || has("rslave"),
        },
    };
    adapted.set_source(Some(guest_path(&share.name)));
    Ok((adapted, Needs::Share(share)))
}

/// The disks that it asks for.
fn adapt_linux(linux: &mut oci::Linux, pids: &SharedPids) -> Result<Vec<HostDisk>, Error> {
    let mut namespaces = Vec::new();
    for namespace in linux.namespaces().iter().flatten() {
        // The sandbox's own, which all of its containers share; and a clock is a guest's anyway.
        if matches!(
            namespace.typ(),
            LinuxNamespaceType::Network | LinuxNamespaceType::Time
        ) {
            continue;
        }
        // What containers share by a path of the host's is the guest's own, which its first process has.
        let mut own = namespace.clone();
        own.set_path(match (is_shared(namespace), namespace.typ()) {
            (false, _) => None,
            (true, LinuxNamespaceType::Ipc) => Some("/proc/1/ns/ipc".into()),
            (true, LinuxNamespaceType::Uts) => Some("/proc/1/ns/uts".into()),
            // The agent knows its path.
            (true, LinuxNamespaceType::Pid) if *pids != SharedPids::Unknown => None,
            (true, other) => {
                let reason = format!("containers can't share this {other} namespace");
                return Err(refuse("linux.namespaces", reason));
            }
        });
        namespaces.push(own);
    }
    linux.set_namespaces(Some(namespaces));
    let propagation = linux.rootfs_propagation().as_deref().map(root_propagation);
    linux.set_rootfs_propagation(propagation.transpose()?);

    let all_allowed = linux.resources().as_ref().is_some_and(|resources| {
        let rules = resources.devices().iter().flatten();
        let all = |r: &oci::LinuxDeviceCgroup| {
            let every_access = r.access().as_ref().is_none_or(|access| access.len() == 3);
            let every_kind = matches!(r.typ(), None | Some(LinuxDeviceType::A));
            r.allow() && r.major().is_none() && r.minor().is_none() && every_access && every_kind
        };
        rules.into_iter().any(all)
    });
    let mut devices = Vec::new();
    let mut disks = Vec::new();
    for device in linux.devices().iter().flatten() {
        let number = (device.major(), device.minor());
        let is_pipe = matches!(device.typ(), LinuxDeviceType::P);
        let rules = linux
            .resources()
            .as_ref()
            .and_then(|r| r.devices().as_ref());
        let disk = matches!(device.typ(), LinuxDeviceType::B)
            .then(|| HostDisk::of(device, rules.into_iter().flatten()));
        // Privileged containers get all nodes of the host's, each by its path there; a volume has a path that
        // is not the host's node of the same disk.
        let is_volume = |disk: &HostDisk| !all_allowed || !disk.is_listing();
        let is_character = matches!(device.typ(), LinuxDeviceType::C | LinuxDeviceType::U);
        if is_pipe || is_character && GUEST_DEVICES.contains(&number) {
            devices.push(device.clone());
        } else if let Some(disk) = disk.filter(is_volume) {
            disks.push(disk);
        } else if all_allowed {
            log::debug!(
                "{} is a device of the host's alone",
                device.path().display()
            );
        } else {
            let path = device.path().display();
            let reason = format!("{path} is a device of the host, which a guest does not have");
            return Err(refuse("linux.devices", reason));
        }
    }
    linux.set_devices(Some(devices));
    if let Some(resources) = linux.resources_mut() {
        only_the_guests(resources);
        // The host's numbers are others' in the guest.
        let rules = resources.devices().clone().unwrap_or_default();
        let is_disk = |rule: &oci::LinuxDeviceCgroup| {
            let kind = matches!(
                rule.typ(),
                None | Some(LinuxDeviceType::A | LinuxDeviceType::B)
            );
            kind && rule.major().is_some_and(|major| major >= 0)
        };
        let rules = rules.into_iter().filter(|rule| !is_disk(rule)).collect();
        resources.set_devices(Some(rules));
    }
    Ok(disks)
}

/// How mounts propagate to and from a container's root, without what runc and the kubelet put before it
/// ("rslave"): it is recursive anyway.
fn root_propagation(wanted: &str) -> Result<String, Error> {
    let plain = wanted.strip_prefix('r').unwrap_or(wanted);
    match ["shared", "slave", "private", "unbindable"].contains(&plain) {
        true => Ok(plain.into()),
        false => Err(refuse(
            "linux.rootfsPropagation",
            format!("{wanted:?} is not supported"),
        )),
    }
}

/// Whether these rules let a block device be written: the last that fits counts.
fn may_write<'a>(
    rules: impl Iterator<Item = &'a oci::LinuxDeviceCgroup>,
    number: (i64, i64),
) -> bool {
    let fits = |rule: &&oci::LinuxDeviceCgroup| {
        let kind = matches!(
            rule.typ(),
            None | Some(LinuxDeviceType::A | LinuxDeviceType::B)
        );
        let is = |own: Option<i64>, wanted| own.is_none_or(|own| own < 0 || own == wanted);
        let writes = rule
            .access()
            .as_ref()
            .is_none_or(|access| access.contains('w'));
        kind && writes && is(rule.major(), number.0) && is(rule.minor(), number.1)
    };
    rules.filter(fits).last().is_some_and(|rule| rule.allow())
}

/// Leaves what a guest's control groups can do. Its CPUs are not the host's, nor its disks and huge
/// pages.
pub(crate) fn only_the_guests(resources: &mut oci::LinuxResources) {
    resources.set_block_io(None);
    resources.set_network(None);
    resources.set_rdma(None);
    resources.set_hugepage_limits(None);
    if let Some(cpu) = resources.cpu() {
        let mut cpu = *Box::new(cpu.clone());
        cpu.set_cpus(None);
        cpu.set_mems(None);
        cpu.set_realtime_period(None);
        cpu.set_realtime_runtime(None);
        resources.set_cpu(Some(cpu));
    }
}

/// What a process has beyond what is said, and what is not the guest's of it.
///
/// # Errors
/// A process without a program.
pub(crate) fn adapt_process(process: &mut oci::Process, accounts: &Accounts) -> Result<(), Error> {
    if process
        .args()
        .iter()
        .flatten()
        .next()
        .is_none_or(String::is_empty)
    {
        return Err(refuse("process.args", "no command was given"));
    }
    let mut env = process.env().clone().unwrap_or_default();
    let has = |env: &[String], name: &str| env.iter().any(|v| v.starts_with(name));
    if !has(&env, "PATH=") {
        env.push(DEFAULT_PATH.into());
    }
    // Without HOME libcontainer would ask the C library, which would load code of the container's.
    if !has(&env, "HOME=") {
        let user = process.user().uid().to_string();
        let home = Account::find(accounts, &user).map_or("/".into(), |account| account.home);
        env.push(format!("HOME={home}"));
    }
    process.set_env(Some(env));
    process.set_exec_cpu_affinity(None);
    // Labels for the host's security modules, which a guest does not have.
    process.set_apparmor_profile(None);
    process.set_selinux_label(None);
    Ok(())
}

#[cfg(test)]
mod tests;
