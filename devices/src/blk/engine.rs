//! Submits the steps of a queue's requests to the host, by io_uring or, where it is unavailable, by system
//! calls.

use super::disk::Disk;
use super::request::Step;
use crate::sys::{self, Completion, Ring, Transfer};
use crate::virtio::{Chain, ChainError, Memory};
use rustix::fs::fallocate;
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;
use vmm_sys_util::eventfd::EventFd;

/// Maximum size of a bounce buffer in bytes.
const MAX_BOUNCE: usize = 256 << 10;

/// Method of submitting a disk's requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IoEngine {
    /// io_uring if the host allows it, otherwise plain system calls.
    #[default]
    Auto,
    /// Plain system calls: one request of a queue at a time.
    Calls,
}

/// Executes the steps of a worker.
pub(super) struct Engine {
    memory: Arc<Memory>,
    disk: Arc<Disk>,
    /// Writes must be on stable storage before they are completed.
    durable: bool,
    ring: Option<Ring>,
    events: [EventFd; 2],
    /// Completions of system calls.
    done: VecDeque<Completion>,
}

impl Engine {
    /// Creates an engine for `room` concurrent requests that also reports writes to the two `events`. It may
    /// read the first event, but never the second. The thread that uses it must [`enter`](Self::enter) it first.
    ///
    /// # Errors
    /// If the host has no file descriptor left.
    pub(super) fn new(
        choice: IoEngine,
        memory: Arc<Memory>,
        disk: Arc<Disk>,
        room: u16,
        durable: bool,
        events: [EventFd; 2],
    ) -> io::Result<Self> {
        let mut ring = match choice {
            IoEngine::Auto => Ring::new(memory.clone(), disk.file().clone(), room).ok(),
            IoEngine::Calls => None,
        };
        if let Some(ring) = &mut ring {
            for event in &events {
                ring.watch(event)?;
            }
        }
        Ok(Self {
            memory,
            durable,
            disk,
            ring,
            events,
            done: VecDeque::new(),
        })
    }

    /// Binds the engine to the calling thread.
    ///
    /// # Errors
    /// If the host refuses.
    pub(super) fn enter(&self) -> io::Result<()> {
        self.ring.as_ref().map_or(Ok(()), Ring::enable)
    }

    /// Whether another request can be started.
    pub(super) fn has_room(&self) -> bool {
        match &self.ring {
            Some(ring) => ring.has_room(),
            // A completion is delivered before the next request starts.
            None => self.done.is_empty(),
        }
    }

    /// Starts a step; its completion has this `token`.
    ///
    /// # Errors
    /// If the chain is shorter than the step.
    pub(super) fn start(
        &mut self,
        token: u64,
        chain: &Chain,
        step: Step,
    ) -> Result<(), ChainError> {
        let misaligned = self.is_misaligned(chain, step)?;
        if self.ring.is_none() || misaligned {
            let called = match misaligned {
                true => self.bounce(chain, step)?,
                false => self.call(chain, step)?,
            };
            let result = match called {
                Ok(bytes) => bytes as i32,
                Err(error) => -error.raw_os_error().unwrap_or(libc::EIO),
            };
            self.done.push_back(Completion::Request(token, result));
            return Ok(());
        }
        let Some(ring) = &mut self.ring else {
            return Ok(());
        };
        let transfer = |skip, len, at| Transfer {
            chain,
            skip,
            len,
            at,
        };
        match step {
            Step::Read { skip, len, at } => ring.read(token, transfer(skip, len, at))?,
            Step::Write { skip, len, at } => {
                ring.write(token, transfer(skip, len, at), self.durable)?;
            }
            Step::Sync => ring.sync(token),
            Step::Allocate { mode, at, len } => {
                ring.allocate(token, mode.bits() as i32, at, len);
            }
        }
        Ok(())
    }

    fn is_misaligned(&self, chain: &Chain, step: Step) -> Result<bool, ChainError> {
        if !self.disk.is_direct() {
            return Ok(false);
        }
        let slices = match step {
            Step::Read { skip, len, .. } => {
                chain.writable_slices(&self.memory, skip, len as usize)?
            }
            Step::Write { skip, len, .. } => {
                chain.readable_slices(&self.memory, skip, len as usize)?
            }
            Step::Sync | Step::Allocate { .. } => return Ok(false),
        };
        let block = self.disk.memory_alignment();
        Ok(slices.iter().any(|slice| {
            let address = slice.ptr_guard().as_ptr() as usize;
            !address.is_multiple_of(block) || !slice.len().is_multiple_of(block)
        }))
    }

    /// Transfers data between a file with direct I/O and misaligned guest memory through an aligned bounce
    /// buffer, since the page cache must be bypassed. Transfers as much as fits; the rest is another step.
    fn bounce(&self, chain: &Chain, step: Step) -> Result<io::Result<usize>, ChainError> {
        let align = self.disk.memory_alignment();
        let mut room = vec![0; MAX_BOUNCE + align];
        let start = room.as_ptr().align_offset(align);
        let aligned = &mut room[start..start + MAX_BOUNCE];
        let file: &File = self.disk.file();
        match step {
            Step::Read { skip, len, at } => {
                let part = &mut aligned[..MAX_BOUNCE.min(len as usize)];
                match file.read_at(part, at) {
                    Ok(got) => {
                        chain.write(&self.memory, skip, &part[..got])?;
                        Ok(Ok(got))
                    }
                    failed => Ok(failed),
                }
            }
            Step::Write { skip, len, at } => {
                let part = &mut aligned[..MAX_BOUNCE.min(len as usize)];
                chain.read(&self.memory, skip, part)?;
                Ok(self.make_durable(file.write_at(part, at)))
            }
            Step::Sync | Step::Allocate { .. } => self.call(chain, step),
        }
    }

    /// Flushes data written by a system call to stable storage, if required.
    fn make_durable(&self, written: io::Result<usize>) -> io::Result<usize> {
        match self.durable {
            true => written.and_then(|n| self.disk.file().sync_data().map(|()| n)),
            false => written,
        }
    }

    /// Executes a step synchronously.
    fn call(&self, chain: &Chain, step: Step) -> Result<io::Result<usize>, ChainError> {
        let file = self.disk.file();
        Ok(match step {
            Step::Read { skip, len, at } => {
                let slices = chain.writable_slices(&self.memory, skip, len as usize)?;
                sys::read_at(file, &slices, at)
            }
            Step::Write { skip, len, at } => {
                let slices = chain.readable_slices(&self.memory, skip, len as usize)?;
                self.make_durable(sys::write_at(file, &slices, at, false))
            }
            Step::Sync => file.sync_data().map(|()| 0),
            Step::Allocate { mode, at, len } => fallocate(file, mode, at, len)
                .map(|()| 0)
                .map_err(Into::into),
        })
    }

    /// Waits up to `limit` for a completion or an event.
    ///
    /// # Errors
    /// The error from the host's wait.
    pub(super) fn wait(&mut self, limit: Option<Duration>) -> io::Result<()> {
        let limit = if self.done.is_empty() {
            limit
        } else {
            Some(Duration::ZERO)
        };
        if let Some(ring) = &mut self.ring {
            return ring.wait(limit);
        }
        let ready = sys::wait_readable([Some(&self.events[0]), Some(&self.events[1])], limit)?;
        for (index, _) in ready.iter().enumerate().filter(|(_, ready)| **ready) {
            self.done.push_back(Completion::Event(index));
        }
        self.events[0].read().ok();
        Ok(())
    }

    /// The next completion or event.
    pub(super) fn completed(&mut self) -> Option<Completion> {
        let called = self.done.pop_front();
        called.or_else(|| self.ring.as_mut()?.completed())
    }
}
