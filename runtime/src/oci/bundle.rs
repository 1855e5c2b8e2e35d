//! The input of an OCI runtime for a container: a configuration and a root file system.

use crate::Error;
use oci_spec::runtime::Spec;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

/// Configuration and files of a container, as passed to an OCI runtime.
#[derive(Clone, Debug)]
pub struct Bundle {
    /// `config.json`.
    pub spec: Spec,
    /// Base directory of relative paths in it.
    pub directory: PathBuf,
    /// Root file system: a directory in which it is mounted, or a file (or block device) with a file system, which the guest
    /// mounts (see [`ContainerConfig::rootfs`](crate::ContainerConfig::rootfs)).
    pub rootfs: PathBuf,
    /// Meaning of namespaces that the configuration names by path.
    pub shared: SharedNamespaces,
}

/// Owners of the namespaces that a container's configuration names by path: such paths are of the host, the processes are in
/// the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SharedNamespaces {
    /// The pid namespace.
    pub pids: SharedPidNamespace,
    /// The container whose IPC namespace it joins; `None` is that of the sandbox.
    pub ipc: Option<String>,
    /// The same for the UTS namespace.
    pub uts: Option<String>,
}

/// Meaning of a pid namespace that is named by path: such paths are of the host, the processes are in the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum SharedPidNamespace {
    /// Unknown: it is refused.
    #[default]
    Unknown,
    /// The one shared by the sandbox's containers.
    Sandbox,
    /// The one of the container with this ID.
    Container(String),
}

/// Kind of a container's root.
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
        let reason = format!("{} can't be read", path.display());
        let found = path.metadata();
        let kind = found
            .map_err(Error::invalid_by("rootfs", reason))?
            .file_type();
        match kind.is_dir() {
            true => Ok(Self::Directory),
            false if kind.is_file() || kind.is_block_device() => Ok(Self::Image),
            false => {
                let path = path.display();
                let reason = format!("{path} is neither a directory nor an image of a file system");
                Err(Error::invalid("rootfs", reason))
            }
        }
    }
}
