//! The event loop: one thread with one epoll instance that runs the workers of active devices. It also owns
//! the thread that activates devices ([`Starter`]).

use crate::starter::Starter;
use event_manager::{EventManager, MutEventSubscriber, RemoteEndpoint, SubscriberId};
use koya_devices::virtio::mmio::EventLoop;
use koya_host::threads::{self, Role};
use koya_host::walls::Filter;
use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use koya_host::sync::lock;

const ROLE: Role = Role::new("koya-loop")
    .guest_facing()
    .confined_by(Filter::EventLoop);

type Subscriber = Box<dyn MutEventSubscriber + Send>;

/// Access to the loop for vCPU threads and the owner.
pub(crate) struct LoopHandle {
    endpoint: RemoteEndpoint<Subscriber>,
    known: Mutex<(u64, HashMap<u64, SubscriberId>)>,
    ended: Arc<AtomicBool>,
    starter: Starter,
}

/// The thread of the loop; joined by [`stop`](Self::stop).
pub(crate) struct LoopThread {
    pub(crate) handle: Arc<LoopHandle>,
    thread: Option<JoinHandle<()>>,
}

/// Converts event-manager's error into `std::io::Error`.
struct LoopError(event_manager::Error);

impl From<event_manager::Error> for LoopError {
    fn from(error: event_manager::Error) -> Self {
        Self(error)
    }
}

impl From<LoopError> for io::Error {
    fn from(error: LoopError) -> Self {
        Self::other(error.0)
    }
}

impl LoopThread {
    pub(crate) fn start() -> io::Result<Self> {
        let mut manager = EventManager::<Subscriber>::new().map_err(io::Error::other)?;
        let ended = Arc::new(AtomicBool::new(false));
        let handle = Arc::new(LoopHandle {
            endpoint: manager.remote_endpoint(),
            known: Mutex::default(),
            ended: ended.clone(),
            starter: Starter::start()?,
        });
        let thread = threads::spawn(ROLE, move || {
            while !ended.load(Ordering::SeqCst) {
                if let Err(error) = manager.run() {
                    log::error!("event loop: {error}");
                    return;
                }
            }
        })?;
        Ok(Self {
            handle,
            thread: Some(thread),
        })
    }

    /// Stops the loop. Devices have been shut down before, so it has no workers left.
    pub(crate) fn stop(&mut self) {
        self.handle.starter.stop();
        self.handle.ended.store(true, Ordering::SeqCst);
        self.handle.endpoint.kick().ok();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the event loop panicked");
        }
    }
}

impl Drop for LoopThread {
    fn drop(&mut self) {
        self.stop();
    }
}

impl EventLoop for LoopHandle {
    fn add(&self, worker: Subscriber) -> io::Result<u64> {
        let id = self
            .endpoint
            .call_blocking(move |manager| Ok::<_, LoopError>(manager.add_subscriber(worker)))?;
        let mut known = lock(&self.known);
        known.0 += 1;
        let number = known.0;
        known.1.insert(number, id);
        Ok(number)
    }

    fn start(&self, work: Box<dyn FnOnce() + Send>) -> io::Result<()> {
        self.starter.run(work)
    }

    fn remove(&self, number: u64) -> Option<Subscriber> {
        let id = lock(&self.known).1.remove(&number)?;
        self.endpoint
            .call_blocking(move |manager| Ok::<_, LoopError>(manager.remove_subscriber(id)?))
            .ok()
    }
}
