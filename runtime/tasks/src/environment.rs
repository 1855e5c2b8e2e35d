//! The environment of a process that holds a sandbox.
//!
//! It is not that of its caller: the variables of containerd or of an engine may contain passwords of proxies and
//! registries, and a sandbox needs none of them.

use crate::hooks::Kind;
use crate::spec::Spec;
use std::env;
use std::ffi::{OsStr, OsString};

/// The variables that such a process reads, or that matter to the programs that it starts.
const NAMES: &[&str] = &[
    // The programs that it finds: mkfs, hooks, loggers.
    "PATH",
    // Directories of its data without root, and of temporary files.
    "HOME",
    "TMPDIR",
    "XDG_DATA_HOME",
    "XDG_RUNTIME_DIR",
    // From containerd: the socket for events, and core scheduling for all sandboxes.
    "TTRPC_ADDRESS",
    "SCHED_CORE",
    // Messages of a panic, and the language and time zone of programs.
    "RUST_BACKTRACE",
    "LANG",
    "LC_ALL",
    "TZ",
];

/// Koya's own variables: the log, the kernel, the agent.
const PREFIX: &str = "KOYA_";

/// The variables of this process for the process of a sandbox with this configuration. It gets all of them if it runs hooks
/// of these kinds that have no environment of their own: they have that of the process that starts them, as with runc.
pub fn environment_for(
    spec: &Spec,
    kinds: &[Kind],
) -> impl Iterator<Item = (OsString, OsString)> + use<> {
    let is_whole = spec.has_hooks_without_environment(kinds);
    env::vars_os().filter(move |(name, _)| is_whole || is_needed(name))
}

/// The variables of this process for one of a sandbox that runs no hooks.
pub fn environment() -> impl Iterator<Item = (OsString, OsString)> {
    env::vars_os().filter(|(name, _)| is_needed(name))
}

fn is_needed(name: &OsStr) -> bool {
    let name = name.to_str();
    name.is_some_and(|name| NAMES.contains(&name) || name.starts_with(PREFIX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::collections::BTreeSet;

    #[test]
    fn variables_of_the_caller_are_left_out() {
        for needed in ["PATH", "KOYA_LOG", "TTRPC_ADDRESS", "SCHED_CORE"] {
            assert!(is_needed(needed.as_ref()), "{needed}");
        }
        for other in [
            "HTTPS_PROXY",
            "AWS_SECRET_ACCESS_KEY",
            "LD_PRELOAD",
            "KOYA",
            "",
        ] {
            assert!(!is_needed(other.as_ref()), "{other}");
        }
    }

    #[test]
    fn hooks_without_an_environment_have_the_callers() {
        let of = |hook: serde_json::Value, kinds: &[Kind]| -> BTreeSet<OsString> {
            let hooks = json!({"createContainer": [hook]});
            let spec = json!({"ociVersion": "1.2.0", "hooks": hooks});
            let spec = Spec(serde_json::from_value(spec).unwrap());
            environment_for(&spec, kinds)
                .map(|(name, _)| name)
                .collect()
        };
        let has = |names: &BTreeSet<OsString>| {
            // Set by cargo for tests.
            names.contains(OsStr::new("CARGO_MANIFEST_DIR"))
        };
        let plain = json!({"path": "/bin/true"});
        assert!(has(&of(
            plain.clone(),
            &[Kind::Prestart, Kind::CreateContainer]
        )));
        assert!(!has(&of(plain, &[Kind::Prestart])));
        let own = json!({"path": "/bin/true", "env": ["A=b"]});
        assert!(!has(&of(own, &[Kind::CreateContainer])));
    }
}
