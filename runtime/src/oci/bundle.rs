//! The input of an OCI runtime for a container: a configuration and a root file system.

use crate::account::Accounts;
use crate::mount_points;
use crate::{Container, Error, ProcessStreams, Sandbox};
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

impl Bundle {
    /// Validates it as far as that is possible without a virtual machine: its creation repeats that. The root file system
    /// must be mounted.
    ///
    /// # Errors
    /// The unsupported or invalid part of the configuration.
    pub fn check(&self) -> Result<(), Error> {
        let root = Root::of(&self.rootfs)?;
        let adapted = super::adapt("container", self.clone(), root, &Accounts::default())?;
        match root {
            Root::Directory => mount_points::check(&self.rootfs, &adapted.mount_points),
            Root::Image => Ok(()),
        }
    }
}

/// Validates a configuration by itself, without looking at the files that it names.
///
/// # Errors
/// The unsupported or invalid part.
pub fn check_configuration(spec: &Spec) -> Result<(), Error> {
    super::check_supported(spec)
}

impl Sandbox {
    /// As [`create`](Self::create), for an OCI bundle, whose root file system must be mounted. Missing mount points and a
    /// missing working directory are created in it.
    ///
    /// # Errors
    /// The unsupported part of the configuration, or the reason why the guest could not create the container.
    pub fn create_oci(
        &self,
        id: &str,
        bundle: &Bundle,
        streams: impl Into<ProcessStreams>,
    ) -> Result<Container, Error> {
        Container::create_oci(self.inner.clone(), id, bundle, &streams.into())
    }
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
    /// That of this container.
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
