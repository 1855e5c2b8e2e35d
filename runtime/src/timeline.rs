//! Where the time of a start goes: its steps, on one clock.

use serde::Serialize;
use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How many steps are kept: those of the first containers.
const KEPT: usize = 64;

/// A step of a start, since [`Sandbox::start`](crate::Sandbox::start) was called.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Step {
    /// What was done: `devices`, `machine`, `kernel`, `agent`, `settings`; then of each container
    /// `create` and `start`.
    pub name: &'static str,
    /// Which container; empty for the sandbox itself.
    pub container: String,
    /// Its begin, in microseconds.
    pub from_us: u64,
    /// Its end, in microseconds.
    pub to_us: u64,
}

impl Step {
    /// How long it took.
    pub fn took(&self) -> Duration {
        Duration::from_micros(self.to_us.saturating_sub(self.from_us))
    }
}

/// `kernel 1520.3 ms`
impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:.1} ms", self.name, self.took().as_secs_f64() * 1e3)
    }
}

/// The steps so far.
#[derive(Debug)]
pub(crate) struct Timeline {
    origin: Instant,
    steps: Mutex<Vec<Step>>,
}

impl Timeline {
    /// From now on.
    pub(crate) fn new() -> Self {
        Self {
            origin: Instant::now(),
            steps: Mutex::default(),
        }
    }

    /// How long ago it began.
    pub(crate) fn elapsed(&self) -> Duration {
        self.origin.elapsed()
    }

    /// A step that began then, and ends now: when that is.
    pub(crate) fn step(&self, name: &'static str, from: Duration) -> Duration {
        let now = self.elapsed();
        self.note(name, "", from, now);
        now
    }

    pub(crate) fn note(&self, name: &'static str, container: &str, from: Duration, to: Duration) {
        let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let mut steps = self.steps.lock().unwrap_or_else(PoisonError::into_inner);
        if steps.len() < KEPT {
            steps.push(Step {
                name,
                container: container.into(),
                from_us: micros(from),
                to_us: micros(to),
            });
        }
    }

    pub(crate) fn steps(&self) -> Vec<Step> {
        let steps = self.steps.lock();
        steps.unwrap_or_else(PoisonError::into_inner).clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_follow_each_other_and_are_bounded() {
        let timeline = Timeline::new();
        let first = timeline.step("devices", Duration::ZERO);
        timeline.step("machine", first);
        let steps = timeline.steps();
        assert_eq!(steps[0].to_us, steps[1].from_us);
        assert!(steps[1].to_string().starts_with("machine "), "{}", steps[1]);
        for _ in 0..2 * KEPT {
            timeline.note("create", "c", Duration::ZERO, Duration::from_micros(1500));
        }
        assert_eq!(timeline.steps().len(), KEPT);
        assert_eq!(timeline.steps()[5].to_string(), "create 1.5 ms");
    }
}
