//! The guest's physical memory on x86_64.
//!
//! ```text
//! 0x0000_0500  GDT, then IDT: only until the kernel loads its own
//! 0x0000_7000  boot parameters ("zero page")
//! 0x0000_8ff0  boot stack, growing down
//! 0x0000_9000  page tables of the first GiB, three pages
//! 0x0002_0000  kernel command line
//! 0x0009_fc00  MP table, where kernels look for it (end of base memory)
//! 0x000a_0000  legacy hole: video memory and ROMs
//! 0x0010_0000  panic log (ramoops), reserved in the memory map
//! 0x0020_0000  memory; the kernel is linked at 0x100_0000
//! ............  the initramfs, as high as possible below the hole
//! 0xc000_0000  MMIO hole, up to 4 GiB
//! 0xd000_0000  MMIO slots for virtio devices, 4 KiB each
//! 0xfec0_0000  IOAPIC
//! 0xfee0_0000  local APICs
//! 0xfffb_c000  KVM's identity map and task state segment
//! 0x1_0000_0000  the rest of memory
//! ............  at the next GiB: range for hot-plugged memory
//! ```

use super::super::MmioSlot;

pub(super) const BOOT_GDT: u64 = 0x500;
pub(super) const BOOT_IDT: u64 = 0x540;
pub(super) const ZERO_PAGE: u64 = 0x7000;
pub(super) const BOOT_STACK: u64 = 0x8ff0;
pub(super) const PML4: u64 = 0x9000;
pub(super) const PDPTE: u64 = 0xa000;
pub(super) const PDE: u64 = 0xb000;
pub(super) const CMDLINE: u64 = 0x2_0000;
/// Maximum length of the command line, including its terminator.
pub(super) const CMDLINE_SIZE: usize = 0x1_0000;
pub(super) const MPTABLE: u64 = 0x9_fc00;
pub(super) const EBDA_END: u64 = 0xa_0000;
pub(super) const HIGH_MEMORY: u64 = 0x10_0000;

/// Guest physical address of the panic log.
pub const PANIC_LOG: u64 = HIGH_MEMORY;
/// Size of the panic log in bytes: two records of half this size.
pub(crate) const PANIC_LOG_SIZE: u64 = 0x1_0000;
/// Load address of a bzImage.
pub(super) const BZIMAGE: u64 = 0x100_0000;

/// Start of the MMIO hole below 4 GiB.
pub(crate) const HOLE_START: u64 = 0xc000_0000;
/// End of the MMIO hole, where memory continues.
pub(crate) const HOLE_END: u64 = 0x1_0000_0000;

const MMIO_SLOTS: u64 = 0xd000_0000;
pub(super) const IOAPIC: u32 = 0xfec0_0000;
pub(super) const LOCAL_APIC: u32 = 0xfee0_0000;
pub(super) const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
pub(super) const KVM_TSS: u64 = 0xfffb_d000;

/// First interrupt for a virtio device: 0 to 4 are legacy PC interrupts (timer, keyboard, cascade, serial
/// ports).
const FIRST_IRQ: u32 = 5;
/// Last pin of the IOAPIC.
pub(super) const LAST_IRQ: u32 = 23;
/// Maximum number of virtio devices of a guest: one per interrupt, except the last, which the hot-plug slots
/// share.
pub(crate) const MAX_DEVICES: usize = (LAST_IRQ - FIRST_IRQ) as usize;

/// The slot of device `index`; `None` from [`MAX_DEVICES`] on.
pub(crate) fn device_slot(index: usize) -> Option<MmioSlot> {
    (index < MAX_DEVICES).then(|| MmioSlot {
        address: MMIO_SLOTS + 0x1000 * index as u64,
        irq: FIRST_IRQ + index as u32,
    })
}

/// Hot-plug slot `index`; they follow the slots of all devices and share one interrupt.
pub(crate) fn hotplug_slot(index: usize) -> MmioSlot {
    MmioSlot {
        address: MMIO_SLOTS + 0x1000 * (MAX_DEVICES + index) as u64,
        irq: LAST_IRQ,
    }
}

/// The address ranges (start, length) of `bytes` of memory: below the hole, and the rest above it.
pub(crate) fn memory_ranges(bytes: u64) -> Vec<(u64, u64)> {
    if bytes <= HOLE_START {
        return vec![(0, bytes)];
    }
    vec![(0, HOLE_START), (HOLE_END, bytes - HOLE_START)]
}

/// Size of a Linux memory block in bytes for a guest with `bytes` of boot memory (probe_memory_block_size()
/// in arch/x86/mm/init_64.c); the hot-pluggable range is a multiple of it.
pub(crate) fn memory_block(bytes: u64) -> u64 {
    match bytes {
        0..0x10_0000_0000 => 128 << 20,
        _ => 2 << 30,
    }
}

/// Start of the hot-pluggable range of a guest with `bytes` of boot memory.
pub(crate) fn hotplug_start(bytes: u64) -> u64 {
    let last = memory_ranges(bytes).last().map_or(0, |r| r.0 + r.1);
    let align = memory_block(bytes).max(1 << 30);
    last.max(HOLE_END).next_multiple_of(align)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_goes_round_the_hole_and_none_is_lost() {
        for gib in [1, 3, 4, 64] {
            let bytes = gib << 30;
            let ranges = memory_ranges(bytes);
            assert_eq!(ranges.iter().map(|r| r.1).sum::<u64>(), bytes);
            for (start, len) in ranges {
                assert!(start + len <= HOLE_START || start >= HOLE_END);
            }
        }
    }

    #[test]
    fn room_for_more_lies_behind_all_memory() {
        for mib in [128, 3072, 3073, 70_001] {
            let bytes = mib << 20;
            let end = memory_ranges(bytes).last().map(|r| r.0 + r.1).unwrap();
            let start = hotplug_start(bytes);
            assert!(start >= end.max(HOLE_END) && start.is_multiple_of(memory_block(bytes)));
        }
    }

    #[test]
    fn devices_have_slots_in_the_hole_and_interrupts_of_their_own() {
        let slots: Vec<_> = (0..MAX_DEVICES).map(|i| device_slot(i).unwrap()).collect();
        for (n, slot) in slots.iter().enumerate() {
            assert!((HOLE_START..u64::from(IOAPIC)).contains(&slot.address));
            assert!(slot.irq <= LAST_IRQ && slot.irq != super::super::platform::SERIAL_IRQ);
            assert!(slots[..n].iter().all(|s| s.irq != slot.irq));
        }
        assert_eq!(device_slot(MAX_DEVICES), None);
    }
}
