//! The configuration of a container, which [`crate::oci`] converts to an OCI configuration.

use crate::block_volume::BlockVolume;
use crate::seccomp::Seccomp;
use koya_vmm::host::walls::landlock::Place;
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

/// Connection of a process's standard streams.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Stdio {
    /// Connected to /dev/null.
    Null,
    /// Output and error are connected to the host; no input.
    #[default]
    Output,
    /// All three are connected to the host.
    Pipes,
    /// A terminal of this size; zeroes leave it to the guest.
    Terminal {
        /// Lines.
        rows: u16,
        /// Columns.
        columns: u16,
        /// Whether to output newlines unchanged. By default a terminal outputs CR LF (ONLCR in termios(3)).
        keep_newlines: bool,
    },
}

/// Direction of a stream, from the point of view of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// A pipe that it reads.
    Input,
    /// A pipe that it writes to.
    Output,
    /// A socket.
    Both,
}

/// A descriptor of a process beyond the standard streams.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExtraFd {
    /// A stream to the calling process.
    Stream(Direction),
    /// A device of the guest (`/dev/null`), opened in that direction.
    Device(&'static str, Direction),
    /// A listening socket of the guest. [`GuestListener`](crate::GuestListener) connects to it.
    Listener(SocketName),
}

/// The name of a listening socket (getsockname(2)).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SocketName {
    /// A TCP port of an address of the guest.
    Tcp(SocketAddr),
    /// Path of a Unix socket, which no directory of the guest has; or, after a null byte, a name of the abstract namespace.
    Unix(Vec<u8>),
}

/// Streams of a process from an OCI configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProcessStreams {
    /// The standard ones.
    pub stdio: Stdio,
    /// Inherited descriptors, 3 and up.
    pub extra_fds: Vec<ExtraFd>,
    /// Path in the container of a socket for messages to its service manager (sd_notify(3)), which are in
    /// [`Process::notifications`](crate::Process::notifications). The configuration has a tmpfs at its directory, where
    /// the socket is alone. Only for a container's first process.
    pub notify_socket: Option<String>,
}

impl From<Stdio> for ProcessStreams {
    fn from(stdio: Stdio) -> Self {
        Self {
            stdio,
            extra_fds: Vec::new(),
            notify_socket: None,
        }
    }
}

/// Options of an exec process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExecOptions {
    /// Its streams.
    pub streams: ProcessStreams,
    /// Its control group, as a path below the container's. Default: the container's own, or that of the container's first
    /// process if the container has created groups of its own.
    pub cgroup: Option<String>,
}

impl From<Stdio> for ExecOptions {
    fn from(stdio: Stdio) -> Self {
        Self {
            streams: stdio.into(),
            cgroup: None,
        }
    }
}

/// A user, by numbers or by names from the container's `/etc/passwd` and `/etc/group`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct User {
    /// `USER[:GROUP]`, each a name or a number. Empty: root.
    pub text: String,
    /// Supplementary groups in addition to those of the user, each a name or a number.
    pub groups: Vec<String>,
}

/// Name resolution of a container: resolv.conf(5). What is empty is as on the host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resolver {
    /// Addresses of name servers.
    pub name_servers: Vec<IpAddr>,
    /// Search domains for short names; `.` alone for none.
    pub search: Vec<String>,
    /// Options: `ndots:2`.
    pub options: Vec<String>,
}

/// A character device of the guest in a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestDevice {
    /// Its node in the guest: `/dev/fuse`.
    pub node: PathBuf,
    /// Path in the container.
    pub path: PathBuf,
    /// Permitted access: letters of `rwm`, for reading, writing and mknod(2).
    pub access: String,
}

impl GuestDevice {
    /// A device with full access, at the path of its node.
    pub fn new(node: impl Into<PathBuf>) -> Self {
        let node = node.into();
        Self {
            path: node.clone(),
            node,
            access: "rwm".into(),
        }
    }
}

/// A host directory or file in the container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// Path on the host.
    pub source: PathBuf,
    /// Path in the container.
    pub destination: PathBuf,
    /// Whether it is read-only in the container.
    pub read_only: bool,
    /// Whether later mounts and unmounts below it on the host are visible in the container.
    pub follow_mounts: bool,
}

impl Volume {
    /// A writable volume, with the current mounts of the host below it.
    pub fn new(source: impl Into<PathBuf>, destination: impl Into<PathBuf>) -> Self {
        Self {
            source: source.into(),
            destination: destination.into(),
            read_only: false,
            follow_mounts: false,
        }
    }
}

/// An empty directory in memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tmpfs {
    /// Path in the container.
    pub destination: PathBuf,
    /// Options of mount(8): `size=64m`, `mode=0700`, `noexec`. Default: `nosuid`, `nodev`, `mode=1777`.
    pub options: Vec<String>,
}

impl Tmpfs {
    /// A directory without options.
    pub fn new(destination: impl Into<PathBuf>) -> Self {
        Self {
            destination: destination.into(),
            options: Vec::new(),
        }
    }
}

/// A disk of the sandbox in a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Name of the disk in the guest kernel: `vda`.
    pub name: String,
    /// Path in the container.
    pub path: PathBuf,
    /// Whether it is read-only in the container.
    pub read_only: bool,
}

impl Device {
    /// Disk number `disk` (from 0) of [`SandboxConfig::disks`](crate::SandboxConfig::disks), at its path in the guest:
    /// `/dev/vda` for 0; `/dev/vdaa` follows `/dev/vdz`.
    pub fn new(disk: usize, read_only: bool) -> Self {
        let letter = |n: usize| char::from(b'a' + (n % 26) as u8);
        let name = match disk / 26 {
            0 => format!("vd{}", letter(disk)),
            more => format!("vd{}{}", letter(more - 1), letter(disk)),
        };
        Self::named(name, read_only)
    }

    /// The disk with this name in the guest kernel, at its path in the guest.
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
    /// Environment as `NAME=VALUE`; PATH and HOME have defaults.
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
    /// Root file system: a directory of the host, or a file (or block device) with an erofs or ext4 file system, which is
    /// not modified: changes are kept in the guest's memory.
    pub rootfs: PathBuf,
    /// Its first process.
    pub process: ProcessConfig,
    /// Host name. Default: the container's name.
    pub hostname: Option<String>,
    /// Host directories.
    pub volumes: Vec<Volume>,
    /// Disks of the sandbox.
    pub devices: Vec<Device>,
    /// Devices of the guest, such as `/dev/fuse`. A privileged container has all of them.
    pub guest_devices: Vec<GuestDevice>,
    /// Empty directories in memory.
    pub tmpfs: Vec<Tmpfs>,
    /// Size of `/dev/shm` in bytes. Default: half of the guest's memory.
    pub shm_size: Option<u64>,
    /// Block volumes.
    pub block_volumes: Vec<BlockVolume>,
    /// Whether the root is read-only.
    pub read_only: bool,
    /// Whether it has all capabilities, all devices and no masked paths: full control of its guest.
    pub privileged: bool,
    /// Capabilities beyond the default ones, with or without `CAP_`; `ALL` for all.
    pub capabilities: Vec<String>,
    /// Capabilities to drop, with or without `CAP_`; `ALL` for all that are not added by name.
    pub dropped_capabilities: Vec<String>,
    /// Filter of its system calls.
    pub seccomp: Seccomp,
    /// Whether programs are prevented from gaining privileges, by set-user-ID files for example.
    pub no_new_privileges: bool,
    /// Resource limits of its processes. Default: 1048576 open files, the kernel's defaults for the rest, and no limit on
    /// the number of processes.
    pub rlimits: Vec<Rlimit>,
    /// Maximum number of processes and threads. Default: no limit.
    pub pids_limit: Option<u32>,
    /// Kernel parameters of its namespaces: `kernel.msgmax`. Those of the network, `net.*`, are the sandbox's
    /// ([`SandboxConfig::sysctls`](crate::SandboxConfig::sysctls)).
    pub sysctls: BTreeMap<String, String>,
    /// Further lines of `/etc/hosts`: names with their addresses. With any of them, the file replaces that of the root.
    pub extra_hosts: Vec<(String, IpAddr)>,
    /// Name resolution. If it is not the default, `/etc/resolv.conf` replaces that of the root.
    pub resolver: Resolver,
}

/// A resource limit of a process: setrlimit(2).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rlimit {
    /// The resource, with or without `RLIMIT_`: `nofile`.
    pub resource: String,
    /// The soft limit; `u64::MAX` means no limit.
    pub soft: u64,
    /// The hard limit.
    pub hard: u64,
}

impl ContainerConfig {
    /// A container with this root file system and program, and defaults for everything else.
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

    /// The files of the host that it shares: its root, if that is a directory, and its volumes. For
    /// [`SandboxConfig::places`](crate::SandboxConfig::places).
    pub fn places(&self) -> Vec<Place> {
        let place = |path: &Path, read_only| Place {
            path: path.to_owned(),
            read_only,
        };
        // An image is attached as a disk, and a device node is replaced by that of the guest.
        let root = self.rootfs.is_dir();
        let root = root.then(|| place(&self.rootfs, self.read_only));
        let volumes = self.volumes.iter();
        let volumes = volumes.filter(|one| one.source.is_dir() || one.source.is_file());
        let volumes = volumes.map(|one| place(&one.source, one.read_only));
        root.into_iter().chain(volumes).collect()
    }
}
