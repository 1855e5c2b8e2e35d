//! Every operation on a thread with the filter of `koya-fs`: a system call that the filter lacks would end this process.

use super::tests::request;
use super::*;
use crate::fs::passthrough::Options;
use crate::fs::shares::Shares;
use crate::test_utils::{Buffer, Driver};
use koya_host::sys::unshare_fs_state;
use koya_host::threads::{self, Role};
use koya_host::walls::landlock::Place;
use koya_host::walls::{Filter, confine_new_threads_to};
use rustix::fs::OFlags;
use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};

/// A server on a confined thread, and the operations that it was asked for.
struct Confined {
    requests: Sender<(Chain, Arc<Memory>)>,
    replies: Receiver<Result<u32, ChainError>>,
    asked: BTreeSet<u32>,
}

impl Confined {
    fn start(server: Server, places: Option<&[Place]>) -> Self {
        let (requests, to_serve) = channel::<(Chain, Arc<Memory>)>();
        let (answer, replies) = channel();
        let serve = move || {
            unshare_fs_state().unwrap();
            for (chain, memory) in to_serve {
                if answer.send(server.serve(&chain, &memory)).is_err() {
                    return;
                }
            }
        };
        let role = Role::new("koya-fs").confined_by(Filter::Files);
        let _confinement = confine_new_threads_to(true, places).unwrap();
        threads::spawn(role, serve).unwrap();
        Self {
            requests,
            replies,
            asked: BTreeSet::new(),
        }
    }

    /// The error number and the body of a reply.
    fn try_ask(&mut self, opcode: u32, nodeid: u64, body: &[&[u8]]) -> (i32, Vec<u8>) {
        self.asked.insert(opcode);
        let mut driver = Driver::new(8);
        let request = request(opcode, nodeid, body);
        let head = driver.offer(&[Buffer::Readable(request), Buffer::Writable(8192)]);
        let chain = driver.queue().pop().unwrap().unwrap();
        self.requests
            .send((chain, driver.memory().clone()))
            .unwrap();
        let len = self.replies.recv().unwrap().unwrap();
        let reply = driver.written(head, len as usize);
        match OutHeader::read_from_prefix(&reply) {
            Ok((out, body)) => (-out.error, body.to_vec()),
            // FORGET and others have none.
            Err(_) => (0, Vec::new()),
        }
    }

    fn ask(&mut self, opcode: u32, nodeid: u64, body: &[&[u8]]) -> Vec<u8> {
        let (error, reply) = self.try_ask(opcode, nodeid, body);
        assert_eq!(error, 0, "operation {opcode}");
        reply
    }

    fn ask_for<T: FromBytes>(&mut self, opcode: u32, nodeid: u64, body: &[&[u8]]) -> T {
        let reply = self.ask(opcode, nodeid, body);
        match T::read_from_prefix(&reply) {
            Ok((value, _)) => value,
            Err(_) => panic!("operation {opcode}: a reply of {} bytes", reply.len()),
        }
    }

    /// An operation that not every file system of the host supports.
    fn ask_if_supported(&mut self, opcode: u32, nodeid: u64, body: &[&[u8]]) {
        let (error, _) = self.try_ask(opcode, nodeid, body);
        let unsupported = [0, libc::EOPNOTSUPP, libc::EINVAL, libc::EPERM, libc::ENOTTY];
        assert!(unsupported.contains(&error), "operation {opcode}: {error}");
    }

    fn lookup(&mut self, parent: u64, name: &[u8]) -> u64 {
        let entry: wire::EntryOut = self.ask_for(op::LOOKUP, parent, &[name]);
        entry.nodeid
    }

    /// Creates a file and returns its node and handle.
    fn create(&mut self, parent: u64, name: &[u8]) -> (u64, u64) {
        let arg = wire::CreateIn {
            flags: OFlags::RDWR.bits(),
            mode: 0o100_644,
            umask: 0o022,
            open_flags: 0,
        };
        let reply = self.ask(op::CREATE, parent, &[arg.as_bytes(), name]);
        let (entry, rest) = wire::EntryOut::read_from_prefix(&reply).unwrap();
        let (open, _) = wire::OpenOut::read_from_prefix(rest).unwrap();
        (entry.nodeid, open.fh)
    }

    fn release(&mut self, opcode: u32, node: u64, fh: u64) {
        let arg = wire::ReleaseIn {
            fh,
            ..Default::default()
        };
        self.ask(opcode, node, &[arg.as_bytes()]);
    }

    fn data(&mut self, dir: u64) {
        let (a, fh) = self.create(dir, b"a\0");
        let write = wire::WriteIn {
            fh,
            size: 4,
            write_flags: wire::WRITE_KILL_SUIDGID,
            ..Default::default()
        };
        let written: wire::WriteOut = self.ask_for(op::WRITE, a, &[write.as_bytes(), b"text"]);
        assert_eq!(written.size, 4);
        let read = wire::ReadIn {
            fh,
            size: 100,
            ..Default::default()
        };
        assert_eq!(self.ask(op::READ, a, &[read.as_bytes()]), b"text");
        for whence in [3, 4] {
            let seek = wire::LseekIn {
                fh,
                whence,
                ..Default::default()
            };
            self.ask(op::LSEEK, a, &[seek.as_bytes()]);
        }
        let allocate = |mode| wire::FallocateIn {
            fh,
            length: 65_536,
            mode,
            ..Default::default()
        };
        self.ask(op::FALLOCATE, a, &[allocate(0).as_bytes()]);
        let punch = allocate((libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE) as u32);
        self.ask_if_supported(op::FALLOCATE, a, &[punch.as_bytes()]);
        let (b, to) = self.create(dir, b"b\0");
        let copy = wire::CopyFileRangeIn {
            fh_in: fh,
            nodeid_out: b,
            fh_out: to,
            len: 4,
            ..Default::default()
        };
        self.ask_if_supported(op::COPY_FILE_RANGE, a, &[copy.as_bytes()]);
        let flags = wire::IoctlIn {
            fh,
            cmd: wire::FS_IOC_GETFLAGS,
            out_size: 4,
            ..Default::default()
        };
        // A tmpfs of an older kernel has none.
        self.ask_if_supported(op::IOCTL, a, &[flags.as_bytes()]);
        for fsync_flags in [0, wire::FSYNC_FDATASYNC] {
            let sync = wire::FsyncIn {
                fh,
                fsync_flags,
                padding: 0,
            };
            self.ask(op::FSYNC, a, &[sync.as_bytes()]);
        }
        let flush = wire::FlushIn {
            fh,
            ..Default::default()
        };
        self.ask(op::FLUSH, a, &[flush.as_bytes()]);
        let cut = wire::SetattrIn {
            valid: wire::setattr::SIZE | wire::setattr::FH,
            fh,
            ..Default::default()
        };
        self.ask(op::SETATTR, a, &[cut.as_bytes()]);
        self.release(op::RELEASE, a, fh);
        self.release(op::RELEASE, b, to);
        let open = wire::OpenIn {
            flags: (OFlags::WRONLY | OFlags::TRUNC).bits(),
            open_flags: wire::OPEN_KILL_SUIDGID,
        };
        let opened: wire::OpenOut = self.ask_for(op::OPEN, a, &[open.as_bytes()]);
        self.release(op::RELEASE, a, opened.fh);
        let unnamed = wire::CreateIn {
            flags: OFlags::RDWR.bits(),
            mode: 0o100_600,
            ..Default::default()
        };
        self.ask_if_supported(op::TMPFILE, dir, &[unnamed.as_bytes()]);
    }

    fn attributes(&mut self, dir: u64) {
        use wire::setattr;
        let a = self.lookup(dir, b"a\0");
        for valid in [
            setattr::MODE,
            setattr::UID | setattr::GID,
            setattr::SIZE,
            setattr::ATIME | setattr::MTIME,
            setattr::ATIME | setattr::MTIME | setattr::ATIME_NOW | setattr::MTIME_NOW,
        ] {
            let set = wire::SetattrIn {
                valid,
                mode: 0o2750,
                ..Default::default()
            };
            let out: wire::AttrOut = self.ask_for(op::SETATTR, a, &[set.as_bytes()]);
            assert_eq!(out.attr.size, 0);
        }
        self.ask(op::GETATTR, a, &[wire::GetattrIn::default().as_bytes()]);
        self.ask(op::STATX, a, &[wire::StatxIn::default().as_bytes()]);
        self.ask(op::STATFS, a, &[]);
        let set = wire::SetxattrIn { size: 1, flags: 0 };
        let more = wire::SetxattrExtIn {
            setxattr_flags: wire::SETXATTR_ACL_KILL_SGID,
            padding: 0,
        };
        for name in [&b"user.a\0"[..], b"trusted.b\0"] {
            let body = [set.as_bytes(), more.as_bytes(), name, b"1"];
            self.ask(op::SETXATTR, a, &body);
            for size in [0, 100] {
                let get = wire::GetxattrIn { size, padding: 0 };
                self.ask(op::GETXATTR, a, &[get.as_bytes(), name]);
                self.ask(op::LISTXATTR, a, &[get.as_bytes()]);
            }
            self.ask(op::REMOVEXATTR, a, &[name]);
        }
    }

    fn names(&mut self, dir: u64) {
        self.ask(op::SYMLINK, dir, &[b"link\0", b"target\0"]);
        let link = self.lookup(dir, b"link\0");
        assert_eq!(self.ask(op::READLINK, link, &[]), b"target");
        let a = self.lookup(dir, b"a\0");
        let arg = wire::LinkIn { oldnodeid: a };
        self.ask(op::LINK, dir, &[arg.as_bytes(), b"hard\0"]);
        for (kind, name) in [
            (libc::S_IFIFO, b"fifo\0"),
            (libc::S_IFSOCK, b"sock\0"),
            (libc::S_IFREG, b"file\0"),
        ] {
            let arg = wire::MknodIn {
                mode: kind | 0o600,
                ..Default::default()
            };
            self.ask(op::MKNOD, dir, &[arg.as_bytes(), name]);
            self.ask(op::UNLINK, dir, &[name]);
        }
        // The null device, for which a process needs CAP_MKNOD, or an attribute stands for it.
        let arg = wire::MknodIn {
            mode: libc::S_IFCHR | 0o600,
            rdev: wire::encode_device(1, 3),
            ..Default::default()
        };
        self.ask_if_supported(op::MKNOD, dir, &[arg.as_bytes(), b"null\0"]);
        let arg = wire::RenameIn { newdir: dir };
        self.ask(op::RENAME, dir, &[arg.as_bytes(), b"hard\0", b"moved\0"]);
        let rename = |flags| wire::Rename2In {
            newdir: dir,
            flags,
            padding: 0,
        };
        let (keep, exchange, whiteout) = (rename(1), rename(2), rename(4));
        let body = [keep.as_bytes(), b"moved\0", b"again\0"];
        self.ask(op::RENAME2, dir, &body);
        let body = [exchange.as_bytes(), b"again\0", b"link\0"];
        self.ask_if_supported(op::RENAME2, dir, &body);
        let body = [whiteout.as_bytes(), b"b\0", b"c\0"];
        self.ask_if_supported(op::RENAME2, dir, &body);
    }

    fn directories(&mut self, dir: u64) {
        let arg = wire::MkdirIn {
            mode: 0o755,
            umask: 0,
        };
        let made: wire::EntryOut = self.ask_for(op::MKDIR, dir, &[arg.as_bytes(), b"d\0"]);
        let arg = wire::OpenIn::default();
        let opened: wire::OpenOut = self.ask_for(op::OPENDIR, dir, &[arg.as_bytes()]);
        let fh = opened.fh;
        for opcode in [op::READDIR, op::READDIRPLUS] {
            let read = wire::ReadIn {
                fh,
                size: 4096,
                ..Default::default()
            };
            assert!(!self.ask(opcode, dir, &[read.as_bytes()]).is_empty());
        }
        let sync = wire::FsyncIn {
            fh,
            ..Default::default()
        };
        self.ask(op::FSYNCDIR, dir, &[sync.as_bytes()]);
        self.release(op::RELEASEDIR, dir, fh);
        for node in [wire::ROOT_ID, dir] {
            self.ask(op::SYNCFS, node, &[&[0; 8]]);
        }
        let watch = wire::HostWatchIn {
            seq: 1,
            mask: 0xfff,
            padding: 0,
        };
        self.ask(op::HOST_WATCH, dir, &[watch.as_bytes()]);
        for nlookup in [wire::HOST_UNWATCH | 2, 0] {
            let forget = wire::ForgetIn { nlookup };
            self.ask(op::FORGET, dir, &[forget.as_bytes()]);
        }
        self.ask(op::RMDIR, dir, &[b"d\0"]);
        let (count, one) = (
            wire::BatchForgetIn { count: 1, dummy: 0 },
            wire::ForgetOne {
                nodeid: made.nodeid,
                nlookup: 1,
            },
        );
        self.ask(op::BATCH_FORGET, 0, &[count.as_bytes(), one.as_bytes()]);
        self.ask(op::INTERRUPT, 0, &[&[0; 8]]);
    }
}

/// The names and numbers of the operations.
fn operations() -> Vec<(&'static str, u32)> {
    let text = include_str!("../wire.rs");
    let (_, text) = text.split_once("pub mod op {").unwrap();
    let (text, _) = text.split_once("\n}").unwrap();
    let lines = text.lines().map(|line| line.trim().trim_end_matches(';'));
    let constants = lines.filter_map(|line| line.strip_prefix("pub const "));
    constants
        .map(|line| {
            let (name, value) = line.split_once(": u32 = ").unwrap();
            (name, value.parse().unwrap())
        })
        .collect()
}

/// A new operation has to be added here, so that its system calls are known to pass the filter.
#[test]
fn every_operation_passes_the_filter() {
    every_operation(|_| None);
}

/// In a process without privileges, such a thread may open only what is in the share.
#[test]
fn every_operation_is_permitted_by_landlock() {
    let without_privileges = || {
        let none = CapabilitySet::empty();
        let none = CapabilitySets {
            effective: none,
            permitted: none,
            inheritable: none,
        };
        set_capabilities(None, none).unwrap();
        every_operation(|share| {
            Some(vec![Place {
                path: share.to_owned(),
                read_only: false,
            }])
        });
    };
    std::thread::spawn(without_privileges).join().unwrap();
}

/// `places` are those of a share.
fn every_operation(places: impl FnOnce(&Path) -> Option<Vec<Place>>) {
    let dir = tempfile::tempdir().unwrap();
    let places = places(dir.path());
    let shares = Shares::within(places.clone());
    shares.add("s", dir.path(), false).unwrap();
    let server = Server::new(Passthrough::new(shares, Options::default()).unwrap());
    let _events = server.files().host_events();
    let mut confined = Confined::start(server, places.as_deref());
    let init = InitIn {
        major: wire::MAJOR,
        flags: u32::MAX,
        flags2: u32::MAX,
        ..InitIn::default()
    };
    confined.ask(op::INIT, 0, &[init.as_bytes()]);
    let share = confined.lookup(wire::ROOT_ID, b"s\0");
    confined.data(share);
    confined.attributes(share);
    confined.names(share);
    confined.directories(share);
    confined.ask(op::DESTROY, 0, &[]);
    let all = operations();
    assert!(all.contains(&("LOOKUP", op::LOOKUP)), "{all:?}");
    let unseen: Vec<_> = all
        .iter()
        .filter(|(_, number)| !confined.asked.contains(number))
        .collect();
    assert!(unseen.is_empty(), "not tried: {unseen:?}");
}
