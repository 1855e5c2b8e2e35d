//! What a sandbox is to be.

use crate::network::NetworkConfig;
use crate::timeline::Keep;
use crate::{Cache, Error};
use koya_vmm::{DiskConfig, HugePages, MemoryBacking};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// What a sandbox's virtual machine has.
#[derive(Clone, Debug)]
pub struct SandboxConfig {
    /// Virtual CPUs at the start, 1 to 32. Default: 1.
    pub cpus: u32,
    /// Virtual CPUs that it may have while it runs. Default: as `cpus`.
    pub cpus_max: Option<u32>,
    /// The host's CPU for each virtual CPU; see [`VmConfig::cpu_pins`](koya_vmm::VmConfig::cpu_pins). Default: none.
    pub cpu_pins: Vec<u32>,
    /// Memory at the start in MiB, as the guest's programs see it (`MemTotal`): what the guest's
    /// kernel keeps for itself comes on top. Default: 256.
    pub memory_mib: u64,
    /// What it may grow to while it runs. Default: as `memory_mib`.
    pub memory_max_mib: Option<u64>,
    /// Whose memory it is on the host.
    pub memory_backing: MemoryBacking,
    /// The pages that it is made of on the host.
    pub huge_pages: HugePages,
    /// The guest's disks; a container has those that its own configuration names.
    pub disks: Vec<DiskConfig>,
    /// Slots for disks that come while it runs, up to 16. Default: 4.
    pub disk_slots: u32,
    /// The guest's networks, set up in the network namespace of the thread that starts the sandbox.
    /// Default: none but the guest's own loopback.
    pub networks: Vec<NetworkConfig>,
    /// What the guest may remember of shared files.
    pub cache: Cache,
    /// The Unix socket by which processes of the host reach vsock ports of the guest; see
    /// [`UnixSockets`](koya_vmm::devices::vsock::UnixSockets). Default: none.
    pub vsock: Option<PathBuf>,
    /// Whether processes of containers may open vsock sockets (AF_VSOCK). Koya's guest kernel refuses them
    /// otherwise, to privileged containers too. Default: only where there is a socket by `vsock`.
    pub containers_vsock: bool,
    /// The guest's own host name, which containers that share its uts namespace have: letters, digits,
    /// `-`, `.` and `_`, at most 64. Default: the kernel's.
    pub hostname: Option<String>,
    /// The guest kernel's settings by their names (`net.ipv4.ip_unprivileged_port_start`), which all of
    /// its containers have where they have no namespace of their own for them. Default: any user may serve port 80, and
    /// ping (`net.ipv4.ip_unprivileged_port_start`, `net.ipv4.ping_group_range`).
    pub sysctls: BTreeMap<String, String>,
    /// The AppArmor profile of the threads that run the guest and serve its devices; `unconfined` is
    /// none. What they open has to be in it: the host's devices, the guest's kernel and initramfs, and
    /// shared files by their paths in their file systems (with the profile's flag `attach_disconnected`).
    /// Default: that of the thread that starts the sandbox.
    pub apparmor_profile: Option<String>,
    /// Whether the threads that run the guest and serve its devices are confined: seccomp filters, and no
    /// capabilities but those that serving files takes ([`koya_vmm::VmBuilder::confined`]). Default: yes.
    pub confined: bool,
    /// The guest kernel; looked for if none is given.
    pub kernel: Option<PathBuf>,
    /// The agent's initramfs; looked for if none is given.
    pub initramfs: Option<PathBuf>,
    /// Words for the guest kernel's command line. Default: "quiet".
    pub cmdline: String,
    /// Has the start's timeline written down on the host. Default: no.
    pub timeline: Option<Keep>,
}

impl Default for SandboxConfig {
    fn default() -> Self {
        Self {
            cpus: 1,
            cpus_max: None,
            cpu_pins: Vec::new(),
            memory_mib: 256,
            memory_max_mib: None,
            memory_backing: MemoryBacking::default(),
            huge_pages: HugePages::default(),
            disks: Vec::new(),
            disk_slots: 4,
            networks: Vec::new(),
            cache: Cache::default(),
            vsock: None,
            containers_vsock: false,
            hostname: None,
            sysctls: SYSCTLS
                .map(|(name, value)| (name.into(), value.into()))
                .into(),
            apparmor_profile: None,
            confined: true,
            kernel: None,
            initramfs: None,
            cmdline: "quiet".into(),
            timeline: None,
        }
    }
}

/// As other engines have it where the network is a container's own: any user may serve port 80, and ping.
const SYSCTLS: [(&str, &str); 2] = [
    ("net.ipv4.ip_unprivileged_port_start", "0"),
    ("net.ipv4.ping_group_range", "0 2147483647"),
];

impl SandboxConfig {
    /// The kernel's parameters that somebody asked for: one that it does not have is an error then.
    pub(crate) fn asked_sysctls(&self) -> BTreeMap<String, String> {
        let mut asked = self.sysctls.clone();
        asked.retain(|name, value| !SYSCTLS.contains(&(name, value)));
        asked
    }

    pub(crate) fn whole_cmdline(&self) -> Result<String, Error> {
        let mut words = String::new();
        if self.containers_vsock || self.vsock.is_some() {
            words += " vsock.containers=1";
        }
        // Other letters could say anything to the kernel.
        for (name, value) in &self.sysctls {
            let proper = |c: char| c.is_ascii_alphanumeric() || "-._/".contains(c);
            let plain = |c: char| c == ' ' || c == '\t' || c.is_ascii_graphic() && c != '"';
            if name.is_empty() || !name.chars().all(proper) || !value.chars().all(plain) {
                let reason = format!("{name:?} can't be set to {value:?}");
                return Err(Error::invalid("sysctl", reason));
            }
            words += &format!(" sysctl.{name}=\"{value}\"");
        }
        if let Some(name) = &self.hostname {
            let proper = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
            if name.is_empty() || name.len() > 64 || !name.chars().all(proper) {
                return Err(Error::invalid(
                    "hostname",
                    format!("{name:?} is no host name"),
                ));
            }
            words += &format!(" hostname={name}");
        }
        // Of two values of one parameter the later one counts.
        Ok(format!("{words} {}", self.cmdline).trim_start().to_owned())
    }

    /// How many files the guest may remember: its kernel takes a KiB of its memory for each.
    pub(crate) fn max_nodes(&self) -> usize {
        let memory_mib = self.memory_max_mib.unwrap_or(0).max(self.memory_mib);
        (memory_mib << 10).try_into().unwrap_or(usize::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_user_says_to_the_kernel_counts_last() {
        let words = SandboxConfig {
            cmdline: "quiet sysctl.net.ipv4.ip_unprivileged_port_start=1024".into(),
            ..SandboxConfig::default()
        };
        let words = words.whole_cmdline().unwrap();
        assert!(
            words.starts_with("sysctl.net.ipv4.ip_unprivileged_port_start=\"0\" "),
            "{words}"
        );
        assert!(
            words.ends_with(" quiet sysctl.net.ipv4.ip_unprivileged_port_start=1024"),
            "{words}"
        );
    }

    #[test]
    fn what_nobody_asked_for_may_be_missing() {
        let mut config = SandboxConfig::default();
        assert!(config.asked_sysctls().is_empty());
        let own = ("net.core.somaxconn".to_owned(), "4096".to_owned());
        config.sysctls.extend([own.clone()]);
        assert_eq!(config.asked_sysctls(), BTreeMap::from([own]));
    }

    #[test]
    fn the_kernel_lets_containers_open_vsock_sockets_where_that_is_asked_for() {
        let asks = |change: fn(&mut SandboxConfig)| {
            let mut config = SandboxConfig::default();
            change(&mut config);
            let words = config.whole_cmdline().unwrap();
            words.split(' ').any(|word| word == "vsock.containers=1")
        };
        assert!(!asks(|_| {}));
        assert!(asks(|config| config.containers_vsock = true));
        assert!(asks(|config| config.vsock = Some("/run/v.sock".into())));
    }
}
