//! The CPUID leaves of a vCPU: KVM's supported set, with this guest's topology, and without features that are useless or
//! undesirable in a guest: nested virtualization, enclaves, performance counters and traces, serial numbers.
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
/// Performance capabilities, debug store.
const PDCM: u32 = 1 << 15;
const DTES64: u32 = 1 << 2;
const DEBUG_STORE: u32 = 1 << 21;
const SERIAL_NUMBER: u32 = 1 << 18;
/// Leaf 7: enclaves and their launch control, processor trace, architectural branch records.
const SGX: u32 = 1 << 2;
const SGX_LAUNCH: u32 = 1 << 30;
const PROCESSOR_TRACE: u32 = 1 << 25;
const BRANCH_RECORDS: u32 = 1 << 19;
/// Leaf 0x8000_0001: instruction sampling, and performance counters of core, northbridge, time and cache.
const AMD_COUNTERS: u32 = 1 << 10 | 1 << 23 | 1 << 24 | 1 << 27 | 1 << 28;
/// Leaves hidden from guests: serial number, performance counters, enclaves, processor trace, branch records,
/// performance counters again; nested virtualization, instruction sampling, memory encryption, performance counters.
const HIDDEN: &[u32] = &[
    3,
    0xa,
    0x12,
    0x14,
    0x1c,
    0x23,
    0x8000_000a,
    0x8000_001b,
    0x8000_001f,
    0x8000_0022,
];
const HTT: u32 = 1 << 28;

/// CPU features that KVM offers to every vCPU. Listing them is slow, especially under nested virtualization:
/// KVM executes some 50 CPUID instructions, each of which exits to the outer host.
pub struct Features {
    cpuid: CpuId,
    deadline: bool,
}

/// Queries them from KVM.
///
/// # Errors
/// The error from KVM.
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
    /// Whether KVM's local APIC has a TSC-deadline timer; without it a guest needs a PIT.
    pub(super) fn has_deadline_timer(&self) -> bool {
        self.deadline
    }

    /// The leaves of vCPU `index` of `cpus`: one package, one thread per core.
    pub(super) fn for_vcpu(&self, index: u32, cpus: u32) -> CpuId {
        let mut cpuid = self.cpuid.clone();
        for entry in cpuid.as_mut_slice() {
            set_entry(entry, index, cpus, self.deadline);
        }
        cpuid
    }
}

/// Since Linux 6.0, KVM reports only an empty first level for each extended topology leaf; the guest reads
/// levels until one has type 0.
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
    // Bits of the APIC ID that number a core within the package.
    let core_bits = cpus.next_power_of_two().trailing_zeros();
    match entry.function {
        hidden if HIDDEN.contains(&hidden) => {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        }
        1 => {
            // APIC ID, number of APIC IDs in the package; the CLFLUSH size is kept.
            entry.ebx = entry.ebx & 0xff00 | index << 24 | (1 << core_bits) << 16;
            // Nested virtualization is not supported, so it is not advertised.
            entry.ecx &= !(VMX | PDCM | DTES64);
            entry.edx &= !(SERIAL_NUMBER | DEBUG_STORE);
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
        // Deterministic cache parameters: caches up to L2 are per core, L3 is per package.
        4 => {
            let level = entry.eax >> 5 & 7;
            let sharing = if level >= 3 {
                (1u32 << core_bits) - 1
            } else {
                0
            };
            entry.eax = entry.eax & 0x3fff | sharing << 14 | ((1 << core_bits) - 1) << 26;
        }
        7 if entry.index == 0 => {
            entry.ebx &= !(SGX | PROCESSOR_TRACE);
            entry.ecx &= !SGX_LAUNCH;
            entry.edx &= !BRANCH_RECORDS;
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
        0x8000_0001 => entry.ecx &= !(SVM | AMD_COUNTERS),
        // Number of threads, and size of the core part of the APIC ID.
        0x8000_0008 => entry.ecx = core_bits << 12 | (cpus - 1),
        // AMD cache topology.
        0x8000_001d => {
            let level = entry.eax >> 5 & 7;
            let sharing = if level >= 3 { cpus - 1 } else { 0 };
            entry.eax = entry.eax & 0x3fff | sharing << 14;
        }
        // AMD extended APIC ID, core ID, node ID.
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
    fn a_guest_sees_no_counters_serial_numbers_or_enclaves() {
        // A host with every feature.
        let seen = |function: u32| {
            let mut leaf = entry(function, 0);
            (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (u32::MAX, u32::MAX, u32::MAX, u32::MAX);
            set_entry(&mut leaf, 0, 1, false);
            leaf
        };
        for hidden in HIDDEN {
            let leaf = seen(*hidden);
            let registers = (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx);
            assert_eq!(registers, (0, 0, 0, 0), "{hidden:#x}");
        }
        assert_eq!(seen(1).ecx & (1 << 15 | 1 << 2 | 1 << 5), 0);
        assert_eq!(seen(1).edx & (1 << 18 | 1 << 21), 0);
        assert_eq!((seen(7).ebx >> 2 & 1, seen(7).ebx >> 25 & 1), (0, 0));
        assert_eq!((seen(7).ecx >> 30 & 1, seen(7).edx >> 19 & 1), (0, 0));
        assert_eq!(seen(0x8000_0001).ecx & 0x1980_0404, 0);
        // Visible leaves are unchanged.
        assert_eq!(seen(0xd).ecx, u32::MAX);
        assert_eq!(seen(7).ebx >> 5 & 1, 1);
    }

    #[test]
    fn the_topology_has_all_its_levels_whatever_kvm_lists() {
        // As reported by Linux 6.12: one empty entry each, and leaf 0x1f only on some hosts.
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
