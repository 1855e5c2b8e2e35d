//! A process as containerd sees it: what it is doing, what may be done to it, how it ended.

use crate::io::{Io, Paths, Pumps};
use crate::sync::lock;
use koya::{Container, Process};
use std::sync::{Arc, Mutex};
use std::time::SystemTime;
use tokio::sync::watch;

/// Why a request was refused, in the kinds that containerd's clients tell apart.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("{0}: not found")]
    NotFound(String),
    #[error("{0}")]
    Finished(&'static str),
    #[error("{0} already exists")]
    Exists(String),
    #[error("{0}")]
    Precondition(String),
    #[error("{0}")]
    Unsupported(&'static str),
    #[error("{0:#}")]
    Failed(#[from] anyhow::Error),
}

impl From<koya::Error> for Refusal {
    fn from(error: koya::Error) -> Self {
        Self::Failed(error.into())
    }
}

/// What a process is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    Created,
    Running,
    Paused,
    Stopped,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Exit {
    /// The exit code, or 128 and the signal.
    pub(crate) status: u32,
    pub(crate) at: SystemTime,
}

/// What is wanted of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wish {
    Start,
    Kill,
    Delete,
    Pause,
    Resume,
    /// Another process in the container, or a look at it.
    Use,
}

impl Status {
    /// Whether it can be had: the rules of containerd's own shims.
    pub(crate) fn allow(self, wish: Wish) -> Result<(), Refusal> {
        use Status::{Created, Paused, Running, Stopped};
        let allowed = match wish {
            Wish::Start => self == Created,
            Wish::Kill => self != Stopped,
            Wish::Delete => matches!(self, Created | Stopped),
            Wish::Pause => self == Running,
            Wish::Resume => self == Paused,
            Wish::Use => matches!(self, Created | Running),
        };
        match (allowed, wish, self) {
            (true, ..) => Ok(()),
            (false, Wish::Kill, _) => Err(Refusal::Finished("process already finished")),
            (false, Wish::Start, Running) => {
                Err(Refusal::Precondition("the process runs already".into()))
            }
            (false, wish, now) => {
                let (wish, now) = (format!("{wish:?}"), format!("{now:?}"));
                let text = format!(
                    "cannot {} a process that is {}",
                    wish.to_lowercase(),
                    now.to_lowercase()
                );
                Err(Refusal::Precondition(text))
            }
        }
    }
}

/// What of the guest's is behind a process.
#[derive(Clone)]
pub(crate) enum Handle {
    First(Arc<Container>),
    Further(Arc<Process>),
}

impl Handle {
    pub(crate) fn process(&self) -> &Process {
        match self {
            Self::First(container) => container.process(),
            Self::Further(process) => process,
        }
    }
}

/// The host's side of a process's streams.
#[derive(Default)]
pub(crate) enum Streams {
    #[default]
    None,
    Open(Io),
    Connected(Arc<Pumps>),
}

struct State {
    status: Status,
    handle: Option<Handle>,
    streams: Streams,
    /// The client has no more input; it may say so before there is a process.
    stdin_ended: bool,
}

/// A process of a container.
pub(crate) struct Proc {
    pub(crate) paths: Paths,
    state: Mutex<State>,
    exit: watch::Sender<Option<Exit>>,
}

impl Proc {
    pub(crate) fn new(paths: Paths) -> Self {
        Self {
            paths,
            state: Mutex::new(State {
                status: Status::Created,
                handle: None,
                streams: Streams::None,
                stdin_ended: false,
            }),
            exit: watch::channel(None).0,
        }
    }

    pub(crate) fn status(&self) -> Status {
        lock(&self.state).status
    }

    pub(crate) fn set_status(&self, status: Status) {
        let mut state = lock(&self.state);
        // Nothing comes back from its end.
        if state.status != Status::Stopped {
            state.status = status;
        }
    }

    pub(crate) fn set_io(&self, io: Io) {
        lock(&self.state).streams = Streams::Open(io);
    }

    /// The host's ends of its streams, to be connected.
    pub(crate) fn take_io(&self) -> Io {
        let mut state = lock(&self.state);
        match std::mem::take(&mut state.streams) {
            Streams::Open(io) => io,
            other => {
                state.streams = other;
                Io::default()
            }
        }
    }

    pub(crate) fn made(&self, handle: Handle, pumps: Arc<Pumps>) {
        let mut state = lock(&self.state);
        state.handle = Some(handle);
        if state.stdin_ended {
            pumps.close_stdin();
        }
        state.streams = Streams::Connected(pumps);
    }

    /// The client has no more input.
    pub(crate) fn close_stdin(&self) {
        let mut state = lock(&self.state);
        state.stdin_ended = true;
        if let Streams::Connected(pumps) = &state.streams {
            pumps.close_stdin();
        }
    }

    pub(crate) fn handle(&self) -> Option<Handle> {
        lock(&self.state).handle.clone()
    }

    pub(crate) fn pumps(&self) -> Option<Arc<Pumps>> {
        match &lock(&self.state).streams {
            Streams::Connected(pumps) => Some(pumps.clone()),
            _ => None,
        }
    }

    /// It has ended; those who wait hear of it. False if that was known.
    pub(crate) fn ended(&self, status: u32, at: SystemTime) -> bool {
        let mut state = lock(&self.state);
        if state.status == Status::Stopped {
            return false;
        }
        state.status = Status::Stopped;
        state.streams = Streams::None;
        self.exit.send_replace(Some(Exit { status, at }));
        true
    }

    pub(crate) fn exit(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// To wait for its end by.
    pub(crate) fn watch(&self) -> watch::Receiver<Option<Exit>> {
        self.exit.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_be_done_is_what_containerds_own_shims_allow() {
        use Status::{Created, Paused, Running, Stopped};
        let table = [
            (Wish::Start, [true, false, false, false]),
            (Wish::Kill, [true, true, true, false]),
            (Wish::Delete, [true, false, false, true]),
            (Wish::Pause, [false, true, false, false]),
            (Wish::Resume, [false, false, true, false]),
            (Wish::Use, [true, true, false, false]),
        ];
        for (wish, allowed) in table {
            for (status, allowed) in [Created, Running, Paused, Stopped].into_iter().zip(allowed) {
                assert_eq!(status.allow(wish).is_ok(), allowed, "{wish:?} {status:?}");
            }
        }
        let error = Stopped.allow(Wish::Kill).unwrap_err();
        assert_eq!(error.to_string(), "process already finished");
    }

    #[test]
    fn an_end_is_told_once_and_to_all_who_wait() {
        let process = Proc::new(Paths::default());
        let waiting = process.watch();
        assert!(process.ended(3, SystemTime::now()));
        assert!(!process.ended(4, SystemTime::now()));
        process.set_status(Status::Running);
        assert_eq!(process.status(), Status::Stopped);
        assert_eq!(waiting.borrow().unwrap().status, 3);
        assert_eq!(process.watch().borrow().unwrap().status, 3);
    }
}
