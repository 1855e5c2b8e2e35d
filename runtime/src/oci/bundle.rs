//! What an OCI runtime gets of a container: a configuration and a root file system.

use crate::{Container, Error, ProcessStreams, Sandbox};
use oci_spec::runtime::Spec;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

/// A container's configuration and files, as an OCI runtime gets them.
#[derive(Clone, Debug)]
pub struct Bundle {
    /// `config.json`.
    pub spec: Spec,
    /// The directory that relative paths in it start from.
    pub directory: PathBuf,
    /// Its root file system: a directory in which it is mounted, or a file (or block device) with a file
    /// system, which the guest mounts (see [`ContainerConfig::rootfs`](crate::ContainerConfig::rootfs)).
    pub rootfs: PathBuf,
    /// What namespaces mean that its configuration names by path.
    pub shared: SharedNamespaces,
}

impl Sandbox {
    /// As [`create`](Self::create), of an OCI bundle: its root file system must be mounted. Mount points and the working
    /// directory that it lacks are made in it.
    ///
    /// # Errors
    /// What of the configuration can't be had, by name, or why the guest could not make it.
    pub fn create_oci(
        &self,
        id: &str,
        bundle: &Bundle,
        streams: impl Into<ProcessStreams>,
    ) -> Result<Container, Error> {
        Container::create_oci(self.inner.clone(), id, bundle, &streams.into())
    }
}

/// Whose namespaces a container has where its configuration names them by path: paths are the host's, processes the
/// guest's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SharedNamespaces {
    /// Where its processes are.
    pub pids: SharedPids,
    /// The container whose IPC namespace it has; without one it is the sandbox's own.
    pub ipc: Option<String>,
    /// The same of the UTS namespace.
    pub uts: Option<String>,
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
