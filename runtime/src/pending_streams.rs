//! The streams of a process, between the request for it and the reply.

use crate::Error;
use crate::container::Process;
use crate::container_config::{Direction, ExtraFd, ProcessStreams, SocketName, Stdio};
use crate::notifications::Notifications;
use crate::sandbox::Inner;
use crate::streams::Expected;
use koya_protocol::messages;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

/// The streams of a process that is about to be created.
pub(crate) struct PendingStreams {
    message: messages::Stdio,
    stdin: Option<Expected>,
    stdout: Option<Expected>,
    stderr: Option<Expected>,
    extra_fds: Vec<Expected>,
    /// Names of listening sockets in requests.
    listeners: Vec<String>,
    notifications: Option<Expected>,
}

/// A listening socket of a process ([`ExtraFd::Listener`]).
pub struct GuestListener {
    inner: Arc<Inner>,
    socket: String,
}

impl GuestListener {
    /// Connects to it.
    ///
    /// # Errors
    /// Of the kind [`InUse`](crate::ErrorKind::InUse) if too many connections wait for the process, and
    /// [`NotFound`](crate::ErrorKind::NotFound) if the process has closed it or ended.
    pub fn connect(&self) -> Result<UnixStream, Error> {
        let expected = self.inner.streams.expect();
        let expected = expected.map_err(Error::host("make a token"))?;
        let agent = &self.inner.agent;
        let asked = agent.connect_socket(&self.socket, &expected.token);
        asked.map_err(|error| self.inner.explain(error))?;
        let stream = expected.take();
        stream.map_err(Error::host("connect to a socket of a process"))
    }
}

impl PendingStreams {
    /// # Errors
    /// If the host has no random numbers.
    pub(crate) fn new(inner: &Inner, streams: &ProcessStreams) -> Result<Self, Error> {
        let stdio = streams.stdio;
        let expect = || {
            let expected = inner.streams.expect();
            expected.map_err(Error::host("make a token"))
        };
        let (stdin, stdout, stderr) = match stdio {
            Stdio::Null => (None, None, None),
            Stdio::Output => (None, Some(expect()?), Some(expect()?)),
            Stdio::Pipes => (Some(expect()?), Some(expect()?), Some(expect()?)),
            Stdio::Terminal { .. } => (Some(expect()?), None, None),
        };
        let token = |e: &Option<Expected>| e.as_ref().map(|e| e.token.clone()).unwrap_or_default();
        let mut message = messages::Stdio::new();
        if let Stdio::Terminal {
            rows,
            columns,
            keep_newlines,
        } = stdio
        {
            message.terminal = true;
            (message.rows, message.columns) = (rows.into(), columns.into());
            message.keep_newlines = keep_newlines;
        }
        let (mut extra_fds, mut listeners) = (Vec::new(), Vec::new());
        for wanted in &streams.extra_fds {
            let mut own = messages::ExtraStream::new();
            match wanted {
                ExtraFd::Device(path, direction) => {
                    own.direction = way(*direction).into();
                    own.device = (*path).into();
                }
                ExtraFd::Stream(direction) => {
                    let expected = expect()?;
                    own.direction = way(*direction).into();
                    own.token = expected.token.clone();
                    extra_fds.push(expected);
                }
                ExtraFd::Listener(name) => {
                    // No stream is expected: it only has to be unique.
                    own.token = expect()?.token.clone();
                    own.socket = Some(listening_socket(name)).into();
                    listeners.push(own.token.clone());
                }
            }
            message.extra_fds.push(own);
        }
        let notify_path = streams.notify_socket.clone().unwrap_or_default();
        let notifications = match notify_path.is_empty() {
            true => None,
            false => Some(expect()?),
        };
        Ok(Self {
            message: messages::Stdio {
                stdin: token(&stdin),
                stdout: token(&stdout),
                stderr: token(&stderr),
                notify_path,
                notify_token: token(&notifications),
                ..message
            },
            stdin,
            stdout,
            stderr,
            extra_fds,
            listeners,
            notifications,
        })
    }

    /// The request for the agent.
    pub(crate) fn message(&self) -> messages::Stdio {
        self.message.clone()
    }

    /// Completes the process with its streams, once the agent has replied.
    ///
    /// # Errors
    /// The stream that did not arrive.
    pub(crate) fn finish(
        self,
        inner: Arc<Inner>,
        container: &str,
        exec: &str,
    ) -> Result<Process, Error> {
        let take = |expected: Option<Expected>| {
            expected
                .map(Expected::take)
                .transpose()
                .map_err(Error::host("connect a standard stream"))
        };
        let extra_fds: io::Result<_> = self.extra_fds.into_iter().map(Expected::take).collect();
        let listeners = self.listeners.into_iter().map(|socket| GuestListener {
            inner: inner.clone(),
            socket,
        });
        Ok(Process {
            listeners: listeners.collect(),
            inner,
            container: container.into(),
            exec: exec.into(),
            stdin: take(self.stdin)?,
            stdout: take(self.stdout)?,
            stderr: take(self.stderr)?,
            extra_fds: extra_fds.map_err(Error::host("connect a stream"))?,
            notifications: take(self.notifications)?.map(Notifications::new),
        })
    }
}

fn listening_socket(name: &SocketName) -> messages::ListeningSocket {
    let mut socket = messages::ListeningSocket::new();
    match name {
        SocketName::Tcp(address) => {
            socket.ip = address.ip().to_string();
            socket.port = address.port().into();
        }
        SocketName::Unix(name) => socket.name.clone_from(name),
    }
    socket
}

fn way(direction: Direction) -> messages::extra_stream::Direction {
    match direction {
        Direction::Input => messages::extra_stream::Direction::INPUT,
        Direction::Output => messages::extra_stream::Direction::OUTPUT,
        Direction::Both => messages::extra_stream::Direction::BOTH,
    }
}
