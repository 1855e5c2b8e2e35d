//! Legacy PC devices: the first serial port and the keyboard controller's reset line, both on I/O ports.

use super::super::ArchError;
use super::super::byte_registers::{ByteDevice, ByteRegisters};
use super::reset_line::ResetLine;
use crate::bus::{Bus, Effect};
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
