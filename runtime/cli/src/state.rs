//! State of containers shared by commands: a directory for each, `containers/NAME` in `/var/lib/koya` (for root) or in the
//! user's data directory, with everything that the host stores for it: record, log, control socket, and the root file system
//! of an image.
//!
//! The sandbox's process holds a lock on the `lock` file of its directory as long as it lives. If the lock is free, the
//! container has ended: in an orderly way if an exit status is recorded; otherwise it was killed, and the next command
//! removes the directory, or, for a detached container that ran, records that status and keeps its log.

use crate::container_log::{Lines, LogWriter};
use crate::log_records::Stream;
use crate::removal::remove_tree;
use anyhow::{Context, Result, bail};
use koya::confinement::{self, VIOLATION_STATUS};
use koya::vmm::host::sockets::{listen_privately, with_short_path};
use rustix::fs::{CWD, FlockOperation, RenameFlags, flock, renameat_with};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use std::fs::{self, DirBuilder, File};
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt, FileExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

/// Exit status of a container whose process was killed.
pub(super) const KILLED: i32 = 128 + libc::SIGKILL;

/// The socket for commands, in a container's directory.
const CONTROL_SOCKET: &str = "control.sock";

/// Prefix of directories that are being created or removed, which is not valid in container names.
const UNFINISHED: &str = ".new-";
/// Time after which such a directory counts as left behind.
const UNFINISHED_LIMIT: Duration = Duration::from_secs(60);

/// The stored record of a container.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) name: String,
    pub(super) pid: u32,
    pub(super) created: SystemTime,
    pub(super) command: Vec<String>,
    pub(super) rootfs: PathBuf,
    /// Whether to keep the directory after the end, until it is removed.
    pub(super) keep: bool,
    /// Whether the threads that serve the guest are confined (`--no-seccomp`).
    #[serde(default = "is_confined")]
    pub(super) confined: bool,
    /// The exit status after an orderly end.
    pub(super) status: Option<i32>,
}

/// Records of older versions do not say so.
fn is_confined() -> bool {
    true
}

/// A container's directory.
#[derive(Clone, Debug)]
pub(super) struct Directory(PathBuf);

/// A directory owned by this process: locked while the process lives.
pub(super) struct Owned {
    pub(super) directory: Directory,
    _lock: File,
}

/// The directory that contains all of them.
pub(super) fn root() -> Result<PathBuf> {
    Ok(koya::directories::data()?.join("containers"))
}

/// Checks that no other user owns it or has access: it contains control sockets and set-user-ID files.
fn check_private(path: &Path) -> Result<()> {
    Ok(koya::directories::check_own(path, 0o077)?)
}

/// Checks that a name is a single path component.
fn check_name(name: &str) -> Result<()> {
    let proper = !name.is_empty()
        && name.len() <= 64
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
    if !proper {
        bail!(
            "{name:?} can't name a container: use at most 64 letters, digits, '-', '_' and '.', the first a letter or digit"
        );
    }
    Ok(())
}

impl Directory {
    /// The directory of a container that exists.
    pub(super) fn find(name: &str) -> Result<Self> {
        let found = Self::look_for(name)?;
        found.with_context(|| format!("container {name} does not exist"))
    }

    /// As [`find`](Self::find); `None` if it does not exist.
    pub(super) fn look_for(name: &str) -> Result<Option<Self>> {
        check_name(name)?;
        let root = root()?;
        let path = root.join(name);
        if !path.join("record.json").exists() {
            return Ok(None);
        }
        check_private(&root)?;
        Ok(Some(Self(path)))
    }

    /// The directories of all containers.
    pub(super) fn all() -> Result<Vec<Self>> {
        Ok(entries()?
            .into_iter()
            .filter(|path| !is_unfinished(path))
            .map(Self)
            .collect())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Directory for the unpacked root file system of an image.
    pub(super) fn unpacked(&self) -> PathBuf {
        self.path("root")
    }

    /// Temporary directory for an image's archive.
    pub(super) fn scratch(&self) -> PathBuf {
        self.path("image")
    }

    /// Log of a detached container.
    pub(super) fn log(&self) -> PathBuf {
        self.path("log")
    }

    /// Makes this process report violations of its filters here.
    pub(super) fn report_violations(&self) {
        if let Err(error) = confinement::report_violations_in(&self.0) {
            log::warn!("a violation would not be the reason of the end: {error}");
        }
    }

    /// Records what confines the threads of this process.
    pub(super) fn record_confinement(&self, is_confined: bool) {
        if let Err(error) = confinement::record(&self.0, is_confined) {
            log::warn!("cannot record what confines the sandbox: {error}");
        }
    }

    /// The violation that ended the container's process, if one did.
    pub(super) fn violation(&self) -> Option<String> {
        confinement::violation(&self.0)
    }

    /// Listens on the control socket.
    pub(super) fn listen(&self) -> Result<UnixListener> {
        self.socket(listen_privately)
            .with_context(|| format!("cannot listen in {}", self.0.display()))
    }

    /// Calls `act` with a path to the control socket that is short enough for a socket's address.
    pub(super) fn socket<T>(
        &self,
        act: impl FnOnce(&Path) -> std::io::Result<T>,
    ) -> std::io::Result<T> {
        with_short_path(&self.path(CONTROL_SOCKET), act)
    }

    pub(super) fn read(&self) -> Result<Record> {
        let path = self.path("record.json");
        let text = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(serde_json::from_slice(&text)?)
    }

    pub(super) fn write(&self, record: &Record) -> Result<()> {
        let new = self.path("record.new");
        let text = serde_json::to_vec(record)?;
        let written =
            fs::write(&new, &text).and_then(|()| fs::rename(&new, self.path("record.json")));
        let written = written.or_else(|error| {
            fs::remove_file(&new).ok();
            // The disk may be full, perhaps of the container's own log.
            self.overwrite(&text).map_err(|_| error)
        });
        written.with_context(|| format!("cannot write {}", new.display()))
    }

    /// Overwrites the record, which takes no space on most file systems: with an exit status it is no longer than without.
    fn overwrite(&self, text: &[u8]) -> std::io::Result<()> {
        let record = File::options().write(true).open(self.path("record.json"))?;
        let length = text.len() as u64;
        if record.metadata()?.len() < length {
            return Err(std::io::ErrorKind::StorageFull.into());
        }
        record.write_all_at(text, 0)?;
        record.set_len(length)
    }

    /// Whether no exit status was recorded.
    fn lacks_exit_status(&self) -> bool {
        self.read().is_ok_and(|record| record.status.is_none())
    }

    /// Whether its container ran: the control socket is created immediately before its start.
    fn has_run(&self) -> bool {
        self.path(CONTROL_SOCKET).exists()
    }

    /// Whether the host went down, for example by a power failure, before the record was on disk: it is missing or
    /// truncated. A directory without a lock is not a container's.
    fn is_torn(&self) -> bool {
        let record = match fs::read(self.path("record.json")) {
            Ok(text) => serde_json::from_slice::<Record>(&text).map(drop),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return self.path("lock").is_file();
            }
            Err(_) => return false,
        };
        record.is_err_and(|error| error.is_eof())
    }

    /// Whether its process is alive.
    pub(super) fn is_running(&self) -> bool {
        let Ok(lock) = File::open(self.path("lock")) else {
            return false;
        };
        flock(&lock, FlockOperation::NonBlockingLockShared).is_err()
    }

    /// Whether its process is stopped by a signal (SIGSTOP). A stop by a debugger
    /// does not count: it may be brief.
    pub(super) fn is_stopped(&self) -> bool {
        let stat = self
            .read()
            .ok()
            .and_then(|record| fs::read_to_string(format!("/proc/{}/stat", record.pid)).ok());
        // The state follows the name, which may contain any character (proc_pid_stat(5)).
        let state = stat
            .as_deref()
            .and_then(|stat| Some(stat.rsplit_once(") ")?.1));
        self.is_running() && state.is_some_and(|state| state.starts_with('T'))
    }

    /// Waits until its process has ended; false after `limit`.
    pub(super) fn wait_ended(&self, limit: Duration) -> bool {
        let started = Instant::now();
        while self.is_running() {
            if started.elapsed() > limit {
                return false;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        true
    }

    /// Kills its process and waits for its end.
    ///
    /// # Errors
    /// If that is not permitted, or the process still exists after `limit`.
    pub(super) fn kill(&self, limit: Duration) -> Result<()> {
        let number = i32::try_from(self.read()?.pid)?;
        let pid = Pid::from_raw(number).context("its record names no process")?;
        match pidfd_open(pid, PidfdFlags::empty()) {
            // The PID cannot be reused while the process lives, and it is still alive after the lookup.
            Ok(process) if self.is_running() => pidfd_send_signal(process, Signal::KILL)?,
            Ok(_) | Err(Errno::SRCH) => {}
            Err(error) => return Err(error).context("cannot find its process"),
        }
        if !self.wait_ended(limit) {
            bail!("its process {number} is still there after SIGKILL");
        }
        Ok(())
    }

    /// Brings the directory of a killed container into the state that the process would have left.
    ///
    /// # Errors
    /// If the record can't be written.
    pub(super) fn settle(&self, status: i32) -> Result<()> {
        let mut record = self.read()?;
        if !record.keep {
            self.remove();
        } else if record.status.is_none() {
            let violation = self.violation();
            record.status = Some(match violation {
                Some(_) => VIOLATION_STATUS,
                None => status,
            });
            self.write(&record)?;
            if let Some(reason) = violation.filter(|_| self.log().exists()) {
                let log = LogWriter::create(&self.log())?;
                writeln!(Lines::new(log, Stream::Stderr), "koya: {reason}")?;
            }
        }
        Ok(())
    }

    /// What the next command does with the directory of a container that has ended.
    pub(super) fn clear_away(&self) {
        if self.is_torn() || self.lacks_exit_status() && !self.has_run() {
            self.remove();
        } else if self.lacks_exit_status()
            && let Err(error) = self.settle(KILLED)
        {
            log::warn!("{error:#}");
        }
    }

    /// Removes everything stored for the container.
    ///
    /// It is renamed first: an interrupted removal leaves nothing that looks like a container, and the next command
    /// continues it.
    pub(super) fn remove(&self) {
        let mut going = self.0.clone();
        if !is_unfinished(&going)
            && let Ok(random) = random_name()
        {
            going.set_file_name(format!("{UNFINISHED}{random}"));
            if fs::rename(&self.0, &going).is_err() {
                going = self.0.clone();
            }
        }
        if let Err(error) = remove_tree(&going) {
            log::warn!("cannot remove {}: {error}", going.display());
        }
    }
}

fn entries() -> Result<Vec<PathBuf>> {
    let root = root()?;
    let entries = match fs::read_dir(&root) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", root.display())),
    };
    check_private(&root)?;
    let mut all: Vec<PathBuf> = entries.filter_map(|e| Some(e.ok()?.path())).collect();
    all.sort();
    Ok(all)
}

fn is_unfinished(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default();
    name.as_encoded_bytes().starts_with(UNFINISHED.as_bytes())
}

/// Reserves the given name, or a generated one, and creates its directory with the record returned by `record`.
pub(super) fn create(
    name: Option<&str>,
    record: impl Fn(&str, &Directory) -> Record,
) -> Result<(Record, Owned)> {
    let root = root()?;
    let cannot = |path: &Path| format!("cannot create {}", path.display());
    let mut builder = DirBuilder::new();
    builder.mode(0o700);
    builder
        .recursive(true)
        .create(&root)
        .with_context(|| cannot(&root))?;
    check_private(&root)?;
    builder.recursive(false);
    loop {
        let chosen = match name {
            Some(name) => {
                check_name(name)?;
                name.to_owned()
            }
            None => random_name()?,
        };
        // It is renamed to its name once it is locked and complete, so other commands never see an incomplete one.
        let unfinished = Directory(root.join(format!("{UNFINISHED}{}", random_name()?)));
        builder
            .create(&unfinished.0)
            .with_context(|| cannot(&unfinished.0))?;
        let path = unfinished.path("lock");
        let lock = File::create(&path).with_context(|| cannot(&path))?;
        flock(&lock, FlockOperation::LockExclusive)
            .with_context(|| format!("cannot lock {}", path.display()))?;
        let directory = Directory(root.join(&chosen));
        let record = record(&chosen, &directory);
        unfinished.write(&record)?;
        match renameat_with(
            CWD,
            &unfinished.0,
            CWD,
            &directory.0,
            RenameFlags::NOREPLACE,
        ) {
            Ok(()) => {
                let owned = Owned {
                    directory,
                    _lock: lock,
                };
                return Ok((record, owned));
            }
            Err(error) => {
                unfinished.remove();
                if error != Errno::EXIST {
                    return Err(error).with_context(|| cannot(&directory.0));
                }
                if name.is_some() {
                    bail!("a container named {chosen} exists; remove it with `koya rm {chosen}`");
                }
            }
        }
    }
}

fn random_name() -> Result<String> {
    let mut bytes = [0; 4];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    Ok(format!("koya-{:08x}", u32::from_le_bytes(bytes)))
}

/// Clears away what killed containers left. The log of a detached one stays, with a status, until it is removed: that its
/// process was killed, perhaps for want of memory on the host, is the moment in which the log is needed.
pub(super) fn sweep() -> Result<()> {
    for path in entries()? {
        let directory = Directory(path);
        if is_unfinished(&directory.0) {
            let age = fs::symlink_metadata(&directory.0)
                .and_then(|data| data.modified())
                .ok()
                .and_then(|made| made.elapsed().ok());
            if age.is_some_and(|age| age > UNFINISHED_LIMIT) && !directory.is_running() {
                directory.remove();
            }
            continue;
        }
        // The lock first: its owner writes the status before releasing it.
        if !directory.is_running() {
            directory.clear_away();
        }
    }
    Ok(())
}

#[cfg(test)]
pub(super) mod tests;
