//! Loads kernel, initramfs and device tree into guest memory (Documentation/arch/arm64/booting.rst).

use super::super::{ArchError, BootInfo};
use super::{Entry, KernelFormat, cmdline, device_tree, layout};
use crate::config::Boot;
use koya_devices::virtio::Memory;
use linux_loader::loader::{KernelLoader, PE};
use std::fs::File;
use std::io::{Read, Seek};
use std::ops::Range;
use vm_memory::{Bytes, GuestAddress};

/// Loads kernel, initramfs and device tree, and returns the entry point of the first vCPU.
///
/// # Errors
/// If something does not fit or is malformed.
pub(crate) fn load(memory: &Memory, info: BootInfo<'_>) -> Result<Entry, ArchError> {
    let line = cmdline::render(&info);
    if line.len() >= cmdline::CMDLINE_SIZE {
        let reason = format!("{} bytes are too many", line.len());
        return Err(ArchError::load("the command line")(reason));
    }
    let memory_bytes = info.memory.bytes;
    let (kernel, initramfs) = match &mut *info.boot {
        Boot::Linux {
            kernel,
            format: KernelFormat::Image,
            initramfs,
            ..
        } => (kernel, initramfs),
        Boot::Flat(code) => {
            memory
                .write_slice(code, GuestAddress(layout::FLAT))
                .map_err(ArchError::load("flat code"))?;
            return Ok(Entry {
                pc: layout::FLAT,
                device_tree: 0,
            });
        }
    };
    let (pc, kernel_end) = load_kernel(memory, memory_bytes, kernel)?;
    let initramfs = match initramfs {
        Some(file) => Some(load_initramfs(memory, memory_bytes, file, kernel_end)?),
        None => None,
    };
    let tree = device_tree::render(&info, line.trim(), initramfs)?;
    if tree.len() as u64 > layout::DEVICE_TREE_SIZE {
        let reason = format!("{} bytes are too many", tree.len());
        return Err(ArchError::load("the device tree")(reason));
    }
    memory
        .write_slice(&tree, GuestAddress(layout::DEVICE_TREE))
        .map_err(ArchError::load("the device tree"))?;
    Ok(Entry {
        pc,
        device_tree: layout::DEVICE_TREE,
    })
}

/// Loads the kernel; returns its entry point and the first address after the memory that it uses before it has parsed the
/// device tree.
fn load_kernel(
    memory: &Memory,
    memory_bytes: u64,
    file: &mut File,
) -> Result<(u64, u64), ArchError> {
    const WHAT: &str = "the kernel";
    let size = image_size(file).map_err(ArchError::load(WHAT))?;
    let place = Some(GuestAddress(layout::KERNEL));
    let loaded = PE::load(memory, place, file, None).map_err(ArchError::load(WHAT))?;
    let start = loaded.kernel_load.0;
    // The header's size includes the BSS, which is not in the file.
    let end = start.saturating_add(size).max(loaded.kernel_end);
    let memory_end = memory_end(memory_bytes);
    if end > memory_end {
        let reason = format!(
            "{} KiB do not fit into {} MiB of memory",
            (end - start) >> 10,
            memory_bytes >> 20
        );
        return Err(ArchError::load(WHAT)(reason));
    }
    Ok((start, end))
}

/// Size of the kernel in memory, from its header.
fn image_size(file: &mut File) -> std::io::Result<u64> {
    let mut head = [0; 64];
    file.rewind()?;
    file.read_exact(&mut head)?;
    let mut size = [0; 8];
    size.copy_from_slice(&head[16..24]);
    Ok(u64::from_le_bytes(size))
}

fn memory_end(bytes: u64) -> u64 {
    let ranges = layout::memory_ranges(bytes).into_iter();
    ranges.map(|(start, len)| start + len).max().unwrap_or(0)
}

/// Loads the initramfs as high as possible, page-aligned.
fn load_initramfs(
    memory: &Memory,
    memory_bytes: u64,
    file: &mut File,
    kernel_end: u64,
) -> Result<Range<u64>, ArchError> {
    const WHAT: &str = "the initramfs";
    let len = file.metadata().map_err(ArchError::load(WHAT))?.len();
    let end = memory_end(memory_bytes).min(layout::INITRAMFS_END);
    let start = end.checked_sub(len).map(|start| start & !0xfff);
    let start = start.filter(|start| *start >= kernel_end).ok_or_else(|| {
        let (kib, mib) = (len >> 10, memory_bytes >> 20);
        ArchError::load(WHAT)(format!(
            "{kib} KiB do not fit behind the kernel in {mib} MiB of memory"
        ))
    })?;
    let count = usize::try_from(len).map_err(ArchError::load(WHAT))?;
    memory
        .read_exact_volatile_from(GuestAddress(start), file, count)
        .map_err(ArchError::load(WHAT))?;
    Ok(start..start + len)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn memory(mib: u64) -> Memory {
        let ranges = layout::memory_ranges(mib << 20);
        let ranges: Vec<_> = ranges
            .iter()
            .map(|(start, len)| (GuestAddress(*start), *len as usize))
            .collect();
        Memory::from_ranges(&ranges).unwrap()
    }

    /// An Image with this size in its header.
    fn image(size: u64) -> File {
        let mut head = [0; 64];
        head[16..24].copy_from_slice(&size.to_le_bytes());
        head[56..60].copy_from_slice(b"ARM\x64");
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&head).unwrap();
        file
    }

    #[test]
    fn a_kernel_is_placed_and_its_bss_is_kept_free() {
        let placed = load_kernel(&memory(32), 32 << 20, &mut image(5 << 20)).unwrap();
        assert_eq!(placed, (layout::KERNEL, layout::KERNEL + (5 << 20)));
        for size in [31 << 20, u64::MAX] {
            let refused = load_kernel(&memory(32), 32 << 20, &mut image(size));
            let error = refused.unwrap_err();
            let source = std::error::Error::source(&error).unwrap().to_string();
            assert!(source.contains("do not fit"), "{source}");
        }
    }

    #[test]
    fn an_initramfs_lies_at_the_end_or_is_refused() {
        let mut file = tempfile::tempfile().unwrap();
        file.set_len(5000).unwrap();
        let (memory, bytes) = (memory(32), 32 << 20);
        let kernel_end = layout::KERNEL + (4 << 20);
        let at = load_initramfs(&memory, bytes, &mut file, kernel_end).unwrap();
        assert_eq!(at, 0x81ff_e000..0x81ff_e000 + 5000);
        file.set_len(40 << 20).unwrap();
        let error = load_initramfs(&memory, bytes, &mut file, kernel_end).unwrap_err();
        let source = std::error::Error::source(&error).unwrap().to_string();
        assert!(source.contains("do not fit"), "{source}");
    }
}
