//! The devices of a configuration.

use super::{ConfigError, in_range, yes};
use koya_devices::blk::{Disk, DiskOptions, IoEngine, MAX_QUEUES};
use koya_devices::net::{MAX_PAIRS, MIN_MTU, MacAddr, Net, NetOptions, Tap};
use koya_devices::rate_limit::RateLimits;
use koya_devices::vsock::FIRST_GUEST_CID;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// A guest's vsock, for other processes of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// The guest's address, 3 or more. Every guest may have the same. Default: 3.
    #[serde(default = "default_cid")]
    pub cid: u32,
    /// The Unix socket by which processes of the host reach the guest, and beside which the guest
    /// finds theirs; see [`UnixSockets`](koya_devices::vsock::UnixSockets). No default.
    pub socket: PathBuf,
}

impl VsockConfig {
    pub(super) fn check(&self) -> Result<(), ConfigError> {
        let most = u64::from(u32::MAX - 1);
        in_range("vsock.cid", self.cid.into(), FIRST_GUEST_CID, most)
    }
}

fn default_cid() -> u32 {
    FIRST_GUEST_CID as u32
}

/// A network interface of a virtual machine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// The tap interface on the host, of the network namespace in which the configuration is checked.
    /// One that does not exist is made, and goes with the virtual machine. Default: a new one, whose
    /// name the kernel chooses.
    #[serde(default)]
    pub tap: String,
    /// The guest's MAC address. Default: random, of local administration.
    #[serde(default)]
    pub mac: Option<MacAddr>,
    /// The largest packet in bytes, 68 or more. Default: the guest's own choice (1500).
    #[serde(default)]
    pub mtu: Option<u16>,
    /// Pairs of queues, 1 to [`MAX_NET_QUEUES`], each with a thread of its own. A tap that exists must
    /// have been made for several if this is more than one. Default: 1.
    #[serde(default)]
    pub queues: Option<u16>,
    /// How much the guest may send in a time. Default: no limit.
    #[serde(default)]
    pub send_limits: RateLimits,
    /// How much the guest may receive in a time. Default: no limit.
    #[serde(default)]
    pub receive_limits: RateLimits,
}

/// The most pairs of queues of a network interface.
pub const MAX_NET_QUEUES: u16 = MAX_PAIRS;

impl NetConfig {
    pub(super) fn check(&self) -> Result<Net, ConfigError> {
        let failed = |source| ConfigError::Network {
            tap: self.tap.clone(),
            source,
        };
        let queues = self.queues.unwrap_or(1);
        in_range("networks.queues", queues.into(), 1, MAX_PAIRS.into())?;
        if let Some(mtu) = self.mtu {
            in_range("networks.mtu", mtu.into(), MIN_MTU.into(), u16::MAX.into())?;
        }
        let mac = match self.mac {
            Some(mac) => mac,
            None => MacAddr::random().map_err(failed)?,
        };
        let options = NetOptions {
            mac,
            mtu: self.mtu,
            send_limits: self.send_limits,
            receive_limits: self.receive_limits,
        };
        let tap = Tap::open(&self.tap, queues).map_err(failed)?;
        Net::new(tap, options).map_err(failed)
    }
}

/// A disk of a virtual machine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// A raw image or a block device. No default.
    pub path: PathBuf,
    /// Refuse writes. Default: false.
    #[serde(default)]
    pub read_only: bool,
    /// Take a file for a raw image whatever is in it; see [`DiskOptions::raw`]. Default: false.
    #[serde(default)]
    pub raw: bool,
    /// Past the host's page cache (O_DIRECT). Default: false.
    #[serde(default)]
    pub direct: bool,
    /// The serial number that the guest sees, up to 20 bytes. Default: empty.
    #[serde(default)]
    pub serial: String,
    /// Queues, 1 to [`MAX_DISK_QUEUES`], each with a thread of its own. Default: one a vCPU, up to
    /// four.
    #[serde(default)]
    pub queues: Option<u16>,
    /// Use io_uring where the host allows it. Default: true.
    #[serde(default = "yes")]
    pub io_uring: bool,
    /// How much the guest may do with it in a time. Default: no limit.
    #[serde(default)]
    pub limits: RateLimits,
}

/// The most slots for disks that come later.
pub const MAX_DISK_SLOTS: u32 = 16;
/// The most queues of a disk.
pub const MAX_DISK_QUEUES: u16 = MAX_QUEUES;
/// Queues of a disk whose configuration says nothing.
const DISK_QUEUES: u32 = 4;

impl DiskConfig {
    /// Every default, and this image or device.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            io_uring: true,
            ..Self::default()
        }
    }

    /// Opens the disk and closes it again: whether a machine could have it now.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn probe(&self) -> Result<(), ConfigError> {
        self.open().map(drop)
    }

    fn open(&self) -> Result<Disk, ConfigError> {
        let options = DiskOptions {
            read_only: self.read_only,
            direct: self.direct,
            serial: self.serial.clone(),
            raw: self.raw,
        };
        Disk::open(&self.path, options).map_err(|source| ConfigError::Disk {
            path: self.path.clone(),
            source,
        })
    }

    pub(crate) fn check(&self, cpus: u32) -> Result<DiskSpec, ConfigError> {
        let queues = self.queues.unwrap_or(cpus.min(DISK_QUEUES) as u16);
        in_range("disks.queues", queues.into(), 1, MAX_DISK_QUEUES.into())?;
        Ok(DiskSpec {
            disk: self.open()?,
            queues,
            engine: match self.io_uring {
                true => IoEngine::Auto,
                false => IoEngine::Calls,
            },
            limits: self.limits,
        })
    }
}

/// An open disk and how it is served.
pub(crate) struct DiskSpec {
    pub(crate) disk: Disk,
    pub(crate) queues: u16,
    pub(crate) engine: IoEngine,
    pub(crate) limits: RateLimits,
}
