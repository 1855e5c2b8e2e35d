//! The OCI configuration of a [`ContainerConfig`], as an engine on this host would write it for an OCI runtime.

mod own_devices;
mod own_mounts;
mod resolver;

use super::{Bundle, SharedNamespaces, capabilities, process};
use crate::account::Accounts;
use crate::{ContainerConfig, Error, Resolver};
use koya_protocol::MAX_OPEN_FILES;
use koya_protocol::messages::File;
use oci_spec::runtime::{Process, Spec};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Builds the bundle for a container's configuration. Its user is looked up in these accounts.
///
/// # Errors
/// The problem, with the offending field.
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
    let (nodes, mut rules) = own_devices::of(config)?;
    rules.insert(0, json!({"allow": privileged, "access": "rwm"}));
    let pids = config.pids_limit.map(|limit| json!({"limit": limit}));
    let spec = json!({
        "ociVersion": "1.2.0",
        "root": {
            // Replaced by the guest's path.
            "path": "rootfs",
            "readonly": config.read_only,
        },
        "hostname": host_name(id, config)?,
        "mounts": mounts(config)?,
        "linux": {
            "namespaces": [
                {"type": "pid"}, {"type": "mount"}, {"type": "uts"}, {"type": "ipc"},
                {"type": "cgroup"}, {"type": "network"},
            ],
            "devices": nodes,
            "resources": {"devices": rules, "pids": pids},
            "sysctl": config.sysctls,
            "seccomp": config.seccomp.oci(privileged, &capabilities),
            "maskedPaths": masked,
            "readonlyPaths": read_only,
        },
    });
    let wrong =
        |error: serde_json::Error| Error::invalid_by("configuration", "it is not the OCI's")(error);
    // Privileges of all processes of the container.
    let allowed = json!({
        "user": {},
        "cwd": "/",
        "capabilities": {"bounding": capabilities},
        "rlimits": rlimits(config)?,
        "noNewPrivileges": config.no_new_privileges,
    });
    let allowed: Process = serde_json::from_value(allowed).map_err(wrong)?;
    let mut spec: Spec = serde_json::from_value(spec).map_err(wrong)?;
    spec.set_process(Some(process::with_privileges_of(
        &allowed,
        &config.process,
        accounts,
    )?));
    Ok(Bundle {
        spec,
        // Paths in it are relative to this process.
        directory: PathBuf::new(),
        rootfs: config.rootfs.clone(),
        shared: SharedNamespaces::default(),
    })
}

/// Paths of the guest kernel that a container must not see or change: the usual OCI lists.
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

/// The default of containerd. There is no limit on the number of processes: control groups bound it.
const OPEN_FILES: u64 = 1 << 20;

/// Names of setrlimit(2), without the common prefix.
const RESOURCES: &[&str] = &[
    "AS",
    "CORE",
    "CPU",
    "DATA",
    "FSIZE",
    "LOCKS",
    "MEMLOCK",
    "MSGQUEUE",
    "NICE",
    "NOFILE",
    "NPROC",
    "RSS",
    "RTPRIO",
    "RTTIME",
    "SIGPENDING",
    "STACK",
];

fn rlimits(config: &ContainerConfig) -> Result<Vec<Value>, Error> {
    let mut all = BTreeMap::from([("NOFILE".to_owned(), (OPEN_FILES, OPEN_FILES))]);
    for limit in &config.rlimits {
        let name = limit.resource.to_uppercase();
        let name = name.trim_start_matches("RLIMIT_");
        let wrong = |why: &str| Error::invalid("rlimit", format!("{}: {why}", limit.resource));
        if !RESOURCES.contains(&name) {
            return Err(wrong("there is no such limit"));
        }
        if name == "NOFILE" && limit.hard > MAX_OPEN_FILES {
            return Err(wrong(&format!("at most {MAX_OPEN_FILES} can be allowed")));
        }
        if limit.soft > limit.hard {
            return Err(wrong("the soft limit is above the hard one"));
        }
        all.insert(name.into(), (limit.soft, limit.hard));
    }
    let oci = |(name, (soft, hard))| json!({"type": format!("RLIMIT_{name}"), "soft": soft, "hard": hard});
    Ok(all.into_iter().map(oci).collect())
}

/// Maximum length of a host name in bytes (HOST_NAME_MAX).
const MAX_HOST_NAME: usize = 64;

/// The configured host name, or as much of the container's name as fits.
fn host_name<'c>(id: &'c str, config: &'c ContainerConfig) -> Result<&'c str, Error> {
    let wanted = config.hostname.as_deref().filter(|name| !name.is_empty());
    let Some(name) = wanted else {
        return Ok(&id[..id.floor_char_boundary(MAX_HOST_NAME)]);
    };
    let wrong = |why: &str| Err(Error::invalid("hostname", format!("{name:?} {why}")));
    if name.len() > MAX_HOST_NAME {
        return wrong("has more than 64 bytes");
    }
    // It becomes a word of /etc/hosts. Other restrictions are left to the user.
    if name.contains(|c: char| c.is_whitespace() || c.is_control()) {
        return wrong("has spaces or control characters in it");
    }
    Ok(name)
}

/// Files that programs expect and few roots contain.
///
/// # Errors
/// If the host name, an extra host or a part of the resolver's configuration is invalid.
pub(crate) fn files(id: &str, config: &ContainerConfig) -> Result<Vec<File>, Error> {
    let name = host_name(id, config)?;
    // A name with a domain comes first, and without it second, as with Docker.
    let short = name.split_once('.').map(|(short, _)| short);
    let short = short.filter(|short| !short.is_empty());
    let names = short.map_or_else(|| name.to_owned(), |short| format!("{name} {short}"));
    let mut hosts = format!(
        "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n127.0.1.1\t{names}\n"
    );
    for (name, address) in &config.extra_hosts {
        resolver::check_word("extra host", name)?;
        hosts.push_str(&format!("{address}\t{name}\n"));
    }
    let file = |path: &str, content: String, replace: bool| File {
        path: path.into(),
        content: content.into_bytes(),
        replace,
        ..Default::default()
    };
    let (has_hosts, resolver) = (!config.extra_hosts.is_empty(), &config.resolver);
    Ok(vec![
        file("/etc/hosts", hosts, has_hosts),
        file("/etc/hostname", format!("{name}\n"), false),
        file(
            "/etc/resolv.conf",
            resolver::configuration(resolver)?,
            *resolver != Resolver::default(),
        ),
    ])
}

fn mounts(config: &ContainerConfig) -> Result<Vec<Value>, Error> {
    let mount = |destination: &str, kind: &str, source: &str, options: &[&str]| {
        json!({
            "destination": destination, "type": kind, "source": source, "options": options,
        })
    };
    let strict = ["nosuid", "noexec", "nodev"];
    let access = if config.privileged { "rw" } else { "ro" };
    let system = ["nosuid", "noexec", "nodev", access];
    let size = config.shm_size.map(|bytes| format!("size={bytes}"));
    let mut shm = vec!["nosuid", "noexec", "nodev", "mode=1777"];
    shm.extend(size.as_deref());
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
        mount("/dev/shm", "tmpfs", "shm", &shm),
        mount("/dev/mqueue", "mqueue", "mqueue", &strict),
        mount("/sys", "sysfs", "sysfs", &system),
        mount("/sys/fs/cgroup", "cgroup", "cgroup", &system),
    ];
    all.extend(own_mounts::of(config)?);
    Ok(all)
}

#[cfg(test)]
mod tests;
