//! Networks: virtio 1.2, section 5.1, connected to a tap interface on the host.
//!
//! | part | contents |
//! |---|---|
//! | [`Net`] | the device: features, configuration space, threads |
//! | [`Tap`] | the tap interface |
//! | `queue_pair` | one thread per queue pair: frames to and from the tap |
//! | `control` | the control queue (section 5.1.6.5): number of pairs in use |
//!
//! **Offloads.** The tap uses virtio-net headers (IFF_VNET_HDR), so each frame passes with its header
//! unchanged, by one system call and without a copy in this process. Checksums may be partial, and TCP or UDP
//! segments of up to 64 KiB pass unsegmented in both directions. The features that the guest's driver accepts
//! (`GUEST_CSUM`, `GUEST_TSO4`, ...) are set on the tap (TUNSETOFFLOAD); the host accepts all offloads from
//! the guest. The host kernel validates header and frame as for any tap.
//!
//! **Receiving.** With mergeable buffers (`MRG_RXBUF`, section 5.1.6.4) the thread reads into as many buffers
//! as the largest frame needs and returns the filled ones all at once. While the guest has no
//! buffers, frames wait in the tap's queue, and the host drops those that do not fit.
//!
//! **Link.** [`NetHandle::set_link`] takes the link down or up; the driver is notified through the
//! configuration space (section 5.1.4). The removal of the tap takes it down for good.
//!
//! **Limits**: an optional [rate limit](crate::rate_limit) in each direction. Buffers too short for a header
//! are returned empty.

mod control;
mod queue_pair;
mod tap;

#[cfg(test)]
mod tests;

use crate::rate_limit::{RateLimiter, RateLimits};
use crate::virtio::registers::{ConfigSpace, PublishedConfig};
use crate::virtio::{
    ActivateError, Activation, COMMON_FEATURES, DeviceKind, Interrupt, Payload, Schema, StateError,
    VirtioDevice, Worker,
};
use event_manager::MutEventSubscriber;
use koya_host::sync::lock;
use koya_host::threads::{Role, Threads};
use koya_host::walls::Filter;
use queue_pair::QueuePair;
use serde::{Deserialize, Serialize};
use std::io;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use virtio_bindings::virtio_net::*;
use zerocopy::little_endian::U16;
use zerocopy::{Immutable, IntoBytes};

pub use tap::{Tap, offload};

/// Maximum number of queue pairs.
pub const MAX_PAIRS: u16 = 8;
/// Minimum MTU: that of IPv4 (RFC 791).
pub const MIN_MTU: u16 = 68;

/// Size of `struct virtio_net_hdr_v1` (section 5.1.6), with which each frame begins.
const HEADER_SIZE: usize = 12;
/// Offset of its number of buffers.
const NUM_BUFFERS_OFFSET: u32 = 10;
const QUEUE_SIZE: u16 = 256;
const CONTROL_QUEUE_SIZE: u16 = 64;

const ROLE: Role = Role::new("koya-net")
    .guest_facing()
    .confined_by(Filter::Net);

/// A MAC address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddr(pub [u8; 6]);

impl MacAddr {
    /// A random, locally administered unicast address.
    ///
    /// # Errors
    /// If the host has no random numbers.
    pub fn random() -> io::Result<Self> {
        let mut bytes = [0; 6];
        rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
        bytes[0] = bytes[0] & !1 | 2;
        Ok(Self(bytes))
    }
}

impl FromStr for MacAddr {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not a MAC address (aa:bb:cc:dd:ee:ff)");
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2);
            let value = part.and_then(|part| u8::from_str_radix(part, 16).ok());
            *byte = value.ok_or_else(wrong)?;
        }
        if parts.next().is_some() || bytes[0] & 1 != 0 {
            return Err(wrong());
        }
        Ok(Self(bytes))
    }
}

impl std::fmt::Display for MacAddr {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl TryFrom<String> for MacAddr {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<MacAddr> for String {
    fn from(address: MacAddr) -> Self {
        address.to_string()
    }
}

/// Metrics of a network device. "Received" means received by the guest.
#[derive(Debug, Default, Serialize)]
pub struct NetMetrics {
    /// Frames to the guest.
    pub received_frames: AtomicU64,
    /// Bytes to the guest.
    pub received_bytes: AtomicU64,
    /// Frames from the guest.
    pub sent_frames: AtomicU64,
    /// Bytes from the guest.
    pub sent_bytes: AtomicU64,
    /// Frames to the guest that were dropped because the link was down.
    pub received_drops: AtomicU64,
    /// Frames from the guest that were dropped: link down, queue full, invalid header.
    pub sent_drops: AtomicU64,
    /// Buffers too short for a header.
    pub faults: AtomicU64,
}

/// State shared by a device, its threads and its owner's handles. It does not include the tap, which is
/// closed with the device even if handles remain.
struct Shared {
    tap_name: String,
    link: AtomicBool,
    /// The fields of the configuration space other than the link state.
    fixed: Config,
    published: PublishedConfig,
    metrics: NetMetrics,
    interrupt: Mutex<Option<Arc<dyn Interrupt>>>,
}

impl Shared {
    fn set_link(&self, up: bool) {
        if self.change_link(up)
            && let Some(interrupt) = &*lock(&self.interrupt)
        {
            interrupt.config();
        }
    }

    /// Sets the link state; returns whether it changed.
    fn change_link(&self, up: bool) -> bool {
        let change = || self.link.swap(up, Ordering::SeqCst) != up;
        self.published.change(change, || self.config())
    }

    fn link(&self) -> bool {
        self.link.load(Ordering::Relaxed)
    }

    fn config(&self) -> Vec<u8> {
        let status = match self.link() {
            true => VIRTIO_NET_S_LINK_UP,
            false => 0,
        };
        let config = Config {
            status: U16::new(status as u16),
            ..self.fixed
        };
        config.as_bytes().to_vec()
    }
}

fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}

/// `struct virtio_net_config` (section 5.1.4), up to the last field that the device offers.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Config {
    mac: [u8; 6],
    status: U16,
    max_virtqueue_pairs: U16,
    mtu: U16,
}

/// Options of a network device.
#[derive(Clone, Debug)]
pub struct NetOptions {
    /// MAC address of the guest.
    pub mac: MacAddr,
    /// MTU in bytes, [`MIN_MTU`] or more; `None` leaves it to the guest (1500).
    pub mtu: Option<u16>,
    /// Rate limits for frames that the guest sends.
    pub send_limits: RateLimits,
    /// Rate limits for frames that the guest receives.
    pub receive_limits: RateLimits,
}

/// The network device.
pub struct Net {
    options: NetOptions,
    tap: Arc<Tap>,
    shared: Arc<Shared>,
    /// For receiving and sending; kept over a reset of the driver, which must not refill the buckets.
    limiters: [Arc<Mutex<RateLimiter>>; 2],
    /// For changes of the number of pairs.
    changes: Arc<Mutex<RateLimiter>>,
    queue_sizes: Vec<u16>,
    threads: Threads,
    /// Number of pairs in use when a driver starts or resumes.
    first_pairs: usize,
}

/// Controls a network device while the guest uses it.
#[derive(Clone)]
pub struct NetHandle {
    shared: Arc<Shared>,
}

impl NetHandle {
    /// Takes the link up or down.
    pub fn set_link(&self, up: bool) {
        self.shared.set_link(up);
    }

    /// Whether the link is up.
    pub fn link(&self) -> bool {
        self.shared.link()
    }

    /// Name of the tap interface.
    pub fn tap_name(&self) -> &str {
        &self.shared.tap_name
    }

    /// Metrics of the device.
    pub fn metrics(&self) -> &NetMetrics {
        &self.shared.metrics
    }
}

impl Net {
    /// A device for `tap`, with one queue pair for each queue of the tap.
    ///
    /// # Errors
    /// If the host has no file descriptor left.
    pub fn new(tap: Tap, options: NetOptions) -> io::Result<Self> {
        let pairs = tap.queues().len();
        let mut queue_sizes = vec![QUEUE_SIZE; 2 * pairs];
        if pairs > 1 {
            queue_sizes.push(CONTROL_QUEUE_SIZE);
        }
        let limiters = [options.receive_limits, options.send_limits]
            .map(|limits| Arc::new(Mutex::new(RateLimiter::new(limits))));
        let fixed = Config {
            mac: options.mac.0,
            status: U16::new(0),
            max_virtqueue_pairs: U16::new(pairs as u16),
            mtu: U16::new(options.mtu.unwrap_or(0)),
        };
        Ok(Self {
            options,
            limiters,
            changes: control::limiter(),
            shared: Arc::new(Shared {
                tap_name: tap.name().to_owned(),
                link: AtomicBool::new(true),
                fixed,
                published: PublishedConfig::default(),
                metrics: NetMetrics::default(),
                interrupt: Mutex::new(None),
            }),
            tap: Arc::new(tap),
            queue_sizes,
            threads: Threads::new(ROLE)?,
            first_pairs: 1,
        })
    }

    /// A handle for the owner.
    pub fn handle(&self) -> NetHandle {
        NetHandle {
            shared: self.shared.clone(),
        }
    }

    fn start(&mut self, mut activation: Activation) -> Result<Worker, ActivateError> {
        let host = |source| ActivateError::Host {
            operation: "start a network's threads",
            source,
        };
        let features = activation.features;
        let has = |bit: u32| features & (1 << bit) != 0;
        let room = queue_pair::BufferNeeds::of(features, self.options.mtu);
        let several = has(VIRTIO_NET_F_MQ);
        self.tap.set_offload(offloads(features)).map_err(host)?;
        self.tap.use_queues(self.first_pairs).map_err(host)?;
        *lock(&self.shared.interrupt) = Some(activation.interrupt.clone());
        // Without VIRTIO_NET_F_MQ there is one pair, and the control queue follows it.
        let pairs = if several { self.tap.queues().len() } else { 1 };
        for index in 0..pairs {
            // A driver may not enable pairs that it never uses.
            let number = 2 * index as u16;
            let (receive, send) = match (
                activation.take_queue(number),
                activation.take_queue(number + 1),
            ) {
                (Ok(receive), Ok(send)) => (receive, send),
                (Err(error), _) | (_, Err(error)) if index == 0 => return Err(error),
                _ => continue,
            };
            let pair = QueuePair::new(
                queue_pair::PairContext {
                    index,
                    tap: self.tap.clone(),
                    shared: self.shared.clone(),
                    stop: self.threads.stop_event().try_clone().map_err(host)?,
                },
                receive,
                send,
                room,
                self.limiters.clone(),
            );
            self.threads.spawn(move || pair.run()).map_err(host)?;
        }
        match activation.take_queue(2 * pairs as u16) {
            Ok(queue) if has(VIRTIO_NET_F_CTRL_VQ) => {
                let control = control::Control {
                    tap: self.tap.clone(),
                    pairs: pairs as u16,
                    changes: self.changes.clone(),
                };
                Ok(Worker::EventLoop(control::worker(queue, control)))
            }
            _ => Ok(Worker::OwnThreads),
        }
    }

    fn stop_threads(&mut self) {
        lock(&self.shared.interrupt).take();
        self.threads.stop();
    }
}

/// The offloads that a driver with these features handles.
fn offloads(features: u64) -> u32 {
    let pairs = [
        (VIRTIO_NET_F_GUEST_CSUM, offload::CSUM),
        (VIRTIO_NET_F_GUEST_TSO4, offload::TSO4),
        (VIRTIO_NET_F_GUEST_TSO6, offload::TSO6),
        (VIRTIO_NET_F_GUEST_ECN, offload::TSO_ECN),
    ];
    let wanted = pairs.iter().filter(|(bit, _)| features & (1 << bit) != 0);
    let all = wanted.fold(0, |all, (_, offload)| all | offload);
    // The kernel accepts both or neither.
    let both = 1 << VIRTIO_NET_F_GUEST_USO4 | 1 << VIRTIO_NET_F_GUEST_USO6;
    match features & both == both {
        true => all | offload::USO4 | offload::USO6,
        false => all,
    }
}

/// State of a network device apart from its queues. The tap is part of the configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    /// MAC address of the guest.
    pub mac: MacAddr,
    /// MTU, if configured.
    pub mtu: Option<u16>,
    /// Number of queue pairs.
    pub pairs: u16,
    /// Number of pairs that the driver uses.
    pub used_pairs: u16,
    /// Whether the link is up.
    pub link: bool,
}

impl NetState {
    /// Schema of the state.
    pub const SCHEMA: Schema = Schema::new("virtio-net", 1);
}

impl VirtioDevice for Net {
    fn kind(&self) -> DeviceKind {
        DeviceKind::NET
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        let mut bits = vec![
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_GUEST_CSUM,
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_TSO6,
            VIRTIO_NET_F_GUEST_ECN,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6,
            VIRTIO_NET_F_HOST_ECN,
            VIRTIO_NET_F_MRG_RXBUF,
            VIRTIO_NET_F_MAC,
            VIRTIO_NET_F_STATUS,
        ];
        if self.tap.has_udp_segments() {
            bits.extend([
                VIRTIO_NET_F_GUEST_USO4,
                VIRTIO_NET_F_GUEST_USO6,
                VIRTIO_NET_F_HOST_USO,
            ]);
        }
        if self.options.mtu.is_some() {
            bits.push(VIRTIO_NET_F_MTU);
        }
        if self.tap.queues().len() > 1 {
            bits.extend([VIRTIO_NET_F_MQ, VIRTIO_NET_F_CTRL_VQ]);
        }
        bits.iter()
            .fold(COMMON_FEATURES, |features, bit| features | 1 << bit)
    }

    fn config(&self) -> Option<Vec<u8>> {
        Some(self.shared.config())
    }

    fn publish_config(&mut self, space: ConfigSpace) {
        self.shared
            .published
            .publish_in(space, || self.shared.config());
    }

    fn activate(&mut self, activation: Activation) -> Result<Worker, ActivateError> {
        self.start(activation).inspect_err(|_| self.stop_threads())
    }

    fn save(&self) -> Result<Payload, StateError> {
        NetState::SCHEMA.encode(&NetState {
            mac: self.options.mac,
            mtu: self.options.mtu,
            pairs: self.tap.queues().len() as u16,
            used_pairs: self.tap.used_queues() as u16,
            link: self.shared.link(),
        })
    }

    fn restore(&mut self, state: &Payload) -> Result<(), StateError> {
        let state: NetState = NetState::SCHEMA.decode(state)?;
        let pairs = self.tap.queues().len();
        if (state.mac, state.mtu) != (self.options.mac, self.options.mtu)
            || usize::from(state.pairs) != pairs
            || !(1..=pairs).contains(&state.used_pairs.into())
        {
            return Err(StateError::Mismatch("address, MTU or queues are others"));
        }
        self.first_pairs = state.used_pairs.into();
        self.shared.set_link(state.link);
        Ok(())
    }

    fn stop(&mut self, _worker: Option<Box<dyn MutEventSubscriber + Send>>) {
        self.first_pairs = self.tap.used_queues();
        self.stop_threads();
    }

    fn reset(&mut self, _worker: Option<Box<dyn MutEventSubscriber + Send>>) {
        self.first_pairs = 1;
        self.stop_threads();
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        self.stop_threads();
    }
}
