//! Records a start while it happens, at the cost of a clock reading and a few words per step.

use super::{Lane, Step, Timeline, TimelineEvent, TimelineFile, VERSION, store};
use crate::Error;
use crate::agent::AgentTimes;
use crate::sync::lock;
use koya_vmm::BootEvents;
use std::borrow::Cow;
use std::error::Error as _;
use std::fmt::Write;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant, SystemTime};

/// Maximum number of steps, and of marks: those of the first containers are kept.
const KEPT: usize = 64;
/// Maximum length of an error in bytes: it may contain a guest's console output.
const MAX_ERROR: usize = 8 << 10;

/// A step in progress; `None` beyond the maximum number.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Begun(Option<usize>);

#[derive(Debug)]
pub(crate) struct Recorder {
    origin: Instant,
    began: SystemTime,
    id: String,
    is_kept: bool,
    state: Mutex<State>,
    machine: OnceLock<Arc<BootEvents>>,
    /// Serializes writes of the file.
    writing: Mutex<()>,
}

#[derive(Debug)]
struct State {
    steps: Vec<Step>,
    marks: Vec<TimelineEvent>,
    exits: Option<super::ExitCounts>,
    /// The sandbox's own step in progress.
    own: Begun,
    /// Whether something has not been written yet.
    is_new: bool,
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

impl Recorder {
    /// Starts now, or at the caller's start time.
    pub(crate) fn new(keep: Option<&TimelineFile>) -> Self {
        let (now, today) = (Instant::now(), SystemTime::now());
        let began = keep.and_then(|keep| keep.began);
        let before = began.map_or(Duration::ZERO, |began| now.duration_since(began));
        let recorder = Self {
            origin: began.unwrap_or(now),
            began: today.checked_sub(before).unwrap_or(today),
            id: keep.map_or_else(String::new, |keep| keep.id.clone()),
            is_kept: keep.is_some(),
            state: Mutex::new(State {
                steps: Vec::with_capacity(16),
                marks: Vec::new(),
                exits: None,
                own: Begun(None),
                is_new: false,
            }),
            machine: OnceLock::new(),
            writing: Mutex::default(),
        };
        if began.is_some() {
            let prepare = recorder.begin_at(Lane::Host, "prepare", "", Duration::ZERO);
            recorder.end_at(prepare, before);
        }
        recorder
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn elapsed(&self) -> Duration {
        self.origin.elapsed()
    }

    /// Ends the sandbox's own step in progress, and begins the next; returns the time.
    pub(crate) fn next(&self, lane: Lane, name: &'static str) -> Duration {
        let now = self.finish();
        let begun = self.begin_at(lane, name, "", now);
        self.lock().own = begun;
        now
    }

    /// Ends the sandbox's own step in progress; returns the time.
    pub(crate) fn finish(&self) -> Duration {
        let now = self.elapsed();
        let own = std::mem::replace(&mut self.lock().own, Begun(None));
        self.end_at(own, now);
        now
    }

    /// Begins a step of a container.
    pub(crate) fn begin(&self, name: &'static str, container: &str) -> Begun {
        self.begin_at(Lane::Container, name, container, self.elapsed())
    }

    /// Ends a step.
    pub(crate) fn end(&self, begun: Begun) {
        self.end_at(begun, self.elapsed());
    }

    /// Ends a step with an error, which is written at once.
    pub(crate) fn fail(&self, begun: Begun, error: &Error) {
        self.end(begun);
        if let Some(step) = self.lock().step(begun) {
            step.error = Some(whole(error));
        }
        self.keep();
    }

    /// Ends the sandbox's own step in progress, if any, with an error.
    pub(crate) fn fail_start(&self, error: &Error) {
        let own = self.lock().own;
        self.fail(own, error);
    }

    /// Records an event of a container.
    pub(crate) fn mark(&self, name: &'static str, container: &str) {
        let at_us = micros(self.elapsed());
        self.lock().mark(TimelineEvent {
            name: name.into(),
            lane: Lane::Container,
            container: container.into(),
            at_us,
        });
    }

    /// Adds the events of the running machine.
    pub(crate) fn set_boot_events(&self, marks: &Arc<BootEvents>) {
        self.machine.set(marks.clone()).ok();
    }

    /// Inserts the times reported by the agent, relative to its connection: the last part of `kernel`, which lasted from
    /// `running` to `connected`, becomes the agent's.
    pub(crate) fn record_agent_times(
        &self,
        running: Duration,
        connected: Duration,
        told: &AgentTimes,
    ) {
        let exits = self.machine.get().map(|marks| marks.exits().into());
        let mut state = self.lock();
        state.exits = exits;
        // As reported by the agent, within the bounds seen by the host. The guest's clock is not used beyond that: until its
        // kernel has chosen a clock source it counts ticks, some of which are lost on a busy host.
        let at = |before: Duration| micros(connected.saturating_sub(before).max(running));
        let agent_began = at(told.took);
        let kernel = state.steps.iter().position(|s| s.lane == Lane::Kernel);
        if let Some(kernel) = kernel {
            state.steps[kernel].to_us = Some(agent_began);
            let agent = Step {
                name: "agent".into(),
                lane: Lane::Agent,
                container: String::new(),
                from_us: agent_began,
                to_us: Some(micros(connected)),
                error: None,
            };
            state.steps.insert(kernel + 1, agent);
            if let Begun(Some(own)) = &mut state.own {
                *own += usize::from(*own > kernel);
            }
        }
        for (name, before) in &told.marks {
            state.mark(TimelineEvent {
                name: Cow::Owned(name.clone()),
                lane: Lane::Agent,
                container: String::new(),
                at_us: at(*before).max(agent_began),
            });
        }
    }

    fn begin_at(&self, lane: Lane, name: &'static str, container: &str, from: Duration) -> Begun {
        let mut state = self.lock();
        if state.steps.len() >= KEPT {
            return Begun(None);
        }
        state.is_new = true;
        state.steps.push(Step {
            name: name.into(),
            lane,
            container: container.into(),
            from_us: micros(from),
            to_us: None,
            error: None,
        });
        Begun(Some(state.steps.len() - 1))
    }

    fn end_at(&self, begun: Begun, to: Duration) {
        let mut state = self.lock();
        if let Some(step) = state.step(begun) {
            step.to_us = Some(micros(to));
            state.is_new = true;
        }
    }

    /// The current timeline.
    pub(crate) fn timeline(&self) -> Timeline {
        let began = self.began.duration_since(SystemTime::UNIX_EPOCH);
        let began = began.unwrap_or_default().as_millis();
        let state = self.lock();
        let mut marks = state.marks.clone();
        let machine = self.machine.get().map(|events| events.events());
        marks.extend(machine.into_iter().flatten().map(|mark| TimelineEvent {
            name: mark.name.into(),
            lane: match mark.by_guest {
                true => Lane::Kernel,
                false => Lane::Host,
            },
            container: String::new(),
            at_us: micros(mark.at.saturating_duration_since(self.origin)),
        }));
        marks.sort_by_key(|mark| mark.at_us);
        Timeline {
            version: VERSION,
            id: self.id.clone(),
            began_unix_ms: u64::try_from(began).unwrap_or(u64::MAX),
            steps: state.steps.clone(),
            marks,
            exits: state.exits,
        }
    }

    /// Writes the timeline if that is requested and there is something new.
    pub(crate) fn keep(&self) {
        if !self.is_kept {
            return;
        }
        // Containers of one sandbox may start at the same time: the last writer has all of them.
        let _one = lock(&self.writing);
        if !std::mem::take(&mut self.lock().is_new) {
            return;
        }
        if let Err(error) = store::write(&self.timeline()) {
            log::debug!("the timeline of {} is not kept: {error}", self.id);
        }
    }
}

impl State {
    fn step(&mut self, begun: Begun) -> Option<&mut Step> {
        self.steps.get_mut(begun.0?)
    }

    fn mark(&mut self, mark: TimelineEvent) {
        if self.marks.len() < KEPT {
            self.marks.push(mark);
            self.is_new = true;
        }
    }
}

/// The error and its causes, truncated to the maximum length.
fn whole(error: &Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        write!(text, ": {cause}").ok();
        source = cause.source();
    }
    if text.len() > MAX_ERROR {
        text.truncate(text.floor_char_boundary(MAX_ERROR));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(recorder: &Recorder) -> Vec<String> {
        let steps = recorder.timeline().steps;
        steps.iter().map(|step| step.name.to_string()).collect()
    }

    #[test]
    fn steps_follow_each_other_and_are_bounded() {
        let recorder = Recorder::new(None);
        recorder.next(Lane::Host, "devices");
        recorder.next(Lane::Host, "machine");
        recorder.finish();
        let steps = recorder.timeline().steps;
        assert_eq!(steps[0].to_us, Some(steps[1].from_us));
        assert!(steps[1].to_string().starts_with("machine "), "{}", steps[1]);
        for _ in 0..2 * KEPT {
            let begun = recorder.begin("create", "c");
            recorder.mark("asked the agent", "c");
            recorder.end(begun);
        }
        let timeline = recorder.timeline();
        assert_eq!((timeline.steps.len(), timeline.marks.len()), (KEPT, KEPT));
        assert!(timeline.steps.iter().all(|step| step.to_us.is_some()));
        assert!(timeline.matches_id("c") && !timeline.matches_id("d"));
    }

    #[test]
    fn the_callers_own_work_comes_first() {
        let keep = TimelineFile {
            id: "web".into(),
            began: Instant::now().checked_sub(Duration::from_millis(5)),
        };
        let recorder = Recorder::new(Some(&keep));
        recorder.next(Lane::Host, "devices");
        let steps = recorder.timeline().steps;
        assert_eq!((&*steps[0].name, steps[0].from_us), ("prepare", 0));
        assert!(steps[0].to_us >= Some(5000) && steps[1].from_us >= 5000);
    }

    #[test]
    fn the_agents_word_is_kept_within_what_the_host_saw() {
        let recorder = Recorder::new(None);
        let ms = Duration::from_millis;
        let kernel = recorder.begin_at(Lane::Kernel, "kernel", "", ms(10));
        recorder.end_at(kernel, ms(100));
        recorder.next(Lane::Host, "settings");
        let told = AgentTimes {
            took: ms(20),
            marks: vec![("shares mounted".into(), ms(5)), ("late".into(), ms(500))],
        };
        recorder.record_agent_times(ms(10), ms(100), &told);
        recorder.finish();
        assert_eq!(names(&recorder), ["kernel", "agent", "settings"]);
        let timeline = recorder.timeline();
        let spans: Vec<_> = timeline.steps[..2]
            .iter()
            .map(|s| (s.from_us, s.to_us))
            .collect();
        assert_eq!(spans, [(10_000, Some(80_000)), (80_000, Some(100_000))]);
        assert!(timeline.steps[2].to_us.is_some());
        assert_eq!(timeline.ready_us(), Some(100_000));
        let marks: Vec<_> = timeline.marks.iter().map(|m| (&*m.name, m.at_us)).collect();
        let expected = [("late", 80_000), ("shares mounted", 95_000)];
        assert_eq!(marks, expected);
        // An agent that claims to have run before the guest did.
        let recorder = Recorder::new(None);
        let kernel = recorder.begin_at(Lane::Kernel, "kernel", "", ms(10));
        recorder.end_at(kernel, ms(100));
        let took = ms(5000);
        let told = AgentTimes {
            took,
            marks: Vec::new(),
        };
        recorder.record_agent_times(ms(10), ms(100), &told);
        let timeline = recorder.timeline();
        assert_eq!(timeline.steps[0].to_us, Some(10_000));
        assert_eq!(timeline.marks, []);
    }

    #[test]
    fn a_failure_says_what_was_under_way_and_why() {
        let recorder = Recorder::new(None);
        recorder.next(Lane::Host, "devices");
        recorder.next(Lane::Kernel, "kernel");
        let source = std::io::Error::other("x".repeat(2 * MAX_ERROR));
        recorder.fail_start(&Error::host("do it")(source));
        let timeline = recorder.timeline();
        let failed = timeline.failed().unwrap();
        assert_eq!(failed.name, "kernel");
        let error = failed.error.as_ref().unwrap();
        assert!(error.starts_with("cannot do it: xxx"), "{error}");
        assert_eq!(error.len(), MAX_ERROR);
        assert!(failed.to_us.is_some() && timeline.steps[0].error.is_none());
    }
}
