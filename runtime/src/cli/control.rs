//! A sandbox's control socket: how other commands reach a container that this process runs.
//!
//! A connection is one request: a line of JSON, with descriptors beside it where it needs some.
//! Lines that follow belong to the same process (signals, sizes). The answer is one line. Who may
//! connect is whom the folder's mode lets in.

use super::attach::{Pumps, UserStreams};
use super::state::Folder;
use anyhow::{Context, Result};
use koya::{Container, Process, ProcessConfig, Sandbox, Stdio, User};
use rustix::cmsg_space;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize};
use std::io::{BufRead, BufReader, IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The longest request, in bytes: an exec's arguments and environment.
const MAX_REQUEST: usize = 1 << 20;

/// What a command asks of a running container.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Request {
    /// Run a process; its three streams come beside the request.
    Exec {
        args: Vec<String>,
        env: Vec<String>,
        cwd: Option<PathBuf>,
        user: String,
        terminal: Option<(u16, u16)>,
        interactive: bool,
    },
    /// Signal the first process, or the one that this connection runs.
    Signal(i32),
    /// A new size for the terminal of the one that this connection runs.
    Resize(u16, u16),
    /// End the container: SIGTERM, and SIGKILL after so many seconds.
    Stop(u64),
    /// Show the console on the second of three streams, and type what comes from the first.
    Console,
}

/// The answer.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Answer {
    /// It was done; for a process, its exit status.
    Done(i32),
    /// It was not.
    Failed { status: i32, reason: String },
}

/// Accepts connections until it is dropped.
pub(super) struct Server {
    socket: PathBuf,
}

impl Drop for Server {
    fn drop(&mut self) {
        std::fs::remove_file(&self.socket).ok();
    }
}

impl Server {
    pub(super) fn start(
        folder: &Folder,
        container: Arc<Container>,
        sandbox: Arc<Sandbox>,
    ) -> Result<Self> {
        let socket = folder.control();
        let listener = UnixListener::bind(&socket)
            .with_context(|| format!("cannot listen on {}", socket.display()))?;
        std::thread::Builder::new()
            .name("koya-control".into())
            .spawn(move || {
                for stream in listener.incoming().flatten() {
                    let (container, sandbox) = (container.clone(), sandbox.clone());
                    std::thread::spawn(move || serve(stream, &container, &sandbox));
                }
            })?;
        Ok(Self { socket })
    }
}

fn serve(mut stream: UnixStream, container: &Arc<Container>, sandbox: &Sandbox) {
    let answer = match receive(&stream) {
        Ok((request, fds)) => carry_out(request, fds, &stream, container, sandbox),
        Err(error) => Err(error),
    };
    let answer = match answer {
        Ok(status) => Answer::Done(status),
        Err(error) => Answer::Failed {
            status: super::failure_status(&error).into(),
            reason: format!("{error:#}"),
        },
    };
    if let Ok(line) = serde_json::to_string(&answer) {
        writeln!(stream, "{line}").ok();
    }
}

fn carry_out(
    request: Request,
    fds: Vec<OwnedFd>,
    stream: &UnixStream,
    container: &Arc<Container>,
    sandbox: &Sandbox,
) -> Result<i32> {
    match request {
        Request::Signal(number) => container.process().signal(number)?,
        Request::Resize(rows, columns) => container.process().resize(rows, columns)?,
        Request::Stop(seconds) => stop(container, seconds)?,
        Request::Console => {
            let user = UserStreams::from_fds(fds).context("a console needs three streams")?;
            sandbox.follow_console(user.stdout);
            // Until the other side hangs up.
            for line in BufReader::new(user.stdin).lines() {
                sandbox.console_input(line?.as_bytes());
                sandbox.console_input(b"\n");
            }
        }
        Request::Exec {
            args,
            env,
            cwd,
            user,
            terminal,
            interactive,
        } => {
            let streams = UserStreams::from_fds(fds).context("a process needs three streams")?;
            let stdio = match (terminal, interactive) {
                (Some((rows, columns)), _) => Stdio::Terminal { rows, columns },
                (None, true) => Stdio::Pipes,
                (None, false) => Stdio::Output,
            };
            let mut process = container.exec(&ProcessConfig {
                args,
                env,
                cwd,
                user: User { text: user },
                stdio,
            })?;
            let pumps = Pumps::start(&mut process, streams);
            let process = Arc::new(process);
            follow(stream, &process)?;
            let status = process.wait()?;
            pumps.finish();
            return Ok(status);
        }
    }
    Ok(0)
}

/// Carries signals and sizes from the connection to the process; a connection that breaks is a
/// user who hung up.
fn follow(stream: &UnixStream, process: &Arc<Process>) -> Result<()> {
    let lines = BufReader::new(stream.try_clone()?).lines();
    let process = process.clone();
    std::thread::spawn(move || {
        for line in lines {
            let Ok(line) = line else { break };
            match serde_json::from_str(&line) {
                Ok(Request::Signal(number)) => process.signal(number).ok(),
                Ok(Request::Resize(rows, columns)) => process.resize(rows, columns).ok(),
                _ => None,
            };
        }
        process.signal(libc::SIGHUP).ok();
    });
    Ok(())
}

fn stop(container: &Arc<Container>, seconds: u64) -> Result<()> {
    let (sender, ended) = std::sync::mpsc::channel();
    let waiting = container.clone();
    std::thread::spawn(move || sender.send(waiting.wait().is_ok()));
    let deadline = Instant::now() + Duration::from_secs(seconds);
    container.process().signal(libc::SIGTERM).ok();
    if ended
        .recv_timeout(deadline.saturating_duration_since(Instant::now()))
        .is_err()
    {
        container.process().signal(libc::SIGKILL).ok();
        ended.recv_timeout(Duration::from_secs(10)).ok();
    }
    Ok(())
}

fn receive(stream: &UnixStream) -> Result<(Request, Vec<OwnedFd>)> {
    let mut text = Vec::new();
    let mut fds = Vec::new();
    while !text.ends_with(b"\n") {
        anyhow::ensure!(text.len() < MAX_REQUEST, "the request is too long");
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(3))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut buffer = [0; 16 << 10];
        let received = recvmsg(
            stream,
            &mut [IoSliceMut::new(&mut buffer)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        )?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(sent) = message {
                fds.extend(sent);
            }
        }
        anyhow::ensure!(received.bytes > 0, "the request is not whole");
        text.extend_from_slice(&buffer[..received.bytes]);
    }
    Ok((serde_json::from_slice(&text)?, fds))
}

/// Sends a request, with descriptors beside its first byte.
pub(super) fn send(
    mut stream: &UnixStream,
    request: &Request,
    fds: &[BorrowedFd<'_>],
) -> Result<()> {
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(3))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(fds));
    }
    let (first, rest) = line.split_at(1);
    sendmsg(
        stream,
        &[IoSlice::new(first)],
        &mut control,
        SendFlags::NOSIGNAL,
    )?;
    stream.write_all(rest)?;
    Ok(())
}
