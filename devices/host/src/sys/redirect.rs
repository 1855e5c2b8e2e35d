//! Redirects connections to the loopback addresses of a network namespace to two listeners, whatever their
//! port (`BPF_PROG_TYPE_SK_LOOKUP`, Documentation/bpf/prog_sk_lookup.rst; Linux 5.9).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// `struct bpf_insn` (linux/bpf.h).
#[repr(C)]
#[derive(Clone, Copy)]
struct Instruction {
    code: u8,
    /// Destination register in the low half, source register in the high half.
    registers: u8,
    offset: i16,
    immediate: i32,
}

const fn instruction(code: u8, to: u8, from: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction {
        code,
        registers: to | from << 4,
        offset,
        immediate,
    }
}

// Instruction codes: class, size or operation, mode or source (linux/bpf_common.h).
const LOAD_WORD: u8 = 0x61;
const STORE_WORD: u8 = 0x62;
const LOAD_WIDE: u8 = 0x18;
const MOVE: u8 = 0xbf;
const MOVE_VALUE: u8 = 0xb7;
const ADD_VALUE: u8 = 0x07;
const AND_VALUE: u8 = 0x57;
const JUMP: u8 = 0x05;
const JUMP_EQUAL: u8 = 0x15;
const JUMP_UNEQUAL: u8 = 0x55;
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;

/// Marks a 64-bit immediate as a map descriptor (`BPF_PSEUDO_MAP_FD`).
const MAP_DESCRIPTOR: u8 = 1;

// Helper functions (enum bpf_func_id).
const MAP_LOOKUP: i32 = 1;
const SOCKET_RELEASE: i32 = 86;
const SOCKET_ASSIGN: i32 = 124;

// Offsets in `struct bpf_sk_lookup`.
const FAMILY: i16 = 8;
const PROTOCOL: i16 = 12;
const LOCAL_IP4: i16 = 40;
const LOCAL_IP6: i16 = 44;

/// `SK_PASS`
const PASS: i32 = 1;

/// The program: TCP connections to 127.0.0.0/8 or ::1 go to the first or second socket of the map; all others
/// are looked up as usual.
fn program(map: i32) -> Vec<Instruction> {
    let octet = |value: u8, place: usize| {
        let mut bytes = [0; 4];
        bytes[place] = value;
        i32::from_ne_bytes(bytes)
    };
    let mut all = vec![
        instruction(MOVE, 6, 1, 0, 0),
        instruction(LOAD_WORD, 2, 6, PROTOCOL, 0),
        instruction(JUMP_UNEQUAL, 2, 0, 0, libc::IPPROTO_TCP),
        instruction(LOAD_WORD, 2, 6, FAMILY, 0),
        instruction(STORE_WORD, 10, 0, -4, 0),
        instruction(JUMP_EQUAL, 2, 0, 0, libc::AF_INET),
        instruction(JUMP_UNEQUAL, 2, 0, 0, libc::AF_INET6),
        instruction(STORE_WORD, 10, 0, -4, 1),
        instruction(LOAD_WORD, 3, 6, LOCAL_IP6, 0),
        instruction(JUMP_UNEQUAL, 3, 0, 0, 0),
        instruction(LOAD_WORD, 3, 6, LOCAL_IP6 + 4, 0),
        instruction(JUMP_UNEQUAL, 3, 0, 0, 0),
        instruction(LOAD_WORD, 3, 6, LOCAL_IP6 + 8, 0),
        instruction(JUMP_UNEQUAL, 3, 0, 0, 0),
        instruction(LOAD_WORD, 3, 6, LOCAL_IP6 + 12, 0),
        instruction(JUMP_UNEQUAL, 3, 0, 0, octet(1, 3)),
        instruction(JUMP, 0, 0, 0, 0),
    ];
    let four = all.len();
    all.extend([
        instruction(LOAD_WORD, 3, 6, LOCAL_IP4, 0),
        instruction(AND_VALUE, 3, 0, 0, octet(0xff, 0)),
        instruction(JUMP_UNEQUAL, 3, 0, 0, octet(127, 0)),
    ]);
    let found = all.len();
    all.extend([
        instruction(LOAD_WIDE, 1, MAP_DESCRIPTOR, 0, map),
        instruction(0, 0, 0, 0, 0),
        instruction(MOVE, 2, 10, 0, 0),
        instruction(ADD_VALUE, 2, 0, 0, -4),
        instruction(CALL, 0, 0, 0, MAP_LOOKUP),
        instruction(JUMP_EQUAL, 0, 0, 0, 0),
        instruction(MOVE, 7, 0, 0, 0),
        instruction(MOVE, 1, 6, 0, 0),
        instruction(MOVE, 2, 7, 0, 0),
        instruction(MOVE_VALUE, 3, 0, 0, 0),
        instruction(CALL, 0, 0, 0, SOCKET_ASSIGN),
        instruction(MOVE, 1, 7, 0, 0),
        instruction(CALL, 0, 0, 0, SOCKET_RELEASE),
    ]);
    let pass = all.len();
    all.extend([
        instruction(MOVE_VALUE, 0, 0, 0, PASS),
        instruction(EXIT, 0, 0, 0, 0),
    ]);
    // Resolves jump targets: jumps lead to the lookup in the map, the comparison with AF_INET to the IPv4
    // part; all other comparisons lead to the end, where the connection passes.
    for (at, instruction) in all.iter_mut().enumerate() {
        let to = match (instruction.code, instruction.immediate) {
            (JUMP, _) => found,
            (JUMP_EQUAL, libc::AF_INET) => four,
            (JUMP_EQUAL | JUMP_UNEQUAL, _) => pass,
            _ => continue,
        };
        instruction.offset = (to - at - 1) as i16;
    }
    all
}

// Commands and types of bpf(2) (linux/bpf.h).
const MAP_CREATE: libc::c_int = 0;
const MAP_UPDATE: libc::c_int = 2;
const PROGRAM_LOAD: libc::c_int = 5;
const LINK_CREATE: libc::c_int = 28;
const MAP_OF_SOCKETS: u32 = 15;
const PROGRAM_SOCKET_LOOKUP: u32 = 30;
const ATTACH_SOCKET_LOOKUP: u32 = 36;

#[repr(C)]
struct MapAttributes {
    kind: u32,
    key_size: u32,
    value_size: u32,
    entries: u32,
    flags: u32,
}

#[repr(C)]
struct EntryAttributes {
    map: u32,
    _padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
struct ProgramAttributes {
    kind: u32,
    count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    attach: u32,
}

#[repr(C)]
struct LinkAttributes {
    program: u32,
    target: u32,
    attach: u32,
    flags: u32,
}

/// bpf(2).
///
/// # Safety
/// `T` is the command's member of `union bpf_attr`, and the memory it points to outlives the call.
// SAFETY: each caller names the command whose attributes it passes, and the owner of the memory they point to.
unsafe fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<i32> {
    // SAFETY: the attributes are only read, and their size is passed with them; the caller guarantees the memory that they
    // point to.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_ref(attributes),
            size_of::<T>(),
        )
    };
    match i32::try_from(result) {
        Ok(result) if result >= 0 => Ok(result),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Runs a command of bpf(2) that returns a descriptor.
///
/// # Safety
/// As [`bpf`].
// SAFETY: as there; and each caller's command returns a new descriptor.
unsafe fn bpf_descriptor<T>(command: libc::c_int, attributes: &T) -> io::Result<OwnedFd> {
    // SAFETY: the command returned a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(bpf(command, attributes)?) })
}

/// Redirects all TCP connections to the loopback addresses of a network namespace, whatever their port, to
/// these listeners: `four` for 127.0.0.0/8, `six` for ::1. The listeners must be in the namespace. The
/// redirection ends when the returned descriptor is closed.
///
/// # Errors
/// The error from bpf(2): EPERM without CAP_BPF and CAP_NET_ADMIN, EINVAL before Linux 5.9.
pub fn redirect_loopback(
    namespace: BorrowedFd<'_>,
    four: BorrowedFd<'_>,
    six: Option<BorrowedFd<'_>>,
) -> io::Result<OwnedFd> {
    let map = MapAttributes {
        kind: MAP_OF_SOCKETS,
        key_size: 4,
        value_size: 4,
        entries: 2,
        flags: 0,
    };
    // SAFETY: the attributes of MAP_CREATE, without pointers.
    let map = unsafe { bpf_descriptor(MAP_CREATE, &map)? };
    for (key, listener) in [(0_u32, Some(four)), (1, six)] {
        let Some(listener) = listener else {
            continue;
        };
        let value = listener.as_raw_fd() as u32;
        let entry = EntryAttributes {
            map: map.as_raw_fd() as u32,
            _padding: 0,
            key: (&raw const key).expose_provenance() as u64,
            value: (&raw const value).expose_provenance() as u64,
            flags: 0,
        };
        // SAFETY: the attributes of MAP_UPDATE_ELEM; key and value have the map's sizes and live on this
        // stack.
        unsafe { bpf(MAP_UPDATE, &entry)? };
    }
    let instructions = program(map.as_raw_fd());
    let license = c"Apache-2.0";
    let mut name = [0; 16];
    name[..13].copy_from_slice(b"koya_loopback");
    let load = ProgramAttributes {
        kind: PROGRAM_SOCKET_LOOKUP,
        count: instructions.len() as u32,
        instructions: instructions.as_ptr().expose_provenance() as u64,
        license: license.as_ptr().expose_provenance() as u64,
        log_level: 0,
        log_size: 0,
        log: 0,
        kernel_version: 0,
        flags: 0,
        name,
        interface: 0,
        attach: ATTACH_SOCKET_LOOKUP,
    };
    // SAFETY: the attributes of PROG_LOAD; instructions and license outlive the call. The kernel verifies the
    // program and takes a reference to the map.
    let program = unsafe { bpf_descriptor(PROGRAM_LOAD, &load)? };
    let link = LinkAttributes {
        program: program.as_raw_fd() as u32,
        target: namespace.as_raw_fd() as u32,
        attach: ATTACH_SOCKET_LOOKUP,
        flags: 0,
    };
    // SAFETY: the attributes of LINK_CREATE, without pointers. The link holds a reference to the program.
    unsafe { bpf_descriptor(LINK_CREATE, &link) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jumps_end_where_they_should() {
        let all = program(3);
        let target = |at: usize| at as i16 + 1 + all[at].offset;
        for (at, one) in all.iter().enumerate() {
            if [JUMP, JUMP_EQUAL, JUMP_UNEQUAL].contains(&one.code) {
                let to = target(at) as usize;
                assert!(to > at && to < all.len(), "{at} to {to}");
            }
        }
        let last = all.len() as i16 - 2;
        // Anything but TCP passes; IPv4 is checked; a matching IPv6 address leads to the map.
        assert_eq!(target(2), last);
        assert_eq!(all[target(5) as usize].offset, LOCAL_IP4);
        assert_eq!(all[target(16) as usize].code, LOAD_WIDE);
        assert_eq!(all[last as usize].immediate, PASS);
    }
}
