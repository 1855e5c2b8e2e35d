//! Limits on log messages caused by a driver. A separate test, because a process has one logger.

use koya_devices::rng::Rng;
use koya_devices::test_utils::{Driver, IdleLoop};
use koya_devices::virtio::mmio::MmioTransport;
use log::{LevelFilter, Log, Metadata, Record};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Counts lines that a shim or a runtime would write to its log for debugging, from any crate.
struct Lines(AtomicUsize);

static LINES: Lines = Lines(AtomicUsize::new(0));

impl Log for Lines {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, _: &Record<'_>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }

    fn flush(&self) {}
}

/// Registers of virtio 1.2, section 4.2.2.
const STATUS: u64 = 0x70;
const QUEUE_REGISTERS: [u64; 7] = [0x38, 0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4];

#[test]
fn a_driver_that_writes_nonsense_does_not_fill_the_log() {
    log::set_logger(&LINES).unwrap();
    log::set_max_level(LevelFilter::Trace);
    let memory = Driver::new(8).memory().clone();
    let device = Box::new(Rng::default());
    let mut transport = MmioTransport::new(device, memory, Arc::new(IdleLoop::default())).unwrap();
    let mut write = |register: u64, value: u32| transport.write(register, &value.to_le_bytes());
    // More often than a device may be started at once, which takes time.
    for round in 0..300u32 {
        for status in [0, 1, 3] {
            write(STATUS, status);
        }
        // A wrong feature, then the right one alone: VIRTIO_F_VERSION_1.
        for (half, features) in [(0, 1 << 31), (1, 1), (0, 0)] {
            write(0x24, half);
            write(0x20, features);
            write(STATUS, 11);
        }
        for register in QUEUE_REGISTERS {
            for value in [3, 0x10001, u32::MAX, round * 2 + 1] {
                write(register, value);
            }
        }
        // QueueReady without its prerequisites; then an invalid status transition, and one that fails.
        for (register, value) in [(0x44, 1), (STATUS, 7), (STATUS, 15), (STATUS, 0xffff)] {
            write(register, value);
        }
    }
    // A few kinds of warnings, each of which has its own limit.
    let lines = LINES.0.load(Ordering::SeqCst);
    assert!((1..=200).contains(&lines), "{lines} lines");
}
