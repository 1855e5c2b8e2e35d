//! What differs between architectures, behind one small interface.
//!
//! Both directories have the same file names and offer the same functions:
//! - [`KernelFormat`], [`kernel_format`]: which kind of kernel a file's first bytes are
//! - [`layout`]: the guest's physical memory, region by region, and the MMIO slots for virtio devices
//! - [`features`]: what KVM offers to vCPUs
//! - [`prepare_vm`]: what KVM needs before vCPUs exist (interrupt controller, clock)
//! - [`attach_platform`]: the platform's own devices on the bus: the serial port, and what resets the CPU
//! - [`prepare_vcpu`]: a vCPU's identity and features
//! - [`load`]: a kernel into memory, and what it is told of its machine ([`BootInfo`]), as the platform has
//!   it: a command line and tables, or a device tree
//! - [`set_entry`]: where the first vCPU starts
//!
//! `cfg(target_arch)` stands here and nowhere else in the crate.

mod linux;

use crate::bus::Overlap;
use crate::config::{Boot, CpuSpec, MemorySpec, Serial};

#[cfg(target_arch = "aarch64")]
mod aarch64;
#[cfg(target_arch = "x86_64")]
mod x86_64;

#[cfg(target_arch = "aarch64")]
pub use aarch64::*;
#[cfg(target_arch = "x86_64")]
pub use x86_64::*;

/// Where a virtio-mmio device may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MmioSlot {
    /// Guest physical address of the registers, a page of them.
    pub(crate) address: u64,
    /// The interrupt's number, as KVM's irqfd counts them (GSI).
    pub(crate) irq: u32,
}

/// A machine as its guest is to find it. How the guest is told is the platform's business.
pub(crate) struct BootInfo<'a> {
    /// Kernel, initial RAM file system, and the owner's words for the command line.
    pub(crate) boot: &'a mut Boot,
    /// What there is at the start, and whether there is room for more.
    pub(crate) memory: MemorySpec,
    /// How many there are, and how many of them the kernel starts.
    pub(crate) cpus: &'a CpuSpec,
    /// What the serial port is for.
    pub(crate) serial: Serial,
    /// The slots that have devices.
    pub(crate) slots: &'a [MmioSlot],
    /// Those that are empty for now; the kernel counts them on.
    pub(crate) hotplug_slots: &'a [MmioSlot],
}

impl BootInfo<'_> {
    /// The owner's words for the command line.
    fn own_words(&self) -> &str {
        match &self.boot {
            Boot::Linux { cmdline, .. } => cmdline,
            Boot::Flat(_) => "",
        }
    }
}

/// Why a virtual machine could not be made ready to boot.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ArchError {
    /// KVM refused.
    #[error("KVM cannot {operation}")]
    Kvm {
        /// What was asked of it.
        operation: &'static str,
        /// Its answer.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// The kernel or initramfs does not fit, or is broken.
    #[error("cannot load {what}")]
    Load {
        /// Kernel, initramfs, command line.
        what: &'static str,
        /// What is wrong.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Two devices of the platform's in one place.
    #[error(transparent)]
    Bus(#[from] Overlap),
    /// Something that this architecture or this host does not have.
    #[error("{0} is not supported")]
    Unsupported(&'static str),
}

impl ArchError {
    pub(crate) fn kvm(operation: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |source| Self::Kvm { operation, source }
    }

    pub(crate) fn load<E>(what: &'static str) -> impl FnOnce(E) -> Self
    where
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        move |source| Self::Load {
            what,
            source: source.into(),
        }
    }
}
