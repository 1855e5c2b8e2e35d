//! Namespaces: which are the container's own, which the sandbox's, and which can't be had.

use super::{SharedPids, refuse};
use crate::Error;
use oci_spec::runtime::{self as oci, LinuxNamespaceType, Spec};

/// Refuses a container without a namespace of its own where it would have the agent's.
///
/// # Errors
/// Which it lacks.
pub(super) fn check(spec: &Spec) -> Result<(), Error> {
    let needed = [
        (LinuxNamespaceType::Network, "network"),
        // Without one it would be in the agent's.
        (LinuxNamespaceType::Mount, "mount"),
    ];
    for (kind, name) in needed {
        if !all(spec).any(|n| n.typ() == kind) {
            let reason = format!(
                "the host's {name} namespace can't be a guest's: give the container one of its own"
            );
            return Err(refuse("linux.namespaces", reason));
        }
    }
    Ok(())
}

/// Makes the host's namespaces the guest's.
///
/// # Errors
/// Which can't be shared.
pub(super) fn adapt(linux: &mut oci::Linux, pids: &SharedPids) -> Result<(), Error> {
    let mut namespaces = Vec::new();
    let offsets = linux.time_offsets().as_ref();
    let has_offsets = offsets.is_some_and(|offsets| !offsets.is_empty());
    for namespace in linux.namespaces().iter().flatten() {
        match namespace.typ() {
            // The sandbox's own, which all of its containers share.
            LinuxNamespaceType::Network => continue,
            // A clock is a guest's anyway, unless it is to show another time.
            LinuxNamespaceType::Time if !has_offsets => continue,
            _ => {}
        }
        // What containers share by a path of the host is the guest's own, which its first process has.
        let mut own = namespace.clone();
        own.set_path(match (is_shared(namespace), namespace.typ()) {
            (false, _) => None,
            (true, LinuxNamespaceType::Ipc) => Some("/proc/1/ns/ipc".into()),
            (true, LinuxNamespaceType::Uts) => Some("/proc/1/ns/uts".into()),
            // The agent knows its path.
            (true, LinuxNamespaceType::Pid) if *pids != SharedPids::Unknown => None,
            (true, other) => {
                let reason = format!("containers can't share this {other} namespace");
                return Err(refuse("linux.namespaces", reason));
            }
        });
        namespaces.push(own);
    }
    linux.set_namespaces(Some(namespaces));
    Ok(())
}

/// Whether a namespace is one that exists, and not the container's own.
fn is_shared(namespace: &oci::LinuxNamespace) -> bool {
    let path = namespace.path().as_ref();
    path.is_some_and(|path| !path.as_os_str().is_empty())
}

pub(super) fn all(spec: &Spec) -> impl Iterator<Item = &oci::LinuxNamespace> {
    let linux = spec.linux().as_ref();
    let all = linux.and_then(|linux| linux.namespaces().as_ref());
    all.into_iter().flatten()
}

/// Whether it has one that exists.
pub(super) fn is_joined(spec: &Spec, kind: LinuxNamespaceType) -> bool {
    all(spec).any(|n| n.typ() == kind && is_shared(n))
}
