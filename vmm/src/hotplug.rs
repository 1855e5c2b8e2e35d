//! Disks that come and go while the guest runs.
//!
//! virtio-mmio has no hot plug of its own. A machine may have spare windows
//! ([`VmConfig::disk_slots`](crate::VmConfig::disk_slots)): they read as a device of kind 0, which the
//! guest's driver leaves alone (virtio 1.2, section 4.2.3.1.1). A disk is put behind one of them, and
//! whoever is in charge of the guest has its kernel look again (on Linux: write `virtio-mmio.N` to
//! `/sys/bus/platform/drivers/virtio-mmio/bind`; before a disk is taken away, to `unbind`). Interrupts
//! are few, so spare windows share one.

use crate::arch::MmioSlot;
use crate::builder::{StartError, connect_kicks, disconnect_kicks, make_disk};
use crate::bus::Window;
use crate::config::{ConfigError, DiskConfig};
use crate::event_loop::LoopHandle;
use crate::kvm::Machine;
use crate::sync::lock;
use koya_devices::blk::BlockHandle;
use koya_devices::virtio::Memory;
use koya_devices::virtio::mmio::MmioTransport;
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
    /// No window is left.
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
    /// The number of its window among all of the machine: the N of Linux's `virtio-mmio.N`.
    pub window: usize,
    /// The disk itself.
    pub disk: BlockHandle,
}

/// A spare window.
pub(crate) struct Spare {
    pub(crate) number: usize,
    pub(crate) place: MmioSlot,
    pub(crate) window: Window,
}

/// A machine's spare windows and what is in them.
pub(crate) struct HotPlug {
    spares: Vec<Spare>,
    /// Of all spare windows: several events of one line could lose an edge between them.
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
    /// the window, so nothing else is put there.
    retired: BTreeSet<usize>,
    /// The machine is being taken down: nothing is put into a window any more.
    ended: bool,
}

impl HotPlug {
    pub(crate) fn new(
        spares: Vec<Spare>,
        interrupt: EventFd,
        cpus: u32,
        machine: &Arc<Machine>,
        memory: &Arc<Memory>,
        event_loop: &Arc<LoopHandle>,
    ) -> Self {
        Self {
            spares,
            interrupt,
            cpus,
            machine: Arc::downgrade(machine),
            memory: Arc::downgrade(memory),
            event_loop: Arc::downgrade(event_loop),
            disks: Mutex::default(),
        }
    }

    pub(crate) fn disks(&self) -> Vec<AttachedDisk> {
        lock(&self.disks).disks.values().cloned().collect()
    }

    /// Puts nothing into a window from now on.
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
        let mut free = self.spares.iter().enumerate();
        let (slot, spare) = free
            .find(|(slot, _)| !disks.contains_key(slot) && !retired.contains(slot))
            .ok_or(AttachError::NoSlot(self.spares.len()))?;
        let device = make_disk(spec)?;
        let disk = device.handle();
        let host = |source| StartError::Host {
            operation: "make a virtio device",
            source,
        };
        let mut transport =
            MmioTransport::new(Box::new(device), memory, event_loop).map_err(host)?;
        transport.share_interrupt(&self.interrupt).map_err(host)?;
        if let Err(error) = connect_kicks(&machine, &transport, spare.place) {
            disconnect_kicks(&machine, &transport, spare.place);
            return Err(StartError::from(error).into());
        }
        *lock(&spare.window) = Some(transport);
        let attached = AttachedDisk {
            slot,
            window: spare.number,
            disk,
        };
        disks.insert(slot, attached.clone());
        Ok(attached)
    }

    /// Takes the disk in a slot away. If the guest `has_let_go` of it, the slot is free for another.
    pub(crate) fn detach(&self, slot: usize, has_let_go: bool) -> Result<(), AttachError> {
        let machine = self.machine.upgrade().ok_or(AttachError::Ended)?;
        let attached = &mut *lock(&self.disks);
        let spare = self.spares.get(slot).ok_or(AttachError::NoDisk(slot))?;
        let disk = attached.disks.remove(&slot);
        disk.ok_or(AttachError::NoDisk(slot))?;
        if !has_let_go {
            attached.retired.insert(slot);
        }
        let transport = lock(&spare.window).take();
        if let Some(mut transport) = transport {
            disconnect_kicks(&machine, &transport, spare.place);
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
