//! Namespaces: those of the container, those of the sandbox, and unsupported ones.

use super::bundle::SharedPidNamespace;
use crate::Error;
use oci_spec::runtime::{self as oci, LinuxNamespaceType, Spec};

/// Refuses a container that lacks a required namespace and would use the agent's.
///
/// # Errors
/// The missing namespace.
pub(super) fn check(spec: &Spec) -> Result<(), Error> {
    let needed = [
        (LinuxNamespaceType::Network, "network"),
        // Otherwise it would be in the agent's.
        (LinuxNamespaceType::Mount, "mount"),
    ];
    for (kind, name) in needed {
        if !all(spec).any(|n| n.typ() == kind) {
            let reason = format!(
                "the host's {name} namespace can't be a guest's: give the container one of its own"
            );
            return Err(Error::unsupported("linux.namespaces", reason));
        }
    }
    let mut kinds = Vec::new();
    for namespace in all(spec) {
        let kind = namespace.typ();
        if kinds.contains(&kind) {
            return Err(Error::invalid(
                "linux.namespaces",
                format!("duplicated ns {kind}"),
            ));
        }
        kinds.push(kind);
        // The clocks are the guest's: nothing else looks at the path.
        if let Some(path) = namespace.path()
            && kind == LinuxNamespaceType::Time
            && is_shared(namespace)
            && !path.exists()
        {
            let reason = format!("namespace {} does not exist", path.display());
            return Err(Error::invalid("linux.namespaces", reason));
        }
    }
    Ok(())
}

/// Converts a configuration's namespaces for the guest.
///
/// # Errors
/// The namespace that can't be shared.
pub(super) fn adapt(linux: &mut oci::Linux, pids: &SharedPidNamespace) -> Result<(), Error> {
    let mut namespaces = Vec::new();
    let offsets = linux.time_offsets().as_ref();
    let has_offsets = offsets.is_some_and(|offsets| !offsets.is_empty());
    for namespace in linux.namespaces().iter().flatten() {
        match namespace.typ() {
            // That of the sandbox, shared by all of its containers.
            LinuxNamespaceType::Network => continue,
            // Clocks are the guest's anyway; only offsets require a namespace.
            LinuxNamespaceType::Time if !has_offsets => continue,
            _ => {}
        }
        // A namespace shared by a path of the host is that of the guest's first process.
        let mut own = namespace.clone();
        own.set_path(match (is_shared(namespace), namespace.typ()) {
            (false, _) => None,
            (true, LinuxNamespaceType::Ipc) => Some("/proc/1/ns/ipc".into()),
            (true, LinuxNamespaceType::Uts) => Some("/proc/1/ns/uts".into()),
            // The agent fills in its path.
            (true, LinuxNamespaceType::Pid) if *pids != SharedPidNamespace::Unknown => None,
            (true, other) => {
                let reason = format!("containers can't share this {other} namespace");
                return Err(Error::unsupported("linux.namespaces", reason));
            }
        });
        namespaces.push(own);
    }
    linux.set_namespaces(Some(namespaces));
    if !has_offsets {
        // An empty list would require a namespace of clocks, which was left out.
        linux.set_time_offsets(None);
    }
    Ok(())
}

/// Whether this is an existing namespace instead of a new one.
fn is_shared(namespace: &oci::LinuxNamespace) -> bool {
    let path = namespace.path().as_ref();
    path.is_some_and(|path| !path.as_os_str().is_empty())
}

pub(super) fn all(spec: &Spec) -> impl Iterator<Item = &oci::LinuxNamespace> {
    let linux = spec.linux().as_ref();
    let all = linux.and_then(|linux| linux.namespaces().as_ref());
    all.into_iter().flatten()
}

/// Whether the container joins an existing namespace of this kind.
pub(super) fn is_joined(spec: &Spec, kind: LinuxNamespaceType) -> bool {
    all(spec).any(|n| n.typ() == kind && is_shared(n))
}
