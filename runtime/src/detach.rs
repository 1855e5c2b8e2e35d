//! Removal of a disk from a running guest: with its consent, or by force after a timeout.

use crate::Error;
use crate::patience::{SILENCE, while_disks_work};
use crate::sandbox::{Disk, Inner, LOOK};
use koya_vmm::AttachedDisk;
use std::time::{Duration, Instant};

/// Time for which a guest may keep using a disk of an ended container, or one that is detached by force.
const BUSY_LIMIT: Duration = Duration::from_secs(10);

impl Inner {
    /// Makes the guest kernel release a disk, after unwritten data has been flushed.
    pub(crate) fn unplug_in_guest(&self, attached: &AttachedDisk) -> Result<(), Error> {
        let (agent, slot) = (self.agent.clone(), attached.mmio_slot);
        let disks = std::slice::from_ref(&attached.disk);
        while_disks_work("detach the disk in the guest", disks, SILENCE, move || {
            agent.detach_disk(slot)
        })
    }

    /// A guest that still uses the disk keeps it; one that neither responds nor accesses it loses it.
    pub(crate) fn detach_disk(&self, disk: &Disk) -> Result<(), Error> {
        let slot = disk.attached.slot;
        match self.unplug_in_guest(&disk.attached) {
            Err(error @ Error::Timeout { .. }) => {
                log::warn!("{}: {error}: detaching it by force", disk.device.name);
                Ok(self.handle.force_detach_disk(slot)?)
            }
            released => {
                released.map_err(|error| self.explain(error))?;
                Ok(self.handle.detach_disk(slot)?)
            }
        }
    }

    /// The users of the disk are gone, or have no say. The guest's reply does not matter after a timeout: otherwise a guest
    /// could keep an image locked forever.
    pub(crate) fn force_detach_disk(&self, disk: &Disk) -> Result<(), Error> {
        let deadline = Instant::now() + BUSY_LIMIT;
        loop {
            let Err(error) = self.detach_disk(disk) else {
                return Ok(());
            };
            if self.handle.ended().is_some() {
                return Err(error);
            }
            if Instant::now() > deadline {
                log::warn!("{error}: detaching it by force");
                return Ok(self.handle.force_detach_disk(disk.attached.slot)?);
            }
            std::thread::sleep(LOOK);
        }
    }
}
