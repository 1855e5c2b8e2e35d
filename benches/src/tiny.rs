//! The smallest guest and the smallest program, as ELF files: the rest of a start is the monitor's.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// Ends a guest under any monitor, in 32-bit and in 64-bit mode: a reset by the keyboard controller
/// (Koya, Firecracker), else QEMU's isa-debug-exit at port 0x501, else nothing more.
const GUEST: &[u8] = &[
    0xb0, 0xfe, // mov al, 0xfe
    0xe6, 0x64, // out 0x64, al
    0xb0, 0x01, // mov al, 1
    0x66, 0xba, 0x01, 0x05, // mov dx, 0x501
    0xee, // out dx, al
    0xfa, // cli
    0xf4, // hlt
    0xeb, 0xfd, // jmp to hlt
];
/// Waits without end: cli; L: hlt; jmp L
const IDLE_GUEST: &[u8] = &[0xfa, 0xf4, 0xeb, 0xfd];
/// Load address in guest physical memory.
const GUEST_ADDRESS: u64 = 16 << 20;
/// Exit status of QEMU after the guest wrote 1 to isa-debug-exit.
pub const QEMU_STATUS: i32 = 3;

/// exit(0)
const PROGRAM: &[u8] = &[
    0x31, 0xff, // xor edi, edi
    0xb8, 0x3c, 0, 0, 0, // mov eax, 60
    0x0f, 0x05, // syscall
];
const PROGRAM_ADDRESS: u64 = 4 << 20;

/// Offset of the code in the file; headers and note come before it.
const CODE: u64 = 0x100;
const NOTE: u64 = 64 + 2 * 56;

/// Writes a kernel for every monitor, for the 64-bit Linux boot protocol and PVH, that ends at once.
///
/// # Errors
/// If the file can't be written.
pub fn write_guest(path: &Path) -> io::Result<()> {
    fs::write(path, elf(GUEST, GUEST_ADDRESS))
}

/// Writes a kernel of this architecture that waits and does nothing.
///
/// # Errors
/// If the file can't be written.
pub fn write_idle_guest(path: &Path) -> io::Result<()> {
    let guest = match std::env::consts::ARCH {
        "aarch64" => idle_image(),
        _ => elf(IDLE_GUEST, GUEST_ADDRESS),
    };
    fs::write(path, guest)
}

/// An Image of arm64 (Documentation/arch/arm64/booting.rst), whose header begins with two instructions that wait without
/// end: L: wfi; b L
fn idle_image() -> Vec<u8> {
    let mut image = vec![0; 64];
    image[..4].copy_from_slice(&0xd503_207f_u32.to_le_bytes());
    image[4..8].copy_from_slice(&0x17ff_ffff_u32.to_le_bytes());
    // Size in memory.
    image[16] = 64;
    image[56..60].copy_from_slice(b"ARM\x64");
    image
}

/// Writes a static program that does nothing.
///
/// # Errors
/// If the file can't be written.
pub fn write_program(path: &Path) -> io::Result<()> {
    fs::write(path, elf(PROGRAM, PROGRAM_ADDRESS))?;
    fs::set_permissions(path, Permissions::from_mode(0o755))
}

/// An ELF file with one segment at `address` and the entry point `code`, which is repeated in a note for PVH.
fn elf(code: &[u8], address: u64) -> Vec<u8> {
    let entry = address + CODE;
    let end = CODE + code.len() as u64;
    let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let halves = |file: &mut Vec<u8>, values: &[u16]| {
        file.extend(values.iter().flat_map(|v| v.to_le_bytes()));
    };
    let words = |file: &mut Vec<u8>, values: &[u32]| {
        file.extend(values.iter().flat_map(|v| v.to_le_bytes()));
    };
    let doubles = |file: &mut Vec<u8>, values: &[u64]| {
        file.extend(values.iter().flat_map(|v| v.to_le_bytes()));
    };
    // An executable for x86-64; entry, program headers at 64, no sections.
    halves(&mut file, &[2, 62]);
    words(&mut file, &[1]);
    doubles(&mut file, &[entry, 64, 0]);
    words(&mut file, &[0]);
    halves(&mut file, &[64, 56, 2, 0, 0, 0]);
    // PT_LOAD, readable and executable: the whole file.
    words(&mut file, &[1, 5]);
    doubles(&mut file, &[0, address, address, end, end, 0x1000]);
    // PT_NOTE
    words(&mut file, &[4, 4]);
    let note = address + NOTE;
    doubles(&mut file, &[NOTE, note, note, 20, 20, 4]);
    // XEN_ELFNOTE_PHYS32_ENTRY
    words(&mut file, &[4, 4, 18]);
    file.extend(b"Xen\0");
    words(&mut file, &[entry as u32]);
    file.resize(CODE as usize, 0);
    file.extend(code);
    file
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_runs_and_ends() {
        let dir = std::env::temp_dir().join(format!("koya-tiny-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let path = dir.join("nothing");
        write_program(&path).unwrap();
        let status = std::process::Command::new(&path).status();
        fs::remove_dir_all(&dir).unwrap();
        assert!(status.unwrap().success());
    }

    #[test]
    fn the_note_lies_where_the_header_says() {
        let file = elf(GUEST, GUEST_ADDRESS);
        let at = NOTE as usize;
        assert_eq!(&file[at + 12..at + 16], b"Xen\0");
        let entry = u32::from_le_bytes(file[at + 16..at + 20].try_into().unwrap());
        assert_eq!(u64::from(entry), GUEST_ADDRESS + CODE);
        assert_eq!(&file[CODE as usize..], GUEST);
    }
}
