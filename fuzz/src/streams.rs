//! Streams between guest and host over many rounds: both ends send, read, close, and drop streams without notice.
//!
//! With an even first byte the guest follows the protocol, and more is checked: each end receives the bytes sent by the
//! other in order, the device never exceeds the guest's credit, and at the end no data is left in transit. Other guests send
//! arbitrary packets.

mod machine;

use crate::input::Input;
use crate::requests::vsock_header;
use event_manager::SubscriberOps;
use koya_devices::virtio::VirtioDevice;
use machine::*;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// Streams over many rounds.
///
/// # Panics
/// If the device has a bug, or the host is out of descriptors.
pub fn vsock_streams(data: &[u8]) {
    let mut input = Input::new(data);
    let honest = input.byte().is_multiple_of(2);
    let mut machine = Machine::new();
    for _ in 0..400 {
        if input.is_empty() {
            break;
        }
        match honest {
            true => step(&mut machine, &mut input),
            false => hostile_step(&mut machine, &mut input),
        }
    }
    if honest {
        settle(&mut machine);
    }
    let worker = machine.worker.take();
    let worker = worker.and_then(|id| machine.events.remove_subscriber(id).ok());
    machine.device.reset(worker);
}

/// One action of either end.
fn step(machine: &mut Machine, input: &mut Input<'_>) {
    let action = input.byte();
    let ports: Vec<u32> = machine.streams.keys().copied().collect();
    let port = match ports.is_empty() {
        true => 0,
        false => input.pick(&ports),
    };
    match action % 16 {
        0 => dial(machine, input),
        1 => connect(machine, input),
        2 | 3 => guest_sends(machine, port, u32::from(input.word())),
        4 | 5 => host_writes(machine, port, u32::from(input.word())),
        6 => host_reads(machine, port, usize::from(input.word()) * 4),
        7 => {
            let count = input.byte() % 16;
            (0..count).for_each(|_| machine.offer(4096));
        }
        8 => machine.offer(45 + u32::from(input.word())),
        9 => guest_shuts(machine, port, u32::from(input.byte() % 3) + 1),
        10 => {
            // Only while this direction is open: neither end writes to a closed stream.
            if let Some(stream) = machine.streams.get_mut(&port)
                && let Some(host) = &stream.host
            {
                stream.host_ended = true;
                host.shutdown(Shutdown::Write).ok();
            }
        }
        11 => {
            if let Some(stream) = machine.streams.get_mut(&port) {
                stream.host = None;
                stream.over = true;
            }
        }
        12 => {
            machine.send(port, RESET, 0, Vec::new());
            machine.streams.remove(&port);
            machine.forgotten.insert(port);
        }
        13 if established(machine, port) => {
            let op = input.pick(&[CREDIT, CREDIT_REQUEST]);
            machine.send(port, op, 0, Vec::new());
        }
        14 if action == 254 => machine.reset(),
        _ => {}
    }
    // Several actions may precede the device's turn.
    if action < 192 {
        serve(machine);
    }
}

fn established(machine: &Machine, port: u32) -> bool {
    let stream = machine.streams.get(&port);
    stream.is_some_and(|stream| stream.established && !stream.over)
}

fn new_stream(host_port: u32, room: u32) -> Stream {
    Stream {
        host: None,
        host_port,
        established: false,
        guest_ended: false,
        host_ended: false,
        over: false,
        sent: 0,
        read: 0,
        written: 0,
        received: 0,
        acknowledged: 0,
        room,
        credit: 0,
        forwarded: 0,
    }
}

fn dial(machine: &mut Machine, input: &mut Input<'_>) {
    if machine.streams.len() >= 8 {
        return;
    }
    let port = machine.next_port;
    machine.next_port += 1;
    let room = 1 + u32::from(input.word()) * 4;
    machine.streams.insert(port, new_stream(SERVED, room));
    machine.asked.push(port);
    machine.send(port, REQUEST, 0, Vec::new());
}

fn connect(machine: &mut Machine, input: &mut Input<'_>) {
    if machine.streams.len() >= 8 {
        return;
    }
    let port = machine.next_port;
    machine.next_port += 1;
    if let Ok(host) = machine.ports.connect(port) {
        host.set_nonblocking(true).expect("a socket");
        let room = 1 + u32::from(input.word()) * 4;
        let stream = Stream {
            host: Some(host),
            ..new_stream(0, room)
        };
        machine.streams.insert(port, stream);
    }
}

fn guest_sends(machine: &mut Machine, port: u32, len: u32) {
    if !established(machine, port) {
        return;
    }
    let Some(stream) = machine.streams.get_mut(&port) else {
        return;
    };
    let free = stream.credit - stream.sent.wrapping_sub(stream.forwarded);
    let len = len.min(free);
    if len == 0 || stream.guest_ended || machine.taken + len as usize > ROOM {
        return;
    }
    let first = stream.sent;
    stream.sent += len;
    let data = (0..len).map(|at| pattern(port, first + at)).collect();
    machine.send(port, DATA, 0, data);
}

fn guest_shuts(machine: &mut Machine, port: u32, flags: u32) {
    if !established(machine, port) {
        return;
    }
    if let Some(stream) = machine.streams.get_mut(&port) {
        stream.guest_ended |= flags & NO_MORE_SENT != 0;
        // Data in transit to the guest may be lost; all data, if both directions end.
        stream.over |= flags & NO_MORE_RECEIVED != 0;
    }
    machine.send(port, SHUTDOWN, flags, Vec::new());
}

fn host_writes(machine: &mut Machine, port: u32, len: u32) {
    let Some(stream) = machine.streams.get_mut(&port) else {
        return;
    };
    let (Some(host), false) = (&mut stream.host, stream.host_ended) else {
        return;
    };
    let first = stream.written;
    let bytes: Vec<u8> = (0..len).map(|at| pattern(port, first + at)).collect();
    if let Ok(count) = host.write(&bytes) {
        stream.written += count as u32;
    }
}

fn host_reads(machine: &mut Machine, port: u32, len: usize) {
    let Some(stream) = machine.streams.get_mut(&port) else {
        return;
    };
    let Some(host) = &mut stream.host else {
        return;
    };
    let mut bytes = vec![0; len.min(1 << 16)];
    match host.read(&mut bytes) {
        Ok(0) if !bytes.is_empty() => {
            let all = stream.read == stream.sent && stream.guest_ended;
            assert!(stream.over || all, "a stream ends before its data");
        }
        Ok(count) => {
            for byte in &bytes[..count] {
                assert_eq!(*byte, pattern(port, stream.read), "at {}", stream.read);
                stream.read += 1;
            }
            assert!(stream.read <= stream.sent);
        }
        Err(error) => assert!(
            stream.over || error.kind() == ErrorKind::WouldBlock,
            "{error}"
        ),
    }
}

/// The device serves its queues, the host accepts, and the guest reads its packets.
fn serve(machine: &mut Machine) {
    machine.run();
    while let Ok(host) = machine.listener.accept_timeout(Duration::ZERO) {
        host.set_nonblocking(true).expect("a socket");
        let port = machine.asked.remove(0);
        if let Some(stream) = machine.streams.get_mut(&port) {
            stream.host = Some(host);
        }
    }
    for packet in machine.packets() {
        take(machine, packet);
    }
    if machine.taken > ROOM / 2 && machine.waiting == 0 && machine.unsent == 0 {
        machine.taken = 0;
        machine.sends.recycle();
        machine.receive.recycle();
    }
}

fn take(machine: &mut Machine, packet: Packet) {
    let port = packet.guest_port;
    if machine.forgotten.contains(&port) {
        return;
    }
    let Some(stream) = machine.streams.get_mut(&port) else {
        panic!("a packet of kind {} of a stream that is no more", packet.op);
    };
    if packet.op != RESET {
        // Both are zero in a refusal.
        stream.credit = packet.credit;
        let left = stream.sent.wrapping_sub(packet.forwarded);
        assert!(left <= stream.sent, "it forwarded more than was sent");
        assert!(packet.forwarded >= stream.forwarded, "it takes back");
        stream.forwarded = packet.forwarded;
    }
    match packet.op {
        REQUEST => {
            assert!(!stream.established && stream.host_port == 0);
            stream.host_port = packet.host_port;
            stream.established = true;
            machine.send(port, RESPONSE, 0, Vec::new());
        }
        RESPONSE => {
            assert!(!stream.established);
            stream.established = true;
        }
        RESET => {
            let done = stream.guest_ended && stream.host_ended;
            assert!(stream.over || done, "a reset without a reason");
            machine.streams.remove(&port);
            machine.forgotten.insert(port);
        }
        SHUTDOWN => {
            assert_eq!(packet.flags, NO_MORE_SENT);
            assert!(stream.over || stream.host_ended);
            assert!(stream.over || stream.received == stream.written);
        }
        DATA => {
            assert!(!packet.data.is_empty());
            for byte in &packet.data {
                assert_eq!(
                    *byte,
                    pattern(port, stream.received),
                    "at {}",
                    stream.received
                );
                stream.received += 1;
            }
            assert!(stream.received <= stream.written);
            let waiting = stream.received - stream.acknowledged;
            assert!(waiting <= stream.room, "more than the guest has room for");
        }
        CREDIT | CREDIT_REQUEST => {}
        op => panic!("a packet of kind {op}"),
    }
}

/// Both ends read until nothing more arrives; then nothing may be missing.
fn settle(machine: &mut Machine) {
    serve(machine);
    for round in 0.. {
        let ports: Vec<u32> = machine.streams.keys().copied().collect();
        let state = |machine: &Machine| -> Vec<(u32, u32)> {
            let all = machine.streams.values();
            all.map(|stream| (stream.read, stream.received)).collect()
        };
        let before = state(machine);
        while machine.waiting < 4 && machine.taken < ROOM {
            machine.offer(32 << 10);
        }
        for port in &ports {
            host_reads(machine, *port, 1 << 18);
            let answers = machine.streams.get(port);
            if answers.is_some_and(|stream| stream.received != stream.acknowledged)
                && established(machine, *port)
            {
                machine.send(*port, CREDIT, 0, Vec::new());
            }
        }
        serve(machine);
        let room = machine.taken < ROOM - (1 << 18);
        // Data may be left if there is no more memory, or if a guest takes it byte after byte.
        if round > 3 && (!room || round > 4000) {
            return;
        }
        if round > 3 && before == state(machine) {
            break;
        }
    }
    for (port, stream) in &machine.streams {
        if stream.established && !stream.over && stream.host.is_some() {
            assert_eq!(stream.read, stream.sent, "of port {port}, to the host");
            assert_eq!(
                stream.received, stream.written,
                "of port {port}, to the guest"
            );
        }
    }
}

/// One action of a guest with arbitrary packets on any stream.
fn hostile_step(machine: &mut Machine, input: &mut Input<'_>) {
    let action = input.byte();
    match action % 8 {
        0..=2 => {
            let ports = (
                u32::from(input.byte() % 4),
                input.pick(&[SERVED, 2, 1 << 30, 5]),
            );
            let op = u16::from(input.byte() % 9);
            let sizes = (input.number() as u32, input.number() as u32);
            let data = vec![action; usize::from(input.word())];
            let lie = input.byte();
            let len = match lie % 16 {
                15 => input.number() as u32,
                _ => data.len() as u32,
            };
            let mut header = vsock_header(ports, op, u32::from(lie / 16), len, sizes);
            match lie {
                250 => header.truncate(43),
                251 => header[0] = 9,
                252 => header[8] = 1,
                253 => header[28] = 2,
                _ => {}
            }
            machine.send_raw(header, data, lie.is_multiple_of(2));
        }
        3 => {
            let len = input.pick(&[43, 44, 45, 100, 4096, 70_000]);
            machine.offer(len);
        }
        4 => {
            // Few ports of the guest, so that it may reply.
            if let Ok(host) = machine.ports.connect(u32::from(input.byte() % 4)) {
                keep(machine, host);
            }
        }
        5 => {
            let port = 100 + u32::from(input.byte() % 8);
            let data = vec![action; usize::from(input.word())];
            if let Some(host) = host_end(machine, port) {
                host.write_all(&data).ok();
            }
        }
        6 => {
            let port = 100 + u32::from(input.byte() % 8);
            let mut bytes = vec![0; usize::from(input.word())];
            if let Some(host) = host_end(machine, port) {
                let _some = host.read(&mut bytes);
            }
        }
        _ => match input.byte() {
            0..=15 => machine.reset(),
            16..=40 => machine.sends.set_available_index(input.word()),
            41..=60 => machine.receive.set_available_index(input.word()),
            byte => {
                machine.streams.remove(&(100 + u32::from(byte % 8)));
            }
        },
    }
    if action < 192 {
        machine.run();
        while let Ok(host) = machine.listener.accept_timeout(Duration::ZERO) {
            keep(machine, host);
        }
        // Not read: a head may never have been offered.
        machine.receive.used();
        machine.waiting = 0;
    }
}

/// Keeps the host's end of a stream, at most eight of them.
fn keep(machine: &mut Machine, host: UnixStream) {
    host.set_nonblocking(true).expect("a socket");
    let port = 100 + machine.next_port % 8;
    machine.next_port += 1;
    let stream = Stream {
        host: Some(host),
        ..new_stream(0, 0)
    };
    machine.streams.insert(port, stream);
}

fn host_end(machine: &mut Machine, port: u32) -> Option<&mut UnixStream> {
    machine.streams.get_mut(&port)?.host.as_mut()
}

#[cfg(test)]
mod tests {
    /// The host has more data than a guest with buffers of one byte takes in all rounds.
    #[test]
    fn a_guest_that_takes_byte_after_byte_loses_nothing() {
        let (honest, offers, connects, writes) = (0, 7, 1, 4);
        let (buffers, room, len) = (8, [0, 0], [0xff, 0x7f]);
        // Four streams, as many as there are buffers in a round.
        let mut input = vec![honest, offers, buffers, connects, room[0], room[1]];
        for _ in 1..4 {
            input.extend([connects, 0, room[0], room[1]]);
        }
        input.extend([offers, 0, buffers]);
        for stream in 0..4 {
            input.extend([writes, stream, len[0], len[1]]);
        }
        super::vsock_streams(&input);
    }
}
