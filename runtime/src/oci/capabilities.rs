//! The capabilities of a container.

use crate::{ContainerConfig, Error};

/// Default capabilities of containers: those of Docker.
const DEFAULT: &[&str] = &[
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];

/// Linux 6.12: CAP_CHOWN (0) to CAP_CHECKPOINT_RESTORE (40).
const ALL: &[&str] = &[
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

fn all() -> Vec<String> {
    ALL.iter().map(|name| format!("CAP_{name}")).collect()
}

/// The capabilities allowed for a container, in OCI spelling.
///
/// # Errors
/// The unknown capability.
pub(super) fn of(config: &ContainerConfig) -> Result<Vec<String>, Error> {
    if config.privileged {
        return Ok(all());
    }
    let mut wanted: Vec<String> = DEFAULT.iter().map(|name| name.to_string()).collect();
    for name in &config.capabilities {
        let name = name.to_uppercase();
        if name == "ALL" {
            return Ok(all());
        }
        let plain = name.trim_start_matches("CAP_");
        if !ALL.contains(&plain) {
            let reason = format!("there is no CAP_{plain}");
            return Err(Error::invalid("capability", reason));
        }
        wanted.push(format!("CAP_{plain}"));
    }
    Ok(wanted)
}
