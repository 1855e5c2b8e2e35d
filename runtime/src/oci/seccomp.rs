//! Filters of system calls: those that ask a program of the host can't be had, since its socket's descriptors don't
//! pass into a guest.

use super::refuse;
use crate::Error;
use oci_spec::runtime::{LinuxSeccomp, LinuxSeccompAction};

/// # Errors
/// If a system call is to be told to a program of the host. Where runc refuses that, too, in its words.
pub(super) fn check(seccomp: &LinuxSeccomp) -> Result<(), Error> {
    const FIELD: &str = "linux.seccomp";
    const NOTIFY: LinuxSeccompAction = LinuxSeccompAction::ScmpActNotify;
    if seccomp.default_action() == NOTIFY {
        let reason = "SCMP_ACT_NOTIFY cannot be used as default action";
        return Err(Error::invalid(FIELD, reason));
    }
    let calls = seccomp.syscalls().iter().flatten();
    let mut told = calls
        .filter(|call| call.action() == NOTIFY)
        .flat_map(|call| call.names());
    let Some(first) = told.next() else {
        return Ok(());
    };
    // By which runc tells who listens.
    if first == "write" || told.any(|name| name == "write") {
        let reason = "SCMP_ACT_NOTIFY cannot be used for the write syscall";
        return Err(Error::invalid(FIELD, reason));
    }
    let reason =
        format!("SCMP_ACT_NOTIFY: {first} in a guest can't be told to a program of the host");
    Err(refuse(FIELD, reason))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn system_calls_are_not_told_to_the_host() {
        let said = |default: &str, action: &str, names: &[&str]| {
            let seccomp = json!({"defaultAction": default, "listenerPath": "/run/agent",
                "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW"},
                    {"names": names, "action": action}]});
            let seccomp = serde_json::from_value(seccomp).unwrap();
            check(&seccomp).map_err(|error| error.to_string())
        };
        let allow = "SCMP_ACT_ALLOW";
        assert_eq!(said(allow, "SCMP_ACT_ERRNO", &["write"]), Ok(()));
        for (default, names, expected) in [
            (
                allow,
                &["mkdir", "chmod"][..],
                "mkdir in a guest can't be told",
            ),
            (
                allow,
                &["mkdir", "write"],
                "cannot be used for the write syscall",
            ),
            ("SCMP_ACT_NOTIFY", &["mkdir"], "as default action"),
        ] {
            let refused = said(default, "SCMP_ACT_NOTIFY", names).unwrap_err();
            assert!(refused.contains(expected), "{refused}");
        }
    }
}
