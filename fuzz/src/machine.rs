//! Parts of a machine other than virtio: serial port, bus, and the kernel's log after a panic.

use crate::input::Input;
use koya_devices::serial::SerialPort;
use koya_devices::test_utils::MEMORY_SIZE;
use koya_devices::virtio::Memory;
use koya_vmm::internals::{Bus, BusDevice, Effect, PANIC_LOG, explain};
use koya_vmm::{ExitReason, guest_text};
use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};
use vm_memory::{Bytes, GuestAddress};

/// Size of a port's FIFO in bytes.
const FIFO: usize = 64;

/// Discards the guest's output, and fails now and then.
struct Output {
    left: u32,
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.left = self.left.wrapping_mul(7).wrapping_add(1);
        match self.left % 5 {
            0 => Err(io::ErrorKind::WouldBlock.into()),
            1 => Ok(0),
            _ => Ok(bytes.len()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self.left % 3 {
            0 => Err(io::ErrorKind::BrokenPipe.into()),
            _ => Ok(()),
        }
    }
}

struct Port(Mutex<SerialPort>);

impl BusDevice for Port {
    fn read(&self, offset: u64, data: &mut [u8]) {
        assert!(offset < 8, "{offset:#x}");
        let mut port = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        data.fill_with(|| port.read(offset as u8));
    }

    fn write(&self, offset: u64, data: &[u8]) -> Effect {
        assert!(offset < 8, "{offset:#x}");
        let mut port = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        data.iter().for_each(|byte| port.write(offset as u8, *byte));
        Effect::None
    }
}

/// A bus with serial ports at addresses chosen by the input, and accesses to it; ports are saved and restored.
///
/// # Panics
/// If the bus or a port has a bug, or the host is out of descriptors.
pub fn serial_ports(data: &[u8]) {
    let mut input = Input::new(data);
    let mut bus = Bus::default();
    let mut ports = Vec::new();
    for _ in 0..=input.byte() % 3 {
        let output = Output {
            left: input.byte().into(),
        };
        let port = SerialPort::new(Box::new(output)).expect("a descriptor");
        let port = Arc::new(Port(Mutex::new(port)));
        let (start, high) = (u16::from(input.byte()), input.number() & !7);
        let by_port = bus.add_ports(start..start + 8, port.clone());
        let by_memory = bus.add_memory(high..high.saturating_add(8), port.clone());
        if by_port.is_ok() || by_memory.is_ok() {
            ports.push((port, start, high));
        }
    }
    for _ in 0..300 {
        if input.is_empty() || ports.is_empty() {
            break;
        }
        let (action, place) = (input.byte(), input.byte());
        let (port, start, high) = &ports[usize::from(place) / 16 % ports.len()];
        let (number, address) = (
            start + u16::from(place % 16),
            high.wrapping_add(u64::from(place % 16)),
        );
        let mut bytes = [0; 8];
        let len = [1, 1, 2, 4, 8][usize::from(action / 8) % 5];
        match action % 8 {
            0 => bus.port_read(number, &mut bytes[..len]),
            1 => bus.mmio_read(address, &mut bytes[..len]),
            2 | 3 => {
                let effect = bus.port_write(number, input.bytes(len));
                assert_eq!(effect, Effect::None);
            }
            4 => {
                bus.mmio_write(address, input.bytes(len));
            }
            5 => {
                let mut port = port.0.lock().unwrap_or_else(PoisonError::into_inner);
                assert!(port.input(input.bytes(80)) <= FIFO);
            }
            6 => {
                let mut port = port.0.lock().unwrap_or_else(PoisonError::into_inner);
                let state = port.save().expect("a port is saved");
                let mut again = SerialPort::restore(&state, Box::new(io::sink())).expect("its own");
                assert_eq!(again.save().expect("a port is saved"), state);
                // A read may consume input, on both alike.
                let register = place % 8;
                assert_eq!(port.read(register), again.read(register));
            }
            _ => {
                let mut port = port.0.lock().unwrap_or_else(PoisonError::into_inner);
                let mut state = port.save().expect("a port is saved");
                let at = usize::from(input.byte()) % state.bytes.len();
                state.bytes[at] = input.byte();
                if let Ok(other) = SerialPort::restore(&state, Box::new(io::sink())) {
                    *port = other;
                }
            }
        }
    }
}

/// The memory range in which the guest's kernel leaves its log after a panic.
///
/// # Panics
/// If the parser has a bug, or its result has control characters.
pub fn panic_logs(data: &[u8]) {
    let ranges = [(GuestAddress(PANIC_LOG & !0xfff_ffff), MEMORY_SIZE)];
    let memory = Memory::from_ranges(&ranges).expect("memory");
    let mut input = Input::new(data);
    for record in 0..2 {
        let at = GuestAddress(PANIC_LOG + record * 0x8000);
        let mut header = b"DBGC".to_vec();
        let (start, size) = (input.number() as u32, input.number() as u32);
        header.extend(start.to_le_bytes());
        header.extend(size.to_le_bytes());
        let len = usize::from(input.word() % 0x7ff0);
        for _ in 0..input.byte() % 6 {
            let lines: [&[u8]; 5] = [
                b"\nKernel panic - not syncing: ",
                b"\n[    0.1] BUG: ",
                b"\n",
                b"\x1b[2J",
                b"\xff\xfe",
            ];
            header.extend_from_slice(input.pick(&lines));
            header.extend_from_slice(input.bytes(len.min(40)));
        }
        memory.write_slice(&header, at).expect("memory");
    }
    let reasons = [
        ExitReason::Reset,
        ExitReason::Stopped,
        ExitReason::TripleFault {
            details: "registers".into(),
            log: String::new(),
        },
    ];
    for reason in reasons {
        let explained = explain(reason, &memory);
        let log = explained.log().unwrap_or_default();
        assert!(log.len() <= guest_text::MAX_LINES);
        crate::assert_plain(log);
        if let ExitReason::Panic { message, .. } = &explained {
            assert!(!message.contains(char::is_control), "{message:?}");
            assert!(message.len() <= guest_text::MAX_LINE);
        }
    }
}
