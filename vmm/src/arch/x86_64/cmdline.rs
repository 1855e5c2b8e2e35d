//! The kernel command line: parameters of every guest, one for each MMIO slot, then the configured ones,
//! which can override those before them.

use super::super::{BootInfo, MmioSlot, linux};
use crate::config::Serial;

/// Kernel parameters of every guest: behaviour on a panic and on a reset, hardware not to probe for, no memory
/// reserved for devices that can only address 4 GiB (64 MiB; there are no such devices), lock prefixes left
/// in place on one CPU, the initramfs unpacked into ramfs, and no `dummy0` beside the configured interfaces.
pub const BASE_CMDLINE: &str = "reboot=k panic=-1 tsc=reliable no_timer_check \
     random.trust_cpu=on rcupdate.rcu_expedited=1 swiotlb=noforce noreplace-smp rootfstype=ramfs dummy.numdummies=0";

/// Sends kernel messages to the serial port without a driver.
const EARLYCON: &str = "earlycon=uart8250,io,0x3f8 keep_bootcon";

pub(super) fn render(info: &BootInfo<'_>) -> String {
    let console = match info.serial {
        Serial::Console => "console=ttyS0",
        // The driver would probe for ports that do not exist.
        Serial::None | Serial::Messages => "8250.nr_uarts=0",
    };
    let mut line = format!(
        "{BASE_CMDLINE} {console} {}",
        linux::kernel_parameters(info)
    );
    for slot in info.slots.iter().chain(info.hotplug_slots) {
        line = line + " " + &slot_parameter(*slot);
    }
    line += " ";
    match info.serial {
        Serial::Messages => line + &linux::insert_before_init(info.configured_cmdline(), EARLYCON),
        Serial::None | Serial::Console => line + info.configured_cmdline(),
    }
}

/// Describes a slot to Linux (drivers/virtio/virtio_mmio.c).
fn slot_parameter(slot: MmioSlot) -> String {
    format!("virtio_mmio.device=4K@{:#x}:{}", slot.address, slot.irq)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::{KernelFormat, layout};
    use crate::config::{Boot, CpuSpec, MemorySpec};

    fn line(serial: Serial, online: u32, hotplug_bytes: u64) -> String {
        let mut boot = Boot::Linux {
            kernel: tempfile::tempfile().unwrap(),
            format: KernelFormat::Elf,
            initramfs: None,
            cmdline: "quiet -- one".into(),
        };
        let cpus = CpuSpec {
            count: 2,
            online,
            pins: Vec::new(),
            sve: false,
        };
        let slots = [0, 1].map(|index| layout::device_slot(index).unwrap());
        render(&BootInfo {
            boot: &mut boot,
            memory: MemorySpec {
                hotplug_bytes,
                ..MemorySpec::new(64 << 20)
            },
            cpus: &cpus,
            serial,
            slots: &slots,
            hotplug_slots: &[layout::hotplug_slot(0)],
            interrupts: crate::arch::Interrupts,
        })
    }

    #[test]
    fn every_slot_is_described_and_configured_parameters_come_last() {
        let slots = "virtio_mmio.device=4K@0xd0000000:5 virtio_mmio.device=4K@0xd0001000:6 \
                     virtio_mmio.device=4K@0xd0012000:23";
        let log = crate::panic_log::cmdline();
        assert_eq!(
            line(Serial::Console, 2, 0),
            format!("{BASE_CMDLINE} console=ttyS0 {log} {slots} quiet -- one")
        );
        assert_eq!(
            line(Serial::Messages, 1, 1 << 30),
            format!(
                "{BASE_CMDLINE} 8250.nr_uarts=0 {log} maxcpus=1 memhp_default_state=online \
                 memory_hotplug.online_policy=auto-movable {slots} quiet  {EARLYCON} -- one"
            )
        );
        assert!(line(Serial::None, 2, 0).contains("8250.nr_uarts=0"));
    }
}
