//! The kernel command line: parameters of every guest, then the configured ones, which can override those
//! before them. The device tree has the rest.

use super::super::{BootInfo, linux};
use super::layout;
use crate::config::Serial;

/// Kernel parameters of every guest: behaviour on a panic, the file system for the initramfs, and no `dummy0` beside the
/// configured interfaces.
pub const BASE_CMDLINE: &str = "panic=-1 random.trust_cpu=on rcupdate.rcu_expedited=1 \
     swiotlb=noforce rootfstype=ramfs dummy.numdummies=0";

/// Maximum length of the command line including its terminator (COMMAND_LINE_SIZE, arch/arm64).
pub(super) const CMDLINE_SIZE: usize = 2048;

pub(super) fn render(info: &BootInfo<'_>) -> String {
    let console = match info.serial {
        Serial::Console => "console=ttyS0",
        // The driver would wait for a port that does not exist.
        Serial::None | Serial::Messages => "8250.nr_uarts=0",
    };
    let parameters = linux::kernel_parameters(info);
    let line = format!("{BASE_CMDLINE} {console} {parameters} ");
    match info.serial {
        Serial::Messages => {
            // Sends kernel messages to the serial port without a driver.
            let port = layout::SERIAL;
            let earlycon = format!("earlycon=uart8250,mmio,{port:#x} keep_bootcon");
            line + &linux::insert_before_init(info.configured_cmdline(), &earlycon)
        }
        Serial::None | Serial::Console => line + info.configured_cmdline(),
    }
}
