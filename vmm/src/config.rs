//! What a user asks for ([`VmConfig`]) and what the rest of the crate works with ([`Spec`]).

use crate::arch;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// The most vCPUs of one virtual machine.
pub const MAX_CPUS: u32 = 32;
/// The least memory, in MiB: less and Linux has no room to unpack itself.
pub const MIN_MEMORY_MIB: u64 = 32;
/// The most memory, in MiB: 512 GiB.
pub const MAX_MEMORY_MIB: u64 = 512 * 1024;

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
    /// Words added to the kernel's command line after the monitor's own. Default: empty.
    #[serde(default)]
    pub cmdline: String,
    /// Virtual CPUs, 1 to [`MAX_CPUS`]. Default: 1.
    #[serde(default = "default_cpus")]
    pub cpus: u32,
    /// Memory in MiB, [`MIN_MEMORY_MIB`] to [`MAX_MEMORY_MIB`]. Default: 256.
    #[serde(default = "default_memory")]
    pub memory_mib: u64,
    /// Whether the guest has a serial port that serves as its console. Default: true.
    #[serde(default = "yes")]
    pub serial: bool,
    /// Whether the guest has an entropy device. Default: true.
    #[serde(default = "yes")]
    pub entropy: bool,
}

fn default_cpus() -> u32 {
    1
}

fn default_memory() -> u64 {
    256
}

fn yes() -> bool {
    true
}

/// What is wrong with a configuration; each names the field.
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
        /// What was given.
        value: u64,
        /// The least that is allowed.
        min: u64,
        /// The most that is allowed.
        max: u64,
    },
    /// A file that can't be opened or read.
    #[error("{field} = {}: cannot read the file", path.display())]
    File {
        /// The field's name.
        field: &'static str,
        /// The file.
        path: PathBuf,
        /// The host's answer.
        #[source]
        source: std::io::Error,
    },
    /// A kernel that this architecture can't boot.
    #[error("kernel = {}: {reason}", path.display())]
    Kernel {
        /// The file.
        path: PathBuf,
        /// What it is instead.
        reason: String,
    },
    /// A command line that the kernel could not take.
    #[error("cmdline: {reason}")]
    Cmdline {
        /// What is wrong with it.
        reason: String,
    },
}

/// How a kernel file is booted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KernelFormat {
    /// Uncompressed ELF, entered by the 64-bit Linux boot protocol.
    Elf,
    /// x86 compressed image, entered at its 64-bit entry.
    BzImage,
}

/// What the virtual machine starts with.
pub enum Boot {
    /// A Linux kernel.
    Linux {
        /// The open kernel file.
        kernel: File,
        /// Its form.
        format: KernelFormat,
        /// The open initial RAM file system.
        initramfs: Option<File>,
        /// The user's part of the command line.
        cmdline: String,
    },
    /// Real-mode code (x86_64) at guest address 0, for probes and tests: no kernel, no tables.
    Flat(Vec<u8>),
}

/// A checked configuration: files are open, numbers are in range.
pub struct Spec {
    pub(crate) boot: Boot,
    pub(crate) cpus: u32,
    pub(crate) memory_bytes: u64,
    pub(crate) serial: bool,
    pub(crate) entropy: bool,
}

impl VmConfig {
    /// Every default, and this kernel.
    pub fn new(kernel: impl Into<PathBuf>) -> Self {
        Self {
            kernel: kernel.into(),
            initramfs: None,
            cmdline: String::new(),
            cpus: default_cpus(),
            memory_mib: default_memory(),
            serial: true,
            entropy: true,
        }
    }

    /// Reads a configuration from TOML.
    ///
    /// # Errors
    /// [`ConfigError::Toml`] names what is wrong and where.
    pub fn from_toml(text: &str) -> Result<Self, ConfigError> {
        Ok(toml::from_str(text)?)
    }

    /// Checks every field and opens the files.
    ///
    /// # Errors
    /// The first field that is wrong.
    pub fn check(&self) -> Result<Spec, ConfigError> {
        in_range("cpus", self.cpus.into(), 1, MAX_CPUS.into())?;
        in_range(
            "memory_mib",
            self.memory_mib,
            MIN_MEMORY_MIB,
            MAX_MEMORY_MIB,
        )?;
        if let Some(bad) = self.cmdline.chars().find(|c| !(' '..='~').contains(c)) {
            return Err(ConfigError::Cmdline {
                reason: format!("{bad:?} is not printable ASCII"),
            });
        }
        let mut kernel = open("kernel", &self.kernel)?;
        let format = self.kernel_format(&mut kernel)?;
        let initramfs = match &self.initramfs {
            Some(path) => Some(open("initramfs", path)?),
            None => None,
        };
        Ok(Spec {
            boot: Boot::Linux {
                kernel,
                format,
                initramfs,
                cmdline: self.cmdline.clone(),
            },
            cpus: self.cpus,
            memory_bytes: self.memory_mib << 20,
            serial: self.serial,
            entropy: self.entropy,
        })
    }

    fn kernel_format(&self, kernel: &mut File) -> Result<KernelFormat, ConfigError> {
        let mut head = Vec::new();
        kernel
            .take(0x210)
            .read_to_end(&mut head)
            .map_err(|source| ConfigError::File {
                field: "kernel",
                path: self.kernel.clone(),
                source,
            })?;
        arch::kernel_format(&head).map_err(|reason| ConfigError::Kernel {
            path: self.kernel.clone(),
            reason,
        })
    }
}

impl Spec {
    /// A virtual machine that runs flat code: one vCPU, no devices, 2 MiB of memory.
    pub fn flat(code: impl Into<Vec<u8>>) -> Self {
        Self {
            boot: Boot::Flat(code.into()),
            cpus: 1,
            memory_bytes: 2 << 20,
            serial: false,
            entropy: false,
        }
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

    fn elf_file() -> tempfile::NamedTempFile {
        let mut head = vec![0u8; 64];
        head[..5].copy_from_slice(b"\x7fELF\x02");
        head[18] = 62;
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
        let file = elf_file();
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
    fn a_missing_kernel_says_which_file() {
        let error = VmConfig::new("/nonexistent/vmlinux").check().err().unwrap();
        assert!(error.to_string().contains("/nonexistent/vmlinux"));
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn a_kernel_of_another_architecture_is_refused() {
        let file = elf_file();
        let mut head = std::fs::read(file.path()).unwrap();
        head[18] = 183;
        std::fs::write(file.path(), head).unwrap();
        let error = VmConfig::new(file.path()).check().err().unwrap();
        assert!(error.to_string().contains("aarch64"), "{error}");
    }
}
