//! Platform devices with registers of one byte, on whichever bus a platform has them: a wider or repeated
//! access accesses the same register again. Called from vCPU threads.

use crate::bus::{BusDevice, Effect};
use koya_devices::serial::SerialPort;
use koya_host::sync::lock;
use std::sync::{Arc, Mutex};

/// A device with byte-wide registers, behind a lock.
pub(super) struct ByteRegisters<D>(pub(super) Arc<Mutex<D>>);

pub(super) trait ByteDevice: Send {
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
