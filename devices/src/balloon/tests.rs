use super::*;
use crate::test_utils::{Buffer, Driver};
use vm_memory::Bytes;

/// An address without other test data.
const TEST_DATA: u64 = 8 << 20;

struct Setup {
    balloon: Balloon,
    drivers: [Driver; 4],
    worker: BalloonWorker,
}

fn setup() -> Setup {
    // The queues of a device share its memory. Each driver has its own layout, so a test uses only one of
    // them.
    let drivers = [0; 4].map(|_| Driver::new(16));
    let balloon = Balloon::new().unwrap();
    let worker = BalloonWorker {
        shared: balloon.shared.clone(),
        inflate: drivers[0].queue(),
        deflate: drivers[1].queue(),
        statistics: Some(drivers[2].queue()),
        reporting: Some(drivers[3].queue()),
    };
    Setup {
        balloon,
        drivers,
        worker,
    }
}

fn frames(frames: &[u32]) -> Buffer {
    Buffer::Readable(
        frames
            .iter()
            .flat_map(|frame| frame.to_le_bytes())
            .collect(),
    )
}

fn filled(driver: &Driver, page: u64) -> bool {
    let byte: u8 = driver
        .memory()
        .read_obj(GuestAddress(TEST_DATA + page * PAGE_SIZE + 77))
        .unwrap();
    byte == 0xaa
}

fn fill(driver: &Driver) {
    let bytes = vec![0xaa; 8 * PAGE_SIZE as usize];
    driver
        .memory()
        .write_slice(&bytes, GuestAddress(TEST_DATA))
        .unwrap();
}

#[test]
fn inflated_pages_are_discarded_and_others_are_kept() {
    let mut setup = setup();
    fill(&setup.drivers[0]);
    let first = (TEST_DATA / PAGE_SIZE) as u32;
    let head = setup.drivers[0].offer(&[frames(&[first + 3, first + 2, first + 5])]);
    setup.worker.serve().unwrap();
    assert_eq!(setup.drivers[0].used(), [(head, 0)]);
    let left: Vec<u64> = (0..8)
        .filter(|page| filled(&setup.drivers[0], *page))
        .collect();
    assert_eq!(left, [0, 1, 4, 6, 7]);
    let metrics = setup.balloon.handle();
    assert_eq!(
        metrics.metrics().inflated_bytes.load(Ordering::Relaxed),
        3 * PAGE_SIZE
    );
}

#[test]
fn ranges_outside_memory_are_ignored() {
    let mut setup = setup();
    for list in [
        vec![u32::MAX, 1 << 20],
        vec![0x1000; MAX_FRAMES as usize + 1],
    ] {
        let head = setup.drivers[0].offer(&[frames(&list)]);
        setup.worker.serve().unwrap();
        assert_eq!(setup.drivers[0].used(), [(head, 0)]);
    }
    assert_eq!(
        setup.balloon.shared.metrics.faults.load(Ordering::Relaxed),
        3
    );
}

#[test]
fn reported_memory_is_discarded_in_whole_pages() {
    let mut setup = setup();
    let driver = &mut setup.drivers[3];
    fill(driver);
    // Two pages plus parts of the adjacent ones, which no correct driver reports.
    driver.set_descriptor(
        0,
        TEST_DATA + PAGE_SIZE - 100,
        2 * PAGE_SIZE as u32 + 200,
        2,
        0,
    );
    driver.make_available(0);
    setup.worker.serve().unwrap();
    let left: Vec<u64> = (0..8)
        .filter(|page| filled(&setup.drivers[3], *page))
        .collect();
    assert_eq!(left, [0, 3, 4, 5, 6, 7]);
}

#[test]
fn statistics_are_read_and_requested_again() {
    let mut setup = setup();
    let entry = |tag: u16, value: u64| {
        let mut bytes = tag.to_le_bytes().to_vec();
        bytes.extend(value.to_le_bytes());
        bytes
    };
    let known = [entry(S_MEMFREE, 1 << 20), entry(999, 7)].concat();
    let head = setup.drivers[2].offer(&[Buffer::Readable(known)]);
    setup.worker.serve().unwrap();
    let handle = setup.balloon.handle();
    assert_eq!(handle.statistics().free, Some(1 << 20));
    assert_eq!(handle.statistics().total, None);
    assert_eq!(setup.drivers[2].used(), [], "it is held");
    setup.worker.return_statistics_buffer().unwrap();
    assert_eq!(setup.drivers[2].used(), [(head, 0)]);
}

#[test]
fn the_target_is_announced_and_the_actual_size_is_kept() {
    let mut setup = setup();
    let handle = setup.balloon.handle();
    *lock(&setup.balloon.shared.interrupt) = Some(setup.drivers[0].recorder().clone());
    handle.set_target(10 * PAGE_SIZE + 1);
    assert!(setup.drivers[0].recorder().config_changed());
    let mut word = [0; 4];
    setup.balloon.read_config(0, &mut word);
    assert_eq!(word, [10, 0, 0, 0]);
    setup.balloon.write_config(4, &[7, 0, 0, 0]);
    setup.balloon.write_config(0, &[9, 0, 0, 0]);
    setup.balloon.write_config(4, &[9]);
    assert_eq!(
        (handle.actual(), handle.target()),
        (7 * PAGE_SIZE, 10 * PAGE_SIZE)
    );
}
