//! A bundle's `config.json`: the parts that determine a task and its sandbox.

use crate::Error;
use crate::cgroup;
use crate::default_users;
use crate::hooks;
use crate::memory_policy;
use crate::namespaces::{self, Network};
use crate::oci_compat;
use crate::role::{DOCKERS_NAMESPACE, Role, drop_pod_annotations};
use crate::size::{Limits, PERIOD, milli_cpus, milli_cpus_of_set};
use anyhow::{Context, anyhow};
use koya::block_volume::BlockVolume;
use koya::oci_spec::runtime::{self as oci, LinuxNamespaceType};
use koya::{Bundle, HostView, Settings, SharedNamespaces, read_small_file};
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};

/// Address of Docker's own name server.
const DOCKERS_NAMES: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 11));

/// Maximum size of a `/etc/resolv.conf` in which the name server is looked for. No real one is larger.
const MAX_RESOLVER: u64 = 64 << 10;

/// A container's `config.json`.
pub struct Spec(pub(crate) oci::Spec);

impl Spec {
    /// Reads it from a bundle.
    ///
    /// # Errors
    /// If it is missing or invalid.
    pub fn read(bundle: &Path) -> Result<Self, Error> {
        Self::read_file(&bundle.join("config.json"))
    }

    /// Reads it from a file. A new user namespace without mappings gets those of the caller, as with crun.
    ///
    /// # Errors
    /// If it is missing or invalid.
    pub fn read_file(path: &Path) -> Result<Self, Error> {
        let text =
            std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        // Before the library's own errors about modes and flags.
        memory_policy::check(&text).with_context(|| path.display().to_string())?;
        let spec = oci_compat::read_spec(&text);
        let mut spec = spec.with_context(|| path.display().to_string())?;
        default_users::fill_in(&mut spec);
        Ok(Self(spec))
    }

    /// Validates the configuration by itself: what is not supported, and what is invalid whatever the guest is like.
    ///
    /// # Errors
    /// The part, by name.
    pub fn check(&self) -> Result<(), Error> {
        self.check_root()?;
        let mut guests = Self(self.0.clone());
        hooks::check(&guests.take_host_hooks())?;
        Ok(koya::check_configuration(&guests.0)?)
    }

    /// Checks that the configuration names a root file system.
    ///
    /// # Errors
    /// If it does not.
    pub(crate) fn check_root(&self) -> Result<(), Error> {
        let root = self.0.root().as_ref();
        match root.is_some_and(|root| !root.path().as_os_str().is_empty()) {
            true => Ok(()),
            false => Err(anyhow!("root: it is missing").into()),
        }
    }

    /// The value of an annotation.
    pub fn annotation(&self, name: &str) -> Option<&str> {
        self.0.annotations().as_ref()?.get(name).map(String::as_str)
    }

    /// The role of the container with this ID, from the annotations of containerd's and CRI-O's Kubernetes interface. podman sets
    /// them too, with a pod's name as the sandbox: its pods are recognized by their shared namespaces.
    pub fn role(&self, id: &str) -> Role {
        Role::of(&self.0, id)
    }

    /// Reads it from the bundle of a container in a namespace of containerd. In Docker's, it is of no pod, whatever its
    /// annotations say.
    ///
    /// # Errors
    /// If it is missing or invalid.
    pub fn read_of(bundle: &Path, namespace: &str) -> Result<Self, Error> {
        let mut spec = Self::read(bundle)?;
        if namespace == DOCKERS_NAMESPACE {
            drop_pod_annotations(&mut spec.0);
        }
        Ok(spec)
    }

    /// Adds a mount for each block volume requested by its annotations.
    pub(crate) fn add_block_volumes(&mut self, settings: &Settings) -> Result<(), Error> {
        let volumes = settings.block_volumes(self.0.annotations().as_ref())?;
        if !volumes.is_empty() {
            let mut mounts = self.0.mounts().clone().unwrap_or_default();
            mounts.extend(volumes.iter().map(BlockVolume::mount));
            self.0.set_mounts(Some(mounts));
        }
        Ok(())
    }

    pub(crate) fn network(&self) -> Network {
        Network::of(&self.0)
    }

    /// Adds variables to the environment of its process.
    pub fn add_environment(&mut self, added: Vec<String>) {
        if let Some(process) = self.0.process_mut()
            && !added.is_empty()
        {
            let mut all = process.env().clone().unwrap_or_default();
            all.extend(added);
            process.set_env(Some(all));
        }
    }

    /// Moves the calling thread, the only one of its process, into the namespaces of the container's sandbox: a new mount
    /// namespace, and its network namespace, together with the container's network devices.
    ///
    /// # Errors
    /// The namespace that can't be entered, or the device that can't be moved.
    pub fn enter_namespaces(&self) -> Result<(), Error> {
        Ok(namespaces::enter(&self.0)?)
    }

    /// Moves the calling thread, the only one of its process, into the network namespace of another container, for a process
    /// that represents a container in the other one's sandbox; its network devices are moved there, too.
    ///
    /// # Errors
    /// If it can't be entered, or the device that can't be moved.
    pub fn enter_network_of_another(&self) -> Result<(), Error> {
        Ok(namespaces::enter_named(&self.0)?)
    }

    /// The name server of Docker's user-defined networks, if the container uses it: on the loopback of its network namespace
    /// on the host.
    pub(crate) fn name_server(&self) -> Option<IpAddr> {
        let mut mounts = self.0.mounts().iter().flatten();
        let own = |mount: &&oci::Mount| mount.destination() == Path::new("/etc/resolv.conf");
        let source = mounts.rfind(own)?.source().as_ref()?;
        // The author of the configuration may not own the file: it may be anything.
        let text = read_small_file(source, MAX_RESOLVER).ok()?;
        let text = String::from_utf8_lossy(&text);
        let servers = text
            .lines()
            .filter_map(|line| line.trim().strip_prefix("nameserver"));
        let mut servers = servers.filter_map(|address| address.trim().parse().ok());
        servers.find(|address| *address == DOCKERS_NAMES)
    }

    /// Its limits: for a pod those set by Kubernetes, otherwise the container's own.
    pub(crate) fn limits(&self) -> Limits {
        let is_pod = self.role("") == Role::Sandbox;
        // Whoever may set annotations of a container may not set the size of its machine.
        let said = |name: &str| self.annotation(name).filter(|_| is_pod);
        let number = |name: &str| said(name)?.parse::<i64>().ok();
        let memory = number("io.kubernetes.cri.sandbox-memory");
        let period = number("io.kubernetes.cri.sandbox-cpu-period");
        let period = period.and_then(|period| u64::try_from(period).ok());
        let quota = number("io.kubernetes.cri.sandbox-cpu-quota");
        let said = Limits {
            memory: memory.and_then(|bytes| u64::try_from(bytes).ok()),
            milli_cpus: quota.and_then(|quota| milli_cpus(quota, period.unwrap_or(PERIOD))),
        };
        let limits = Limits {
            memory: said.memory.filter(|bytes| *bytes > 0),
            ..said
        };
        let limits = limits.or(self.resources());
        // Those of Kubernetes are shared with other pods, unless there is a quota, too.
        let set = self.resources().filter(|_| self.role("") == Role::Single);
        let set = set.and_then(milli_cpus_of_set);
        Limits {
            milli_cpus: limits.milli_cpus.or(set),
            ..limits
        }
    }

    /// The process whose pid namespace it shares, from a path in /proc.
    pub(crate) fn pids_of(&self) -> Option<u32> {
        let linux = self.0.linux().as_ref()?;
        let mut namespaces = linux.namespaces().iter().flatten();
        let pid = namespaces.find(|n| n.typ() == LinuxNamespaceType::Pid)?;
        let path = pid.path().as_ref()?.to_str()?;
        let number = path.strip_prefix("/proc/")?.strip_suffix("/ns/pid")?;
        number.parse().ok()
    }

    /// The first kind of namespace that it would share with processes of the host, of those that only containers of one
    /// virtual machine can share.
    pub(crate) fn shared_namespace(&self) -> Option<LinuxNamespaceType> {
        let linux = self.0.linux().as_ref()?;
        let mut namespaces = linux.namespaces().iter().flatten();
        let shared = namespaces.find(|namespace| {
            use LinuxNamespaceType::{Ipc, Pid, Uts};
            let path = namespace.path().as_ref();
            matches!(namespace.typ(), Pid | Ipc | Uts)
                && path.is_some_and(|path| !path.as_os_str().is_empty())
        });
        shared.map(|namespace| namespace.typ())
    }

    /// Rows and columns of the terminal, if configured.
    pub fn console_size(&self) -> Option<(u64, u64)> {
        let size = self.0.process().as_ref()?.console_size()?;
        Some((size.height(), size.width()))
    }

    /// The processes of the host whose namespaces it shares by `/proc/PID/ns/...`, with the kinds of namespaces.
    pub fn named_processes(&self) -> Vec<(LinuxNamespaceType, u32)> {
        let linux = self.0.linux().as_ref();
        let namespaces = linux.and_then(|linux| linux.namespaces().as_ref());
        let named = namespaces.into_iter().flatten().filter_map(|namespace| {
            let path = namespace.path().as_ref()?.to_str()?;
            let (pid, _) = path.strip_prefix("/proc/")?.split_once("/ns/")?;
            Some((namespace.typ(), pid.parse().ok()?))
        });
        named.collect()
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

    /// Removes the hooks that run on the host from the configuration, and returns them; the others run in the guest.
    pub fn take_host_hooks(&mut self) -> oci::Hooks {
        let mut host = oci::Hooks::default();
        if let Some(hooks) = self.0.hooks_mut() {
            host.set_prestart(hooks.prestart().clone());
            host.set_create_runtime(hooks.create_runtime().clone());
            host.set_create_container(hooks.create_container().clone());
            host.set_poststart(hooks.poststart().clone());
            host.set_poststop(hooks.poststop().clone());
            hooks.set_prestart(None);
            hooks.set_create_runtime(None);
            hooks.set_create_container(None);
            hooks.set_poststart(None);
            hooks.set_poststop(None);
        }
        host
    }

    /// Whether it has hooks of these kinds that name no environment.
    pub(crate) fn has_hooks_without_environment(&self, kinds: &[hooks::Kind]) -> bool {
        let Some(all) = self.0.hooks() else {
            return false;
        };
        let mut hooks = kinds.iter().flat_map(|kind| kind.of(all));
        hooks.any(|hook| hook.env().is_none())
    }

    /// Removes the hooks that another process runs on the host; the sandbox's process runs createContainer hooks.
    pub fn drop_hooks_of_others(&mut self) {
        let host = self.take_host_hooks();
        if let Some(hooks) = self.0.hooks_mut() {
            hooks.set_create_container(host.create_container().clone());
        }
    }

    /// The container's state, as passed to hooks and clients of OCI runtimes. `pid` is the PID on the host that represents
    /// it.
    pub fn state(
        &self,
        id: &str,
        bundle: &Path,
        status: oci::ContainerState,
        pid: Option<u32>,
    ) -> oci::State {
        let mut state = oci::State::default();
        state.set_version(self.0.version().clone());
        state.set_id(id.into());
        state.set_status(status);
        state.set_pid(pid.and_then(|pid| i32::try_from(pid).ok()));
        state.set_bundle(bundle.into());
        state.set_annotations(self.0.annotations().clone());
        state
    }

    /// The sysctls of its network namespace. For a single container they are kernel parameters of the guest.
    pub(crate) fn network_sysctls(&self) -> BTreeMap<String, String> {
        let mut sysctls = self.sysctls();
        sysctls.retain(|name, _| is_network_sysctl(name));
        sysctls
    }

    /// The configuration without these sysctls.
    pub(crate) fn without_network_sysctls(&self) -> oci::Spec {
        let mut spec = self.0.clone();
        if let Some(linux) = spec.linux_mut()
            && let Some(sysctls) = linux.sysctl_mut()
        {
            sysctls.retain(|name, _| !is_network_sysctl(name));
        }
        spec
    }

    /// What tools of the host are shown of the container's files.
    pub fn files(&self, bundle: &Path) -> Files {
        Files(Bundle {
            spec: self.0.clone(),
            directory: bundle.into(),
            rootfs: self.root(bundle).unwrap_or_default(),
            shared: SharedNamespaces::default(),
        })
    }

    /// The container's root in its bundle.
    pub(crate) fn root(&self, bundle: &Path) -> Option<PathBuf> {
        let root = self.0.root().as_ref()?;
        Some(bundle.join(root.path()))
    }

    /// The sandbox's control group on the host.
    pub fn cgroup(&self) -> Option<PathBuf> {
        let path = self.0.linux().as_ref()?.cgroups_path().as_ref()?;
        cgroup::directory(path)
    }

    /// Sets the sandbox's control group, if the configuration names none.
    pub fn default_cgroup(&mut self, name: &str) {
        let mut linux = self.0.linux().clone().unwrap_or_default();
        let named = linux.cgroups_path().as_ref();
        if named.is_none_or(|path| path.as_os_str().is_empty()) {
            linux.set_cgroups_path(Some(Path::new("/").join(name)));
            self.0.set_linux(Some(linux));
        }
    }

    /// Removes the sandbox's control group: its process stays in that of its caller.
    pub fn drop_cgroup(&mut self) {
        if let Some(linux) = self.0.linux_mut() {
            linux.set_cgroups_path(None);
        }
    }

    /// Sets the adjustment of its process's OOM score, if the configuration has none.
    pub fn default_oom_score_adj(&mut self, adjustment: i32) {
        if let Some(process) = self.0.process_mut()
            && process.oom_score_adj().is_none()
        {
            process.set_oom_score_adj(Some(adjustment));
        }
    }

    /// Replaces the supplementary groups of its process by groups of the caller, as its user namespace has them: those that it
    /// does not have are left out.
    pub fn set_groups(&mut self, mut groups: Vec<u32>) {
        let linux = self.0.linux().as_ref();
        let mappings = linux.and_then(|linux| linux.gid_mappings().as_ref());
        if let Some(mappings) = mappings.filter(|mappings| !mappings.is_empty()) {
            let within = |mapping: &oci::LinuxIdMapping, gid: u32| {
                let offset = gid.checked_sub(mapping.host_id())?;
                (offset < mapping.size()).then(|| mapping.container_id().checked_add(offset))?
            };
            let mapped = |gid| mappings.iter().find_map(|mapping| within(mapping, gid));
            groups = groups.into_iter().filter_map(mapped).collect();
        }
        if let Some(process) = self.0.process_mut() {
            process.user_mut().set_additional_gids(Some(groups));
        }
    }

    /// The whole configuration.
    pub fn config(&self) -> &oci::Spec {
        &self.0
    }

    /// The AppArmor profile of its process.
    pub(crate) fn apparmor_profile(&self) -> Option<String> {
        let profile = self.0.process().as_ref()?.apparmor_profile().clone();
        profile.filter(|name| !name.is_empty())
    }

    /// The SELinux label of its process.
    pub fn selinux_label(&self) -> Option<&str> {
        let label = self.0.process().as_ref()?.selinux_label().as_deref();
        label.filter(|label| !label.is_empty())
    }

    pub(crate) fn resources(&self) -> Option<&oci::LinuxResources> {
        self.0.linux().as_ref()?.resources().as_ref()
    }
}

/// A container's files, for tools of the host ([`HostView`]).
#[derive(Debug)]
pub struct Files(pub(crate) Bundle);

impl Files {
    /// Shows them by the calling thread; the log says why not.
    pub(crate) fn show(&self) -> Option<HostView> {
        let view = HostView::enter(&self.0);
        let warn = |error| {
            log::warn!("tools of the host (podman cp, nsenter) find the host's files: {error}");
        };
        view.map_err(warn).ok()
    }
}

/// Whether a kernel parameter is one of a network namespace. A name may be written in both forms of sysctl(8).
pub fn is_network_sysctl(name: &str) -> bool {
    name.starts_with("net.") || name.starts_with("net/")
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
        let limits = pod.limits();
        assert_eq!(
            (limits.memory, limits.milli_cpus),
            (Some(1 << 20), Some(1500))
        );
        let user = spec(
            json!({"annotations": {"io.kubernetes.cri.sandbox-memory": "1048576"},
            "linux": {"resources": {"memory": {"limit": 4096}}}}),
        );
        assert_eq!(user.limits().memory, Some(4096));
        let claimed = json!({"annotations": {"io.kubernetes.cri.container-type": "sandbox"}});
        let mut claimed = spec(claimed);
        drop_pod_annotations(&mut claimed.0);
        assert_eq!(claimed.role("a"), Role::Single);
        let member = json!({"annotations": {"io.kubernetes.cri-o.ContainerType": "container",
            "io.kubernetes.cri-o.SandboxID": "p"}});
        assert_eq!(
            spec(member).role("a"),
            Role::Member {
                sandbox: "p".into()
            }
        );
        let podmans = json!({"annotations": {"io.kubernetes.cri-o.ContainerType": "container",
            "io.kubernetes.cri-o.SandboxID": "p", "io.container.manager": "libpod"}});
        assert_eq!(spec(podmans).role("a"), Role::Single);
    }

    #[test]
    fn the_name_server_of_dockers_networks_is_known_by_its_address() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let of = |text: &str| {
            std::fs::write(&file, text).unwrap();
            let mount = json!({"destination": "/etc/resolv.conf", "source": file.path()});
            spec(json!({"mounts": [mount]})).name_server()
        };
        let known = of("# made by docker\nsearch a\nnameserver 127.0.0.11\noptions ndots:0\n");
        assert_eq!(known, Some(DOCKERS_NAMES));
        assert_eq!(of("nameserver 127.0.0.1\nnameserver 9.9.9.9\n"), None);
        assert_eq!(of("#nameserver 127.0.0.11\n"), None);
        assert_eq!(spec(json!({})).name_server(), None);
        // It is not read without a limit.
        file.as_file().set_len(100_000_000_000).unwrap();
        let mount = json!({"destination": "/etc/resolv.conf", "source": file.path()});
        assert_eq!(spec(json!({"mounts": [mount]})).name_server(), None);
    }

    #[test]
    fn namespaces_are_the_configurations() {
        let of = |namespaces: Value| spec(json!({"linux": {"namespaces": namespaces}}));
        assert_eq!(of(json!([{"type": "network"}])).network(), Network::New);
        assert_eq!(of(json!([])).network(), Network::Host);
        let path = of(json!([{"type": "network", "path": "/n"}]));
        assert_eq!(path.network(), Network::Path("/n".into()));
        let pids = of(json!([{"type": "pid", "path": "/proc/77/ns/pid"}]));
        assert_eq!(pids.pids_of(), Some(77));
        assert_eq!(
            pids.named_processes(),
            [(LinuxNamespaceType::Pid, 77)],
            "of another's"
        );
        let files = of(json!([{"type": "network", "path": "/run/netns/a"}, {"type": "ipc"}]));
        assert!(files.named_processes().is_empty());
        assert_eq!(of(json!([{"type": "pid"}])).pids_of(), None);

        // Docker's `--ipc container:NAME` names a process, other engines a file.
        let ipc = json!([{"type": "uts"}, {"type": "ipc", "path": "/run/ipcns/a"}]);
        assert_eq!(of(ipc).shared_namespace(), Some(LinuxNamespaceType::Ipc));
        assert_eq!(pids.shared_namespace(), Some(LinuxNamespaceType::Pid));
        assert_eq!(files.shared_namespace(), None);
    }

    /// podman and Docker set some for the network of each container.
    #[test]
    fn sysctls_of_the_network_are_the_guests() {
        let spec = spec(
            json!({"linux": {"sysctl": {"net.ipv4.ping_group_range": "0 0", "kernel.msgmax": "65536"}}}),
        );
        let network: Vec<_> = spec.network_sysctls().into_keys().collect();
        assert_eq!(network, ["net.ipv4.ping_group_range"]);
        let left = Spec(spec.without_network_sysctls()).sysctls();
        assert_eq!(left.into_keys().collect::<Vec<_>>(), ["kernel.msgmax"]);
    }

    #[test]
    fn hooks_of_the_host_are_taken_out() {
        let hook = json!([{"path": "/bin/true"}]);
        let hooks =
            json!({"hooks": {"prestart": hook, "createContainer": hook, "startContainer": hook}});
        let mut others = spec(hooks.clone());
        others.drop_hooks_of_others();
        let left = others.config().hooks().as_ref().unwrap();
        assert!(left.prestart().is_none() && left.create_container().is_some());
        let mut spec = spec(hooks);
        let host = spec.take_host_hooks();
        assert!(host.create_container().is_some() && host.start_container().is_none());
        let left = spec.config().hooks().as_ref().unwrap();
        assert!(left.create_container().is_none() && left.start_container().is_some());
    }

    #[test]
    fn a_control_group_is_named_or_the_default() {
        let path = |spec: &Spec| spec.config().linux().as_ref()?.cgroups_path().clone();
        let mut unnamed = spec(json!({}));
        unnamed.default_cgroup("koya/c");
        assert_eq!(path(&unnamed), Some("/koya/c".into()));
        let mut empty = spec(json!({"linux": {"cgroupsPath": ""}}));
        empty.default_cgroup("koya/c");
        assert_eq!(path(&empty), Some("/koya/c".into()));
        let mut named = spec(json!({"linux": {"cgroupsPath": "/a"}}));
        named.default_cgroup("koya/c");
        assert_eq!(path(&named), Some("/a".into()));
    }

    #[test]
    fn groups_of_the_caller_are_those_that_the_container_has_for_them() {
        let groups = |linux: Value| {
            let process = json!({"cwd": "/", "user": {"uid": 0, "gid": 0, "additionalGids": [1]}});
            let mut spec = spec(json!({"process": process, "linux": linux}));
            spec.set_groups(vec![2, 9, 65_534]);
            let process = spec.0.process().as_ref().unwrap();
            process.user().additional_gids().clone().unwrap()
        };
        assert_eq!(groups(json!({})), [2, 9, 65_534]);
        let mappings = json!([
            {"containerID": 0, "hostID": 1, "size": 9},
            {"containerID": 9, "hostID": 0, "size": 1},
        ]);
        assert_eq!(groups(json!({"gidMappings": mappings})), [1, 8]);
    }
}
