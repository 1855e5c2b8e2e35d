//! The tap interface on the host.

use super::{HEADER_SIZE, MAX_PAIRS};
use crate::sys;
use koya_host::sync::lock;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

pub use crate::sys::offload;

/// A tap with one or more queues.
#[derive(Debug)]
pub struct Tap {
    name: String,
    queues: Vec<File>,
    udp_segments: bool,
    /// Number of queues last enabled in the kernel.
    used: AtomicUsize,
    /// What the kernel was last told: offloads, and the number of queues. Both take a lock of all networks of the host, so
    /// nothing is told twice.
    told: Mutex<AppliedSettings>,
}

#[derive(Debug, Default)]
struct AppliedSettings {
    offload: Option<u32>,
    queues: Option<usize>,
}

impl Tap {
    /// Opens the tap `name` in this thread's network namespace. If it does not exist, it is created and
    /// removed again on close; with an empty name, the kernel chooses one. For more than one queue, an
    /// existing tap must be multi-queue (`ip tuntap add ... multi_queue`).
    ///
    /// # Errors
    /// No `/dev/net/tun`, no privilege (CAP_NET_ADMIN or ownership of the tap), or in use.
    pub fn open(name: &str, queues: u16) -> io::Result<Self> {
        let queues = queues.clamp(1, MAX_PAIRS);
        let mut tap = Self {
            name: name.to_owned(),
            queues: Vec::new(),
            udp_segments: false,
            used: AtomicUsize::new(1),
            told: Mutex::default(),
        };
        for _ in 0..queues {
            let mut options = File::options();
            let tun = options.read(true).write(true).open("/dev/net/tun")?;
            tap.name = sys::attach_tap(&tun, &tap.name, queues > 1, HEADER_SIZE as i32)?;
            tap.queues.push(tun);
        }
        tap.prepare()
    }

    /// A tap opened by the caller, one descriptor per queue, with a virtio-net header of 12 bytes
    /// (TUNSETVNETHDRSZ) before each frame; or a socket that preserves message boundaries and carries the
    /// same.
    ///
    /// # Errors
    /// No descriptors, or too many.
    pub fn from_queues(name: &str, queues: Vec<OwnedFd>) -> io::Result<Self> {
        if queues.is_empty() || queues.len() > usize::from(MAX_PAIRS) {
            let text = format!("a tap has 1 to {MAX_PAIRS} queues");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let tap = Self {
            name: name.to_owned(),
            queues: queues.into_iter().map(File::from).collect(),
            udp_segments: false,
            used: AtomicUsize::new(1),
            told: Mutex::default(),
        };
        tap.prepare()
    }

    fn prepare(mut self) -> io::Result<Self> {
        if let Some(queue) = self.queues.first() {
            // Supported since Linux 6.2. These bits apply until a driver sets its own.
            let bits = offload::CSUM | offload::USO4 | offload::USO6;
            self.udp_segments = sys::set_tap_offload(queue.as_fd(), bits).is_ok();
        }
        for queue in &self.queues {
            fcntl_setfl(queue, fcntl_getfl(queue)? | OFlags::NONBLOCK)?;
        }
        Ok(self)
    }

    /// The name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether the host kernel supports UDP segmentation offload.
    pub(super) fn has_udp_segments(&self) -> bool {
        self.udp_segments
    }

    pub(super) fn queues(&self) -> &[File] {
        &self.queues
    }

    /// Sets the offloads that the guest handles.
    pub(super) fn set_offload(&self, bits: u32) -> io::Result<()> {
        let mut told = lock(&self.told);
        let Some(queue) = self.queues.first().filter(|_| told.offload != Some(bits)) else {
            return Ok(());
        };
        match sys::set_tap_offload(queue.as_fd(), bits) {
            // A socket: its peer decides about offloads.
            Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => {}
            other => other?,
        }
        told.offload = Some(bits);
        Ok(())
    }

    /// Number of queues last enabled in the kernel.
    pub(super) fn used_queues(&self) -> usize {
        self.used.load(Ordering::SeqCst)
    }

    /// Enables the first `pairs` queues.
    pub(super) fn use_queues(&self, pairs: usize) -> io::Result<()> {
        let mut told = lock(&self.told);
        // After a failure their state is not known.
        let before = told.queues.take();
        let several = self.queues.iter().filter(|_| self.queues.len() > 1);
        for (index, queue) in several.enumerate() {
            let is_used = index < pairs;
            if before.is_some_and(|before| is_used == (index < before)) {
                continue;
            }
            match sys::use_tap_queue(queue, is_used) {
                // Already in the requested state.
                Err(error)
                    if [libc::EINVAL, libc::ENOTTY]
                        .contains(&error.raw_os_error().unwrap_or(0)) => {}
                other => other?,
            }
        }
        told.queues = Some(pairs);
        self.used.store(pairs, Ordering::SeqCst);
        Ok(())
    }
}
