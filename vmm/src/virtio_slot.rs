//! Virtio devices at their MMIO slots: the bus reaches each by its registers, KVM connects its interrupt
//! and its queues' kicks.

use crate::arch::{self, ArchError, MmioSlot};
use crate::bus::{BusDevice, Effect};
use crate::kvm::Machine;
use crate::marks::Marks;
use koya_devices::virtio::mmio::{self, MmioTransport, QUEUE_NOTIFY_OFFSET, WINDOW_SIZE};
use koya_devices::virtio::registers::RegisterPages;
use koya_host::sync::lock;
use kvm_ioctls::{Cap, IoEventAddress, Kvm};
use std::ops::Range;
use std::sync::{Arc, Mutex};

/// A slot: a device, or none for now.
pub(crate) struct VirtioSlot {
    transport: Mutex<Option<MmioTransport>>,
    marks: Arc<Marks>,
}

impl VirtioSlot {
    pub(crate) fn new(transport: Option<MmioTransport>, marks: &Arc<Marks>) -> Arc<Self> {
        Arc::new(Self {
            transport: Mutex::new(transport),
            marks: marks.clone(),
        })
    }

    /// Puts a device there.
    pub(crate) fn put(&self, transport: MmioTransport) {
        *lock(&self.transport) = Some(transport);
    }

    /// Takes the device away.
    pub(crate) fn take(&self) -> Option<MmioTransport> {
        lock(&self.transport).take()
    }
}

impl BusDevice for VirtioSlot {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match &mut *lock(&self.transport) {
            Some(transport) => transport.read(offset, data),
            None => mmio::read_empty(offset, data),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Effect {
        if let Some(transport) = &mut *lock(&self.transport) {
            let was_active = transport.is_active();
            transport.write(offset, data);
            if transport.is_active() && !was_active {
                self.marks.guest(transport.kind().name());
            }
        }
        Effect::None
    }

    /// As a reset by its driver would stop it.
    fn shut_down(&self, about: &dyn Fn(&str)) {
        // Taken out: whoever still has the slot must not keep the device.
        if let Some(mut transport) = self.take() {
            about(&format!("threads of a {} device", transport.kind().name()));
            transport.shutdown();
        }
    }
}

/// The addresses of a slot.
pub(crate) fn addresses(slot: MmioSlot) -> Range<u64> {
    slot.address..slot.address + WINDOW_SIZE
}

/// Connects one device: its interrupt, and a kick for each queue that never leaves the kernel's
/// side of KVM_RUN for longer than an eventfd write.
pub(crate) fn connect(
    machine: &Machine,
    transport: &MmioTransport,
    slot: MmioSlot,
) -> Result<(), ArchError> {
    machine
        .fd()
        .register_irqfd(transport.interrupt_event(), slot.irq)
        .map_err(ArchError::kvm("connect a device's interrupt"))?;
    connect_kicks(machine, transport, slot)
}

/// Connects a kick for each queue.
pub(crate) fn connect_kicks(
    machine: &Machine,
    transport: &MmioTransport,
    slot: MmioSlot,
) -> Result<(), ArchError> {
    let notify = IoEventAddress::Mmio(slot.address + QUEUE_NOTIFY_OFFSET);
    for (queue, kick) in transport.kick_events().iter().enumerate() {
        machine
            .fd()
            .register_ioevent(kick, &notify, queue as u32)
            .map_err(ArchError::kvm("connect a queue's kick"))?;
    }
    Ok(())
}

/// Takes back what [`connect_kicks`] did, as far as it got.
pub(crate) fn disconnect_kicks(machine: &Machine, transport: &MmioTransport, slot: MmioSlot) {
    let fd = machine.fd();
    let notify = IoEventAddress::Mmio(slot.address + QUEUE_NOTIFY_OFFSET);
    for (queue, kick) in transport.kick_events().iter().enumerate() {
        fd.unregister_ioevent(kick, &notify, queue as u32).ok();
    }
}

/// Lets the guest read the registers of the first devices by itself, where it can.
pub(crate) fn publish_registers(
    kvm: &Kvm,
    machine: &Machine,
    pages: &RegisterPages,
    count: usize,
) -> Result<(), ArchError> {
    let first = arch::layout::device_slot(0).filter(|_| count > 0);
    let Some(first) = first.filter(|_| arch::READS_MEMORY_OF_DEVICES) else {
        return Ok(());
    };
    if !kvm.check_extension(Cap::ReadonlyMem) {
        return Ok(());
    }
    machine
        .map_registers(pages, first.address, count)
        .map_err(ArchError::kvm("map devices' registers"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::Bus;
    use koya_devices::rng::Rng;
    use koya_devices::test_utils::{Driver, IdleLoop};

    fn device() -> MmioTransport {
        let memory = Driver::new(8).memory().clone();
        let device = Box::new(Rng::default());
        MmioTransport::new(device, memory, Arc::new(IdleLoop::default())).unwrap()
    }

    #[test]
    fn an_empty_slot_says_that_it_is_one() {
        let mut bus = Bus::default();
        let slot = VirtioSlot::new(None, bus.marks());
        let start = 0xd000_0000;
        bus.add_memory(start..start + WINDOW_SIZE, slot.clone())
            .unwrap();
        let mut words = [[0; 4]; 3];
        for (offset, word) in [0, 4, 8].into_iter().zip(&mut words) {
            bus.mmio_read(start + offset, word);
        }
        // Magic, version, and no device.
        assert_eq!(words, [*b"virt", [2, 0, 0, 0], [0; 4]]);
        bus.mmio_write(start + 0x70, &[1, 0, 0, 0]);
        slot.put(device());
        bus.mmio_read(start + 8, &mut words[2]);
        assert_eq!(words[2], [4, 0, 0, 0]);
        bus.shut_down(|_| {});
        assert!(slot.take().is_none());
    }
}
