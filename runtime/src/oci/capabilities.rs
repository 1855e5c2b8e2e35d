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

/// The capabilities that a guest has, in OCI spelling and in the order of their names.
pub fn known_capabilities() -> Vec<String> {
    let mut all = all();
    all.sort();
    all
}

/// The capabilities allowed for a container, in OCI spelling: the default ones without the dropped ones, and the added
/// ones. As with Docker, a capability added by name is kept even if it is dropped.
///
/// # Errors
/// The unknown capability.
pub(super) fn of(config: &ContainerConfig) -> Result<Vec<String>, Error> {
    let added = named(&config.capabilities)?;
    let dropped = named(&config.dropped_capabilities)?;
    if config.privileged {
        return Ok(all());
    }
    let mut wanted = match (&added, &dropped) {
        (None, _) => all(),
        (Some(_), None) => Vec::new(),
        (Some(_), Some(_)) => DEFAULT.iter().map(|name| name.to_string()).collect(),
    };
    wanted.retain(|name| !dropped.iter().flatten().any(|gone| gone == name));
    wanted.extend(added.unwrap_or_default());
    Ok(wanted)
}

/// Parses names of capabilities, with or without `CAP_`; `None` if `ALL` is among them.
fn named(names: &[String]) -> Result<Option<Vec<String>>, Error> {
    let mut found = Some(Vec::new());
    for name in names {
        let name = name.to_uppercase();
        let plain = name.trim_start_matches("CAP_");
        match plain {
            "ALL" => found = None,
            known if ALL.contains(&known) => found.iter_mut().for_each(|found| {
                found.push(format!("CAP_{plain}"));
            }),
            _ => {
                let reason = format!("there is no CAP_{plain}");
                return Err(Error::invalid("capability", reason));
            }
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_added_and_taken_away_as_with_docker() {
        let of = |add: &[&str], drop: &[&str]| {
            let words = |words: &[&str]| words.iter().map(|word| word.to_string()).collect();
            let config = ContainerConfig {
                capabilities: words(add),
                dropped_capabilities: words(drop),
                ..ContainerConfig::default()
            };
            super::of(&config)
        };
        assert_eq!(of(&[], &[]).unwrap(), DEFAULT);
        assert_eq!(of(&[], &["ALL"]).unwrap(), [""; 0]);
        let port = of(&["net_bind_service"], &["all"]).unwrap();
        assert_eq!(port, ["CAP_NET_BIND_SERVICE"]);
        let less = of(&[], &["CAP_CHOWN", "mknod"]).unwrap();
        assert_eq!(less.len(), DEFAULT.len() - 2);
        assert!(!less.contains(&"CAP_CHOWN".to_owned()));
        let most = of(&["ALL"], &["SYS_ADMIN"]).unwrap();
        assert_eq!(most.len(), ALL.len() - 1);
        assert!(of(&["ALL"], &["FLY"]).is_err() && of(&["FLY", "ALL"], &[]).is_err());
    }
}
