//! Disks and networks that are attached and detached while the guest runs.
//!
//! virtio-mmio has no hot plug. A machine may have hot-plug slots
//! ([`VmConfig::disk_slots`](crate::VmConfig::disk_slots)): MMIO slots that read as a device with ID 0, which
//! the guest's driver ignores (virtio 1.2, section 4.2.3.1.1). After a device is put into one, the owner has
//! the guest kernel probe the slot again (on Linux: write its name to
//! `/sys/bus/platform/drivers/virtio-mmio/bind`, and to `unbind` before the device is removed; the name is
//! `virtio-mmio.N`, or `ADDRESS.virtio_mmio` with a device tree). Interrupts are scarce, so hot-plug slots share
//! one.

use crate::arch::MmioSlot;
use crate::builder::{Parts, StartError};
use crate::config::{ConfigError, DiskConfig, NetConfig};
use crate::event_loop::LoopHandle;
use crate::kvm::Machine;
use crate::standard_devices::make_disk;
use crate::virtio_slot::{VirtioSlot, connect_kicks, disconnect_kicks};
use koya_devices::blk::BlockHandle;
use koya_devices::net::NetHandle;
use koya_devices::virtio::mmio::MmioTransport;
use koya_devices::virtio::{Memory, VirtioDevice};
use koya_host::sync::lock;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, Weak};
use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

/// Errors when a disk or a network is attached or detached.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum AttachError {
    /// The device's configuration is invalid.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// All hot-plug slots are in use.
    #[error("all {0} slots for further disks and networks are taken")]
    NoSlot(usize),
    /// There is no disk in this slot.
    #[error("no disk is attached in slot {0}")]
    NoDisk(usize),
    /// There is no network in this slot.
    #[error("no network is attached in slot {0}")]
    NoNetwork(usize),
    /// The host refused an operation.
    #[error(transparent)]
    Host(#[from] StartError),
    /// The virtual machine has ended.
    #[error("the virtual machine has ended")]
    Ended,
}

/// A disk attached to a running machine.
#[derive(Clone)]
pub struct AttachedDisk {
    /// Index of its hot-plug slot, from 0.
    pub slot: usize,
    /// Number of its slot among all MMIO slots in the order of their addresses: the N of Linux's `virtio-mmio.N`.
    pub mmio_slot: usize,
    /// The disk itself.
    pub disk: BlockHandle,
}

/// A network attached to a running machine.
#[derive(Clone)]
pub struct AttachedNetwork {
    /// Index of its hot-plug slot, from 0.
    pub slot: usize,
    /// As [`AttachedDisk::mmio_slot`].
    pub mmio_slot: usize,
    /// The network itself.
    pub network: NetHandle,
}

/// An MMIO slot for a device attached later.
pub(crate) struct HotplugSlot {
    /// Number among all MMIO slots of the machine.
    pub(crate) number: usize,
    pub(crate) place: MmioSlot,
    pub(crate) device: Arc<VirtioSlot>,
}

/// A machine's hot-plug slots and the devices in them.
pub(crate) struct HotplugSlots {
    slots: Vec<HotplugSlot>,
    /// Shared by all hot-plug slots: separate irqfds on one interrupt could lose an edge between them.
    interrupt: EventFd,
    cpus: u32,
    machine: Weak<Machine>,
    memory: Weak<Memory>,
    event_loop: Weak<LoopHandle>,
    attached: Mutex<Attached>,
}

#[derive(Default)]
struct Attached {
    disks: BTreeMap<usize, AttachedDisk>,
    networks: BTreeMap<usize, AttachedNetwork>,
    /// Slots whose device was removed before the guest released it. Its driver may still use the slot, so it is
    /// not used again.
    retired: BTreeSet<usize>,
    /// Slots whose device completes its last requests.
    leaving: BTreeSet<usize>,
    /// The machine is being torn down: no more devices are attached.
    ended: bool,
}

impl Attached {
    fn is_free(&self, slot: usize) -> bool {
        let is_used = self.disks.contains_key(&slot) || self.networks.contains_key(&slot);
        !is_used && !self.retired.contains(&slot) && !self.leaving.contains(&slot)
    }
}

impl HotplugSlots {
    /// The slots of a machine that is being built and already has an event loop.
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
            attached: Mutex::default(),
        }
    }

    pub(crate) fn disks(&self) -> Vec<AttachedDisk> {
        lock(&self.attached).disks.values().cloned().collect()
    }

    pub(crate) fn networks(&self) -> Vec<AttachedNetwork> {
        lock(&self.attached).networks.values().cloned().collect()
    }

    /// Refuses further devices.
    pub(crate) fn close(&self) {
        lock(&self.attached).ended = true;
    }

    pub(crate) fn attach_disk(&self, config: &DiskConfig) -> Result<AttachedDisk, AttachError> {
        // Before the lock is taken, because opening a file may take long.
        let spec = config.check(self.cpus)?;
        let mut attached = lock(&self.attached);
        let slot = self.free_slot(&attached)?;
        let device = make_disk(spec)?;
        let disk = AttachedDisk {
            slot,
            mmio_slot: self.slots[slot].number,
            disk: device.handle(),
        };
        self.put(slot, Box::new(device))?;
        attached.disks.insert(slot, disk.clone());
        Ok(disk)
    }

    pub(crate) fn attach_network(
        &self,
        config: &NetConfig,
    ) -> Result<AttachedNetwork, AttachError> {
        let mut attached = lock(&self.attached);
        let slot = self.free_slot(&attached)?;
        let device = config.check()?;
        let network = AttachedNetwork {
            slot,
            mmio_slot: self.slots[slot].number,
            network: device.handle(),
        };
        self.put(slot, Box::new(device))?;
        attached.networks.insert(slot, network.clone());
        Ok(network)
    }

    /// A slot that can be used. The lock is held until a device is in it, so that two devices cannot take the same slot.
    fn free_slot(&self, attached: &Attached) -> Result<usize, AttachError> {
        if attached.ended {
            return Err(AttachError::Ended);
        }
        let free = (0..self.slots.len()).find(|slot| attached.is_free(*slot));
        free.ok_or(AttachError::NoSlot(self.slots.len()))
    }

    fn put(&self, slot: usize, device: Box<dyn VirtioDevice>) -> Result<(), AttachError> {
        let machine = self.machine.upgrade().ok_or(AttachError::Ended)?;
        let memory = self.memory.upgrade().ok_or(AttachError::Ended)?;
        let event_loop = self.event_loop.upgrade().ok_or(AttachError::Ended)?;
        let host = |source| StartError::Host {
            operation: "make a virtio device",
            source,
        };
        let HotplugSlot {
            place, device: at, ..
        } = &self.slots[slot];
        let mut transport = MmioTransport::new(device, memory, event_loop).map_err(host)?;
        transport.share_interrupt(&self.interrupt).map_err(host)?;
        if let Err(error) = connect_kicks(&machine, &transport, *place) {
            disconnect_kicks(&machine, &transport, *place);
            return Err(StartError::from(error).into());
        }
        at.put(transport);
        Ok(())
    }

    /// Removes the disk from a slot. If the guest has released it, the slot can be used again.
    pub(crate) fn detach_disk(&self, slot: usize, is_released: bool) -> Result<(), AttachError> {
        let disks = |attached: &mut Attached| attached.disks.remove(&slot).is_some();
        self.detach(slot, is_released, disks, AttachError::NoDisk(slot))
    }

    /// Removes the network from a slot, as [`detach_disk`](Self::detach_disk) does with a disk.
    pub(crate) fn detach_network(&self, slot: usize, is_released: bool) -> Result<(), AttachError> {
        let networks = |attached: &mut Attached| attached.networks.remove(&slot).is_some();
        self.detach(slot, is_released, networks, AttachError::NoNetwork(slot))
    }

    /// Removes the device from a slot, if `remove` finds it; otherwise it is `missing`.
    fn detach(
        &self,
        slot: usize,
        is_released: bool,
        remove: impl FnOnce(&mut Attached) -> bool,
        missing: AttachError,
    ) -> Result<(), AttachError> {
        let machine = self.machine.upgrade().ok_or(AttachError::Ended)?;
        {
            let attached = &mut *lock(&self.attached);
            if !remove(attached) {
                return Err(missing);
            }
            if !is_released {
                attached.retired.insert(slot);
            }
            attached.leaving.insert(slot);
        }
        // Without the lock: requests in flight are waited for, as long as the host's storage takes, and what ends a machine
        // looks at its disks.
        if let Some(mut transport) = self.slots[slot].device.take() {
            disconnect_kicks(&machine, &transport, self.slots[slot].place);
            transport.shutdown();
        }
        lock(&self.attached).leaving.remove(&slot);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Spec, Vm};

    #[test]
    fn a_pulled_disk_frees_its_image_but_not_its_slot() {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(4096).unwrap();
        let config = DiskConfig::new(image.path());
        let mut spec = Spec::flat([0xfa, 0xf4]);
        spec.disk_slots = 2;
        let vm = Vm::builder(spec).start().unwrap();
        let machine = vm.handle();
        let first = machine.attach_disk(&config).unwrap();
        // The image is locked for one writer.
        assert!(machine.attach_disk(&config).is_err());
        machine.force_detach_disk(first.slot).unwrap();
        assert!(machine.attached_disks().is_empty());
        assert!(machine.force_detach_disk(first.slot).is_err());
        let second = machine.attach_disk(&config).unwrap();
        assert_ne!(second.slot, first.slot);
        // After a detach that the guest agreed to, the slot can be used again.
        machine.detach_disk(second.slot).unwrap();
        let third = machine.attach_disk(&config).unwrap();
        assert_eq!(third.slot, second.slot);
        machine.force_detach_disk(third.slot).unwrap();
        assert!(matches!(
            machine.attach_disk(&config),
            Err(AttachError::NoSlot(2))
        ));
        vm.stop();
    }
}
