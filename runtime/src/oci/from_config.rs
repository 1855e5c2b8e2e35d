//! The OCI configuration of a [`ContainerConfig`]: as an engine on this host would write it for an OCI runtime.

use super::{Bundle, SharedPids, capabilities, process};
use crate::account::Accounts;
use crate::{ContainerConfig, Error};
use oci_spec::runtime::{Process, Spec};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// What is made of a container's configuration. Its user is one of these accounts.
///
/// # Errors
/// What is wrong with it, by name.
pub(crate) fn bundle(
    id: &str,
    config: &ContainerConfig,
    accounts: &Accounts,
) -> Result<Bundle, Error> {
    let capabilities = capabilities::of(config)?;
    let privileged = config.privileged;
    let (masked, read_only) = match privileged {
        true => (&[][..], &[][..]),
        false => (MASKED, READ_ONLY),
    };
    let spec = json!({
        "ociVersion": "1.2.0",
        "root": {
            "path": config.rootfs,
            "readonly": config.read_only,
        },
        "hostname": config.hostname.as_deref().unwrap_or(id),
        "mounts": mounts(config)?,
        "linux": {
            "namespaces": [
                {"type": "pid"}, {"type": "mount"}, {"type": "uts"}, {"type": "ipc"},
                {"type": "cgroup"}, {"type": "network"},
            ],
            "resources": {"devices": [{"allow": privileged, "access": "rwm"}]},
            "seccomp": config.seccomp.oci(privileged, &capabilities),
            "maskedPaths": masked,
            "readonlyPaths": read_only,
        },
    });
    let wrong = |error: serde_json::Error| Error::container("configuration", error.to_string());
    // What all of the container's processes may.
    let allowed = json!({
        "user": {},
        "cwd": "/",
        "capabilities": {"bounding": capabilities},
        "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1_048_576, "soft": 1_048_576}],
        "noNewPrivileges": config.no_new_privileges,
    });
    let allowed: Process = serde_json::from_value(allowed).map_err(wrong)?;
    let mut spec: Spec = serde_json::from_value(spec).map_err(wrong)?;
    spec.set_process(Some(process::like(&allowed, &config.process, accounts)?));
    Ok(Bundle {
        spec,
        // Paths in it are this process's.
        folder: PathBuf::new(),
        rootfs: config.rootfs.clone(),
        pids: SharedPids::Unknown,
    })
}

/// What a container must not see or change of its guest's kernel: the OCI's usual lists.
const MASKED: &[&str] = &[
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
];
const READ_ONLY: &[&str] = &[
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

fn mounts(config: &ContainerConfig) -> Result<Vec<Value>, Error> {
    let mount = |destination: &str, kind: &str, source: &str, options: &[&str]| {
        json!({
            "destination": destination, "type": kind, "source": source, "options": options,
        })
    };
    let strict = ["nosuid", "noexec", "nodev"];
    let access = if config.privileged { "rw" } else { "ro" };
    let system = ["nosuid", "noexec", "nodev", access];
    let mut all = vec![
        mount("/proc", "proc", "proc", &strict),
        mount(
            "/dev",
            "tmpfs",
            "tmpfs",
            &["nosuid", "strictatime", "mode=755", "size=65536k"],
        ),
        mount(
            "/dev/pts",
            "devpts",
            "devpts",
            &[
                "nosuid",
                "noexec",
                "newinstance",
                "ptmxmode=0666",
                "mode=0620",
                "gid=5",
            ],
        ),
        mount(
            "/dev/shm",
            "tmpfs",
            "shm",
            &["nosuid", "noexec", "nodev", "mode=1777"],
        ),
        mount("/dev/mqueue", "mqueue", "mqueue", &strict),
        mount("/sys", "sysfs", "sysfs", &system),
        mount("/sys/fs/cgroup", "cgroup", "cgroup", &system),
    ];
    for path in &config.tmpfs {
        let destination = absolute("tmpfs", path)?;
        let options = ["nosuid", "nodev", "mode=1777"];
        all.push(mount(destination, "tmpfs", "tmpfs", &options));
    }
    for volume in &config.volumes {
        let destination = absolute("volume", &volume.destination)?;
        let source = text("volume", &volume.source)?;
        let propagation = if volume.follow_mounts {
            "rslave"
        } else {
            "rprivate"
        };
        let access = if volume.read_only { "ro" } else { "rw" };
        let options = ["rbind", propagation, access];
        all.push(mount(destination, "bind", source, &options));
    }
    Ok(all)
}

pub(super) fn absolute<'p>(field: &'static str, path: &'p Path) -> Result<&'p str, Error> {
    if !path.is_absolute() {
        let reason = format!("{} is not an absolute path", path.display());
        return Err(Error::container(field, reason));
    }
    text(field, path)
}

/// JSON is text.
fn text<'p>(field: &'static str, path: &'p Path) -> Result<&'p str, Error> {
    let reason = || format!("{path:?} is not UTF-8");
    path.to_str()
        .ok_or_else(|| Error::container(field, reason()))
}
