//! Shared files over many requests, by a guest that learns from the replies: valid nodes and handles, forgotten ones, few
//! descriptors, a host that changes the same files, shares added and removed meanwhile, and two requests at a time.
//!
//! No request changes anything outside the shares, nor anything shared read-only.

use crate::devices::fuse;
use crate::directories::{Contents, Directory};
use crate::input::Input;
use crate::pool::Guest;
use crate::user::{User, keep_descriptors};
use koya_devices::fs::passthrough::{Options, Passthrough};
use koya_devices::fs::server::Server;
use koya_devices::fs::wire::op;
use koya_devices::fs::{Cache, HostEvents, ShareOptions, Shares};
use koya_devices::test_utils::Buffer;
use koya_devices::virtio::ActiveQueue;
use rustix::fs::{Mode, OFlags, open};
use std::fs;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

const QUEUE: u16 = 16;

/// The contents of a host file that is not shared.
const SECRET: &[u8] = b"not the guest's";

/// Nodes and handles known to the guest.
struct Known {
    nodes: Vec<u64>,
    /// Each with the node that was opened.
    handles: Vec<(u64, u64)>,
}

/// A thread of the guest, with its connection to the server.
struct Asker {
    driver: Guest,
    queue: ActiveQueue,
}

impl Asker {
    fn new() -> Self {
        let driver = Guest::new(QUEUE);
        let queue = driver.queue();
        Self { driver, queue }
    }

    /// Sends a request; returns the body of the reply, if any.
    fn ask(&mut self, server: &Server, buffers: &[Buffer]) -> Option<Vec<u8>> {
        self.driver.recycle();
        let head = self.driver.offer(buffers);
        let chain = self.queue.pop().ok()??;
        let served = server.serve(&chain, self.driver.memory());
        let len = served.unwrap_or(0);
        assert!(len <= chain.writable_len());
        self.queue.complete(chain.head(), len).expect("a ring");
        let reply = self.driver.written(head, len as usize);
        let said = u32::from_le_bytes(reply.get(..4)?.try_into().ok()?);
        assert_eq!(said, len, "the length in the header of a reply");
        let error = i32::from_le_bytes(reply.get(4..8)?.try_into().ok()?);
        assert!((-4095..=0).contains(&error), "{error}");
        assert!(
            !contains(&reply, SECRET),
            "the guest reads what is not shared"
        );
        (error == 0).then(|| reply[16..].to_vec())
    }
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window == part)
}

/// The directories: what is shared read-only and what is not shared must never change, and stays.
static PLAN: Contents = Contents {
    name: "state",
    changing: &["rw", "late"],
    set_up: |dir| {
        fs::create_dir_all(dir.join("ro/dir"))?;
        fs::create_dir_all(dir.join("outside/dir"))?;
        fs::write(dir.join("ro/file"), "read only")?;
        fs::write(dir.join("ro/dir/x"), "x")?;
        fs::write(dir.join("outside/file"), SECRET)?;
        symlink("/", dir.join("ro/link"))
    },
    fill: |dir| {
        fs::create_dir_all(dir.join("rw/dir/deep"))?;
        fs::write(dir.join("rw/file"), "text")?;
        symlink("../outside/file", dir.join("rw/link"))
    },
};

/// Files that must never change, with what a change alters. The time of the last change suffices, since there is no
/// way to set it, and they were created earlier than in the same tick of the clock.
const UNTOUCHED: [&str; 7] = [
    "ro",
    "ro/dir",
    "ro/file",
    "ro/dir/x",
    "ro/link",
    "outside",
    "outside/file",
];

fn changes(world: &World) -> Vec<Option<(i64, i64, u64, u64)>> {
    let all = UNTOUCHED.iter().map(|name| {
        let found = fs::symlink_metadata(world.at(name)).ok()?;
        Some((
            found.ctime(),
            found.ctime_nsec(),
            found.ino(),
            found.nlink(),
        ))
    });
    all.collect()
}

struct World {
    user: Option<User>,
    dir: Directory,
    shares: Shares,
    server: Server,
    events: Option<HostEvents>,
    known: Mutex<Known>,
}

impl World {
    fn new(input: &mut Input<'_>) -> Self {
        keep_descriptors();
        let dir = Directory::take(&PLAN);
        let at = |name: &str| dir.at(name);
        let (choice, kind) = (input.byte(), input.byte());
        let shares = Shares::default();
        shares.add("rw", at("rw"), false).expect("a share");
        shares.add("ro", at("ro"), true).expect("a share");
        let cache = [Cache::Never, Cache::Auto, Cache::Always, Cache::Writeback];
        let options = Options {
            cache: cache[usize::from(choice % 4)],
            max_descriptors: [8, 12, 64, 1024][usize::from(choice / 4 % 4)],
            max_nodes: [8, 32, 1024, 0][usize::from(choice / 16 % 4)],
        };
        let mut user = None;
        if kind % 4 == 3 && rustix::process::geteuid().is_root() {
            for name in ["rw", "rw/dir", "rw/dir/deep", "rw/file", "rw/link"] {
                lchown(at(name), Some(User::ID), None).expect("root may give files away");
            }
            user = User::act();
        }
        let files = Passthrough::new(shares.clone(), options).expect("a server");
        // The guest may watch files as long as somebody wants the events.
        let events = (choice >= 128).then(|| files.host_events());
        let world = Self {
            user,
            dir,
            shares,
            server: Server::new(files),
            events,
            known: Mutex::new(Known {
                nodes: vec![1],
                handles: vec![(1, 0)],
            }),
        };
        if kind & 4 == 0 {
            world.begin(&mut Asker::new());
        }
        world
    }

    /// What most guests begin with: both shares, a file and directories, some of them open.
    fn begin(&self, asker: &mut Asker) {
        let mut init = Vec::new();
        for word in [7u32, 38, 0, u32::MAX, u32::MAX] {
            init.extend(word.to_le_bytes());
        }
        init.extend([0; 44]);
        self.send(asker, fuse(op::INIT, 0, 0, &init), 0);
        let node = |index: usize| {
            let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            known.nodes.get(index).copied().unwrap_or(1)
        };
        let steps: [(u32, usize, &[u8]); 8] = [
            (op::LOOKUP, 0, b"rw\0"),
            (op::LOOKUP, 0, b"ro\0"),
            (op::LOOKUP, 1, b"file\0"),
            (op::LOOKUP, 1, b"dir\0"),
            // Read and write.
            (op::OPEN, 3, &[2, 0, 0, 0, 0, 0, 0, 0]),
            (op::OPENDIR, 1, &[0; 8]),
            (op::LOOKUP, 4, b"deep\0"),
            (op::LOOKUP, 2, b"file\0"),
        ];
        for (opcode, index, body) in steps {
            self.send(asker, fuse(opcode, node(index), 0, body), 0);
        }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.at(name)
    }

    /// Sends a request of the guest and records the nodes and handles of the reply.
    fn ask(&self, asker: &mut Asker, input: &mut Input<'_>) {
        let request = self.request(input);
        self.send(asker, request, input.byte());
    }

    /// Sends a request with room for a reply of one of several sizes.
    fn send(&self, asker: &mut Asker, request: Vec<u8>, size: u8) {
        let opcode = u32::from_le_bytes(request[4..8].try_into().expect("four bytes"));
        let node = u64::from_le_bytes(request[16..24].try_into().expect("eight bytes"));
        let room = [4096, 160, 144, 128, 16, 80, 65_552, 24][usize::from(size % 8)];
        let mut buffers = Vec::new();
        // In one part, or in two.
        let cut = usize::from(size / 8) * 4;
        match request.split_at_checked(cut) {
            Some((first, second)) if cut > 0 => {
                buffers.push(Buffer::Readable(first.to_vec()));
                buffers.push(Buffer::Readable(second.to_vec()));
            }
            _ => buffers.push(Buffer::Readable(request)),
        }
        buffers.push(Buffer::Writable(room / 3 + 3));
        buffers.push(Buffer::Writable(room));
        let Some(reply) = asker.ask(&self.server, &buffers) else {
            return;
        };
        let number = |at: usize| {
            let bytes = reply.get(at..at + 8)?;
            bytes.try_into().ok().map(u64::from_le_bytes)
        };
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = |known: &mut Known| {
            // Zero is a negative entry.
            if let Some(node) = number(0).filter(|node| *node != 0) {
                known.nodes.push(node);
            }
        };
        match opcode {
            op::LOOKUP | op::MKNOD | op::MKDIR | op::SYMLINK | op::LINK => entry(&mut known),
            op::CREATE | op::TMPFILE => {
                entry(&mut known);
                if let (Some(node), Some(handle)) = (number(0), number(128)) {
                    known.handles.push((node, handle));
                }
            }
            op::OPEN | op::OPENDIR => {
                if let Some(handle) = number(0) {
                    known.handles.push((node, handle));
                }
            }
            _ => {}
        }
        let excess = known.nodes.len().saturating_sub(24);
        known.nodes.drain(1..1 + excess);
        let excess = known.handles.len().saturating_sub(12);
        known.handles.drain(..excess);
    }

    fn request(&self, input: &mut Input<'_>) -> Vec<u8> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let opcode = match input.byte() {
            byte @ 0..=99 => input_opcode(byte),
            byte => u32::from(byte % 55),
        };
        let opcode = if opcode == 54 { op::HOST_WATCH } else { opcode };
        let mut node = input.pick(&known.nodes);
        let (opened, handle) = input.pick(&known.handles);
        let uses_handle = matches!(
            opcode,
            op::READ
                | op::WRITE
                | op::RELEASE
                | op::RELEASEDIR
                | op::FSYNC
                | op::FSYNCDIR
                | op::FLUSH
                | op::READDIR
                | op::READDIRPLUS
                | op::FALLOCATE
                | op::LSEEK
                | op::COPY_FILE_RANGE
        );
        let mut body = Vec::new();
        let long = |body: &mut Vec<u8>, value: u64| body.extend(value.to_le_bytes());
        if uses_handle {
            if input.byte() < 240 {
                node = opened;
            }
            long(&mut body, handle);
            match opcode {
                op::READ | op::WRITE | op::READDIR | op::READDIRPLUS => {
                    long(&mut body, input.number());
                    let size = [4, 64, 4096, 1 << 20, u32::MAX][usize::from(input.byte() % 5)];
                    let size = if opcode == op::WRITE { 64 } else { size };
                    body.extend(size.to_le_bytes());
                    body.extend(u32::from(input.byte() % 8).to_le_bytes());
                    long(&mut body, 0);
                    let flags = input.pick(&[0u32, 0x400, 0x4000]);
                    body.extend(flags.to_le_bytes());
                    body.extend([0; 4]);
                    if opcode == op::WRITE {
                        body.extend([0x5a; 64]);
                    }
                }
                op::COPY_FILE_RANGE => {
                    long(&mut body, input.number());
                    let (node, handle) = input.pick(&known.handles);
                    long(&mut body, node);
                    long(&mut body, handle);
                    long(&mut body, input.number());
                    long(&mut body, u64::from(input.word()));
                    long(&mut body, 0);
                }
                _ => {
                    long(&mut body, input.number());
                    // Short enough not to fill the disk.
                    long(&mut body, u64::from(input.word()));
                    long(&mut body, u64::from(input.byte()));
                }
            }
        } else {
            self.named(opcode, &known, input, &mut body);
        }
        fuse(opcode, node, u32::from(input.byte() / 128) * 1000, &body)
    }

    /// Arguments of requests on names, nodes and attributes.
    fn named(&self, opcode: u32, known: &Known, input: &mut Input<'_>, body: &mut Vec<u8>) {
        let mode = 0o644 | u32::from(input.word() & 0o7777);
        let words = |body: &mut Vec<u8>, values: &[u32]| {
            body.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        };
        match opcode {
            op::FORGET => body.extend(u64::from(input.byte() % 3).to_le_bytes()),
            op::BATCH_FORGET => {
                words(body, &[u32::from(input.byte() % 4), 0]);
                for _ in 0..2 {
                    body.extend(input.pick(&known.nodes).to_le_bytes());
                    body.extend(1u64.to_le_bytes());
                }
            }
            op::MKNOD => {
                let kind = input.pick(&[0o100_000u32, 0o010_000, 0o140_000, 0o020_000]);
                words(body, &[mode | kind, 0, 0o22, 0]);
            }
            op::MKDIR => words(body, &[mode, 0o22]),
            op::RENAME | op::LINK => body.extend(input.pick(&known.nodes).to_le_bytes()),
            op::RENAME2 => {
                body.extend(input.pick(&known.nodes).to_le_bytes());
                words(body, &[u32::from(input.byte() % 8), 0]);
            }
            op::OPEN => words(body, &[open_flags(input), 0]),
            op::CREATE | op::TMPFILE => words(body, &[open_flags(input), mode, 0o22, 0]),
            op::SETATTR => {
                words(body, &[u32::from(input.word()), 0]);
                let (_, handle) = input.pick(&known.handles);
                body.extend(handle.to_le_bytes());
                body.extend(u64::from(input.word()).to_le_bytes());
                body.extend([0; 8]);
                (0..3).for_each(|_| body.extend(input.number().to_le_bytes()));
                (0..3).for_each(|_| words(body, &[u32::from(input.word()) << 16]));
                words(body, &[mode, 0, 1000, 1000, 0]);
            }
            op::SETXATTR => {
                let size = u32::from(input.byte() % 64);
                words(body, &[size, u32::from(input.byte() % 3)]);
                // The longer argument, of a guest that has sent INIT.
                if input.byte() % 2 == 1 {
                    words(body, &[u32::from(input.byte() % 2), 0]);
                }
                body.extend_from_slice(input.pick(&ATTRIBUTES));
                body.extend(vec![1; size as usize]);
            }
            op::GETXATTR | op::LISTXATTR => {
                words(body, &[u32::from(input.byte()), 0]);
                body.extend_from_slice(input.pick(&ATTRIBUTES));
            }
            op::REMOVEXATTR => body.extend_from_slice(input.pick(&ATTRIBUTES)),
            op::HOST_WATCH => {
                body.extend(u64::from(input.byte()).to_le_bytes());
                let mask = input.long();
                words(body, &[input.pick(&[u32::MAX, 0xfff, 0x3c0, mask]), 0]);
            }
            op::INIT => {
                words(body, &[7, 38, 0, u32::MAX, u32::MAX]);
                body.extend([0; 44]);
            }
            _ => {}
        }
        for _ in 0..2 {
            body.extend_from_slice(input.pick(&NAMES));
        }
    }

    /// A concurrent change on the host: never through a link, which may lead outside.
    fn change(&self, input: &mut Input<'_>) {
        User::without(self.user.as_ref(), || self.change_as_root(input));
    }

    fn change_as_root(&self, input: &mut Input<'_>) {
        let names = ["rw/file", "rw/dir", "rw/new", "rw/link", "rw/other"];
        let (one, two) = (self.at(input.pick(&names)), self.at(input.pick(&names)));
        let open = |path: &Path| {
            let mut options = fs::File::options();
            let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits() as i32;
            options.write(true).custom_flags(flags).open(path).ok()
        };
        match input.byte() % 14 {
            0 => fs::remove_file(one).ok(),
            1 => fs::remove_dir_all(one).ok(),
            2 => fs::rename(one, two).ok(),
            3 => open(&one).and_then(|mut file| file.write_all(input.bytes(9)).ok()),
            4 => fs::create_dir(one).ok(),
            5 => symlink(self.at("outside"), one).ok(),
            6 => symlink("../outside/file", one).ok(),
            7 => fs::hard_link(one, two).ok(),
            8 => {
                let name = input.pick(&["rw", "ro", "1", "2"]);
                self.shares.remove(name).then_some(())
            }
            9 => self.shares.add("rw", self.at("rw"), false).ok(),
            10 => self.shares.add("ro", self.at("ro"), true).ok(),
            11 => {
                let read_only = input.byte().is_multiple_of(2);
                self.share(input.pick(&["rw/dir", "late", "rw"]), read_only)
            }
            12 => {
                self.server.files().sweep(64);
                None
            }
            _ => {
                let mode = fs::Permissions::from_mode(0o4755);
                open(&one).and_then(|file| file.set_permissions(mode).ok())
            }
        };
    }

    /// Receives the events so far. This takes some time, since they are collected.
    fn receive(&self) {
        let Some(events) = &self.events else {
            return;
        };
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while let Some(some) = events.next().expect("the host can read them") {
                    for event in some {
                        assert!(event.nodeid > 0 && event.name.len() <= 255, "{event:?}");
                    }
                }
            });
            std::thread::sleep(Duration::from_millis(15));
            self.server.files().end_host_events();
        });
    }

    /// Shares a directory, unless the name has become that of a link.
    fn share(&self, name: &str, read_only: bool) -> Option<()> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = open(self.at(name), flags, Mode::empty()).ok()?;
        let options = ShareOptions {
            read_only,
            ..ShareOptions::default()
        };
        let path = format!("/proc/self/fd/{}", directory.as_raw_fd());
        self.shares.share(path, options).ok().map(drop)
    }
}

const NAMES: [&[u8]; 16] = [
    b"1\0",
    b"2\0",
    b"rw\0",
    b"ro\0",
    b"file\0",
    b"dir\0",
    b"new\0",
    b"deep\0",
    b"link\0",
    b"other\0",
    b"x\0",
    b"late\0",
    b"..\0",
    b".\0",
    b"../outside/file\0",
    b"\0",
];

const ATTRIBUTES: [&[u8]; 6] = [
    b"user.a\0",
    b"user.b\0",
    b"trusted.a\0",
    b"security.capability\0",
    b"system.posix_acl_access\0",
    b"\0",
];

fn open_flags(input: &mut Input<'_>) -> u32 {
    let mode = u32::from(input.byte() % 3);
    // O_EXCL, O_TRUNC, O_APPEND, O_NOATIME, O_DIRECT, O_SYNC
    let others = [0, 0x80, 0x200, 0x400, 0o1_000_000, 0o40_000, 0o4_010_000];
    mode | input.pick(&others) | input.pick(&others)
}

/// Opcodes that create most of the guest's state.
fn input_opcode(byte: u8) -> u32 {
    const OFTEN: [u32; 14] = [
        op::HOST_WATCH,
        op::LOOKUP,
        op::LOOKUP,
        op::LOOKUP,
        op::OPEN,
        op::OPENDIR,
        op::CREATE,
        op::READ,
        op::WRITE,
        op::READDIRPLUS,
        op::READDIR,
        op::GETATTR,
        op::SETATTR,
        op::RENAME2,
    ];
    OFTEN[usize::from(byte) % OFTEN.len()]
}

/// Requests on files.
///
/// # Panics
/// If the server has a bug, or the host is out of disk space.
pub fn fs_state(data: &[u8]) {
    let mut input = Input::new(data);
    let world = World::new(&mut input);
    let before = changes(&world);
    let mut asker = Asker::new();
    for _ in 0..150 {
        if input.is_empty() {
            break;
        }
        match input.byte() {
            0..=199 => world.ask(&mut asker, &mut input),
            200..=246 => world.change(&mut input),
            247 => world.server.clear(),
            248..=254 => {
                // Taken in turn by two of the guest's threads.
                let mut other = Asker::new();
                for _ in 0..input.byte() % 8 {
                    world.ask(&mut other, &mut input);
                    world.ask(&mut asker, &mut input);
                }
            }
            // At the same time: what happens is not the same in each run.
            _ => {
                let (mut one, mut two) = (Input::new(input.bytes(96)), Input::new(input.bytes(96)));
                std::thread::scope(|scope| {
                    scope.spawn(|| {
                        let mut asker = Asker::new();
                        while !one.is_empty() {
                            world.ask(&mut asker, &mut one);
                        }
                    });
                    while !two.is_empty() {
                        world.ask(&mut asker, &mut two);
                        world.change(&mut two);
                    }
                });
            }
        }
    }
    if data.len() % 16 == 15 && data.first().is_some_and(|first| *first >= 240) {
        world.receive();
    }
    world.server.clear();
    assert_eq!(
        changes(&world),
        before,
        "something that is not to be changed"
    );
}
