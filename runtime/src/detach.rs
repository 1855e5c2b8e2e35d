//! How a disk is taken from a running guest: with its consent, or without it after a while.

use crate::Error;
use crate::patience::{SILENCE, while_disks_work};
use crate::sandbox::{Disk, Inner, LOOK};
use koya_vmm::AttachedDisk;
use std::time::{Duration, Instant};

/// How long a guest may go on to use a disk of a container that has ended, or that is detached by force.
const BUSY_LIMIT: Duration = Duration::from_secs(10);

impl Inner {
    /// Has the guest's kernel let go of a disk, once it has written out what it has of it.
    pub(crate) fn have_let_go(&self, attached: &AttachedDisk) -> Result<(), Error> {
        let (agent, window) = (self.agent.clone(), attached.mmio_slot);
        let disks = std::slice::from_ref(&attached.disk);
        while_disks_work("detach the disk in the guest", disks, SILENCE, move || {
            agent.detach_disk(window)
        })
    }

    /// A guest that uses it keeps it; one that says nothing, and does nothing to it, loses it.
    pub(crate) fn detach_disk(&self, disk: &Disk) -> Result<(), Error> {
        let slot = disk.attached.slot;
        match self.have_let_go(&disk.attached) {
            Err(error @ Error::Overdue { .. }) => {
                log::warn!("{}: {error}: it is taken away", disk.device.name);
                Ok(self.handle.pull_disk(slot)?)
            }
            released => {
                released.map_err(|error| self.explain(error))?;
                Ok(self.handle.detach_disk(slot)?)
            }
        }
    }

    /// Who used it is gone, or has no say: what the guest's answer is changes nothing after a while, or an
    /// image would be locked for as long as the guest likes.
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
                log::warn!("{error}: it is taken away");
                return Ok(self.handle.pull_disk(disk.attached.slot)?);
            }
            std::thread::sleep(LOOK);
        }
    }
}
