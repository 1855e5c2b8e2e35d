//! Devices of every kind, with their resources on the host.

use crate::directories::{Contents, Directory};
use crate::pool::REGION;
use crate::user::keep_descriptors;
use koya_devices::balloon::{Balloon, BalloonHandle};
use koya_devices::blk::{Block, BlockHandle, Disk, DiskOptions, IoEngine};
use koya_devices::fs::passthrough::Options;
use koya_devices::fs::{Cache, Fs, Shares};
use koya_devices::mem::{Mem, MemHandle, MemorySlots, SlottedRegion};
use koya_devices::net::{MacAddr, Net, NetHandle, NetOptions, Tap};
use koya_devices::rate_limit::{Rate, RateLimits};
use koya_devices::rng::Rng;
use koya_devices::virtio::{Memory, VirtioDevice};
use koya_devices::vsock::{Listener, Ports, UnixSockets, Vsock};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

pub(crate) const DISK_BYTES: u64 = 64 << 10;
pub(crate) const MEM_START: u64 = REGION.0;

/// The kind of the device.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Kind {
    Block,
    Net,
    Files,
    Balloon,
    Mem,
    Entropy,
    Vsock,
}

/// Resources of a device on the host.
pub(crate) enum Host {
    Disk(File, BlockHandle),
    Net(Vec<OwnedFd>, NetHandle),
    Files(Directory),
    Mem(MemHandle),
    Balloon(BalloonHandle),
    Streams(Streams),
    None,
}

/// The host's side of a vsock device.
pub(crate) struct Streams {
    pub(crate) ports: Ports,
    pub(crate) listener: Listener,
    pub(crate) open: Vec<UnixStream>,
    pub(crate) sockets: Option<Sockets>,
}

/// Unix sockets of the host: the device's threads connect to one, and clients connect to another.
pub(crate) struct Sockets {
    _listening: UnixSockets,
    pub(crate) listener: UnixListener,
    pub(crate) directory: Directory,
}

impl Sockets {
    /// Where clients connect to the guest.
    pub(crate) fn path(&self) -> PathBuf {
        self.directory.at("sockets/vsock")
    }
}

static SOCKETS: Contents = Contents {
    name: "sockets",
    changing: &["sockets"],
    set_up: |_| Ok(()),
    fill: |_| Ok(()),
};

fn sockets(ports: &Ports) -> Sockets {
    let directory = Directory::take(&SOCKETS);
    let path = directory.at("sockets/vsock");
    // Port 2 has a socket by its number, and port 3 one without a listener.
    let listener = UnixListener::bind(directory.at("sockets/vsock_2")).expect("a socket");
    listener.set_nonblocking(true).expect("a socket");
    ports
        .forward(3, directory.at("sockets/none"))
        .expect("a thread");
    Sockets {
        _listening: UnixSockets::listen(ports, path).expect("a thread"),
        listener,
        directory,
    }
}

/// Configuration of a device, also used after a restore.
#[derive(Clone, Copy)]
pub(crate) struct Choices {
    pub(crate) kind: Kind,
    pub(crate) options: u8,
    pub(crate) queues: u16,
}

impl Choices {
    /// Whether a memory device plugs its memory slot by slot.
    pub(crate) fn plugs_slots(self) -> bool {
        self.kind == Kind::Mem && self.options & 1 != 0
    }
}

fn limits(choice: u8) -> RateLimits {
    let rate = |per_second| {
        Some(Rate {
            per_second,
            burst: Some(per_second / 4),
        })
    };
    RateLimits {
        bytes: if choice & 1 != 0 { rate(1 << 20) } else { None },
        operations: if choice & 2 != 0 { rate(5000) } else { None },
    }
}

/// Memory slots that the host refuses now and then.
struct Slots(AtomicU32);

impl Slots {
    fn change(&self) -> io::Result<()> {
        let state = self.0.load(Ordering::Relaxed);
        self.0.store(state.rotate_right(1), Ordering::Relaxed);
        match state & 0x0101_0101 {
            0x0101_0101 => Err(io::ErrorKind::OutOfMemory.into()),
            _ => Ok(()),
        }
    }
}

impl MemorySlots for Slots {
    fn add(&self, _index: usize) -> io::Result<()> {
        self.change()
    }

    fn remove(&self, _index: usize) -> io::Result<()> {
        self.change()
    }
}

/// Contents of a shared directory.
static SHARE: Contents = Contents {
    name: "life",
    changing: &["share"],
    set_up: |_| Ok(()),
    fill: |dir| {
        std::fs::create_dir(dir.join("share/dir"))?;
        std::fs::write(dir.join("share/file"), "text")
    },
};

/// Creates a device on these resources, or on new ones. A memory device with `memory` plugs slot by slot.
pub(crate) fn device(
    choices: Choices,
    memory: Option<&Arc<Memory>>,
    host: Option<Host>,
) -> (Box<dyn VirtioDevice>, Host) {
    let option = |bit: u8| choices.options >> bit & 1 != 0;
    match choices.kind {
        Kind::Block => {
            let file = match host {
                Some(Host::Disk(file, _)) => file,
                _ => {
                    let disk = memfd_create("disk", MemfdFlags::CLOEXEC).expect("memory");
                    ftruncate(&disk, DISK_BYTES).expect("memory");
                    File::from(disk)
                }
            };
            let options = DiskOptions {
                read_only: option(0),
                raw: option(2),
                // Blocks of another size, and misaligned memory is copied.
                direct: choices.options & 0x18 == 0x18,
                serial: if option(3) {
                    "fuzz".into()
                } else {
                    String::new()
                },
            };
            let copy = file.try_clone().expect("a descriptor");
            let disk = Disk::from_file(copy, options).expect("a disk");
            // A ring takes the host longer than the requests.
            let engine = match option(1) && option(6) && option(7) {
                true => IoEngine::Auto,
                false => IoEngine::Calls,
            };
            let block = Block::new(disk, choices.queues).expect("a device");
            let limits = limits(choices.options >> 4 & choices.options >> 2);
            let device = block.with_engine(engine).with_limits(limits);
            let handle = device.handle();
            (Box::new(device), Host::Disk(file, handle))
        }
        Kind::Net => {
            let mut pairs = Vec::new();
            for _ in 0..choices.queues {
                let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
                let pair = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None);
                pairs.push(pair.expect("sockets"));
            }
            let (ours, theirs): (Vec<_>, Vec<_>) = pairs.into_iter().unzip();
            let options = NetOptions {
                mac: MacAddr([2, 0, 0, 0, 0, 1]),
                mtu: option(0).then_some(9000),
                send_limits: limits(choices.options >> 4 & choices.options >> 2),
                receive_limits: limits(choices.options >> 6 & choices.options >> 2),
            };
            let tap = Tap::from_queues("fuzz", ours).expect("a tap");
            let device = Net::new(tap, options).expect("a device");
            let handle = device.handle();
            (Box::new(device), Host::Net(theirs, handle))
        }
        Kind::Files => {
            keep_descriptors();
            let dir = match host {
                Some(Host::Files(dir)) => dir,
                _ => Directory::take(&SHARE),
            };
            let shares = Shares::default();
            shares
                .add("share", dir.at("share"), option(0))
                .expect("a share");
            let options = Options {
                cache: if option(1) {
                    Cache::Writeback
                } else {
                    Cache::Auto
                },
                ..Options::default()
            };
            let queues = u32::from(choices.queues);
            let device = Fs::new("fuzz", shares, options, queues).expect("a device");
            (Box::new(device), Host::Files(dir))
        }
        Kind::Balloon => {
            let device = Balloon::new().expect("a device");
            let handle = device.handle();
            (Box::new(device), Host::Balloon(handle))
        }
        Kind::Mem => {
            let device = match memory {
                Some(memory) => {
                    let region = SlottedRegion {
                        start: MEM_START,
                        size: REGION.1,
                        memory_block: 4 << 20,
                        slot_size: 16 << 20,
                    };
                    let slots = Slots(AtomicU32::new((choices.options >> 1).into()));
                    Mem::with_slots(region, memory, slots)
                }
                None => Mem::new(MEM_START, REGION.1, 4 << 20),
            };
            let device = device.expect("a device");
            let handle = device.handle();
            (Box::new(device), Host::Mem(handle))
        }
        Kind::Entropy => (Box::new(Rng::default()), Host::None),
        Kind::Vsock => {
            let ports = Ports::new().expect("a descriptor");
            let listener = ports.listen(1).expect("a port");
            let device = Vsock::new(3, ports.clone());
            let streams = Streams {
                sockets: (choices.options % 32 == 31).then(|| sockets(&ports)),
                ports,
                listener,
                open: Vec::new(),
            };
            (Box::new(device), Host::Streams(streams))
        }
    }
}
