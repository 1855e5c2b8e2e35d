//! How many descriptors a process of the guest may have open.
//!
//! The agent holds two for each connection to a published port; the programs of containers start with what the
//! kernel gives to its init, unless their configuration says otherwise: some go through all that there may be.

use rustix::process::{Resource, Rlimit, setrlimit};

/// Room for as many connections as a guest's vsock may have (4096), and for the rest.
const AGENT: u64 = 16 << 10;
/// `INR_OPEN_CUR` and `INR_OPEN_MAX` of the kernel (include/uapi/linux/fs.h).
const DEFAULT: Rlimit = Rlimit {
    current: Some(1024),
    maximum: Some(4096),
};

/// Raises the agent's own limit.
pub(crate) fn raise() -> rustix::io::Result<()> {
    let raised = Rlimit {
        current: Some(AGENT),
        maximum: Some(AGENT),
    };
    setrlimit(Resource::Nofile, raised)
}

/// Gives a process that is to become a container's the kernel's own limit again.
pub(crate) fn restore() -> rustix::io::Result<()> {
    setrlimit(Resource::Nofile, DEFAULT)
}
