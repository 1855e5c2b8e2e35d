//! Maps guest addresses to devices. Fixed once the virtual machine is built: vCPU threads look up devices
//! without a lock, and each device has its own lock.
//!
//! There are two address spaces: memory, and I/O ports where the architecture has them. The platform
//! ([`crate::arch`]) decides which devices are in which.

use crate::boot_events::BootEvents;
use std::ops::Range;
use std::sync::Arc;

/// The effect of a guest access on the virtual machine as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    None,
    /// CPU reset.
    Reset,
}

/// A device on the bus. Called from vCPU threads, possibly several at a time.
pub trait BusDevice: Send + Sync {
    /// The guest reads at an offset from the start of the range, at least one byte. Bytes left unmodified
    /// read as ones.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// The guest writes at an offset from the start of the range, at least one byte.
    fn write(&self, offset: u64, data: &[u8]) -> Effect;
    /// Shuts the device down: when this returns, none of its threads run. `report` is called with the name of each part that
    /// is waited for.
    fn shut_down(&self, _report: &dyn Fn(&str)) {}
}

/// Two devices overlap at this address.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
#[error("there is a device at {0:#x} already")]
pub struct Overlap(pub u64);

/// One address space. Ranges are sorted and do not overlap.
#[derive(Default)]
struct Ranges(Vec<(Range<u64>, Arc<dyn BusDevice>)>);

impl Ranges {
    fn add(&mut self, range: Range<u64>, device: Arc<dyn BusDevice>) -> Result<(), Overlap> {
        let at = self.0.partition_point(|(r, _)| r.start < range.start);
        let before = at.checked_sub(1).and_then(|before| self.0.get(before));
        if before.is_some_and(|(r, _)| r.end > range.start) {
            return Err(Overlap(range.start));
        }
        match self.0.get(at) {
            Some((r, _)) if r.start < range.end => Err(Overlap(r.start)),
            _ => {
                self.0.insert(at, (range, device));
                Ok(())
            }
        }
    }

    /// The device at an address, and the offset within its range.
    fn find(&self, address: u64) -> Option<(u64, &dyn BusDevice)> {
        let after = self.0.partition_point(|(range, _)| range.start <= address);
        let (range, device) = self.0.get(after.checked_sub(1)?)?;
        range
            .contains(&address)
            .then(|| (address - range.start, device.as_ref()))
    }

    /// Addresses without a device read as ones.
    fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((offset, device)) = self.find(address) {
            device.read(offset, data);
        }
    }

    /// Writes to addresses without a device are ignored.
    fn write(&self, address: u64, data: &[u8]) -> Effect {
        match self.find(address) {
            Some((offset, device)) => device.write(offset, data),
            None => Effect::None,
        }
    }
}

/// All devices that the guest can address.
#[derive(Default)]
pub struct Bus {
    memory: Ranges,
    ports: Ranges,
    boot_events: Arc<BootEvents>,
}

impl Bus {
    /// Boot events and exit counts recorded by the bus and others.
    pub fn boot_events(&self) -> &Arc<BootEvents> {
        &self.boot_events
    }

    /// Adds a device at a range of guest physical addresses.
    ///
    /// # Errors
    /// If the range overlaps another device.
    pub fn add_memory(
        &mut self,
        range: Range<u64>,
        device: Arc<dyn BusDevice>,
    ) -> Result<(), Overlap> {
        self.memory.add(range, device)
    }

    /// Adds a device at a range of I/O ports.
    ///
    /// # Errors
    /// If the range overlaps another device.
    pub fn add_ports(
        &mut self,
        range: Range<u16>,
        device: Arc<dyn BusDevice>,
    ) -> Result<(), Overlap> {
        let range = range.start.into()..range.end.into();
        self.ports.add(range, device)
    }

    /// Handles a guest's read from a port.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        self.boot_events.port_exit();
        self.ports.read(port.into(), data);
    }

    /// Handles a guest's write to a port.
    pub fn port_write(&self, port: u16, data: &[u8]) -> Effect {
        self.boot_events.port_exit();
        self.ports.write(port.into(), data)
    }

    /// Handles a guest's read of device memory.
    pub fn mmio_read(&self, address: u64, data: &mut [u8]) {
        self.boot_events.mmio_exit();
        self.memory.read(address, data);
    }

    /// Handles a guest's write to device memory.
    pub fn mmio_write(&self, address: u64, data: &[u8]) -> Effect {
        self.boot_events.mmio_exit();
        self.memory.write(address, data)
    }

    /// Shuts all devices down. `report` is called with the name of each device before the wait for it.
    pub fn shut_down(&self, report: impl Fn(&str)) {
        for (range, device) in self.memory.0.iter().chain(&self.ports.0) {
            report(&format!("the device at {:#x}", range.start));
            device.shut_down(&report);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads as its number and the offset; resets if its number is written.
    struct Numbered(u8);

    impl BusDevice for Numbered {
        fn read(&self, offset: u64, data: &mut [u8]) {
            if let [number, at, ..] = data {
                (*number, *at) = (self.0, offset as u8);
            }
        }

        fn write(&self, _offset: u64, data: &[u8]) -> Effect {
            match data.first() == Some(&self.0) {
                true => Effect::Reset,
                false => Effect::None,
            }
        }
    }

    fn bus() -> Bus {
        let mut bus = Bus::default();
        for (number, start) in [(1, 0xd000_1000), (2, 0xd000_0000)] {
            let added = bus.add_memory(start..start + 0x1000, Arc::new(Numbered(number)));
            added.unwrap();
        }
        bus.add_ports(0x10..0x12, Arc::new(Numbered(3))).unwrap();
        bus
    }

    #[test]
    fn an_access_reaches_the_device_whose_range_it_begins_in() {
        let bus = bus();
        let read = |address| {
            let mut word = [0; 4];
            bus.mmio_read(address, &mut word);
            word
        };
        assert_eq!(read(0xd000_0000), [2, 0, 0xff, 0xff]);
        assert_eq!(read(0xd000_0ffc), [2, 0xfc, 0xff, 0xff]);
        assert_eq!(read(0xd000_1010), [1, 0x10, 0xff, 0xff]);
        for address in [0, 0x10, 0xcfff_fffc, 0xd000_2000, u64::MAX] {
            assert_eq!(read(address), [0xff; 4]);
            assert_eq!(bus.mmio_write(address, &[1]), Effect::None);
        }
        assert_eq!(bus.mmio_write(0xd000_1000, &[1]), Effect::Reset);
    }

    #[test]
    fn ports_are_another_address_space() {
        let bus = bus();
        let mut bytes = [0; 2];
        bus.port_read(0x11, &mut bytes);
        assert_eq!(bytes, [3, 1]);
        for port in [0xf, 0x12, u16::MAX] {
            bus.port_read(port, &mut bytes);
            assert_eq!(bytes, [0xff; 2]);
            assert_eq!(bus.port_write(port, &[3]), Effect::None);
        }
        assert_eq!(bus.port_write(0x10, &[3]), Effect::Reset);
    }

    #[test]
    fn two_devices_at_one_address_are_refused() {
        let mut bus = bus();
        for range in [
            0xd000_0000..0xd000_1000,
            0xcfff_ff00..0xd000_0001,
            0xd000_1fff..0xd000_3000,
            0xcfff_0000..0xd000_3000,
        ] {
            let refused = bus.add_memory(range, Arc::new(Numbered(4)));
            assert!(refused.is_err());
        }
        let beside = bus.add_memory(0xd000_2000..0xd000_3000, Arc::new(Numbered(4)));
        assert_eq!(beside, Ok(()));
    }
}
