//! The guest's clock follows the host's.
//!
//! The guest's kernel counts time by the CPU's counter, as the host does, but knows of none of the host's
//! corrections: a step of the host's clock is not seen there, nor its slewing, and what a machine that was
//! stopped misses may be lost. So the host compares the two, after a step of its own clock (which a timer of the
//! kernel's tells, also after the host's suspend), after its process was stopped and continued, and every few
//! minutes for drift. In between nothing wakes an idle guest.
//!
//! Called by a thread of its own for each sandbox. What is sent is a difference, which an answer that comes late
//! does not make wrong. A guest may answer anything, or nothing: it is waited for within the agent's limits, by
//! this thread alone, and what it gets wrong is its own clock.

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

/// How often the clocks are compared when nothing happened.
const PERIOD: Duration = Duration::from_secs(5 * 60);
/// How soon again if the guest did not answer.
const RETRY: Duration = Duration::from_secs(10);
/// What a guest may be ahead: less than what programs see between two hosts.
const LEAD: Duration = Duration::from_millis(20);
/// What it may be behind. Times of files on the host's file systems are the host's, and programs such as make find a
/// file that is newer than the clock.
const LAG: Duration = Duration::from_millis(2);
/// An answer that took longer is asked for again, a few times: it says too little.
const PROMPT: Duration = Duration::from_millis(200);
const TRIES: usize = 3;

/// Ends the thread when the sandbox ends.
pub(crate) struct Clock {
    _alive: io::PipeWriter,
}

/// One comparison of the clocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Reading {
    /// By how much the guest is behind the host, in nanoseconds.
    behind_ns: i64,
    /// By how much that may be wrong.
    doubt: Duration,
}

impl Reading {
    /// From the host's clock before the guest was asked, the guest's, and how long the answer took.
    fn new(asked_ns: i64, guest_ns: i64, took: Duration) -> Self {
        let half = took / 2;
        let middle = asked_ns.saturating_add(nanoseconds(half));
        Self {
            behind_ns: middle.saturating_sub(guest_ns),
            doubt: half,
        }
    }

    /// What the guest's clock is to be moved by; nothing if it is right as far as anybody can say.
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
    /// Starts to follow, for a guest whose clock was set just now.
    ///
    /// # Errors
    /// If the host has no descriptor or thread left.
    pub(crate) fn follow(agent: Agent) -> io::Result<Self> {
        let (ended, alive) = io::pipe()?;
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer = timerfd_create(TimerfdClockId::Realtime, flags)?;
        arm(&timer, PERIOD)?;
        // It tells of a process that goes on after it was stopped (signal(7)); poll(2) does not.
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

/// What the thread waits for.
const TIMER: u64 = 0;
const END: u64 = 1;

/// Has the timer go off after a while, and as soon as the host's clock is set.
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
        // The clock was set before; the timer runs all the same.
        Ok(_) | Err(Errno::CANCELED) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn run(events: &OwnedFd, timer: &OwnedFd, agent: &Agent) {
    let silent = Warnings::new();
    while wait(events, timer) {
        // First that, so that a step meanwhile is seen.
        let compared = arm(timer, PERIOD)
            .map_err(Error::host("set a timer"))
            .and_then(|()| compare(agent));
        match compared {
            Ok(()) => {}
            Err(Error::HungUp { .. }) => return,
            Err(error) => {
                silent.warn(format_args!("the guest's clock does not follow: {error}"));
                if arm(timer, RETRY).is_err() {
                    return;
                }
            }
        }
    }
}

/// Until there is a reason to compare the clocks; false at the end.
fn wait(events: &OwnedFd, timer: &OwnedFd) -> bool {
    let mut seen = Vec::with_capacity(2);
    match epoll::wait(events, spare_capacity(&mut seen), None) {
        // A signal, or this process goes on after it was stopped.
        Err(Errno::INTR) => return true,
        Err(error) => {
            log::warn!("the guest's clock follows no more: {error}");
            return false;
        }
        Ok(_) => {}
    }
    // Makes it wait anew; that the clock was set (ECANCELED) and that time is up are the same here.
    rustix::io::read(timer, &mut [0; 8]).ok();
    !seen.iter().any(|event| event.data.u64() == END)
}

/// Compares the clocks, and has the guest's moved if it is wrong.
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
        // The answer was on its way for half of that time.
        assert_eq!(reading(1000, 1005, 10), None);
        assert_eq!(reading(1000, 955, 10), Some(50));
        // Behind: files on the host would be newer than it.
        assert_eq!(reading(1000, 995, 2), Some(6));
    }

    #[test]
    fn what_nobody_can_tell_is_left() {
        assert_eq!(reading(1000, 1015, 0), None);
        // An answer after two seconds: the guest may be right.
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
        // It says that the year is 1970.
        let wrong = agent(move |method| {
            sender.send(method.to_owned()).ok();
            Word::Ok
        });
        compare(&wrong).unwrap();
        let asked: Vec<String> = asked.try_iter().collect();
        assert_eq!(asked, ["GetClock", "AdjustClock"]);
        let started = Instant::now();
        let silent = compare(&agent(|_| Word::Silence));
        assert!(matches!(silent, Err(Error::Overdue { .. })), "{silent:?}");
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
