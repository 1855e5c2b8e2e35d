//! The thread that serves one queue of a disk.

use super::engine::{Engine, IoEngine};
use super::request::{self, Parsed, Request, Status, Step};
use super::{BlockMetrics, Disk, MAX_IN_FLIGHT};
use crate::fault::guest_fault;
use crate::rate_limit::RateLimiter;
use crate::sys::Completion;
use crate::virtio::{ActiveQueue, Chain, ChainError, QueueError};
use koya_host::sync::lock;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

/// Index of the stop event among the two that a worker waits for; the first is the driver's kick.
const STOP: usize = 1;

/// Errors that end a worker early.
#[derive(Debug, Error)]
enum WorkerError {
    #[error(transparent)]
    Queue(#[from] QueueError),
    #[error(transparent)]
    Chain(#[from] ChainError),
    #[error("a virtio-blk thread cannot wait for events")]
    Host(#[from] io::Error),
}

/// State shared by all queues of a disk.
pub(super) struct Shared {
    pub(super) disk: Arc<Disk>,
    pub(super) metrics: Arc<BlockMetrics>,
    pub(super) limiter: Arc<Mutex<RateLimiter>>,
    pub(super) engine: IoEngine,
    /// The driver does not flush: every write must be durable before it is completed.
    pub(super) durable: bool,
    /// Whether to complete requests in flight on a stop instead of dropping them.
    pub(super) drain: AtomicBool,
}

pub(super) struct Worker {
    queue: ActiveQueue,
    engine: Engine,
    shared: Arc<Shared>,
}

impl Worker {
    /// Prepares resources that the thread may not create itself.
    ///
    /// # Errors
    /// If the host has no file descriptor left.
    pub(super) fn new(queue: ActiveQueue, stop: &EventFd, shared: Arc<Shared>) -> io::Result<Self> {
        let engine = Engine::new(
            shared.engine,
            queue.memory().clone(),
            shared.disk.clone(),
            queue.size(),
            shared.durable,
            [queue.kick().try_clone()?, stop.try_clone()?],
        )?;
        Ok(Self {
            queue,
            engine,
            shared,
        })
    }

    pub(super) fn run(self) {
        let Self {
            queue,
            engine,
            shared,
        } = self;
        let mut service = match engine.enter() {
            Ok(()) => QueueService {
                requests: (0..queue.size()).map(|_| None).collect(),
                free: (0..queue.size()).rev().collect(),
                bytes_in_flight: 0,
                queue,
                engine,
                shared,
            },
            Err(error) => {
                log::error!("a disk's queue can't be served: {error}");
                return queue.set_needs_reset();
            }
        };
        if let Err(error) = service.serve() {
            guest_fault!("a disk's queue: {error:?}; the device needs a reset");
            service.queue.set_needs_reset();
        }
    }
}

struct QueueService {
    queue: ActiveQueue,
    engine: Engine,
    shared: Arc<Shared>,
    /// Requests in flight, by token.
    requests: Vec<Option<Request>>,
    free: Vec<u16>,
    /// Bytes in flight.
    bytes_in_flight: u64,
}

impl QueueService {
    fn serve(&mut self) -> Result<(), WorkerError> {
        let mut stopping = false;
        loop {
            let limit = match stopping {
                false => self.start_requests()?,
                // Requests in flight are completed; they are not resubmitted.
                true if self.free.len() == self.requests.len() => {
                    return Ok(self.queue.notify()?);
                }
                true => None,
            };
            self.queue.notify()?;
            self.engine.wait(limit)?;
            while let Some(completion) = self.engine.completed() {
                match completion {
                    Completion::Event(STOP) if self.shared.drain.load(Ordering::SeqCst) => {
                        stopping = true;
                    }
                    Completion::Event(STOP) => return Ok(()),
                    Completion::Event(_) => {}
                    Completion::Request(token, result) => self.advance(token, result)?,
                }
            }
        }
    }

    /// Starts available requests; returns the waiting time until more may be started. Takes no more than the
    /// queue holds at once: requests that are answered immediately because they are invalid must not delay a
    /// stop.
    fn start_requests(&mut self) -> Result<Option<Duration>, WorkerError> {
        for _ in 0..self.requests.len() {
            if self.free.is_empty()
                || self.bytes_in_flight >= MAX_IN_FLIGHT
                || !self.engine.has_room()
            {
                return Ok(None);
            }
            let wait = lock(&self.shared.limiter).wait(Instant::now());
            if wait.is_some() {
                return Ok(wait);
            }
            let Some(chain) = self.queue.pop()? else {
                if self.queue.arm()? {
                    continue;
                }
                return Ok(None);
            };
            self.begin(chain)?;
        }
        Ok(Some(Duration::ZERO))
    }

    fn begin(&mut self, chain: Chain) -> Result<(), WorkerError> {
        let head = chain.head();
        let memory = self.queue.memory().clone();
        match Request::parse(chain, &memory, &self.shared.disk, self.shared.durable) {
            Ok(Parsed::Request(request)) => {
                lock(&self.shared.limiter).charge(request.bytes());
                let Some(token) = self.free.pop() else {
                    return Ok(());
                };
                let step = request.step();
                self.bytes_in_flight += request.bytes();
                self.shared
                    .metrics
                    .in_flight
                    .fetch_add(1, Ordering::Relaxed);
                self.requests[usize::from(token)] = Some(request);
                match step {
                    Some(step) => self.step(token, step)?,
                    None => self.end(token, Status::Ok)?,
                }
            }
            Ok(Parsed::Completed(chain, status, written)) => {
                self.shared.metrics.count_answer(status);
                let used = request::write_status(&chain, &memory, status, written)?;
                self.queue.complete(head, used)?;
            }
            Err(error) => {
                guest_fault!("a disk's request can't be answered: {error}");
                self.shared.metrics.faults.fetch_add(1, Ordering::Relaxed);
                self.queue.complete(head, 0)?;
            }
        }
        Ok(())
    }

    fn step(&mut self, token: u16, step: Step) -> Result<(), WorkerError> {
        if let Some(request) = &self.requests[usize::from(token)] {
            self.engine.start(token.into(), &request.chain, step)?;
        }
        Ok(())
    }

    fn advance(&mut self, token: u64, result: i32) -> Result<(), WorkerError> {
        let token = token as u16;
        let Some(request) = &mut self.requests[usize::from(token)] else {
            return Ok(());
        };
        let result = u32::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result));
        match request.advance(result) {
            Some(status) => self.end(token, status),
            None => match request.step() {
                Some(step) => self.step(token, step),
                None => self.end(token, Status::Ok),
            },
        }
    }

    fn end(&mut self, token: u16, status: Status) -> Result<(), WorkerError> {
        let Some(request) = self.requests[usize::from(token)].take() else {
            return Ok(());
        };
        self.free.push(token);
        self.bytes_in_flight -= request.bytes();
        self.shared
            .metrics
            .in_flight
            .fetch_sub(1, Ordering::Relaxed);
        self.shared.metrics.count(&request, status);
        let memory = self.queue.memory();
        let used = request::write_status(&request.chain, memory, status, request.written())?;
        self.queue.complete(request.chain.head(), used)?;
        Ok(())
    }
}

/// Removes requests in flight from the metrics when the worker ends.
impl Drop for QueueService {
    fn drop(&mut self) {
        let left = self.requests.iter().flatten().count() as u64;
        let in_flight = &self.shared.metrics.in_flight;
        in_flight.fetch_sub(left, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::super::DiskOptions;
    use super::*;
    use crate::rate_limit::RateLimits;
    use crate::test_utils::{Buffer, Driver};
    use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK};

    #[test]
    fn invalid_requests_are_answered_in_batches() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(4096).unwrap();
        let disk = Disk::open(file.path(), DiskOptions::default()).unwrap();
        let shared = Arc::new(Shared {
            disk: Arc::new(disk),
            metrics: Arc::default(),
            limiter: Arc::new(Mutex::new(RateLimiter::new(RateLimits::default()))),
            engine: IoEngine::Calls,
            durable: false,
            drain: AtomicBool::new(false),
        });
        let mut driver = Driver::new(64);
        for _ in 0..64 {
            driver.offer(&[Buffer::Readable(vec![0xff; 16])]);
        }
        let queue = driver.queue();
        let event = || EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).unwrap();
        let engine = Engine::new(
            IoEngine::Calls,
            queue.memory().clone(),
            shared.disk.clone(),
            queue.size(),
            false,
            [event(), event()],
        );
        let mut service = QueueService {
            // With so short a queue, its contents exceed one batch.
            requests: (0..32).map(|_| None).collect(),
            free: (0..32).rev().collect(),
            bytes_in_flight: 0,
            queue,
            engine: engine.unwrap(),
            shared,
        };
        for _ in 0..2 {
            assert_eq!(service.start_requests().unwrap(), Some(Duration::ZERO));
            assert_eq!(driver.used().len(), 32);
        }
        assert_eq!(service.start_requests().unwrap(), None);
    }
}
