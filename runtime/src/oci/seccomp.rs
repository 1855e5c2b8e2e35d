//! Seccomp filters that notify a program of the host (`SCMP_ACT_NOTIFY`) are refused: their descriptor can't leave the
//! guest.

use crate::Error;
use oci_spec::runtime::{LinuxSeccomp, LinuxSeccompAction};

/// Checks the actions of a filter.
///
/// # Errors
/// If it has `SCMP_ACT_NOTIFY`; in runc's wording where runc refuses it, too.
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
    // runc itself needs write(2) to report the listener.
    if first == "write" || told.any(|name| name == "write") {
        let reason = "SCMP_ACT_NOTIFY cannot be used for the write syscall";
        return Err(Error::invalid(FIELD, reason));
    }
    let reason =
        format!("SCMP_ACT_NOTIFY: a program of the host can't be notified of {first} in a guest");
    Err(Error::unsupported(FIELD, reason))
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
            (allow, &["mkdir", "chmod"][..], "can't be notified of mkdir"),
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
