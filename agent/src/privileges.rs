//! The last privileges that a process gives up: system calls outside its filter, and capabilities.
//!
//! libcontainer does that for a container's own process, but not for exec processes, and it has no answer for calls unknown
//! to a filter ([`enosys_filter`]).

use crate::enosys_filter;
use libcontainer::capabilities::{CapabilityExt as _, drop_privileges};
use libcontainer::seccomp::initialize_seccomp;
use libcontainer::syscall::syscall::create_syscall;
use libcontainer::workload::ExecutorError;
use oci_spec::runtime::{Capabilities, Capability, LinuxCapabilities, LinuxSeccomp, Process, Spec};
use rustix::thread::{CapabilitySet, capabilities, no_new_privs, set_capabilities};
use serde::{Deserialize, Serialize};

/// The filter, and the capabilities to keep.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Privileges {
    seccomp: Option<LinuxSeccomp>,
    capabilities: Option<LinuxCapabilities>,
}

impl Privileges {
    /// Removes the privileges that a container's own process gives up by itself from the configuration, if libcontainer
    /// would not handle all of them.
    pub(crate) fn take(spec: &mut Spec) -> Self {
        spec.process_mut().as_mut().map(complete);
        let linux = spec.linux().as_ref();
        let seccomp = linux.and_then(|linux| linux.seccomp().clone());
        let process = spec.process().as_ref();
        let wanted = process.and_then(|process| process.capabilities().as_ref());
        if !seccomp.as_ref().is_some_and(enosys_filter::concerns)
            && !wanted.is_some_and(inherits_more)
        {
            return Self::default();
        }
        if let Some(linux) = spec.linux_mut() {
            linux.set_seccomp(None);
        }
        Self {
            seccomp,
            capabilities: spec.process_mut().as_mut().and_then(take_capabilities),
        }
    }

    /// Removes the privileges of an exec process from its configuration; the filter is its container's.
    pub(crate) fn of_added(process: &mut Process, seccomp: Option<LinuxSeccomp>) -> Self {
        complete(process);
        Self {
            seccomp,
            capabilities: take_capabilities(process),
        }
    }

    /// Gives them up. Without capabilities, only a process with no_new_privs may add a filter; and a filter may prevent
    /// dropping capabilities.
    pub(crate) fn drop_all(&self) -> Result<(), ExecutorError> {
        match no_new_privs() {
            Ok(true) => {
                self.drop_capabilities()?;
                self.filter()
            }
            _ => {
                self.filter()?;
                self.drop_capabilities()
            }
        }
    }

    fn filter(&self) -> Result<(), ExecutorError> {
        let failed = |why: String| ExecutorError::Other(format!("seccomp: {why}"));
        let Some(seccomp) = &self.seccomp else {
            return Ok(());
        };
        initialize_seccomp(seccomp).map_err(|error| failed(error.to_string()))?;
        enosys_filter::install(seccomp).map_err(|error| failed(error.to_string()))
    }

    fn drop_capabilities(&self) -> Result<(), ExecutorError> {
        let Some(capabilities) = &self.capabilities else {
            return Ok(());
        };
        let failed = |why: String| ExecutorError::Other(format!("capabilities: {why}"));
        if let Some(inheritable) = capabilities.inheritable() {
            inherit(inheritable).map_err(|error| failed(error.to_string()))?;
        }
        drop_privileges(capabilities, create_syscall().as_ref())
            .map_err(|error| failed(error.to_string()))
    }

    /// Runs `work` with the access rights to files that will be left.
    pub(crate) fn with_dropped_privileges<T>(&self, work: impl FnOnce() -> T) -> T {
        let Some((wanted, own)) = self.capabilities.as_ref().zip(capabilities(None).ok()) else {
            return work();
        };
        let kept = wanted.effective().iter().flatten();
        let kept: Vec<_> = kept.collect();
        let mut fewer = own;
        for (capability, bit) in [
            (Capability::DacOverride, CapabilitySet::DAC_OVERRIDE),
            (Capability::DacReadSearch, CapabilitySet::DAC_READ_SEARCH),
        ] {
            if !kept.contains(&&capability) {
                fewer.effective.remove(bit);
            }
        }
        set_capabilities(None, fewer).ok();
        let done = work();
        set_capabilities(None, own).ok();
        done
    }
}

/// Sets of capabilities that are not given are empty, as with runc. libcontainer leaves those of the process as they are, and
/// can then not make the permitted ones fewer than the effective ones.
fn complete(process: &mut Process) {
    let Some(mut sets) = process.capabilities().clone() else {
        return;
    };
    let complete = |set: &Option<Capabilities>| Some(set.clone().unwrap_or_default());
    sets.set_bounding(complete(sets.bounding()));
    sets.set_effective(complete(sets.effective()));
    sets.set_permitted(complete(sets.permitted()));
    sets.set_inheritable(complete(sets.inheritable()));
    sets.set_ambient(complete(sets.ambient()));
    process.set_capabilities(Some(sets));
}

/// Whether there are inheritable capabilities that are not permitted. libcontainer could not set them after it has dropped
/// the others.
fn inherits_more(capabilities: &LinuxCapabilities) -> bool {
    let permitted = capabilities.permitted().iter().flatten();
    let permitted: Vec<_> = permitted.collect();
    let mut inheritable = capabilities.inheritable().iter().flatten();
    inheritable.any(|capability| !permitted.contains(&capability))
}

/// Sets the inheritable capabilities of this process, which still has all of them.
fn inherit<'a>(wanted: impl IntoIterator<Item = &'a Capability>) -> rustix::io::Result<()> {
    let bit = |capability: &Capability| 1 << capability.to_cap().index();
    let bits = wanted.into_iter().fold(0, |bits, one| bits | bit(one));
    let mut sets = capabilities(None)?;
    sets.inheritable = CapabilitySet::from_bits_retain(bits);
    set_capabilities(None, sets)
}

/// Removes the capabilities from a configuration; libcontainer then does not change those of the process.
fn take_capabilities(process: &mut Process) -> Option<LinuxCapabilities> {
    let capabilities = process.capabilities().clone();
    process.set_capabilities(None);
    capabilities
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn spec(action: &str) -> Spec {
        serde_json::from_value(json!({
            "ociVersion": "1.2.0",
            "process": {"cwd": "/", "user": {"uid": 0, "gid": 0}, "capabilities": {"bounding": ["CAP_KILL"]}},
            "linux": {"seccomp": {"defaultAction": action,
                "syscalls": [{"names": ["write"], "action": "SCMP_ACT_ALLOW"}]}},
        }))
        .unwrap()
    }

    #[test]
    fn libcontainer_keeps_what_it_does_as_well() {
        let mut simple = spec("SCMP_ACT_ALLOW");
        assert_eq!(Privileges::take(&mut simple), Privileges::default());
        let process = simple.process().as_ref().unwrap();
        let sets = process.capabilities().as_ref().unwrap();
        assert_eq!(sets.bounding().as_ref().unwrap().len(), 1);
        for set in [
            sets.effective(),
            sets.permitted(),
            sets.inheritable(),
            sets.ambient(),
        ] {
            assert_eq!(set, &Some(Default::default()), "not given: empty");
        }
        let mut strict = spec("SCMP_ACT_ERRNO");
        let taken = Privileges::take(&mut strict);
        assert!(taken.seccomp.is_some() && taken.capabilities.is_some());
        let linux = strict.linux().as_ref();
        assert_eq!(linux.unwrap().seccomp(), &None);
        let process = strict.process().as_ref();
        assert_eq!(process.unwrap().capabilities(), &None);
        let mut inherits = spec("SCMP_ACT_ALLOW");
        let process = inherits.process_mut().as_mut().unwrap();
        process.set_capabilities(Some(
            serde_json::from_value(json!({"inheritable": ["CAP_KILL"], "permitted": []})).unwrap(),
        ));
        assert!(Privileges::take(&mut inherits).capabilities.is_some());
        let mut added = spec("SCMP_ACT_ALLOW").process().clone().unwrap();
        let taken = Privileges::of_added(&mut added, None).capabilities.unwrap();
        assert!(taken.bounding().is_some() && added.capabilities().is_none());
    }
}
