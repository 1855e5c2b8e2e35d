//! Reliable termination of containers, independent of the guest.
//!
//! SIGKILL is sent by the guest's agent, which may not respond, or may claim that it was sent. So the host records the
//! request, and ends the virtual machine if the container has not ended after [`Timeouts::end`], or after
//! [`Timeouts::end_beside_others`] while another container is alive that was not killed; or as soon as the agent fails to
//! respond, if no such container is left.
//!
//! The limits are extended while data is still being written to the machine's disks.
//!
//! Threads: `koya-kill` for each request to the agent, `koya-overdue` for each killed container.

use crate::Error;
use crate::agent::Agent;
use crate::patience::{DiskWork, WRITE_OUT_LIMIT};
use crate::sync::lock;
use koya_vmm::devices::blk::BlockHandle;
use koya_vmm::host::threads;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

/// Polling interval.
const LOOK: Duration = Duration::from_millis(20);

/// Time limits of the guest.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Timeouts {
    /// For the reply to a signal; after that the host replies.
    pub(crate) answer: Duration,
    /// For reporting the end of a container that was sent SIGKILL.
    pub(crate) end: Duration,
    /// The same while another container is alive that was not killed and would end with the machine: a process that waits
    /// for a slow file system of the host dies only when that responds, which is not the guest's fault.
    pub(crate) end_beside_others: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            answer: Duration::from_secs(2),
            end: Duration::from_secs(10),
            end_beside_others: Duration::from_secs(60),
        }
    }
}

/// The state of one container's end.
#[derive(Default)]
pub(crate) struct Termination {
    killed: AtomicBool,
    ended: AtomicBool,
    /// Number of threads waiting for the guest's report.
    waiting: AtomicUsize,
}

impl Termination {
    /// Whether it was sent SIGKILL.
    pub(crate) fn is_killed(&self) -> bool {
        self.killed.load(Ordering::SeqCst)
    }

    /// The guest has reported its end, or is gone.
    pub(crate) fn end(&self) {
        self.ended.store(true, Ordering::SeqCst);
    }

    fn has_ended(&self) -> bool {
        self.ended.load(Ordering::SeqCst)
    }

    /// Calls `wait`, which waits for the guest's report.
    pub(crate) fn follow<T>(&self, wait: impl FnOnce() -> T) -> T {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let report = wait();
        self.end();
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        report
    }
}

/// Ends the killed containers of a sandbox.
pub(crate) struct Terminator {
    agent: Agent,
    timeouts: Timeouts,
    containers: Mutex<Vec<Weak<Termination>>>,
    /// The machine's disks, which are flushed before a process that waits for that ends.
    disks: Box<dyn Fn() -> Vec<BlockHandle> + Send + Sync>,
    /// Ends the virtual machine with this reason.
    end_machine: Box<dyn Fn(&str) + Send + Sync>,
}

impl Terminator {
    pub(crate) fn new(
        agent: Agent,
        timeouts: Timeouts,
        disks: impl Fn() -> Vec<BlockHandle> + Send + Sync + 'static,
        end_machine: impl Fn(&str) + Send + Sync + 'static,
    ) -> Arc<Self> {
        Arc::new(Self {
            agent,
            timeouts,
            containers: Mutex::default(),
            disks: Box::new(disks),
            end_machine: Box::new(end_machine),
        })
    }

    /// Adds a container.
    pub(crate) fn add(&self) -> Arc<Termination> {
        let termination = Arc::new(Termination::default());
        let mut containers = lock(&self.containers);
        containers.retain(|termination| termination.strong_count() > 0);
        containers.push(Arc::downgrade(&termination));
        termination
    }

    /// Ends the virtual machine because the guest fails to do its duty.
    pub(crate) fn give_up(&self, why: &str) {
        (self.end_machine)(why);
    }

    /// Sends SIGKILL to a container's first process, or to all of its processes. Returns soon, whatever
    /// the guest does.
    ///
    /// # Errors
    /// If the agent reports that it has already ended, or the host cannot create a thread.
    pub(crate) fn kill(
        self: &Arc<Self>,
        termination: &Arc<Termination>,
        id: &str,
        all: bool,
    ) -> Result<(), Error> {
        let threads_error = || Error::host("start a thread");
        if !termination.killed.swap(true, Ordering::SeqCst) {
            let unwatched = termination.clone();
            let (terminator, termination, id) =
                (self.clone(), Arc::downgrade(termination), id.to_owned());
            let watched =
                threads::spawn("koya-overdue", move || terminator.watch(&termination, &id));
            watched.map_err(|error| {
                // Lets the next call try again.
                unwatched.killed.store(false, Ordering::SeqCst);
                threads_error()(error)
            })?;
        }
        let (sender, answer) = sync_channel(1);
        let (terminator, id) = (self.clone(), id.to_owned());
        let asked = threads::spawn("koya-kill", move || {
            sender.send(terminator.ask_for_kill(&id, all)).ok();
        });
        asked.map_err(threads_error())?;
        // Without a reply, the host still enforces it.
        answer.recv_timeout(self.timeouts.answer).unwrap_or(Ok(()))
    }

    fn ask_for_kill(&self, id: &str, all: bool) -> Result<(), Error> {
        const SIGKILL: i32 = 9;
        let error = match self.agent.signal(id, "", SIGKILL, all) {
            Ok(()) => return Ok(()),
            Err(error @ Error::NoProcess { .. }) => return Err(error),
            Err(error) => error,
        };
        log::warn!("container {id}: the guest did not deliver SIGKILL: {error}");
        // It has replied: the container may still end.
        if matches!(error, Error::Agent { .. }) {
            return Ok(());
        }
        let live = self.live();
        if !live.is_empty() && live.iter().all(|termination| termination.is_killed()) {
            self.give_up("it does not answer, and all of its containers are killed");
        }
        Ok(())
    }

    /// The containers that have not ended.
    fn live(&self) -> Vec<Arc<Termination>> {
        let containers = lock(&self.containers);
        let containers = containers.iter().filter_map(Weak::upgrade);
        containers
            .filter(|termination| !termination.has_ended())
            .collect()
    }

    /// Time limit for a killed container, given the others.
    fn limit(&self) -> Duration {
        match self
            .live()
            .iter()
            .all(|termination| termination.is_killed())
        {
            true => self.timeouts.end,
            false => self.timeouts.end_beside_others,
        }
    }

    /// Enforces the end of a killed container.
    fn watch(&self, termination: &Weak<Termination>, id: &str) {
        let mut work = DiskWork::new((self.disks)());
        // Counted in polls instead of clock time: while this process is stopped, the guest does not run either.
        let (mut silent, mut whole) = (Duration::ZERO, Duration::ZERO);
        loop {
            let Some(termination) = termination.upgrade() else {
                return;
            };
            if termination.has_ended() {
                return;
            }
            // The others may end, or be killed, meanwhile.
            let limit = self.limit();
            if work.goes_on() {
                silent = Duration::ZERO;
            }
            if silent >= limit || whole >= WRITE_OUT_LIMIT {
                // If nobody waits for the container, the guest had no reason to report its end.
                let is_awaited = termination.waiting.load(Ordering::SeqCst) > 0;
                if is_awaited || self.agent.has_ended(id).is_err() {
                    self.give_up(&format!(
                        "container {id} has not ended {limit:?} after SIGKILL"
                    ));
                }
                return;
            }
            drop(termination);
            std::thread::sleep(LOOK);
            silent += LOOK;
            whole += LOOK;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_agent::{Word, agent};
    use std::sync::mpsc::{Receiver, channel};
    use std::time::Instant;

    const TIMEOUTS: Timeouts = Timeouts {
        answer: Duration::from_millis(100),
        end: Duration::from_millis(400),
        end_beside_others: Duration::from_secs(3),
    };
    /// Longer than all limits above, and than the limit for a signal call.
    const LIMIT: Duration = Duration::from_secs(20);

    fn ends(word: impl Fn(&str) -> Word + Send + 'static) -> (Arc<Terminator>, Receiver<()>) {
        let (sender, ended) = channel();
        let ends = Terminator::new(agent(word), TIMEOUTS, Vec::new, move |_| {
            sender.send(()).ok();
        });
        (ends, ended)
    }

    #[test]
    fn a_kill_is_answered_and_the_machine_ends_though_the_agent_is_silent() {
        let (ends, ended) = ends(|_| Word::Silence);
        let (killed, _other) = (ends.add(), ends.add());
        let started = Instant::now();
        ends.kill(&killed, "a", false).unwrap();
        assert!(started.elapsed() < TIMEOUTS.end, "{:?}", started.elapsed());
        std::thread::scope(|scope| {
            // A thread waits for its end without a reply.
            let (sender, hold) = channel::<()>();
            scope.spawn(|| killed.follow(move || hold.recv().ok()));
            ended.recv_timeout(LIMIT).unwrap();
            drop(sender);
        });
        assert!(started.elapsed() >= TIMEOUTS.end_beside_others);
        assert!(killed.is_killed());
    }

    #[test]
    fn a_machine_with_a_container_that_lives_has_more_time_until_that_ends_too() {
        let (ends, ended) = ends(|_| Word::Ok);
        let (killed, other) = (ends.add(), ends.add());
        // As if a thread waited without a reply.
        killed.waiting.store(1, Ordering::SeqCst);
        let started = Instant::now();
        ends.kill(&killed, "a", false).unwrap();
        assert!(ended.recv_timeout(TIMEOUTS.end * 2).is_err());
        other.end();
        ended.recv_timeout(LIMIT).unwrap();
        let took = started.elapsed();
        assert!(took < TIMEOUTS.end_beside_others, "{took:?}");
    }

    #[test]
    fn an_agent_that_says_ok_and_does_nothing_loses_its_machine() {
        let (ends, ended) = ends(|method| match method {
            "WaitProcess" => Word::Silence,
            _ => Word::Ok,
        });
        let killed = ends.add();
        ends.kill(&killed, "a", true).unwrap();
        ended.recv_timeout(LIMIT).unwrap();
    }

    #[test]
    fn a_container_that_ends_takes_nothing_with_it() {
        let (ends, ended) = ends(|_| Word::Ok);
        let killed = ends.add();
        ends.kill(&killed, "a", false).unwrap();
        killed.follow(|| ());
        // A container that has ended, but whose end nobody here waited for.
        let unasked = ends.add();
        ends.kill(&unasked, "b", false).unwrap();
        assert!(ended.recv_timeout(TIMEOUTS.end * 3).is_err());
    }

    /// An agent that has replied may still do it.
    #[test]
    fn an_agent_that_refuses_has_its_time() {
        let (ends, ended) = ends(|_| Word::Error);
        let killed = ends.add();
        killed.waiting.store(1, Ordering::SeqCst);
        let started = Instant::now();
        ends.kill(&killed, "a", false).unwrap();
        ended.recv_timeout(LIMIT).unwrap();
        assert!(started.elapsed() >= TIMEOUTS.end);
    }
}
