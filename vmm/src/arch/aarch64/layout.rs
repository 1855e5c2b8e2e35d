//! The guest's physical memory on aarch64.
//!
//! ```text
//! 0x4000_0000  MMIO slots for virtio devices, 4 KiB each
//! 0x8000_0000  panic log, reserved: the kernel's last words (ramoops)
//! 0x8001_0000  the rest of memory
//! ............  at the next GiB: room for memory that is plugged while the guest runs
//! ```

use super::super::MmioSlot;

const MEMORY_START: u64 = 0x8000_0000;
const MMIO_SLOTS: u64 = 0x4000_0000;
/// First shared peripheral interrupt for a virtio device, counted from 0 as KVM's irqfd and device trees do.
const FIRST_IRQ: u32 = 0;

/// Where the kernel leaves its last words.
pub(crate) const PANIC_LOG: u64 = MEMORY_START;
/// Size of the panic log, in bytes.
pub(crate) const PANIC_LOG_SIZE: u64 = 0x1_0000;
/// How many virtio devices a guest can have.
pub(crate) const MAX_DEVICES: usize = 64;

/// The slot of device `index`; none beyond [`MAX_DEVICES`].
pub(crate) fn device_slot(index: usize) -> Option<MmioSlot> {
    (index < MAX_DEVICES).then(|| MmioSlot {
        address: MMIO_SLOTS + 0x1000 * index as u64,
        irq: FIRST_IRQ + index as u32,
    })
}

/// Hot-plug slot `index`, behind those of all devices. Hot-plug slots share an interrupt.
pub(crate) fn hotplug_slot(index: usize) -> MmioSlot {
    MmioSlot {
        address: MMIO_SLOTS + 0x1000 * (MAX_DEVICES + index) as u64,
        irq: FIRST_IRQ + MAX_DEVICES as u32,
    }
}

/// Where `bytes` of memory lie.
pub(crate) fn memory_ranges(bytes: u64) -> Vec<(u64, u64)> {
    vec![(MEMORY_START, bytes)]
}

/// Linux's memory block, in bytes: what the room for more memory is a multiple of.
pub(crate) fn memory_block(_bytes: u64) -> u64 {
    128 << 20
}

/// Where the room for more memory begins, if there are `bytes` at the start.
pub(crate) fn hotplug_start(bytes: u64) -> u64 {
    (MEMORY_START + bytes).next_multiple_of(1 << 30)
}
