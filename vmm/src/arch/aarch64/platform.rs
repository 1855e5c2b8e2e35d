//! The platform's own device: a serial port, a 16550A in device memory. Resets go through PSCI, which KVM
//! handles.

use super::super::ArchError;
use super::super::byte_registers::ByteRegisters;
use super::layout;
use crate::bus::Bus;
use koya_devices::serial::SerialPort;
use koya_host::sync::lock;
use kvm_ioctls::VmFd;
use std::sync::{Arc, Mutex};

/// Attaches the serial port to the bus and connects its interrupt.
///
/// # Errors
/// The error from KVM.
pub(crate) fn attach_platform(
    vm: &VmFd,
    bus: &mut Bus,
    serial: Option<&Arc<Mutex<SerialPort>>>,
) -> Result<(), ArchError> {
    if let Some(port) = serial {
        vm.register_irqfd(lock(port).interrupt_event(), layout::SERIAL_IRQ)
            .map_err(ArchError::kvm("connect the serial port's interrupt"))?;
        let registers = layout::SERIAL..layout::SERIAL + 8;
        bus.add_memory(registers, Arc::new(ByteRegisters(port.clone())))?;
    }
    Ok(())
}
