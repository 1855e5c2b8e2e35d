//! Describes the machine to the guest: a flattened device tree, with the bindings of Linux's
//! Documentation/devicetree.

use super::super::{ArchError, BootInfo, MmioSlot};
use super::gic::Interrupts;
use super::{layout, regs};
use crate::config::Serial;
use koya_devices::virtio::mmio::MMIO_SLOT_SIZE;
use std::ops::Range;
use vm_fdt::{Error, FdtReserveEntry, FdtWriter};

const ROOT_CELLS: u32 = 2;
/// The phandle of the interrupt controller, set as the interrupt parent at the root.
const GIC: u32 = 1;

/// Kinds of interrupts (dt-bindings/interrupt-controller/arm-gic.h).
const SHARED: u32 = 0;
const PRIVATE: u32 = 1;
const EDGE_RISING: u32 = 1;
const LEVEL_HIGH: u32 = 4;

/// Private interrupts of the generic timer: secure and non-secure physical, virtual, hypervisor.
const TIMERS: [u32; 4] = [13, 14, 11, 10];
/// The clock that a 16550A divides to get its rate. Nothing here depends on it.
const SERIAL_CLOCK: u32 = 1_843_200;
/// Bytes for the kernel's random number generator.
const SEED: usize = 64;

/// The device tree of a machine.
pub(super) fn render(
    info: &BootInfo<'_>,
    cmdline: &str,
    initramfs: Option<Range<u64>>,
) -> Result<Vec<u8>, ArchError> {
    let written = write(info, cmdline, initramfs);
    written.map_err(ArchError::load("the device tree"))
}

fn write(
    info: &BootInfo<'_>,
    cmdline: &str,
    initramfs: Option<Range<u64>>,
) -> Result<Vec<u8>, Box<dyn std::error::Error + Send + Sync>> {
    let none: [FdtReserveEntry; 0] = [];
    let mut tree = FdtWriter::new_with_mem_reserv(&none)?;
    let root = tree.begin_node("")?;
    tree.property_string("compatible", "linux,dummy-virt")?;
    tree.property_u32("#address-cells", ROOT_CELLS)?;
    tree.property_u32("#size-cells", ROOT_CELLS)?;
    tree.property_u32("interrupt-parent", GIC)?;
    chosen(&mut tree, cmdline, initramfs, &seed()?)?;
    memory(&mut tree, info.memory.bytes)?;
    cpus(&mut tree, info.cpus.count)?;
    psci(&mut tree)?;
    timer(&mut tree, info.interrupts, info.cpus.count)?;
    interrupt_controller(&mut tree, info.interrupts, info.cpus.count)?;
    // Kernel messages need no driver, and without its port (`8250.nr_uarts=0`) the driver would fail with an error.
    if info.serial == Serial::Console {
        serial(&mut tree)?;
    }
    for slot in info.slots.iter().chain(info.hotplug_slots) {
        virtio(&mut tree, *slot)?;
    }
    tree.end_node(root)?;
    Ok(tree.finish()?)
}

fn seed() -> Result<[u8; SEED], rustix::io::Errno> {
    let mut seed = [0; SEED];
    rustix::rand::getrandom(&mut seed, rustix::rand::GetRandomFlags::empty())?;
    Ok(seed)
}

fn chosen(
    tree: &mut FdtWriter,
    cmdline: &str,
    initramfs: Option<Range<u64>>,
    seed: &[u8],
) -> Result<(), Error> {
    let node = tree.begin_node("chosen")?;
    tree.property_string("bootargs", cmdline)?;
    tree.property("rng-seed", seed)?;
    if let Some(range) = initramfs {
        tree.property_u64("linux,initrd-start", range.start)?;
        tree.property_u64("linux,initrd-end", range.end)?;
    }
    tree.end_node(node)
}

/// All boot memory, and what the host reads and writes in it: the panic log and stolen time. They are not `no-map`: the host
/// has a cached mapping, so the kernel has to map them cached, too.
fn memory(tree: &mut FdtWriter, bytes: u64) -> Result<(), Error> {
    for (start, len) in layout::memory_ranges(bytes) {
        let node = tree.begin_node(&format!("memory@{start:x}"))?;
        tree.property_string("device_type", "memory")?;
        tree.property_array_u64("reg", &[start, len])?;
        tree.end_node(node)?;
    }
    let reserved = tree.begin_node("reserved-memory")?;
    tree.property_u32("#address-cells", ROOT_CELLS)?;
    tree.property_u32("#size-cells", ROOT_CELLS)?;
    tree.property_null("ranges")?;
    for (name, start, len) in [
        ("panic-log", layout::PANIC_LOG, layout::PANIC_LOG_SIZE),
        ("stolen-time", layout::STOLEN_TIME, layout::STOLEN_TIME_SIZE),
    ] {
        let node = tree.begin_node(&format!("{name}@{start:x}"))?;
        tree.property_array_u64("reg", &[start, len])?;
        tree.end_node(node)?;
    }
    tree.end_node(reserved)
}

fn cpus(tree: &mut FdtWriter, count: u32) -> Result<(), Error> {
    let node = tree.begin_node("cpus")?;
    tree.property_u32("#address-cells", 2)?;
    tree.property_u32("#size-cells", 0)?;
    for index in 0..count {
        let mpidr = regs::mpidr(index);
        let cpu = tree.begin_node(&format!("cpu@{mpidr:x}"))?;
        tree.property_string("device_type", "cpu")?;
        tree.property_string("compatible", "arm,armv8")?;
        tree.property_string("enable-method", "psci")?;
        tree.property_u64("reg", mpidr)?;
        tree.end_node(cpu)?;
    }
    tree.end_node(node)
}

fn psci(tree: &mut FdtWriter) -> Result<(), Error> {
    let node = tree.begin_node("psci")?;
    let versions = ["arm,psci-1.0".to_owned(), "arm,psci-0.2".to_owned()];
    tree.property_string_list("compatible", versions.into())?;
    tree.property_string("method", "hvc")?;
    tree.end_node(node)
}

fn timer(tree: &mut FdtWriter, gic: Interrupts, cpus: u32) -> Result<(), Error> {
    // GICv2's second byte is a mask of the CPUs that the interrupt is routed to.
    let mask = match gic {
        Interrupts::GicV2 => ((1 << cpus) - 1) << 8,
        Interrupts::GicV3 => 0,
    };
    let interrupts = TIMERS.map(|number| [PRIVATE, number, mask | LEVEL_HIGH]);
    let node = tree.begin_node("timer")?;
    tree.property_string("compatible", "arm,armv8-timer")?;
    tree.property_null("always-on")?;
    tree.property_array_u32("interrupts", interrupts.as_flattened())?;
    tree.end_node(node)
}

fn interrupt_controller(tree: &mut FdtWriter, gic: Interrupts, cpus: u32) -> Result<(), Error> {
    let distributor = [layout::GIC_DISTRIBUTOR, layout::GIC_FRAME];
    let (compatible, others) = match gic {
        Interrupts::GicV2 => ("arm,cortex-a15-gic", [layout::GIC_V2_CPU, 0x2000]),
        Interrupts::GicV3 => {
            let size = layout::GIC_REDISTRIBUTOR * u64::from(cpus);
            ("arm,gic-v3", [layout::GIC_REDISTRIBUTORS, size])
        }
    };
    let node = tree.begin_node(&format!("interrupt-controller@{:x}", distributor[0]))?;
    tree.property_string("compatible", compatible)?;
    tree.property_null("interrupt-controller")?;
    tree.property_u32("#interrupt-cells", 3)?;
    tree.property_u32("phandle", GIC)?;
    tree.property_array_u64("reg", [distributor, others].as_flattened())?;
    tree.end_node(node)
}

fn serial(tree: &mut FdtWriter) -> Result<(), Error> {
    let node = tree.begin_node(&format!("serial@{:x}", layout::SERIAL))?;
    tree.property_string("compatible", "ns16550a")?;
    tree.property_array_u64("reg", &[layout::SERIAL, layout::SERIAL_SIZE])?;
    tree.property_u32("clock-frequency", SERIAL_CLOCK)?;
    tree.property_array_u32("interrupts", &[SHARED, layout::SERIAL_IRQ, EDGE_RISING])?;
    tree.end_node(node)
}

fn virtio(tree: &mut FdtWriter, slot: MmioSlot) -> Result<(), Error> {
    let node = tree.begin_node(&format!("virtio_mmio@{:x}", slot.address))?;
    tree.property_string("compatible", "virtio,mmio")?;
    tree.property_array_u64("reg", &[slot.address, MMIO_SLOT_SIZE])?;
    tree.property_array_u32("interrupts", &[SHARED, slot.irq, EDGE_RISING])?;
    tree.property_null("dma-coherent")?;
    tree.end_node(node)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::KernelFormat;
    use crate::config::{Boot, CpuSpec, MemorySpec};
    use fdt::Fdt;

    fn tree(gic: Interrupts, cpus: u32, serial: Serial) -> Vec<u8> {
        let mut boot = Boot::Linux {
            kernel: tempfile::tempfile().unwrap(),
            format: KernelFormat::Image,
            initramfs: None,
            cmdline: String::new(),
        };
        let spec = CpuSpec {
            count: cpus,
            online: cpus,
            pins: Vec::new(),
            sve: false,
        };
        let slots = [0, 1].map(|index| layout::device_slot(index).unwrap());
        let info = BootInfo {
            boot: &mut boot,
            memory: MemorySpec::new(256 << 20),
            cpus: &spec,
            serial,
            slots: &slots,
            hotplug_slots: &[layout::hotplug_slot(0)],
            interrupts: gic,
        };
        render(&info, "quiet", Some(0x8800_0000..0x8810_0000)).unwrap()
    }

    #[test]
    fn the_tree_says_what_the_machine_has() {
        let bytes = tree(Interrupts::GicV3, 18, Serial::Console);
        let tree = Fdt::new(&bytes).unwrap();
        assert_eq!(tree.chosen().bootargs(), Some("quiet"));
        let memory: Vec<_> = tree.memory().regions().collect();
        assert_eq!(memory[0].starting_address as u64, 0x8000_0000);
        assert_eq!(memory[0].size, Some(256 << 20));
        let ids: Vec<_> = tree.cpus().map(|cpu| cpu.ids().first()).collect();
        assert_eq!(ids.len(), 18);
        assert_eq!(ids[16..], [0x100, 0x101]);
        let slots = tree.find_all_nodes("/virtio_mmio");
        let slots: Vec<_> = slots
            .map(|node| node.reg().unwrap().next().unwrap().starting_address as u64)
            .collect();
        assert_eq!(slots, [0x4000_0000, 0x4000_1000, 0x4004_0000]);
        let chosen = tree.find_node("/chosen").unwrap();
        let seed = chosen.property("rng-seed").unwrap().value;
        assert!(seed.len() == SEED && seed.iter().any(|byte| *byte != 0));
        for (name, size) in [
            ("panic-log@80000000", 0x1_0000),
            ("stolen-time@801ff000", 0x1000),
        ] {
            let node = tree.find_node(&format!("/reserved-memory/{name}"));
            let reserved = node.unwrap().reg().unwrap().next().unwrap();
            assert_eq!(reserved.size, Some(size), "{name}");
        }
        assert!(tree.find_node("/serial").is_some());
    }

    #[test]
    fn the_serial_port_is_there_for_a_driver_only() {
        for (serial, is_there) in [
            (Serial::None, false),
            (Serial::Messages, false),
            (Serial::Console, true),
        ] {
            let bytes = tree(Interrupts::GicV3, 1, serial);
            let tree = Fdt::new(&bytes).unwrap();
            let node = tree.find_compatible(&["ns16550a"]);
            assert_eq!(node.is_some(), is_there, "{serial:?}");
        }
    }

    #[test]
    fn the_interrupt_controller_is_the_one_that_the_host_has() {
        for (gic, name, cells) in [
            (Interrupts::GicV2, "arm,cortex-a15-gic", 0x304),
            (Interrupts::GicV3, "arm,gic-v3", 4),
        ] {
            let bytes = tree(gic, 2, Serial::None);
            let tree = Fdt::new(&bytes).unwrap();
            let node = tree.find_compatible(&[name]).unwrap();
            assert_eq!(node.reg().unwrap().count(), 2);
            let timer = tree.find_node("/timer").unwrap();
            let first = &timer.property("interrupts").unwrap().value[8..12];
            assert_eq!(first, u32::to_be_bytes(cells));
        }
    }
}
