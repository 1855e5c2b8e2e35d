//! What differs between architectures, behind one small interface.
//!
//! Both folders have the same file names and offer the same functions:
//! - [`kernel_format`]: which kind of kernel a file's first bytes are
//! - [`layout`]: the guest's physical memory, region by region
//! - [`features`]: what KVM offers to vCPUs
//! - [`prepare_vm`]: what KVM needs before vCPUs exist (interrupt controller, clock)
//! - [`prepare_vcpu`]: a vCPU's identity and features
//! - [`load`]: kernel and tables into memory, and where the first vCPU starts
//!
//! `cfg(target_arch)` stands here and nowhere else in the crate.

#[cfg(target_arch = "aarch64")]
mod aarch64;
#[cfg(target_arch = "x86_64")]
mod x86_64;

#[cfg(target_arch = "aarch64")]
pub use aarch64::*;
#[cfg(target_arch = "x86_64")]
pub use x86_64::*;

/// One virtio-mmio window and its interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MmioSlot {
    /// Guest physical address of the window.
    pub address: u64,
    /// The interrupt's number, as the guest knows it.
    pub irq: u32,
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
    #[error("cannot load {what}: {reason}")]
    Load {
        /// Kernel, initramfs, command line.
        what: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// Something that this architecture or this host does not have.
    #[error("{0} is not supported")]
    Unsupported(&'static str),
}

impl ArchError {
    pub(crate) fn kvm(operation: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |source| Self::Kvm { operation, source }
    }

    #[cfg(target_arch = "x86_64")] // aarch64 loads nothing yet.
    pub(crate) fn load<E: std::fmt::Display>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |error| Self::Load {
            what,
            reason: error.to_string(),
        }
    }
}
