//! Parts of a machine other than virtio: serial port, bus, and the kernel's log after a panic.

use crate::directories::{Contents, Directory};
use crate::input::Input;
use crate::pool::{Layout, Lease};
use koya_devices::serial::SerialPort;
use koya_vmm::internals::{Bus, BusDevice, Effect, PANIC_LOG, explain, load_files};
use koya_vmm::{ExitReason, MIN_MEMORY_MIB, VmConfig, guest_text};
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
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

/// The memory range in which the guest kernel leaves its log after a panic.
///
/// # Panics
/// If the parser has a bug, or its result has control characters.
pub fn panic_logs(data: &[u8]) {
    let mut memory = Lease::new(Layout::Log);
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
        memory.touch(at.0, header.len() as u64);
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
    if let Some(reason) = reasons.into_iter().nth(usize::from(input.byte() % 3)) {
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

/// Offset of the setup header of a bzImage (Documentation/arch/x86/boot.rst).
const SETUP_HEADER: usize = 0x1f1;
/// Size of an ELF header, and of a program header.
const ELF_HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;

/// Files that a machine is started from.
static FILES: Contents = Contents {
    name: "kernel",
    changing: &["files"],
    set_up: |_| Ok(()),
    fill: |_| Ok(()),
};

/// A kernel image, in a format and with headers chosen by the input, and an initial RAM disk. Each is loaded or rejected.
///
/// # Panics
/// If the loader has a bug, or the host cannot write files.
pub fn kernel_images(data: &[u8]) {
    let mut input = Input::new(data);
    let dir = Directory::take(&FILES);
    let (kernel, initramfs) = (dir.at("files/kernel"), dir.at("files/initramfs"));
    let choice = input.byte();
    let image = match choice % 4 {
        0 => elf(&mut input),
        1 => bz_image(&mut input),
        2 => arm_image(&mut input),
        _ => input.bytes(4096).to_vec(),
    };
    fs::write(&kernel, image).expect("a file");
    let has_initramfs = choice & 0x80 != 0;
    if has_initramfs {
        let file = File::create(&initramfs).expect("a file");
        // Sparse: it may be larger than the memory of the guest.
        file.set_len(input.number() & 0xfff_ffff).expect("a file");
        file.write_at(input.bytes(16), 0).expect("a file");
    }
    let mut config = VmConfig::new(&kernel);
    config.memory_mib = MIN_MEMORY_MIB;
    config.initramfs = has_initramfs.then_some(initramfs);
    config.cmdline = "x".repeat(input.word().into());
    if let Ok(spec) = config.check() {
        // An error is a refusal.
        load_files(spec).ok();
    }
}

fn elf(input: &mut Input<'_>) -> Vec<u8> {
    let mut image = vec![0; ELF_HEADER];
    image[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    let count = input.byte() % 6;
    let fields = [
        (16, 2),
        (18, u64::from(input.pick(&[62u8, 62, 62, 183]))),
        (20, 1),
        (24, 0x100_0000),
        (32, ELF_HEADER as u64),
        (52, ELF_HEADER as u64),
        (54, PROGRAM_HEADER as u64),
        (56, count.into()),
    ];
    for (at, value) in fields {
        put(&mut image, at, value);
    }
    if input.byte().is_multiple_of(4) {
        let (at, value) = (16 + usize::from(input.byte() % 46), input.number());
        put(&mut image, at, value);
    }
    for _ in 0..count {
        let mut header = [0; PROGRAM_HEADER];
        put(&mut header, 0, input.pick(&[1, 1, 4, 7]));
        for at in [8, 16, 24, 32, 40, 48] {
            put(&mut header, at, input.number());
        }
        image.extend(header);
    }
    image.extend_from_slice(input.bytes(2048));
    image
}

fn bz_image(input: &mut Input<'_>) -> Vec<u8> {
    let mut image = vec![0; 0x400];
    image[0x202..0x206].copy_from_slice(b"HdrS");
    put(&mut image, 0x206, input.pick(&[0x200, 0x20c, 0x20f]));
    image[0x211] = 1;
    for _ in 0..input.byte() % 12 {
        let at = SETUP_HEADER + usize::from(input.byte() % 0x80);
        put(&mut image, at, input.number());
    }
    image.extend_from_slice(input.bytes(2048));
    image
}

fn arm_image(input: &mut Input<'_>) -> Vec<u8> {
    let mut image = vec![0; ELF_HEADER];
    for at in [0, 8, 16, 24] {
        put(&mut image, at, input.number());
    }
    image[56..60].copy_from_slice(b"ARM\x64");
    image.extend_from_slice(input.bytes(2048));
    image
}

/// Overwrites the next eight bytes, as far as they exist, with a number in little-endian order. Fields are written in the
/// order of their offsets, so that a narrower one is not lost.
fn put(bytes: &mut [u8], at: usize, value: u64) {
    let value = value.to_le_bytes();
    let end = bytes.len().min(at + value.len());
    let place = &mut bytes[at.min(end)..end];
    place.copy_from_slice(&value[..place.len()]);
}
