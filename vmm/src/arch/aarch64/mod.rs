//! aarch64: the same interface as x86_64's. Booting an Image with a device tree is not there
//! yet; until then every entry point refuses with one line.

use super::ArchError;
use crate::config::{Boot, KernelFormat};
use koya_devices::virtio::Memory;
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

pub mod layout;

/// What the guest's kernel is told in any case.
pub const BASE_CMDLINE: &str = "panic=-1 random.trust_cpu=on";

/// Whether memory of the host's can stand for registers that a guest reads: it reads them past the caches, and
/// would not see what the host wrote.
pub const READS_MEMORY_OF_DEVICES: bool = false;

/// How the kernel's messages get to the serial port with no driver for it: the device tree names it.
pub const EARLYCON_CMDLINE: &str = "earlycon keep_bootcon";

const NOT_YET: &str = "booting a guest on aarch64";

/// Which kind of kernel begins with `head`.
///
/// # Errors
/// Always, for now.
pub fn kernel_format(_head: &[u8]) -> Result<KernelFormat, String> {
    Err(format!("{NOT_YET} is not supported"))
}

/// The interrupt controller.
///
/// # Errors
/// Always, for now.
pub fn prepare_vm(_: &Features, _vm: &VmFd) -> Result<(), ArchError> {
    Err(ArchError::Unsupported(NOT_YET))
}

/// What KVM offers to every vCPU.
pub enum Features {}

/// Asks KVM for them.
///
/// # Errors
/// Always, for now.
pub fn features(_kvm: &Kvm) -> Result<Features, ArchError> {
    Err(ArchError::Unsupported(NOT_YET))
}

/// A vCPU's identity and features.
///
/// # Errors
/// Always, for now.
pub fn prepare_vcpu(_: &Features, _: &VcpuFd, _index: u32, _cpus: u32) -> Result<(), ArchError> {
    Err(ArchError::Unsupported(NOT_YET))
}

/// Where the first vCPU starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {}

/// Sets the first vCPU's registers.
///
/// # Errors
/// None: there is no entry yet.
pub fn set_entry(_vcpu: &VcpuFd, entry: Entry) -> Result<(), ArchError> {
    match entry {}
}

/// Kernel and device tree into memory.
///
/// # Errors
/// Always, for now.
pub fn load(
    _memory: &Memory,
    _memory_bytes: u64,
    _boot: &mut Boot,
    _cpus: u32,
    _cmdline: &str,
) -> Result<Entry, ArchError> {
    Err(ArchError::Unsupported(NOT_YET))
}

/// Nothing to tell: the architecture's timer stops with the vCPU.
pub fn after_pause(_vcpu: &VcpuFd) {}

/// The registers that matter in a report of a failed vCPU.
pub fn describe_vcpu(_vcpu: &VcpuFd) -> String {
    "registers are not shown on aarch64".into()
}
