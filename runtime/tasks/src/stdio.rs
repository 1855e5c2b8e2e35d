//! The host's ends of a process's streams: FIFOs, files and loggers named by clients, or descriptors.
//!
//! The rules for FIFOs are those of containerd's own shims. A client opens its ends before the container is created and
//! closes them as soon as it learns of the end. A client may also disconnect and reconnect, or be replaced: an end of each
//! FIFO stays open here, so that a process neither sees an end of file nor is killed by a broken pipe.

use crate::logger::{self, Logger};
use crate::preserved::Preserved;
use anyhow::{Context, Result, bail};
use koya::{ProcessStreams, Stdio};
use rustix::fs::{FileType, Mode, OFlags, fcntl_getfl, fcntl_setfl, open};
use rustix::io::Errno;
use rustix::termios::tcgetwinsize;
use std::fs::{self, File, OpenOptions};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

/// Time limit for a client to open its end of a FIFO.
const OPEN_LIMIT: Duration = Duration::from_secs(10);
/// Polling interval for that: Linux only reports the opening of a FIFO to a blocking open(2), which has no time limit.
const OPEN_AGAIN: Duration = Duration::from_millis(2);

/// Targets of a process's streams.
#[derive(Debug)]
#[non_exhaustive]
pub enum StdioConfig {
    /// By name.
    Paths(StdioPaths),
    /// Open descriptors.
    Descriptors(StdioDescriptors),
}

impl Default for StdioConfig {
    fn default() -> Self {
        Self::Paths(StdioPaths::default())
    }
}

/// FIFOs, files, `file://PATH`, and for outputs `binary://PROGRAM`. Empty: no stream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StdioPaths {
    /// Standard input.
    pub stdin: String,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
    /// Whether the process has a terminal.
    pub terminal: bool,
}

/// Descriptors in blocking mode. `None`: no stream.
#[derive(Debug, Default)]
pub struct StdioDescriptors {
    /// Standard input.
    pub stdin: Option<OwnedFd>,
    /// Standard output.
    pub stdout: Option<OwnedFd>,
    /// Standard error.
    pub stderr: Option<OwnedFd>,
    /// Whether the process has a terminal.
    pub terminal: bool,
    /// Whether the terminal outputs newlines unchanged, not as CR LF.
    pub keep_newlines: bool,
    /// Descriptors 3 and up of the process.
    pub preserved: Vec<Preserved>,
}

impl StdioConfig {
    /// The paths for clients; for descriptors, only whether there is a terminal.
    pub(crate) fn paths(&self) -> StdioPaths {
        match self {
            Self::Paths(paths) => paths.clone(),
            Self::Descriptors(descriptors) => StdioPaths {
                terminal: descriptors.terminal,
                ..StdioPaths::default()
            },
        }
    }

    /// The streams to request from the guest.
    pub(crate) fn wanted(&self) -> ProcessStreams {
        let preserved = match self {
            Self::Paths(_) => &[][..],
            Self::Descriptors(open) => &open.preserved,
        };
        ProcessStreams {
            stdio: self.guest(),
            extra_fds: preserved.iter().map(Preserved::wanted).collect(),
            notify_socket: None,
        }
    }

    fn guest(&self) -> Stdio {
        let (terminal, input, output) = match self {
            Self::Paths(paths) => (
                paths.terminal,
                !paths.stdin.is_empty(),
                !(paths.stdout.is_empty() && paths.stderr.is_empty()),
            ),
            Self::Descriptors(open) => (
                open.terminal,
                open.stdin.is_some(),
                open.stdout.is_some() || open.stderr.is_some(),
            ),
        };
        match (terminal, input, output) {
            (true, ..) => self.terminal(),
            (false, false, false) => Stdio::Null,
            (false, false, true) => Stdio::Output,
            (false, true, _) => Stdio::Pipes,
        }
    }

    /// A terminal with the size of an open one. For a named one, the client sends the size once the process runs.
    fn terminal(&self) -> Stdio {
        let (size, keep_newlines) = match self {
            Self::Descriptors(open) => {
                let size = open.stdin.as_ref().map(tcgetwinsize);
                (size.and_then(|size| size.ok()), open.keep_newlines)
            }
            Self::Paths(_) => (None, false),
        };
        Stdio::Terminal {
            rows: size.map_or(0, |size| size.ws_row),
            columns: size.map_or(0, |size| size.ws_col),
            keep_newlines,
        }
    }

    /// Opens the host's ends. `name` and `namespace` are for loggers.
    ///
    /// # Errors
    /// The stream that can't be opened, or a client that does not open its end.
    pub(crate) fn open(self, name: &str, namespace: &str) -> Result<Io> {
        match self {
            Self::Paths(paths) => paths.open(name, namespace),
            Self::Descriptors(open) => Ok(Io {
                stdin: open.stdin.map(|stdin| Input {
                    from: stdin.into(),
                    keep: None,
                }),
                stdout: open.stdout.map(|stdout| Output::Open(stdout.into())),
                stderr: open.stderr.map(|stderr| Output::Open(stderr.into())),
                logger: None,
                terminal: open.terminal,
                preserved: open.preserved,
            }),
        }
    }
}

impl StdioPaths {
    fn open(&self, name: &str, namespace: &str) -> Result<Io> {
        let mut io = Io::default();
        if let Some(program) = self.stdout.strip_prefix("binary://") {
            let (stdout, stderr, logger) = logger::start(program, name, namespace)?;
            io.stdout = Some(Output::Open(stdout));
            io.stderr = Some(Output::Open(stderr));
            io.logger = Some(logger);
        } else {
            io.stdout = Output::at(&self.stdout)?;
            // Both append, if both name the same file.
            io.stderr = match (&io.stdout, self.stderr == self.stdout) {
                (Some(Output::Open(file)), true) => Some(Output::Open(file.try_clone()?)),
                _ => Output::at(&self.stderr)?,
            };
        }
        if !self.stdin.is_empty() {
            io.stdin = Some(Input::at(Path::new(&self.stdin))?);
        }
        io.terminal = self.terminal;
        Ok(io)
    }
}

/// The host's ends of a process's streams.
#[derive(Default)]
pub(crate) struct Io {
    pub(crate) stdin: Option<Input>,
    pub(crate) stdout: Option<Output>,
    pub(crate) stderr: Option<Output>,
    pub(crate) logger: Option<Logger>,
    pub(crate) terminal: bool,
    pub(crate) preserved: Vec<Preserved>,
}

pub(crate) enum Output {
    /// A FIFO, and our own read end.
    Fifo(File, OwnedFd),
    Open(File),
    /// An inherited descriptor. Once its reader is gone, the guest's end is closed too, so that the process notices.
    Preserved(Preserved),
}

impl Output {
    pub(crate) fn at(path: &str) -> Result<Option<Self>> {
        if path.is_empty() {
            return Ok(None);
        }
        let opened = match path.split_once("://") {
            Some(("file", path)) => append_to(Path::new(path)),
            Some((scheme, _)) => bail!("streams can't go to {scheme}://"),
            None => Self::open(Path::new(path)),
        };
        opened
            .map(Some)
            .with_context(|| format!("cannot open {path}"))
    }

    fn open(path: &Path) -> Result<Self> {
        if FileType::from_raw_mode(rustix::fs::stat(path)?.st_mode) != FileType::Fifo {
            return Ok(Self::Open(OpenOptions::new().append(true).open(path)?));
        }
        let started = Instant::now();
        let flags = OFlags::NONBLOCK | OFlags::CLOEXEC;
        // Another reader must exist: data in a FIFO that only this process reads would be lost.
        let writer = loop {
            match open(path, flags | OFlags::WRONLY, Mode::empty()) {
                Err(Errno::NXIO) if started.elapsed() < OPEN_LIMIT => {
                    std::thread::sleep(OPEN_AGAIN);
                }
                Err(Errno::NXIO) => bail!("nobody reads it"),
                other => break other?,
            }
        };
        fcntl_setfl(&writer, fcntl_getfl(&writer)? - OFlags::NONBLOCK)?;
        let reader = open(path, flags | OFlags::RDONLY, Mode::empty())?;
        Ok(Self::Fifo(writer.into(), reader))
    }
}

fn append_to(path: &Path) -> Result<Output> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    let file = OpenOptions::new().append(true).create(true).open(path)?;
    Ok(Output::Open(file))
}

pub(crate) struct Input {
    pub(crate) from: File,
    /// Our own write end of a FIFO.
    pub(crate) keep: Option<OwnedFd>,
}

impl Input {
    pub(crate) fn at(path: &Path) -> Result<Self> {
        let open_it = || -> Result<Self> {
            let flags = OFlags::NONBLOCK | OFlags::CLOEXEC;
            let from = open(path, flags | OFlags::RDONLY, Mode::empty())?;
            let is_fifo =
                FileType::from_raw_mode(rustix::fs::fstat(&from)?.st_mode) == FileType::Fifo;
            let keep = match is_fifo {
                true => Some(open(path, flags | OFlags::WRONLY, Mode::empty())?),
                false => None,
            };
            fcntl_setfl(&from, fcntl_getfl(&from)? - OFlags::NONBLOCK)?;
            Ok(Self {
                from: from.into(),
                keep,
            })
        };
        open_it().with_context(|| format!("cannot open {}", path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read as _, Write as _};

    #[test]
    fn what_the_guest_is_asked_for_is_what_is_wanted() {
        let paths = |stdin: &str, stderr: &str, terminal| {
            let (stdin, stderr) = (stdin.into(), stderr.into());
            let paths = StdioPaths {
                stdin,
                stderr,
                terminal,
                ..StdioPaths::default()
            };
            StdioConfig::Paths(paths).guest()
        };
        assert_eq!(paths("", "", false), Stdio::Null);
        assert_eq!(paths("", "e", false), Stdio::Output);
        assert_eq!(paths("i", "", false), Stdio::Pipes);
        assert!(matches!(paths("i", "e", true), Stdio::Terminal { .. }));
        let none = StdioConfig::Descriptors(StdioDescriptors::default());
        assert_eq!(none.guest(), Stdio::Null);
    }

    #[test]
    fn descriptors_are_used_as_they_are() {
        let (mut read, write) = std::io::pipe().unwrap();
        let open = StdioConfig::Descriptors(StdioDescriptors {
            stdout: Some(write.into()),
            ..StdioDescriptors::default()
        });
        assert_eq!(open.guest(), Stdio::Output);
        let io = open.open("c", "").unwrap();
        match io.stdout {
            Some(Output::Open(mut file)) => file.write_all(b"out").unwrap(),
            _ => panic!("no output"),
        }
        let mut text = String::new();
        read.read_to_string(&mut text).unwrap();
        assert_eq!(text, "out");
        assert!(io.stdin.is_none() && io.stderr.is_none());
    }

    #[test]
    fn other_schemes_are_refused() {
        let paths = StdioPaths {
            stdout: "pigeon://x".into(),
            ..StdioPaths::default()
        };
        assert!(StdioConfig::Paths(paths).open("c", "default").is_err());
    }
}
