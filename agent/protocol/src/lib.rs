//! What the runtime and the agent in the guest agree on: the messages (see
//! `agent/protocol/proto/agent.proto`), the ports, and where things are in the guest.
//!
//! # Who may pose as whom
//! vsock knows no namespaces: a process in a container can connect to the host's ports as the
//! agent can. So the control port takes one connection, which the agent makes before there is
//! any container, and a stream is only taken if it begins with the token that was sent over that
//! connection for it.

#[allow(missing_docs, unreachable_pub, clippy::all)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/mod.rs"));
}

pub mod cpus;
pub mod hook;
pub mod names;
mod refusal;

pub use generated::agent as messages;
pub use generated::agent_ttrpc::{Agent, AgentClient, create_agent};
pub use refusal::{Refused, refused};

/// The host's port for the control connection.
pub const CONTROL_PORT: u32 = 1024;
/// The host's port for standard streams.
pub const STREAM_PORT: u32 = 1025;

/// Bytes of a stream's token, as hexadecimal digits.
pub const TOKEN_LEN: usize = 32;

/// Where in the guest the file systems of disks are that are a container's volumes: in its directory, by
/// number.
pub const VOLUMES_DIR: &str = "/run/koya/volumes";
/// From this number on a container's volumes are directories within shared ones; those below are numbered as
/// its mounts.
pub const SHARED_VOLUMES: u32 = 1 << 16;
/// Where in the guest the sandbox's file systems in memory are, by their names.
pub const EPHEMERAL_DIR: &str = "/run/koya/ephemeral";

/// runc's option of a tmpfs: it begins with a copy of the directory that it covers.
pub const COPY_UP: &str = "tmpcopyup";

/// Stands in a mount's source for the container's own root, of which the rest is a path: where an earlier mount is.
pub const OWN_ROOT: &str = "/run/koya/own-root";

/// The virtio-fs tag of the shared directories.
pub const SHARED_TAG: &str = "koya";
/// Where the shared directories are mounted in the guest.
pub const SHARED_DIR: &str = "/run/koya/shared";
/// Where the guest has the memory that containers of one sandbox share as `/dev/shm`.
pub const SHARED_MEMORY_DIR: &str = "/dev/shm";

/// The most that is read of a container's `/etc/passwd` or `/etc/group`, in bytes: two of them fit into
/// a message.
pub const MAX_ACCOUNTS: u64 = 1 << 20;

/// Where the guest has the root of a container whose root is an image of a file system.
pub fn image_root(container: &str) -> String {
    format!("/run/koya/images/{container}/root")
}
