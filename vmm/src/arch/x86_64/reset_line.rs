//! The keyboard controller's reset line. Called from vCPU threads.

use std::convert::Infallible;
use std::sync::atomic::{AtomicBool, Ordering};
use vm_superio::{I8042Device, Trigger};

/// The keyboard controller, with only the CPU reset command (0xfe to port 0x64) implemented: a guest without ACPI shuts down
/// by it.
pub(super) struct ResetLine {
    controller: I8042Device<ResetRequest>,
}

/// Set when a reset is requested; only the vCPU that requested it reads it.
#[derive(Default)]
struct ResetRequest(AtomicBool);

impl Trigger for ResetRequest {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.store(true, Ordering::Relaxed);
        Ok(())
    }
}

impl Default for ResetLine {
    /// A controller without a pending reset.
    fn default() -> Self {
        Self {
            controller: I8042Device::new(ResetRequest::default()),
        }
    }
}

impl ResetLine {
    /// Reads port 0x60 + `offset`.
    pub(super) fn read(&mut self, offset: u8) -> u8 {
        self.controller.read(offset)
    }

    /// Writes port 0x60 + `offset`. True if it requests a CPU reset.
    pub(super) fn write(&mut self, offset: u8, value: u8) -> bool {
        if self.controller.write(offset, value).is_err() {
            return false;
        }
        let asked = &self.controller.reset_evt().0;
        asked.swap(false, Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_reset_command_resets() {
        let mut line = ResetLine::default();
        assert!(!line.write(0, 0xfe));
        assert!(!line.write(4, 0xed));
        assert!(line.write(4, 0xfe));
        assert!(!line.write(4, 0xaa));
    }
}
