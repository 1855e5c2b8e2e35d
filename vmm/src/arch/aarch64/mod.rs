//! aarch64, with the same interface as x86_64. The parts that exist are the memory layout, kernel detection
//! and the command line. The interrupt controller, vCPU registers and device tree are missing; until they
//! exist, starting a guest fails with an error that says so.

use super::{ArchError, BootInfo, linux};
use crate::bus::Bus;
use crate::config::Boot;
use koya_devices::serial::SerialPort;
use koya_devices::virtio::Memory;
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use std::sync::{Arc, Mutex};

pub(crate) mod layout;

/// Kernel parameters of every guest: what a panic does, and where to unpack the initramfs. The console and
/// the devices are described by the device tree.
pub const BASE_CMDLINE: &str =
    "panic=-1 random.trust_cpu=on rcupdate.rcu_expedited=1 rootfstype=ramfs";

/// Maximum length of the command line including its terminator (COMMAND_LINE_SIZE, arch/arm64).
const CMDLINE_SIZE: usize = 2048;

/// Whether host memory may be mapped read-only as device registers: guests map devices uncached and would not
/// see what the host wrote to its caches.
pub(crate) const CAN_MAP_REGISTERS: bool = false;

const NOT_YET: &str = "booting a guest on aarch64";

/// How a kernel file is booted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum KernelFormat {
    /// Documentation/arch/arm64/booting.rst
    Image,
}

/// Detects the kernel format from the first bytes of a file.
///
/// # Errors
/// A sentence for the user if the format is unknown.
pub(crate) fn kernel_format(head: &[u8]) -> Result<KernelFormat, String> {
    match head.get(56..60) {
        Some(b"ARM\x64") => Ok(KernelFormat::Image),
        _ => Err("is not an aarch64 Image".into()),
    }
}

/// Creates the interrupt controller.
///
/// # Errors
/// Always, for now.
pub fn prepare_vm(_: &Features, _vm: &VmFd) -> Result<(), ArchError> {
    Err(ArchError::Unsupported(NOT_YET))
}

/// Attaches the platform's own devices to the bus. Resets go through PSCI, which KVM handles. There is no
/// interrupt controller yet to connect a serial port to.
///
/// # Errors
/// If a serial port is requested, for now.
pub(crate) fn attach_platform(
    _vm: &VmFd,
    _bus: &mut Bus,
    serial: Option<&Arc<Mutex<SerialPort>>>,
) -> Result<(), ArchError> {
    match serial {
        Some(_) => Err(ArchError::Unsupported(NOT_YET)),
        None => Ok(()),
    }
}

/// CPU features that KVM offers to every vCPU.
pub enum Features {}

/// Queries them from KVM.
///
/// # Errors
/// Always, for now.
pub fn features(_kvm: &Kvm) -> Result<Features, ArchError> {
    Err(ArchError::Unsupported(NOT_YET))
}

/// Sets the identity and features of a vCPU.
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
/// None: there is no entry point yet.
pub fn set_entry(_vcpu: &VcpuFd, entry: Entry) -> Result<(), ArchError> {
    match entry {}
}

/// Loads the kernel and the device tree into memory.
///
/// # Errors
/// If something does not fit; otherwise always, for now.
pub(crate) fn load(_memory: &Memory, info: BootInfo<'_>) -> Result<Entry, ArchError> {
    let line = cmdline(&info);
    check_sizes(info.boot, info.memory.bytes)?;
    if line.len() >= CMDLINE_SIZE {
        let reason = format!("{} bytes are more than {CMDLINE_SIZE}", line.len());
        return Err(ArchError::load("the command line")(reason));
    }
    // The device tree's nodes will be made from these.
    let (slots, later) = (info.slots, info.hotplug_slots);
    log::debug!("a device tree would have {slots:x?} and {later:x?}");
    Err(ArchError::Unsupported(NOT_YET))
}

/// Checks that kernel and initramfs fit into this much memory.
fn check_sizes(boot: &Boot, memory_bytes: u64) -> Result<(), ArchError> {
    let (files, format) = match boot {
        Boot::Linux {
            kernel,
            format,
            initramfs,
            ..
        } => ([Some(kernel), initramfs.as_ref()], format),
        Boot::Flat(code) => {
            let reason = format!("{} bytes of real-mode code are x86_64's", code.len());
            return Err(ArchError::load("flat code")(reason));
        }
    };
    let mut bytes = layout::PANIC_LOG_SIZE;
    for file in files.into_iter().flatten() {
        bytes += file.metadata().map_err(ArchError::load("a file"))?.len();
    }
    if bytes > memory_bytes {
        let reason = format!("{format:?} and initramfs are {bytes} bytes, memory {memory_bytes}");
        return Err(ArchError::load("the kernel")(reason));
    }
    Ok(())
}

fn cmdline(info: &BootInfo<'_>) -> String {
    use crate::config::Serial;
    let line = format!("{BASE_CMDLINE} {} ", linux::kernel_parameters(info));
    match info.serial {
        // The device tree says where the port is.
        Serial::Messages => {
            line + &linux::insert_before_init(info.configured_cmdline(), "earlycon keep_bootcon")
        }
        Serial::None | Serial::Console => line + info.configured_cmdline(),
    }
}

/// Nothing to do: the architected timer stops with the vCPU.
pub(crate) fn after_pause(_vcpu: &VcpuFd) {}

/// The registers to include in a report of a failed vCPU.
pub(crate) fn describe_vcpu(_vcpu: &VcpuFd) -> String {
    "registers are not shown on aarch64".into()
}
