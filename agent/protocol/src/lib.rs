//! Common definitions of the runtime and the agent in the guest: the messages (see `agent/protocol/proto/agent.proto`), the
//! ports, and paths in the guest.
//!
//! # Authentication
//! vsock is not namespaced: a process in a container can connect to the host's ports just as the agent can. So the control
//! port accepts one connection, which the agent makes before any container exists, and a stream is only accepted if it
//! begins with its token, which was sent over that connection.

#[allow(missing_docs, unreachable_pub, clippy::all)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/mod.rs"));
}

pub mod cpus;
pub mod hook;
pub mod names;
pub mod notify;
mod refusal;

pub use generated::agent as messages;
pub use generated::agent_ttrpc::{Agent, AgentClient, create_agent};
pub use refusal::{ErrorReason, refused};

use std::path::Path;

/// The host's port for the control connection.
pub const CONTROL_PORT: u32 = 1024;
/// The host's port for standard streams.
pub const STREAM_PORT: u32 = 1025;

/// Length of a stream's token in hexadecimal digits.
pub const TOKEN_LEN: usize = 32;

/// Directory in the guest for a container's volumes that are file systems of disks: below it, a directory for each
/// container, with entries by number.
pub const VOLUMES_DIR: &str = "/run/koya/volumes";
/// First number of volumes that are directories within shared ones; those with lower numbers are numbered like the
/// container's mounts.
pub const SHARED_VOLUMES: u32 = 1 << 16;
/// Directory in the guest for the sandbox's in-memory file systems, by name.
pub const EPHEMERAL_DIR: &str = "/run/koya/ephemeral";

/// runc's tmpfs option: initialize it with a copy of the covered directory.
pub const COPY_UP: &str = "tmpcopyup";

/// Placeholder for the container's own root in a mount's source; the rest is a path in it, where an earlier mount is.
pub const OWN_ROOT: &str = "/run/koya/own-root";

/// The virtio-fs tag of the shared directories.
pub const SHARED_TAG: &str = "koya";
/// Mount point of the shared directories in the guest.
pub const SHARED_DIR: &str = "/run/koya/shared";
/// Directory in the guest that containers of one sandbox share as `/dev/shm`.
pub const SHARED_MEMORY_DIR: &str = "/dev/shm";

/// Maximum number of bytes read of a container's `/etc/passwd` or `/etc/group`: both fit into one message.
pub const MAX_ACCOUNTS: u64 = 1 << 20;

/// Maximum number of open files that a process may be allowed (`fs.nr_open`): as set by systemd, so that limits which engines
/// pass on from their host can be set.
pub const MAX_OPEN_FILES: u64 = 1_073_741_816;

/// Maximum length of the ID of a container or process: names of files derived from it have at most 255 bytes.
const MAX_ID: usize = 200;

/// Whether this is an ID of a container or process, which is also a single path component: as in runc letters, digits and
/// `_+-.`, except `.` and `..`.
pub fn is_id(id: &str) -> bool {
    let valid = |c: char| c.is_ascii_alphanumeric() || "_+-.".contains(c);
    !id.is_empty() && id.len() <= MAX_ID && id.chars().all(valid) && id != "." && id != ".."
}

/// Whether the device node at this path in `/dev` is a terminal, such as `/dev/ttyS0`. `/dev/tty` is none: it stands for the
/// terminal of the process that opens it.
pub fn is_terminal(node: &Path) -> bool {
    let name = node.to_str().and_then(|path| path.strip_prefix("/dev/tty"));
    name.is_some_and(|rest| !rest.is_empty())
}

/// Path in the guest of a container's root that is a file system image.
pub fn image_root(container: &str) -> String {
    format!("/run/koya/images/{container}/root")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_those_that_runc_takes() {
        let longest = "x".repeat(200);
        for good in ["a", "A-1_b.c+d", "...", "-", ".a", longest.as_str()] {
            assert!(is_id(good), "{good}");
        }
        let too_long = format!("{longest}x");
        for bad in ["", ".", "..", "a/b", "a b", "\u{e4}", "a\n", &too_long] {
            assert!(!is_id(bad), "{bad:?}");
        }
    }

    #[test]
    fn terminals_are_known_by_their_nodes() {
        let is = |path: &str| is_terminal(Path::new(path));
        assert!(is("/dev/ttyS0") && is("/dev/tty1"));
        assert!(!is("/dev/tty") && !is("/dev/null"));
    }
}
