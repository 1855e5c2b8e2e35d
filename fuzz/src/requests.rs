//! Requests of drivers, mostly valid.

use crate::devices::fuse;
use crate::input::Input;
use koya_devices::fs::wire::op;
use koya_devices::test_utils::Buffer;

/// A request to a disk.
pub(crate) fn block(input: &mut Input<'_>) -> Vec<Buffer> {
    let any = u32::from(input.byte());
    let kind = input.pick(&[0, 1, 0, 1, 4, 8, 11, 13, 14, any]);
    let mut request = kind.to_le_bytes().to_vec();
    request.extend([0; 4]);
    let sector = match input.byte() % 4 {
        0 => input.number(),
        // The disk has 128 sectors.
        _ => u64::from(input.byte() % 132),
    };
    request.extend(sector.to_le_bytes());
    if input.byte() >= 250 {
        request.truncate(15);
    }
    let (given, room) = (input.word() % 8192, input.word() % 8192);
    let whole = |len: u16| {
        u32::from(if len.is_multiple_of(16) {
            len
        } else {
            len & !511
        })
    };
    match kind {
        11 | 13 | 14 if any >= 240 => request.extend_from_slice(input.bytes(48)),
        11 | 13 | 14 => {
            for _ in 0..=input.byte() % 3 {
                let (sector, count) = (input.byte() % 132, input.byte() % 20);
                request.extend(u64::from(sector).to_le_bytes());
                request.extend(u32::from(count).to_le_bytes());
                request.extend(u32::from(input.byte() / 64 % 2).to_le_bytes());
            }
        }
        _ => request.extend(vec![any as u8; whole(given) as usize]),
    }
    let mut buffers = vec![Buffer::Readable(request)];
    if kind != 1 && room != 0 {
        buffers.push(Buffer::Writable(whole(room)));
    }
    buffers.push(Buffer::Writable(u32::from(input.byte() < 250)));
    buffers
}

/// A transmitted frame, in one buffer or two.
pub(crate) fn frame(input: &mut Input<'_>) -> Vec<Buffer> {
    let mut bytes = input.bytes(12).to_vec();
    let len = usize::from(input.word()) % 4096;
    bytes.resize(bytes.len() + len, 0x5a);
    let cut = usize::from(input.byte()).min(bytes.len());
    let second = bytes.split_off(cut);
    vec![Buffer::Readable(bytes), Buffer::Readable(second)]
}

/// A control command: mostly one that sets the number of queue pairs.
pub(crate) fn pairs(input: &mut Input<'_>) -> Vec<Buffer> {
    let any = input.byte();
    let class = input.pick(&[4, 4, 4, any]);
    let command = [
        class,
        input.byte() % 2,
        input.byte() % 6,
        input.byte() / 250,
    ];
    let room = u32::from(input.byte() < 240);
    vec![Buffer::Readable(command.to_vec()), Buffer::Writable(room)]
}

/// A request to plug, unplug or query memory.
pub(crate) fn memory(input: &mut Input<'_>, start: u64) -> Vec<Buffer> {
    let mut request = u16::from(input.byte() % 5).to_le_bytes().to_vec();
    request.extend([0; 6]);
    let address = match input.byte() % 8 {
        0 => input.number(),
        _ => start + (u64::from(input.byte() % 34) << 21),
    };
    request.extend(address.to_le_bytes());
    let count = match input.byte() {
        250.. => input.word(),
        byte => u16::from(byte % 34),
    };
    request.extend(count.to_le_bytes());
    request.extend([0; 6]);
    if input.byte() >= 250 {
        request.pop();
    }
    vec![Buffer::Readable(request), Buffer::Writable(10)]
}

/// A packet of a stream.
pub(crate) fn packet(input: &mut Input<'_>) -> Vec<Buffer> {
    let data = vec![0x5a; usize::from(input.word() % 5000)];
    let ports = (
        u32::from(input.byte() % 4),
        input.pick(&[1u32, 1, 2, 1 << 30]),
    );
    let len = match input.byte() {
        250.. => input.number() as u32,
        _ => data.len() as u32,
    };
    let (op, flags) = (u16::from(input.byte() % 9), u32::from(input.byte() % 4));
    let credit = (input.number() as u32, u32::from(input.byte()));
    let header = vsock_header(ports, op, flags, len, credit);
    vec![Buffer::Readable(header), Buffer::Readable(data)]
}

/// The guest's CID in all packets.
pub(crate) const GUEST_CID: u64 = 3;

/// The header of a guest's packet (virtio 1.2, section 5.10.6): ports of guest and host, operation, flags, length, and
/// credit (`buf_alloc` and `fwd_cnt`).
pub(crate) fn vsock_header(
    (guest_port, host_port): (u32, u32),
    op: u16,
    flags: u32,
    len: u32,
    (room, forwarded): (u32, u32),
) -> Vec<u8> {
    let mut bytes = GUEST_CID.to_le_bytes().to_vec();
    bytes.extend(2u64.to_le_bytes());
    for word in [guest_port, host_port, len, 1 | u32::from(op) << 16] {
        bytes.extend(word.to_le_bytes());
    }
    for word in [flags, room, forwarded] {
        bytes.extend(word.to_le_bytes());
    }
    bytes
}

/// A FUSE request on a node and a handle that may exist.
pub(crate) fn file(input: &mut Input<'_>) -> Vec<Buffer> {
    const NAMES: [&[u8]; 8] = [
        b"share\0", b"file\0", b"dir\0", b"new\0", b"..\0", b".\0", b"a/b\0", b"",
    ];
    let opcode = match u32::from(input.byte() % 64) {
        53.. => input.pick(&[op::LOOKUP, op::OPEN, op::CREATE, op::READ, op::WRITE]),
        opcode => opcode,
    };
    let node = u64::from(input.byte() % 6);
    let words = input.byte() % 8;
    let mut body = Vec::new();
    for _ in 0..words {
        body.extend(input.number().to_le_bytes());
    }
    for _ in 0..input.byte() % 3 {
        body.extend_from_slice(input.pick(&NAMES));
    }
    let request = fuse(opcode, node, 0, &body);
    vec![Buffer::Readable(request), Buffer::Writable(4096)]
}
