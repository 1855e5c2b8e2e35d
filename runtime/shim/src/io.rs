//! Standard streams on the host: the FIFOs, files and loggers that containerd's clients name.
//!
//! The rules for FIFOs are those of containerd's own shims. A client opens its ends before the container
//! is made and closes them as soon as it hears of the end, so the end is announced only when what was
//! written has been read ([`Pumps::finish`]). A client may also go and come back, or another may come:
//! an end of each FIFO stays open here, so that a process neither sees an end of file nor is killed by
//! a broken pipe.

use crate::sync::{lock, spawn};
use anyhow::{Context, Result, bail};
use command_fds::{CommandFdExt as _, FdMapping};
use koya::{Process, Stdio};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{FileType, Mode, OFlags, fcntl_getfl, fcntl_setfl, open};
use rustix::io::Errno;
use rustix::time::Timespec;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// How long a client may take to open its end of a FIFO.
const OPEN_LIMIT: Duration = Duration::from_secs(10);
/// How long nothing may happen to what a process that has ended wrote, before it is given up.
const SILENCE: Duration = Duration::from_secs(3);
/// How long what a process that has ended left behind may go on writing to its streams.
const LEFT_BEHIND: Duration = Duration::from_secs(2);
/// How long a logger may take to say that it is ready, and to end.
const LOGGER_READY: Duration = Duration::from_secs(10);
const LOGGER_END: Duration = Duration::from_secs(12);
const LOOK: Duration = Duration::from_millis(2);

/// Where a process's streams go, as the request says. An empty path: nowhere.
#[derive(Clone, Debug, Default)]
pub(crate) struct Paths {
    pub(crate) stdin: String,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) terminal: bool,
}

impl Paths {
    /// What the guest is asked for.
    pub(crate) fn stdio(&self) -> Stdio {
        if self.terminal {
            // The client says the size once the process runs.
            return Stdio::Terminal {
                rows: 0,
                columns: 0,
            };
        }
        match (
            self.stdin.is_empty(),
            self.stdout.is_empty() && self.stderr.is_empty(),
        ) {
            (true, true) => Stdio::Null,
            (true, false) => Stdio::Output,
            (false, _) => Stdio::Pipes,
        }
    }

    /// Opens the host's ends. `name` and `namespace` are for loggers.
    ///
    /// # Errors
    /// Which can't be opened; a client that does not open its end.
    pub(crate) fn open(&self, name: &str, namespace: &str) -> Result<Io> {
        let mut io = Io::default();
        if let Some(program) = self.stdout.strip_prefix("binary://") {
            let (stdout, stderr, logger) = start_logger(program, name, namespace)?;
            io.stdout = Some(Output::Open(stdout));
            io.stderr = Some(Output::Open(stderr));
            io.logger = Some(logger);
        } else {
            io.stdout = Output::at(&self.stdout)?;
            // Appended to by both, where both name one file.
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
    stdin: Option<Input>,
    stdout: Option<Output>,
    stderr: Option<Output>,
    logger: Option<Logger>,
    terminal: bool,
}

/// A logger that runs. It is ended with what it logs, whatever becomes of that.
struct Logger(Option<Child>);

impl Drop for Logger {
    fn drop(&mut self) {
        if let Some(child) = self.0.take() {
            spawn("koya-logger", move || end_logger(child)).ok();
        }
    }
}

enum Output {
    /// A FIFO, and our own reading end.
    Fifo(File, OwnedFd),
    Open(File),
}

impl Output {
    fn at(path: &str) -> Result<Option<Self>> {
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
        // Somebody else must read: what goes into a FIFO with no reader but us is lost with us.
        let writer = loop {
            match open(path, flags | OFlags::WRONLY, Mode::empty()) {
                Err(Errno::NXIO) if started.elapsed() < OPEN_LIMIT => std::thread::sleep(LOOK),
                Err(Errno::NXIO) => bail!("nobody reads it"),
                other => break other?,
            }
        };
        fcntl_setfl(&writer, fcntl_getfl(&writer)? - OFlags::NONBLOCK)?;
        let reader = open(path, flags | OFlags::RDONLY, Mode::empty())?;
        Ok(Self::Fifo(writer.into(), reader))
    }
}

/// Passes all that comes on, then waits until it is read, as long as something moves. Where nobody wants
/// it, it is read all the same: the process must not wait.
fn pump(mut from: UnixStream, output: Option<Output>, state: &State) {
    let mut buffer = vec![0; 64 << 10];
    let mut writer = match &output {
        Some(Output::Fifo(file, _) | Output::Open(file)) => Some(file),
        None => None,
    };
    loop {
        match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => {
                // A process whose output can't be kept goes on all the same.
                if let Some(writer) = &mut writer
                    && writer.write_all(&buffer[..count]).is_ok()
                {
                    state.progress.fetch_add(1, Ordering::Relaxed);
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    state.reading.fetch_sub(1, Ordering::SeqCst);
    if let Some(Output::Fifo(writer, reader)) = output {
        drop(reader);
        wait_until_read(&writer, state);
    }
}

fn append_to(path: &Path) -> Result<Output> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    let file = OpenOptions::new().append(true).create(true).open(path)?;
    Ok(Output::Open(file))
}

/// Until a FIFO is empty, or nobody reads it, or its reader stands still.
fn wait_until_read(writer: &File, state: &State) {
    let mut last = (u64::MAX, Instant::now());
    loop {
        let Ok(waiting) = rustix::io::ioctl_fionread(writer) else {
            return;
        };
        let mut polled = [PollFd::new(writer, PollFlags::empty())];
        let now = Timespec::default();
        let gone =
            poll(&mut polled, Some(&now)).is_ok() && polled[0].revents().contains(PollFlags::ERR);
        if waiting == 0 || gone {
            return;
        }
        if waiting != last.0 {
            last = (waiting, Instant::now());
            state.progress.fetch_add(1, Ordering::Relaxed);
        } else if last.1.elapsed() > SILENCE {
            return;
        }
        std::thread::sleep(LOOK);
    }
}

struct Input {
    from: File,
    /// Our own writing end of a FIFO.
    keep: Option<OwnedFd>,
}

impl Input {
    fn at(path: &Path) -> Result<Self> {
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

/// What the threads of one process's streams share with who waits for them.
#[derive(Default)]
struct State {
    progress: AtomicU64,
    /// Output threads that are at work.
    writing: AtomicU64,
    /// Output threads that have not come to their stream's end.
    reading: AtomicU64,
}

/// The streams of a process that runs.
pub(crate) struct Pumps {
    state: Arc<State>,
    keep: Mutex<Option<OwnedFd>>,
    /// Closed to end the reading of input.
    stop: Mutex<Option<UnixStream>>,
    /// The guest's ends of the outputs, to be cut off.
    outputs: Mutex<Vec<UnixStream>>,
    logger: Mutex<Option<Logger>>,
}

impl Io {
    /// Joins them to the process's streams, each by a thread.
    ///
    /// # Errors
    /// If the host has no thread left.
    pub(crate) fn connect(self, process: &mut Process) -> Result<Pumps> {
        let state = Arc::new(State::default());
        let (stop, stopped) = UnixStream::pair()?;
        let pumps = Pumps {
            state: state.clone(),
            keep: Mutex::default(),
            stop: Mutex::new(Some(stop)),
            outputs: Mutex::default(),
            logger: Mutex::new(self.logger),
        };
        let (to_guest, stdout, stderr) = match (self.terminal, process.stdin.take()) {
            (true, Some(stream)) => (Some(stream.try_clone()?), Some(stream), None),
            (_, stdin) => (stdin, process.stdout.take(), process.stderr.take()),
        };
        for (from, output) in [(stdout, self.stdout), (stderr, self.stderr)] {
            let Some(from) = from else { continue };
            lock(&pumps.outputs).push(from.try_clone()?);
            let state = state.clone();
            state.writing.fetch_add(1, Ordering::SeqCst);
            state.reading.fetch_add(1, Ordering::SeqCst);
            spawn("koya-out", move || {
                pump(from, output, &state);
                state.writing.fetch_sub(1, Ordering::SeqCst);
            })?;
        }
        if let (Some(input), Some(to_guest)) = (self.stdin, to_guest) {
            *lock(&pumps.keep) = input.keep;
            let terminal = self.terminal;
            spawn("koya-in", move || {
                pump_input(input.from, to_guest, &stopped, terminal)
            })?;
        }
        Ok(pumps)
    }
}

fn pump_input(mut from: File, mut to: UnixStream, stop: &UnixStream, terminal: bool) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let mut watched = [
            PollFd::new(&from, PollFlags::IN),
            PollFd::new(stop, PollFlags::IN),
        ];
        match poll(&mut watched, None) {
            Err(Errno::INTR) => continue,
            Err(_) => return,
            Ok(_) if !watched[1].revents().is_empty() => return,
            Ok(_) => {}
        }
        match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => {
                if to.write_all(&buffer[..count]).is_err() {
                    return;
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    // A terminal has no end of file but the one that is typed.
    if !terminal {
        to.shutdown(Shutdown::Write).ok();
    }
}

impl Pumps {
    /// The client has no more input: what it wrote so far still comes.
    pub(crate) fn close_stdin(&self) {
        lock(&self.keep).take();
    }

    /// The process has ended: waits until its output has been read, as long as something moves.
    pub(crate) fn finish(&self) {
        self.close_stdin();
        lock(&self.stop).take();
        // What the process wrote is on its way; what it left behind, with its streams open, may go on
        // for ever.
        let ended = Instant::now();
        let mut last = (u64::MAX, Instant::now());
        while self.state.writing.load(Ordering::SeqCst) > 0 {
            if self.state.reading.load(Ordering::SeqCst) > 0 && ended.elapsed() > LEFT_BEHIND {
                for output in lock(&self.outputs).drain(..) {
                    output.shutdown(Shutdown::Both).ok();
                }
            }
            let progress = self.state.progress.load(Ordering::Relaxed);
            if progress != last.0 {
                last = (progress, Instant::now());
            } else if last.1.elapsed() > SILENCE + SILENCE / 2 {
                log::warn!("some of a process's output was not read");
                break;
            }
            std::thread::sleep(LOOK);
        }
        lock(&self.outputs).clear();
        lock(&self.logger).take();
    }
}

/// `binary:///program?key=value`: a program that gets both outputs as descriptors 3 and 4, and closes or
/// writes to 5 when it is ready.
fn start_logger(program: &str, name: &str, namespace: &str) -> Result<(File, File, Logger)> {
    let (path, query) = program.split_once('?').unwrap_or((program, ""));
    let mut command = Command::new(path);
    for (key, value) in form_urlencoded::parse(query.as_bytes()) {
        command.arg(&*key);
        if !value.is_empty() {
            command.arg(&*value);
        }
    }
    let pipe = || rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC);
    let (out_reader, out_writer) = pipe()?;
    let (err_reader, err_writer) = pipe()?;
    let (ready_reader, ready_writer) = pipe()?;
    let map = |parent_fd, child_fd| FdMapping {
        parent_fd,
        child_fd,
    };
    command
        .env_clear()
        .env("CONTAINER_ID", name)
        .env("CONTAINER_NAMESPACE", namespace)
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .fd_mappings(vec![
            map(out_reader, 3),
            map(err_reader, 4),
            map(ready_writer, 5),
        ])
        .context("cannot pass descriptors")?;
    let child = command
        .spawn()
        .with_context(|| format!("cannot start the logger {path}"))?;
    let logger = Logger(Some(child));
    // Its copies of the descriptors are its own; ours would keep the pipes open.
    drop(command);
    let mut polled = [PollFd::new(&ready_reader, PollFlags::IN)];
    let limit = Timespec {
        tv_sec: LOGGER_READY.as_secs() as i64,
        tv_nsec: 0,
    };
    let ready = loop {
        match poll(&mut polled, Some(&limit)) {
            // By a signal, of which a shim gets one: it is ending.
            Err(Errno::INTR) => {}
            ready => break ready?,
        }
    };
    if ready == 0 {
        bail!("the logger {path} was not ready after {LOGGER_READY:?}");
    }
    Ok((out_writer.into(), err_writer.into(), logger))
}

fn end_logger(mut logger: Child) {
    let pid = rustix::process::Pid::from_child(&logger);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).ok();
    let started = Instant::now();
    while started.elapsed() < LOGGER_END {
        if !matches!(logger.try_wait(), Ok(None)) {
            return;
        }
        std::thread::sleep(LOOK * 5);
    }
    logger.kill().ok();
    logger.wait().ok();
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::mknodat;

    fn reading_one() -> State {
        State {
            reading: AtomicU64::new(1),
            ..State::default()
        }
    }

    fn fifo(dir: &Path, name: &str) -> String {
        let path = dir.join(name);
        let mode = Mode::from_raw_mode(0o600);
        mknodat(rustix::fs::CWD, &path, FileType::Fifo, mode, 0).unwrap();
        path.to_str().unwrap().into()
    }

    #[test]
    fn an_end_waits_for_a_slow_reader_and_nothing_is_lost() {
        let dir = tempfile::tempdir().unwrap();
        let path = fifo(dir.path(), "out");
        let reading = path.clone();
        let reader = std::thread::spawn(move || {
            let mut file = File::open(reading).unwrap();
            let (mut all, mut buffer) = (0, [0; 4096]);
            loop {
                match file.read(&mut buffer).unwrap() {
                    0 => return all,
                    count => all += count,
                }
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        let output = Output::at(&path).unwrap().unwrap();
        let (mut guest, host) = UnixStream::pair().unwrap();
        std::thread::spawn(move || guest.write_all(&[7; 200_000]));
        let waiting = match &output {
            Output::Fifo(writer, _) => writer.try_clone().unwrap(),
            Output::Open(_) => panic!("not a FIFO"),
        };
        pump(host, Some(output), &reading_one());
        assert_eq!(rustix::io::ioctl_fionread(&waiting).unwrap(), 0);
        drop(waiting);
        assert_eq!(reader.join().unwrap(), 200_000);
    }

    #[test]
    fn a_reader_that_has_gone_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = fifo(dir.path(), "out");
        let reading = path.clone();
        let reader = std::thread::spawn(move || File::open(reading).unwrap());
        let output = Output::at(&path).unwrap().unwrap();
        drop(reader.join().unwrap());
        let (mut guest, host) = UnixStream::pair().unwrap();
        guest.write_all(b"nobody reads this").unwrap();
        drop(guest);
        let started = Instant::now();
        pump(host, Some(output), &reading_one());
        assert!(started.elapsed() < SILENCE);
    }

    #[test]
    fn input_ends_when_the_client_says_so_and_not_when_it_goes() {
        let dir = tempfile::tempdir().unwrap();
        let path = fifo(dir.path(), "in");
        let Input { from, keep } = Input::at(Path::new(&path)).unwrap();
        let (mut guest, to) = UnixStream::pair().unwrap();
        let (_stop, stopped) = UnixStream::pair().unwrap();
        std::thread::spawn(move || pump_input(from, to, &stopped, false));
        fs::write(&path, "one ").unwrap();
        fs::write(&path, "two").unwrap();
        let mut buffer = [0; 7];
        guest.read_exact(&mut buffer).unwrap();
        assert_eq!(&buffer, b"one two");
        drop(keep);
        assert_eq!(guest.read(&mut buffer).unwrap(), 0);
    }

    #[test]
    fn a_file_gets_both_streams_and_other_schemes_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = format!("file://{}/sub/log", dir.path().display());
        let paths = Paths {
            stdout: file.clone(),
            stderr: file,
            ..Paths::default()
        };
        let io = paths.open("c", "default").unwrap();
        for output in [io.stdout, io.stderr].into_iter().flatten() {
            let (mut guest, host) = UnixStream::pair().unwrap();
            guest.write_all(b"line\n").unwrap();
            drop(guest);
            pump(host, Some(output), &reading_one());
        }
        assert_eq!(
            fs::read(dir.path().join("sub/log")).unwrap(),
            b"line\nline\n"
        );
        let paths = Paths {
            stdout: "pigeon://x".into(),
            ..Paths::default()
        };
        assert!(paths.open("c", "default").is_err());
    }

    #[test]
    fn a_logger_gets_its_descriptors_and_names() {
        let dir = tempfile::tempdir().unwrap();
        let (script, log) = (dir.path().join("logger"), dir.path().join("log"));
        let text = "#!/bin/sh\nexec 5>&-\n{ echo $CONTAINER_NAMESPACE/$CONTAINER_ID $1 $2; cat <&3; } > $2\n";
        fs::write(&script, text).unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(&script, mode).unwrap();
        let program = format!("{}?to={}", script.display(), log.display());
        let (mut out, err, mut logger) = start_logger(&program, "c1", "k8s.io").unwrap();
        out.write_all(b"hello\n").unwrap();
        drop((out, err));
        logger.0.take().unwrap().wait().unwrap();
        let text = fs::read_to_string(&log).unwrap();
        assert_eq!(text, format!("k8s.io/c1 to {}\nhello\n", log.display()));
    }
}
