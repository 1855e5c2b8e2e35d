//! A tap interface of the host, as the device's other end.

use super::{HEADER_SIZE, MAX_PAIRS};
use crate::sys;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};

pub use crate::sys::offload;

/// A tap with one or more queues.
#[derive(Debug)]
pub struct Tap {
    name: String,
    queues: Vec<File>,
    udp_segments: bool,
    /// How many queues the kernel was let use last.
    used: AtomicUsize,
}

impl Tap {
    /// Opens the tap `name` of this thread's network namespace, or makes one that goes when it is
    /// closed; an empty name lets the kernel choose. With more than one queue a tap that exists must
    /// have been made for several (`ip tuntap add ... multi_queue`).
    ///
    /// # Errors
    /// No `/dev/net/tun`, no privilege (CAP_NET_ADMIN or an owner of the tap), in use.
    pub fn open(name: &str, queues: u16) -> io::Result<Self> {
        let queues = queues.clamp(1, MAX_PAIRS);
        let mut tap = Self {
            name: name.to_owned(),
            queues: Vec::new(),
            udp_segments: false,
            used: AtomicUsize::new(1),
        };
        for _ in 0..queues {
            let mut options = File::options();
            let tun = options.read(true).write(true).open("/dev/net/tun")?;
            tap.name = sys::attach_tap(&tun, &tap.name, queues > 1, HEADER_SIZE as i32)?;
            tap.queues.push(tun);
        }
        tap.prepare()
    }

    /// A tap that somebody else opened, one descriptor a queue, with a virtio-net header of 12 bytes
    /// (TUNSETVNETHDRSZ) before each frame; or a socket that keeps messages apart and carries the same.
    ///
    /// # Errors
    /// No descriptor, or too many.
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
        };
        tap.prepare()
    }

    fn prepare(mut self) -> io::Result<Self> {
        if let Some(queue) = self.queues.first() {
            // Linux has it from 6.2 on. What is asked for here lasts until there is a driver.
            let bits = offload::CSUM | offload::USO4 | offload::USO6;
            self.udp_segments = sys::set_tap_offload(queue.as_fd(), bits).is_ok();
        }
        for queue in &self.queues {
            fcntl_setfl(queue, fcntl_getfl(queue)? | OFlags::NONBLOCK)?;
        }
        Ok(self)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether the host's kernel can leave UDP segments to others.
    pub(super) fn has_udp_segments(&self) -> bool {
        self.udp_segments
    }

    pub(super) fn queues(&self) -> &[File] {
        &self.queues
    }

    /// What the kernel may leave to the guest.
    pub(super) fn set_offload(&self, bits: u32) -> io::Result<()> {
        match self.queues.first() {
            Some(queue) => match sys::set_tap_offload(queue.as_fd(), bits) {
                // A socket: whoever sends to it knows what it may leave out.
                Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => Ok(()),
                other => other,
            },
            None => Ok(()),
        }
    }

    /// How many the kernel was let use last.
    pub(super) fn used_queues(&self) -> usize {
        self.used.load(Ordering::SeqCst)
    }

    /// Lets the kernel use the first `pairs` queues.
    pub(super) fn use_queues(&self, pairs: usize) -> io::Result<()> {
        self.used.store(pairs, Ordering::SeqCst);
        if self.queues.len() < 2 {
            return Ok(());
        }
        for (index, queue) in self.queues.iter().enumerate() {
            match sys::use_tap_queue(queue, index < pairs) {
                // It is as wanted already.
                Err(error)
                    if [libc::EINVAL, libc::ENOTTY]
                        .contains(&error.raw_os_error().unwrap_or(0)) => {}
                other => other?,
            }
        }
        Ok(())
    }
}
