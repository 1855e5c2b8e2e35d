//! What a vCPU says of itself: KVM's supported set, with the topology of this guest.
//!
//! Leaves: Intel SDM volume 2A, "CPUID"; AMD APM volume 3, appendix E.

use super::super::ArchError;
use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2,
};
use kvm_ioctls::{Cap, Kvm};

const VMX: u32 = 1 << 5;
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
const SVM: u32 = 1 << 2;
const HTT: u32 = 1 << 28;

/// What KVM offers to every vCPU. To list it takes a while, above all where KVM itself runs in a
/// virtual machine: some 50 CPUID instructions, each of which its host emulates.
pub struct Features {
    cpuid: CpuId,
    deadline: bool,
}

/// Asks KVM for them.
///
/// # Errors
/// What KVM refused.
pub fn features(kvm: &Kvm) -> Result<Features, ArchError> {
    let mut cpuid = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(ArchError::kvm("list the features it supports"))?;
    add_topology_levels(&mut cpuid).map_err(|_| {
        ArchError::kvm("take more CPUID leaves")(kvm_ioctls::Error::new(libc::E2BIG))
    })?;
    let deadline = kvm.check_extension(Cap::TscDeadlineTimer);
    Ok(Features { cpuid, deadline })
}

impl Features {
    /// Whether KVM's local APIC has a timer that the TSC sets off: without it a guest needs another.
    pub(super) fn has_deadline_timer(&self) -> bool {
        self.deadline
    }

    /// The leaves of vCPU `index` of `cpus`: one package, one thread a core.
    pub(super) fn of_vcpu(&self, index: u32, cpus: u32) -> CpuId {
        let mut cpuid = self.cpuid.clone();
        for entry in cpuid.as_mut_slice() {
            set_entry(entry, index, cpus, self.deadline);
        }
        cpuid
    }
}

/// KVM's set has only the first level of each extended topology leaf, empty (since Linux 6.0); the
/// guest reads on until a level has the type 0.
fn add_topology_levels(cpuid: &mut CpuId) -> Result<(), vmm_sys_util::fam::Error> {
    for function in [0xb, 0x1f] {
        let has = |cpuid: &CpuId, level| {
            let is = |e: &kvm_cpuid_entry2| e.function == function && e.index == level;
            cpuid.as_slice().iter().any(is)
        };
        if !has(cpuid, 0) {
            continue;
        }
        for level in 1..3 {
            if !has(cpuid, level) {
                cpuid.push(kvm_cpuid_entry2 {
                    function,
                    index: level,
                    flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                    ..Default::default()
                })?;
            }
        }
    }
    Ok(())
}

fn set_entry(entry: &mut kvm_cpuid_entry2, index: u32, cpus: u32, deadline: bool) {
    // Bits that number a core inside the package.
    let core_bits = cpus.next_power_of_two().trailing_zeros();
    match entry.function {
        1 => {
            // APIC number, number of APIC numbers in the package, CLFLUSH size as it is.
            entry.ebx = entry.ebx & 0xff00 | index << 24 | (1 << core_bits) << 16;
            // No guest inside the guest yet: nested virtualization is refused, not half there.
            entry.ecx &= !VMX;
            entry.ecx |= HYPERVISOR;
            if deadline {
                entry.ecx |= TSC_DEADLINE;
            }
            if cpus > 1 {
                entry.edx |= HTT;
            } else {
                entry.edx &= !HTT;
            }
        }
        // Deterministic cache parameters: caches up to L2 are a core's, L3 is the package's.
        4 => {
            let level = entry.eax >> 5 & 7;
            let sharing = if level >= 3 {
                (1u32 << core_bits) - 1
            } else {
                0
            };
            entry.eax = entry.eax & 0x3fff | sharing << 14 | ((1 << core_bits) - 1) << 26;
        }
        // Extended topology: level 0 threads, level 1 cores.
        0xb | 0x1f => {
            entry.edx = index;
            (entry.eax, entry.ebx, entry.ecx) = match entry.index {
                0 => (0, 1, 1 << 8),
                1 => (core_bits, cpus, 2 << 8 | 1),
                n => (0, 0, n),
            };
        }
        0x8000_0001 => entry.ecx &= !SVM,
        // Number of threads, and bits of the APIC number that number them.
        0x8000_0008 => entry.ecx = core_bits << 12 | (cpus - 1),
        // AMD cache topology.
        0x8000_001d => {
            let level = entry.eax >> 5 & 7;
            let sharing = if level >= 3 { cpus - 1 } else { 0 };
            entry.eax = entry.eax & 0x3fff | sharing << 14;
        }
        // AMD extended APIC number, core number, node.
        0x8000_001e => {
            entry.eax = index;
            entry.ebx = entry.ebx & !0xffff | index & 0xff;
            entry.ecx = 0;
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            ecx: VMX | SVM,
            ..Default::default()
        }
    }

    #[test]
    fn each_vcpu_has_its_own_apic_number_everywhere() {
        for index in [0, 1, 31] {
            let mut leaf = entry(1, 0);
            set_entry(&mut leaf, index, 32, true);
            assert_eq!(leaf.ebx >> 24, index);
            assert_eq!(leaf.ebx >> 16 & 0xff, 32);
            for function in [0xb, 0x1f] {
                let mut leaf = entry(function, 1);
                set_entry(&mut leaf, index, 32, true);
                assert_eq!((leaf.edx, leaf.eax, leaf.ebx), (index, 5, 32));
            }
            let mut leaf = entry(0x8000_001e, 0);
            set_entry(&mut leaf, index, 32, true);
            assert_eq!(leaf.eax, index);
        }
    }

    #[test]
    fn nested_virtualization_is_not_offered() {
        let mut leaf = entry(1, 0);
        set_entry(&mut leaf, 0, 1, false);
        assert_eq!(leaf.ecx & VMX, 0);
        assert_eq!(leaf.ecx & TSC_DEADLINE, 0);
        let mut leaf = entry(0x8000_0001, 0);
        set_entry(&mut leaf, 0, 1, false);
        assert_eq!(leaf.ecx & SVM, 0);
    }

    #[test]
    fn the_topology_has_all_its_levels_whatever_kvm_lists() {
        // As Linux 6.12 gives them: one empty entry each, and leaf 0x1f only on some hosts.
        let mut cpuid = CpuId::from_entries(&[entry(1, 0), entry(0xb, 0)]).unwrap();
        add_topology_levels(&mut cpuid).unwrap();
        for entry in cpuid.as_mut_slice() {
            set_entry(entry, 3, 4, true);
        }
        let levels = cpuid.as_slice().iter().filter(|e| e.function == 0xb);
        let levels: Vec<_> = levels.map(|e| (e.eax, e.ebx, e.ecx, e.edx)).collect();
        let (threads, cores) = (1 << 8, 2 << 8 | 1);
        assert_eq!(levels, [(0, 1, threads, 3), (2, 4, cores, 3), (0, 0, 2, 3)]);
        assert!(cpuid.as_slice().iter().all(|e| e.function != 0x1f));
    }

    #[test]
    fn three_cpus_take_two_bits() {
        let mut leaf = entry(0xb, 1);
        set_entry(&mut leaf, 2, 3, true);
        assert_eq!((leaf.eax, leaf.ebx), (2, 3));
    }
}
