//! What a user wants of a container, and the OCI configuration that says so to the guest.

use crate::Error;
use crate::account::{Account, Accounts};
use crate::seccomp::Seccomp;
use koya_protocol::SHARED_DIR;
use koya_vmm::devices::fs::ShareOptions;
use oci_spec::runtime::{self as oci, Spec};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

/// The capabilities that containers have by default: Docker's.
const DEFAULT_CAPABILITIES: &[&str] = &[
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];

pub(crate) const DEFAULT_PATH: &str =
    "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Where a process's standard streams go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Stdio {
    /// Nowhere: /dev/null.
    Null,
    /// Output and error to the host, no input.
    #[default]
    Output,
    /// All three to the host.
    Pipes,
    /// A terminal of this size; zeroes leave it to the guest.
    Terminal {
        /// Lines.
        rows: u16,
        /// Columns.
        columns: u16,
    },
}

/// A user, as numbers or as names of the container's own databases.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct User {
    /// `USER[:GROUP]`, each a name or a number. Empty: root.
    pub text: String,
}

/// A host directory (or file) in the container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// The host's path.
    pub source: PathBuf,
    /// Where it is in the container.
    pub destination: PathBuf,
    /// Whether the container may only read it.
    pub read_only: bool,
    /// Whether what the host mounts and unmounts below it later shows in the container.
    pub follow_mounts: bool,
}

impl Volume {
    /// A volume that the container may write, with the mounts that the host has below it now.
    pub fn new(source: impl Into<PathBuf>, destination: impl Into<PathBuf>) -> Self {
        Self {
            source: source.into(),
            destination: destination.into(),
            read_only: false,
            follow_mounts: false,
        }
    }
}

/// A disk of the sandbox in a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// What the guest's kernel calls it: `vda`.
    pub name: String,
    /// Where it is in the container.
    pub path: PathBuf,
    /// Whether the container may only read it.
    pub read_only: bool,
}

impl Device {
    /// Disk number `disk`, from 0, of [`SandboxConfig::disks`](crate::SandboxConfig::disks), where the
    /// guest itself has it: `/dev/vda` for 0, after `/dev/vdz` `/dev/vdaa`.
    pub fn new(disk: usize, read_only: bool) -> Self {
        let letter = |n: usize| char::from(b'a' + (n % 26) as u8);
        let name = match disk / 26 {
            0 => format!("vd{}", letter(disk)),
            more => format!("vd{}{}", letter(more - 1), letter(disk)),
        };
        Self::named(name, read_only)
    }

    /// The disk that the guest's kernel calls `name`, where the guest itself has it.
    pub(crate) fn named(name: String, read_only: bool) -> Self {
        Self {
            path: Path::new("/dev").join(&name),
            name,
            read_only,
        }
    }
}

/// A process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProcessConfig {
    /// The program and its arguments.
    pub args: Vec<String>,
    /// `NAME=VALUE`; PATH and HOME have defaults.
    pub env: Vec<String>,
    /// The working directory. Default: `/`.
    pub cwd: Option<PathBuf>,
    /// The user. Default: root.
    pub user: User,
    /// Its streams.
    pub stdio: Stdio,
}

/// A container.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ContainerConfig {
    /// Its root: a directory of the host, or a file (or block device) with a file system, erofs or
    /// ext4, which is not written to: what the container writes is kept in the guest's memory.
    pub rootfs: PathBuf,
    /// Its first process.
    pub process: ProcessConfig,
    /// Its host name. Default: its name.
    pub hostname: Option<String>,
    /// Host directories in it.
    pub volumes: Vec<Volume>,
    /// Disks of the sandbox in it.
    pub devices: Vec<Device>,
    /// Empty directories in memory.
    pub tmpfs: Vec<PathBuf>,
    /// Whether its root is read-only.
    pub read_only: bool,
    /// Every capability, every device, no masked paths: root of its guest.
    pub privileged: bool,
    /// Capabilities beyond the default ones, with or without `CAP_`.
    pub capabilities: Vec<String>,
    /// The system calls that it may make.
    pub seccomp: Seccomp,
    /// Whether its programs can't gain privileges by set-user-ID files and the like.
    pub no_new_privileges: bool,
}

impl ContainerConfig {
    /// A container of this root file system and program, with every default.
    pub fn new<S: Into<String>>(
        rootfs: impl Into<PathBuf>,
        args: impl IntoIterator<Item = S>,
    ) -> Self {
        Self {
            rootfs: rootfs.into(),
            process: ProcessConfig {
                args: args.into_iter().map(Into::into).collect(),
                ..ProcessConfig::default()
            },
            ..Self::default()
        }
    }

    fn all_capabilities(&self) -> Result<Vec<String>, Error> {
        if self.privileged {
            return Ok(oci::Capability::iter_all());
        }
        let mut all: Vec<String> = DEFAULT_CAPABILITIES.iter().map(|c| c.to_string()).collect();
        for name in &self.capabilities {
            let name = name.to_uppercase();
            if name == "ALL" {
                return Ok(oci::Capability::iter_all());
            }
            let full = format!("CAP_{}", name.trim_start_matches("CAP_"));
            if !oci::Capability::iter_all().contains(&full) {
                return Err(Error::container(
                    "capability",
                    format!("there is no {full}"),
                ));
            }
            all.push(full);
        }
        Ok(all)
    }
}

/// All names of capabilities, in the OCI's spelling.
trait AllCapabilities {
    fn iter_all() -> Vec<String>;
}

impl AllCapabilities for oci::Capability {
    fn iter_all() -> Vec<String> {
        // Linux 6.12: CAP_CHOWN (0) to CAP_CHECKPOINT_RESTORE (40).
        [
            "CHOWN",
            "DAC_OVERRIDE",
            "DAC_READ_SEARCH",
            "FOWNER",
            "FSETID",
            "KILL",
            "SETGID",
            "SETUID",
            "SETPCAP",
            "LINUX_IMMUTABLE",
            "NET_BIND_SERVICE",
            "NET_BROADCAST",
            "NET_ADMIN",
            "NET_RAW",
            "IPC_LOCK",
            "IPC_OWNER",
            "SYS_MODULE",
            "SYS_RAWIO",
            "SYS_CHROOT",
            "SYS_PTRACE",
            "SYS_PACCT",
            "SYS_ADMIN",
            "SYS_BOOT",
            "SYS_NICE",
            "SYS_RESOURCE",
            "SYS_TIME",
            "SYS_TTY_CONFIG",
            "MKNOD",
            "LEASE",
            "AUDIT_WRITE",
            "AUDIT_CONTROL",
            "SETFCAP",
            "MAC_OVERRIDE",
            "MAC_ADMIN",
            "SYSLOG",
            "WAKE_ALARM",
            "BLOCK_SUSPEND",
            "AUDIT_READ",
            "PERFMON",
            "BPF",
            "CHECKPOINT_RESTORE",
        ]
        .iter()
        .map(|c| format!("CAP_{c}"))
        .collect()
    }
}

/// What a container's root is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Root {
    /// A directory of the host, shared.
    Directory,
    /// A file system in a file or on a block device, which the guest mounts.
    Image,
}

impl Root {
    /// # Errors
    /// If it is neither.
    pub(crate) fn of(path: &Path) -> Result<Self, Error> {
        let wrong = |reason| Error::container("rootfs", format!("{} {reason}", path.display()));
        let kind = path
            .metadata()
            .map_err(|e| wrong(format!("can't be read: {e}")))?;
        let kind = kind.file_type();
        match kind.is_dir() {
            true => Ok(Self::Directory),
            false if kind.is_file() || kind.is_block_device() => Ok(Self::Image),
            false => Err(wrong(
                "is neither a directory nor an image of a file system".into(),
            )),
        }
    }
}

/// What the guest gets of the host's files. The name stands for its place in a configuration until it
/// is shared ([`place_shares`]).
#[derive(Clone, Debug)]
pub(crate) struct Share {
    pub(crate) name: String,
    pub(crate) path: PathBuf,
    pub(crate) options: ShareOptions,
}

/// Where the guest has what is at this path of the shared root.
pub(crate) fn guest_path(path: impl AsRef<Path>) -> PathBuf {
    Path::new(SHARED_DIR).join(path)
}

/// Where the guest has a share, and whether it is to mount it read-only.
pub(crate) struct SharedPlace {
    pub(crate) path: PathBuf,
    pub(crate) read_only: bool,
}

/// Says in a configuration where the guest has each share, by the name that it has in the configuration.
pub(crate) fn place_shares(spec: &mut Spec, places: &HashMap<String, SharedPlace>) {
    let place = |path: &Path| {
        let name = path.strip_prefix(SHARED_DIR).ok()?.to_str()?;
        places.get(name)
    };
    if let Some(root) = spec.root_mut()
        && let Some(place) = place(root.path())
    {
        root.set_path(place.path.clone());
        if place.read_only {
            root.set_readonly(Some(true));
        }
    }
    for mount in spec.mounts_mut().iter_mut().flatten() {
        let Some(place) = mount.source().as_deref().and_then(place) else {
            continue;
        };
        mount.set_source(Some(place.path.clone()));
        let mut options = mount.options().clone().unwrap_or_default();
        if place.read_only
            && !options
                .iter()
                .any(|option| option == "ro" || option == "rro")
        {
            options.retain(|option| option != "rw");
            options.push("ro".into());
            mount.set_options(Some(options));
        }
    }
}

pub(crate) fn root_share(id: &str) -> String {
    format!("{id}.root")
}

fn volume_share(id: &str, index: usize) -> String {
    format!("{id}.volume{index}")
}

/// What must be shared with the guest.
pub(crate) fn shares(id: &str, config: &ContainerConfig) -> Vec<Share> {
    let mut all = Vec::new();
    if config.rootfs.is_dir() {
        all.push(Share {
            name: root_share(id),
            path: config.rootfs.clone(),
            options: ShareOptions {
                read_only: config.read_only,
                follow_mounts: false,
            },
        });
    }
    for (index, volume) in config.volumes.iter().enumerate() {
        all.push(Share {
            name: volume_share(id, index),
            path: volume.source.clone(),
            options: ShareOptions {
                read_only: volume.read_only,
                follow_mounts: volume.follow_mounts,
            },
        });
    }
    all
}

/// The OCI configuration, with paths as the guest has them.
pub(crate) fn build(
    id: &str,
    config: &ContainerConfig,
    accounts: &Accounts,
) -> Result<Spec, Error> {
    let root = match Root::of(&config.rootfs)? {
        Root::Directory => guest_path(root_share(id)),
        Root::Image => koya_protocol::image_root(id).into(),
    };
    let process = process(config, accounts, &config.process)?;
    let privileged = config.privileged;
    let mut devices = vec![json!({"allow": false, "access": "rwm"})];
    let (mut masked, mut read_only) = (MASKED.to_vec(), READ_ONLY.to_vec());
    if privileged {
        devices = vec![json!({"allow": true, "access": "rwm"})];
        masked.clear();
        read_only.clear();
    }
    let spec = json!({
        "ociVersion": "1.2.0",
        "process": process,
        "root": {
            "path": root,
            "readonly": config.read_only,
        },
        "hostname": config.hostname.as_deref().unwrap_or(id),
        "mounts": mounts(id, config)?,
        "linux": {
            "namespaces": [
                {"type": "pid"}, {"type": "mount"}, {"type": "uts"}, {"type": "ipc"},
                {"type": "cgroup"},
            ],
            "resources": {"devices": devices},
            "seccomp": config.seccomp.oci(privileged, &config.all_capabilities()?),
            "maskedPaths": masked,
            "readonlyPaths": read_only,
        },
    });
    serde_json::from_value(spec).map_err(|e| Error::container("configuration", e.to_string()))
}

/// What a container must not see or change of its guest's kernel: the OCI's usual lists.
const MASKED: &[&str] = &[
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
];
const READ_ONLY: &[&str] = &[
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

fn mounts(id: &str, config: &ContainerConfig) -> Result<Vec<Value>, Error> {
    let mount = |destination: &str, kind: &str, source: &str, options: &[&str]| {
        json!({
            "destination": destination, "type": kind, "source": source, "options": options,
        })
    };
    let strict = ["nosuid", "noexec", "nodev"];
    let access = if config.privileged { "rw" } else { "ro" };
    let system = ["nosuid", "noexec", "nodev", access];
    let mut all = vec![
        mount("/proc", "proc", "proc", &strict),
        mount(
            "/dev",
            "tmpfs",
            "tmpfs",
            &["nosuid", "strictatime", "mode=755", "size=65536k"],
        ),
        mount(
            "/dev/pts",
            "devpts",
            "devpts",
            &[
                "nosuid",
                "noexec",
                "newinstance",
                "ptmxmode=0666",
                "mode=0620",
                "gid=5",
            ],
        ),
        mount(
            "/dev/shm",
            "tmpfs",
            "shm",
            &["nosuid", "noexec", "nodev", "mode=1777"],
        ),
        mount("/dev/mqueue", "mqueue", "mqueue", &strict),
        mount("/sys", "sysfs", "sysfs", &system),
        mount("/sys/fs/cgroup", "cgroup", "cgroup", &system),
    ];
    for path in &config.tmpfs {
        let destination = absolute("tmpfs", path)?;
        all.push(mount(
            destination,
            "tmpfs",
            "tmpfs",
            &["nosuid", "nodev", "mode=1777"],
        ));
    }
    for (index, volume) in config.volumes.iter().enumerate() {
        if !volume.source.exists() {
            let reason = format!("{} does not exist", volume.source.display());
            return Err(Error::container("volume", reason));
        }
        let destination = absolute("volume", &volume.destination)?;
        let source = guest_path(volume_share(id, index));
        let source = source.to_string_lossy();
        let access = if volume.read_only { "ro" } else { "rw" };
        all.push(mount(
            destination,
            "bind",
            &source,
            &["rbind", "rprivate", access],
        ));
    }
    Ok(all)
}

fn absolute<'p>(field: &'static str, path: &'p Path) -> Result<&'p str, Error> {
    let text = path.to_str().filter(|_| path.is_absolute());
    text.ok_or_else(|| {
        Error::container(field, format!("{} is not an absolute path", path.display()))
    })
}

/// The OCI process of an exec.
pub(crate) fn exec_process(
    container: &ContainerConfig,
    accounts: &Accounts,
    config: &ProcessConfig,
) -> Result<oci::Process, Error> {
    let value = process(container, accounts, config)?;
    serde_json::from_value(value).map_err(|e| Error::container("process", e.to_string()))
}

fn process(
    container: &ContainerConfig,
    accounts: &Accounts,
    config: &ProcessConfig,
) -> Result<Value, Error> {
    if config.args.first().is_none_or(String::is_empty) {
        return Err(Error::container("command", "no command was given"));
    }
    let account = Account::find(accounts, &config.user.text)?;
    let mut env = config.env.clone();
    let has = |env: &[String], name: &str| env.iter().any(|v| v.starts_with(name));
    if !has(&env, "PATH=") {
        env.push(DEFAULT_PATH.into());
    }
    // Without HOME libcontainer would ask the C library, which would load code of the container's.
    if !has(&env, "HOME=") {
        env.push(format!("HOME={}", account.home));
    }
    let terminal = matches!(config.stdio, Stdio::Terminal { .. });
    if terminal && !has(&env, "TERM=") {
        env.push("TERM=xterm".into());
    }
    let cwd = match &config.cwd {
        Some(path) => absolute("workdir", path)?,
        None => "/",
    };
    let all = container.all_capabilities()?;
    // A user other than root has what programs give it, not what the container may have.
    let effective: &[String] = if account.uid == 0 { &all } else { &[] };
    Ok(json!({
        "terminal": terminal,
        "user": {"uid": account.uid, "gid": account.gid, "additionalGids": account.groups},
        "args": config.args,
        "env": env,
        "cwd": cwd,
        "capabilities": {
            "bounding": all,
            "effective": effective,
            "permitted": effective,
        },
        "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1_048_576, "soft": 1_048_576}],
        "noNewPrivileges": container.no_new_privileges,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::account::tests::rootfs;

    #[test]
    fn the_configuration_names_guest_paths_only() {
        let dir = rootfs();
        let mut config = ContainerConfig::new(dir.path(), ["true"]);
        config.volumes.push(Volume::new(dir.path(), "/data"));
        let mut spec = build("c1", &config, &Accounts::default()).unwrap();
        let text = serde_json::to_string(&spec).unwrap();
        assert!(!text.contains(dir.path().to_str().unwrap()));
        let names = shares("c1", &config).into_iter().map(|share| share.name);
        let places = names.enumerate();
        // The host's own mount of the second is read-only.
        let places = places.map(|(n, name)| {
            let path = format!("/place/{n}").into();
            let read_only = n == 1;
            (name, SharedPlace { path, read_only })
        });
        place_shares(&mut spec, &places.collect());
        let root = spec.root().as_ref().unwrap().path();
        assert_eq!(root, Path::new("/place/0"));
        let mounts = spec.mounts().as_ref().unwrap();
        let source = mounts.last().unwrap().source().as_ref().unwrap();
        assert_eq!(source, Path::new("/place/1"));
        let options = mounts.last().unwrap().options().as_ref().unwrap();
        assert!(options.contains(&"ro".into()) && !options.contains(&"rw".into()));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let dir = rootfs();
        let error = |config: &ContainerConfig| {
            build("c", config, &Accounts::default())
                .unwrap_err()
                .to_string()
        };
        let good = ContainerConfig::new(dir.path(), ["true"]);
        assert!(
            error(&ContainerConfig {
                rootfs: "/nonexistent".into(),
                ..good.clone()
            })
            .starts_with("rootfs: /nonexistent")
        );
        let bad = ContainerConfig {
            capabilities: vec!["fly".into()],
            ..good.clone()
        };
        assert!(error(&bad).contains("CAP_FLY"));
        assert!(error(&ContainerConfig::new(dir.path(), Vec::<String>::new())).contains("command"));
    }
}
