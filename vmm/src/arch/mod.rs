//! Architecture-specific code behind one small interface.
//!
//! Each architecture's directory offers the same functions:
//! - [`KernelFormat`], [`kernel_format`]: detects the kernel format from the first bytes of a file
//! - [`layout`]: guest physical memory map and the MMIO slots for virtio devices
//! - [`features`]: CPU features that KVM offers; [`add_sve`]: one that guests have only on request
//! - [`prepare_vm`]: sets up the parts that must exist before vCPUs are created
//! - [`prepare_vcpu`]: sets the identity and features of a vCPU
//! - [`finish_vm`]: sets up the parts that require all vCPUs, and returns the interrupt controller ([`Interrupts`]);
//!   interrupts are connected after that
//! - [`attach_platform`]: attaches the platform's own devices to the bus (serial port, reset)
//! - [`load`]: loads a kernel and describes the machine to it ([`BootInfo`]), by command line and tables or
//!   by device tree
//! - [`set_entry`]: sets the entry point of the first vCPU
//! - [`probe_guest`]: a tiny guest
//! - [`host_features`], [`NO_KVM`], [`CPU_LIMIT`]: the host's virtualization features, how to get KVM on a host without it,
//!   and the reason for a low number of CPUs
//!
//! `cfg(target_arch)` is used only here in this crate.

mod byte_registers;
mod linux;

use crate::bus::Overlap;
use crate::config::{Boot, CpuSpec, MemorySpec, Serial, Spec};
use koya_devices::virtio::Memory;
use vm_memory::GuestAddress;

#[cfg(target_arch = "aarch64")]
mod aarch64;
#[cfg(target_arch = "x86_64")]
mod x86_64;

#[cfg(target_arch = "aarch64")]
pub use aarch64::*;
#[cfg(target_arch = "x86_64")]
pub use x86_64::*;

/// A slot for a virtio-mmio device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MmioSlot {
    /// Guest physical address of its registers, which take one page.
    pub(crate) address: u64,
    /// Interrupt number (GSI, as used by KVM's irqfd).
    pub(crate) irq: u32,
}

/// The machine that is described to the guest, independent of how the platform describes it.
pub(crate) struct BootInfo<'a> {
    /// Kernel, initial RAM disk and configured kernel parameters.
    pub(crate) boot: &'a mut Boot,
    /// Boot memory, and how much can be hot-plugged.
    pub(crate) memory: MemorySpec,
    /// Number of CPUs, and how many of them the kernel starts.
    pub(crate) cpus: &'a CpuSpec,
    /// Use of the serial port.
    pub(crate) serial: Serial,
    /// Slots that hold a device.
    pub(crate) slots: &'a [MmioSlot],
    /// Hot-plug slots, empty at first; the kernel numbers them after the others.
    pub(crate) hotplug_slots: &'a [MmioSlot],
    /// The interrupt controller.
    pub(crate) interrupts: Interrupts,
}

impl BootInfo<'_> {
    /// The configured kernel parameters.
    fn configured_cmdline(&self) -> &str {
        match &self.boot {
            Boot::Linux { cmdline, .. } => cmdline,
            Boot::Flat(_) => "",
        }
    }
}

/// Loads the kernel and the initial RAM disk of `spec` into memory of its own, without a machine: for fuzz targets.
///
/// # Errors
/// If a file is broken or does not fit.
///
/// # Panics
/// If the host has not enough memory.
pub fn load_files(mut spec: Spec) -> Result<(), ArchError> {
    let ranges = layout::memory_ranges(spec.memory.bytes);
    let ranges: Vec<_> = ranges
        .into_iter()
        .map(|(start, len)| (GuestAddress(start), len as usize))
        .collect();
    let memory = Memory::from_ranges(&ranges).expect("memory");
    let info = BootInfo {
        boot: &mut spec.boot,
        memory: spec.memory,
        cpus: &spec.cpus,
        serial: spec.serial,
        slots: &[],
        hotplug_slots: &[],
        interrupts: Default::default(),
    };
    load(&memory, info).map(drop)
}

/// Errors while a virtual machine is prepared for boot.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ArchError {
    /// KVM refused.
    #[error("KVM cannot {operation}")]
    Kvm {
        /// The operation that failed.
        operation: &'static str,
        /// The error from KVM.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// The kernel or initramfs does not fit, or is broken.
    #[error("cannot load {what}")]
    Load {
        /// The file or text being loaded: kernel, initramfs or command line.
        what: &'static str,
        /// The problem.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Two platform devices overlap.
    #[error(transparent)]
    Bus(#[from] Overlap),
    /// Not supported by this architecture or this host.
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
