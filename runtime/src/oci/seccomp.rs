//! Seccomp filters that notify a program of the host (`SCMP_ACT_NOTIFY`) are refused: their descriptor can't leave the
//! guest. So are rules that no filter can have.

use crate::Error;
use oci_spec::runtime::{LinuxSeccomp, LinuxSeccompAction};

const FIELD: &str = "linux.seccomp";

/// Checks the rules of a filter.
///
/// # Errors
/// If it has `SCMP_ACT_NOTIFY`, in runc's wording where runc refuses it, too; or an argument that system calls don't have.
pub(super) fn check(seccomp: &LinuxSeccomp) -> Result<(), Error> {
    check_arguments(seccomp)?;
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

/// System calls have six arguments at most.
fn check_arguments(seccomp: &LinuxSeccomp) -> Result<(), Error> {
    const LAST: usize = 5;
    for call in seccomp.syscalls().iter().flatten() {
        let mut arguments = call.args().iter().flatten();
        let Some(wrong) = arguments.find(|argument| argument.index() > LAST) else {
            continue;
        };
        let names = call.names().join(", ");
        let index = wrong.index();
        let reason = format!("{names}: a rule for argument {index}, where the last one is {LAST}");
        return Err(Error::invalid(FIELD, reason));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_rule_for_an_argument_that_no_call_has_is_named() {
        let said = |index: u32| {
            let argument = json!({"index": index, "value": 1, "op": "SCMP_CMP_EQ"});
            let seccomp = json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
                {"names": ["read"], "action": "SCMP_ACT_ERRNO"},
                {"names": ["mkdir", "chmod"], "action": "SCMP_ACT_ERRNO", "args": [argument]}]});
            check(&serde_json::from_value(seccomp).unwrap()).map_err(|error| error.to_string())
        };
        assert_eq!(said(5), Ok(()));
        let refused = said(6).unwrap_err();
        assert!(
            refused.contains("mkdir, chmod: a rule for argument 6"),
            "{refused}"
        );
    }

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
