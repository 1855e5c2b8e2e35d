//! Synchronization of the guest's clock with the host's.
//!
//! The guest kernel counts time by the CPU's counter, as the host does, but does not see corrections on the host: neither
//! steps nor slewing; and the time that a stopped machine misses may be lost. So the host compares the clocks after a step
//! of its own clock (reported by a kernel timer, also after a suspend), after its process was stopped and continued, and
//! every few minutes because of drift. In between nothing wakes an idle guest.
//!
//! Each sandbox has a thread for this. Corrections are sent as a difference, so a late reply does not make them wrong. The
//! guest is not trusted: a reply is awaited within the agent's limits, by this thread alone, and a wrong one affects only
//! the guest's own clock.

use crate::Error;
use crate::agent::Agent;
use koya_vmm::guest_text::Warnings;
use koya_vmm::host::threads;
use rustix::buffer::spare_capacity;
use rustix::event::epoll;
use rustix::io::Errno;
use rustix::time::{
    ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, clock_gettime,
    timerfd_create, timerfd_settime,
};
use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

/// Interval between comparisons without an event.
const PERIOD: Duration = Duration::from_secs(5 * 60);
/// Interval after a guest did not reply.
const RETRY: Duration = Duration::from_secs(10);
/// Tolerated lead of the guest: less than the usual difference between two hosts.
const LEAD: Duration = Duration::from_millis(20);
/// Tolerated lag of the guest. Timestamps of shared files come from the host, and programs such as make notice files newer
/// than the clock.
const LAG: Duration = Duration::from_millis(2);
/// A slower reply is too inaccurate, and the request is repeated a few times.
const PROMPT: Duration = Duration::from_millis(200);
const TRIES: usize = 3;

/// Ends the thread when the sandbox ends.
pub(crate) struct Clock {
    _alive: io::PipeWriter,
}

/// One comparison of the clocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Reading {
    /// Lag of the guest's clock behind the host's, in nanoseconds.
    behind_ns: i64,
    /// Uncertainty of the lag.
    doubt: Duration,
}

impl Reading {
    /// Computes a reading from the host's time of the request, the guest's time, and the duration of the request.
    fn new(asked_ns: i64, guest_ns: i64, took: Duration) -> Self {
        let half = took / 2;
        let middle = asked_ns.saturating_add(nanoseconds(half));
        Self {
            behind_ns: middle.saturating_sub(guest_ns),
            doubt: half,
        }
    }

    /// The required adjustment of the guest's clock; `None` if it is right within the uncertainty.
    fn correction(&self) -> Option<i64> {
        let tolerance = if self.behind_ns > 0 { LAG } else { LEAD };
        let known = self.doubt.max(tolerance);
        (self.behind_ns.unsigned_abs() > known.as_nanos() as u64).then_some(self.behind_ns)
    }
}

fn nanoseconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX)
}

fn now_ns() -> i64 {
    let now = clock_gettime(ClockId::Realtime);
    now.tv_sec
        .saturating_mul(1_000_000_000)
        .saturating_add(now.tv_nsec)
}

impl Clock {
    /// Starts the synchronization for a guest whose clock has just been set.
    ///
    /// # Errors
    /// If the host has no descriptor or thread left.
    pub(crate) fn follow(agent: Agent) -> io::Result<Self> {
        let (ended, alive) = io::pipe()?;
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer = timerfd_create(TimerfdClockId::Realtime, flags)?;
        arm(&timer, PERIOD)?;
        // epoll_wait(2) returns when a stopped process continues (signal(7)); poll(2) does not.
        let events = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let number = epoll::EventData::new_u64;
        epoll::add(&events, &timer, number(TIMER), epoll::EventFlags::IN)?;
        epoll::add(&events, &ended, number(END), epoll::EventFlags::empty())?;
        threads::spawn("koya-clock", move || {
            let _ended = ended;
            run(&events, &timer, &agent);
        })?;
        Ok(Self { _alive: alive })
    }
}

/// Event sources of the thread.
const TIMER: u64 = 0;
const END: u64 = 1;

/// Sets the timer, which also fires when the host's clock is set.
fn arm(timer: &OwnedFd, after: Duration) -> io::Result<()> {
    let now = clock_gettime(ClockId::Realtime);
    let setting = Itimerspec {
        it_interval: Timespec::default(),
        it_value: Timespec {
            tv_sec: now.tv_sec.saturating_add(after.as_secs() as i64),
            tv_nsec: now.tv_nsec,
        },
    };
    let flags = TimerfdTimerFlags::ABSTIME | TimerfdTimerFlags::CANCEL_ON_SET;
    match timerfd_settime(timer, flags, &setting) {
        // The clock was set before; the timer runs nevertheless.
        Ok(_) | Err(Errno::CANCELED) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn run(events: &OwnedFd, timer: &OwnedFd, agent: &Agent) {
    let silent = Warnings::new();
    while wait(events, timer) {
        // Armed first, so that a step meanwhile is noticed.
        let compared = arm(timer, PERIOD)
            .map_err(Error::host("set a timer"))
            .and_then(|()| compare(agent));
        match compared {
            Ok(()) => {}
            Err(Error::AgentDisconnected { .. }) => return,
            Err(error) => {
                silent.warn(format_args!("the guest's clock does not follow: {error}"));
                if arm(timer, RETRY).is_err() {
                    return;
                }
            }
        }
    }
}

/// Waits for a reason to compare the clocks; false at the end of the sandbox.
fn wait(events: &OwnedFd, timer: &OwnedFd) -> bool {
    let mut seen = Vec::with_capacity(2);
    match epoll::wait(events, spare_capacity(&mut seen), None) {
        // A signal, or the process was stopped and continued.
        Err(Errno::INTR) => return true,
        Err(error) => {
            log::warn!("clock synchronization with the guest has ended: {error}");
            return false;
        }
        Ok(_) => {}
    }
    // Resets the timer; a set clock (ECANCELED) and an expired timer are treated alike.
    rustix::io::read(timer, &mut [0; 8]).ok();
    !seen.iter().any(|event| event.data.u64() == END)
}

/// Compares the clocks, and adjusts the guest's if it is wrong.
fn compare(agent: &Agent) -> Result<(), Error> {
    let mut best: Option<Reading> = None;
    for _ in 0..TRIES {
        let (asked, started) = (now_ns(), Instant::now());
        let guest = agent.clock()?;
        let reading = Reading::new(asked, guest, started.elapsed());
        best = Some(match best {
            Some(best) if best.doubt <= reading.doubt => best,
            _ => reading,
        });
        if reading.doubt <= PROMPT {
            break;
        }
    }
    if let Some(by) = best.and_then(|reading| reading.correction()) {
        log::debug!("the guest's clock is moved by {by} ns");
        agent.adjust_clock(by)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: i64 = 1_000_000;

    fn reading(asked_ms: i64, guest_ms: i64, took_ms: u64) -> Option<i64> {
        let took = Duration::from_millis(took_ms);
        let reading = Reading::new(asked_ms * MS, guest_ms * MS, took);
        reading.correction().map(|ns| ns / MS)
    }

    #[test]
    fn a_clock_that_is_off_is_moved_by_the_difference() {
        assert_eq!(reading(1_000_000, 700_001, 2), Some(300_000));
        assert_eq!(reading(1_000_000, 1_300_001, 2), Some(-300_000));
        // The reply took half of that time.
        assert_eq!(reading(1000, 1005, 10), None);
        assert_eq!(reading(1000, 955, 10), Some(50));
        // Behind: files on the host would be newer than it.
        assert_eq!(reading(1000, 995, 2), Some(6));
    }

    #[test]
    fn what_nobody_can_tell_is_left() {
        assert_eq!(reading(1000, 1015, 0), None);
        // A reply after two seconds: the guest may be right.
        assert_eq!(reading(1000, 2900, 2000), None);
        assert_eq!(reading(1000, 9000, 2000), Some(-7000));
    }

    #[test]
    fn a_guest_that_lies_breaks_nothing() {
        for guest in [i64::MIN, i64::MAX, 0] {
            let reading = Reading::new(now_ns(), guest, Duration::MAX);
            assert_eq!(reading.correction(), None);
            let reading = Reading::new(now_ns(), guest, Duration::ZERO);
            assert!(reading.correction().is_some());
        }
    }

    #[test]
    fn a_guest_is_asked_and_then_told_and_waited_for_with_a_limit() {
        use crate::test_agent::{Word, agent};
        use std::sync::mpsc::channel;
        let (sender, asked) = channel();
        // The guest reports the year 1970.
        let wrong = agent(move |method| {
            sender.send(method.to_owned()).ok();
            Word::Ok
        });
        compare(&wrong).unwrap();
        let asked: Vec<String> = asked.try_iter().collect();
        assert_eq!(asked, ["GetClock", "AdjustClock"]);
        let started = Instant::now();
        let silent = compare(&agent(|_| Word::Silence));
        assert!(matches!(silent, Err(Error::Timeout { .. })), "{silent:?}");
        assert!(started.elapsed() < PERIOD / 10);
    }

    #[test]
    fn the_thread_ends_with_its_sandbox() {
        let (ended, alive) = io::pipe().unwrap();
        let events = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer = timerfd_create(TimerfdClockId::Realtime, flags).unwrap();
        let number = epoll::EventData::new_u64;
        epoll::add(&events, &timer, number(TIMER), epoll::EventFlags::IN).unwrap();
        epoll::add(&events, &ended, number(END), epoll::EventFlags::empty()).unwrap();
        arm(&timer, Duration::ZERO).unwrap();
        assert!(wait(&events, &timer), "time is up");
        arm(&timer, PERIOD).unwrap();
        drop(alive);
        assert!(!wait(&events, &timer));
    }
}
