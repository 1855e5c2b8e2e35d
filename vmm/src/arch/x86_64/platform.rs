//! Legacy PC devices: the first serial port and the keyboard controller's reset line, both on I/O ports.
//! Registers are one byte wide; a wider or repeated access accesses the same register again.

use super::super::ArchError;
use super::reset_line::ResetLine;
use crate::bus::{Bus, BusDevice, Effect};
use koya_devices::serial::SerialPort;
use koya_host::sync::lock;
use kvm_ioctls::VmFd;
use std::ops::Range;
use std::sync::{Arc, Mutex};

const SERIAL_PORTS: Range<u16> = 0x3f8..0x400;
const RESET_PORTS: Range<u16> = 0x60..0x65;
/// The interrupt of the first serial port.
pub(super) const SERIAL_IRQ: u32 = 4;

/// Attaches the platform's own devices to the bus and connects their interrupts.
///
/// # Errors
/// The error from KVM.
pub(crate) fn attach_platform(
    vm: &VmFd,
    bus: &mut Bus,
    serial: Option<&Arc<Mutex<SerialPort>>>,
) -> Result<(), ArchError> {
    let reset = ByteRegisters(Arc::new(Mutex::new(ResetLine::default())));
    bus.add_ports(RESET_PORTS, Arc::new(reset))?;
    if let Some(port) = serial {
        vm.register_irqfd(lock(port).interrupt_event(), SERIAL_IRQ)
            .map_err(ArchError::kvm("connect the serial port's interrupt"))?;
        bus.add_ports(SERIAL_PORTS, Arc::new(ByteRegisters(port.clone())))?;
    }
    Ok(())
}

/// A device with byte-wide registers, behind a lock.
struct ByteRegisters<D>(Arc<Mutex<D>>);

trait ByteDevice: Send {
    fn read(&mut self, offset: u8) -> u8;
    fn write(&mut self, offset: u8, value: u8) -> Effect;
}

impl ByteDevice for SerialPort {
    fn read(&mut self, offset: u8) -> u8 {
        SerialPort::read(self, offset)
    }

    fn write(&mut self, offset: u8, value: u8) -> Effect {
        SerialPort::write(self, offset, value);
        Effect::None
    }
}

impl ByteDevice for ResetLine {
    fn read(&mut self, offset: u8) -> u8 {
        ResetLine::read(self, offset)
    }

    fn write(&mut self, offset: u8, value: u8) -> Effect {
        match ResetLine::write(self, offset, value) {
            true => Effect::Reset,
            false => Effect::None,
        }
    }
}

impl<D: ByteDevice> BusDevice for ByteRegisters<D> {
    fn read(&self, offset: u64, data: &mut [u8]) {
        for byte in data {
            *byte = lock(&self.0).read(offset as u8);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Effect {
        let mut effect = Effect::None;
        for byte in data {
            if lock(&self.0).write(offset as u8, *byte) == Effect::Reset {
                effect = Effect::Reset;
            }
        }
        effect
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bus(serial: bool) -> Bus {
        let kvm = crate::kvm::open().unwrap();
        let vm = kvm.create_vm().unwrap();
        vm.create_irq_chip().unwrap();
        let port = SerialPort::new(Box::new(std::io::sink())).unwrap();
        let port = Arc::new(Mutex::new(port));
        let mut bus = Bus::default();
        attach_platform(&vm, &mut bus, serial.then_some(&port)).unwrap();
        bus
    }

    #[test]
    fn the_reset_command_is_seen_among_others() {
        let bus = bus(false);
        assert_eq!(bus.port_write(0x64, &[0xed]), Effect::None);
        assert_eq!(bus.port_write(0x64, &[0xed, 0xfe, 0xaa]), Effect::Reset);
        assert_eq!(bus.port_write(0x60, &[0xfe]), Effect::None);
    }

    #[test]
    fn the_serial_port_is_there_if_it_was_asked_for() {
        for (is_there, status) in [(true, 0x60), (false, 0xff)] {
            let mut bytes = [0; 2];
            bus(is_there).port_read(0x3fd, &mut bytes);
            assert_eq!(bytes, [status; 2]);
        }
    }
}
