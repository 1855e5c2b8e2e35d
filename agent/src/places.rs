//! Where the agent keeps what belongs to a container, and what its own program is called with.

use std::path::{Path, PathBuf};

/// Directory of containers' bundles.
const BUNDLES: &str = "/run/koya/bundles";

/// The cgroup under which containers' cgroups are.
pub(crate) const CGROUPS: &str = "/koya";

/// The cgroup of processes on their way into a container.
pub(crate) const ENTRY_CGROUP: &str = "/koya-entry";

/// The first argument of a helper.
pub(crate) const ARGUMENT: &str = "helper";

/// The first argument of the process that is PID 1 in the pid namespace shared by a sandbox's containers.
pub(crate) const PAUSE: &str = "pause";

/// The first argument of a helper that creates a working directory: `ROOT DIRECTORY UID GID` follow.
pub(crate) const WORKING_DIRECTORY: &str = "working-directory";

/// The first argument of a helper that makes late mounts: `ROOT MOUNTS` follow.
pub(crate) const LATE_MOUNTS: &str = "late-mounts";

/// The first argument of a helper that makes a container's `/dev` read-only: `ROOT TERMINAL` follow, the latter true or
/// false.
pub(crate) const READ_ONLY_DEV: &str = "read-only-dev";

/// Path of a container's bundle.
pub(crate) fn bundle(id: &str) -> PathBuf {
    Path::new(BUNDLES).join(id)
}

/// Path of a container's cgroup in its configuration.
pub(crate) fn cgroup(id: &str) -> String {
    format!("{CGROUPS}/{id}")
}
