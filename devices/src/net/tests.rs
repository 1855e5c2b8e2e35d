//! Tests of the device with a mock driver, and a socket pair instead of a tap.

use super::*;
use crate::test_utils::{Buffer, Driver, finishes};
use crate::virtio::Activation;
use crate::virtio::registers::{ConfigSpace, RegisterPages};
use rustix::net::{AddressFamily, SocketFlags, SocketType, recv, send};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_CONFIG;

struct Setup {
    device: Net,
    receive: Driver,
    send: Driver,
    host: OwnedFd,
}

const MAC: MacAddr = MacAddr([2, 0, 0, 1, 2, 3]);
const MERGEABLE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
const LARGE: u64 = MERGEABLE | 1 << VIRTIO_NET_F_GUEST_TSO4;

fn options() -> NetOptions {
    NetOptions {
        mac: MAC,
        mtu: Some(1400),
        send_limits: RateLimits::default(),
        receive_limits: RateLimits::default(),
    }
}

fn device(options: NetOptions) -> (Net, OwnedFd) {
    let (ours, host) = rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .unwrap();
    let tap = Tap::from_queues("test", vec![ours]).unwrap();
    (Net::new(tap, options).unwrap(), host)
}

impl Setup {
    fn new(features: u64, options: NetOptions) -> Self {
        let (device, host) = device(options);
        let mut setup = Self {
            device,
            receive: Driver::new(256),
            send: Driver::new(256),
            host,
        };
        setup
            .device
            .activate(Activation {
                memory: setup.send.memory().clone(),
                interrupt: setup.send.recorder().clone(),
                queues: vec![Some(setup.receive.queue()), Some(setup.send.queue())],
                features,
            })
            .unwrap();
        setup
    }

    fn host_sends(&self, frame: &[u8]) {
        let message = [vec![0; HEADER_SIZE], frame.to_vec()].concat();
        send(&self.host, &message, rustix::net::SendFlags::empty()).unwrap();
    }

    fn host_receives(&self) -> Vec<u8> {
        let mut message = vec![0; 80_000];
        let (len, _) = recv(
            &self.host,
            message.as_mut_slice(),
            rustix::net::RecvFlags::empty(),
        )
        .unwrap();
        message.truncate(len);
        message
    }
}

fn used(driver: &mut Driver, count: usize) -> Vec<(u16, u32)> {
    let limit = Instant::now() + Duration::from_secs(20);
    let mut all = Vec::new();
    while all.len() < count {
        all.extend(driver.used());
        assert!(Instant::now() < limit, "{all:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
    all
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|n| (n % 251) as u8).collect()
}

#[test]
fn a_frame_from_the_guest_reaches_the_host_unchanged() {
    let mut setup = Setup::new(MERGEABLE, options());
    for len in [60, 1514, 65_549] {
        let message = [vec![0; HEADER_SIZE], pattern(len)].concat();
        let (first, second) = message.split_at(len / 2);
        let head = setup.send.offer(&[
            Buffer::Readable(first.to_vec()),
            Buffer::Readable(second.to_vec()),
        ]);
        setup.send.kick();
        assert_eq!(setup.host_receives(), message);
        assert_eq!(used(&mut setup.send, 1), [(head, 0)]);
    }
    let metrics = setup.device.handle();
    assert_eq!(metrics.metrics().sent_frames.load(Ordering::Relaxed), 3);
    assert!(setup.send.interrupted());
}

#[test]
fn a_large_frame_fills_as_many_buffers_as_it_needs() {
    let mut setup = Setup::new(LARGE, options());
    let heads: Vec<u16> = (0..60)
        .map(|_| setup.receive.offer(&[Buffer::Writable(1536)]))
        .collect();
    setup.receive.kick();
    let frame = pattern(20_000);
    setup.host_sends(&frame);
    // 20,012 bytes with the header: thirteen full buffers and 44 bytes.
    let got = used(&mut setup.receive, 14);
    assert_eq!(got.len(), 14);
    let mut message = Vec::new();
    for ((head, len), wanted) in got.iter().zip(&heads) {
        assert_eq!(head, wanted);
        message.extend(setup.receive.written(*head, *len as usize));
    }
    assert_eq!(message[NUM_BUFFERS_OFFSET as usize..][..2], [14, 0]);
    assert_eq!(message[HEADER_SIZE..], frame);
    // The next frame goes to the next buffer, and no buffer is used twice.
    setup.receive.offer(&[Buffer::Writable(30_000)]);
    setup.receive.kick();
    setup.host_sends(&pattern(60));
    assert_eq!(used(&mut setup.receive, 1), [(heads[14], 72)]);
}

#[test]
fn without_mergeable_buffers_each_frame_has_one() {
    let mut setup = Setup::new(0, options());
    let first = setup
        .receive
        .offer(&[Buffer::Writable(12), Buffer::Writable(1514)]);
    let second = setup.receive.offer(&[Buffer::Writable(1526)]);
    setup.receive.kick();
    setup.host_sends(&pattern(1000));
    setup.host_sends(&pattern(60));
    assert_eq!(used(&mut setup.receive, 2), [(first, 1012), (second, 72)]);
    let header = setup.receive.written(first, 12);
    assert_eq!(header[NUM_BUFFERS_OFFSET as usize..], [1, 0]);
}

#[test]
fn frames_wait_until_the_guest_has_buffers() {
    let mut setup = Setup::new(LARGE, options());
    setup.host_sends(&pattern(100));
    std::thread::sleep(Duration::from_millis(20));
    let heads: Vec<u16> = (0..2)
        .map(|_| setup.receive.offer(&[Buffer::Writable(40_000)]))
        .collect();
    setup.receive.kick();
    assert_eq!(used(&mut setup.receive, 1), [(heads[0], 112)]);
}

#[test]
fn buffers_without_room_for_a_header_come_back_empty() {
    let mut setup = Setup::new(MERGEABLE, options());
    let short = setup.receive.offer(&[Buffer::Writable(11)]);
    setup.receive.kick();
    assert_eq!(used(&mut setup.receive, 1), [(short, 0)]);
    let short = setup.send.offer(&[Buffer::Readable(vec![0; HEADER_SIZE])]);
    setup.send.kick();
    assert_eq!(used(&mut setup.send, 1), [(short, 0)]);
    let handle = setup.device.handle();
    assert_eq!(handle.metrics().faults.load(Ordering::Relaxed), 2);
    assert!(!setup.send.recorder().needs_reset());
}

#[test]
fn a_link_that_is_down_drops_frames_and_is_announced() {
    let mut setup = Setup::new(MERGEABLE, options());
    let handle = setup.device.handle();
    let page = RegisterPages::new(1).unwrap().page(0).unwrap();
    setup.device.publish_config(ConfigSpace::of(&page));
    // The last two bytes of the MAC address, then the status.
    let status = || page.load(VIRTIO_MMIO_CONFIG + 4) >> 16;
    assert_eq!(status(), VIRTIO_NET_S_LINK_UP);
    handle.set_link(false);
    assert!(setup.send.recorder().config_changed());
    assert_eq!(status(), 0);
    let message = vec![1; 100];
    let head = setup.send.offer(&[Buffer::Readable(message.clone())]);
    setup.send.kick();
    assert_eq!(used(&mut setup.send, 1), [(head, 0)]);
    assert_eq!(handle.metrics().sent_drops.load(Ordering::Relaxed), 1);
    handle.set_link(true);
    assert_eq!(status(), VIRTIO_NET_S_LINK_UP);
    setup.send.offer(&[Buffer::Readable(message.clone())]);
    setup.send.kick();
    assert_eq!(setup.host_receives(), message);
}

#[test]
fn the_configuration_has_address_status_and_mtu() {
    let (device, _host) = device(options());
    let mut bytes = [0xff; 14];
    device.read_config(0, &mut bytes);
    assert_eq!(bytes, [2, 0, 0, 1, 2, 3, 1, 0, 1, 0, 0x78, 5, 0, 0]);
    assert_ne!(device.features() & 1 << VIRTIO_NET_F_MTU, 0);
    assert_eq!(device.features() & 1 << VIRTIO_NET_F_MQ, 0);
}

#[test]
fn a_limit_slows_what_is_sent() {
    let rate = crate::rate_limit::Rate {
        per_second: 50,
        burst: Some(1),
    };
    let mut setup = Setup::new(
        MERGEABLE,
        NetOptions {
            send_limits: RateLimits {
                operations: Some(rate),
                bytes: None,
            },
            ..options()
        },
    );
    let started = Instant::now();
    for _ in 0..6 {
        setup.send.offer(&[Buffer::Readable(vec![0; 100])]);
    }
    setup.send.kick();
    used(&mut setup.send, 6);
    assert!(started.elapsed() >= Duration::from_millis(80));
}

#[test]
fn a_host_that_hangs_up_takes_the_link_down() {
    let mut setup = Setup::new(MERGEABLE, options());
    let handle = setup.device.handle();
    setup.receive.offer(&[Buffer::Writable(4000)]);
    setup.receive.kick();
    let (_, gone) = rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .unwrap();
    setup.host = gone;
    let limit = Instant::now() + Duration::from_secs(20);
    while handle.link() {
        assert!(Instant::now() < limit);
        std::thread::sleep(Duration::from_millis(1));
    }
    drop(setup);
    assert_eq!(handle.tap_name(), "test");
}

#[test]
fn without_segments_small_buffers_are_enough() {
    let mut setup = Setup::new(MERGEABLE, options());
    let head = setup.receive.offer(&[Buffer::Writable(1600)]);
    setup.receive.kick();
    setup.host_sends(&pattern(1000));
    assert_eq!(used(&mut setup.receive, 1), [(head, 1012)]);
}

#[test]
fn udp_segments_are_asked_for_in_pairs() {
    let one = 1 << VIRTIO_NET_F_GUEST_USO4;
    assert_eq!(offloads(one), 0);
    let both = one | 1 << VIRTIO_NET_F_GUEST_USO6;
    assert_eq!(offloads(both), offload::USO4 | offload::USO6);
    let (device, _host) = device(options());
    assert_eq!(device.features() & both, 0, "a socket has none");
}

#[test]
fn a_reset_ends_the_threads() {
    let mut setup = Setup::new(MERGEABLE, options());
    setup.device.reset(None);
    assert!(setup.device.threads.is_empty());
    setup.host_sends(&pattern(60));
    assert_eq!(setup.receive.used(), []);
}

#[test]
fn addresses_are_parsed() {
    assert_eq!("02:00:00:01:02:03".parse(), Ok(MAC));
    assert_eq!(MAC.to_string(), "02:00:00:01:02:03");
    for bad in [
        "",
        "02:00:00:01:02",
        "02:00:00:01:02:03:04",
        "03:00:00:00:00:00",
        "2:0:0:0:0:0",
    ] {
        assert!(bad.parse::<MacAddr>().is_err(), "{bad}");
    }
    assert_eq!(MacAddr::random().unwrap().0[0] & 3, 2);
}

#[test]
fn a_restored_network_continues() {
    let (mut device, host) = device(options());
    let (mut receive, sender) = (Driver::new(256), Driver::new(256));
    let heads: Vec<u16> = (0..4)
        .map(|_| receive.offer(&[Buffer::Writable(2048)]))
        .collect();
    let start = |device: &mut Net, receive: &Driver, at: (u16, u16)| {
        let queue = receive.queue_at(at);
        let position = queue.position();
        let activation = Activation {
            memory: receive.memory().clone(),
            interrupt: receive.recorder().clone(),
            queues: vec![Some(queue), Some(sender.queue())],
            features: MERGEABLE,
        };
        device.activate(activation).unwrap();
        position
    };
    let wait = |receive: &mut Driver, head: u16| {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            match receive.used()[..] {
                [(done, _)] => return assert_eq!(done, head),
                _ => assert!(Instant::now() < deadline, "no frame"),
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    };
    let frame = [&[0; HEADER_SIZE][..], b"a frame of the host's"].concat();
    let position = start(&mut device, &receive, (0, 0));
    send(&host, &frame, rustix::net::SendFlags::empty()).unwrap();
    wait(&mut receive, heads[0]);

    let state = device.save().unwrap();
    device.stop(None);
    // Buffers that the device had taken return to the driver.
    assert_eq!(position.get(), (1, 1));
    send(&host, &frame, rustix::net::SendFlags::empty()).unwrap();
    device.restore(&state).unwrap();
    assert_eq!(device.save().unwrap(), state);
    start(&mut device, &receive, position.get());
    wait(&mut receive, heads[1]);

    device.reset(None);
    let other = NetOptions {
        mtu: None,
        ..options()
    };
    let refused = self::device(other).0.restore(&state);
    assert!(matches!(refused, Err(StateError::Mismatch(_))));
}

/// Each buffer is too short, and the next one is always available.
#[test]
fn a_full_queue_does_not_delay_a_stop() {
    let mut setup = Setup::new(MERGEABLE, options());
    // In many parts, so that the device takes longer than the driver.
    let buffers = setup
        .receive
        .flood(&vec![Buffer::Writable(1); HEADER_SIZE - 1]);
    setup.receive.kick();
    std::thread::sleep(Duration::from_millis(50));
    let mut device = setup.device;
    finishes(move || device.reset(None));
    drop(buffers);
    assert!(!setup.receive.used().is_empty());
}

/// The device keeps buffers until there are enough for a frame. A driver that offers useless ones again and again, before it
/// gets them back, must not make it keep all of them.
#[test]
fn buffers_offered_again_and_again_are_not_collected() {
    let mut setup = Setup::new(MERGEABLE, options());
    let handle = setup.device.handle();
    let kept = || handle.metrics().faults.load(Ordering::Relaxed);
    let is_broken = |setup: &Setup| setup.send.recorder().needs_reset();
    let limit = Instant::now() + Duration::from_secs(20);
    setup.receive.offer(&[Buffer::Writable(HEADER_SIZE as u32)]);
    let useless = setup.receive.offer(&[Buffer::Writable(1)]);
    let mut offered = 1;
    // More than the queue has descriptors.
    while offered < 1000 && !is_broken(&setup) {
        setup.receive.kick();
        while kept() < offered && !is_broken(&setup) {
            assert!(Instant::now() < limit, "{offered} offered, {} kept", kept());
            std::thread::sleep(Duration::from_millis(1));
        }
        for _ in 0..64 {
            setup.receive.make_available(useless);
        }
        offered += 64;
    }
    assert!(is_broken(&setup), "{} are kept", kept());
    assert_eq!(setup.receive.used(), []);
    assert!(kept() < 256, "{} are kept", kept());
}
