//! Guests of any length: machine code in 32-bit protected mode without paging, assembled from stores and loads, with its
//! initial memory.
#![allow(dead_code, reason = "no test uses all of them")]

use koya_vmm::devices::virtio::VirtioDevice;

/// Memory of a tiny guest in bytes.
pub(crate) const MEMORY: u32 = 2 << 20;
/// The registers of the first device.
pub(crate) const SLOT: u32 = 0xd000_0000;
const DATA: u32 = 0x18_0000;
const WRITABLE: u32 = 0x1c_0000;

/// Registers of virtio 1.2, section 4.2.2.
pub(crate) mod register {
    pub(crate) const FEATURES: u32 = 0x20;
    pub(crate) const FEATURES_SELECT: u32 = 0x24;
    pub(crate) const QUEUE_SELECT: u32 = 0x30;
    pub(crate) const QUEUE_SIZE: u32 = 0x38;
    pub(crate) const QUEUE_READY: u32 = 0x44;
    pub(crate) const NOTIFY: u32 = 0x50;
    pub(crate) const STATUS: u32 = 0x70;
    pub(crate) const TABLE: u32 = 0x80;
    pub(crate) const AVAILABLE: u32 = 0x90;
    pub(crate) const USED: u32 = 0xa0;
}

/// Addresses of the parts of a queue, and its number of descriptors.
#[derive(Clone, Copy)]
pub(crate) struct Rings {
    pub(crate) table: u32,
    pub(crate) available: u32,
    pub(crate) used: u32,
    pub(crate) size: u32,
}

impl Rings {
    /// Rings of queue `index`, in separate memory. There is room for an indirect table at offset 0x3000.
    pub(crate) fn of(index: u32, size: u32) -> Self {
        let table = 0x10_0000 + 0x4000 * index;
        let (available, used) = (table + 0x1000, table + 0x2000);
        Self {
            table,
            available,
            used,
            size,
        }
    }
}

/// Device properties that the driver needs.
pub(crate) struct Target {
    pub(crate) queues: Vec<Rings>,
    features: u32,
    /// Beginnings of valid requests.
    pub(crate) requests: Vec<Vec<u8>>,
}

impl Target {
    pub(crate) fn of(device: &impl VirtioDevice, requests: Vec<Vec<u8>>) -> Self {
        let sizes = (0..).zip(device.queue_sizes());
        let queues = sizes.map(|(index, size)| Rings::of(index, u32::from(*size).min(16)));
        // Indirect descriptors and event indexes, where the device offers them.
        let features = device.features() as u32 & (1 << 28 | 1 << 29);
        Self {
            queues: queues.collect(),
            features,
            requests,
        }
    }
}

/// A guest program under construction.
pub(crate) struct Program {
    code: Vec<u8>,
    data: Vec<(u32, Vec<u8>)>,
    next: u32,
}

impl Program {
    /// The code that enters protected mode.
    pub(crate) fn new() -> Self {
        let mut code = vec![0xeb, 0x3e, 0, 0, 0, 0, 0, 0]; // jmp 0x40
        code.extend([0x17, 0, 0x10, 0, 0, 0, 0, 0]); // the GDT's place
        code.extend([0; 8]);
        code.extend([0xff, 0xff, 0, 0, 0, 0x9b, 0xcf, 0]); // code
        code.extend([0xff, 0xff, 0, 0, 0, 0x93, 0xcf, 0]); // data
        code.resize(0x40, 0);
        code.extend([0xfa, 0x66, 0x0f, 0x01, 0x16, 0x08, 0x00]); // cli; lgdt [8]
        code.extend([0x0f, 0x20, 0xc0, 0x0c, 0x01, 0x0f, 0x22, 0xc0]); // mov eax, cr0; or al, 1; mov cr0, eax
        code.extend([0x66, 0xea, 0x57, 0, 0, 0, 8, 0]); // jmp 8:0x57
        assert_eq!(code.len(), 0x57);
        code.extend([0x66, 0xb8, 0x10, 0, 0x8e, 0xd8, 0x8e, 0xc0]); // mov ax, 0x10; mov ds, ax; mov es, ax
        Self {
            code,
            data: Vec::new(),
            next: DATA,
        }
    }

    /// A program whose memory begins with full queues of this target's requests.
    pub(crate) fn filled(target: &Target) -> Self {
        let mut guest = Self::new();
        for rings in &target.queues {
            guest.fill(*rings, &target.requests);
        }
        guest
    }

    fn op(&mut self, code: &[u8], words: &[u32]) {
        self.code.extend(code);
        self.code
            .extend(words.iter().flat_map(|word| word.to_le_bytes()));
    }

    pub(crate) fn store(&mut self, address: u32, value: u32) {
        self.op(&[0xc7, 0x05], &[address, value]);
    }

    pub(crate) fn store16(&mut self, address: u32, value: u16) {
        self.op(&[0x66, 0xc7, 0x05], &[address]);
        self.code.extend(value.to_le_bytes());
    }

    pub(crate) fn store8(&mut self, address: u32, value: u8) {
        self.op(&[0xc6, 0x05], &[address]);
        self.code.push(value);
    }

    /// Reads of one, two and four bytes.
    pub(crate) fn loads(&mut self, address: u32) {
        self.op(&[0xa0], &[address]);
        self.op(&[0x66, 0xa1], &[address]);
        self.op(&[0xa1], &[address]);
    }

    /// in al, port; out port, al; and the same with four bytes.
    pub(crate) fn ports(&mut self, port: u16) {
        self.op(&[0x66, 0xba], &[]);
        self.code.extend(port.to_le_bytes());
        self.op(&[0xec, 0xee, 0xed, 0xef], &[]);
    }

    /// A whole page of memory to a port, by one instruction.
    pub(crate) fn page_to_port(&mut self, port: u16) {
        self.op(&[0xbe], &[0x1000]);
        self.op(&[0xb9], &[0x1000]);
        self.op(&[0x66, 0xba], &[]);
        self.code.extend(port.to_le_bytes());
        self.op(&[0xf3, 0x6e], &[]);
    }

    pub(crate) fn add16(&mut self, address: u32, count: u8) {
        self.op(&[0x66, 0x83, 0x05], &[address]);
        self.code.push(count);
    }

    pub(crate) fn delay(&mut self, rounds: u32) {
        self.op(&[0xb9], &[rounds]);
        self.op(&[0xe2, 0xfe], &[]);
    }

    /// The current position, as a target for jumps.
    pub(crate) fn here(&self) -> u32 {
        self.code.len() as u32
    }

    pub(crate) fn again(&mut self, from: u32) {
        let back = from.wrapping_sub(self.here() + 5);
        self.op(&[0xe9], &[back]);
    }

    pub(crate) fn register(&mut self, register: u32, value: u32) {
        self.store(SLOT + register, value);
    }

    pub(crate) fn notify(&mut self, queue: u32) {
        self.register(register::NOTIFY, queue);
    }

    pub(crate) fn notify_all(&mut self, target: &Target) {
        for queue in 0..target.queues.len() as u32 {
            self.notify(queue);
        }
    }

    /// Initializes the device up to FEATURES_OK.
    pub(crate) fn negotiate(&mut self, target: &Target) {
        for status in [0, 1, 3] {
            self.register(register::STATUS, status);
        }
        for (half, features) in [(0, target.features), (1, 1)] {
            self.register(register::FEATURES_SELECT, half);
            self.register(register::FEATURES, features);
        }
        self.register(register::STATUS, 11);
    }

    pub(crate) fn set_queue(&mut self, index: u32, rings: Rings) {
        self.register(register::QUEUE_SELECT, index);
        self.register(register::QUEUE_SIZE, rings.size);
        self.register(register::TABLE, rings.table);
        self.register(register::AVAILABLE, rings.available);
        self.register(register::USED, rings.used);
        self.register(register::QUEUE_READY, 1);
    }

    /// Initializes the device up to DRIVER_OK.
    pub(crate) fn bring_up(&mut self, target: &Target) {
        self.negotiate(target);
        for (index, rings) in (0..).zip(&target.queues) {
            self.set_queue(index, *rings);
        }
        self.register(register::STATUS, 15);
    }

    pub(crate) fn descriptor(&mut self, table: u32, index: u32, one: Descriptor) {
        let at = table + 16 * index;
        self.store(at, one.address as u32);
        self.store(at + 4, (one.address >> 32) as u32);
        self.store(at + 8, one.len);
        self.store(at + 12, u32::from(one.flags) | u32::from(one.next) << 16);
    }

    fn put(&mut self, address: u32, bytes: &[u8]) {
        self.data.push((address, bytes.to_vec()));
    }

    /// Fills a queue with chains of a request and a page for the reply, until the descriptors are used up.
    pub(crate) fn fill(&mut self, rings: Rings, requests: &[Vec<u8>]) {
        let mut heads = Vec::new();
        for (pair, request) in (0..rings.size / 2).zip(requests.iter().cycle()) {
            let (head, address) = (2 * pair, self.next);
            self.next += (request.len() as u32).next_multiple_of(16).max(16);
            assert!(self.next <= WRITABLE);
            self.put(address, request);
            let next = head as u16 + 1;
            let readable = Descriptor {
                address: address.into(),
                len: request.len() as u32,
                flags: 1,
                next,
            };
            let writable = Descriptor {
                address: WRITABLE.into(),
                len: 4096,
                flags: 2,
                next: 0,
            };
            for (index, one) in [(head, readable), (head + 1, writable)] {
                self.put(rings.table + 16 * index, &one.bytes());
            }
            heads.push(head as u16);
        }
        let entries = heads.iter().cycle().take(rings.size as usize);
        let entries: Vec<u8> = entries.flat_map(|head| head.to_le_bytes()).collect();
        self.put(rings.available + 4, &entries);
    }

    /// Offers `count` more chains if the device has returned all of the queue, and kicks.
    pub(crate) fn refill(&mut self, index: u32, rings: Rings, count: u8) {
        self.op(&[0x66, 0xa1], &[rings.used + 2]);
        self.op(&[0x66, 0x3b, 0x05], &[rings.available + 2]);
        self.op(&[0x75, 8 + 10], &[]); // jne past both
        self.add16(rings.available + 2, count);
        self.notify(index);
    }

    /// Waits until the device has returned all chains of a queue.
    pub(crate) fn wait_for(&mut self, rings: Rings) {
        self.op(&[0x66, 0xa1], &[rings.used + 2]);
        self.op(&[0x66, 0x3b, 0x05], &[rings.available + 2]);
        self.op(&[0x75, 0xf1], &[]);
    }

    /// The guest's memory.
    pub(crate) fn image(self) -> Vec<u8> {
        assert!(self.code.len() < 0x10_0000);
        let mut image = self.code;
        image.resize(MEMORY as usize, 0);
        for (address, bytes) in self.data {
            let address = address as usize;
            image[address..address + bytes.len()].copy_from_slice(&bytes);
        }
        image
    }
}

/// `struct virtq_desc` (section 2.7.5).
#[derive(Clone, Copy, Default)]
pub(crate) struct Descriptor {
    pub(crate) address: u64,
    pub(crate) len: u32,
    pub(crate) flags: u16,
    pub(crate) next: u16,
}

impl Descriptor {
    fn bytes(self) -> Vec<u8> {
        let mut bytes = self.address.to_le_bytes().to_vec();
        bytes.extend(self.len.to_le_bytes());
        bytes.extend(self.flags.to_le_bytes());
        bytes.extend(self.next.to_le_bytes());
        bytes
    }
}
