//! Devices behind their registers: a driver sets one up, uses it, breaks it, resets it during requests, and has it saved and
//! restored, in any order.

use crate::hosts::{Choices, DISK_BYTES, Host, Kind, MEM_START, Streams, device};
use crate::input::Input;
use crate::pool::{Layout, Lease};
use crate::{requests, saved};
use event_manager::{EventManager, MutEventSubscriber, SubscriberId, SubscriberOps};
use koya_devices::test_utils::{Buffer, MEMORY_SIZE};
use koya_devices::virtio::mmio::{EventLoop, MmioTransport};
use rustix::net::{RecvFlags, SendFlags, recv, send};
use std::cell::Cell;
use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use vm_memory::{Bytes, GuestAddress};

/// Registers (virtio 1.2, section 4.2.2).
mod register {
    pub(super) const FEATURES_SELECT: u64 = 0x14;
    pub(super) const FEATURES: u64 = 0x10;
    pub(super) const DRIVER_FEATURES: u64 = 0x20;
    pub(super) const DRIVER_FEATURES_SELECT: u64 = 0x24;
    pub(super) const QUEUE_SELECT: u64 = 0x30;
    pub(super) const QUEUE_MAX: u64 = 0x34;
    pub(super) const QUEUE_SIZE: u64 = 0x38;
    pub(super) const QUEUE_READY: u64 = 0x44;
    pub(super) const NOTIFY: u64 = 0x50;
    pub(super) const STATUS: u64 = 0x70;
    pub(super) const DESCRIPTORS: u64 = 0x80;
    pub(super) const AVAILABLE: u64 = 0x90;
    pub(super) const USED: u64 = 0xa0;
    pub(super) const CONFIG: u64 = 0x100;
}

/// An event loop driven by the test.
struct Steps(
    Mutex<EventManager<Box<dyn MutEventSubscriber + Send>>>,
    Mutex<Ids>,
);

thread_local! {
    static FREE: Cell<Option<Arc<Steps>>> = const { Cell::new(None) };
}

#[derive(Default)]
struct Ids {
    last: u64,
    known: HashMap<u64, SubscriberId>,
}

impl Steps {
    fn new() -> Self {
        Self(
            Mutex::new(EventManager::new().expect("epoll")),
            Mutex::default(),
        )
    }

    /// The event loop of the last input, if nothing is left in it.
    fn take() -> Arc<Self> {
        let kept = FREE.take();
        kept.unwrap_or_else(|| Arc::new(Self::new()))
    }

    fn keep(self: Arc<Self>) {
        let is_empty = |ids: &Mutex<Ids>| {
            let ids = ids.lock().unwrap_or_else(PoisonError::into_inner);
            ids.known.is_empty()
        };
        if Arc::strong_count(&self) == 1 && is_empty(&self.1) {
            FREE.set(Some(self));
        }
    }

    fn run(&self) {
        let mut events = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        events.run_with_timeout(0).expect("epoll");
    }
}

impl EventLoop for Steps {
    fn start(&self, work: Box<dyn FnOnce() + Send>) -> io::Result<()> {
        work();
        Ok(())
    }

    fn add(&self, worker: Box<dyn MutEventSubscriber + Send>) -> io::Result<u64> {
        let mut events = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut ids = self.1.lock().unwrap_or_else(PoisonError::into_inner);
        ids.last += 1;
        let id = ids.last;
        ids.known.insert(id, events.add_subscriber(worker));
        Ok(id)
    }

    fn remove(&self, id: u64) -> Option<Box<dyn MutEventSubscriber + Send>> {
        let mut events = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut ids = self.1.lock().unwrap_or_else(PoisonError::into_inner);
        let known = ids.known.remove(&id)?;
        events.remove_subscriber(known).ok()
    }
}

struct Guest {
    choices: Choices,
    window: MmioTransport,
    events: Arc<Steps>,
    host: Host,
    /// Released after the device.
    memory: Lease,
    /// The next descriptor, the next entry of the available ring, and the size of each queue.
    queues: Vec<(u16, u16, u16)>,
    /// Whether the device may still serve something of each queue without another notification.
    may_serve: Vec<bool>,
    /// Address of the next buffer.
    room: u64,
}

/// Addresses of a queue's rings: each queue has its own part of memory.
const fn rings(queue: u64) -> [u64; 3] {
    let base = 0x1_0000 + (queue << 14);
    [base, base + 0x2000, base + 0x3000]
}

const DATA: u64 = 0x20_0000;

impl Guest {
    fn new(choices: Choices) -> Self {
        let layout = match choices.kind {
            Kind::Mem if choices.plugs_slots() => Layout::Pluggable,
            Kind::Mem => Layout::Hotplug,
            _ => Layout::Plain,
        };
        let memory = Lease::new(layout);
        let plugged = choices.plugs_slots().then_some(&*memory);
        let (device, host) = device(choices, plugged, None);
        let events = Steps::take();
        let queues = vec![(0, 0, 0); device.queue_sizes().len()];
        let may_serve = vec![false; queues.len()];
        let window =
            MmioTransport::new(device, Arc::clone(&memory), events.clone()).expect("a window");
        Self {
            choices,
            window,
            events,
            host,
            memory,
            queues,
            may_serve,
            room: DATA,
        }
    }

    fn read(&mut self, register: u64) -> u32 {
        let mut word = [0; 4];
        self.window.read(register, &mut word);
        u32::from_le_bytes(word)
    }

    fn write(&mut self, register: u64, value: u32) {
        self.window.write(register, &value.to_le_bytes());
    }

    fn write_long(&mut self, register: u64, value: u64) {
        self.write(register, value as u32);
        self.write(register + 4, (value >> 32) as u32);
    }

    /// All steps up to DRIVER_OK, by a driver that accepts arbitrary features.
    fn start(&mut self, input: &mut Input<'_>) {
        let (refused, oddity) = (input.byte(), input.byte());
        self.write(register::STATUS, 1);
        self.write(register::STATUS, 3);
        for half in [0, 1] {
            self.write(register::FEATURES_SELECT, half);
            let offered = self.read(register::FEATURES);
            // VIRTIO_F_VERSION_1 is in the upper half.
            let keep = if half == 0 {
                !(u32::from(refused) * 0x0101_0101)
            } else {
                !(u32::from(refused >> 7) << 2)
            };
            self.write(register::DRIVER_FEATURES_SELECT, half);
            self.write(register::DRIVER_FEATURES, offered & keep);
        }
        self.write(register::STATUS, 11);
        for index in 0..self.queues.len() {
            self.write(register::QUEUE_SELECT, index as u32);
            let max = self.read(register::QUEUE_MAX) as u16;
            let size = max.min(16 << (oddity % 4));
            let [descriptors, available, used] = rings(index as u64);
            self.write(register::QUEUE_SIZE, size.into());
            self.memory.touch_rings(rings(index as u64), size.into());
            self.write_long(register::DESCRIPTORS, descriptors);
            self.write_long(register::AVAILABLE, available);
            let odd = oddity == 255 && index == 0;
            self.write_long(
                register::USED,
                if odd { MEMORY_SIZE as u64 - 64 } else { used },
            );
            // Rings start empty.
            self.memory.write_obj(0u32, GuestAddress(available)).ok();
            self.memory.write_obj(0u32, GuestAddress(used)).ok();
            self.queues[index] = (0, 0, size);
            let left_out = oddity / 4 % 16 == index as u8 + 1;
            self.write(register::QUEUE_READY, (!left_out).into());
        }
        self.write(register::STATUS, 15);
    }

    /// Adds a chain to the available ring of a queue.
    fn offer(&mut self, queue: usize, buffers: &[Buffer], indirect: bool) {
        let [table, available, _] = rings(queue as u64);
        let (mut next, mut ring, size) = self.queues[queue];
        if size == 0 || buffers.is_empty() {
            return;
        }
        let total: u64 = buffers.iter().map(|buffer| len(buffer) + 16).sum();
        if self.room + total > MEMORY_SIZE as u64 {
            self.room = DATA;
        }
        self.memory.touch(self.room, total + 16);
        let head = next;
        let own_table = self.room.next_multiple_of(16);
        if indirect {
            self.room = own_table + 16 * buffers.len() as u64;
        }
        for (number, buffer) in buffers.iter().enumerate() {
            let address = self.room;
            let len = len(buffer);
            self.room += len;
            let mut flags = match buffer {
                Buffer::Readable(bytes) => {
                    self.memory.write_slice(bytes, GuestAddress(address)).ok();
                    0
                }
                Buffer::Writable(_) => 2,
            };
            let last = number + 1 == buffers.len();
            flags |= u16::from(!last);
            let following = match indirect {
                true => number as u16 + 1,
                false => (next + 1) % size,
            };
            let at = match indirect {
                true => own_table + 16 * number as u64,
                false => table + 16 * u64::from(next),
            };
            self.descriptor(at, address, len as u32, flags, following);
            if !indirect {
                next = following;
            }
        }
        if indirect {
            let at = table + 16 * u64::from(head);
            self.descriptor(at, own_table, 16 * buffers.len() as u32, 4, 0);
            next = (next + 1) % size;
        }
        let slot = GuestAddress(available + 4 + 2 * u64::from(ring % size));
        self.memory.write_obj(head, slot).ok();
        ring = ring.wrapping_add(1);
        self.memory
            .write_obj(ring, GuestAddress(available + 2))
            .ok();
        self.queues[queue] = (next, ring, size);
    }

    fn descriptor(&self, at: u64, address: u64, len: u32, flags: u16, next: u16) {
        let word = u64::from(len) | u64::from(flags) << 32 | u64::from(next) << 48;
        self.memory.write_obj(address, GuestAddress(at)).ok();
        self.memory.write_obj(word, GuestAddress(at + 8)).ok();
    }

    /// A request in the format of this queue.
    fn request(&mut self, queue: usize, input: &mut Input<'_>) -> Vec<Buffer> {
        match self.choices.kind {
            Kind::Block => requests::block(input),
            Kind::Net if queue == 2 * usize::from(self.choices.queues) => requests::pairs(input),
            Kind::Net if queue.is_multiple_of(2) => vec![Buffer::Writable(u32::from(input.word()))],
            Kind::Net => requests::frame(input),
            Kind::Files => requests::file(input),
            Kind::Balloon if queue == 3 => vec![Buffer::Writable(u32::from(input.byte()) << 12)],
            Kind::Balloon => vec![Buffer::Readable(input.bytes(40).to_vec())],
            Kind::Mem => requests::memory(input, MEM_START),
            Kind::Entropy => vec![Buffer::Writable(u32::from(input.word()))],
            Kind::Vsock if queue == 1 => requests::packet(input),
            Kind::Vsock => vec![Buffer::Writable(u32::from(input.word()))],
        }
    }

    fn notify(&mut self, queue: usize) {
        self.write(register::NOTIFY, queue as u32);
        self.may_serve[queue] = true;
    }

    /// Lets the device's threads run until they have served this queue, for a moment at most. There is nothing to wait for
    /// if the device is not running, or if it did nothing in an earlier moment and has no reason to since.
    fn wait(&mut self, queue: usize) {
        const DRIVER_OK: u32 = 4;
        const NEEDS_RESET: u32 = 0x40;
        let has_threads = matches!(self.choices.kind, Kind::Block | Kind::Net | Kind::Files);
        if !has_threads
            || !self.may_serve[queue]
            || self.read(register::STATUS) & (DRIVER_OK | NEEDS_RESET) != DRIVER_OK
        {
            return;
        }
        let [_, available, used] = rings(queue as u64).map(|ring| GuestAddress(ring + 2));
        let index = |at| self.memory.read_obj::<u16>(at).ok();
        if index(available) == index(used) {
            return;
        }
        for _ in 0..4 {
            let before = index(used);
            std::thread::sleep(Duration::from_micros(50));
            if index(available) == index(used) {
                return;
            }
            self.may_serve[queue] = index(used) != before;
        }
    }

    /// An event on the host.
    fn happens(&mut self, input: &mut Input<'_>) {
        match &mut self.host {
            Host::Disk(file, handle) => {
                // Grows or shrinks the file; the device may notice, or is told.
                let choice = input.byte();
                let len = DISK_BYTES + (u64::from(choice % 3) << 12);
                file.set_len(len).expect("memory");
                if choice >= 128 {
                    handle.refresh().expect("whole blocks");
                }
            }
            Host::Net(_, handle) if input.byte() >= 192 => handle.set_link(!handle.link()),
            Host::Net(sockets, _) => {
                let socket = &sockets[usize::from(input.byte()) % sockets.len()];
                let len = usize::from(input.word());
                send(socket, &vec![0x5a; len], SendFlags::empty()).ok();
                recv(socket, &mut [0; 2048][..], RecvFlags::empty()).ok();
            }
            Host::Files(dir) => {
                let path = dir.path();
                match input.byte() % 4 {
                    0 => std::fs::remove_file(path.join("file")).ok(),
                    1 => std::fs::write(path.join("file"), input.bytes(9)).ok(),
                    2 => std::fs::rename(path.join("dir"), path.join("new")).ok(),
                    _ => std::fs::create_dir(path.join("dir")).ok(),
                };
            }
            Host::Mem(handle) => handle.set_requested(u64::from(input.byte()) << 20),
            Host::Balloon(handle) => {
                handle.set_target(u64::from(input.byte()) << 12);
                handle.request_statistics();
            }
            Host::Streams(streams) => happens_to(streams, input),
            Host::None => {}
        }
    }

    /// Moves the machine to another process, optionally with a modified state.
    fn moves(&mut self, stay: bool, odd: Option<&mut Input<'_>>) {
        let Ok(mut state) = self.window.save() else {
            return;
        };
        // What goes on looks at its queues.
        self.may_serve.fill(true);
        if stay {
            self.window.resume().expect("what ran before");
            return;
        }
        let is_own = odd.is_none();
        if let Some(input) = odd {
            state = saved::changed(&state, input);
            // The rings may be anywhere.
            self.memory.discard();
        }
        self.window.shutdown();
        let host = std::mem::replace(&mut self.host, Host::None);
        let plugged = self.choices.plugs_slots().then_some(&*self.memory);
        let (device, host) = device(self.choices, plugged, Some(host));
        self.host = host;
        let (memory, events) = (Arc::clone(&self.memory), self.events.clone());
        self.window = MmioTransport::new(device, memory, events).expect("a window");
        let restored = self.window.restore(&state);
        if restored.is_ok() && self.window.resume().is_err() {
            assert!(!is_own, "what ran before does not go on");
            // A machine would not start with such a device; the next driver resets it.
            self.write(register::STATUS, 0);
        }
    }
}

fn len(buffer: &Buffer) -> u64 {
    match buffer {
        Buffer::Readable(bytes) => bytes.len() as u64,
        Buffer::Writable(len) => u64::from(*len),
    }
}

/// Connections of the host to the guest and of the guest to the host, and data of the host.
fn happens_to(streams: &mut Streams, input: &mut Input<'_>) {
    if let Ok(stream) = streams.listener.accept_timeout(Duration::ZERO) {
        streams.open.push(stream);
    }
    if let Ok(stream) = streams.ports.connect(u32::from(input.byte() % 4)) {
        streams.open.push(stream);
    }
    if let Some(sockets) = &streams.sockets {
        if let Ok((stream, _)) = sockets.listener.accept() {
            streams.open.push(stream);
        }
        if let Ok(mut client) = UnixStream::connect(sockets.path()) {
            let line = match input.byte() % 4 {
                0 => input.bytes(24).to_vec(),
                port => format!("CONNECT {port}\n").into_bytes(),
            };
            client.write_all(&line).ok();
            streams.open.push(client);
        }
    }
    for stream in &mut streams.open {
        stream.set_nonblocking(true).ok();
        stream.write_all(&vec![1; usize::from(input.byte())]).ok();
        // The guest may go on sending.
        let _some = stream.read(&mut [0; 4096]);
    }
    streams.open.truncate(usize::from(input.byte() % 4));
}

fn live(kind: Kind, data: &[u8]) {
    let mut input = Input::new(data);
    let choices = Choices {
        kind,
        options: input.byte(),
        queues: u16::from(input.byte() % 3) + 1,
    };
    let mut guest = Guest::new(choices);
    guest.start(&mut input);
    for _ in 0..100 {
        if input.is_empty() {
            break;
        }
        step(&mut guest, &mut input);
    }
    guest.window.shutdown();
    let events = guest.events.clone();
    if let Host::Disk(file, _) = &guest.host {
        let len = file.metadata().expect("a file").len();
        assert!((DISK_BYTES..=DISK_BYTES + 0x2000).contains(&len), "{len}");
    }
    drop(guest);
    events.keep();
}

fn step(guest: &mut Guest, input: &mut Input<'_>) {
    let action = input.byte();
    let queue = usize::from(action >> 4) % guest.queues.len();
    match action % 16 {
        0..=4 => {
            let request = guest.request(queue, input);
            guest.offer(queue, &request, action % 16 == 4);
            guest.notify(queue);
            guest.events.run();
        }
        // No notification to the device.
        5 | 6 => {
            let request = guest.request(queue, input);
            guest.offer(queue, &request, false);
        }
        7 => {
            guest.notify(queue);
            guest.events.run();
        }
        8 => {
            guest.happens(input);
            guest.may_serve.fill(true);
        }
        9 => {
            guest.write(register::STATUS, 0);
            if action < 192 {
                guest.start(input);
            }
        }
        10 if action < 128 => guest.moves(action < 64, None),
        10 => guest.moves(false, Some(input)),
        11 => {
            let register = u64::from(input.byte()) * 4;
            let value = input.number() as u32;
            if (register::DESCRIPTORS..register::CONFIG).contains(&register) {
                guest.memory.discard();
            }
            guest.write(register, value);
            guest.may_serve.fill(true);
        }
        12 => {
            let at = register::CONFIG + u64::from(input.byte());
            let mut bytes = vec![0; usize::from(input.byte() % 9)];
            guest.window.read(at, &mut bytes);
            guest.window.write(at, input.bytes(4));
        }
        13 => {
            let [table, available, _] = rings(queue as u64);
            let size = u64::from(guest.queues[queue].2.max(1));
            let at = table + 16 * (u64::from(input.byte()) % size);
            let (address, len) = (input.number(), input.number() as u32);
            let (flags, next) = (input.word() & 7, u16::from(input.byte()));
            if flags & 4 != 0 {
                // A table of whatever is there.
                guest.memory.discard();
            }
            if flags & 2 != 0 {
                guest.memory.touch(address, len.into());
            }
            guest.descriptor(at, address, len, flags, next);
            let ring = guest.queues[queue].1;
            let slot = GuestAddress(available + 4 + 2 * (u64::from(ring) % size));
            guest
                .memory
                .write_obj(((at - table) / 16) as u16, slot)
                .ok();
            let ring = ring.wrapping_add(1);
            guest.queues[queue].1 = ring;
            guest
                .memory
                .write_obj(ring, GuestAddress(available + 2))
                .ok();
        }
        14 => {
            let [_, available, _] = rings(queue as u64);
            let index = match action {
                240.. => input.word(),
                _ => guest.queues[queue].1,
            };
            guest
                .memory
                .write_obj(index, GuestAddress(available + 2))
                .ok();
        }
        _ => {
            guest.wait(queue);
            guest.events.run();
        }
    }
}

/// Life cycle of a disk.
///
/// # Panics
/// If the device has a bug, or the host is out of memory or descriptors; likewise below.
pub fn life_block(data: &[u8]) {
    live(Kind::Block, data);
}

/// Life cycle of a network device.
pub fn life_net(data: &[u8]) {
    live(Kind::Net, data);
}

/// Life cycle of shared files.
pub fn life_files(data: &[u8]) {
    live(Kind::Files, data);
}

/// Life cycle of a balloon, a memory device or an entropy device.
pub fn life_memory(data: &[u8]) {
    if let Some((first, rest)) = data.split_first() {
        live(
            [Kind::Balloon, Kind::Mem, Kind::Mem, Kind::Entropy][usize::from(first % 4)],
            rest,
        );
    }
}

/// Life cycle of vsock.
pub fn life_vsock(data: &[u8]) {
    live(Kind::Vsock, data);
}
