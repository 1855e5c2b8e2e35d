//! Virtio devices in MMIO slots: the bus dispatches register accesses, KVM connects the interrupt and the
//! queue notifications.

use crate::arch::{self, ArchError, MmioSlot};
use crate::boot_events::BootEvents;
use crate::bus::{BusDevice, Effect};
use crate::kvm::Machine;
use koya_devices::virtio::mmio::{self, MMIO_SLOT_SIZE, MmioTransport, QUEUE_NOTIFY_OFFSET};
use koya_devices::virtio::registers::RegisterPages;
use koya_host::sync::lock;
use kvm_ioctls::{Cap, IoEventAddress, Kvm};
use std::ops::Range;
use std::sync::{Arc, Mutex};

/// A slot that holds a device or is empty.
pub(crate) struct VirtioSlot {
    transport: Mutex<Option<MmioTransport>>,
    boot_events: Arc<BootEvents>,
}

impl VirtioSlot {
    pub(crate) fn new(
        transport: Option<MmioTransport>,
        boot_events: &Arc<BootEvents>,
    ) -> Arc<Self> {
        Arc::new(Self {
            transport: Mutex::new(transport),
            boot_events: boot_events.clone(),
        })
    }

    /// Puts a device into the slot.
    pub(crate) fn put(&self, transport: MmioTransport) {
        *lock(&self.transport) = Some(transport);
    }

    /// Removes the device from the slot.
    pub(crate) fn take(&self) -> Option<MmioTransport> {
        lock(&self.transport).take()
    }
}

impl BusDevice for VirtioSlot {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match &mut *lock(&self.transport) {
            Some(transport) => transport.read(offset, data),
            None => mmio::read_empty_slot(offset, data),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Effect {
        if let Some(transport) = &mut *lock(&self.transport) {
            let was_active = transport.is_active();
            transport.write(offset, data);
            if transport.is_active() && !was_active {
                self.boot_events.guest(transport.kind().name());
            } else if let Some(reason) = transport.host_failure() {
                self.boot_events
                    .device_failed(transport.kind().name(), reason);
            }
        }
        Effect::None
    }

    /// Stops the device as a reset by its driver does.
    fn shut_down(&self, report: &dyn Fn(&str)) {
        // Taken out, so that other references to the slot do not keep the device.
        if let Some(mut transport) = self.take() {
            report(&format!("threads of a {} device", transport.kind().name()));
            transport.shutdown();
        }
    }
}

/// The address range of a slot.
pub(crate) fn addresses(slot: MmioSlot) -> Range<u64> {
    slot.address..slot.address + MMIO_SLOT_SIZE
}

/// Connects a device: its interrupt, and an ioeventfd for each queue, so that notifications do not exit to
/// user space.
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

/// Connects an ioeventfd for each queue.
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

/// Undoes [`connect_kicks`], also if it failed half-way.
pub(crate) fn disconnect_kicks(machine: &Machine, transport: &MmioTransport, slot: MmioSlot) {
    let fd = machine.fd();
    let notify = IoEventAddress::Mmio(slot.address + QUEUE_NOTIFY_OFFSET);
    for (queue, kick) in transport.kick_events().iter().enumerate() {
        fd.unregister_ioevent(kick, &notify, queue as u32).ok();
    }
}

/// Lets the guest read the registers of the first devices without exits, if the architecture allows it.
pub(crate) fn publish_registers(
    kvm: &Kvm,
    machine: &Machine,
    pages: &RegisterPages,
    count: usize,
) -> Result<(), ArchError> {
    let first = arch::layout::device_slot(0).filter(|_| count > 0);
    let Some(first) = first.filter(|_| arch::CAN_MAP_REGISTERS) else {
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
        let slot = VirtioSlot::new(None, bus.boot_events());
        let start = 0xd000_0000;
        bus.add_memory(start..start + MMIO_SLOT_SIZE, slot.clone())
            .unwrap();
        let mut words = [[0; 4]; 3];
        for (offset, word) in [0, 4, 8].into_iter().zip(&mut words) {
            bus.mmio_read(start + offset, word);
        }
        // Magic value, version, device ID 0.
        assert_eq!(words, [*b"virt", [2, 0, 0, 0], [0; 4]]);
        bus.mmio_write(start + 0x70, &[1, 0, 0, 0]);
        slot.put(device());
        bus.mmio_read(start + 8, &mut words[2]);
        assert_eq!(words[2], [4, 0, 0, 0]);
        bus.shut_down(|_| {});
        assert!(slot.take().is_none());
    }
}
