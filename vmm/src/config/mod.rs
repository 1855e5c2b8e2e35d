//! User configuration ([`VmConfig`]) and its validated form ([`Spec`]).

mod devices;

pub(crate) use devices::DiskSpec;
pub use devices::{
    DiskConfig, MAX_DISK_QUEUES, MAX_DISK_SLOTS, MAX_NET_QUEUES, NetConfig, VsockConfig,
};

use crate::arch::{self, KernelFormat};
use koya_devices::net::Net;
use rustix::thread::{CpuSet, sched_getaffinity};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Maximum number of vCPUs of a virtual machine.
pub const MAX_CPUS: u32 = 32;
/// Minimum memory in MiB; Linux cannot unpack itself with less.
pub const MIN_MEMORY_MIB: u64 = 32;
/// Maximum memory in MiB: 512 GiB.
pub const MAX_MEMORY_MIB: u64 = 512 * 1024;

/// Bytes needed to detect a kernel's format: the headers of all architectures end before this.
const KERNEL_HEAD: usize = 0x210;

/// A virtual machine as a user describes it: in Rust, or as TOML.
///
/// ```
/// let config: koya_vmm::VmConfig = koya_vmm::VmConfig::from_toml(
///     "kernel = 'vmlinux'\ncpus = 2\nmemory_mib = 512",
/// ).unwrap();
/// assert_eq!(config.cpus, 2);
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// The guest kernel: an ELF vmlinux or a bzImage (x86_64). No default.
    pub kernel: PathBuf,
    /// The initial RAM file system, if the kernel needs one. Default: none.
    #[serde(default)]
    pub initramfs: Option<PathBuf>,
    /// Kernel parameters added after those of the monitor. Default: empty.
    #[serde(default)]
    pub cmdline: String,
    /// Number of vCPUs online at start, 1 to [`MAX_CPUS`]. Default: 1.
    #[serde(default = "default_cpus")]
    pub cpus: u32,
    /// Number of vCPUs that the guest may bring online later, once the owner allows it
    /// ([`VmHandle::set_online_cpus`](crate::VmHandle::set_online_cpus)): `cpus` to [`MAX_CPUS`]. Each costs
    /// a thread on the host and memory in the guest. Default: `cpus`.
    #[serde(default)]
    pub cpus_max: Option<u32>,
    /// Host CPUs to pin the vCPUs to, in order: empty, or one for each. Default: empty.
    #[serde(default)]
    pub cpu_pins: Vec<u32>,
    /// Whether the vCPUs have the Scalable Vector Extension (SVE) of an aarch64 host; a host without it refuses. Default:
    /// false.
    #[serde(default)]
    pub sve: bool,
    /// Memory in MiB, [`MIN_MEMORY_MIB`] to [`MAX_MEMORY_MIB`]. Default: 256.
    #[serde(default = "default_memory")]
    pub memory_mib: u64,
    /// Maximum memory in MiB, up to which the guest may grow while it runs (virtio-mem). The hot-pluggable
    /// part is rounded up to whole Linux memory blocks, 128 MiB (2 GiB from 64 GiB on). Default:
    /// `memory_mib`.
    #[serde(default)]
    pub memory_max_mib: Option<u64>,
    /// How guest memory is allocated on the host. Default: anonymous.
    #[serde(default)]
    pub memory_backing: MemoryBacking,
    /// Page size of guest memory on the host. Default: the host's setting.
    #[serde(default)]
    pub huge_pages: HugePages,
    /// Use of the guest's serial port. Default: console.
    #[serde(default)]
    pub serial: Serial,
    /// Whether the guest has an entropy device. Default: true.
    #[serde(default = "default_true")]
    pub entropy: bool,
    /// Whether the guest has a balloon: memory that it frees goes back to the host (free page reporting), and
    /// the owner can reclaim more. Default: true.
    #[serde(default = "default_true")]
    pub balloon: bool,
    /// Disks, in the order in which the guest sees them (`/dev/vda`, `/dev/vdb`, ...). Default: none.
    #[serde(default)]
    pub disks: Vec<DiskConfig>,
    /// Number of slots for hot-plugged disks and networks, up to [`MAX_DISK_SLOTS`]; the guest probes each empty slot when
    /// it starts. Default: 0.
    #[serde(default)]
    pub disk_slots: u32,
    /// Networks, in the order in which the guest sees them (`eth0`, `eth1`, ...). Default: none.
    #[serde(default)]
    pub networks: Vec<NetConfig>,
    /// Sockets between the guest and host processes. Default: none.
    #[serde(default)]
    pub vsock: Option<VsockConfig>,
}

/// Use of a guest's serial port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Serial {
    /// No serial port.
    None,
    /// Kernel messages only, without a driver: a driver that probes the port takes 64 exits during boot. The
    /// guest has no terminal on it.
    Messages,
    /// A terminal, the guest's `/dev/console` (the first serial terminal).
    #[default]
    Console,
}

/// How guest memory is allocated on the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MemoryBacking {
    /// Anonymous memory of this process.
    #[default]
    Anonymous,
    /// A memory file (memfd_create(2)), which can be shared with other processes.
    Memfd,
}

/// Page size of guest memory on the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HugePages {
    /// The host's default for every process.
    #[default]
    Host,
    /// Request transparent huge pages.
    Transparent,
    /// 2 MiB pages that the host has reserved (`vm.nr_hugepages`). All pages, up to the maximum memory, are
    /// claimed at start and kept; sizes must be multiples of 2 MiB.
    Reserved,
}

fn default_cpus() -> u32 {
    1
}

fn default_memory() -> u64 {
    256
}

fn default_true() -> bool {
    true
}

/// Errors in a configuration; each names the field.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The text is not a configuration.
    #[error("the configuration can't be read")]
    Toml(#[from] toml::de::Error),
    /// A number outside its range.
    #[error("{field} = {value} is outside {min} to {max}")]
    Range {
        /// The field's name.
        field: &'static str,
        /// The value given.
        value: u64,
        /// The minimum.
        min: u64,
        /// The maximum.
        max: u64,
    },
    /// A CPU that this process may not use.
    #[error("cpu_pins: CPU {0} does not exist, or is not in the CPU affinity of this process")]
    Pin(u32),
    /// The CPU affinity of this process could not be read.
    #[error("cpu_pins: cannot read the CPU affinity of this process")]
    Affinity(#[source] std::io::Error),
    /// Memory size that is not a multiple of the huge page size.
    #[error("memory_mib = {0} is not a whole number of huge pages of 2 MiB")]
    NotHugePageMultiple(u64),
    /// A file that can't be opened or read.
    #[error("{field} = {}: cannot read the file", path.display())]
    File {
        /// The field's name.
        field: &'static str,
        /// The file.
        path: PathBuf,
        /// The error from the host.
        #[source]
        source: std::io::Error,
    },
    /// A disk that can't be opened or used.
    #[error("disks: cannot use {} as a disk", path.display())]
    Disk {
        /// The image or device.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// A network whose tap can't be opened.
    #[error("networks: cannot use the tap {tap:?}")]
    Network {
        /// Its name.
        tap: String,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// A kernel that this architecture can't boot.
    #[error("kernel = {}: {reason}", path.display())]
    Kernel {
        /// The kernel file.
        path: PathBuf,
        /// The actual type of the file.
        reason: String,
    },
    /// A command line that the kernel could not use.
    #[error("cmdline: {reason}")]
    Cmdline {
        /// The problem.
        reason: String,
    },
}

/// The software to boot.
pub(crate) enum Boot {
    /// A Linux kernel.
    Linux {
        /// The open kernel file.
        kernel: File,
        /// Its format.
        format: KernelFormat,
        /// The open initial RAM disk.
        initramfs: Option<File>,
        /// The configured kernel parameters.
        cmdline: String,
    },
    /// Real-mode code (x86_64) at guest address 0, for probes and tests: no kernel, no boot tables.
    Flat(Vec<u8>),
}

/// The vCPUs.
#[derive(Clone, Debug)]
pub(crate) struct CpuSpec {
    /// Number of vCPUs.
    pub(crate) count: u32,
    /// Number of vCPUs that the guest kernel starts.
    pub(crate) online: u32,
    /// Host CPUs to pin them to: empty, or one for each.
    pub(crate) pins: Vec<u32>,
    /// Whether they have SVE.
    pub(crate) sve: bool,
}

/// The guest's memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MemorySpec {
    /// Size of boot memory in bytes.
    pub(crate) bytes: u64,
    /// Size of the hot-pluggable range in bytes.
    pub(crate) hotplug_bytes: u64,
    pub(crate) backing: MemoryBacking,
    pub(crate) huge_pages: HugePages,
}

impl MemorySpec {
    /// Memory with default settings.
    pub(crate) fn new(bytes: u64) -> Self {
        Self {
            bytes,
            hotplug_bytes: 0,
            backing: MemoryBacking::default(),
            huge_pages: HugePages::default(),
        }
    }
}

/// A validated configuration: files are open, numbers are in range.
pub struct Spec {
    pub(crate) boot: Boot,
    pub(crate) cpus: CpuSpec,
    pub(crate) memory: MemorySpec,
    pub(crate) serial: Serial,
    pub(crate) entropy: bool,
    pub(crate) balloon: bool,
    pub(crate) disks: Vec<DiskSpec>,
    pub(crate) disk_slots: usize,
    pub(crate) networks: Vec<Net>,
    pub(crate) vsock: Option<VsockConfig>,
}

impl VmConfig {
    /// The default configuration for this kernel.
    pub fn new(kernel: impl Into<PathBuf>) -> Self {
        Self {
            kernel: kernel.into(),
            initramfs: None,
            cmdline: String::new(),
            cpus: default_cpus(),
            cpus_max: None,
            cpu_pins: Vec::new(),
            sve: false,
            memory_mib: default_memory(),
            memory_max_mib: None,
            memory_backing: MemoryBacking::default(),
            huge_pages: HugePages::default(),
            serial: Serial::default(),
            entropy: true,
            balloon: true,
            disks: Vec::new(),
            disk_slots: 0,
            networks: Vec::new(),
            vsock: None,
        }
    }

    /// Reads a configuration from TOML.
    ///
    /// # Errors
    /// [`ConfigError::Toml`], with the problem and its position.
    pub fn from_toml(text: &str) -> Result<Self, ConfigError> {
        Ok(toml::from_str(text)?)
    }

    /// Checks every field and opens the files.
    ///
    /// # Errors
    /// The first invalid field.
    pub fn check(&self) -> Result<Spec, ConfigError> {
        let cpus = self.check_cpus()?;
        let memory = self.check_memory()?;
        if let Some(bad) = self.cmdline.chars().find(|c| !(' '..='~').contains(c)) {
            return Err(ConfigError::Cmdline {
                reason: format!("{bad:?} is not printable ASCII"),
            });
        }
        in_range(
            "disk_slots",
            self.disk_slots.into(),
            0,
            MAX_DISK_SLOTS.into(),
        )?;
        if let Some(vsock) = &self.vsock {
            vsock.check()?;
        }
        let kernel = open("kernel", &self.kernel)?;
        let format = self.kernel_format(&kernel)?;
        let initramfs = match &self.initramfs {
            Some(path) => Some(open("initramfs", path)?),
            None => None,
        };
        let disks = self.disks.iter().map(|disk| disk.check(cpus.count));
        let disks = disks.collect::<Result<_, _>>()?;
        let networks = self.networks.iter().map(NetConfig::check);
        let networks = networks.collect::<Result<_, _>>()?;
        Ok(Spec {
            boot: Boot::Linux {
                kernel,
                format,
                initramfs,
                cmdline: self.cmdline.clone(),
            },
            cpus,
            memory,
            serial: self.serial,
            entropy: self.entropy,
            balloon: self.balloon,
            disks,
            disk_slots: self.disk_slots as usize,
            networks,
            vsock: self.vsock.clone(),
        })
    }

    fn check_cpus(&self) -> Result<CpuSpec, ConfigError> {
        in_range("cpus", self.cpus.into(), 1, MAX_CPUS.into())?;
        let count = self.cpus_max.unwrap_or(self.cpus);
        in_range("cpus_max", count.into(), self.cpus.into(), MAX_CPUS.into())?;
        if !self.cpu_pins.is_empty() {
            let (pins, wanted) = (self.cpu_pins.len() as u64, count.into());
            in_range("the number of cpu_pins", pins, wanted, wanted)?;
            let allowed =
                sched_getaffinity(None).map_err(|source| ConfigError::Affinity(source.into()))?;
            let is_allowed = |cpu: u32| {
                let cpu = cpu as usize;
                cpu < CpuSet::MAX_CPU && allowed.is_set(cpu)
            };
            if let Some(cpu) = self.cpu_pins.iter().find(|cpu| !is_allowed(**cpu)) {
                return Err(ConfigError::Pin(*cpu));
            }
        }
        Ok(CpuSpec {
            count,
            online: self.cpus,
            pins: self.cpu_pins.clone(),
            sve: self.sve,
        })
    }

    fn check_memory(&self) -> Result<MemorySpec, ConfigError> {
        let mib = self.memory_mib;
        in_range("memory_mib", mib, MIN_MEMORY_MIB, MAX_MEMORY_MIB)?;
        let max = self.memory_max_mib.unwrap_or(mib);
        in_range("memory_max_mib", max, mib, MAX_MEMORY_MIB)?;
        if self.huge_pages == HugePages::Reserved && !mib.is_multiple_of(2) {
            return Err(ConfigError::NotHugePageMultiple(mib));
        }
        Ok(MemorySpec {
            bytes: mib << 20,
            hotplug_bytes: ((max - mib) << 20)
                .next_multiple_of(arch::layout::memory_block(mib << 20)),
            backing: self.memory_backing,
            huge_pages: self.huge_pages,
        })
    }

    fn kernel_format(&self, kernel: &File) -> Result<KernelFormat, ConfigError> {
        let mut head = [0; KERNEL_HEAD];
        let len = kernel.read_at(&mut head, 0);
        let len = len.map_err(|source| ConfigError::File {
            field: "kernel",
            path: self.kernel.clone(),
            source,
        })?;
        arch::kernel_format(&head[..len]).map_err(|reason| ConfigError::Kernel {
            path: self.kernel.clone(),
            reason,
        })
    }
}

impl Spec {
    /// A virtual machine for a flat binary: one vCPU, no devices, 2 MiB of memory. It starts without page tables,
    /// on x86_64 in real mode at address 0, on aarch64 in EL1 where it is loaded.
    pub fn flat(code: impl Into<Vec<u8>>) -> Self {
        Self {
            boot: Boot::Flat(code.into()),
            cpus: CpuSpec {
                count: 1,
                online: 1,
                pins: Vec::new(),
                sve: false,
            },
            memory: MemorySpec::new(2 << 20),
            serial: Serial::None,
            entropy: false,
            balloon: false,
            disks: Vec::new(),
            disk_slots: 0,
            networks: Vec::new(),
            vsock: None,
        }
    }

    /// A tiny guest, for a test of the host: it counts down from `rounds` by two instructions per round, and then resets the
    /// machine.
    pub fn probe_guest(rounds: u32) -> Self {
        Self::flat(arch::probe_guest(rounds))
    }
}

fn in_range(field: &'static str, value: u64, min: u64, max: u64) -> Result<(), ConfigError> {
    if (min..=max).contains(&value) {
        return Ok(());
    }
    Err(ConfigError::Range {
        field,
        value,
        min,
        max,
    })
}

fn open(field: &'static str, path: &Path) -> Result<File, ConfigError> {
    File::open(path).map_err(|source| ConfigError::File {
        field,
        path: path.to_path_buf(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file with the header of a kernel for either architecture.
    fn kernel_file() -> tempfile::NamedTempFile {
        let mut head = vec![0u8; 64];
        head[..5].copy_from_slice(b"\x7fELF\x02");
        head[18] = 62;
        head[56..60].copy_from_slice(b"ARM\x64");
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), head).unwrap();
        file
    }

    #[test]
    fn an_unknown_field_is_named() {
        let error = VmConfig::from_toml("kernel = 'k'\nmemroy_mib = 3").unwrap_err();
        let ConfigError::Toml(source) = error else {
            panic!("{error}")
        };
        assert!(source.to_string().contains("memroy_mib"), "{source}");
    }

    #[test]
    fn numbers_out_of_range_name_their_field() {
        let file = kernel_file();
        for (cpus, memory_mib, field) in
            [(0, 256, "cpus"), (33, 256, "cpus"), (1, 31, "memory_mib")]
        {
            let config = VmConfig {
                cpus,
                memory_mib,
                ..VmConfig::new(file.path())
            };
            let error = config.check().err().unwrap().to_string();
            assert!(error.starts_with(field), "{error}");
        }
    }

    #[test]
    fn room_to_grow_is_checked() {
        let file = kernel_file();
        let check = |change: &dyn Fn(&mut VmConfig)| {
            let mut config = VmConfig::new(file.path());
            change(&mut config);
            config.check().map_err(|error| error.to_string())
        };
        let error = |change: &dyn Fn(&mut VmConfig)| check(change).err().unwrap();
        assert!(error(&|c| c.memory_max_mib = Some(255)).starts_with("memory_max_mib"));
        assert!(error(&|c| c.cpus_max = Some(0)).starts_with("cpus_max"));
        assert!(error(&|c| c.cpu_pins = vec![0, 0]).contains("cpu_pins = 2"));
        assert!(error(&|c| c.cpu_pins = vec![u32::MAX]).contains("CPU 4294967295"));
        let odd = error(&|c| (c.huge_pages, c.memory_mib) = (HugePages::Reserved, 301));
        assert!(odd.contains("301"), "{odd}");
        let grown = |c: &mut VmConfig| (c.memory_max_mib, c.cpus_max) = (Some(257), Some(2));
        let spec = check(&grown).ok().unwrap();
        assert_eq!(
            spec.memory.hotplug_bytes,
            arch::layout::memory_block(256 << 20)
        );
        assert_eq!((spec.cpus.count, spec.cpus.online), (2, 1));
    }

    #[test]
    fn a_config_survives_toml() {
        let config = VmConfig {
            cpus: 3,
            cmdline: "a=b".into(),
            ..VmConfig::new("k")
        };
        let text = toml::to_string(&config).unwrap();
        assert_eq!(VmConfig::from_toml(&text).unwrap(), config);
    }

    #[test]
    fn a_disk_is_named_when_it_is_wrong() {
        let file = kernel_file();
        let mut config = VmConfig::from_toml(&format!(
            "kernel = '{}'\n[[disks]]\npath = '/nonexistent/disk'\n[disks.limits.bytes]\nper_second = 1000",
            file.path().display()
        ))
        .unwrap();
        let error = config.check().err().unwrap();
        assert!(error.to_string().contains("/nonexistent/disk"), "{error}");
        config.disks[0].queues = Some(17);
        let error = config.check().err().unwrap().to_string();
        assert!(error.starts_with("disks.queues"), "{error}");
    }

    #[test]
    fn a_missing_kernel_says_which_file() {
        let error = VmConfig::new("/nonexistent/vmlinux").check().err().unwrap();
        assert!(error.to_string().contains("/nonexistent/vmlinux"));
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn a_kernel_of_another_architecture_is_refused() {
        let file = kernel_file();
        let mut head = std::fs::read(file.path()).unwrap();
        head[18] = 183;
        std::fs::write(file.path(), head).unwrap();
        let error = VmConfig::new(file.path()).check().err().unwrap();
        assert!(error.to_string().contains("aarch64"), "{error}");
    }
}
