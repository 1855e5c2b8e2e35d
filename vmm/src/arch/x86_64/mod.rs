//! x86_64: a PC without firmware, PCI or ACPI. The kernel is entered in long mode by the 64-bit Linux boot
//! protocol (Documentation/arch/x86/boot.rst). It finds CPUs and interrupts in an MP table and devices on its
//! command line.

mod boot;
mod cmdline;
mod cpuid;
pub(crate) mod layout;
mod mptable;
mod msrs;
mod platform;
mod regs;
mod reset_line;

use super::ArchError;
use kvm_bindings::{
    KVM_CAP_PMU_CAPABILITY, KVM_CAP_X86_NOTIFY_VMEXIT, KVM_PIT_SPEAKER_DUMMY, KVM_PMU_CAP_DISABLE,
    KVM_X86_NOTIFY_VMEXIT_ENABLED, kvm_enable_cap, kvm_pit_config,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

pub(crate) use boot::load;
pub use cmdline::BASE_CMDLINE;
pub use cpuid::{Features, features};
pub(crate) use platform::attach_platform;

/// Whether host memory may be mapped read-only as device registers: x86 keeps caches and uncached reads
/// coherent, so a guest sees what the host wrote whatever memory type its page tables select.
pub(crate) const CAN_MAP_REGISTERS: bool = true;

/// Instructions to get KVM on a host without it.
pub(crate) const NO_KVM: &str = "load the kvm_intel or kvm_amd module, or turn virtualization on in the firmware \
     (in a virtual machine: nested virtualization on its host)";

/// The reason why KVM on some hosts supports fewer CPUs than Koya, for a message: none is known.
pub(crate) const CPU_LIMIT: &str = "";

/// The host's virtualization features, for a report. Always `None`: guests have the same features on every host.
pub(crate) fn host_features(_kvm: &Kvm) -> Option<String> {
    None
}

/// Flat code of a guest that counts down from `rounds`, by two instructions each time, and then resets the
/// machine.
pub(crate) fn probe_guest(rounds: u32) -> Vec<u8> {
    // mov ecx, rounds; l: dec ecx; jnz l; mov al, 0xfe; out 0x64, al; hlt
    let mut code = vec![0x66, 0xb9];
    code.extend(rounds.to_le_bytes());
    code.extend([0x66, 0x49, 0x75, 0xfc, 0xb0, 0xfe, 0xe6, 0x64, 0xf4]);
    code
}

/// Formats of kernel files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum KernelFormat {
    /// Uncompressed ELF, entered by the 64-bit boot protocol.
    Elf,
    /// Compressed image, entered at its 64-bit entry point.
    BzImage,
}

/// Detects the kernel format from the first bytes of a file.
///
/// # Errors
/// A sentence for the user that names the actual type of the file.
pub(crate) fn kernel_format(head: &[u8]) -> Result<KernelFormat, String> {
    const ELF: &[u8] = b"\x7fELF";
    const MACHINE_X86_64: u16 = 62;
    if head.starts_with(ELF) {
        let machine = head.get(18..20).map(|m| u16::from_le_bytes([m[0], m[1]]));
        return match machine {
            Some(MACHINE_X86_64) => Ok(KernelFormat::Elf),
            Some(183) => Err("is an aarch64 kernel, this machine is x86_64".into()),
            other => Err(format!("is an ELF file of machine {other:?}, not x86_64")),
        };
    }
    if head.get(0x202..0x206) == Some(b"HdrS") {
        return Ok(KernelFormat::BzImage);
    }
    if head.get(56..60) == Some(b"ARM\x64") {
        return Err("is an aarch64 kernel, this machine is x86_64".into());
    }
    Err("is neither an ELF vmlinux nor a bzImage".into())
}

/// Scalable vectors: always refused, since only aarch64 has them.
///
/// # Errors
/// [`ArchError::Unsupported`].
pub(crate) fn add_sve(_features: &mut Features, _kvm: &Kvm) -> Result<(), ArchError> {
    Err(ArchError::Unsupported("`sve` on x86_64"))
}

/// Creates the interrupt controllers, and a PIT if KVM has no TSC-deadline timer; limits the host information visible to
/// vCPUs.
///
/// # Errors
/// The error from KVM.
pub fn prepare_vm(features: &mut Features, vm: &VmFd) -> Result<(), ArchError> {
    vm.set_tss_address(layout::KVM_TSS as usize)
        .map_err(ArchError::kvm("place its task state segment"))?;
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP)
        .map_err(ArchError::kvm("place its identity map"))?;
    vm.create_irq_chip()
        .map_err(ArchError::kvm("make the interrupt controllers"))?;
    turn_off_pmu(vm)?;
    bound_interrupt_windows(vm)?;
    msrs::filter(vm)?;
    if !features.has_deadline_timer() {
        let config = kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        };
        vm.create_pit2(config)
            .map_err(ArchError::kvm("make the interval timer"))?;
    }
    Ok(())
}

/// Some exception loops keep a CPU from taking interrupts forever, including the host's timer. CPUs with notify VM exits
/// (Intel's since Sapphire Rapids) leave the guest in that case.
fn bound_interrupt_windows(vm: &VmFd) -> Result<(), ArchError> {
    if vm.check_extension_raw(KVM_CAP_X86_NOTIFY_VMEXIT.into()) <= 0 {
        return Ok(());
    }
    let mut on = kvm_enable_cap {
        cap: KVM_CAP_X86_NOTIFY_VMEXIT,
        ..Default::default()
    };
    // The upper half extends the CPU's built-in window.
    on.args[0] = KVM_X86_NOTIFY_VMEXIT_ENABLED.into();
    vm.enable_cap(&on)
        .map_err(ArchError::kvm("bound the time without interrupts"))
}

/// Performance counters also reveal the activity of the host and of other guests on the same core. On hosts before Linux
/// 5.18, only CPUID hides them.
fn turn_off_pmu(vm: &VmFd) -> Result<(), ArchError> {
    let known = vm.check_extension_raw(KVM_CAP_PMU_CAPABILITY.into());
    if known & KVM_PMU_CAP_DISABLE as i32 == 0 {
        return Ok(());
    }
    let mut off = kvm_enable_cap {
        cap: KVM_CAP_PMU_CAPABILITY,
        ..Default::default()
    };
    off.args[0] = KVM_PMU_CAP_DISABLE.into();
    vm.enable_cap(&off)
        .map_err(ArchError::kvm("turn off performance counters"))
}

/// Sets the features, model-specific registers and local APIC of a vCPU to their power-on state.
///
/// # Errors
/// The error from KVM.
pub fn prepare_vcpu(
    features: &Features,
    vcpu: &VcpuFd,
    index: u32,
    cpus: u32,
) -> Result<(), ArchError> {
    vcpu.set_cpuid2(&features.for_vcpu(index, cpus))
        .map_err(ArchError::kvm("set a vCPU's features"))?;
    regs::set_msrs(vcpu)?;
    regs::set_fpu(vcpu)?;
    regs::set_lapic(vcpu)
}

/// The interrupt controllers: the same ones in every machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Interrupts;

/// Nothing to do once all vCPUs exist.
///
/// # Errors
/// None.
pub fn finish_vm(_vm: &VmFd) -> Result<Interrupts, ArchError> {
    Ok(Interrupts)
}

/// Entry point of the first vCPU; the kernel starts the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Long mode, 64-bit boot protocol.
    Linux64 {
        /// Guest physical address of the first instruction.
        rip: u64,
    },
    /// Real mode at address 0, for flat binaries.
    Real,
}

/// Sets the first vCPU's registers.
///
/// # Errors
/// The error from KVM.
pub fn set_entry(vcpu: &VcpuFd, entry: Entry) -> Result<(), ArchError> {
    match entry {
        Entry::Linux64 { rip } => regs::enter_long_mode(vcpu, rip),
        Entry::Real => regs::enter_real_mode(vcpu),
    }
}

/// Tells a guest that resumes after a pause that it was stopped (KVM_KVMCLOCK_CTRL), so that its watchdogs do
/// not fire. The error of a guest without kvmclock is ignored.
pub(crate) fn after_pause(vcpu: &VcpuFd) {
    if let Err(error) = vcpu.kvmclock_ctrl() {
        log::debug!("KVM_KVMCLOCK_CTRL: {error}");
    }
}

/// The registers to include in a report of a failed vCPU.
pub(crate) fn describe_vcpu(vcpu: &VcpuFd) -> String {
    match (vcpu.get_regs(), vcpu.get_sregs()) {
        (Ok(regs), Ok(sregs)) => format!(
            "rip={:#x} rsp={:#x} rflags={:#x} rax={:#x} rbx={:#x} rcx={:#x} rdx={:#x} cr0={:#x} \
             cr2={:#x} cr3={:#x} cr4={:#x} efer={:#x} cs={:#x}",
            regs.rip,
            regs.rsp,
            regs.rflags,
            regs.rax,
            regs.rbx,
            regs.rcx,
            regs.rdx,
            sregs.cr0,
            sregs.cr2,
            sregs.cr3,
            sregs.cr4,
            sregs.efer,
            sregs.cs.selector
        ),
        _ => "registers can't be read".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_told_apart() {
        let mut bz = vec![0; 0x210];
        bz[0x202..0x206].copy_from_slice(b"HdrS");
        assert_eq!(kernel_format(&bz), Ok(KernelFormat::BzImage));
        assert!(kernel_format(b"#!/bin/sh").unwrap_err().contains("neither"));
        assert!(kernel_format(b"").is_err());
    }
}
