//! The guest's physical memory on aarch64.
//!
//! ```text
//! 0x4000_0000  MMIO slots for virtio devices, 4 KiB each
//! 0x8000_0000  panic log (ramoops), reserved in the memory map
//! 0x8001_0000  the rest of memory
//! ............  at the next GiB: range for hot-plugged memory
//! ```

use super::super::MmioSlot;

const MEMORY_START: u64 = 0x8000_0000;
const MMIO_SLOTS: u64 = 0x4000_0000;
/// First shared peripheral interrupt for a virtio device, counted from 0 as KVM's irqfd and device trees do.
const FIRST_IRQ: u32 = 0;

/// Guest physical address of the panic log.
pub(crate) const PANIC_LOG: u64 = MEMORY_START;
/// Size of the panic log, in bytes.
pub(crate) const PANIC_LOG_SIZE: u64 = 0x1_0000;
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
        irq: FIRST_IRQ + MAX_DEVICES as u32,
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
