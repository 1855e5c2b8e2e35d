//! Whole devices with a driver that makes arbitrary requests.
//!
//! A device serves the contents of a queue at activation before it checks whether it has to stop, so activation and reset
//! together serve an input, on the device's own threads.

use crate::directories::{Contents, Directory};
use crate::pool::{Guest, Layout, Lease, REGION};
use crate::requests::{GUEST_CID, vsock_header};
use crate::user::keep_descriptors;
use event_manager::{EventManager, SubscriberOps};
use koya_devices::balloon::Balloon;
use koya_devices::blk::{Block, Disk, DiskOptions, IoEngine};
use koya_devices::fs::Shares;
use koya_devices::fs::passthrough::{Options, Passthrough};
use koya_devices::fs::server::Server;
use koya_devices::fs::wire::op;
use koya_devices::mem::Mem;
use koya_devices::net::{MacAddr, Net, NetOptions, Tap};
use koya_devices::rate_limit::RateLimits;
use koya_devices::rng::Rng;
use koya_devices::test_utils::{Buffer, IdleLoop};
use koya_devices::virtio::mmio::MmioTransport;
use koya_devices::virtio::{Activation, ActiveQueue, VirtioDevice, Worker};
use koya_devices::vsock::{Ports, Vsock};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, send, socketpair};
use std::cell::Cell;
use std::fs::File;
use std::sync::Arc;

const QUEUE: u16 = 64;
const DISK_BYTES: u64 = 64 << 10;

type Manager = EventManager<Box<dyn event_manager::MutEventSubscriber + Send>>;

thread_local! {
    /// The event loop, which is used again.
    static MANAGER: Cell<Option<Manager>> = const { Cell::new(None) };
}

/// Activates a device with its queues, and resets it.
fn serve(device: &mut dyn VirtioDevice, driver: &Guest, queues: Vec<ActiveQueue>) {
    let activated = device.activate(Activation {
        memory: driver.memory().clone(),
        interrupt: driver.recorder().clone(),
        queues: queues.into_iter().map(Some).collect(),
        features: device.features(),
    });
    let worker = match activated {
        Ok(Worker::EventLoop(worker)) => {
            let manager = MANAGER.take();
            let mut manager = manager.unwrap_or_else(|| EventManager::new().expect("epoll"));
            let id = manager.add_subscriber(worker);
            manager.run_with_timeout(0).expect("epoll");
            let worker = manager.remove_subscriber(id).ok();
            MANAGER.set(Some(manager));
            worker
        }
        _ => None,
    };
    device.reset(worker);
}

/// Requests to a disk, eight bytes each: type, sector, sizes of the readable and writable buffers, and the lengths of header
/// and status.
///
/// # Panics
/// If the device has a bug, or the host is out of memory.
pub fn block_requests(data: &[u8]) {
    let mut driver = Guest::new(QUEUE);
    let chunks = data.chunks_exact(8);
    for bytes in chunks.take(usize::from(QUEUE) / 4) {
        let [kind, s0, s1, s2, given, room, cut, status] = bytes else {
            continue;
        };
        let kinds = [0, 1, 4, 8, 11, 13, 14, u32::from(*kind)];
        let mut request = kinds[usize::from(kind % 8)].to_le_bytes().to_vec();
        request.extend([0; 4]);
        // Sectors inside the disk, at its end, and far beyond.
        let sector = u64::from(*s0) << (8 * u32::from(s1 % 8));
        request.extend(sector.wrapping_add(u64::from(s2 % 4)).to_le_bytes());
        let header = if cut % 8 == 0 {
            usize::from(*cut) % 17
        } else {
            16
        };
        request.truncate(header);
        request.extend(std::iter::repeat_n(*s2, usize::from(*given) * 16));
        driver.offer(&[
            Buffer::Readable(request),
            Buffer::Writable(u32::from(*room) * 32),
            Buffer::Writable(u32::from(status % 4)),
        ]);
    }
    let file = File::from(memfd_create("disk", MemfdFlags::CLOEXEC).expect("memory"));
    ftruncate(&file, DISK_BYTES).expect("memory");
    let options = DiskOptions {
        read_only: data.first().is_some_and(|byte| byte % 4 == 0),
        ..DiskOptions::default()
    };
    let disk = Disk::from_file(file.try_clone().expect("a descriptor"), options).expect("a disk");
    // A ring takes the host longer than the requests.
    let engine = match data.len() % 64 {
        63 => IoEngine::Auto,
        _ => IoEngine::Calls,
    };
    let mut device = Block::new(disk, 1).expect("a device").with_engine(engine);
    serve(&mut device, &driver, vec![driver.queue()]);
    assert_eq!(file.metadata().expect("a file").len(), DISK_BYTES);
}

/// Buffers for frames in both directions, two bytes each, and frames from the host.
///
/// # Panics
/// If the device has a bug, or the host is out of sockets.
pub fn net_buffers(data: &[u8]) {
    let mut receive = Guest::new(QUEUE);
    let mut sends = Guest::new(QUEUE);
    for bytes in data.chunks_exact(2).take(usize::from(QUEUE) / 2) {
        let len = u32::from(bytes[0]) * u32::from(bytes[1] % 32 + 1);
        receive.offer(&[Buffer::Writable(len)]);
        let (first, second) = (usize::from(bytes[0] % 40), usize::from(bytes[1]));
        sends.offer(&[
            Buffer::Readable(vec![bytes[0]; first]),
            Buffer::Readable(vec![bytes[1]; second]),
        ]);
    }
    let (ours, host) = socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )
    .expect("sockets");
    for frame in data.chunks(64).take(8) {
        let frame = frame.repeat(usize::from(frame[0] % 32) + 1);
        send(&host, &frame, SendFlags::empty()).ok();
    }
    let tap = Tap::from_queues("fuzz", vec![ours]).expect("a tap");
    let options = NetOptions {
        mac: MacAddr([2, 0, 0, 0, 0, 1]),
        mtu: None,
        send_limits: RateLimits::default(),
        receive_limits: RateLimits::default(),
    };
    let mut device = Net::new(tap, options).expect("a device");
    serve(&mut device, &receive, vec![receive.queue(), sends.queue()]);
}

/// Page frames, ranges reported as free, and statistics, all of arbitrary bytes.
///
/// # Panics
/// If the device has a bug.
pub fn balloon_requests(data: &[u8]) {
    let mut drivers = [0; 4].map(|_| Guest::new(QUEUE));
    for (index, bytes) in data.chunks(24).enumerate().take(usize::from(QUEUE)) {
        let buffer = match index % 4 {
            3 => Buffer::Writable(u32::from(bytes[0]) * 64),
            _ => Buffer::Readable(bytes.to_vec()),
        };
        drivers[index % 4].offer(&[buffer]);
    }
    let mut device = Balloon::new().expect("a device");
    let queues = drivers.iter().map(|driver| driver.queue()).collect();
    serve(&mut device, &drivers[0], queues);
}

/// Requests to plug, unplug and query memory, eight bytes each.
///
/// # Panics
/// If the device has a bug.
pub fn mem_requests(data: &[u8]) {
    const START: u64 = REGION.0;
    let mut driver = Guest::with(Layout::Hotplug, QUEUE);
    for bytes in data.chunks_exact(8).take(usize::from(QUEUE) / 2) {
        let block = u64::from(bytes[1]) % 40;
        let address = START + (block << 21) + u64::from(bytes[2] % 16 / 15) * 4096;
        let mut request = u16::from(bytes[0] % 5).to_le_bytes().to_vec();
        request.extend([0; 6]);
        request.extend(
            address
                .wrapping_sub(u64::from(bytes[3] % 16 / 15) << 33)
                .to_le_bytes(),
        );
        request.extend(u16::from_le_bytes([bytes[4] % 40, bytes[5] / 255]).to_le_bytes());
        request.extend([0; 6]);
        request.truncate(24 - usize::from(bytes[6] / 250));
        driver.offer(&[
            Buffer::Readable(request),
            Buffer::Writable(10 - u32::from(bytes[7] / 250)),
        ]);
    }
    let mut device = Mem::new(START, REGION.1, 128 << 20).expect("a device");
    let handle = device.handle();
    handle.set_requested(u64::from(data.first().copied().unwrap_or(255)) << 20);
    serve(&mut device, &driver, vec![driver.queue()]);
    assert!(handle.plugged() <= handle.requested());
}

/// Buffers for random bytes, two bytes each.
///
/// # Panics
/// If the device has a bug.
pub fn entropy_requests(data: &[u8]) {
    let mut driver = Guest::new(QUEUE);
    for bytes in data.chunks_exact(2).take(usize::from(QUEUE) / 2) {
        driver.offer(&[
            Buffer::Readable(vec![0; usize::from(bytes[0] % 4)]),
            // Few are long: to make random bytes takes the host a while.
            Buffer::Writable(u32::from(bytes[1]) * if bytes[0] < 240 { 1 } else { 64 }),
        ]);
    }
    serve(&mut Rng::default(), &driver, vec![driver.queue()]);
}

/// Contents of the directory shared in [`fs_requests`].
static SHARE: Contents = Contents {
    name: "requests",
    changing: &["share"],
    set_up: |dir| std::fs::write(dir.join("outside"), OUTSIDE),
    fill: |dir| {
        let share = dir.join("share");
        std::fs::create_dir(share.join("dir"))?;
        std::fs::write(share.join("file"), "text")?;
        std::os::unix::fs::symlink("/etc", share.join("link"))
    },
};

const OUTSIDE: &[u8] = b"not the guest's";

/// FUSE requests, 24 bytes each: opcode, node, and the body. The share is a directory of this process.
///
/// # Panics
/// If the device has a bug, or the host cannot create a directory.
pub fn fs_requests(data: &[u8]) {
    const NAMES: [&[u8]; 6] = [b"file\0", b"dir\0", b"link\0", b"..\0", b"a/b\0", b"\0"];
    keep_descriptors();
    let dir = Directory::take(&SHARE);
    let mut driver = Guest::new(QUEUE);
    // The guest knows the share, the file and the directory.
    let mut requests: Vec<Vec<u8>> = vec![
        fuse(1, 1, 0, b"share\0"),
        fuse(1, 2, 0, b"file\0"),
        fuse(1, 2, 0, b"dir\0"),
    ];
    for bytes in data.chunks_exact(24).take(usize::from(QUEUE) / 2 - 4) {
        let mut body = bytes[2..].to_vec();
        // Small numbers are valid handles and sizes.
        for byte in body.iter_mut().skip(1).filter(|byte| **byte > 8) {
            *byte = if *byte % 3 == 0 { *byte } else { 0 };
        }
        body.truncate(usize::from(bytes[1] % 5) * 8);
        for pick in [bytes[3], bytes[4]] {
            body.extend_from_slice(NAMES[usize::from(pick) % NAMES.len()]);
        }
        requests.push(fuse(
            match u32::from(bytes[0] % 54) {
                // FUSE's own opcodes end at 52.
                53 => op::HOST_WATCH,
                opcode => opcode,
            },
            u64::from(bytes[1] % 6),
            0,
            &body,
        ));
    }
    for request in requests {
        driver.offer(&[Buffer::Readable(request), Buffer::Writable(4096)]);
    }
    let shares = Shares::default();
    shares
        .add("share", dir.at("share"), false)
        .expect("a share");
    let files = Passthrough::new(shares, Options::default()).expect("a server");
    // Keeps watches enabled.
    let _events = files.host_events();
    let server = Server::new(files);
    // On this thread; those of the device are part of `life_files`.
    let mut queue = driver.queue();
    while let Some(chain) = queue.pop().expect("a ring") {
        let len = server.serve(&chain, driver.memory()).unwrap_or(0);
        queue.complete(chain.head(), len).expect("a ring");
    }
    server.clear();
    let text = std::fs::read(dir.at("outside")).expect("the file outside");
    assert_eq!(text, OUTSIDE);
}

/// A FUSE request of this user, whose group has the same number: `struct fuse_in_header` and a body.
pub(crate) fn fuse(opcode: u32, node: u64, user: u32, body: &[u8]) -> Vec<u8> {
    let mut request = (40 + body.len() as u32).to_le_bytes().to_vec();
    request.extend(opcode.to_le_bytes());
    request.extend(7u64.to_le_bytes());
    request.extend(node.to_le_bytes());
    request.extend(user.to_le_bytes());
    request.extend(user.to_le_bytes());
    request.extend([0; 8]);
    request.extend_from_slice(body);
    request
}

/// Packets of the guest, twelve bytes each, to a port with a listener and to others.
///
/// # Panics
/// If the device has a bug, or the host is out of descriptors.
pub fn vsock_packets(data: &[u8]) {
    let ports = Ports::new().expect("a descriptor");
    let listener = ports.listen(1).expect("a port");
    let (mut sends, mut receive) = (Guest::new(QUEUE), Guest::new(QUEUE));
    let events = Guest::new(QUEUE);
    for bytes in data.chunks_exact(12).take(usize::from(QUEUE) / 2) {
        let payload = vec![bytes[10]; usize::from(bytes[11])];
        let len = match bytes[9] {
            255 => u32::MAX,
            _ => payload.len() as u32,
        };
        let ports = (u32::from(bytes[0] % 3), u32::from(bytes[1] % 3));
        let (op, flags) = (u16::from(bytes[3] % 9), u32::from(bytes[4] % 4));
        let credit = (u32::from(bytes[5]) << 8, bytes[6].into());
        let mut packet = vsock_header(ports, op, flags, len, credit);
        // The type: only 1 is defined.
        packet[28] = 1 + bytes[2] / 250;
        sends.offer(&[Buffer::Readable(packet), Buffer::Readable(payload)]);
    }
    for _ in 0..QUEUE / 4 {
        receive.offer(&[Buffer::Writable(4096)]);
    }
    let mut device = Vsock::new(GUEST_CID, ports);
    let queues = vec![receive.queue(), sends.queue(), events.queue()];
    serve(&mut device, &sends, queues);
    drop(listener);
}

/// Accesses to a register window, four bytes each: reads, and writes of small numbers; then the resulting state is saved,
/// restored and resumed.
///
/// # Panics
/// If the transport has a bug.
pub fn transport_registers(data: &[u8]) {
    let mut guest = Lease::new(Layout::Plain);
    // Queues may be anywhere.
    guest.discard();
    let memory = guest.clone();
    let transport = || {
        let events = Arc::new(IdleLoop::default());
        MmioTransport::new(Box::new(Rng::default()), memory.clone(), events).expect("a window")
    };
    let mut window = transport();
    for bytes in data.chunks_exact(4) {
        let offset = u64::from(bytes[0]) * 2;
        let value = match bytes[1] % 4 {
            0 => u32::from(bytes[2]),
            1 => u32::from(bytes[2]) << 12,
            2 => [1, 3, 11, 15, 0, 128][usize::from(bytes[2] % 6)],
            _ => u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
        };
        match bytes[3] % 8 {
            0 => window.read(offset, &mut [0; 4]),
            1 => window.read(offset, &mut vec![0; usize::from(bytes[2] % 9)]),
            _ => window.write(offset, &value.to_le_bytes()),
        }
    }
    let state = window.save().expect("entropy can be saved");
    let mut other = transport();
    if other.restore(&state).is_ok() {
        other.resume().ok();
    }
}
