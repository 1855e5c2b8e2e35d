//! A process of a task as clients see it: its status, what may be done to it, how it ended.

use crate::Error;
use crate::machine::{GuestContainer, GuestProcess};
use crate::relay::Relay;
use crate::stdio::{Io, StdioConfig, StdioPaths};
use crate::sync::{Level, Ordered};
use koya::ProcessStreams;
use std::sync::Arc;
use std::time::SystemTime;
use tokio::sync::watch;

/// What a process is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// It waits to be started.
    Created,
    /// It runs.
    Running,
    /// It was stopped where it is, with all of its container.
    Paused,
    /// It has ended.
    Stopped,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// The exit code, or 128 and the signal.
    pub status: u32,
    /// When.
    pub at: SystemTime,
}

impl Exit {
    pub(crate) fn now(status: u32) -> Self {
        let at = SystemTime::now();
        Self { status, at }
    }
}

/// What is to be done to a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    Start,
    Kill,
    Delete,
    Pause,
    Resume,
    /// To add another process to its container, or to look at that.
    Use,
}

impl Status {
    /// Whether it may be done: the rules of containerd's own shims.
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

/// What of the guest is behind a process.
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

/// What a process is doing, and what clients are not told.
enum Phase {
    Created,
    /// The guest is asked to start it, and it may have ended already: nobody hears of that before the start.
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
    /// The client has no more input; it may say so before there is a process.
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

/// The init process of a task, or one that was added.
pub(crate) struct Process {
    pub(crate) paths: StdioPaths,
    /// What the guest is asked for.
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

    pub(crate) fn status(&self) -> Status {
        self.state.lock().status()
    }

    pub(crate) fn set_paused(&self, is_paused: bool) {
        let mut state = self.state.lock();
        match (&state.phase, is_paused) {
            (Phase::Running, true) => state.phase = Phase::Paused,
            (Phase::Paused, false) => state.phase = Phase::Running,
            // Nothing comes back from its end.
            _ => {}
        }
    }

    /// Opens the host's ends of its streams, which wait to be connected then.
    ///
    /// # Errors
    /// Which can't be opened.
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

    /// It is there in the guest.
    pub(crate) fn made(&self, handle: Handle, relay: Arc<Relay>) {
        let mut state = self.state.lock();
        state.handle = Some(handle);
        if state.is_stdin_closed {
            relay.close_stdin();
        }
        state.streams = Streams::Connected(relay);
    }

    /// It is about to be started. Its end is not told until [`started`](Self::started).
    ///
    /// # Errors
    /// If it has ended meanwhile.
    pub(crate) fn start(&self) -> Result<(), Error> {
        let mut state = self.state.lock();
        state.status().allow(Action::Start)?;
        state.phase = Phase::Starting { ended: None };
        Ok(())
    }

    /// It was started: `publish` tells it before anybody hears of its end, which is returned if it has come.
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

    /// It could not be started.
    pub(crate) fn not_started(&self) {
        let mut state = self.state.lock();
        if let Phase::Starting { .. } = state.phase {
            state.phase = Phase::Created;
        }
    }

    /// The client has no more input.
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

    /// It has ended: `publish` tells it, and those who wait hear of it. False if that was known, or if its start
    /// is to be told first.
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

/// The end of a process that is to come, or has come.
pub struct ExitWatch(watch::Receiver<Option<Exit>>);

impl ExitWatch {
    /// Waits for it. None if the process is gone, and did not run.
    pub async fn wait(&mut self) -> Option<Exit> {
        let exit = self.0.wait_for(Option::is_some).await;
        exit.ok().and_then(|exit| *exit)
    }

    /// What is known now.
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
