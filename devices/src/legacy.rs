//! The devices of a PC that a guest without firmware still expects: the first serial port and
//! the keyboard controller's reset line. Both are called from vCPU threads.

use std::io::{self, Write};
use std::sync::Arc;
use vm_superio::serial::NoEvents;
use vm_superio::{I8042Device, Serial, Trigger};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// An event descriptor as vm-superio wants it.
#[derive(Clone)]
pub struct EventTrigger(Arc<EventFd>);

impl EventTrigger {
    /// A new event.
    ///
    /// # Errors
    /// If the host gives no descriptor.
    pub fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?)))
    }

    /// The descriptor that is written to.
    pub fn event(&self) -> &EventFd {
        &self.0
    }
}

impl Trigger for EventTrigger {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Where a guest's console goes.
pub type ConsoleOutput = Box<dyn Write + Send>;

/// A 16550A serial port (COM1): eight registers, bytes out to a writer, bytes in from
/// [`SerialPort::input`].
pub struct SerialPort {
    port: Serial<EventTrigger, NoEvents, ConsoleOutput>,
    interrupt: EventTrigger,
}

impl SerialPort {
    /// A port that writes to `output`.
    ///
    /// # Errors
    /// If the host gives no event descriptor.
    pub fn new(output: ConsoleOutput) -> io::Result<Self> {
        let interrupt = EventTrigger::new()?;
        Ok(Self {
            port: Serial::new(interrupt.clone(), output),
            interrupt,
        })
    }

    /// What raises IRQ 4: an irqfd.
    pub fn interrupt_event(&self) -> &EventFd {
        self.interrupt.event()
    }

    /// A read of register `offset` (0 to 7).
    pub fn read(&mut self, offset: u8) -> u8 {
        self.port.read(offset)
    }

    /// A write to register `offset` (0 to 7). A console that can't be written to loses bytes;
    /// the guest goes on.
    pub fn write(&mut self, offset: u8, value: u8) {
        if let Err(error) = self.port.write(offset, value) {
            log::debug!("serial port: {error:?}");
        }
    }

    /// Offers input to the guest; how many bytes the receive FIFO (64 bytes) had room for.
    pub fn input(&mut self, bytes: &[u8]) -> usize {
        let room = self.port.fifo_capacity().min(bytes.len());
        self.port.enqueue_raw_bytes(&bytes[..room]).unwrap_or(0)
    }
}

/// The keyboard controller, of which only the CPU reset command (0xfe to port 0x64) is there:
/// how a guest without ACPI ends.
pub struct ResetLine {
    controller: I8042Device<EventTrigger>,
    asked: EventTrigger,
}

impl ResetLine {
    /// A controller that nobody has asked to reset yet.
    ///
    /// # Errors
    /// If the host gives no event descriptor.
    pub fn new() -> io::Result<Self> {
        let asked = EventTrigger::new()?;
        Ok(Self {
            controller: I8042Device::new(asked.clone()),
            asked,
        })
    }

    /// A read of port 0x60 + `offset`.
    pub fn read(&mut self, offset: u8) -> u8 {
        self.controller.read(offset)
    }

    /// A write to port 0x60 + `offset`. True if it asked for a reset of the CPU.
    pub fn write(&mut self, offset: u8, value: u8) -> bool {
        if self.controller.write(offset, value).is_err() {
            return false;
        }
        self.asked.event().read().is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_reset_command_resets() {
        let mut line = ResetLine::new().unwrap();
        assert!(!line.write(0, 0xfe));
        assert!(!line.write(4, 0xed));
        assert!(line.write(4, 0xfe));
        assert!(!line.write(4, 0xaa));
    }

    #[test]
    fn a_byte_written_to_the_port_reaches_the_output() {
        #[derive(Clone, Default)]
        struct Shared(Arc<std::sync::Mutex<Vec<u8>>>);
        impl Write for Shared {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                self.0.lock().unwrap().extend_from_slice(bytes);
                Ok(bytes.len())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let shared = Shared::default();
        let mut port = SerialPort::new(Box::new(shared.clone())).unwrap();
        port.write(0, b'k');
        assert_eq!(*shared.0.lock().unwrap(), b"k");
        // Line status: transmitter empty, so that no driver waits.
        assert_eq!(port.read(5) & 0x60, 0x60);
    }

    #[test]
    fn input_is_bounded_by_the_fifo() {
        let mut port = SerialPort::new(Box::new(io::sink())).unwrap();
        assert_eq!(port.input(&[b'x'; 100]), 64);
        assert_eq!(port.input(b"y"), 0);
        assert_eq!(port.read(0), b'x');
    }
}
