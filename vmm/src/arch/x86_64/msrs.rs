//! The model-specific registers available to a guest: those below and no others, whatever this host's KVM would emulate or
//! pass through. Any other one causes a general protection fault, as on a CPU without it.
//!
//! Numbers: Intel SDM volume 4, AMD APM volume 2 appendix A, Documentation/virt/kvm/x86/msr.rst.

use super::super::ArchError;
use kvm_bindings::KVM_CAP_X86_MSR_FILTER;
use kvm_ioctls::{MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VmFd};
use std::ops::RangeInclusive;

/// Deliberately left out: protected processor inventory numbers (0x4e, 0x4f, 0xc001_02f0), performance counters
/// (0xc1 on, 0x186 on, 0x309 on, 0xc001_0200 on), branch records and processor trace (0x560 on), energy and
/// temperature of the package (0x606 on), and registers of nested virtualization.
#[rustfmt::skip]
const ALLOWED: &[RangeInclusive<u32>] = &[
    0x10..=0x12,    // time-stamp counter, kvmclock's old numbers
    0x17..=0x17,    // platform number, zero under KVM
    0x1b..=0x1b,    // base of the local APIC
    0x2a..=0x2c,    // power-on settings, frequency
    0x3a..=0x3b,    // feature control, adjustment of the time-stamp counter
    0x48..=0x49,    // speculation control, predictor commands
    0x79..=0x79,    // microcode update, which KVM ignores
    0x8b..=0x8b,    // microcode revision, a constant of KVM
    0xcd..=0xcf,    // bus frequency, platform, core capabilities
    0xe1..=0xe1,    // user waits
    0xfe..=0xfe,    // MTRRs: count
    0x10a..=0x10b,  // mitigated CPU bugs, flush command
    0x119..=0x11e,  // cache control
    0x122..=0x123,  // TSX, special register buffer
    0x140..=0x140,  // CPUID faulting
    0x174..=0x176,  // SYSENTER
    0x179..=0x17b,  // machine checks
    0x198..=0x1a0,  // P-states, thermal interrupts, miscellaneous features: constants of KVM
    0x1c4..=0x1c5,  // extended feature disable
    0x1d9..=0x1de,  // debug control, last branch
    0x200..=0x277,  // MTRRs, page attributes
    0x280..=0x2ff,  // machine checks, MTRRs
    0x400..=0x47f,  // machine checks: banks
    0x6a0..=0x6a8,  // shadow stacks
    0x6e0..=0x6e0,  // TSC deadline
    0x800..=0x8ff,  // x2APIC
    0xd90..=0xda0,  // bounds, supervisor state of XSAVE
    0x4b56_4d00..=0x4b56_4d0f, // KVM's own
    0xc000_0080..=0xc000_0084, // EFER, SYSCALL
    0xc000_0100..=0xc000_0103, // segment bases, TSC_AUX
    0xc001_0010..=0xc001_0064, // system configuration, machine checks, P-states
    0xc001_0111..=0xc001_011f, // SMM, virtualization off, speculation control
    0xc001_0140..=0xc001_0141, // mitigated CPU bugs
    0xc001_1004..=0xc001_102f, // CPUID overrides, configuration of units
];

/// The windows of KVM's filter (base, number of registers): up to 16, each of up to 12,288 registers.
const WINDOWS: &[(u32, u32)] = &[
    (0, 0x1000),
    (0x4b56_4d00, 0x100),
    (0xc000_0000, 0x200),
    (0xc001_0000, 0x2000),
];

/// Makes KVM refuse all other registers. Not possible on hosts before Linux 5.10.
///
/// # Errors
/// The error from KVM.
pub(super) fn filter(vm: &VmFd) -> Result<(), ArchError> {
    if vm.check_extension_raw(KVM_CAP_X86_MSR_FILTER.into()) <= 0 {
        return Ok(());
    }
    let bitmaps: Vec<_> = WINDOWS.iter().map(|window| bitmap(*window)).collect();
    let windows = WINDOWS.iter().zip(&bitmaps);
    let ranges = windows.map(|((base, msr_count), bitmap)| MsrFilterRange {
        flags: MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE,
        base: *base,
        msr_count: *msr_count,
        bitmap,
    });
    vm.set_msr_filter(MsrFilterDefaultAction::DENY, &ranges.collect::<Vec<_>>())
        .map_err(ArchError::kvm("limit a guest's MSRs"))
}

/// A bit for each number of a window. It is computed at each start, so it iterates over ranges instead of numbers.
fn bitmap((base, count): (u32, u32)) -> Vec<u8> {
    let mut bits = vec![0; count.div_ceil(8) as usize];
    for range in ALLOWED {
        let (first, last) = (
            *range.start().max(&base),
            *range.end().min(&(base + count - 1)),
        );
        for offset in (first..=last).map(|msr| msr - base) {
            bits[offset as usize / 8] |= 1 << (offset % 8);
        }
    }
    bits
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_allowed_register_is_in_a_window_that_kvm_takes() {
        assert!(WINDOWS.len() <= 16);
        for range in ALLOWED {
            let inside = |(base, count): &(u32, u32)| {
                *range.start() >= *base && *range.end() < base + count && *count <= 0x600 * 8
            };
            assert!(WINDOWS.iter().any(inside), "{range:x?}");
        }
    }

    fn is_allowed(msr: u32) -> bool {
        ALLOWED.iter().any(|range| range.contains(&msr))
    }

    #[test]
    fn every_window_has_the_bits_of_its_registers() {
        for &(base, count) in WINDOWS {
            let bits = bitmap((base, count));
            for offset in 0..count {
                let bit = bits[offset as usize / 8] >> (offset % 8) & 1;
                assert_eq!(bit == 1, is_allowed(base + offset), "{:#x}", base + offset);
            }
        }
    }

    #[test]
    fn what_names_a_host_or_counts_its_events_is_not_allowed() {
        for msr in [
            0x4e, 0x4f, 0xc1, 0x186, 0x1a2, 0x309, 0x345, 0x38f, 0x560, 0x606, 0x1000,
        ] {
            assert!(!is_allowed(msr), "{msr:#x}");
        }
        for msr in [
            0xc001_0000,
            0xc001_0200,
            0xc001_0299,
            0xc001_02f0,
            0xc001_1030,
        ] {
            assert!(!is_allowed(msr), "{msr:#x}");
        }
        let bits = bitmap((0x40, 0x10));
        assert_eq!(bits, [0, 0b11]);
    }
}
