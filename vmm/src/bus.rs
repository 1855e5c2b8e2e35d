//! Which device an address belongs to. Fixed once the virtual machine is built; vCPU threads
//! look devices up without a lock and call each under its own.

use crate::marks::Marks;
use crate::sync::lock;
use koya_devices::legacy::{ResetLine, SerialPort};
use koya_devices::virtio::mmio::{self, MmioTransport, WINDOW_SIZE};
use std::sync::{Arc, Mutex};

/// What a guest's access asks of the virtual machine as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    None,
    /// A reset of the CPU.
    Reset,
}

const SERIAL_PORTS: std::ops::Range<u16> = 0x3f8..0x400;
const RESET_PORTS: std::ops::Range<u16> = 0x60..0x65;

/// A virtio-mmio window: a device, or none for now.
pub type Window = Arc<Mutex<Option<MmioTransport>>>;

/// Every device that an address reaches.
#[derive(Default)]
pub struct Bus {
    windows: Vec<(u64, Window)>,
    serial: Option<Arc<Mutex<SerialPort>>>,
    reset: Option<Mutex<ResetLine>>,
    marks: Arc<Marks>,
}

impl Bus {
    /// What came to pass by it, and by whoever else has it.
    pub fn marks(&self) -> &Arc<Marks> {
        &self.marks
    }

    /// Puts a window for a virtio device at an address.
    pub fn add_window(&mut self, address: u64, device: Option<MmioTransport>) -> Window {
        let window = Window::new(Mutex::new(device));
        self.windows.push((address, window.clone()));
        self.windows.sort_by_key(|w| w.0);
        window
    }

    /// Puts the serial port at its ports.
    pub fn set_serial(&mut self, port: Arc<Mutex<SerialPort>>) {
        self.serial = Some(port);
    }

    /// Puts the reset line at its ports.
    pub fn set_reset(&mut self, line: ResetLine) {
        self.reset = Some(Mutex::new(line));
    }

    /// A guest reads from a port. Every device behind ports has byte registers; a wider or
    /// repeated access reads the same register again.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        self.marks.port_exit();
        for byte in data {
            *byte = if SERIAL_PORTS.contains(&port) {
                let serial = self.serial.as_ref();
                serial.map_or(0xff, |s| lock(s).read((port - SERIAL_PORTS.start) as u8))
            } else if RESET_PORTS.contains(&port) {
                let reset = self.reset.as_ref();
                reset.map_or(0xff, |r| lock(r).read((port - RESET_PORTS.start) as u8))
            } else {
                // An empty bus floats high.
                0xff
            };
        }
    }

    /// A guest writes to a port.
    pub fn port_write(&self, port: u16, data: &[u8]) -> Effect {
        self.marks.port_exit();
        let mut effect = Effect::None;
        for byte in data {
            if SERIAL_PORTS.contains(&port) {
                if let Some(serial) = &self.serial {
                    lock(serial).write((port - SERIAL_PORTS.start) as u8, *byte);
                }
            } else if RESET_PORTS.contains(&port)
                && let Some(reset) = &self.reset
                && lock(reset).write((port - RESET_PORTS.start) as u8, *byte)
            {
                effect = Effect::Reset;
            }
        }
        effect
    }

    /// A guest reads device memory; where there is nothing it reads ones.
    pub fn mmio_read(&self, address: u64, data: &mut [u8]) {
        self.marks.mmio_exit();
        match self.window(address) {
            Some((offset, window)) => match &mut *lock(window) {
                Some(device) => device.read(offset, data),
                None => mmio::read_empty(offset, data),
            },
            None => data.fill(0xff),
        }
    }

    /// A guest writes device memory; where there is nothing it is lost.
    pub fn mmio_write(&self, address: u64, data: &[u8]) {
        self.marks.mmio_exit();
        if let Some((offset, window)) = self.window(address)
            && let Some(device) = &mut *lock(window)
        {
            let was_active = device.is_active();
            device.write(offset, data);
            if device.is_active() && !was_active {
                self.marks.guest(device.kind().name());
            }
        }
    }

    /// Stops every device, as a reset by its driver would. `about` hears of each before it is waited for.
    pub fn shut_down(&self, about: impl Fn(&str)) {
        for (address, window) in &self.windows {
            about(&format!("the device at {address:#x}"));
            // Taken out: whoever still has the window must not keep the device.
            let device = lock(window).take();
            if let Some(mut device) = device {
                about(&format!("threads of a {} device", device.kind().name()));
                device.shutdown();
            }
        }
    }

    fn window(&self, address: u64) -> Option<(u64, &Mutex<Option<MmioTransport>>)> {
        let after = self.windows.partition_point(|w| w.0 <= address);
        let (start, window) = self.windows.get(after.checked_sub(1)?)?;
        let offset = address - start;
        (offset < WINDOW_SIZE).then_some((offset, window.as_ref()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use koya_devices::rng::Rng;
    use koya_devices::test_utils::{Driver, IdleLoop};

    fn bus() -> Bus {
        let mut bus = Bus::default();
        for address in [0xd000_1000, 0xd000_0000] {
            let memory = Driver::new(8).memory().clone();
            let device = MmioTransport::new(
                Box::new(Rng::default()),
                memory,
                Arc::new(IdleLoop::default()),
            )
            .unwrap();
            bus.add_window(address, Some(device));
        }
        bus
    }

    #[test]
    fn an_empty_window_says_that_it_is_one() {
        let mut bus = Bus::default();
        let window = bus.add_window(0xd000_0000, None);
        let mut words = [[0; 4]; 3];
        for (offset, word) in [0, 4, 8].into_iter().zip(&mut words) {
            bus.mmio_read(0xd000_0000 + offset, word);
        }
        // Magic, version, and no device.
        assert_eq!(words, [*b"virt", [2, 0, 0, 0], [0; 4]]);
        bus.mmio_write(0xd000_0070, &[1, 0, 0, 0]);
        let memory = Driver::new(8).memory().clone();
        let device = MmioTransport::new(
            Box::new(Rng::default()),
            memory,
            Arc::new(IdleLoop::default()),
        );
        *lock(&window) = Some(device.unwrap());
        bus.mmio_read(0xd000_0008, &mut words[2]);
        assert_eq!(words[2], [4, 0, 0, 0]);
    }

    #[test]
    fn an_access_reaches_the_window_it_lies_in() {
        let bus = bus();
        for address in [0xd000_0000, 0xd000_1000] {
            let mut magic = [0; 4];
            bus.mmio_read(address, &mut magic);
            assert_eq!(&magic, b"virt");
        }
        for address in [0, 0xcfff_fffc, 0xd000_2000, u64::MAX] {
            let mut word = [0; 4];
            bus.mmio_read(address, &mut word);
            assert_eq!(word, [0xff; 4]);
            bus.mmio_write(address, &word);
        }
    }

    #[test]
    fn an_empty_port_floats_high_and_resets_nothing() {
        let bus = bus();
        let mut byte = [0];
        bus.port_read(0x64, &mut byte);
        assert_eq!(byte, [0xff]);
        assert_eq!(bus.port_write(0x64, &[0xfe]), Effect::None);
    }

    #[test]
    fn the_reset_command_is_seen() {
        let mut bus = bus();
        bus.set_reset(ResetLine::default());
        assert_eq!(bus.port_write(0x64, &[0xfe]), Effect::Reset);
    }
}
