//! Devices of every kind, with their resources on the host.

use koya_devices::balloon::{Balloon, BalloonHandle};
use koya_devices::blk::{Block, Disk, DiskOptions, IoEngine};
use koya_devices::fs::passthrough::Options;
use koya_devices::fs::{Cache, Fs, Shares};
use koya_devices::mem::{Mem, MemHandle};
use koya_devices::net::{MacAddr, Net, NetOptions, Tap};
use koya_devices::rate_limit::{Rate, RateLimits};
use koya_devices::rng::Rng;
use koya_devices::virtio::VirtioDevice;
use koya_devices::vsock::{Listener, Ports, Vsock};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

pub(crate) const DISK_BYTES: u64 = 64 << 10;
pub(crate) const MEM_START: u64 = 1 << 32;
pub(crate) const MEM_SIZE: u64 = 64 << 20;

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
    Disk(File),
    Net(Vec<OwnedFd>),
    Files(tempfile::TempDir),
    Mem(MemHandle),
    Balloon(BalloonHandle),
    Streams(Ports, Listener, Vec<UnixStream>),
    None,
}

/// Configuration of a device, also used after a restore.
#[derive(Clone, Copy)]
pub(crate) struct Choices {
    pub(crate) kind: Kind,
    pub(crate) options: u8,
    pub(crate) queues: u16,
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

/// Creates a device on these resources, or on new ones.
pub(crate) fn device(choices: Choices, host: Option<Host>) -> (Box<dyn VirtioDevice>, Host) {
    let option = |bit: u8| choices.options >> bit & 1 != 0;
    match choices.kind {
        Kind::Block => {
            let file = match host {
                Some(Host::Disk(file)) => file,
                _ => {
                    let disk = memfd_create("disk", MemfdFlags::CLOEXEC).expect("memory");
                    ftruncate(&disk, DISK_BYTES).expect("memory");
                    File::from(disk)
                }
            };
            let options = DiskOptions {
                read_only: option(0),
                raw: true,
                ..DiskOptions::default()
            };
            let copy = file.try_clone().expect("a descriptor");
            let disk = Disk::from_file(copy, options).expect("a disk");
            let engine = match option(1) {
                true => IoEngine::Auto,
                false => IoEngine::Calls,
            };
            let block = Block::new(disk, choices.queues).expect("a device");
            let limits = limits(choices.options >> 4 & choices.options >> 2);
            let device = block.with_engine(engine).with_limits(limits);
            (Box::new(device), Host::Disk(file))
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
            (Box::new(device), Host::Net(theirs))
        }
        Kind::Files => {
            let dir = match host {
                Some(Host::Files(dir)) => dir,
                _ => {
                    let dir = tempfile::tempdir().expect("a directory");
                    std::fs::create_dir(dir.path().join("dir")).expect("a directory");
                    std::fs::write(dir.path().join("file"), "text").expect("a file");
                    dir
                }
            };
            let shares = Shares::default();
            shares.add("share", dir.path(), option(0)).expect("a share");
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
            let device = Mem::new(MEM_START, MEM_SIZE, 4 << 20).expect("a device");
            let handle = device.handle();
            (Box::new(device), Host::Mem(handle))
        }
        Kind::Entropy => (Box::new(Rng::default()), Host::None),
        Kind::Vsock => {
            let ports = Ports::new().expect("a descriptor");
            let listener = ports.listen(1).expect("a port");
            let device = Vsock::new(3, ports.clone());
            (Box::new(device), Host::Streams(ports, listener, Vec::new()))
        }
    }
}
