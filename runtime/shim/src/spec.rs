//! A container's `config.json`, as far as it says what its sandbox is to be.

use crate::cgroup;
use anyhow::{Context, Result};
use koya::oci_spec::runtime::{self as oci, LinuxNamespaceType};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

pub(crate) const HOST_NETWORK: &str = "the host's network can't be a virtual machine's: give the \
                                       container a network namespace of its own";

/// What a container is to its sandbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// Its only one.
    Single,
    /// A pod's own, of which nothing runs: the sandbox is the virtual machine.
    Sandbox,
    /// One of a pod's.
    Member { sandbox: String },
}

/// A sandbox's network namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Network {
    Host,
    New,
    Path(PathBuf),
}

/// A container's `config.json`.
pub(crate) struct Spec(pub(crate) oci::Spec);

impl Spec {
    pub(crate) fn read(bundle: &Path) -> Result<Self> {
        let path = bundle.join("config.json");
        let text =
            std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let spec = serde_json::from_slice(&text);
        Ok(Self(spec.with_context(|| path.display().to_string())?))
    }

    fn annotation(&self, names: &[&str]) -> Option<&str> {
        let annotations = self.0.annotations().as_ref()?;
        names
            .iter()
            .find_map(|name| annotations.get(*name))
            .map(String::as_str)
    }

    /// By the annotations of containerd's and CRI-O's Kubernetes interface.
    pub(crate) fn role(&self, id: &str) -> Role {
        let kind = [
            "io.kubernetes.cri.container-type",
            "io.kubernetes.cri-o.ContainerType",
        ];
        let sandbox = [
            "io.kubernetes.cri.sandbox-id",
            "io.kubernetes.cri-o.SandboxID",
        ];
        match (self.annotation(&kind), self.annotation(&sandbox)) {
            (Some("sandbox"), _) => Role::Sandbox,
            (Some("container"), Some(sandbox)) if sandbox != id => Role::Member {
                sandbox: sandbox.into(),
            },
            _ => Role::Single,
        }
    }

    pub(crate) fn network(&self) -> Network {
        let namespaces = self
            .0
            .linux()
            .as_ref()
            .and_then(|linux| linux.namespaces().as_ref());
        let mut namespaces = namespaces.into_iter().flatten();
        let network = namespaces.find(|n| n.typ() == LinuxNamespaceType::Network);
        match network.map(|network| network.path()) {
            None => Network::Host,
            Some(None) => Network::New,
            Some(Some(path)) if path.as_os_str().is_empty() => Network::New,
            Some(Some(path)) => Network::Path(path.clone()),
        }
    }

    /// Bytes of memory that it may have: a pod's as Kubernetes says it, else the container's.
    pub(crate) fn memory(&self) -> Option<u64> {
        let pod = self.annotation(&["io.kubernetes.cri.sandbox-memory"]);
        let pod = pod.and_then(|text| text.parse().ok());
        let own = || {
            self.resources()?
                .memory()
                .as_ref()?
                .limit()
                .map(|limit| limit.max(0) as u64)
        };
        pod.or_else(own).filter(|bytes| *bytes > 0)
    }

    pub(crate) fn sysctls(&self) -> BTreeMap<String, String> {
        let sysctls = self
            .0
            .linux()
            .as_ref()
            .and_then(|linux| linux.sysctl().as_ref());
        sysctls
            .into_iter()
            .flatten()
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect()
    }

    /// Whole CPUs that it may use.
    pub(crate) fn cpus(&self) -> Option<u32> {
        let number = |name: &str| self.annotation(&[name])?.parse::<i64>().ok();
        let cpu = self
            .resources()
            .and_then(|resources| resources.cpu().as_ref());
        let quota = number("io.kubernetes.cri.sandbox-cpu-quota")
            .or_else(|| cpu.and_then(|cpu| cpu.quota()))?;
        let period = number("io.kubernetes.cri.sandbox-cpu-period")
            .or_else(|| cpu.and_then(|cpu| Some(cpu.period()? as i64)))
            .unwrap_or(100_000);
        if quota <= 0 || period <= 0 {
            return None;
        }
        u32::try_from((quota as u64).div_ceil(period as u64)).ok()
    }

    /// The sandbox's control group on the host.
    pub(crate) fn cgroup(&self) -> Option<PathBuf> {
        let path = self.0.linux().as_ref()?.cgroups_path().as_ref()?;
        cgroup::folder(path)
    }

    pub(crate) fn resources(&self) -> Option<&oci::LinuxResources> {
        self.0.linux().as_ref()?.resources().as_ref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn spec(value: Value) -> Spec {
        let mut all = json!({"ociVersion": "1.0.2", "root": {"path": "rootfs"}});
        all.as_object_mut()
            .unwrap()
            .extend(value.as_object().unwrap().clone());
        Spec(serde_json::from_value(all).unwrap())
    }

    #[test]
    fn annotations_say_what_a_container_is() {
        assert_eq!(spec(json!({})).role("a"), Role::Single);
        let pod = json!({"annotations": {"io.kubernetes.cri.container-type": "sandbox",
            "io.kubernetes.cri.sandbox-id": "a", "io.kubernetes.cri.sandbox-memory": "1048576",
            "io.kubernetes.cri.sandbox-cpu-quota": "150000"}});
        let pod = spec(pod);
        assert_eq!(pod.role("a"), Role::Sandbox);
        assert_eq!((pod.memory(), pod.cpus()), (Some(1 << 20), Some(2)));
        let member = json!({"annotations": {"io.kubernetes.cri-o.ContainerType": "container",
            "io.kubernetes.cri-o.SandboxID": "p"}});
        assert_eq!(
            spec(member).role("a"),
            Role::Member {
                sandbox: "p".into()
            }
        );
    }

    #[test]
    fn limits_and_networks_are_the_configurations() {
        let limited = spec(json!({"linux": {
            "resources": {"memory": {"limit": 4096}, "cpu": {"quota": 250_000, "period": 100_000}},
            "namespaces": [{"type": "network"}]}}));
        assert_eq!((limited.memory(), limited.cpus()), (Some(4096), Some(3)));
        assert_eq!(limited.network(), Network::New);
        assert_eq!(spec(json!({"linux": {}})).network(), Network::Host);
        let path = json!({"linux": {"namespaces": [{"type": "network", "path": "/n"}]}});
        assert_eq!(spec(path).network(), Network::Path("/n".into()));
        let endless = json!({"linux": {"resources": {"memory": {"limit": -1},
            "cpu": {"quota": -1, "period": 100_000}}}});
        assert_eq!(
            (spec(endless.clone()).memory(), spec(endless).cpus()),
            (None, None)
        );
    }
}
