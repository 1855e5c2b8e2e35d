//! Disks that come and go while the guest runs.
//!
//! virtio-mmio has no hot plug of its own. A machine may have hot-plug slots
//! ([`VmConfig::disk_slots`](crate::VmConfig::disk_slots)): MMIO slots that read as a device of kind 0, which the
//! guest's driver leaves alone (virtio 1.2, section 4.2.3.1.1). A disk is put into one of them, and
//! whoever is in charge of the guest has its kernel look again (on Linux: write `virtio-mmio.N` to
//! `/sys/bus/platform/drivers/virtio-mmio/bind`; before a disk is taken away, to `unbind`). Interrupts
//! are few, so hot-plug slots share one.

use crate::arch::MmioSlot;
use crate::builder::{Parts, StartError};
use crate::config::{ConfigError, DiskConfig};
use crate::event_loop::LoopHandle;
use crate::kvm::Machine;
use crate::standard_devices::make_disk;
use crate::virtio_slot::{VirtioSlot, connect_kicks, disconnect_kicks};
use koya_devices::blk::BlockHandle;
use koya_devices::virtio::Memory;
use koya_devices::virtio::mmio::MmioTransport;
use koya_host::sync::lock;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, Weak};
use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

/// Why a disk could not be attached or detached.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum AttachError {
    /// The disk's configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// No slot is left.
    #[error("all {0} slots for further disks are taken")]
    NoSlot(usize),
    /// There is no such disk.
    #[error("no disk is attached in slot {0}")]
    NoDisk(usize),
    /// The host refused.
    #[error(transparent)]
    Host(#[from] StartError),
    /// The virtual machine has ended.
    #[error("the virtual machine has ended")]
    Ended,
}

/// A disk that was attached to a running machine.
#[derive(Clone)]
pub struct AttachedDisk {
    /// Which slot it is in, from 0.
    pub slot: usize,
    /// The number of its MMIO slot among all of the machine: the N of Linux's `virtio-mmio.N`.
    pub mmio_slot: usize,
    /// The disk itself.
    pub disk: BlockHandle,
}

/// An MMIO slot for a device that comes later.
pub(crate) struct HotplugSlot {
    /// Among all MMIO slots of the machine.
    pub(crate) number: usize,
    pub(crate) place: MmioSlot,
    pub(crate) device: Arc<VirtioSlot>,
}

/// A machine's hot-plug slots and what is in them.
pub(crate) struct HotPlug {
    slots: Vec<HotplugSlot>,
    /// Of all hot-plug slots: several events of one line could lose an edge between them.
    interrupt: EventFd,
    cpus: u32,
    machine: Weak<Machine>,
    memory: Weak<Memory>,
    event_loop: Weak<LoopHandle>,
    disks: Mutex<Attached>,
}

#[derive(Default)]
struct Attached {
    disks: BTreeMap<usize, AttachedDisk>,
    /// Slots whose disk was taken away from a guest that had not let go of it: its driver may go on to use
    /// the slot, so nothing else is put there.
    retired: BTreeSet<usize>,
    /// The machine is being taken down: nothing is put into a slot any more.
    ended: bool,
}

impl HotPlug {
    /// Slots of the machine that is being built, which has an event loop by now.
    pub(crate) fn new(
        slots: Vec<HotplugSlot>,
        interrupt: EventFd,
        cpus: u32,
        parts: &Parts,
    ) -> Self {
        let event_loop = parts.event_loop.as_ref();
        Self {
            slots,
            interrupt,
            cpus,
            machine: Arc::downgrade(&parts.machine),
            memory: Arc::downgrade(&parts.memory),
            event_loop: event_loop.map_or_else(Weak::new, |l| Arc::downgrade(&l.handle)),
            disks: Mutex::default(),
        }
    }

    pub(crate) fn disks(&self) -> Vec<AttachedDisk> {
        lock(&self.disks).disks.values().cloned().collect()
    }

    /// Puts nothing into a slot from now on.
    pub(crate) fn close(&self) {
        lock(&self.disks).ended = true;
    }

    pub(crate) fn attach(&self, config: &DiskConfig) -> Result<AttachedDisk, AttachError> {
        let machine = self.machine.upgrade().ok_or(AttachError::Ended)?;
        let memory = self.memory.upgrade().ok_or(AttachError::Ended)?;
        let event_loop = self.event_loop.upgrade().ok_or(AttachError::Ended)?;
        // Before the lock: to open a file may take long.
        let spec = config.check(self.cpus)?;
        // Held to the end: two disks must not want the same slot.
        let mut attached = lock(&self.disks);
        if attached.ended {
            return Err(AttachError::Ended);
        }
        let Attached { disks, retired, .. } = &mut *attached;
        let mut free = self.slots.iter().enumerate();
        let (slot, place) = free
            .find(|(slot, _)| !disks.contains_key(slot) && !retired.contains(slot))
            .ok_or(AttachError::NoSlot(self.slots.len()))?;
        let device = make_disk(spec)?;
        let disk = device.handle();
        let host = |source| StartError::Host {
            operation: "make a virtio device",
            source,
        };
        let mut transport =
            MmioTransport::new(Box::new(device), memory, event_loop).map_err(host)?;
        transport.share_interrupt(&self.interrupt).map_err(host)?;
        if let Err(error) = connect_kicks(&machine, &transport, place.place) {
            disconnect_kicks(&machine, &transport, place.place);
            return Err(StartError::from(error).into());
        }
        place.device.put(transport);
        let attached = AttachedDisk {
            slot,
            mmio_slot: place.number,
            disk,
        };
        disks.insert(slot, attached.clone());
        Ok(attached)
    }

    /// Takes the disk in a slot away. If the guest `has_let_go` of it, the slot is free for another.
    pub(crate) fn detach(&self, slot: usize, has_let_go: bool) -> Result<(), AttachError> {
        let machine = self.machine.upgrade().ok_or(AttachError::Ended)?;
        let attached = &mut *lock(&self.disks);
        let place = self.slots.get(slot).ok_or(AttachError::NoDisk(slot))?;
        let disk = attached.disks.remove(&slot);
        disk.ok_or(AttachError::NoDisk(slot))?;
        if !has_let_go {
            attached.retired.insert(slot);
        }
        if let Some(mut transport) = place.device.take() {
            disconnect_kicks(&machine, &transport, place.place);
            transport.shutdown();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Spec, Vm};

    #[test]
    fn a_disk_that_is_pulled_gives_its_image_back_and_not_its_slot() {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(4096).unwrap();
        let config = DiskConfig::new(image.path());
        let mut spec = Spec::flat([0xfa, 0xf4]);
        spec.disk_slots = 2;
        let vm = Vm::builder(spec).start().unwrap();
        let machine = vm.handle();
        let first = machine.attach_disk(&config).unwrap();
        // One writer: the image is locked.
        assert!(machine.attach_disk(&config).is_err());
        machine.pull_disk(first.slot).unwrap();
        assert!(machine.attached_disks().is_empty());
        assert!(machine.pull_disk(first.slot).is_err());
        let second = machine.attach_disk(&config).unwrap();
        assert_ne!(second.slot, first.slot);
        // One that the guest has let go of leaves room for the next.
        machine.detach_disk(second.slot).unwrap();
        let third = machine.attach_disk(&config).unwrap();
        assert_eq!(third.slot, second.slot);
        machine.pull_disk(third.slot).unwrap();
        assert!(matches!(
            machine.attach_disk(&config),
            Err(AttachError::NoSlot(2))
        ));
        vm.stop();
    }
}
