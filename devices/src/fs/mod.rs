//! virtio-fs: virtio 1.2, section 5.11. Shares host directories with the guest. Requests use the FUSE
//! protocol (include/uapi/linux/fuse.h) and are handled by a server in this process.
//!
//! | module | contents |
//! |---|---|
//! | [`wire`] | the structures of the protocol |
//! | [`shares`] | the synthetic root, whose directories are added and removed while the guest runs |
//! | `export`, `origin` | the host directories behind them, and their nesting |
//! | `node`, `inodes`, `reach`, `handles` | files that the guest has looked up and opened, within the host's limits |
//! | `users` | other owners than on the host |
//! | [`passthrough`] | each operation on the host's file system |
//! | [`server`] | requests in, replies out |
//! | [`device`] | the virtio device and its worker threads |
//!
//! # Confinement
//! Every name from a guest is one path component: `/`, `.` and `..` are rejected, and symbolic links are
//! never followed on the host. A file is reached only from a descriptor that was reached before, starting at
//! the root of a share. If the host permits it (CAP_SYS_ADMIN), that root is a detached copy of the mount
//! (`open_tree`), which even a descriptor cannot leave. Only regular files and directories are ever opened;
//! for other files only names and attributes are available.
//!
//! # Watches
//! inotify in the guest reports changes on the host if the guest kernel supports it and the events are passed
//! to it: [`Fs::host_events`].
//!
//! # Caches
//! [`Cache`] is the cache policy of the guest, with its effect on files that change on the host.

pub mod device;
mod export;
mod handles;
mod inodes;
mod node;
mod origin;
pub mod passthrough;
mod reach;
pub mod server;
pub mod shares;
mod space;
mod users;
mod watch;
pub mod wire;

pub use device::Fs;
pub use export::protect_mount;
pub use server::FsMetrics;
pub use shares::{ShareOptions, Shared, Shares};
pub use users::{IdRange, MappedUsers};
pub use watch::{HostEvent, HostEvents};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Raises this process's limit of open files as far as the kernel and this user's rights permit. For programs
/// that share large trees: each file that a guest has looked up takes a descriptor; beyond the limit files
/// are closed and found again, which takes time. The device itself does not change the limit.
pub fn raise_descriptor_limit() {
    let most = std::fs::read_to_string("/proc/sys/fs/nr_open");
    let most = most.ok().and_then(|text| text.trim().parse().ok());
    for wanted in [most, getrlimit(Resource::Nofile).maximum] {
        let raised = Rlimit {
            current: wanted,
            maximum: wanted,
        };
        if wanted.is_some() && setrlimit(Resource::Nofile, raised).is_ok() {
            return;
        }
    }
}

/// Cache policy of the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Cache {
    /// Nothing: every access goes to the host. Shared memory maps still work. For directories that both sides
    /// write all the time.
    Never,
    /// Names and attributes for a second; data as long as the file's time and size on the host do not change.
    /// A change on the host is visible after at most a second.
    #[default]
    Auto,
    /// Everything, for any length of time. For directories that only this guest writes.
    Always,
    /// As `Always`, and writes reach the host when the guest kernel writes them back, or on fsync and close.
    /// Holes in files are reported as data.
    Writeback,
}

impl Cache {
    /// Time for which names and attributes may be cached.
    pub(crate) fn timeout(self) -> Duration {
        match self {
            Self::Never => Duration::ZERO,
            Self::Auto => Duration::from_secs(1),
            Self::Always | Self::Writeback => Duration::from_secs(24 * 3600),
        }
    }
}
