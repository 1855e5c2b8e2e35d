//! The virtio device: a queue for urgent requests (FORGET), one or more for the others, and the
//! threads that serve them.
//!
//! Each queue has a few threads of its own, which take turns: the one whose turn it is waits for
//! a request, passes the turn on, and then serves what it got. So a slow request (an fsync, say)
//! holds one thread and no other request.

use super::Shares;
use super::passthrough::{Options, Passthrough};
use super::server::{FsMetrics, Server};
use crate::sync::{guest_fault, lock};
use crate::sys;
use crate::threads::Threads;
use crate::virtio::{
    ActivateError, Activation, ActiveQueue, DeviceKind, QueueError, VirtioDevice, Worker,
    read_config_space,
};
use event_manager::MutEventSubscriber;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use vmm_sys_util::eventfd::EventFd;

/// A request of 1 MiB takes 260 descriptors, or one that points to a table of them.
const QUEUE_SIZE: u16 = 512;
/// The most request queues: as many as CPUs are any use.
pub const MAX_REQUEST_QUEUES: u32 = 16;
/// Threads for each request queue.
const THREADS: usize = 4;
/// Bytes of a tag in the configuration space (section 5.11.4).
const TAG_SIZE: usize = 36;

/// The file system device.
pub struct Fs {
    config: [u8; TAG_SIZE + 4],
    queue_sizes: Vec<u16>,
    server: Arc<Server>,
    threads: Threads,
    /// For threads at work, which do not look at the event.
    stopping: Arc<AtomicBool>,
}

impl Fs {
    /// A device that the guest mounts by `tag` (at most 36 bytes), with `request_queues` from 1 to
    /// [`MAX_REQUEST_QUEUES`].
    ///
    /// # Errors
    /// A tag that is too long; a host without `/proc` or event descriptors.
    pub fn new(
        tag: &str,
        shares: Shares,
        options: Options,
        request_queues: u32,
    ) -> io::Result<Self> {
        if tag.is_empty() || tag.len() > TAG_SIZE {
            let text = format!("the tag {tag:?} is not 1 to {TAG_SIZE} bytes long");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        check_host()?;
        let request_queues = request_queues.clamp(1, MAX_REQUEST_QUEUES);
        let mut config = [0; TAG_SIZE + 4];
        config[..tag.len()].copy_from_slice(tag.as_bytes());
        config[TAG_SIZE..].copy_from_slice(&request_queues.to_le_bytes());
        Ok(Self {
            config,
            queue_sizes: vec![QUEUE_SIZE; 1 + request_queues as usize],
            server: Arc::new(Server::new(Passthrough::new(shares, options)?)),
            threads: Threads::new("koya-fs")?,
            stopping: Arc::default(),
        })
    }

    /// What it did so far, also while it is used.
    pub fn metrics(&self) -> Arc<FsMetrics> {
        self.server.metrics().clone()
    }

    fn spawn(&mut self, queue: ActiveQueue, threads: usize) -> io::Result<()> {
        let kick = queue.kick().try_clone()?;
        let turns = Arc::new(Turns {
            queue: Mutex::new(queue),
            kick,
            turn: Mutex::new(()),
            server: self.server.clone(),
            stop: self.threads.stop_event().clone(),
            stopping: self.stopping.clone(),
        });
        for _ in 0..threads {
            let turns = turns.clone();
            self.threads.spawn(move || turns.run())?;
        }
        Ok(())
    }

    fn stop_threads(&mut self) {
        self.stopping.store(true, Ordering::SeqCst);
        self.threads.stop();
        self.stopping.store(false, Ordering::SeqCst);
        self.server.clear();
    }
}

impl VirtioDevice for Fs {
    fn kind(&self) -> DeviceKind {
        DeviceKind::FileSystem
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_space(&self.config, offset, data);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<Worker, ActivateError> {
        let mut queues = Vec::new();
        for index in 0..self.queue_sizes.len() as u16 {
            queues.push(activation.take_queue(index)?);
        }
        for (index, queue) in queues.into_iter().enumerate() {
            let threads = if index == 0 { 1 } else { THREADS };
            if let Err(source) = self.spawn(queue, threads) {
                self.stop_threads();
                return Err(ActivateError::Host {
                    operation: "start a virtio-fs thread",
                    source,
                });
            }
        }
        Ok(Worker::OwnThreads)
    }

    fn reset(&mut self, _worker: Option<Box<dyn MutEventSubscriber + Send>>) {
        self.stop_threads();
    }
}

impl Drop for Fs {
    fn drop(&mut self) {
        self.stop_threads();
    }
}

/// Whether threads here can have a file-mode mask of their own, as each of the device's needs.
fn check_host() -> io::Result<()> {
    let tried = std::thread::Builder::new()
        .spawn(sys::unshare_fs_state)?
        .join();
    match tried {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(io::Error::new(
            error.kind(),
            format!("virtio-fs needs unshare(CLONE_FS), which the host refuses: {error}"),
        )),
        Err(_) => Err(io::Error::other("a thread panicked")),
    }
}

/// One queue and the turn of its threads. Lock order: `turn`, then `queue`.
struct Turns {
    kick: EventFd,
    queue: Mutex<ActiveQueue>,
    turn: Mutex<()>,
    server: Arc<Server>,
    stop: Arc<EventFd>,
    stopping: Arc<AtomicBool>,
}

impl Turns {
    fn run(&self) {
        sys::block_signals();
        if let Err(error) = sys::unshare_fs_state() {
            // Then no request that makes files may run here: their masks would be the process's.
            // It was possible when the device was made.
            log::error!("virtio-fs: a thread can't have a file-mode mask of its own: {error}");
            lock(&self.queue).ask_for_reset();
            return;
        }
        rustix::process::umask(rustix::fs::Mode::empty());
        if let Err(error) = self.serve() {
            lock(&self.queue).fail(&error);
        }
    }

    fn serve(&self) -> Result<(), QueueError> {
        let memory = lock(&self.queue).memory().clone();
        loop {
            let turn = lock(&self.turn);
            let chain = loop {
                // What the guest still has in the queue is not waited for.
                if self.stopping.load(Ordering::SeqCst) {
                    return Ok(());
                }
                let mut queue = lock(&self.queue);
                if let Some(chain) = queue.pop()? {
                    break chain;
                }
                if queue.arm()? {
                    continue;
                }
                drop(queue);
                let [_, stopped] = sys::wait_readable([Some(&self.kick), Some(&*self.stop)], None)
                    .unwrap_or_else(|error| {
                        log::error!("virtio-fs: a worker can't wait: {error}");
                        [false, true]
                    });
                if stopped {
                    return Ok(());
                }
                self.kick.read().ok();
            };
            drop(turn);
            let written = match self.server.serve(&chain, &memory) {
                Ok(written) => written,
                Err(error) => {
                    guest_fault!("virtio-fs: a request can't be answered: {error}");
                    0
                }
            };
            let mut queue = lock(&self.queue);
            queue.complete(chain.head(), written)?;
            queue.notify()?;
        }
    }
}
