//! Registers of vCPUs.

use super::super::ArchError;
use super::Entry;
use kvm_bindings::{KVM_REG_ARM_CORE, KVM_REG_ARM64, KVM_REG_SIZE_U64};
use kvm_ioctls::VcpuFd;

/// Interrupts masked, EL1 with its own stack pointer.
const PSTATE: u64 = 0x3c5;

/// Indices of core registers, in 32-bit words of `struct kvm_regs`.
const X0: u64 = 0;
const SP_EL0: u64 = 2 * 31;
const PC: u64 = 2 * 32;
const PSTATE_REGISTER: u64 = 2 * 33;

const fn core(index: u64) -> u64 {
    KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM_CORE as u64 | index
}

/// The MPIDR of a vCPU under KVM (`reset_mpidr` in arch/arm64/kvm/sys_regs.c): clusters of 16, which
/// is the reach of one GICv3 message.
pub(super) fn mpidr(index: u32) -> u64 {
    let index = u64::from(index);
    index & 0xf | (index >> 4 & 0xff) << 8 | (index >> 12 & 0xff) << 16
}

/// Sets the initial state of Documentation/arch/arm64/booting.rst: the first instruction, and the device tree in x0.
pub(super) fn enter(vcpu: &VcpuFd, entry: Entry) -> Result<(), ArchError> {
    let Entry { pc, device_tree } = entry;
    for (index, value) in [(PSTATE_REGISTER, PSTATE), (X0, device_tree), (PC, pc)] {
        vcpu.set_one_reg(core(index), &value.to_le_bytes())
            .map_err(ArchError::kvm("set a vCPU's registers"))?;
    }
    Ok(())
}

/// The registers to include in a report of a failed vCPU.
pub(crate) fn describe_vcpu(vcpu: &VcpuFd) -> String {
    let read = |index| {
        let mut bytes = [0; 8];
        match vcpu.get_one_reg(core(index), &mut bytes) {
            Ok(_) => format!("{:#x}", u64::from_le_bytes(bytes)),
            Err(_) => "?".into(),
        }
    };
    let named = [
        ("pc", PC),
        ("pstate", PSTATE_REGISTER),
        ("sp_el0", SP_EL0),
        ("x0", X0),
        ("x1", 2),
        ("x2", 4),
        ("x29", 2 * 29),
        ("x30", 2 * 30),
    ];
    let words = named.map(|(name, index)| format!("{name}={}", read(index)));
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpus_are_numbered_in_clusters_of_sixteen() {
        assert_eq!([0, 15, 16, 31].map(mpidr), [0, 15, 0x100, 0x10f]);
        let all: std::collections::BTreeSet<_> = (0..64).map(mpidr).collect();
        assert_eq!(all.len(), 64);
    }
}
