//! What a user wants of a container. [`crate::oci`] makes an OCI configuration of it.

use crate::block_volume::BlockVolume;
use crate::seccomp::Seccomp;
use std::path::{Path, PathBuf};

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
        /// Whether it prints newlines as they are. By default a terminal prints CR LF (ONLCR in termios(3)).
        keep_newlines: bool,
    },
}

/// Which way a stream goes, as the process sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// It reads a pipe.
    Input,
    /// It writes to a pipe.
    Output,
    /// It has a socket.
    Both,
}

/// The streams of a process that an OCI configuration describes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProcessStreams {
    /// The standard ones.
    pub stdio: Stdio,
    /// Its descriptors from 3 on, which it finds open.
    pub further: Vec<Direction>,
}

impl From<Stdio> for ProcessStreams {
    fn from(stdio: Stdio) -> Self {
        Self {
            stdio,
            further: Vec::new(),
        }
    }
}

/// How a process is added to a container.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExecOptions {
    /// Its streams.
    pub streams: ProcessStreams,
    /// Its control group, as a path in the container's own. Without one it is in that, or in the one of the container's
    /// first process if the container has made groups of its own.
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

/// An empty directory in memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tmpfs {
    /// Where it is in the container.
    pub destination: PathBuf,
    /// As mount(8) has them: `size=64m`, `mode=0700`, `noexec`. Default: `nosuid`, `nodev`, `mode=1777`.
    pub options: Vec<String>,
}

impl Tmpfs {
    /// One without options.
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
    pub tmpfs: Vec<Tmpfs>,
    /// File systems of its own.
    pub block_volumes: Vec<BlockVolume>,
    /// Whether its root is read-only.
    pub read_only: bool,
    /// Every capability, every device, no masked paths: root of its guest.
    pub privileged: bool,
    /// Capabilities beyond the default ones, with or without `CAP_`; `ALL` of them.
    pub capabilities: Vec<String>,
    /// Capabilities that it is to lose of the default ones, or `ALL` of them.
    pub dropped_capabilities: Vec<String>,
    /// The system calls that it may make.
    pub seccomp: Seccomp,
    /// Whether its programs can't gain privileges by set-user-ID files and the like.
    pub no_new_privileges: bool,
    /// Limits of its processes' resources. Default: 1048576 open files, and of the rest what the kernel gives; no
    /// limit of processes.
    pub rlimits: Vec<Rlimit>,
}

/// A limit of a process's resources: setrlimit(2).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rlimit {
    /// Which, with or without `RLIMIT_`: `nofile`.
    pub resource: String,
    /// What is in force; `u64::MAX` is no limit.
    pub soft: u64,
    /// What it may be raised to.
    pub hard: u64,
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
}
