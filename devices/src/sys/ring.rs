//! An io_uring whose requests read and write guest memory.
//!
//! Requests of a ring are not subject to seccomp filters: one could open files and connect sockets. A ring is
//! therefore created by a thread that may create one, with the few operations that a disk needs; the thread that
//! uses it can neither create another nor lift the restrictions (io_uring_register(2)).
//!
//! The ring owns the memory and the file of its requests (guest memory, the iovecs), and dropping it waits for
//! every request in flight, so its functions are safe to call.

use super::iovecs;
use crate::virtio::{Chain, ChainError, Memory};
use io_uring::register::Restriction;
use io_uring::squeue::Entry;
use io_uring::{IoUring, cqueue, opcode, types};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;
use vmm_sys_util::eventfd::EventFd;

/// Marks completions of watched events; the rest is the event's index. Other completions carry the request's
/// index.
const WATCH: u64 = 1 << 63;
/// Token of the cancellation on drop.
const CANCEL: u64 = u64::MAX;

/// Operations allowed on a ring.
const OPERATIONS: [u8; 8] = [
    opcode::Read::CODE,
    opcode::Readv::CODE,
    opcode::Write::CODE,
    opcode::Writev::CODE,
    opcode::Fsync::CODE,
    opcode::Fallocate::CODE,
    opcode::PollAdd::CODE,
    opcode::AsyncCancel2::CODE,
];

/// Completions reported by a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Completion {
    /// The request with this token has ended: number of bytes, or a negative error number.
    Request(u64, i32),
    /// The watched event with this index was signalled.
    Event(usize),
}

/// A transfer between a chain's memory and the ring's file.
#[derive(Clone, Copy, Debug)]
pub struct Transfer<'c> {
    /// The chain.
    pub chain: &'c Chain,
    /// Offset in the chain's readable or writable part, in bytes.
    pub skip: u32,
    /// Length in bytes.
    pub len: u32,
    /// Offset in the file, in bytes.
    pub at: u64,
}

/// A request in flight, with the memory that it points to.
struct InFlight {
    token: u64,
    /// Read by the kernel when the request is submitted, or later by old kernels.
    iovecs: Vec<libc::iovec>,
}

/// An io_uring; see the module's documentation.
pub struct Ring {
    uring: IoUring,
    memory: Arc<Memory>,
    file: Arc<File>,
    in_flight: Vec<Option<InFlight>>,
    free: Vec<usize>,
    watched: Vec<EventFd>,
    /// Error on arming a watch.
    broken: Option<io::Error>,
}

// SAFETY: the raw pointers in `in_flight` point into guest memory, which `memory` keeps mapped and any thread
// may use; nothing else in a ring belongs to one thread.
unsafe impl Send for Ring {}

impl Ring {
    /// Creates a ring for up to `entries` concurrent requests on `file`. The thread that uses it must
    /// [`enable`](Self::enable) it first.
    ///
    /// # Errors
    /// If the kernel has no io_uring, does not allow this process to use it, or cannot restrict it (before
    /// Linux 5.10).
    pub fn new(memory: Arc<Memory>, file: Arc<File>, entries: u16) -> io::Result<Self> {
        let size = u32::from(entries).next_power_of_two() + 8;
        // From Linux 6.1 on, the kernel completes requests when we wait instead of interrupting us.
        let tuned = IoUring::builder()
            .setup_coop_taskrun()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_r_disabled()
            .build(size);
        let plain = || IoUring::builder().setup_r_disabled().build(size);
        let uring = tuned.or_else(|_| plain())?;
        // No flags of entries and no registrations are allowed by default.
        let mut allowed = OPERATIONS.map(Restriction::sqe_op);
        uring.submitter().register_restrictions(&mut allowed)?;
        Ok(Self {
            uring,
            memory,
            file,
            in_flight: (0..entries).map(|_| None).collect(),
            free: (0..usize::from(entries)).rev().collect(),
            watched: Vec::new(),
            broken: None,
        })
    }

    /// Puts the restrictions into force and binds the ring to the calling thread, which alone may use it from
    /// now on.
    ///
    /// # Errors
    /// The error from io_uring_register(2).
    pub fn enable(&self) -> io::Result<()> {
        self.uring.submitter().register_enable_rings()
    }

    /// Whether another request can be added.
    pub fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// Whether no request is in flight.
    pub fn is_idle(&self) -> bool {
        self.free.len() == self.in_flight.len()
    }

    /// Reports every write to `event` from now on as [`Completion::Event`] with the event's index, which is
    /// the number of earlier calls.
    ///
    /// # Errors
    /// If the host has no file descriptor left.
    pub fn watch(&mut self, event: &EventFd) -> io::Result<()> {
        self.watched.push(event.try_clone()?);
        self.arm(self.watched.len() - 1);
        Ok(())
    }

    fn arm(&mut self, index: usize) {
        let fd = types::Fd(self.watched[index].as_raw_fd());
        // Multi-shot: each write completes, whether or not anyone reads the event.
        let entry = opcode::PollAdd::new(fd, libc::POLLIN as u32)
            .multi(true)
            .build();
        self.push(entry.user_data(WATCH | index as u64));
    }

    /// Reads from the file into the writable part of a chain.
    ///
    /// # Errors
    /// If the chain is too short.
    ///
    /// # Panics
    /// If the ring is full.
    pub fn read(&mut self, token: u64, transfer: Transfer<'_>) -> Result<(), ChainError> {
        let Transfer { skip, len, at, .. } = transfer;
        let slices = transfer
            .chain
            .writable_slices(&self.memory, skip, len as usize)?;
        let request = InFlight {
            token,
            iovecs: iovecs(&slices),
        };
        let fd = types::Fd(self.file.as_raw_fd());
        self.submit(request, |request| match request.iovecs.as_slice() {
            [one] => opcode::Read::new(fd, one.iov_base.cast(), one.iov_len as u32)
                .offset(at)
                .build(),
            many => opcode::Readv::new(fd, many.as_ptr(), many.len() as u32)
                .offset(at)
                .build(),
        });
        Ok(())
    }

    /// Writes the readable part of a chain to the file; with `durable` the request ends when the data is on
    /// stable storage.
    ///
    /// # Errors
    /// If the chain is too short.
    ///
    /// # Panics
    /// If the ring is full.
    pub fn write(
        &mut self,
        token: u64,
        transfer: Transfer<'_>,
        durable: bool,
    ) -> Result<(), ChainError> {
        let Transfer { skip, len, at, .. } = transfer;
        let slices = transfer
            .chain
            .readable_slices(&self.memory, skip, len as usize)?;
        let request = InFlight {
            token,
            iovecs: iovecs(&slices),
        };
        let flags = if durable { libc::RWF_DSYNC } else { 0 };
        let fd = types::Fd(self.file.as_raw_fd());
        self.submit(request, |request| match request.iovecs.as_slice() {
            [one] => opcode::Write::new(fd, one.iov_base.cast_const().cast(), one.iov_len as u32)
                .offset(at)
                .rw_flags(flags)
                .build(),
            many => opcode::Writev::new(fd, many.as_ptr(), many.len() as u32)
                .offset(at)
                .rw_flags(flags)
                .build(),
        });
        Ok(())
    }

    /// Flushes earlier writes to stable storage (fdatasync).
    ///
    /// # Panics
    /// If the ring is full.
    pub fn sync(&mut self, token: u64) {
        let fd = types::Fd(self.file.as_raw_fd());
        self.submit(InFlight::plain(token), |_| {
            opcode::Fsync::new(fd)
                .flags(types::FsyncFlags::DATASYNC)
                .build()
        });
    }

    /// fallocate(2) with `mode`.
    ///
    /// # Panics
    /// If the ring is full.
    pub fn allocate(&mut self, token: u64, mode: i32, at: u64, len: u64) {
        let fd = types::Fd(self.file.as_raw_fd());
        self.submit(InFlight::plain(token), |_| {
            opcode::Fallocate::new(fd, len)
                .offset(at)
                .mode(mode)
                .build()
        });
    }

    fn submit(&mut self, request: InFlight, entry: impl FnOnce(&InFlight) -> Entry) {
        let slot = self.free.pop().expect("the caller asked for room");
        let request = self.in_flight[slot].insert(request);
        let entry = entry(request).user_data(slot as u64);
        self.push(entry);
    }

    fn push(&mut self, entry: Entry) {
        loop {
            // SAFETY: an entry points to iovecs in `in_flight` and, through them, into `memory`; both stay
            // until its completion was seen, since `drop` waits for that. The iovecs' bytes are only used
            // through volatile slices and by the kernel.
            match unsafe { self.uring.submission().push(&entry) } {
                Ok(()) => return,
                // Submitting the queued entries makes space.
                Err(_) => {
                    self.uring.submit().ok();
                }
            }
        }
    }

    /// Submits new requests and waits up to `limit` for a completion.
    ///
    /// # Errors
    /// The error from io_uring_enter(2), except signals and timeouts; or the error on watching an event.
    pub fn wait(&mut self, limit: Option<Duration>) -> io::Result<()> {
        if let Some(error) = self.broken.take() {
            return Err(error);
        }
        let ready = !self.uring.completion().is_empty();
        let want = usize::from(!ready);
        let result = match limit {
            Some(limit) => {
                let time = types::Timespec::from(limit);
                let args = types::SubmitArgs::new().timespec(&time);
                self.uring.submitter().submit_with_args(want, &args)
            }
            None => self.uring.submit_and_wait(want),
        };
        match result {
            Err(error)
                if ![libc::EINTR, libc::ETIME, libc::EBUSY, libc::EAGAIN]
                    .contains(&error.raw_os_error().unwrap_or(0)) =>
            {
                Err(error)
            }
            _ => Ok(()),
        }
    }

    /// The next completion, oldest first.
    pub fn completed(&mut self) -> Option<Completion> {
        loop {
            let entry = self.uring.completion().next()?;
            if entry.user_data() & WATCH == 0 {
                let slot = entry.user_data() as usize;
                let request = self.in_flight[slot].take()?;
                self.free.push(slot);
                return Some(Completion::Request(request.token, entry.result()));
            }
            if entry.user_data() == CANCEL {
                continue;
            }
            let index = (entry.user_data() & !WATCH) as usize;
            if entry.result() < 0 {
                self.broken = Some(io::Error::from_raw_os_error(-entry.result()));
                continue;
            }
            if !cqueue::more(entry.flags()) {
                // The kernel ends a multi-shot poll when the completion queue is full.
                self.arm(index);
            }
            return Some(Completion::Event(index));
        }
    }
}

impl InFlight {
    fn plain(token: u64) -> Self {
        Self {
            token,
            iovecs: Vec::new(),
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        if !self.is_idle() {
            // Requests that have not started are cancelled, the others are waited for.
            let all = types::CancelBuilder::any();
            self.push(opcode::AsyncCancel2::new(all).build().user_data(CANCEL));
        }
        while !self.is_idle() {
            if let Err(error) = self.wait(None) {
                // The kernel may still write to guest memory, so it is never unmapped.
                log::error!("io_uring: {error}; guest memory is left mapped");
                std::mem::forget(self.memory.clone());
                std::mem::forget(std::mem::take(&mut self.in_flight));
                return;
            }
            while self.completed().is_some() {}
            // The cancellation ends the watches too.
            self.broken = None;
        }
    }
}
