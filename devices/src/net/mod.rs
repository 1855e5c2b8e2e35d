//! Networks: virtio 1.2, section 5.1, with a tap interface of the host behind it.
//!
//! | part | what |
//! |---|---|
//! | [`Net`] | the device: features, configuration space, threads |
//! | [`Tap`] | the host's end |
//! | `pair` | one thread a pair of queues: frames to and from the tap |
//! | `control` | the control queue (section 5.1.6.5): how many pairs are in use |
//!
//! **Offloads.** The tap speaks virtio-net headers (IFF_VNET_HDR), so a frame passes as it is, with
//! its header, by one system call and without a copy in this process: checksums may be missing and
//! TCP or UDP segments up to 64 KiB go through whole, both ways. What the guest's driver accepts
//! (`GUEST_CSUM`, `GUEST_TSO4`, ...) the tap is told (TUNSETOFFLOAD); what it offers the host takes
//! always. Header and frame are checked by the host's kernel, as any tap's are.
//!
//! **Receiving.** With mergeable buffers (`MRG_RXBUF`, section 5.1.6.4) the thread reads into as many
//! buffers as the largest frame needs and gives back those that were filled, all at once. While the
//! guest has no buffers, frames wait in the tap's queue, and the host drops what does not fit there.
//!
//! **Link.** [`NetHandle::set_link`] takes the link down or up; the driver learns it from the
//! configuration space (section 5.1.4). A tap that was removed takes it down for good.
//!
//! **Limits**: a [rate limit](crate::rate_limit) each way if wanted. Buffers too short for a header
//! come back empty.

mod control;
mod pair;
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
use pair::Pair;
use serde::{Deserialize, Serialize};
use std::io;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use virtio_bindings::virtio_net::*;
use zerocopy::little_endian::U16;
use zerocopy::{Immutable, IntoBytes};

pub use tap::{Tap, offload};

/// The most pairs of queues.
pub const MAX_PAIRS: u16 = 8;
/// The least MTU: IPv4's (RFC 791).
pub const MIN_MTU: u16 = 68;

/// `struct virtio_net_hdr_v1` (section 5.1.6): what each frame begins with.
const HEADER_SIZE: usize = 12;
/// Where its number of buffers is.
const NUM_BUFFERS_OFFSET: u32 = 10;
const QUEUE_SIZE: u16 = 256;
const CONTROL_QUEUE_SIZE: u16 = 64;

const ROLE: Role = Role::new("koya-net").of_the_guest();

/// A MAC address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddr(pub [u8; 6]);

impl MacAddr {
    /// One that nobody else should have: random, for a single host, of local administration.
    ///
    /// # Errors
    /// The host has no random numbers.
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

/// What a network device did so far. "Received" is what the guest received.
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
    /// Frames to the guest that were lost: the link was down.
    pub received_drops: AtomicU64,
    /// Frames from the guest that the host did not take: link down, queue full, broken header.
    pub sent_drops: AtomicU64,
    /// Buffers too short for a header.
    pub faults: AtomicU64,
}

/// What a device, its threads and its owner's handles share. Not the tap: that goes with the device,
/// whoever has a handle.
struct Shared {
    tap_name: String,
    link: AtomicBool,
    /// What the driver reads beside the link's state.
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

    /// Whether it was another.
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

/// `struct virtio_net_config` (section 5.1.4), as far as this device announces it.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Config {
    mac: [u8; 6],
    status: U16,
    max_virtqueue_pairs: U16,
    mtu: U16,
}

/// What a network device is like.
#[derive(Clone, Debug)]
pub struct NetOptions {
    /// The guest's address.
    pub mac: MacAddr,
    /// The largest packet, in bytes, [`MIN_MTU`] or more; none leaves it to the guest (1500).
    pub mtu: Option<u16>,
    /// Limits what the guest sends.
    pub send_limits: RateLimits,
    /// Limits what the guest receives.
    pub receive_limits: RateLimits,
}

/// The network device.
pub struct Net {
    options: NetOptions,
    tap: Arc<Tap>,
    shared: Arc<Shared>,
    /// What the guest receives and sends; a driver that starts anew does not get full buckets.
    limiters: [Arc<Mutex<RateLimiter>>; 2],
    queue_sizes: Vec<u16>,
    threads: Threads,
    /// Pairs that are in use when a driver starts, or goes on.
    first_pairs: usize,
}

/// How a network device's owner reaches it while the guest uses it.
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

    /// The host's interface.
    pub fn tap_name(&self) -> &str {
        &self.shared.tap_name
    }

    /// What the device did so far.
    pub fn metrics(&self) -> &NetMetrics {
        &self.shared.metrics
    }
}

impl Net {
    /// A device over `tap`, with a pair of queues for each of the tap's.
    ///
    /// # Errors
    /// The host has no descriptor left.
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

    /// What its owner keeps.
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
        let room = pair::Room::of(features, self.options.mtu);
        let several = has(VIRTIO_NET_F_MQ);
        self.tap.set_offload(offloads(features)).map_err(host)?;
        self.tap.use_queues(self.first_pairs).map_err(host)?;
        *lock(&self.shared.interrupt) = Some(activation.interrupt.clone());
        // Without VIRTIO_NET_F_MQ there is one pair, and the control queue follows it.
        let pairs = if several { self.tap.queues().len() } else { 1 };
        for index in 0..pairs {
            // A driver may leave pairs out that it never uses.
            let number = 2 * index as u16;
            let (receive, send) = match (
                activation.take_queue(number),
                activation.take_queue(number + 1),
            ) {
                (Ok(receive), Ok(send)) => (receive, send),
                (Err(error), _) | (_, Err(error)) if index == 0 => return Err(error),
                _ => continue,
            };
            let pair = Pair::new(
                pair::Place {
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
                let worker = control::worker(queue, self.tap.clone(), pairs as u16);
                Ok(Worker::EventLoop(worker))
            }
            _ => Ok(Worker::OwnThreads),
        }
    }

    fn stop_threads(&mut self) {
        lock(&self.shared.interrupt).take();
        self.threads.stop();
    }
}

/// What the tap may leave to a driver that accepted these features.
fn offloads(features: u64) -> u32 {
    let pairs = [
        (VIRTIO_NET_F_GUEST_CSUM, offload::CSUM),
        (VIRTIO_NET_F_GUEST_TSO4, offload::TSO4),
        (VIRTIO_NET_F_GUEST_TSO6, offload::TSO6),
        (VIRTIO_NET_F_GUEST_ECN, offload::TSO_ECN),
    ];
    let wanted = pairs.iter().filter(|(bit, _)| features & (1 << bit) != 0);
    let all = wanted.fold(0, |all, (_, offload)| all | offload);
    // The kernel takes both or none.
    let both = 1 << VIRTIO_NET_F_GUEST_USO4 | 1 << VIRTIO_NET_F_GUEST_USO6;
    match features & both == both {
        true => all | offload::USO4 | offload::USO6,
        false => all,
    }
}

/// A network's state beyond its queues. The tap is the configuration's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    /// The guest's address.
    pub mac: MacAddr,
    /// The largest packet, if it was said.
    pub mtu: Option<u16>,
    /// Pairs of queues that there are.
    pub pairs: u16,
    /// Pairs that the driver uses.
    pub used_pairs: u16,
    /// Whether the link is up.
    pub link: bool,
}

impl NetState {
    /// A network's.
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
            return Err(StateError::Misfit("address, MTU or queues are others"));
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
