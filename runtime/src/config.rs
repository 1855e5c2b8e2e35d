//! The configuration of a sandbox.

use crate::network::NetworkConfig;
use crate::timeline::TimelineFile;
use crate::{Cache, Error};
use koya_vmm::host::walls::landlock::Place;
use koya_vmm::{DiskConfig, HugePages, MemoryBacking};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Resources and options of a sandbox's virtual machine.
#[derive(Clone, Debug)]
pub struct SandboxConfig {
    /// Number of virtual CPUs at the start, 1 to 32. Default: 1.
    pub cpus: u32,
    /// Maximum number of virtual CPUs while it runs. Default: `cpus`.
    pub cpus_max: Option<u32>,
    /// The host CPU for each virtual CPU; see [`VmConfig::cpu_pins`](koya_vmm::VmConfig::cpu_pins). Default: none.
    pub cpu_pins: Vec<u32>,
    /// Whether the guest has the Scalable Vector Extension (SVE) of an aarch64 host; a host without it refuses. Default:
    /// false.
    pub sve: bool,
    /// Memory at the start in MiB, as visible to programs in the guest (`MemTotal`): the memory that the guest kernel
    /// keeps for itself is added. Default: 256.
    pub memory_mib: u64,
    /// Maximum memory in MiB while it runs. Default: `memory_mib`.
    pub memory_max_mib: Option<u64>,
    /// How the memory is allocated on the host.
    pub memory_backing: MemoryBacking,
    /// Page size of the memory on the host.
    pub huge_pages: HugePages,
    /// Disks of the guest; a container gets those that its own configuration names.
    pub disks: Vec<DiskConfig>,
    /// Number of slots for hot-plugged disks, up to 16. Default: 4.
    pub disk_slots: u32,
    /// Networks of the guest, set up in the network namespace of the thread that starts the sandbox.
    /// Default: only the guest's loopback.
    pub networks: Vec<NetworkConfig>,
    /// Cache policy of the guest for shared files.
    pub cache: Cache,
    /// The Unix socket through which host processes connect to vsock ports of the guest; see
    /// [`UnixSockets`](koya_vmm::devices::vsock::UnixSockets). Default: none.
    pub vsock: Option<PathBuf>,
    /// Whether processes of containers may open vsock sockets (AF_VSOCK). Koya's guest kernel refuses them
    /// otherwise, also for privileged containers. Default: only if `vsock` is set.
    pub containers_vsock: bool,
    /// Host name of the guest, used by containers that share its UTS namespace: letters, digits,
    /// `-`, `.` and `_`, at most 64. Default: the kernel's.
    pub hostname: Option<String>,
    /// Kernel parameters of the guest by name (`net.ipv4.ip_unprivileged_port_start`), which apply to containers without a
    /// namespace of their own for them. Default: every user may bind to port 80, and ping
    /// (`net.ipv4.ip_unprivileged_port_start`, `net.ipv4.ping_group_range`).
    pub sysctls: BTreeMap<String, String>,
    /// The AppArmor profile of the threads that run the guest and serve its devices; `unconfined` means none. It must allow
    /// the files that they open: devices of the host, kernel and initramfs, and shared files by their paths in their file
    /// systems (with the profile flag `attach_disconnected`). Default: that of the thread that starts the sandbox.
    pub apparmor_profile: Option<String>,
    /// Whether the threads that run the guest and serve its devices are confined: seccomp filters, and no
    /// capabilities except those for serving files ([`koya_vmm::VmBuilder::confined`]). Default: true.
    pub confined: bool,
    /// All files of the host that containers may share, if they are known now
    /// ([`ContainerConfig::places`](crate::ContainerConfig::places)); others are refused. A process without the privileges to
    /// give the threads that serve them a root directory of their own limits these threads to them
    /// ([`koya_vmm::VmBuilder::places`]). Default: any.
    pub places: Option<Vec<Place>>,
    /// The guest kernel. Default: searched ([`Files::find`](crate::files::Files::find)).
    pub kernel: Option<PathBuf>,
    /// The agent's initramfs. Default: searched, like the kernel.
    pub initramfs: Option<PathBuf>,
    /// Kernel parameters appended to the guest kernel's command line. Default: "quiet".
    pub cmdline: String,
    /// Stores the timeline of the start on the host. Default: none.
    pub timeline: Option<TimelineFile>,
}

impl Default for SandboxConfig {
    fn default() -> Self {
        Self {
            cpus: 1,
            cpus_max: None,
            cpu_pins: Vec::new(),
            sve: false,
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
            places: None,
            kernel: None,
            initramfs: None,
            cmdline: "quiet".into(),
            timeline: None,
        }
    }
}

/// The defaults of other engines for a private network namespace: every user may bind to port 80, and ping.
const SYSCTLS: [(&str, &str); 2] = [
    ("net.ipv4.ip_unprivileged_port_start", "0"),
    ("net.ipv4.ping_group_range", "0 2147483647"),
];

/// Block devices with a mounted file system may be opened for writing, as on other hosts: mount(8) before util-linux 2.40 holds a
/// loop device open while it mounts it, and resize2fs(8) the device of a mounted file system.
const WRITE_MOUNTED: &str = "bdev_allow_write_mounted=1";

impl SandboxConfig {
    /// The sysctls that were requested explicitly: it is an error if the guest kernel does not have one of them.
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
        // Other characters could inject kernel parameters.
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
        // If a parameter is repeated, the last value counts.
        let words = format!("{words} {WRITE_MOUNTED} {}", self.cmdline);
        Ok(words.trim_start().to_owned())
    }

    /// Maximum number of files that the guest may remember: its kernel needs 1 KiB of guest memory for each.
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
            words.contains(" bdev_allow_write_mounted=1 quiet"),
            "{words}"
        );
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
