//! Whole devices behind a driver that asks for anything.
//!
//! What is in a queue when a device is activated is served before it looks whether it is to stop, so
//! activation and reset together serve an input, by the device's own threads.

use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
use koya_devices::balloon::Balloon;
use koya_devices::blk::{Block, Disk, DiskOptions, IoEngine};
use koya_devices::net::{MacAddr, Net, NetOptions, Tap};
use koya_devices::rate_limit::RateLimits;
use koya_devices::test_utils::{Buffer, Driver};
use koya_devices::virtio::{Activation, ActiveQueue, VirtioDevice, Worker};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, send, socketpair};
use std::fs::File;

const QUEUE: u16 = 64;
const DISK_BYTES: u64 = 64 << 10;

/// Gives a device its queues and takes them away.
fn serve(device: &mut dyn VirtioDevice, driver: &Driver, queues: Vec<ActiveQueue>) {
    let activated = device.activate(Activation {
        memory: driver.memory().clone(),
        interrupt: driver.recorder().clone(),
        queues: queues.into_iter().map(Some).collect(),
        features: device.features(),
    });
    let worker = match activated {
        Ok(Worker::EventLoop(worker)) => {
            let mut manager =
                EventManager::<Box<dyn MutEventSubscriber + Send>>::new().expect("epoll");
            let id = manager.add_subscriber(worker);
            manager.run_with_timeout(0).expect("epoll");
            manager.remove_subscriber(id).ok()
        }
        _ => None,
    };
    device.reset(worker);
}

/// Requests to a disk, eight bytes each: kind, sector, sizes of what is readable and writable, and
/// how much of header and status is there.
///
/// # Panics
/// If the device has a bug, or the host no memory.
pub fn block_requests(data: &[u8]) {
    let mut driver = Driver::new(QUEUE);
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
    let disk = Disk::of(file.try_clone().expect("a descriptor"), options).expect("a disk");
    let engine = match data.len() % 16 {
        0 => IoEngine::Auto,
        _ => IoEngine::Calls,
    };
    let mut device = Block::new(disk, 1).expect("a device").with_engine(engine);
    serve(&mut device, &driver, vec![driver.queue()]);
    assert_eq!(file.metadata().expect("a file").len(), DISK_BYTES);
}

/// Buffers for frames both ways, two bytes each, and frames from the host.
///
/// # Panics
/// If the device has a bug, or the host no sockets.
pub fn net_buffers(data: &[u8]) {
    let mut receive = Driver::new(QUEUE);
    let mut sends = Driver::new(QUEUE);
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

/// Page frames, ranges that are said to be free, and statistics, all of them any bytes.
///
/// # Panics
/// If the device has a bug.
pub fn balloon_requests(data: &[u8]) {
    let mut drivers = [0; 4].map(|_| Driver::new(QUEUE));
    for (index, bytes) in data.chunks(24).enumerate().take(usize::from(QUEUE)) {
        let buffer = match index % 4 {
            3 => Buffer::Writable(u32::from(bytes[0]) * 64),
            _ => Buffer::Readable(bytes.to_vec()),
        };
        drivers[index % 4].offer(&[buffer]);
    }
    let mut device = Balloon::new().expect("a device");
    let queues = drivers.iter().map(Driver::queue).collect();
    serve(&mut device, &drivers[0], queues);
}
