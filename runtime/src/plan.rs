//! The streams of a process, between the request for it and the reply.

use crate::Error;
use crate::container::Process;
use crate::container_config::{Direction, Further, ProcessStreams, Stdio};
use crate::sandbox::Inner;
use crate::streams::Expected;
use koya_protocol::messages;
use std::io;
use std::sync::Arc;

/// The streams of a process that is about to be created.
pub(crate) struct Plan {
    message: messages::Stdio,
    stdin: Option<Expected>,
    stdout: Option<Expected>,
    stderr: Option<Expected>,
    further: Vec<Expected>,
}

impl Plan {
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
        let mut further = Vec::new();
        for wanted in &streams.further {
            let (direction, token, device) = match *wanted {
                Further::Device(path, direction) => (direction, String::new(), path),
                Further::Stream(direction) => {
                    let expected = expect()?;
                    let token = expected.token.clone();
                    further.push(expected);
                    (direction, token, "")
                }
            };
            message.further.push(messages::FurtherStream {
                direction: way(direction).into(),
                token,
                device: device.into(),
                ..Default::default()
            });
        }
        Ok(Self {
            message: messages::Stdio {
                stdin: token(&stdin),
                stdout: token(&stdout),
                stderr: token(&stderr),
                ..message
            },
            stdin,
            stdout,
            stderr,
            further,
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
        let further: io::Result<_> = self.further.into_iter().map(Expected::take).collect();
        Ok(Process {
            inner,
            container: container.into(),
            exec: exec.into(),
            stdin: take(self.stdin)?,
            stdout: take(self.stdout)?,
            stderr: take(self.stderr)?,
            further: further.map_err(Error::host("connect a stream"))?,
        })
    }
}

fn way(direction: Direction) -> messages::further_stream::Direction {
    match direction {
        Direction::Input => messages::further_stream::Direction::INPUT,
        Direction::Output => messages::further_stream::Direction::OUTPUT,
        Direction::Both => messages::further_stream::Direction::BOTH,
    }
}
