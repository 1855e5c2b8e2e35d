//! What is kept of a device and its transport while a machine is saved: plain data with a version.
//!
//! A device is saved when its machine is paused. The transport stops whoever serves the queues (what is
//! under way ends first and is answered), notes how far each queue is, and asks the device for what it
//! has beyond its queues ([`VirtioDevice::save`](super::VirtioDevice::save)). What the host's side is made
//! of (files, taps) is configuration and not in here: it is there before a device is restored.

use crate::balloon::BalloonState;
use crate::blk::BlockState;
use crate::mem::MemState;
use crate::net::NetState;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The version of [`TransportState`] that this crate writes. It reads this one alone.
pub const VERSION: u16 = 1;

/// A device behind its window.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    /// [`VERSION`]
    pub version: u16,
    /// The device status (virtio 1.2, section 2.1).
    pub status: u32,
    /// Features that the driver accepted.
    pub driver_features: u64,
    /// Reasons of the interrupt that the driver has not acknowledged.
    pub interrupt_status: u32,
    /// How often the configuration changed.
    pub config_generation: u32,
    /// The registers that select.
    pub queue_select: u32,
    /// See `queue_select`.
    pub features_select: u32,
    /// See `queue_select`.
    pub driver_features_select: u32,
    /// Each queue.
    pub queues: Vec<QueueState>,
    /// The device itself.
    pub device: DeviceState,
}

/// A queue, and how far the device is in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// Descriptors.
    pub size: u16,
    /// Whether the driver enabled it.
    pub ready: bool,
    /// Guest physical address of the descriptor table.
    pub descriptors: u64,
    /// Of the available ring.
    pub available: u64,
    /// Of the used ring.
    pub used: u64,
    /// The next entry of the available ring.
    pub next_available: u16,
    /// The next entry of the used ring.
    pub next_used: u16,
}

/// What a device has beyond its queues.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum DeviceState {
    /// Entropy has nothing.
    Entropy,
    /// A disk.
    Block(BlockState),
    /// A network.
    Net(NetState),
    /// A balloon.
    Balloon(BalloonState),
    /// Memory that comes and goes.
    Memory(MemState),
}

/// Why a device can't be saved or restored.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum StateError {
    /// A kind of device whose state is not kept yet.
    #[error("devices of kind {0:?} can't be saved")]
    Unsupported(super::DeviceKind),
    /// Written by another version.
    #[error("the state has version {0}, not {VERSION}")]
    Version(u16),
    /// It is another device's, or the device was set up otherwise.
    #[error("the state does not fit the device: {0}")]
    Misfit(&'static str),
    /// The device could not go on.
    #[error("the device can't go on: {0}")]
    Resume(String),
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::balloon::Balloon;
    use crate::blk::{Block, Disk, DiskOptions};
    use crate::mem::Mem;
    use crate::rng::Rng;
    use crate::test_utils::{Buffer, Driver, IdleLoop};
    use crate::virtio::mmio::MmioTransport;
    use crate::virtio::{F_VERSION_1, Memory, VirtioDevice};
    use std::sync::Arc;
    use virtio_bindings::virtio_mmio::*;

    fn transport(device: impl VirtioDevice + 'static, memory: &Arc<Memory>) -> MmioTransport {
        let events = Arc::new(IdleLoop::default());
        MmioTransport::new(Box::new(device), memory.clone(), events).unwrap()
    }

    fn write(transport: &mut MmioTransport, register: u32, value: u32) {
        transport.write(register.into(), &value.to_le_bytes());
    }

    fn read(transport: &mut MmioTransport, register: u32) -> u32 {
        let mut word = [0; 4];
        transport.read(register.into(), &mut word);
        u32::from_le_bytes(word)
    }

    /// What Linux does up to DRIVER_OK, with the first queue where `driver` has it.
    fn start(transport: &mut MmioTransport, driver: &Driver) {
        write(transport, VIRTIO_MMIO_STATUS, 1);
        write(transport, VIRTIO_MMIO_STATUS, 3);
        write(transport, VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
        write(
            transport,
            VIRTIO_MMIO_DRIVER_FEATURES,
            (F_VERSION_1 >> 32) as u32,
        );
        write(transport, VIRTIO_MMIO_STATUS, 11);
        let [descriptors, available, used] = driver.places();
        for (register, value) in [
            (VIRTIO_MMIO_QUEUE_SEL, 0),
            (VIRTIO_MMIO_QUEUE_NUM, driver.size().into()),
            (VIRTIO_MMIO_QUEUE_DESC_LOW, descriptors as u32),
            (VIRTIO_MMIO_QUEUE_AVAIL_LOW, available as u32),
            (VIRTIO_MMIO_QUEUE_USED_LOW, used as u32),
            (VIRTIO_MMIO_QUEUE_READY, 1),
        ] {
            write(transport, register, value);
        }
        write(transport, VIRTIO_MMIO_STATUS, 15);
    }

    fn through_text(state: &TransportState) -> TransportState {
        serde_json::from_str(&serde_json::to_string(state).unwrap()).unwrap()
    }

    fn disk(file: &tempfile::NamedTempFile) -> Block {
        Block::new(Disk::open(file.path(), DiskOptions::default()).unwrap(), 1).unwrap()
    }

    fn read_only(file: &tempfile::NamedTempFile) -> Block {
        let options = DiskOptions {
            read_only: true,
            ..DiskOptions::default()
        };
        Block::new(Disk::open(file.path(), options).unwrap(), 2).unwrap()
    }

    /// A sector's read and its answer, as the driver asks for it.
    fn read_sector(driver: &mut Driver, sector: u64) -> u16 {
        let mut header = [0; 16];
        header[8..].copy_from_slice(&sector.to_le_bytes());
        driver.offer(&[
            Buffer::Readable(header.to_vec()),
            Buffer::Writable(512),
            Buffer::Writable(1),
        ])
    }

    fn wait_for(driver: &mut Driver, head: u16) -> Vec<u8> {
        for _ in 0..2000 {
            if let [(done, len)] = driver.used()[..] {
                assert_eq!((done, len), (head, 513));
                return driver.written(head, 513);
            }
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        panic!("no answer");
    }

    /// A disk that is saved goes on where it was, here and in another process's place.
    #[test]
    fn a_disk_goes_on_where_it_was() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let sectors: Vec<u8> = (0..8u8).flat_map(|n| [n; 512]).collect();
        std::fs::write(file.path(), sectors).unwrap();
        let mut driver = Driver::new(16);
        let memory = driver.memory().clone();
        let mut first = transport(disk(&file), &memory);
        let head = read_sector(&mut driver, 3);
        start(&mut first, &driver);
        assert_eq!(wait_for(&mut driver, head)[0], 3);

        let state = first.save().unwrap();
        assert_eq!(
            (state.queues[0].next_available, state.queues[0].next_used),
            (1, 1)
        );
        // What is asked for while it is saved is served afterwards, once.
        let head = read_sector(&mut driver, 5);
        first.resume().unwrap();
        assert_eq!(wait_for(&mut driver, head)[0], 5);

        let state = through_text(&first.save().unwrap());
        drop(first);
        let head = read_sector(&mut driver, 6);
        let mut second = transport(disk(&file), &memory);
        second.restore(&state).unwrap();
        assert_eq!(read(&mut second, VIRTIO_MMIO_STATUS), 15);
        second.resume().unwrap();
        assert_eq!(wait_for(&mut driver, head)[0], 6);
        let again = second.save().unwrap();
        assert_eq!(
            (again.queues[0].next_available, again.queues[0].next_used),
            (3, 3)
        );
    }

    #[test]
    fn devices_are_as_they_were() {
        let memory = Driver::new(8).memory().clone();
        let balloon = Balloon::new().unwrap();
        balloon.handle().set_target(3 << 20);
        let mem = Mem::new(1 << 32, 512 << 20, 128 << 20).unwrap();
        mem.handle().set_requested(64 << 20);
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(4096).unwrap();
        let same: [(MmioTransport, MmioTransport); 4] = [
            (
                transport(Rng::default(), &memory),
                transport(Rng::default(), &memory),
            ),
            (
                transport(balloon, &memory),
                transport(Balloon::new().unwrap(), &memory),
            ),
            (
                transport(mem, &memory),
                transport(Mem::new(1 << 32, 512 << 20, 128 << 20).unwrap(), &memory),
            ),
            (
                transport(read_only(&file), &memory),
                transport(read_only(&file), &memory),
            ),
        ];
        for (mut old, mut new) in same {
            write(&mut old, VIRTIO_MMIO_STATUS, 1);
            write(&mut old, VIRTIO_MMIO_STATUS, 3);
            write(&mut old, VIRTIO_MMIO_QUEUE_SEL, 1);
            let state = old.save().unwrap();
            new.restore(&through_text(&state)).unwrap();
            assert_eq!(new.save().unwrap(), state);
            for register in (0..0x130).step_by(4) {
                assert_eq!(
                    read(&mut new, register),
                    read(&mut old, register),
                    "{register:#x}"
                );
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let memory = Driver::new(8).memory().clone();
        let mut rng = transport(Rng::default(), &memory);
        let good = rng.save().unwrap();
        let refused = |rng: &mut MmioTransport, change: &dyn Fn(&mut TransportState)| {
            let mut state = good.clone();
            change(&mut state);
            rng.restore(&state).unwrap_err()
        };
        assert_eq!(
            refused(&mut rng, &|s| s.version = 9),
            StateError::Version(9)
        );
        let misfits: [&dyn Fn(&mut TransportState); 5] = [
            &|state| state.queues.clear(),
            &|state| state.queues[0].size = 3,
            &|state| state.queues[0].descriptors = 8,
            &|state| (state.status, state.driver_features) = (15, 1),
            &|state| state.device = DeviceState::Balloon(BalloonState::default()),
        ];
        for misfit in misfits {
            assert!(matches!(refused(&mut rng, misfit), StateError::Misfit(_)));
        }
        // A state that says that it runs, with rings that are no memory: nothing is started.
        let mut state = good.clone();
        (state.status, state.driver_features) = (15, F_VERSION_1);
        state.queues[0] = QueueState {
            size: 8,
            ready: true,
            descriptors: u64::MAX - 15,
            ..QueueState::default()
        };
        rng.restore(&state).unwrap();
        assert!(matches!(rng.resume(), Err(StateError::Resume(_))));
    }
}
