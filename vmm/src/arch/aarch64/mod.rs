//! aarch64: a machine without firmware, PCI or ACPI, described by a device tree. Its CPUs are turned on and
//! off by PSCI, and its interrupt controller and timers are those of the architecture: KVM emulates all three.

mod boot;
mod cmdline;
mod device_tree;
mod gic;
pub(crate) mod layout;
mod platform;
mod regs;

use super::ArchError;
use kvm_bindings::{
    KVM_ARM_VCPU_POWER_OFF, KVM_ARM_VCPU_PSCI_0_2, KVM_ARM_VCPU_PTRAUTH_ADDRESS,
    KVM_ARM_VCPU_PTRAUTH_GENERIC, KVM_ARM_VCPU_PVTIME_CTRL, KVM_ARM_VCPU_PVTIME_IPA,
    KVM_ARM_VCPU_SVE, KVM_CAP_STEAL_TIME, kvm_device_attr, kvm_vcpu_init,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};

pub(crate) use boot::load;
pub use cmdline::BASE_CMDLINE;
pub use gic::Interrupts;
pub(crate) use platform::attach_platform;
pub(crate) use regs::describe_vcpu;

/// Whether host memory may be mapped read-only as device registers: guests map devices uncached and would not
/// see what the host wrote to its caches.
pub(crate) const CAN_MAP_REGISTERS: bool = false;

/// Instructions to get KVM on a host without it.
pub(crate) const NO_KVM: &str = "KVM is a part of the kernel, which needs its option KVM and has to be started in \
     EL2 (in a virtual machine: nested virtualization on its host)";

/// The reason why KVM on some hosts supports fewer CPUs than Koya, for a message.
pub(crate) const CPU_LIMIT: &str = ", since its interrupt controller is a GICv2";

/// The host's virtualization features, for a report. `None` if KVM cannot create a virtual machine.
pub(crate) fn host_features(kvm: &Kvm) -> Option<String> {
    let vm = kvm.create_vm().ok()?;
    let gic = match Interrupts::create(&vm) {
        Ok((Interrupts::GicV3, _)) => "GICv3",
        Ok((Interrupts::GicV2, _)) => "GICv2",
        Err(_) => "no interrupt controller",
    };
    // Without the capability, addresses have 40 bits.
    let bits = match kvm.get_host_ipa_limit() {
        limit @ 1.. => limit,
        _ => 40,
    };
    Some(format!(
        "the host kernel was started in EL2, guests have {gic} and addresses of {bits} bits"
    ))
}

/// Flat code of a guest that counts down from `rounds`, by two instructions each time, and then resets the
/// machine (PSCI's SYSTEM_RESET).
pub(crate) fn probe_guest(rounds: u32) -> Vec<u8> {
    /// `movz w1` and `movk w1, lsl 16`, with zero immediates.
    const MOVZ_W1: u32 = 0x5280_0001;
    const MOVK_W1: u32 = 0x72a0_0001;
    [
        MOVZ_W1 | (rounds & 0xffff) << 5,
        MOVK_W1 | (rounds >> 16) << 5,
        0x7100_0421, // l: subs w1, w1, #1
        0x54ff_ffe1, // b.ne l
        0x5280_0120, // movz w0, #9
        0x72b0_8000, // movk w0, #0x8400, lsl 16
        0xd400_0002, // hvc #0
        0x1400_0000, // b .
    ]
    .into_iter()
    .flat_map(u32::to_le_bytes)
    .collect()
}

/// Formats of kernel files.
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

/// CPU features that KVM offers to every vCPU.
pub struct Features {
    init: kvm_vcpu_init,
    has_stolen_time: bool,
}

/// Queries them from KVM. Guests have pointer authentication where the host has it, SVE on request (`add_sve`), and no PMU.
///
/// # Errors
/// If the host lacks a required feature.
pub fn features(kvm: &Kvm) -> Result<Features, ArchError> {
    if !kvm.check_extension(Cap::ArmPsci02) {
        return Err(ArchError::Unsupported("a host without PSCI 0.2"));
    }
    let mut init = kvm_vcpu_init::default();
    init.features[0] = 1 << KVM_ARM_VCPU_PSCI_0_2;
    if kvm.check_extension(Cap::ArmPtrAuthAddress) && kvm.check_extension(Cap::ArmPtrAuthGeneric) {
        init.features[0] |= 1 << KVM_ARM_VCPU_PTRAUTH_ADDRESS | 1 << KVM_ARM_VCPU_PTRAUTH_GENERIC;
    }
    let has_stolen_time = kvm.check_extension_raw(KVM_CAP_STEAL_TIME.into()) > 0;
    Ok(Features {
        init,
        has_stolen_time,
    })
}

/// The bit of SVE among the features.
const SVE: u32 = 1 << KVM_ARM_VCPU_SVE;

/// Adds the host's Scalable Vector Extension, with all of its vector lengths.
///
/// # Errors
/// [`ArchError::Unsupported`] if the host has none.
pub(crate) fn add_sve(features: &mut Features, kvm: &Kvm) -> Result<(), ArchError> {
    if !kvm.check_extension(Cap::ArmSve) {
        return Err(ArchError::Unsupported("`sve` on a host without it"));
    }
    features.init.features[0] |= SVE;
    Ok(())
}

/// Determines the CPU type of the vCPUs: that of the host.
///
/// # Errors
/// The error from KVM.
pub fn prepare_vm(features: &mut Features, vm: &VmFd) -> Result<(), ArchError> {
    let mut preferred = kvm_vcpu_init::default();
    vm.get_preferred_target(&mut preferred)
        .map_err(ArchError::kvm("name the host's CPU"))?;
    features.init.target = preferred.target;
    Ok(())
}

/// Sets the identity and features of a vCPU. All but the first vCPU are off until the guest turns them on (PSCI).
///
/// # Errors
/// The error from KVM.
pub fn prepare_vcpu(
    features: &Features,
    vcpu: &VcpuFd,
    index: u32,
    _cpus: u32,
) -> Result<(), ArchError> {
    let mut init = features.init;
    if index > 0 {
        init.features[0] |= 1 << KVM_ARM_VCPU_POWER_OFF;
    }
    vcpu.vcpu_init(&init)
        .map_err(ArchError::kvm("set a vCPU's features"))?;
    if init.features[0] & SVE != 0 {
        // From here on, its vector lengths are fixed; without this, the vCPU would not run.
        vcpu.vcpu_finalize(&(KVM_ARM_VCPU_SVE as i32))
            .map_err(ArchError::kvm("give a vCPU scalable vectors"))?;
    }
    if features.has_stolen_time {
        count_stolen_time(vcpu, index)?;
    }
    Ok(())
}

/// Makes KVM count the time in which the host runs others instead of this vCPU
/// (Documentation/virt/kvm/devices/vcpu.rst). The guest asks for the place by a hypercall, which KVM answers.
fn count_stolen_time(vcpu: &VcpuFd, index: u32) -> Result<(), ArchError> {
    let address = layout::stolen_time(index);
    let attribute = kvm_device_attr {
        group: KVM_ARM_VCPU_PVTIME_CTRL,
        attr: KVM_ARM_VCPU_PVTIME_IPA.into(),
        addr: std::ptr::from_ref(&address) as u64,
        flags: 0,
    };
    vcpu.set_device_attr(&attribute)
        .map_err(ArchError::kvm("count a vCPU's stolen time"))
}

/// Creates the interrupt controller, which KVM initialises for the existing vCPUs; interrupts cannot be connected before.
///
/// # Errors
/// The error from KVM, or a host without such a controller.
pub fn finish_vm(vm: &VmFd) -> Result<Interrupts, ArchError> {
    let (interrupts, device) = Interrupts::create(vm)?;
    interrupts.initialise(&device)?;
    Ok(interrupts)
}

/// Entry point of the first vCPU; the kernel starts the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Guest physical address of the first instruction.
    pub pc: u64,
    /// Guest physical address of the device tree; 0 for flat code.
    pub device_tree: u64,
}

/// Sets the first vCPU's registers.
///
/// # Errors
/// The error from KVM.
pub fn set_entry(vcpu: &VcpuFd, entry: Entry) -> Result<(), ArchError> {
    regs::enter(vcpu, entry)
}

/// Nothing to do: guests have no watchdog that counts host time.
pub(crate) fn after_pause(_vcpu: &VcpuFd) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_told_apart() {
        let mut image = [0; 64];
        image[56..60].copy_from_slice(b"ARM\x64");
        assert_eq!(kernel_format(&image), Ok(KernelFormat::Image));
        for other in [b"\x7fELF".as_slice(), b""] {
            assert!(kernel_format(other).unwrap_err().contains("aarch64 Image"));
        }
    }
}
