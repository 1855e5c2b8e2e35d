//! A process of a task as seen by clients: status, allowed operations, exit.

use crate::Error;
use crate::machine::{GuestContainer, GuestProcess};
use crate::relay::Relay;
use crate::stdio::{Io, StdioConfig, StdioPaths};
use crate::sync::{Level, Ordered};
use koya::ProcessStreams;
use std::sync::Arc;
use std::time::SystemTime;
use tokio::sync::watch;

/// Status of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Waiting to be started.
    Created,
    /// Running.
    Running,
    /// Frozen, with all of its container.
    Paused,
    /// Ended.
    Stopped,
}

/// Exit of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// The exit code, or 128 plus the signal.
    pub status: u32,
    /// Time of the exit.
    pub at: SystemTime,
}

impl Exit {
    pub(crate) fn now(status: u32) -> Self {
        let at = SystemTime::now();
        Self { status, at }
    }
}

/// An operation on a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    Start,
    Kill,
    Delete,
    Pause,
    Resume,
    /// Adding another process to its container, or querying the container.
    Use,
}

impl Status {
    /// Checks that an operation is allowed, by the rules of containerd's own shims.
    pub(crate) fn allow(self, action: Action) -> Result<(), Error> {
        use Status::{Created, Paused, Running, Stopped};
        let allowed = match action {
            Action::Start => self == Created,
            Action::Kill => self != Stopped,
            Action::Delete => matches!(self, Created | Stopped),
            Action::Pause => self == Running,
            Action::Resume => self == Paused,
            Action::Use => matches!(self, Created | Running),
        };
        match (allowed, action, self) {
            (true, ..) => Ok(()),
            (false, Action::Kill, _) => Err(Error::Finished("process already finished")),
            (false, Action::Start, Running) => {
                Err(Error::FailedPrecondition("the process runs already".into()))
            }
            (false, action, now) => {
                let (action, now) = (format!("{action:?}"), format!("{now:?}"));
                let text = format!(
                    "cannot {} a process that is {}",
                    action.to_lowercase(),
                    now.to_lowercase()
                );
                Err(Error::FailedPrecondition(text))
            }
        }
    }
}

/// The guest's object behind a process.
#[derive(Clone)]
pub(crate) enum Handle {
    Init(Arc<dyn GuestContainer>),
    Exec(Arc<dyn GuestProcess>),
}

impl Handle {
    pub(crate) fn process(&self) -> &dyn GuestProcess {
        match self {
            Self::Init(container) => &**container,
            Self::Exec(process) => &**process,
        }
    }
}

/// The host's side of a process's streams.
#[derive(Default)]
enum Streams {
    #[default]
    None,
    Wanted(StdioConfig),
    Open(Io),
    Connected(Arc<Relay>),
}

/// Internal state of a process.
enum Phase {
    Created,
    /// The guest is starting it. It may already have ended, which is not published before the start.
    Starting {
        ended: Option<Exit>,
    },
    Running,
    Paused,
    Stopped,
}

struct State {
    phase: Phase,
    handle: Option<Handle>,
    streams: Streams,
    /// The client has closed the input, possibly before the process exists.
    is_stdin_closed: bool,
}

impl State {
    fn status(&self) -> Status {
        match self.phase {
            Phase::Created | Phase::Starting { .. } => Status::Created,
            Phase::Running => Status::Running,
            Phase::Paused => Status::Paused,
            Phase::Stopped => Status::Stopped,
        }
    }
}

/// The init process of a task, or an exec process.
pub(crate) struct Process {
    pub(crate) paths: StdioPaths,
    /// The streams to request from the guest.
    pub(crate) wanted: ProcessStreams,
    state: Ordered<State>,
    exit: watch::Sender<Option<Exit>>,
}

impl Process {
    pub(crate) fn new(stdio: StdioConfig) -> Self {
        Self {
            paths: stdio.paths(),
            wanted: stdio.wanted(),
            state: Ordered::new(
                Level::Process,
                State {
                    phase: Phase::Created,
                    handle: None,
                    streams: Streams::Wanted(stdio),
                    is_stdin_closed: false,
                },
            ),
            exit: watch::channel(None).0,
        }
    }

    /// Whether nobody has asked for its start.
    pub(crate) fn is_waiting(&self) -> bool {
        matches!(self.state.lock().phase, Phase::Created)
    }

    pub(crate) fn status(&self) -> Status {
        self.state.lock().status()
    }

    pub(crate) fn set_paused(&self, is_paused: bool) {
        let mut state = self.state.lock();
        match (&state.phase, is_paused) {
            (Phase::Running, true) => state.phase = Phase::Paused,
            (Phase::Paused, false) => state.phase = Phase::Running,
            // There is no way back from the end.
            _ => {}
        }
    }

    /// Opens the host's ends of its streams, to be connected later.
    ///
    /// # Errors
    /// The stream that can't be opened.
    pub(crate) fn open_streams(&self, name: &str, namespace: &str) -> anyhow::Result<()> {
        let Streams::Wanted(stdio) = std::mem::take(&mut self.state.lock().streams) else {
            return Ok(());
        };
        let io = stdio.open(name, namespace)?;
        self.state.lock().streams = Streams::Open(io);
        Ok(())
    }

    /// The host's ends of its streams, to be connected.
    pub(crate) fn take_io(&self) -> Io {
        let mut state = self.state.lock();
        match std::mem::take(&mut state.streams) {
            Streams::Open(io) => io,
            other => {
                state.streams = other;
                Io::default()
            }
        }
    }

    /// Records that it has been created in the guest.
    pub(crate) fn mark_created(&self, handle: Handle, relay: Arc<Relay>) {
        let mut state = self.state.lock();
        state.handle = Some(handle);
        if state.is_stdin_closed {
            relay.close_stdin();
        }
        state.streams = Streams::Connected(relay);
    }

    /// Records that it is about to be started. Its end is not published until [`started`](Self::started).
    ///
    /// # Errors
    /// If it has ended meanwhile.
    pub(crate) fn start(&self) -> Result<(), Error> {
        let mut state = self.state.lock();
        state.status().allow(Action::Start)?;
        state.phase = Phase::Starting { ended: None };
        Ok(())
    }

    /// Records that it was started: `publish` is called before its end becomes visible. Returns the exit if it has already
    /// ended.
    pub(crate) fn started(&self, publish: impl FnOnce()) -> Option<Exit> {
        let mut state = self.state.lock();
        match std::mem::replace(&mut state.phase, Phase::Running) {
            Phase::Starting { ended } => {
                publish();
                ended
            }
            other => {
                state.phase = other;
                None
            }
        }
    }

    /// Records that it could not be started.
    pub(crate) fn not_started(&self) {
        let mut state = self.state.lock();
        if let Phase::Starting { .. } = state.phase {
            state.phase = Phase::Created;
        }
    }

    /// Closes its input.
    pub(crate) fn close_stdin(&self) {
        let mut state = self.state.lock();
        state.is_stdin_closed = true;
        if let Streams::Connected(relay) = &state.streams {
            relay.close_stdin();
        }
    }

    pub(crate) fn handle(&self) -> Option<Handle> {
        self.state.lock().handle.clone()
    }

    pub(crate) fn relay(&self) -> Option<Arc<Relay>> {
        match &self.state.lock().streams {
            Streams::Connected(relay) => Some(relay.clone()),
            _ => None,
        }
    }

    /// Records its end: calls `publish`, and wakes those who wait. False if the end was already known, or if the start has
    /// to be published first.
    pub(crate) fn ended(&self, exit: Exit, publish: impl FnOnce()) -> bool {
        let mut state = self.state.lock();
        match &mut state.phase {
            Phase::Stopped => return false,
            Phase::Starting { ended } => {
                ended.get_or_insert(exit);
                return false;
            }
            Phase::Created | Phase::Running | Phase::Paused => {}
        }
        state.phase = Phase::Stopped;
        let streams = std::mem::take(&mut state.streams);
        self.exit.send_replace(Some(exit));
        publish();
        drop(state);
        drop(streams);
        true
    }

    pub(crate) fn exit(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    pub(crate) fn watch(&self) -> ExitWatch {
        ExitWatch(self.exit.subscribe())
    }
}

/// Watches for the exit of a process, past or future.
pub struct ExitWatch(watch::Receiver<Option<Exit>>);

impl ExitWatch {
    /// Waits for the exit. `None` if the process was deleted without having run.
    pub async fn wait(&mut self) -> Option<Exit> {
        let exit = self.0.wait_for(Option::is_some).await;
        exit.ok().and_then(|exit| *exit)
    }

    /// The exit, if it is known.
    pub fn now(&self) -> Option<Exit> {
        *self.0.borrow()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_be_done_is_what_containerds_own_shims_allow() {
        use Status::{Created, Paused, Running, Stopped};
        let table = [
            (Action::Start, [true, false, false, false]),
            (Action::Kill, [true, true, true, false]),
            (Action::Delete, [true, false, false, true]),
            (Action::Pause, [false, true, false, false]),
            (Action::Resume, [false, false, true, false]),
            (Action::Use, [true, true, false, false]),
        ];
        for (action, allowed) in table {
            for (status, allowed) in [Created, Running, Paused, Stopped].into_iter().zip(allowed) {
                assert_eq!(
                    status.allow(action).is_ok(),
                    allowed,
                    "{action:?} {status:?}"
                );
            }
        }
        let error = Stopped.allow(Action::Kill).unwrap_err();
        assert_eq!(error.to_string(), "process already finished");
    }

    #[test]
    fn an_end_is_told_once_and_to_all_who_wait() {
        let process = Process::new(StdioConfig::default());
        let waiting = process.watch();
        assert!(process.ended(Exit::now(3), || ()));
        assert!(!process.ended(Exit::now(4), || panic!("told twice")));
        process.set_paused(false);
        assert_eq!(process.status(), Status::Stopped);
        assert_eq!(waiting.now().unwrap().status, 3);
        assert_eq!(process.watch().now().unwrap().status, 3);
    }

    #[test]
    fn an_end_that_comes_during_the_start_is_told_after_it() {
        let process = Process::new(StdioConfig::default());
        process.start().unwrap();
        assert!(!process.ended(Exit::now(3), || panic!("told before its start")));
        assert_eq!(process.status(), Status::Created);
        let ended = process.started(|| ()).unwrap();
        assert!(process.ended(ended, || ()));
        assert_eq!(process.exit().unwrap().status, 3);
        assert!(process.start().is_err());
    }
}
