//! Saving and restoring devices with their transport, including a custom device.

use event_manager::MutEventSubscriber;
use koya_devices::balloon::{Balloon, BalloonState};
use koya_devices::blk::{Block, Disk, DiskOptions};
use koya_devices::mem::Mem;
use koya_devices::rng::Rng;
use koya_devices::test_utils::{Buffer, Driver, IdleLoop};
use koya_devices::virtio::mmio::MmioTransport;
use koya_devices::virtio::state::{QueueState, TransportState};
use koya_devices::virtio::{
    ActivateError, Activation, DeviceKind, F_VERSION_1, Memory, Payload, Schema, StateError,
    VirtioDevice, Worker,
};
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

/// Initializes a device up to DRIVER_OK as Linux does, with the first queue of `driver`.
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
    let [descriptors, available, used] = driver.ring_addresses();
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

fn saved(transport: &mut MmioTransport) -> TransportState {
    TransportState::SCHEMA
        .decode(&transport.save().unwrap())
        .unwrap()
}

fn restore(transport: &mut MmioTransport, state: &TransportState) -> Result<(), StateError> {
    transport.restore(&TransportState::SCHEMA.encode(state).unwrap())
}

fn through_text(state: &Payload) -> Payload {
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

/// Makes a read request for a sector available.
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

/// A saved disk continues at its position, in place and after a restore in another transport.
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

    let state = saved(&mut first);
    assert_eq!(
        (state.queues[0].next_available, state.queues[0].next_used),
        (1, 1)
    );
    // A request made while the disk is saved is served once afterwards.
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
    let again = saved(&mut second);
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
    let good = saved(&mut rng);
    let refused = |rng: &mut MmioTransport, change: &dyn Fn(&mut TransportState)| {
        let mut state = good.clone();
        change(&mut state);
        restore(rng, &state).unwrap_err()
    };
    let balloon = Schema::new("virtio-balloon", 1);
    let balloon = balloon.encode(&BalloonState::default()).unwrap();
    let others = refused(&mut rng, &|state| state.device = balloon.clone());
    assert!(matches!(others, StateError::Schema { .. }), "{others}");
    let mut newer = TransportState::SCHEMA.encode(&good).unwrap();
    newer.version = 9;
    assert!(matches!(
        rng.restore(&newer),
        Err(StateError::Version { found: 9, .. })
    ));
    let misfits: [&dyn Fn(&mut TransportState); 6] = [
        &|state| state.queues.clear(),
        &|state| state.queues[0].size = 3,
        &|state| state.queues[0].descriptors = 8,
        &|state| (state.status, state.driver_features) = (15, 1),
        // Status of a running device, with features that were never checked.
        &|state| (state.status, state.driver_features) = (7, 1),
        &|state| state.status = 1 << 31,
    ];
    for misfit in misfits {
        assert!(matches!(refused(&mut rng, misfit), StateError::Mismatch(_)));
    }
    // State of a running device with rings outside memory: nothing is started.
    let mut state = good.clone();
    (state.status, state.driver_features) = (15, F_VERSION_1);
    state.queues[0] = QueueState {
        size: 8,
        ready: true,
        descriptors: u64::MAX - 15,
        ..QueueState::default()
    };
    restore(&mut rng, &state).unwrap();
    assert!(matches!(rng.resume(), Err(StateError::Resume(_))));
}

/// A custom device, which counts writes to its configuration space.
struct Counter(u32);

const COUNTER: Schema = Schema::new("example.org/counter", 1);

impl VirtioDevice for Counter {
    fn kind(&self) -> DeviceKind {
        DeviceKind(4242)
    }

    fn queue_sizes(&self) -> &[u16] {
        &[8]
    }

    fn write_config(&mut self, _offset: u64, data: &[u8]) {
        self.0 += data.len() as u32;
    }

    fn activate(&mut self, _activation: Activation) -> Result<Worker, ActivateError> {
        Ok(Worker::OwnThreads)
    }

    fn save(&self) -> Result<Payload, StateError> {
        COUNTER.encode(&self.0)
    }

    fn restore(&mut self, state: &Payload) -> Result<(), StateError> {
        self.0 = COUNTER.decode(state)?;
        Ok(())
    }

    fn reset(&mut self, _worker: Option<Box<dyn MutEventSubscriber + Send>>) {}
}

#[test]
fn an_embedders_own_device_is_one_like_any_other() {
    let memory = Driver::new(8).memory().clone();
    let mut old = transport(Counter(0), &memory);
    assert_eq!(read(&mut old, VIRTIO_MMIO_DEVICE_ID), 4242);
    write(&mut old, VIRTIO_MMIO_CONFIG, 1);
    let state = saved(&mut old);
    assert_eq!(COUNTER.decode::<u32>(&state.device).unwrap(), 4);
    let mut new = transport(Counter(0), &memory);
    restore(&mut new, &state).unwrap();
    assert_eq!(saved(&mut new), state);
    let mut other = transport(Rng::default(), &memory);
    assert!(restore(&mut other, &state).is_err());
}
