//! A virtio driver for unit tests, benches and fuzz targets: accesses a queue as a guest's driver does.

use crate::virtio::mmio::EventLoop;
use crate::virtio::{ActiveQueue, Interrupt, Memory};
use event_manager::MutEventSubscriber;
use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Size of a test guest's memory in bytes.
pub const MEMORY_SIZE: usize = 16 << 20;
const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x1_0000;
const USED: u64 = 0x2_0000;
const DATA: u64 = 0x10_0000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// One buffer of a chain that the driver offers.
#[derive(Clone, Debug)]
pub enum Buffer {
    /// Readable by the device.
    Readable(Vec<u8>),
    /// Writable by the device, with this length in bytes.
    Writable(u32),
}

/// Records interrupts.
#[derive(Default)]
pub struct Recorder {
    queues: AtomicU32,
    config: AtomicBool,
    broken: AtomicBool,
}

impl Recorder {
    /// Whether the device reported a fault to its driver.
    pub fn needs_reset(&self) -> bool {
        self.broken.load(Ordering::SeqCst)
    }

    /// Whether the device reported a configuration change.
    pub fn config_changed(&self) -> bool {
        self.config.load(Ordering::SeqCst)
    }
}

impl Interrupt for Recorder {
    fn queue(&self, _index: u16) {
        self.queues.fetch_add(1, Ordering::SeqCst);
    }

    fn config(&self) {
        self.config.store(true, Ordering::SeqCst);
    }

    fn needs_reset(&self) {
        self.broken.store(true, Ordering::SeqCst);
    }
}

/// A driver for one queue.
pub struct Driver {
    memory: Arc<Memory>,
    size: u16,
    next_descriptor: u16,
    next_available: u16,
    seen_used: u16,
    next_data: u64,
    writable: HashMap<u16, Vec<(u64, u32)>>,
    recorder: Arc<Recorder>,
    kick: EventFd,
}

impl Driver {
    /// A driver for a queue of `size` descriptors in new memory.
    ///
    /// # Panics
    /// If the host has no memory or descriptors left.
    pub fn new(size: u16) -> Self {
        let memory = Memory::from_ranges(&[(GuestAddress(0), MEMORY_SIZE)]).expect("memory");
        Self::with_memory(Arc::new(memory), size)
    }

    /// As [`new`](Self::new), in existing memory of at least [`MEMORY_SIZE`].
    ///
    /// # Panics
    /// If the host has no descriptors left.
    pub fn with_memory(memory: Arc<Memory>, size: u16) -> Self {
        Self {
            memory,
            size,
            next_descriptor: 0,
            next_available: 0,
            seen_used: 0,
            next_data: DATA,
            writable: HashMap::new(),
            recorder: Arc::default(),
            kick: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).expect("eventfd"),
        }
    }

    /// Guest memory.
    pub fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// Addresses of the queue's parts: descriptor table, available ring, used ring.
    pub fn ring_addresses(&self) -> [u64; 3] {
        [DESCRIPTORS, AVAILABLE, USED]
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// The interrupts raised by the device.
    pub fn recorder(&self) -> &Arc<Recorder> {
        &self.recorder
    }

    /// Begins both rings at this index, as if that many chains had been used, to test wrap-around.
    ///
    /// # Panics
    /// Never with test memory.
    pub fn begin_at(&mut self, index: u16) {
        (self.next_available, self.seen_used) = (index, index);
        for ring in [AVAILABLE, USED] {
            let at = GuestAddress(ring + 2);
            self.memory.write_obj(index, at).expect("test memory");
        }
    }

    /// The device side of the queue.
    ///
    /// # Panics
    /// If `size` is not a power of two.
    pub fn queue(&self) -> ActiveQueue {
        self.queue_at((0, 0))
    }

    /// As [`queue`](Self::queue), for a device at these positions in the available and the used ring.
    ///
    /// # Panics
    /// If the host has no descriptors left.
    pub fn queue_at(&self, (next_available, next_used): (u16, u16)) -> ActiveQueue {
        let mut queue = Queue::new(self.size).expect("a power of two");
        queue.set_size(self.size);
        queue
            .try_set_desc_table_address(GuestAddress(DESCRIPTORS))
            .expect("aligned");
        queue
            .try_set_avail_ring_address(GuestAddress(AVAILABLE))
            .expect("aligned");
        queue
            .try_set_used_ring_address(GuestAddress(USED))
            .expect("aligned");
        queue.set_ready(true);
        queue.set_next_avail(next_available);
        queue.set_next_used(next_used);
        ActiveQueue::new(
            0,
            queue,
            self.memory.clone(),
            self.kick.try_clone().expect("eventfd"),
            self.recorder.clone(),
        )
    }

    /// Makes a chain available; returns its head.
    ///
    /// # Panics
    /// If the test needs more than its memory holds.
    pub fn offer(&mut self, buffers: &[Buffer]) -> u16 {
        let head = self.next_descriptor;
        let mut room = Vec::new();
        for (n, buffer) in buffers.iter().enumerate() {
            let address = self.next_data;
            let (len, mut flags) = match buffer {
                Buffer::Readable(bytes) => {
                    let at = GuestAddress(address);
                    self.memory.write_slice(bytes, at).expect("test memory");
                    (bytes.len() as u32, 0)
                }
                Buffer::Writable(len) => {
                    room.push((address, *len));
                    (*len, WRITE)
                }
            };
            self.next_data += u64::from(len).next_multiple_of(16);
            if n + 1 < buffers.len() {
                flags |= NEXT;
            }
            let index = self.next_descriptor;
            self.next_descriptor = (index + 1) % self.size;
            self.set_descriptor(index, address, len, flags, self.next_descriptor);
        }
        self.writable.insert(head, room);
        self.make_available(head);
        head
    }

    /// Writes a raw descriptor, for invalid chains.
    ///
    /// # Panics
    /// If `index` is beyond test memory.
    pub fn set_descriptor(&self, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        let at = GuestAddress(DESCRIPTORS + 16 * u64::from(index));
        write_descriptor(&self.memory, at, address, len, flags, next);
    }

    /// Writes a raw descriptor of an indirect table at guest address `table`, and points
    /// descriptor `index` to it when `index` is given.
    ///
    /// # Panics
    /// If the table is beyond test memory.
    pub fn set_indirect(&self, index: u16, table: u64, entries: &[(u64, u32, u16, u16)]) {
        for (n, (address, len, flags, next)) in entries.iter().enumerate() {
            let at = GuestAddress(table + 16 * n as u64);
            write_descriptor(&self.memory, at, *address, *len, *flags, *next);
        }
        let bytes = 16 * entries.len() as u32;
        self.set_descriptor(index, table, bytes, INDIRECT, 0);
    }

    /// Makes a chain available by its head.
    ///
    /// # Panics
    /// Never with test memory.
    pub fn make_available(&mut self, head: u16) {
        let slot = u64::from(self.next_available % self.size);
        let ring = GuestAddress(AVAILABLE + 4 + 2 * slot);
        self.memory.write_obj(head, ring).expect("test memory");
        self.next_available = self.next_available.wrapping_add(1);
        let index = GuestAddress(AVAILABLE + 2);
        self.memory
            .write_obj(self.next_available, index)
            .expect("test memory");
    }

    /// Sets the available index to any value, as a misbehaving driver might.
    ///
    /// # Panics
    /// Never with test memory.
    pub fn set_available_index(&self, value: u16) {
        let index = GuestAddress(AVAILABLE + 2);
        self.memory.write_obj(value, index).expect("test memory");
    }

    /// The chains used since the last call: head and number of bytes written.
    ///
    /// # Panics
    /// Never with test memory.
    pub fn used(&mut self) -> Vec<(u16, u32)> {
        let index: u16 = self
            .memory
            .read_obj(GuestAddress(USED + 2))
            .expect("memory");
        let mut out = Vec::new();
        while self.seen_used != index {
            let slot = u64::from(self.seen_used % self.size);
            let at = USED + 4 + 8 * slot;
            let head: u32 = self.memory.read_obj(GuestAddress(at)).expect("memory");
            let len: u32 = self.memory.read_obj(GuestAddress(at + 4)).expect("memory");
            out.push((head as u16, len));
            self.seen_used = self.seen_used.wrapping_add(1);
        }
        out
    }

    /// The first `len` bytes of the writable part of the chain at `head`.
    ///
    /// # Panics
    /// If no such chain was offered.
    pub fn written(&self, head: u16, len: usize) -> Vec<u8> {
        let mut out = Vec::new();
        for (address, size) in &self.writable[&head] {
            let mut part = vec![0; *size as usize];
            self.memory
                .read_slice(&mut part, GuestAddress(*address))
                .expect("test memory");
            out.extend(part);
        }
        out.truncate(len);
        out
    }

    /// Whether the device raised a queue interrupt since the last call.
    pub fn interrupted(&self) -> bool {
        self.recorder.queues.swap(0, Ordering::SeqCst) > 0
    }

    /// Makes all data memory available again; chains in flight are forgotten.
    pub fn recycle(&mut self) {
        self.next_data = DATA;
        self.writable.clear();
    }

    /// Fills the ring with chains and makes each available again as soon as it is used, so that the queue is
    /// never empty, until the returned guard is dropped.
    ///
    /// # Panics
    /// If the host cannot create a thread.
    pub fn flood(&mut self, buffers: &[Buffer]) -> Flood {
        let head = self.offer(buffers);
        for slot in 0..u64::from(self.size) {
            let ring = GuestAddress(AVAILABLE + 4 + 2 * slot);
            self.memory.write_obj(head, ring).expect("test memory");
        }
        let (memory, size) = (self.memory.clone(), self.size);
        let ended = Arc::new(AtomicBool::new(false));
        let ends = ended.clone();
        let fill = move || {
            let used: u16 = memory.read_obj(GuestAddress(USED + 2)).expect("memory");
            let available = used.wrapping_add(size);
            let index = GuestAddress(AVAILABLE + 2);
            memory.write_obj(available, index).expect("test memory");
        };
        // Filled before the thread runs for the first time.
        fill();
        let thread = std::thread::spawn(move || {
            while !ends.load(Ordering::SeqCst) {
                fill();
            }
        });
        Flood {
            ended,
            thread: Some(thread),
        }
    }

    /// Takes a pending kick; returns whether there was one.
    pub fn take_kick(&self) -> bool {
        self.kick.read().is_ok()
    }

    /// Kicks the device.
    pub fn kick(&self) {
        self.kick.write(1).ok();
    }
}

/// A driver that keeps its queue full: see [`Driver::flood`].
pub struct Flood {
    ended: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Drop for Flood {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}

/// Runs `work` on a thread of its own.
///
/// # Panics
/// If it does not finish within 30 s, or panics.
pub fn finishes<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, done) = std::sync::mpsc::channel();
    std::thread::spawn(move || sender.send(work()));
    let limit = std::time::Duration::from_secs(30);
    done.recv_timeout(limit).expect("it ends")
}

fn write_descriptor(
    memory: &Memory,
    at: GuestAddress,
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
) {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&address.to_le_bytes());
    bytes[8..12].copy_from_slice(&len.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    memory.write_slice(&bytes, at).expect("test memory");
}

/// Workers by ID.
type Workers = HashMap<u64, Box<dyn MutEventSubscriber + Send>>;

/// An event loop that keeps workers without running them; it activates devices on the calling thread.
#[derive(Default)]
pub struct IdleLoop {
    workers: Mutex<(u64, Workers)>,
}

impl IdleLoop {
    /// Number of workers.
    ///
    /// # Panics
    /// If another thread of the test panicked while holding the lock.
    pub fn len(&self) -> usize {
        self.workers.lock().expect("not poisoned").1.len()
    }

    /// Whether there are no workers.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl EventLoop for IdleLoop {
    fn start(&self, work: Box<dyn FnOnce() + Send>) -> io::Result<()> {
        work();
        Ok(())
    }

    fn add(&self, worker: Box<dyn MutEventSubscriber + Send>) -> io::Result<u64> {
        let mut workers = self.workers.lock().expect("not poisoned");
        workers.0 += 1;
        let id = workers.0;
        workers.1.insert(id, worker);
        Ok(id)
    }

    fn remove(&self, id: u64) -> Option<Box<dyn MutEventSubscriber + Send>> {
        self.workers.lock().expect("not poisoned").1.remove(&id)
    }
}
