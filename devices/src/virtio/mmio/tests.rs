//! The registers as seen by a driver: virtio 1.2, sections 4.2.2 and 3.1.

use super::*;
use crate::balloon::Balloon;
use crate::rng::Rng;
use crate::test_utils::{IdleLoop, MEMORY_SIZE};
use crate::virtio::{F_EVENT_IDX, F_VERSION_1};
use crate::vsock::{Ports, Vsock};

struct Driver {
    transport: MmioTransport,
    event_loop: Arc<IdleLoop>,
}

impl Driver {
    fn new() -> Self {
        Self::of(Box::new(Rng::default()), private_page().unwrap())
    }

    fn of(device: Box<dyn VirtioDevice>, registers: RegisterPage) -> Self {
        let memory = Memory::from_ranges(&[(GuestAddress(0), MEMORY_SIZE)]).unwrap();
        let (memory, event_loop) = (Arc::new(memory), Arc::new(IdleLoop::default()));
        let events = event_loop.clone();
        let transport = MmioTransport::with_registers(device, memory, events, registers).unwrap();
        Self {
            transport,
            event_loop,
        }
    }

    fn read(&mut self, register: u32) -> u32 {
        let mut bytes = [0; 4];
        self.transport.read(register.into(), &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn write(&mut self, register: u32, value: u32) {
        self.transport.write(register.into(), &value.to_le_bytes());
    }

    fn status(&mut self, value: u32) -> u32 {
        self.write(VIRTIO_MMIO_STATUS, value);
        self.read(VIRTIO_MMIO_STATUS)
    }

    fn accept(&mut self, features: u64) {
        self.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 0);
        self.write(VIRTIO_MMIO_DRIVER_FEATURES, features as u32);
        self.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
        self.write(VIRTIO_MMIO_DRIVER_FEATURES, (features >> 32) as u32);
    }

    /// ACKNOWLEDGE, DRIVER, features, FEATURES_OK.
    fn negotiate(&mut self) {
        assert_eq!(self.status(1), 1);
        assert_eq!(self.status(3), 3);
        self.accept(F_VERSION_1 | F_EVENT_IDX);
        assert_eq!(self.status(11), 11);
    }

    fn set_queue(&mut self, descriptors: u32) {
        self.write(VIRTIO_MMIO_QUEUE_SEL, 0);
        self.write(VIRTIO_MMIO_QUEUE_NUM, 16);
        self.write(VIRTIO_MMIO_QUEUE_DESC_LOW, descriptors);
        self.write(VIRTIO_MMIO_QUEUE_AVAIL_LOW, 0x2000);
        self.write(VIRTIO_MMIO_QUEUE_USED_LOW, 0x3000);
        self.write(VIRTIO_MMIO_QUEUE_READY, 1);
    }
}

const NEEDS_RESET: u32 = 64;

#[test]
fn magic_version_and_device_id_are_read() {
    let mut driver = Driver::new();
    assert_eq!(driver.read(VIRTIO_MMIO_MAGIC_VALUE), 0x7472_6976);
    assert_eq!(driver.read(VIRTIO_MMIO_VERSION), 2);
    assert_eq!(driver.read(VIRTIO_MMIO_DEVICE_ID), 4);
    assert_eq!(driver.read(VIRTIO_MMIO_QUEUE_NUM_MAX), 64);
    driver.write(VIRTIO_MMIO_QUEUE_SEL, 1);
    assert_eq!(driver.read(VIRTIO_MMIO_QUEUE_NUM_MAX), 0);
    driver.write(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 1);
    assert_eq!(driver.read(VIRTIO_MMIO_DEVICE_FEATURES) & 1, 1);
    assert_eq!(driver.read(VIRTIO_MMIO_SHM_LEN_LOW), u32::MAX);
}

#[test]
fn a_driver_that_follows_the_steps_gets_a_running_device() {
    let mut driver = Driver::new();
    driver.negotiate();
    driver.set_queue(0x1000);
    assert_eq!(driver.read(VIRTIO_MMIO_QUEUE_READY), 1);
    assert_eq!(driver.status(15), 15);
    assert_eq!(driver.event_loop.len(), 1);
    // A reset stops the worker and clears all state.
    assert_eq!(driver.status(0), 0);
    assert!(driver.event_loop.is_empty());
    driver.write(VIRTIO_MMIO_QUEUE_SEL, 0);
    assert_eq!(driver.read(VIRTIO_MMIO_QUEUE_READY), 0);
    // The device can be initialized again.
    driver.negotiate();
    driver.set_queue(0x1000);
    assert_eq!(driver.status(15), 15);
    assert_eq!(driver.event_loop.len(), 1);
}

#[test]
fn features_that_were_not_offered_are_not_confirmed() {
    for features in [0, F_EVENT_IDX, F_VERSION_1 | 1, F_VERSION_1 | 1 << 63] {
        let mut driver = Driver::new();
        driver.status(1);
        driver.status(3);
        driver.accept(features);
        assert_eq!(driver.status(11), 3, "{features:#x}");
    }
}

#[test]
fn features_are_fixed_once_confirmed() {
    let mut driver = Driver::new();
    driver.negotiate();
    driver.accept(0);
    assert_eq!(driver.transport.driver_features, F_VERSION_1 | F_EVENT_IDX);
}

#[test]
fn steps_cannot_be_skipped() {
    let mut driver = Driver::new();
    for value in [15, 11, 4, 8] {
        assert_eq!(driver.status(value), 0, "{value}");
    }
    driver.status(1);
    assert_eq!(driver.status(15), 1);
    assert!(driver.event_loop.is_empty());
}

#[test]
fn a_running_device_without_its_queue_needs_a_reset() {
    let mut driver = Driver::new();
    driver.negotiate();
    assert_eq!(driver.status(15), 15 | NEEDS_RESET);
    assert!(driver.event_loop.is_empty());
    assert_eq!(driver.status(0), 0);
}

#[test]
fn rings_outside_memory_need_a_reset() {
    for descriptors in [MEMORY_SIZE as u32, MEMORY_SIZE as u32 - 16, 0xffff_fff0] {
        let mut driver = Driver::new();
        driver.negotiate();
        driver.set_queue(descriptors);
        assert_eq!(
            driver.status(15) & NEEDS_RESET,
            NEEDS_RESET,
            "{descriptors:#x}"
        );
    }
}

#[test]
fn a_ready_queue_does_not_change() {
    let mut driver = Driver::new();
    driver.negotiate();
    driver.set_queue(0x1000);
    driver.write(VIRTIO_MMIO_QUEUE_DESC_LOW, 0x5000);
    driver.write(VIRTIO_MMIO_QUEUE_NUM, 8);
    assert_eq!(driver.transport.queues[0].desc_table(), 0x1000);
    assert_eq!(driver.transport.queues[0].size(), 16);
}

#[test]
fn the_registers_of_a_running_device_do_not_change() {
    let mut driver = Driver::new();
    driver.negotiate();
    driver.set_queue(0x1000);
    assert_eq!(driver.status(15), 15);
    let queue = |driver: &Driver| {
        let queue = &driver.transport.queues[0];
        (
            (queue.desc_table(), queue.avail_ring(), queue.used_ring()),
            (queue.size(), queue.ready()),
        )
    };
    let before = queue(&driver);
    for register in [
        VIRTIO_MMIO_QUEUE_NUM,
        VIRTIO_MMIO_QUEUE_DESC_LOW,
        VIRTIO_MMIO_QUEUE_DESC_HIGH,
        VIRTIO_MMIO_QUEUE_AVAIL_LOW,
        VIRTIO_MMIO_QUEUE_AVAIL_HIGH,
        VIRTIO_MMIO_QUEUE_USED_LOW,
        VIRTIO_MMIO_QUEUE_USED_HIGH,
        VIRTIO_MMIO_QUEUE_READY,
        QUEUE_RESET,
    ] {
        for value in [0, 8, 0x5000, u32::MAX] {
            driver.write(register, value);
            assert_eq!(queue(&driver), before, "{register:#x} = {value:#x}");
        }
    }
    // Neither do the negotiated features, and only a reset lowers the status.
    driver.accept(0);
    assert_eq!(driver.transport.driver_features, F_VERSION_1 | F_EVENT_IDX);
    for value in [1, 3, 11] {
        assert_eq!(driver.status(value), 15);
    }
    assert_eq!(driver.event_loop.len(), 1);
    driver.write(VIRTIO_MMIO_QUEUE_READY, 1);
    assert_eq!(driver.read(VIRTIO_MMIO_QUEUE_READY), 1);
}

#[test]
fn a_fault_sets_status_interrupt_and_generation() {
    let mut driver = Driver::new();
    driver.negotiate();
    driver.set_queue(0x1000);
    driver.status(15);
    let line = driver.transport.line.clone();
    line.queue(0);
    assert_eq!(driver.read(VIRTIO_MMIO_INTERRUPT_STATUS), 1);
    driver.write(VIRTIO_MMIO_INTERRUPT_ACK, 1);
    assert_eq!(driver.read(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
    let before = driver.read(VIRTIO_MMIO_CONFIG_GENERATION);
    line.config();
    assert_eq!(driver.read(VIRTIO_MMIO_CONFIG_GENERATION), before + 1);
    line.needs_reset();
    assert_eq!(driver.read(VIRTIO_MMIO_STATUS), 15 | NEEDS_RESET);
    assert_eq!(driver.read(VIRTIO_MMIO_INTERRUPT_STATUS), 2);
    // Only a reset leaves that state.
    assert_eq!(driver.status(15) & NEEDS_RESET, NEEDS_RESET);
    assert!(driver.transport.interrupt_event().read().is_ok());
}

#[test]
fn accesses_of_other_sizes_read_zero_and_write_nothing() {
    let mut driver = Driver::new();
    let mut byte = [0xaa];
    driver.transport.read(0, &mut byte);
    assert_eq!(byte, [0]);
    driver.transport.write(u64::from(VIRTIO_MMIO_STATUS), &[1]);
    driver
        .transport
        .write(u64::from(VIRTIO_MMIO_STATUS), &[1; 8]);
    assert_eq!(driver.read(VIRTIO_MMIO_STATUS), 0);
    let mut wide = [0xaa; 8];
    driver.transport.read(0xff8, &mut wide);
    assert_eq!(wide, [0; 8]);
}

#[test]
fn random_accesses_never_panic() {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut driver = Driver::new();
    for _ in 0..200_000 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let register = (state as u32 % 0x140) & !3;
        if state >> 40 & 1 == 0 {
            driver.read(register);
        } else {
            driver.write(register, (state >> 32) as u32 % 64);
        }
    }
}

/// A guest with the page mapped reads it without asking the device.
#[test]
fn a_register_page_has_what_a_read_returns() {
    let pages = RegisterPages::new(1).unwrap();
    let device = || Box::new(Vsock::new(0x1_0000_0003, Ports::new().unwrap()));
    let config = device().config().unwrap();
    let mut driver = Driver::of(device(), pages.page(0).unwrap());
    let page = pages.page(0).unwrap();
    let shown = |driver: &mut Driver| {
        for offset in (0..0x110).step_by(4) {
            assert_eq!(page.load(offset), driver.read(offset), "{offset:#x}");
        }
    };
    shown(&mut driver);
    assert_eq!(page.load(VIRTIO_MMIO_DEVICE_ID), DeviceKind::VSOCK.0);
    assert_eq!(page.load(VIRTIO_MMIO_CONFIG).to_le_bytes(), config[..4]);
    assert_eq!(page.load(VIRTIO_MMIO_CONFIG + 4), 1);
    driver.write(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 1);
    assert_eq!(page.load(VIRTIO_MMIO_DEVICE_FEATURES) & 1, 1, "version 1");
    driver.status(1);
    shown(&mut driver);
    driver.write(VIRTIO_MMIO_QUEUE_SEL, 3);
    assert_eq!(page.load(VIRTIO_MMIO_QUEUE_NUM_MAX), 0);
    driver.transport.line.queue(0);
    assert_eq!(page.load(VIRTIO_MMIO_INTERRUPT_STATUS), 1);
    driver.status(0);
    shown(&mut driver);
    assert_eq!(page.load(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
    assert_eq!(page.load(VIRTIO_MMIO_QUEUE_NUM_MAX), 256);
}

/// Changes from either side are in the page before the interrupt is raised.
#[test]
fn a_register_page_follows_configuration_changes() {
    let pages = RegisterPages::new(1).unwrap();
    let balloon = Balloon::new().unwrap();
    let handle = balloon.handle();
    handle.set_target(3 * crate::balloon::PAGE_SIZE);
    let mut driver = Driver::of(Box::new(balloon), pages.page(0).unwrap());
    let page = pages.page(0).unwrap();
    let (target, actual) = (VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_CONFIG + 4);
    assert_eq!(page.load(target), 3);
    handle.set_target(7 * crate::balloon::PAGE_SIZE);
    assert_eq!(page.load(target), 7);
    driver.write(actual, 5);
    assert_eq!((page.load(actual), driver.read(actual)), (5, 5));
    assert_eq!(handle.actual(), 5 * crate::balloon::PAGE_SIZE);
    driver.status(0);
    assert_eq!((page.load(target), page.load(actual)), (7, 0));
}

/// The patched driver in the guest kernel relies on it (`guest-kernel/patches`, virtio-mmio).
#[test]
fn a_reset_clears_all_that_was_written() {
    let mut driver = Driver::new();
    driver.write(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 1);
    driver.negotiate();
    driver.write(VIRTIO_MMIO_QUEUE_DESC_HIGH, 1);
    driver.write(VIRTIO_MMIO_QUEUE_AVAIL_HIGH, 1);
    driver.write(VIRTIO_MMIO_QUEUE_USED_HIGH, 1);
    driver.write(VIRTIO_MMIO_QUEUE_NUM, 16);
    driver.write(VIRTIO_MMIO_QUEUE_SEL, 7);
    driver.status(0);
    let transport = &driver.transport;
    let queue = &transport.queues[0];
    assert_eq!(
        (queue.desc_table(), queue.avail_ring(), queue.used_ring()),
        (0, 0, 0)
    );
    assert_eq!(queue.size(), queue.max_size());
    let selected = (
        transport.features_select,
        transport.driver_features_select,
        transport.queue_select,
    );
    assert_eq!(selected, (0, 0, 0));
    assert_eq!(driver.read(VIRTIO_MMIO_VENDOR_ID), 0x4159_4f4b);
}

#[test]
fn a_driver_that_starts_its_device_all_the_time_waits() {
    let mut driver = Driver::new();
    let began = Instant::now();
    for _ in 0..256 + 10 {
        driver.negotiate();
        assert_eq!(driver.status(15) & 15, 15);
        driver.status(0);
    }
    // Ten more than at once, fifty in a second.
    assert!(began.elapsed().as_millis() >= 190, "{:?}", began.elapsed());
}
