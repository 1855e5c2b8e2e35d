//! The virtio-fs device: a high-priority queue (FORGET), one or more request queues, and the threads that
//! serve them.
//!
//! Each queue has a few threads of its own. A thread that takes a request asks the guest to kick for the next
//! one before it serves it, so that a slow request (such as fsync) blocks only this thread; and if more
//! requests are available, it wakes another thread. A guest that sends one request at a time is served by one
//! thread, at the cost of a wait and an interrupt per request.

use super::passthrough::{Options, Passthrough};
use super::server::{FsMetrics, Server};
use super::{HostEvents, Shares};
use crate::fault::guest_fault;
use crate::virtio::{
    ActivateError, Activation, ActiveQueue, Chain, DeviceKind, QueueError, VirtioDevice, Worker,
};
use event_manager::MutEventSubscriber;
use koya_host::sync::lock;
use koya_host::sys as host;
use koya_host::threads::{self, Role, Threads};
use koya_host::walls::Filter;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

/// A request of 1 MiB takes 260 descriptors, or one indirect descriptor.
const QUEUE_SIZE: u16 = 512;
/// Maximum number of request queues: more than the number of CPUs are of no use.
pub const MAX_REQUEST_QUEUES: u32 = 16;
/// Number of threads per request queue.
const THREADS: usize = 4;
/// Interval between scans for removed files that the guest remembers, and the number of files per scan: some milliseconds of
/// work at most.
const SWEEP: Duration = Duration::from_secs(2);
const SWEPT_FILES: usize = 4096;
const ROLE: Role = Role::new("koya-fs").guest_facing();
/// The first thread creates the others. They inherit its filter, which is therefore loaded only once.
const FIRST: Role = Role::new("koya-fs")
    .without_signals()
    .confined_by(Filter::Files);
/// Size of the tag in the configuration space (section 5.11.4).
const TAG_SIZE: usize = 36;

/// The file system device.
pub struct Fs {
    config: [u8; TAG_SIZE + 4],
    queue_sizes: Vec<u16>,
    server: Arc<Server>,
    threads: Threads,
    /// For threads that are serving requests and do not poll the stop event.
    stopping: Arc<AtomicBool>,
}

impl Fs {
    /// A device that the guest mounts by `tag` (at most 36 bytes), with 1 to [`MAX_REQUEST_QUEUES`] request
    /// queues.
    ///
    /// # Errors
    /// If the tag is too long, or the host has no `/proc` or no descriptors left.
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
            threads: Threads::new(FIRST)?,
            stopping: Arc::default(),
        })
    }

    /// Metrics, also while the device is in use.
    pub fn metrics(&self) -> Arc<FsMetrics> {
        self.server.metrics().clone()
    }

    /// Changes on the host to files that the guest watches. Calling this, before the machine starts, makes
    /// the device offer the feature to the guest. It requires Koya's guest kernel, to which the agent passes
    /// the events (`guest-kernel/patches`).
    pub fn host_events(&self) -> HostEvents {
        self.server.files().host_events()
    }

    /// Starts the threads of these queues. The first queue is urgent.
    fn spawn(&mut self, queues: Vec<ActiveQueue>) -> io::Result<()> {
        let mut crews = Vec::new();
        for (index, queue) in queues.into_iter().enumerate() {
            // The high-priority queue has little to do, so its thread also sweeps.
            let is_urgent = index == 0;
            let crew = Arc::new(QueueThreads::new(
                queue,
                self.server.clone(),
                self.threads.stop_event(),
                self.stopping.clone(),
                is_urgent,
            )?);
            let threads = if is_urgent { 1 } else { THREADS };
            crews.extend(std::iter::repeat_n(crew, threads));
        }
        let Some(own) = crews.pop() else {
            return Ok(());
        };
        let (sender, created) = channel();
        self.threads.spawn(move || {
            for crew in crews {
                let thread = threads::spawn(ROLE, move || crew.run());
                let failed = thread.is_err();
                if sender.send(thread).is_err() || failed {
                    return;
                }
            }
            drop(sender);
            own.run();
        })?;
        for thread in created {
            self.threads.adopt(thread?);
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
        DeviceKind::FILE_SYSTEM
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn config(&self) -> Option<Vec<u8>> {
        Some(self.config.to_vec())
    }

    fn activate(&mut self, mut activation: Activation) -> Result<Worker, ActivateError> {
        let mut queues = Vec::new();
        for index in 0..self.queue_sizes.len() as u16 {
            queues.push(activation.take_queue(index)?);
        }
        if let Err(source) = self.spawn(queues) {
            self.stop_threads();
            return Err(ActivateError::Host {
                operation: "start a virtio-fs thread",
                source,
            });
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
        self.server.files().end_host_events();
    }
}

/// Checks that threads can have their own umask, which the device's threads need.
fn check_host() -> io::Result<()> {
    let tried = threads::spawn(ROLE, host::unshare_fs_state)?.join();
    match tried {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(io::Error::new(
            error.kind(),
            format!("virtio-fs needs unshare(CLONE_FS), which the host refuses: {error}"),
        )),
        Err(_) => Err(io::Error::other("a thread panicked")),
    }
}

/// A queue and the threads that serve it.
struct QueueThreads {
    queue: Mutex<Shared>,
    /// Wakes one thread for each kick of the guest, and all of them permanently at the end.
    wake: Epoll,
    kick: EventFd,
    server: Arc<Server>,
    stopping: Arc<AtomicBool>,
    /// Whether its thread looks for removed files when it is idle.
    sweeps: bool,
}

struct Shared {
    queue: ActiveQueue,
    /// Threads that wait, or have been woken but do not run yet.
    idle: usize,
}

impl QueueThreads {
    fn new(
        queue: ActiveQueue,
        server: Arc<Server>,
        stop: &EventFd,
        stopping: Arc<AtomicBool>,
        sweeps: bool,
    ) -> io::Result<Self> {
        let kick = queue.kick().try_clone()?;
        let wake = Epoll::new()?;
        // Edge-triggered: nobody needs to read the event, and each kick wakes one thread.
        let kicked = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, 0);
        wake.ctl(ControlOperation::Add, kick.as_raw_fd(), kicked)?;
        let stopped = EpollEvent::new(EventSet::IN, 0);
        wake.ctl(ControlOperation::Add, stop.as_raw_fd(), stopped)?;
        Ok(Self {
            queue: Mutex::new(Shared { queue, idle: 0 }),
            wake,
            kick,
            server,
            stopping,
            sweeps,
        })
    }

    fn run(&self) {
        if let Err(error) = host::unshare_fs_state() {
            // No request that creates files may run on this thread, since it would use the umask of the
            // process. This was possible when the device was created.
            log::error!("virtio-fs: a thread can't have a file-mode mask of its own: {error}");
            lock(&self.queue).queue.set_needs_reset();
            return;
        }
        rustix::process::umask(rustix::fs::Mode::empty());
        if let Err(error) = self.serve() {
            lock(&self.queue).queue.fail(&error);
        }
    }

    fn serve(&self) -> Result<(), QueueError> {
        let memory = lock(&self.queue).queue.memory().clone();
        let mut swept = Instant::now();
        // When the device stops, requests left in the queue are not served.
        while !self.stopping.load(Ordering::SeqCst) {
            if self.sweeps && swept.elapsed() >= SWEEP {
                self.server.files().sweep(SWEPT_FILES);
                swept = Instant::now();
            }
            let Some(chain) = self.next()? else {
                self.wait();
                continue;
            };
            let written = match self.server.serve(&chain, &memory) {
                Ok(written) => written,
                Err(error) => {
                    guest_fault!("virtio-fs: a request can't be answered: {error}");
                    0
                }
            };
            let queue = &mut lock(&self.queue).queue;
            queue.complete(chain.head(), written)?;
            queue.notify()?;
        }
        Ok(())
    }

    /// The next request; if there is none, this thread counts as idle and kicks are enabled.
    fn next(&self) -> Result<Option<Chain>, QueueError> {
        let mut shared = lock(&self.queue);
        loop {
            let chain = shared.queue.pop()?;
            let more = shared.queue.arm()?;
            if chain.is_none() {
                // A driver that keeps changing its index could keep this loop going.
                if more && !self.stopping.load(Ordering::SeqCst) {
                    continue;
                }
                shared.idle += 1;
            } else if more && shared.idle > 0 {
                self.kick.write(1).ok();
            }
            return Ok(chain);
        }
    }

    fn wait(&self) {
        let limit = if self.sweeps {
            SWEEP.as_millis() as i32
        } else {
            -1
        };
        let waited = self.wake.wait(limit, &mut [EpollEvent::default()]);
        lock(&self.queue).idle -= 1;
        if let Err(error) = waited
            && error.kind() != io::ErrorKind::Interrupted
        {
            log::error!("virtio-fs: a thread can't wait: {error}");
            lock(&self.queue).queue.set_needs_reset();
            self.stopping.store(true, Ordering::SeqCst);
        }
    }
}
