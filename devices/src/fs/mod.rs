//! A host directory in the guest: virtio 1.2, section 5.11. The requests are FUSE's
//! (include/uapi/linux/fuse.h), answered by a server of our own in this process.
//!
//! | module | what |
//! |---|---|
//! | [`wire`] | the structures of the protocol, and nothing else |
//! | [`shares`] | the synthetic root: directories that come and go while the guest runs |
//! | `export`, `origin` | the host's trees behind them, and which lies within which |
//! | `node`, `inodes`, `reach`, `handles` | what the guest has looked up and opened, within the host's limits |
//! | [`passthrough`] | each operation on the host's file system |
//! | [`server`] | requests in, replies out |
//! | [`device`] | the virtio device and its worker threads |
//!
//! # What keeps a guest inside its directories
//! Every name that a guest sends is one component: `/`, `.` and `..` are refused, and links are
//! never followed on the host. A file is reached only from a descriptor that was reached before,
//! down from a share's root. Where the host lets us (CAP_SYS_ADMIN), that root is a detached copy
//! of the mount (`open_tree`), so even a descriptor can't climb out of it. Only regular files and
//! directories are ever opened; the rest is names and attributes.
//!
//! # Watches
//! A guest's inotify hears of changes on the host, if its kernel and somebody on the host see to it:
//! [`Fs::host_events`].
//!
//! # Caches
//! [`Cache`] says what the guest may remember; see there for what that means for files that
//! change on the host.

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
mod watch;
pub mod wire;

pub use device::Fs;
pub use server::FsMetrics;
pub use shares::{ShareOptions, Shared, Shares};
pub use watch::{HostEvent, HostEvents};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Raises this process's limit of descriptors: to what the host's kernel allows a process, or as far
/// as this user may. For programs that share large trees: what a guest has looked up takes a
/// descriptor each, and beyond the limit files are closed and found again, which takes time. The
/// device leaves the limit alone.
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

/// What the guest may remember of a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Cache {
    /// Nothing: every access asks the host. Shared memory maps still work. For directories that
    /// both sides write all the time.
    Never,
    /// Names and attributes for a second; data as long as the file's time and size on the host
    /// do not change. A change on the host shows after at most a second.
    #[default]
    Auto,
    /// Everything, for as long as the guest likes. For directories that only this guest writes.
    Always,
    /// As `Always`, and writes reach the host when the guest's kernel likes, or on fsync and close.
    /// Holes in files are not told from data.
    Writeback,
}

impl Cache {
    /// How long names and attributes may be remembered.
    pub(crate) fn timeout(self) -> Duration {
        match self {
            Self::Never => Duration::ZERO,
            Self::Auto => Duration::from_secs(1),
            Self::Always | Self::Writeback => Duration::from_secs(24 * 3600),
        }
    }
}
