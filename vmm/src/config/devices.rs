//! Device configurations.

use super::{ConfigError, default_true, in_range};
use koya_devices::blk::{Disk, DiskOptions, IoEngine, MAX_QUEUES};
use koya_devices::net::{MAX_PAIRS, MIN_MTU, MacAddr, Net, NetOptions, Tap};
use koya_devices::rate_limit::RateLimits;
use koya_devices::vsock::FIRST_GUEST_CID;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// A vsock device, connected to Unix sockets on the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// Context ID of the guest, 3 or more. Guests may share a CID. Default: 3.
    #[serde(default = "default_cid")]
    pub cid: u32,
    /// The Unix socket through which host processes connect to the guest; sockets for connections from the
    /// guest lie beside it. See [`UnixSockets`](koya_devices::vsock::UnixSockets). No default.
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

/// A network interface.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// The tap interface on the host, in the network namespace of the thread that checks the configuration.
    /// If it does not exist, it is created, and removed with the virtual machine. Default: a new one, named
    /// by the kernel.
    #[serde(default)]
    pub tap: String,
    /// MAC address of the guest. Default: random, locally administered.
    #[serde(default)]
    pub mac: Option<MacAddr>,
    /// MTU in bytes, 68 or more. Default: chosen by the guest (1500).
    #[serde(default)]
    pub mtu: Option<u16>,
    /// Number of queue pairs, 1 to [`MAX_NET_QUEUES`], each with its own thread. For more than one, an
    /// existing tap must be multi-queue. Default: 1.
    #[serde(default)]
    pub queues: Option<u16>,
    /// Rate limits for frames the guest sends. Default: none.
    #[serde(default)]
    pub send_limits: RateLimits,
    /// Rate limits for frames the guest receives. Default: none.
    #[serde(default)]
    pub receive_limits: RateLimits,
}

/// Maximum number of queue pairs of a network interface.
pub const MAX_NET_QUEUES: u16 = MAX_PAIRS;

impl NetConfig {
    pub(crate) fn check(&self) -> Result<Net, ConfigError> {
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

/// A disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// A raw image or a block device. No default.
    pub path: PathBuf,
    /// Whether the disk is read-only. Default: false.
    #[serde(default)]
    pub read_only: bool,
    /// Treat a file as a raw image whatever it contains; see [`DiskOptions::raw`]. Default: false.
    #[serde(default)]
    pub raw: bool,
    /// Bypass the host page cache (O_DIRECT). Default: false.
    #[serde(default)]
    pub direct: bool,
    /// Serial number that the guest sees, up to 20 bytes. Default: empty.
    #[serde(default)]
    pub serial: String,
    /// Number of queues, 1 to [`MAX_DISK_QUEUES`], each with its own thread. Default: one per vCPU, up to
    /// four.
    #[serde(default)]
    pub queues: Option<u16>,
    /// Use io_uring if the host allows it. Default: true.
    #[serde(default = "default_true")]
    pub io_uring: bool,
    /// Rate limits for requests. Default: none.
    #[serde(default)]
    pub limits: RateLimits,
}

/// Maximum number of slots for hot-plugged disks and networks.
pub const MAX_DISK_SLOTS: u32 = 16;
/// Maximum number of queues of a disk.
pub const MAX_DISK_QUEUES: u16 = MAX_QUEUES;
/// Maximum number of queues if the configuration does not set one.
const DISK_QUEUES: u32 = 4;

impl DiskConfig {
    /// The default configuration for this image or device.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            io_uring: true,
            ..Self::default()
        }
    }

    /// Opens the disk and closes it again, to check whether a machine could use it now.
    ///
    /// # Errors
    /// The reason why the disk cannot be used.
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

/// An open disk and its settings.
pub(crate) struct DiskSpec {
    pub(crate) disk: Disk,
    pub(crate) queues: u16,
    pub(crate) engine: IoEngine,
    pub(crate) limits: RateLimits,
}
