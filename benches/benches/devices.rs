//! Requests through a queue to a device and back, without a guest: a mock driver, the real device with its threads or on an
//! event loop, and a real file, socket or share behind it. Each figure is the latency of a single request for a guest,
//! without exits and interrupts.
#![allow(missing_docs)] // criterion's macros make public items.

use criterion::{Criterion, criterion_group, criterion_main};
use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
use koya_devices::blk::{Block, Disk, DiskOptions};
use koya_devices::fs::passthrough::Options;
use koya_devices::fs::wire::{
    EntryOut, InHeader, InitIn, MAJOR, MINOR, OpenIn, OpenOut, OutHeader, ROOT_ID, ReadIn, op,
};
use koya_devices::fs::{Fs, Shares};
use koya_devices::net::{MacAddr, Net, NetOptions, Tap};
use koya_devices::rng::Rng;
use koya_devices::test_utils::{Buffer, Driver};
use koya_devices::virtio::{Activation, VirtioDevice, Worker};
use koya_devices::vsock::packet::{Header, Op, TYPE_STREAM};
use koya_devices::vsock::{HOST_CID, Ports, Vsock};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send};
use std::fs;
use std::io::Read;
use std::path::PathBuf;
use zerocopy::{FromBytes, IntoBytes};

type Loop = EventManager<Box<dyn MutEventSubscriber + Send>>;

const PAGE: u32 = 4096;
const QUEUE: u16 = 256;
/// Address and ports of the guest in the vsock benches.
const CID: u64 = 3;
const GUEST_PORT: u32 = 77;
const HOST_PORT: u32 = 1000;

/// Starts a device on these queues; a device without its own threads runs on an event loop.
fn activate(device: &mut dyn VirtioDevice, drivers: &[&Driver], features: u64) -> Loop {
    device.read_config(0, &mut [0; 8]);
    let worker = device.activate(Activation {
        memory: drivers[0].memory().clone(),
        interrupt: drivers[0].recorder().clone(),
        queues: drivers.iter().map(|driver| Some(driver.queue())).collect(),
        features,
    });
    let mut manager = Loop::new().expect("an event loop");
    if let Worker::EventLoop(worker) = worker.expect("a device that starts") {
        manager.add_subscriber(worker);
    }
    manager
}

/// Waits for a used chain; returns its head and the number of bytes written.
fn used(driver: &mut Driver) -> (u16, u32) {
    loop {
        if let Some(one) = driver.used().pop() {
            return one;
        }
        std::hint::spin_loop();
    }
}

/// A directory that is removed with the bench.
struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> Self {
        let name = format!("koya-bench-{name}-{}", std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::create_dir_all(&path).expect("a directory");
        Self(path)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).ok();
    }
}

fn disk(c: &mut Criterion) {
    const READ: u32 = 0;
    const WRITE: u32 = 1;
    let directory = Directory::new("disk");
    let path = directory.0.join("image");
    fs::write(&path, vec![0; 1 << 20]).expect("an image");
    let disk = Disk::open(&path, DiskOptions::default()).expect("a disk");
    let mut device = Block::new(disk, 1).expect("a device");
    let mut driver = Driver::new(QUEUE);
    let features = device.features();
    activate(&mut device, &[&driver], features);
    let header = |kind: u32| [kind.to_le_bytes().as_slice(), &[0; 12]].concat();
    let mut ask = |buffers: &[Buffer]| {
        driver.offer(buffers);
        driver.kick();
        used(&mut driver);
        driver.recycle();
    };
    let mut group = c.benchmark_group("disk, page cache");
    let read = [
        Buffer::Readable(header(READ)),
        Buffer::Writable(PAGE),
        Buffer::Writable(1),
    ];
    group.bench_function("read 4 KiB", |b| b.iter(|| ask(&read)));
    let data = vec![7; PAGE as usize];
    let write = [
        Buffer::Readable(header(WRITE)),
        Buffer::Readable(data),
        Buffer::Writable(1),
    ];
    group.bench_function("write 4 KiB", |b| b.iter(|| ask(&write)));
    group.finish();
    device.reset(None);
}

/// A FUSE request and its reply.
struct Fuse {
    driver: Driver,
}

impl Fuse {
    fn ask(&mut self, opcode: u32, nodeid: u64, body: &[u8], room: u32) -> Vec<u8> {
        let header = InHeader {
            len: (size_of::<InHeader>() + body.len()) as u32,
            opcode,
            unique: 1,
            nodeid,
            ..InHeader::default()
        };
        let room = room + size_of::<OutHeader>() as u32;
        let head = self.driver.offer(&[
            Buffer::Readable([header.as_bytes(), body].concat()),
            Buffer::Writable(room),
        ]);
        self.driver.kick();
        let (_, len) = used(&mut self.driver);
        let mut answer = self.driver.written(head, len as usize);
        self.driver.recycle();
        let (out, _) = OutHeader::read_from_prefix(&answer).expect("a header");
        assert_eq!(out.error, 0, "request {opcode}");
        answer.split_off(size_of::<OutHeader>())
    }

    fn lookup(&mut self, parent: u64, name: &[u8]) -> u64 {
        let answer = self.ask(op::LOOKUP, parent, name, size_of::<EntryOut>() as u32);
        let entry = EntryOut::read_from_prefix(&answer).expect("an entry");
        entry.0.nodeid
    }
}

fn files(c: &mut Criterion) {
    let directory = Directory::new("files");
    fs::write(directory.0.join("file"), vec![7; PAGE as usize]).expect("a file");
    let shares = Shares::default();
    shares.add("s", &directory.0, false).expect("a share");
    let mut device = Fs::new("koya", shares, Options::default(), 1).expect("a device");
    let mut fuse = Fuse {
        driver: Driver::new(QUEUE),
    };
    let urgent = Driver::new(QUEUE);
    activate(&mut device, &[&urgent, &fuse.driver], 0);
    let init = InitIn {
        major: MAJOR,
        minor: MINOR,
        max_readahead: 1 << 20,
        ..InitIn::default()
    };
    fuse.ask(op::INIT, 0, init.as_bytes(), 64);
    let root = fuse.lookup(ROOT_ID, b"s\0");
    let file = fuse.lookup(root, b"file\0");
    let open = OpenIn::default();
    let opened = fuse.ask(op::OPEN, file, open.as_bytes(), 16);
    let opened = OpenOut::read_from_prefix(&opened).expect("an answer").0;
    let read = ReadIn {
        fh: opened.fh,
        size: PAGE,
        ..ReadIn::default()
    };
    let mut group = c.benchmark_group("files");
    group.bench_function("look a name up", |b| {
        b.iter(|| fuse.lookup(root, b"file\0"))
    });
    group.bench_function("read 4 KiB", |b| {
        b.iter(|| fuse.ask(op::READ, file, read.as_bytes(), PAGE));
    });
    group.finish();
    device.reset(None);
}

fn network(c: &mut Criterion) {
    /// virtio-net's header.
    const HEADER: usize = 12;
    let kind = SocketType::SEQPACKET;
    let pair = rustix::net::socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None);
    let (ours, host) = pair.expect("a pair of sockets");
    let tap = Tap::from_queues("bench", vec![ours]).expect("a tap");
    let options = NetOptions {
        mac: MacAddr([2, 0, 0, 1, 2, 3]),
        mtu: None,
        send_limits: Default::default(),
        receive_limits: Default::default(),
    };
    let mut device = Net::new(tap, options).expect("a device");
    let (mut receive, mut transmit) = (Driver::new(QUEUE), Driver::new(QUEUE));
    activate(&mut device, &[&receive, &transmit], 0);
    let frame = vec![0; HEADER + 1514];
    let mut room = vec![0; 4096];
    let mut group = c.benchmark_group("network");
    group.bench_function("a frame to the host", |b| {
        b.iter(|| {
            transmit.offer(&[Buffer::Readable(frame.clone())]);
            transmit.kick();
            recv(&host, room.as_mut_slice(), RecvFlags::empty()).expect("a frame");
            used(&mut transmit);
            transmit.recycle();
        });
    });
    group.bench_function("a frame to the guest", |b| {
        b.iter(|| {
            receive.offer(&[Buffer::Writable(2048)]);
            receive.kick();
            send(&host, &frame, SendFlags::empty()).expect("a socket");
            used(&mut receive);
            receive.recycle();
        });
    });
    group.finish();
    device.reset(None);
}

fn entropy(c: &mut Criterion) {
    let mut device = Rng::default();
    let mut driver = Driver::new(QUEUE);
    let mut manager = activate(&mut device, &[&driver], 0);
    c.bench_function("entropy: 64 bytes", |b| {
        b.iter(|| {
            driver.offer(&[Buffer::Writable(64)]);
            driver.kick();
            manager.run_with_timeout(0).expect("a turn");
            used(&mut driver);
            driver.recycle();
        });
    });
}

fn vsock(c: &mut Criterion) {
    let ports = Ports::new().expect("ports");
    let listener = ports.listen(HOST_PORT).expect("a free port");
    let mut device = Vsock::new(CID, ports);
    let (mut rx, mut tx) = (Driver::new(QUEUE), Driver::new(QUEUE));
    let mut manager = activate(&mut device, &[&rx, &tx, &Driver::new(QUEUE)], 0);
    for _ in 0..QUEUE / 2 {
        rx.offer(&[Buffer::Writable(PAGE)]);
    }
    let packet = |kind: Op, data: &[u8]| {
        let header = Header {
            src_cid: CID.into(),
            dst_cid: HOST_CID.into(),
            src_port: GUEST_PORT.into(),
            dst_port: HOST_PORT.into(),
            len: (data.len() as u32).into(),
            kind: TYPE_STREAM.into(),
            op: (kind as u16).into(),
            buf_alloc: (1 << 20).into(),
            ..Header::default()
        };
        [header.as_bytes(), data].concat()
    };
    let mut turn = |bytes: Vec<u8>| {
        tx.offer(&[Buffer::Readable(bytes)]);
        // The credit updates from the device allow more data.
        for _ in rx.used() {
            rx.offer(&[Buffer::Writable(PAGE)]);
        }
        tx.kick();
        rx.kick();
        while tx.used().is_empty() {
            manager.run_with_timeout(0).expect("a turn");
        }
        tx.recycle();
        rx.recycle();
    };
    turn(packet(Op::Request, &[]));
    let mut host = listener.accept().expect("a connection");
    let data = packet(Op::ReadWrite, &[7; PAGE as usize]);
    let mut room = vec![0; PAGE as usize];
    c.bench_function("vsock: 4 KiB to the host", |b| {
        b.iter(|| {
            turn(data.clone());
            host.read_exact(&mut room).expect("what was sent");
        });
    });
}

criterion_group!(benches, disk, files, network, entropy, vsock);
criterion_main!(benches);
