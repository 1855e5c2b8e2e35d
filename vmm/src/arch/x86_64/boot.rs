//! Loads kernel, initramfs, command line and boot tables into guest memory, for the 64-bit boot protocol
//! (Documentation/arch/x86/boot.rst).

use super::super::{ArchError, BootInfo};
use super::{Entry, Interrupts, KernelFormat, cmdline, layout, mptable, regs};
use crate::config::Boot;
use koya_devices::virtio::Memory;
use linux_loader::cmdline::Cmdline;
use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::{BzImage, Elf, KernelLoader, load_cmdline};
use std::fs::File;
use vm_memory::{Bytes, GuestAddress};

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
/// "HdrS"
const SETUP_MAGIC: u32 = 0x5372_6448;
const BOOT_FLAG: u16 = 0xaa55;
/// Type of a boot loader without an assigned number.
const LOADER_UNDEFINED: u8 = 0xff;
/// Offset of the 64-bit entry point in the protected-mode part of a bzImage.
const BZIMAGE_ENTRY_64: u64 = 0x200;

/// Loads kernel, initramfs, command line and boot tables, and returns the entry point of the first vCPU.
///
/// # Errors
/// If something does not fit or is malformed.
pub(crate) fn load(memory: &Memory, info: BootInfo<'_>) -> Result<Entry, ArchError> {
    let cmdline = cmdline::render(&info);
    // The MP table describes no other kind.
    let Interrupts = info.interrupts;
    let memory_bytes = info.memory.bytes;
    let (kernel, format, initramfs) = match info.boot {
        Boot::Flat(code) => {
            memory
                .write_slice(code, GuestAddress(0))
                .map_err(ArchError::load("flat code"))?;
            return Ok(Entry::Real);
        }
        Boot::Linux {
            kernel,
            format,
            initramfs,
            ..
        } => (kernel, *format, initramfs),
    };
    let (mut params, entry, kernel_end) = load_kernel(memory, kernel, format)?;
    if let Some(file) = initramfs {
        let (address, len) = load_initramfs(memory, memory_bytes, file, kernel_end)?;
        params.hdr.ramdisk_image = address as u32;
        params.hdr.ramdisk_size = len as u32;
    }
    let len = write_cmdline(memory, &cmdline)?;
    params.hdr.cmd_line_ptr = layout::CMDLINE as u32;
    params.hdr.cmdline_size = len;
    set_memory_map(memory_bytes, &mut params);
    LinuxBootConfigurator::write_bootparams(
        &BootParams::new(&params, GuestAddress(layout::ZERO_PAGE)),
        memory,
    )
    .map_err(ArchError::load("the boot parameters"))?;
    write_tables(memory, info.cpus.count)?;
    Ok(Entry::Linux64 { rip: entry })
}

/// Loads the kernel; returns its setup header, 64-bit entry point and the first address after it.
fn load_kernel(
    memory: &Memory,
    file: &mut File,
    format: KernelFormat,
) -> Result<(boot_params, u64, u64), ArchError> {
    let mut params = boot_params::default();
    let high = Some(GuestAddress(layout::HIGH_MEMORY));
    let (entry, end) = match format {
        KernelFormat::Elf => {
            let loaded =
                Elf::load(memory, None, file, high).map_err(ArchError::load("the kernel"))?;
            params.hdr.header = SETUP_MAGIC;
            params.hdr.boot_flag = BOOT_FLAG;
            params.hdr.kernel_alignment = 0x20_0000;
            (loaded.kernel_load.0, loaded.kernel_end)
        }
        KernelFormat::BzImage => {
            let place = Some(GuestAddress(layout::BZIMAGE));
            let loaded =
                BzImage::load(memory, place, file, high).map_err(ArchError::load("the kernel"))?;
            params.hdr = loaded.setup_header.ok_or(ArchError::Load {
                what: "the kernel",
                source: "the bzImage has no setup header".into(),
            })?;
            // It decompresses itself into the init_size bytes after its load address.
            let end = loaded.kernel_load.0 + u64::from(params.hdr.init_size);
            (loaded.kernel_load.0 + BZIMAGE_ENTRY_64, end)
        }
    };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    Ok((params, entry, end))
}

/// Loads the initramfs as high as possible below the MMIO hole, page-aligned.
fn load_initramfs(
    memory: &Memory,
    memory_bytes: u64,
    file: &mut File,
    kernel_end: u64,
) -> Result<(u64, u64), ArchError> {
    const WHAT: &str = "the initramfs";
    let len = file.metadata().map_err(ArchError::load(WHAT))?.len();
    let low = layout::memory_ranges(memory_bytes)[0].1;
    let address = low
        .checked_sub(len)
        .map(|a| a & !0xfff)
        .filter(|a| *a >= kernel_end)
        .ok_or_else(|| ArchError::Load {
            what: WHAT,
            source: format!(
                "{} KiB do not fit behind the kernel in {} MiB of memory",
                len >> 10,
                low >> 20
            )
            .into(),
        })?;
    let count = usize::try_from(len).map_err(ArchError::load(WHAT))?;
    memory
        .read_exact_volatile_from(GuestAddress(address), file, count)
        .map_err(ArchError::load(WHAT))?;
    Ok((address, len))
}

fn write_cmdline(memory: &Memory, text: &str) -> Result<u32, ArchError> {
    const WHAT: &str = "the command line";
    let mut line = Cmdline::new(layout::CMDLINE_SIZE.min(2048)).map_err(ArchError::load(WHAT))?;
    line.insert_str(text.trim())
        .map_err(ArchError::load(WHAT))?;
    load_cmdline(memory, GuestAddress(layout::CMDLINE), &line).map_err(ArchError::load(WHAT))?;
    Ok(text.trim().len() as u32)
}

/// Sets the e820 map: memory, except for the ranges that the guest must not use.
fn set_memory_map(memory_bytes: u64, params: &mut boot_params) {
    let mut map = vec![
        (0, layout::MPTABLE, E820_RAM),
        (
            layout::MPTABLE,
            layout::EBDA_END - layout::MPTABLE,
            E820_RESERVED,
        ),
        (layout::PANIC_LOG, layout::PANIC_LOG_SIZE, E820_RESERVED),
    ];
    let after_log = layout::PANIC_LOG + layout::PANIC_LOG_SIZE;
    for (start, len) in layout::memory_ranges(memory_bytes) {
        let from = start.max(after_log);
        map.push((from, start + len - from, E820_RAM));
    }
    for (slot, (addr, size, kind)) in params.e820_table.iter_mut().zip(&map) {
        *slot = boot_e820_entry {
            addr: *addr,
            size: *size,
            r#type: *kind,
        };
    }
    params.e820_entries = map.len() as u8;
}

/// Writes the MP table, the boot GDT, and page tables that identity-map the first GiB.
fn write_tables(memory: &Memory, cpus: u32) -> Result<(), ArchError> {
    const PRESENT_WRITABLE: u64 = 3;
    const HUGE: u64 = 1 << 7;
    let write = |bytes: &[u8], at: u64| {
        memory
            .write_slice(bytes, GuestAddress(at))
            .map_err(ArchError::load("the boot tables"))
    };
    let words = |words: &[u64]| -> Vec<u8> { words.iter().flat_map(|w| w.to_le_bytes()).collect() };
    write(&mptable::build(cpus), layout::MPTABLE)?;
    write(&words(&regs::gdt()), layout::BOOT_GDT)?;
    write(&words(&[0]), layout::BOOT_IDT)?;
    write(&words(&[layout::PDPTE | PRESENT_WRITABLE]), layout::PML4)?;
    write(&words(&[layout::PDE | PRESENT_WRITABLE]), layout::PDPTE)?;
    let directory: Vec<u64> = (0..512u64)
        .map(|n| n << 21 | PRESENT_WRITABLE | HUGE)
        .collect();
    write(&words(&directory), layout::PDE)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory(mib: u64) -> Memory {
        let ranges: Vec<_> = layout::memory_ranges(mib << 20)
            .iter()
            .map(|(start, len)| (GuestAddress(*start), *len as usize))
            .collect();
        Memory::from_ranges(&ranges).unwrap()
    }

    #[test]
    fn the_memory_map_covers_memory_and_never_overlaps() {
        for mib in [32, 3072, 5120] {
            let mut params = boot_params::default();
            set_memory_map(mib << 20, &mut params);
            let mut map: Vec<_> = params.e820_table[..params.e820_entries as usize]
                .iter()
                .map(|e| (e.addr, e.size))
                .collect();
            map.sort_unstable();
            for pair in map.windows(2) {
                assert!(pair[0].0 + pair[0].1 <= pair[1].0);
            }
            let total: u64 = map.iter().map(|e| e.1).sum();
            // All of it except the legacy hole between 640 KiB and 1 MiB.
            assert_eq!(total, (mib << 20) - 0x6_0000);
        }
    }

    #[test]
    fn an_initramfs_that_does_not_fit_is_refused() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(40 << 20).unwrap();
        let mut file = file;
        let error = load_initramfs(&memory(32), 32 << 20, &mut file, 0x100_0000).unwrap_err();
        let source = std::error::Error::source(&error).unwrap().to_string();
        assert!(source.contains("do not fit"), "{error}: {source}");
    }

    #[test]
    fn a_command_line_that_is_too_long_is_refused() {
        assert!(write_cmdline(&memory(32), &"x".repeat(3000)).is_err());
    }
}
