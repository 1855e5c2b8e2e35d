//! Points in time during a start, and counts of the exits to this process.
//!
//! Called by the thread that builds the machine and by vCPU threads. A guest can activate its devices as
//! often as it likes, so only the first events are kept.

use koya_host::sync::lock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::Instant;

/// Maximum number of events: the builder's, and the first activation of each device.
const MAX_EVENTS: usize = 32;

/// A point in time during a start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BootEvent {
    /// Time of the event.
    pub at: Instant,
    /// Name of the event: `kernel loaded`, `first MMIO exit`, `virtio-fs`, ...
    pub name: &'static str,
    /// Whether the guest caused it.
    pub by_guest: bool,
}

/// Number of exits to this process. Exits that KVM handles itself are not counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Exits {
    /// Exits for I/O ports.
    pub port: u64,
    /// Exits for device memory.
    pub mmio: u64,
}

/// A device that the host could not start when the guest's driver asked for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceFailure {
    /// Name of the kind of device: `virtio-fs`, ...
    pub device: &'static str,
    /// The operation and the error from the host.
    pub reason: String,
}

/// The first events of a machine, and its exit counts.
#[derive(Debug, Default)]
pub struct BootEvents {
    events: Mutex<Vec<BootEvent>>,
    port_exits: AtomicU64,
    mmio_exits: AtomicU64,
    failure: OnceLock<DeviceFailure>,
}

impl BootEvents {
    /// The events so far, oldest first.
    pub fn events(&self) -> Vec<BootEvent> {
        lock(&self.events).clone()
    }

    /// The exit counts so far.
    pub fn exits(&self) -> Exits {
        Exits {
            port: self.port_exits.load(Ordering::Relaxed),
            mmio: self.mmio_exits.load(Ordering::Relaxed),
        }
    }

    /// The first device that the host could not start. The guest continues without it.
    pub fn device_failure(&self) -> Option<&DeviceFailure> {
        self.failure.get()
    }

    /// Records that a step of the builder is complete.
    pub(crate) fn built(&self, name: &'static str) {
        self.note(name, false);
    }

    /// Records an action of the guest.
    pub(crate) fn guest(&self, name: &'static str) {
        self.note(name, true);
    }

    pub(crate) fn device_failed(&self, device: &'static str, reason: &str) {
        self.failure.get_or_init(|| DeviceFailure {
            device,
            reason: reason.to_owned(),
        });
    }

    pub(crate) fn port_exit(&self) {
        if self.port_exits.fetch_add(1, Ordering::Relaxed) == 0 {
            self.guest("first port exit");
        }
    }

    pub(crate) fn mmio_exit(&self) {
        if self.mmio_exits.fetch_add(1, Ordering::Relaxed) == 0 {
            self.guest("first MMIO exit");
        }
    }

    fn note(&self, name: &'static str, by_guest: bool) {
        let mut events = lock(&self.events);
        if events.is_empty() {
            events.reserve_exact(MAX_EVENTS);
        }
        if events.len() < MAX_EVENTS {
            let at = Instant::now();
            events.push(BootEvent { at, name, by_guest });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_exits_are_recorded_and_all_are_counted() {
        let events = BootEvents::default();
        events.built("kernel loaded");
        for _ in 0..3 {
            events.port_exit();
        }
        events.mmio_exit();
        assert_eq!(events.exits(), Exits { port: 3, mmio: 1 });
        let names: Vec<_> = events
            .events()
            .iter()
            .map(|m| (m.name, m.by_guest))
            .collect();
        let expected = [
            ("kernel loaded", false),
            ("first port exit", true),
            ("first MMIO exit", true),
        ];
        assert_eq!(names, expected);
    }

    #[test]
    fn events_are_bounded() {
        let events = BootEvents::default();
        for _ in 0..10 * MAX_EVENTS {
            events.guest("virtio-fs");
        }
        assert_eq!(events.events().len(), MAX_EVENTS);
    }
}
