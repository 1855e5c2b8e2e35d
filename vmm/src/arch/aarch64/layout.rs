//! The guest's physical memory on aarch64.
//!
//! ```text
//! 0x0800_0000  interrupt controller: distributor
//! 0x0801_0000  GICv2: interface of the CPUs
//! 0x0810_0000  GICv3: redistributors, 128 KiB for each vCPU
//! 0x0900_0000  serial port
//! 0x4000_0000  MMIO slots for virtio devices, 4 KiB each
//! 0x8000_0000  panic log (ramoops), reserved in the device tree
//! 0x8001_0000  device tree, or flat code
//! 0x801f_f000  stolen time, 64 bytes for each vCPU, reserved in the device tree
//! 0x8020_0000  kernel
//! ............  the initramfs, as high as possible in the first 16 GiB
//! ............  at the next GiB: range for hot-plugged memory
//! ```

use super::super::MmioSlot;

pub(super) const GIC_DISTRIBUTOR: u64 = 0x0800_0000;
/// Size of a distributor (both versions) and of GICv2's CPU interface.
pub(super) const GIC_FRAME: u64 = 0x1_0000;
pub(super) const GIC_V2_CPU: u64 = 0x0801_0000;
pub(super) const GIC_REDISTRIBUTORS: u64 = 0x0810_0000;
/// Size of one vCPU's redistributor: two frames of 64 KiB.
pub(super) const GIC_REDISTRIBUTOR: u64 = 0x2_0000;

pub(super) const SERIAL: u64 = 0x0900_0000;
pub(super) const SERIAL_SIZE: u64 = 0x1000;

const MEMORY_START: u64 = 0x8000_0000;
const MMIO_SLOTS: u64 = 0x4000_0000;
/// First shared peripheral interrupt for a virtio device, counted from 0 as KVM's irqfd and device trees do.
const FIRST_IRQ: u32 = 0;
const HOTPLUG_IRQ: u32 = FIRST_IRQ + MAX_DEVICES as u32;
pub(super) const SERIAL_IRQ: u32 = HOTPLUG_IRQ + 1;
/// Interrupts of the controller, a multiple of 32: 32 private ones of each vCPU, then the shared ones.
pub(super) const GIC_INTERRUPTS: u32 = (32 + SERIAL_IRQ + 1).next_multiple_of(32);

/// Guest physical address of the panic log.
pub const PANIC_LOG: u64 = MEMORY_START;
/// Size of the panic log, in bytes.
pub(crate) const PANIC_LOG_SIZE: u64 = 0x1_0000;
/// Guest physical address of the device tree.
pub(super) const DEVICE_TREE: u64 = PANIC_LOG + PANIC_LOG_SIZE;
/// Guest physical address of flat code, which has no device tree.
pub(super) const FLAT: u64 = DEVICE_TREE;
/// Guest physical address of the kernel, 2 MiB-aligned as Documentation/arch/arm64/booting.rst demands.
pub(super) const KERNEL: u64 = MEMORY_START + 0x20_0000;
/// Room for the stolen time of all vCPUs.
pub(super) const STOLEN_TIME_SIZE: u64 = 0x1000;
pub(super) const STOLEN_TIME: u64 = KERNEL - STOLEN_TIME_SIZE;
/// Room for the device tree.
pub(super) const DEVICE_TREE_SIZE: u64 = STOLEN_TIME - DEVICE_TREE;
/// The initramfs must be in the same 32 GiB window as the kernel: it lies below this address.
pub(super) const INITRAMFS_END: u64 = MEMORY_START + (16 << 30);

/// Guest physical address of the structure in which KVM counts a vCPU's stolen time (Arm DEN 0057, 3.2.2).
pub(super) fn stolen_time(index: u32) -> u64 {
    STOLEN_TIME + STOLEN_TIME_ENTRY * u64::from(index)
}

/// Its size and alignment.
const STOLEN_TIME_ENTRY: u64 = 64;

/// Maximum number of virtio devices of a guest.
pub(crate) const MAX_DEVICES: usize = 64;

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
        irq: HOTPLUG_IRQ,
    }
}

/// The address ranges (start, length) of `bytes` of memory.
pub(crate) fn memory_ranges(bytes: u64) -> Vec<(u64, u64)> {
    vec![(MEMORY_START, bytes)]
}

/// Size of a Linux memory block in bytes; the hot-pluggable range is a multiple of it.
pub(crate) fn memory_block(_bytes: u64) -> u64 {
    128 << 20
}

/// Start of the hot-pluggable range of a guest with `bytes` of boot memory.
pub(crate) fn hotplug_start(bytes: u64) -> u64 {
    (MEMORY_START + bytes).next_multiple_of(1 << 30)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{MAX_CPUS, MAX_DISK_SLOTS, MAX_MEMORY_MIB};

    #[test]
    fn nothing_overlaps() {
        let redistributors = GIC_REDISTRIBUTOR * u64::from(MAX_CPUS);
        let slots = (MAX_DEVICES + MAX_DISK_SLOTS as usize) as u64 * 0x1000;
        let ranges = [
            (GIC_DISTRIBUTOR, GIC_FRAME),
            (GIC_V2_CPU, GIC_FRAME),
            (GIC_REDISTRIBUTORS, redistributors),
            (SERIAL, SERIAL_SIZE),
            (MMIO_SLOTS, slots),
            (PANIC_LOG, PANIC_LOG_SIZE),
            (DEVICE_TREE, DEVICE_TREE_SIZE),
            (STOLEN_TIME, stolen_time(MAX_CPUS) - STOLEN_TIME),
            (KERNEL, 1 << 20),
        ];
        for pair in ranges.windows(2) {
            assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{pair:x?}");
        }
        assert!(KERNEL.is_multiple_of(2 << 20));
        assert!(stolen_time(MAX_CPUS) <= STOLEN_TIME + STOLEN_TIME_SIZE);
        assert!(STOLEN_TIME.is_multiple_of(STOLEN_TIME_ENTRY));
        assert!(DEVICE_TREE_SIZE <= 2 << 20);
    }

    #[test]
    fn memory_is_whole_pages_of_every_host() {
        // Hosts have pages of 4, 16 or 64 KiB, and KVM maps whole ones.
        let is_whole = |bytes: u64| bytes.is_multiple_of(64 << 10);
        for mib in [2, 32, 129, 1000, MAX_MEMORY_MIB] {
            let bytes = mib << 20;
            let block = (hotplug_start(bytes), memory_block(bytes));
            for (start, len) in memory_ranges(bytes).into_iter().chain([block]) {
                assert!(is_whole(start) && is_whole(len), "{start:#x} {len:#x}");
            }
        }
        assert!(is_whole(koya_devices::mem::BLOCK_SIZE));
        // The hardware's own frames may be mapped there.
        for frame in [GIC_DISTRIBUTOR, GIC_V2_CPU, GIC_REDISTRIBUTORS] {
            assert!(is_whole(frame), "{frame:#x}");
        }
    }

    #[test]
    fn every_slot_has_an_interrupt_of_the_controller() {
        let last = device_slot(MAX_DEVICES - 1).unwrap().irq;
        assert!(last < hotplug_slot(0).irq && hotplug_slot(0).irq < SERIAL_IRQ);
        assert!(32 + SERIAL_IRQ < GIC_INTERRUPTS && GIC_INTERRUPTS.is_multiple_of(32));
        assert_eq!(device_slot(MAX_DEVICES), None);
    }
}
