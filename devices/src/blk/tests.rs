//! Tests of the device with a mock driver: every request, both engines, and faulty drivers.

use super::*;
use crate::test_utils::{Buffer, Driver, MEMORY_SIZE, finishes};
use crate::virtio::Activation;
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::time::{Duration, Instant};
use virtio_bindings::virtio_blk::*;
use vm_memory::{Bytes, GuestAddress};

const BOTH: [IoEngine; 2] = [IoEngine::Auto, IoEngine::Calls];

struct Setup {
    file: tempfile::NamedTempFile,
    device: Block,
    driver: Driver,
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.extend(sector.to_le_bytes());
    bytes
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut bytes = sector.to_le_bytes().to_vec();
    bytes.extend(sectors.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes
}

impl Setup {
    fn new(engine: IoEngine, sectors: u64, options: DiskOptions) -> Self {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(sectors * SECTOR_SIZE).unwrap();
        let disk = Disk::open(file.path(), options).unwrap();
        Self {
            file,
            device: Block::new(disk, 1).unwrap().with_engine(engine),
            driver: Driver::new(64),
        }
    }

    fn active(engine: IoEngine, sectors: u64) -> Self {
        let mut setup = Self::new(engine, sectors, DiskOptions::default());
        setup.activate(setup.device.features());
        setup
    }

    fn activate(&mut self, features: u64) {
        // As drivers do during initialization.
        self.device.read_config(0, &mut [0; 8]);
        self.device
            .activate(Activation {
                memory: self.driver.memory().clone(),
                interrupt: self.driver.recorder().clone(),
                queues: vec![Some(self.driver.queue())],
                features,
            })
            .unwrap();
    }

    /// Sends one request; returns its status, the used length and the data written.
    fn ask(&mut self, readable: &[u8], room: u32) -> (u8, u32, Vec<u8>) {
        // Header and data are split at an unusual position, which must not matter.
        let (first, second) = readable.split_at(readable.len() / 3);
        let head = self.driver.offer(&[
            Buffer::Readable(first.to_vec()),
            Buffer::Readable(second.to_vec()),
            Buffer::Writable(room),
            Buffer::Writable(1),
        ]);
        self.driver.kick();
        let used = self.one_used();
        assert_eq!(used.0, head);
        let mut all = self.driver.written(head, room as usize + 1);
        let status = all.pop().unwrap();
        (status, used.1, all)
    }

    fn one_used(&mut self) -> (u16, u32) {
        let limit = Instant::now() + Duration::from_secs(20);
        loop {
            let mut used = self.driver.used();
            if let Some(one) = used.pop() {
                assert!(used.is_empty());
                return one;
            }
            assert!(Instant::now() < limit, "no answer");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn content(&self) -> Vec<u8> {
        std::fs::read(self.file.path()).unwrap()
    }

    fn count(&self, counter: impl Fn(&BlockMetrics) -> &AtomicU64) -> u64 {
        counter(&self.device.metrics).load(Ordering::Relaxed)
    }
}

#[test]
fn data_goes_to_the_disk_and_comes_back() {
    for engine in BOTH {
        let mut setup = Setup::active(engine, 64);
        let data: Vec<u8> = (0..2048u32).map(|n| n as u8).collect();
        let write = [header(VIRTIO_BLK_T_OUT, 3), data.clone()].concat();
        assert_eq!(setup.ask(&write, 0), (0, 1, vec![]));
        assert_eq!(setup.content()[3 * 512..][..2048], data);
        let read = setup.ask(&header(VIRTIO_BLK_T_IN, 3), 2048);
        assert_eq!(read, (0, 2049, data));
        assert_eq!(setup.ask(&header(VIRTIO_BLK_T_FLUSH, 0), 0).0, 0);
        assert_eq!(setup.count(|m| &m.read_bytes), 2048);
        assert_eq!(setup.count(|m| &m.written_bytes), 2048);
        assert_eq!(setup.count(|m| &m.flushes), 1);
        assert!(setup.driver.interrupted());
    }
}

#[test]
fn many_requests_in_flight_are_each_answered_once() {
    for engine in BOTH {
        let mut setup = Setup::active(engine, 64);
        let mut heads = Vec::new();
        for sector in 0..16 {
            heads.push(setup.driver.offer(&[
                Buffer::Readable(
                    [header(VIRTIO_BLK_T_OUT, sector), vec![sector as u8; 512]].concat(),
                ),
                Buffer::Writable(1),
            ]));
        }
        setup.driver.kick();
        let mut seen = Vec::new();
        let limit = Instant::now() + Duration::from_secs(20);
        while seen.len() < heads.len() && Instant::now() < limit {
            seen.extend(setup.driver.used().into_iter().map(|used| used.0));
        }
        seen.sort_unstable();
        assert_eq!(seen, heads);
        for (sector, bytes) in setup.content().chunks(512).take(16).enumerate() {
            assert!(bytes.iter().all(|byte| usize::from(*byte) == sector));
        }
    }
}

#[test]
fn requests_outside_the_disk_or_of_partial_blocks_fail() {
    for engine in BOTH {
        let mut setup = Setup::active(engine, 8);
        for (sector, room) in [
            (8, 512),
            (7, 1024),
            (u64::MAX, 512),
            (1 << 55, 512),
            (0, 511),
            (0, 0),
        ] {
            let (status, ..) = setup.ask(&header(VIRTIO_BLK_T_IN, sector), room);
            assert_eq!(status, 1, "{sector} {room}");
        }
        let write = [header(VIRTIO_BLK_T_OUT, 7), vec![1; 1024]].concat();
        assert_eq!(setup.ask(&write, 0).0, 1);
        assert_eq!(setup.content(), vec![0; 8 * 512]);
        assert_eq!(setup.ask(&header(99, 0), 0).0, 2);
        assert_eq!(setup.count(|m| &m.errors), 8);
    }
}

#[test]
fn a_truncated_image_is_an_error_and_nothing_else_stops() {
    for engine in BOTH {
        let mut setup = Setup::active(engine, 64);
        setup.file.as_file().set_len(4096).unwrap();
        assert_eq!(setup.ask(&header(VIRTIO_BLK_T_IN, 32), 512).0, 1);
        assert_eq!(setup.ask(&header(VIRTIO_BLK_T_IN, 0), 512).0, 0);
    }
}

#[test]
fn a_chain_without_space_for_a_status_is_returned() {
    for engine in BOTH {
        let mut setup = Setup::active(engine, 8);
        let head = setup
            .driver
            .offer(&[Buffer::Readable(header(VIRTIO_BLK_T_FLUSH, 0))]);
        setup.driver.kick();
        assert_eq!(setup.one_used(), (head, 0));
        let head = setup
            .driver
            .offer(&[Buffer::Readable(vec![0; 3]), Buffer::Writable(1)]);
        setup.driver.kick();
        assert_eq!(setup.one_used(), (head, 0));
        assert_eq!(setup.count(|m| &m.faults), 2);
        assert!(!setup.driver.recorder().needs_reset());
        assert_eq!(setup.ask(&header(VIRTIO_BLK_T_FLUSH, 0), 0).0, 0);
    }
}

#[test]
fn a_read_only_disk_takes_no_writes() {
    let options = DiskOptions {
        read_only: true,
        serial: "koya-0001".into(),
        ..DiskOptions::default()
    };
    let mut setup = Setup::new(IoEngine::Auto, 8, options);
    let features = setup.device.features();
    assert_ne!(features & 1 << VIRTIO_BLK_F_RO, 0);
    assert_eq!(features & 1 << VIRTIO_BLK_F_DISCARD, 0);
    setup.activate(features);
    let write = [header(VIRTIO_BLK_T_OUT, 0), vec![1; 512]].concat();
    assert_eq!(setup.ask(&write, 0).0, 1);
    let discard = [header(VIRTIO_BLK_T_DISCARD, 0), range(0, 8, 0)].concat();
    assert_eq!(setup.ask(&discard, 0).0, 1);
    assert_eq!(setup.ask(&header(VIRTIO_BLK_T_FLUSH, 0), 0).0, 0);
    assert_eq!(setup.ask(&header(VIRTIO_BLK_T_IN, 0), 512).0, 0);
    let (status, used, id) = setup.ask(&header(VIRTIO_BLK_T_GET_ID, 0), 20);
    assert_eq!((status, used), (0, 21));
    assert_eq!(id, [b"koya-0001".as_slice(), &[0; 11]].concat());
}

#[test]
fn discard_frees_space_and_zeroes_are_zero() {
    for engine in BOTH {
        let mut setup = Setup::active(engine, 2048);
        setup
            .file
            .as_file()
            .write_all_at(&[0xff; 1 << 20], 0)
            .unwrap();
        setup.file.as_file().sync_all().unwrap();
        let before = setup.file.as_file().metadata().unwrap().blocks();
        let ranges = [range(0, 512, 0), range(1024, 512, 0)].concat();
        let discard = [header(VIRTIO_BLK_T_DISCARD, 0), ranges].concat();
        let status = setup.ask(&discard, 0).0;
        let zeroes = [header(VIRTIO_BLK_T_WRITE_ZEROES, 0), range(512, 256, 1)].concat();
        let zeroed = setup.ask(&zeroes, 0).0;
        if (status, zeroed) == (2, 2) {
            // The file system of temporary files has no holes here; the driver was notified.
            continue;
        }
        assert_eq!((status, zeroed), (0, 0));
        let content = setup.content();
        assert!(content[..768 * 512].iter().all(|byte| *byte == 0));
        assert!(
            content[768 * 512..1024 * 512]
                .iter()
                .all(|byte| *byte == 0xff)
        );
        assert!(
            content[1024 * 512..1536 * 512]
                .iter()
                .all(|byte| *byte == 0)
        );
        assert!(setup.file.as_file().metadata().unwrap().blocks() < before);
        assert_eq!(setup.count(|m| &m.discards), 2);
    }
}

#[test]
fn wrong_ranges_are_refused() {
    let mut setup = Setup::active(IoEngine::Auto, 64);
    let cases: [(u32, Vec<u8>, u8); 8] = [
        (VIRTIO_BLK_T_DISCARD, range(0, (1 << 17) + 1, 0), 1),
        (VIRTIO_BLK_T_DISCARD, range(60, 8, 0), 1),
        (VIRTIO_BLK_T_DISCARD, range(u64::MAX, 8, 0), 1),
        (VIRTIO_BLK_T_DISCARD, range(0, 0, 0), 1),
        (VIRTIO_BLK_T_DISCARD, range(0, 8, 1), 2),
        (VIRTIO_BLK_T_WRITE_ZEROES, range(0, 8, 2), 2),
        (VIRTIO_BLK_T_WRITE_ZEROES, vec![0; 15], 1),
        (VIRTIO_BLK_T_DISCARD, range(0, 1, 0).repeat(17), 1),
    ];
    for (kind, ranges, wanted) in cases {
        let (status, ..) = setup.ask(&[header(kind, 0), ranges.clone()].concat(), 0);
        assert_eq!(status, wanted, "{kind} {ranges:?}");
    }
}

#[test]
fn a_grown_disk_is_announced() {
    let mut setup = Setup::active(IoEngine::Auto, 8);
    let handle = setup.device.handle();
    handle.refresh().unwrap();
    assert!(!setup.driver.recorder().config_changed());
    setup.file.as_file().set_len(16 * 512).unwrap();
    handle.refresh().unwrap();
    assert!(setup.driver.recorder().config_changed());
    let mut capacity = [0; 8];
    setup.device.read_config(0, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), 16);
    assert_eq!(setup.ask(&header(VIRTIO_BLK_T_IN, 15), 512).0, 0);
}

#[test]
fn a_disk_that_grew_before_activation_is_announced() {
    let mut setup = Setup::new(IoEngine::Auto, 8, DiskOptions::default());
    setup.device.read_config(0, &mut [0; 8]);
    setup.file.as_file().set_len(16 * 512).unwrap();
    let handle = setup.device.handle();
    handle.refresh().unwrap();
    let features = setup.device.features();
    setup
        .device
        .activate(Activation {
            memory: setup.driver.memory().clone(),
            interrupt: setup.driver.recorder().clone(),
            queues: vec![Some(setup.driver.queue())],
            features,
        })
        .unwrap();
    assert!(setup.driver.recorder().config_changed());
    // A handle does not keep the image open.
    let path = setup.file.path().to_owned();
    drop(setup.device);
    assert_eq!(handle.sectors(), 0);
    assert!(Disk::open(&path, DiskOptions::default()).is_ok());
}

#[test]
fn the_configuration_has_the_layout_of_the_specification() {
    let setup = Setup::new(IoEngine::Auto, 8, DiskOptions::default());
    assert_eq!(size_of::<Config>(), 60);
    let field = |offset| {
        let mut word = [0; 4];
        setup.device.read_config(offset, &mut word);
        u32::from_le_bytes(word)
    };
    assert_eq!(field(0), 8);
    assert_eq!(field(12), 254);
    assert_eq!(field(20), 512);
    assert_eq!(field(32) >> 16, 1);
    assert_eq!(field(36), 1 << 17);
    assert_eq!(field(40), 16);
    assert_eq!(field(52), 16);
    assert_eq!(field(56), 1);
}

#[test]
fn a_reset_ends_the_threads_and_the_device_starts_again() {
    for engine in BOTH {
        let mut setup = Setup::active(engine, 8);
        assert_eq!(setup.ask(&header(VIRTIO_BLK_T_IN, 0), 512).0, 0);
        setup.device.reset(None);
        assert!(setup.device.threads.is_empty());
        setup.driver = Driver::new(64);
        setup.activate(setup.device.features());
        assert_eq!(setup.ask(&header(VIRTIO_BLK_T_IN, 1), 512).0, 0);
    }
}

#[test]
fn a_limited_disk_is_slow_and_can_still_be_stopped() {
    for engine in BOTH {
        let mut setup = Setup::new(engine, 8, DiskOptions::default());
        setup.device = setup.device.with_limits(RateLimits {
            operations: Some(crate::rate_limit::Rate {
                per_second: 1,
                burst: Some(1),
            }),
            bytes: None,
        });
        setup.activate(setup.device.features());
        assert_eq!(setup.ask(&header(VIRTIO_BLK_T_IN, 0), 512).0, 0);
        let read = [
            Buffer::Readable(header(VIRTIO_BLK_T_IN, 0)),
            Buffer::Writable(513),
        ];
        setup.driver.offer(&read);
        setup.driver.kick();
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(setup.driver.used(), []);
        setup.device.reset(None);
    }
}

/// With direct I/O, misaligned memory works too.
#[test]
fn direct_io_works_with_misaligned_memory() {
    let dir = std::env::var("CARGO_TARGET_TMPDIR").unwrap_or_else(|_| "/var/tmp".into());
    let path = Path::new(&dir).join(format!("koya-direct-{}", std::process::id()));
    let mut file = std::fs::File::create(&path).unwrap();
    file.write_all(&[7; 8192]).unwrap();
    let options = DiskOptions {
        direct: true,
        ..DiskOptions::default()
    };
    for engine in BOTH {
        let disk = match Disk::open(&path, options.clone()) {
            Ok(disk) => disk,
            Err(error) => {
                eprintln!("no direct I/O in {dir}: {error}");
                break;
            }
        };
        assert!(disk.block_size().is_power_of_two() && disk.block_size() <= 4096);
        let mut setup = Setup::new(engine, 8, DiskOptions::default());
        setup.device = Block::new(disk, 1).unwrap().with_engine(engine);
        setup.activate(setup.device.features());
        // Not aligned: preceded by the 16-byte header.
        let (status, _, data) = setup.ask(&header(VIRTIO_BLK_T_IN, 8), 4096);
        assert_eq!((status, data), (0, vec![7; 4096]));
        let write = [header(VIRTIO_BLK_T_OUT, 0), vec![8; 4096]].concat();
        assert_eq!(setup.ask(&write, 0).0, 0);
    }
    let mut content = Vec::new();
    std::fs::File::open(&path)
        .unwrap()
        .read_to_end(&mut content)
        .unwrap();
    std::fs::remove_file(&path).unwrap();
    assert!(content[4096..].iter().all(|byte| *byte == 7));
}

/// Each request is refused at once, and the next one is always available.
#[test]
fn a_full_queue_does_not_delay_a_stop() {
    for engine in BOTH {
        let mut setup = Setup::active(engine, 8);
        let flood = setup
            .driver
            .flood(&[Buffer::Readable(header(99, 0)), Buffer::Writable(1)]);
        setup.driver.kick();
        std::thread::sleep(Duration::from_millis(50));
        let mut device = setup.device;
        finishes(move || device.reset(None));
        drop(flood);
        assert!(!setup.driver.used().is_empty());
    }
}

/// Reads in flight on the host may complete after the driver has requested a reset, but not after the reset
/// is complete.
#[test]
fn a_reset_with_requests_in_flight_ends_memory_accesses() {
    const SECTORS: u64 = 64 << 10;
    for (round, engine) in [IoEngine::Auto; 12].into_iter().chain(BOTH).enumerate() {
        let mut setup = Setup::new(engine, SECTORS, DiskOptions::default());
        let file = setup.file.as_file();
        file.write_all_at(&vec![7; (SECTORS * SECTOR_SIZE) as usize], 0)
            .unwrap();
        setup.driver = Driver::new(256);
        setup.activate(setup.device.features());
        // As much as fits into memory at once: 80 requests of 128 KiB.
        let parts = [
            Buffer::Readable(Vec::new()),
            Buffer::Writable(128 << 10),
            Buffer::Writable(1),
        ];
        let heads: Vec<u16> = (0..80_u64)
            .map(|n| {
                // Scattered over the file, so that reads are not sequential.
                let sector = (n * 37 % 80) * 256;
                let mut parts = parts.clone();
                parts[0] = Buffer::Readable(header(VIRTIO_BLK_T_IN, sector));
                setup.driver.offer(&parts)
            })
            .collect();
        setup.driver.kick();
        // At different times: none, some or all of them have started.
        std::thread::sleep(Duration::from_micros(150 * round as u64));
        setup.device.reset(None);
        let memory = setup.driver.memory().clone();
        let data = GuestAddress(0x10_0000);
        let blank = vec![0xee; MEMORY_SIZE - 0x10_0000];
        memory.write_slice(&blank, data).unwrap();
        let used = setup.driver.used().len();
        std::thread::sleep(Duration::from_millis(20));
        let mut after = vec![0; blank.len()];
        memory.read_slice(&mut after, data).unwrap();
        assert!(after == blank, "written after the reset");
        assert_eq!(setup.driver.used(), [], "{used} of {}", heads.len());
        // The next driver finds a working device.
        setup.driver = Driver::new(64);
        setup.activate(setup.device.features());
        let read = setup.ask(&header(VIRTIO_BLK_T_IN, 1), 512);
        assert_eq!(read, (0, 513, vec![7; 512]));
    }
}
