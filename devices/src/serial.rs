//! A 16550A serial port, independent of the address at which a platform maps its eight registers. Called from vCPU threads.

use crate::fault::guest_detail;
use crate::virtio::{Payload, Schema, StateError};
use serde::{Deserialize, Serialize};
use std::io::{self, Write};
use std::sync::Arc;
use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// An eventfd as a trigger for vm-superio.
#[derive(Clone)]
pub struct EventTrigger(Arc<EventFd>);

impl EventTrigger {
    /// Creates an eventfd.
    ///
    /// # Errors
    /// If the host has no file descriptor left.
    pub fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?)))
    }

    /// The eventfd.
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

/// Output of a guest's console.
pub type ConsoleOutput = Box<dyn Write + Send>;

/// The registers of a serial port, named as in the 16550A data sheet.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    /// Divisor latch, low and high byte.
    pub divisor: [u8; 2],
    /// Interrupt enable register.
    pub interrupt_enable: u8,
    /// Interrupt identification register.
    pub interrupt_identification: u8,
    /// Line control register.
    pub line_control: u8,
    /// Line status register.
    pub line_status: u8,
    /// Modem control register.
    pub modem_control: u8,
    /// Modem status register.
    pub modem_status: u8,
    /// Scratch register.
    pub scratch: u8,
    /// Input that the guest has not read yet.
    pub input: Vec<u8>,
}

impl SerialState {
    /// Schema of the state.
    pub const SCHEMA: Schema = Schema::new("16550a", 1);
}

/// A 16550A serial port with eight registers. Output goes to a writer, input comes from
/// [`SerialPort::input`].
pub struct SerialPort {
    port: Serial<EventTrigger, NoEvents, ConsoleOutput>,
    interrupt: EventTrigger,
}

impl SerialPort {
    /// Creates a port that writes to `output`.
    ///
    /// # Errors
    /// If the host has no file descriptor left.
    pub fn new(output: ConsoleOutput) -> io::Result<Self> {
        let interrupt = EventTrigger::new()?;
        Ok(Self {
            port: Serial::new(interrupt.clone(), output),
            interrupt,
        })
    }

    /// Saves the registers and the unread input.
    ///
    /// # Errors
    /// None for a working port.
    pub fn save(&self) -> Result<Payload, StateError> {
        let state = self.port.state();
        SerialState::SCHEMA.encode(&SerialState {
            divisor: [state.baud_divisor_low, state.baud_divisor_high],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            input: state.in_buffer,
        })
    }

    /// Restores a port from saved state; it writes to `output`.
    ///
    /// # Errors
    /// The state is of another version, has more input than the FIFO holds, or the host has no file
    /// descriptor left.
    pub fn restore(state: &Payload, output: ConsoleOutput) -> Result<Self, StateError> {
        let state: SerialState = SerialState::SCHEMA.decode(state)?;
        let interrupt = EventTrigger::new().map_err(StateError::resume)?;
        let [baud_divisor_low, baud_divisor_high] = state.divisor;
        let registers = vm_superio::SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.input,
        };
        let port = Serial::from_state(&registers, interrupt.clone(), NoEvents, output)
            .map_err(|_| StateError::Mismatch("it has more input than the port"))?;
        Ok(Self { port, interrupt })
    }

    /// The eventfd that raises the port's interrupt, for an irqfd.
    pub fn interrupt_event(&self) -> &EventFd {
        self.interrupt.event()
    }

    /// Reads register `offset` (0 to 7).
    pub fn read(&mut self, offset: u8) -> u8 {
        self.port.read(offset)
    }

    /// Writes register `offset` (0 to 7). If the console cannot be written, bytes are lost and the guest
    /// continues.
    pub fn write(&mut self, offset: u8, value: u8) {
        if let Err(error) = self.port.write(offset, value) {
            guest_detail!("serial port: {error:?}");
        }
    }

    /// Sends input to the guest; returns the number of bytes that fitted into the receive FIFO (64 bytes).
    pub fn input(&mut self, bytes: &[u8]) -> usize {
        let room = self.port.fifo_capacity().min(bytes.len());
        self.port.enqueue_raw_bytes(&bytes[..room]).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_what_it_was() {
        let mut port = SerialPort::new(Box::new(io::sink())).unwrap();
        port.write(3, 0x83);
        port.write(0, 0x0c);
        port.write(3, 0x03);
        port.write(7, 0x5a);
        assert_eq!(port.input(b"typed"), 5);
        assert_eq!(port.read(0), b't');
        let state = port.save().unwrap();
        let text = serde_json::to_string(&state).unwrap();
        let read: Payload = serde_json::from_str(&text).unwrap();
        let mut again = SerialPort::restore(&read, Box::new(io::sink())).unwrap();
        assert_eq!(again.save().unwrap(), state);
        assert_eq!((again.read(0), again.read(7)), (b'y', 0x5a));
        let newer = Payload {
            version: 9,
            ..state.clone()
        };
        assert!(SerialPort::restore(&newer, Box::new(io::sink())).is_err());
        let fuller = SerialState {
            input: vec![0; 100],
            ..SerialState::SCHEMA.decode(&state).unwrap()
        };
        let fuller = SerialState::SCHEMA.encode(&fuller).unwrap();
        assert!(SerialPort::restore(&fuller, Box::new(io::sink())).is_err());
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
