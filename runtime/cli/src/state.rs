//! What is known of containers between commands: a directory each, `containers/NAME` under
//! `/var/lib/koya` (as root) or the user's data, with all that the host keeps of it: record, log,
//! control socket, and the root file system of an image.
//!
//! The sandbox's process holds a lock on its directory's `lock` file as long as it lives. A directory
//! whose lock is free belongs to a container that has ended: in order, if it says with which
//! status; else it was killed, and whatever command comes next clears it away.

use crate::removal::remove_tree;
use anyhow::{Context, Result, bail};
use rustix::fs::{CWD, FlockOperation, RenameFlags, flock, renameat_with};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use std::fs::{self, DirBuilder, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

/// Directories that are being made or removed have names that no container can have.
const UNFINISHED: &str = ".new-";
/// How long a directory may be in that state before it counts as left behind.
const UNFINISHED_LIMIT: Duration = Duration::from_secs(60);

/// What is written down of a container.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) name: String,
    pub(super) pid: u32,
    pub(super) created: SystemTime,
    pub(super) command: Vec<String>,
    pub(super) rootfs: PathBuf,
    /// Kept after its end until it is removed.
    pub(super) keep: bool,
    /// The exit status, once it has ended in order.
    pub(super) status: Option<i32>,
}

/// A container's directory.
#[derive(Clone, Debug)]
pub(super) struct Directory(PathBuf);

/// A directory that this process owns: locked while it lives.
pub(super) struct Owned {
    pub(super) directory: Directory,
    _lock: File,
}

/// The directory of all directories.
pub(super) fn root() -> Result<PathBuf> {
    Ok(koya::directories::data()?.join("containers"))
}

/// Nobody else may have made it, or look into it: control sockets and set-user-ID files lie there.
fn check_private(path: &Path) -> Result<()> {
    let data =
        fs::symlink_metadata(path).with_context(|| format!("cannot read {}", path.display()))?;
    let own = data.uid() == rustix::process::geteuid().as_raw();
    if !own || !data.is_dir() || data.mode() & 0o077 != 0 {
        bail!(
            "{} must be a directory of this user's with mode 0700; it has owner {} and mode {:04o}",
            path.display(),
            data.uid(),
            data.mode() & 0o7777
        );
    }
    Ok(())
}

/// A name that is one component of a path.
fn check_name(name: &str) -> Result<()> {
    let proper = !name.is_empty()
        && name.len() <= 64
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
    if !proper {
        bail!("{name:?} can't name a container: use letters, digits, '-', '_' and '.'");
    }
    Ok(())
}

impl Directory {
    /// The directory of a container that exists.
    pub(super) fn find(name: &str) -> Result<Self> {
        let found = Self::look_for(name)?;
        found.with_context(|| format!("container {name} does not exist"))
    }

    /// The same, or none.
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

    /// Every container's directory.
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

    /// Where an image's root file system is unpacked.
    pub(super) fn unpacked(&self) -> PathBuf {
        self.path("root")
    }

    /// The container's /etc/resolv.conf, if its network has a resolver of its own.
    pub(super) fn resolver(&self) -> PathBuf {
        self.path("resolv.conf")
    }

    /// Where an image's archive is unpacked meanwhile.
    pub(super) fn scratch(&self) -> PathBuf {
        self.path("image")
    }

    /// Where a detached container's output goes.
    pub(super) fn log(&self) -> PathBuf {
        self.path("log")
    }

    /// Listens on the control socket.
    pub(super) fn listen(&self) -> Result<UnixListener> {
        self.socket(|path| UnixListener::bind(path))
            .with_context(|| format!("cannot listen in {}", self.0.display()))
    }

    /// Connects to the control socket. A process that takes up no connections has room for so many, and then
    /// for none: that is waited for, but not for longer than `limit`.
    ///
    /// # Errors
    /// `TimedOut` then, or that there is no socket.
    pub(super) fn connect(&self, limit: Duration) -> std::io::Result<UnixStream> {
        let started = Instant::now();
        self.socket(|path| {
            let address = SocketAddrUnix::new(path)?;
            let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
            loop {
                let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
                match connect(&socket, &address) {
                    Ok(()) => {
                        let stream = UnixStream::from(socket);
                        stream.set_nonblocking(false)?;
                        return Ok(stream);
                    }
                    Err(Errno::INTR) => {}
                    Err(Errno::AGAIN) if started.elapsed() < limit => {
                        std::thread::sleep(Duration::from_millis(10));
                    }
                    Err(Errno::AGAIN) => return Err(std::io::ErrorKind::TimedOut.into()),
                    Err(error) => return Err(error.into()),
                }
            }
        })
    }

    /// The directory's path may be longer than a socket's address can be.
    fn socket<T>(&self, act: impl FnOnce(&Path) -> std::io::Result<T>) -> std::io::Result<T> {
        let directory = File::open(&self.0)?;
        act(Path::new(&format!(
            "/proc/self/fd/{}/control.sock",
            directory.as_raw_fd()
        )))
    }

    pub(super) fn read(&self) -> Result<Record> {
        let path = self.path("record.json");
        let text = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(serde_json::from_slice(&text)?)
    }

    pub(super) fn write(&self, record: &Record) -> Result<()> {
        let new = self.path("record.new");
        fs::write(&new, serde_json::to_vec(record)?)
            .and_then(|()| fs::rename(&new, self.path("record.json")))
            .with_context(|| format!("cannot write {}", new.display()))
    }

    /// Whether its process ended without saying how.
    fn has_no_end(&self) -> bool {
        self.read().is_ok_and(|record| record.status.is_none())
    }

    /// Whether the host stopped, by a loss of power, say, before the disk had what is here: a record that is not there, or
    /// ends too early. What no container made has no lock.
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

    /// Whether its process lives.
    pub(super) fn is_running(&self) -> bool {
        let Ok(lock) = File::open(self.path("lock")) else {
            return false;
        };
        flock(&lock, FlockOperation::NonBlockingLockShared).is_err()
    }

    /// Whether its process was stopped by a signal, and does nothing until another one. One that a debugger
    /// holds does not count: that may be for a moment.
    pub(super) fn is_stopped(&self) -> bool {
        let stat = self
            .read()
            .ok()
            .and_then(|record| fs::read_to_string(format!("/proc/{}/stat", record.pid)).ok());
        // The state is behind the name, which may have anything in it (proc_pid_stat(5)).
        let state = stat
            .as_deref()
            .and_then(|stat| Some(stat.rsplit_once(") ")?.1));
        self.is_running() && state.is_some_and(|state| state.starts_with('T'))
    }

    /// Waits until its process is gone; false if it is not after `limit`.
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

    /// Ends its process at once, whatever it does or does not do, and waits for that.
    ///
    /// # Errors
    /// If it may not be, or if it is still there after `limit`.
    pub(super) fn kill(&self, limit: Duration) -> Result<()> {
        let number = i32::try_from(self.read()?.pid)?;
        let pid = Pid::from_raw(number).context("its record names no process")?;
        match pidfd_open(pid, PidfdFlags::empty()) {
            // The number is its own as long as it lives, which it still does after it was looked up.
            Ok(process) if self.is_running() => pidfd_send_signal(process, Signal::KILL)?,
            Ok(_) | Err(Errno::SRCH) => {}
            Err(error) => return Err(error).context("cannot find its process"),
        }
        if !self.wait_ended(limit) {
            bail!("its process {number} is still there after SIGKILL");
        }
        Ok(())
    }

    /// Leaves of a container whose process was killed what the process itself would have left.
    ///
    /// # Errors
    /// If that can't be written.
    pub(super) fn settle(&self, status: i32) -> Result<()> {
        let mut record = self.read()?;
        if !record.keep {
            self.remove();
        } else if record.status.is_none() {
            record.status = Some(status);
            self.write(&record)?;
        }
        Ok(())
    }

    /// Removes all that is there of the container.
    ///
    /// It loses its name first: a removal that is cut short leaves nothing that looks like a
    /// container, and the next command goes on with it.
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

/// Takes a name, or makes one, and its directory, with what `record` says of it by its name.
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
        // It gets its name when it is locked and says what it is, so no other command sees half
        // of it.
        let unfinished = Directory(root.join(format!("{UNFINISHED}{}", random_name()?)));
        builder
            .create(&unfinished.0)
            .with_context(|| cannot(&unfinished.0))?;
        let lock = File::create(unfinished.path("lock"))?;
        flock(&lock, FlockOperation::LockExclusive)?;
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

/// Clears away what killed containers left.
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
        // The lock first: its owner writes the status down before it lets go.
        if !directory.is_running() && (directory.is_torn() || directory.has_no_end()) {
            directory.remove();
        }
    }
    Ok(())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    /// A newer koya lists what an older one started, and the other way round: a record as version 0.1
    /// writes it, with something of a later version's.
    #[test]
    fn records_of_other_versions_are_read() {
        let text = r#"{"name": "web", "pid": 7, "created": {"secs_since_epoch": 1700000000,
            "nanos_since_epoch": 5}, "command": ["sh", "-c", "x"], "rootfs": "/srv/web", "keep": true,
            "status": null, "of_a_later_version": {"a": [1]}}"#;
        let record: Record = serde_json::from_str(text).unwrap();
        assert_eq!((record.name.as_str(), record.pid), ("web", 7));
        assert!(record.keep && record.status.is_none());
    }

    /// A container whose process holds the lock and does nothing else; with that process.
    pub(in super::super) fn hanging(dir: &Path, keep: bool) -> (Directory, std::process::Child) {
        let directory = Directory(dir.to_path_buf());
        let lock = File::create(directory.path("lock")).unwrap();
        flock(&lock, FlockOperation::LockExclusive).unwrap();
        let mut sleep = std::process::Command::new("sleep");
        // Its standard input is the lock, which ends with it.
        let child = sleep.arg("1000").stdin(lock).spawn().unwrap();
        let record = Record {
            name: "hangs".into(),
            pid: child.id(),
            created: SystemTime::now(),
            command: Vec::new(),
            rootfs: PathBuf::new(),
            keep,
            status: None,
        };
        directory.write(&record).unwrap();
        (directory, child)
    }

    #[test]
    fn a_connection_that_nobody_takes_up_is_waited_for_no_longer_than_the_limit() {
        let dir = tempfile::tempdir().unwrap();
        let directory = Directory(dir.path().to_path_buf());
        let flags = SocketFlags::CLOEXEC;
        let listener = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
        let address = SocketAddrUnix::new(dir.path().join("control.sock")).unwrap();
        rustix::net::bind(&listener, &address).unwrap();
        rustix::net::listen(&listener, 0).unwrap();
        let limit = Duration::from_millis(100);
        let connected: Vec<_> = (0..4).map(|_| directory.connect(limit)).collect();
        assert!(connected[0].is_ok());
        let last = connected[3].as_ref().unwrap_err();
        assert_eq!(last.kind(), std::io::ErrorKind::TimedOut);
    }

    #[test]
    fn what_a_loss_of_power_left_is_known() {
        let dir = tempfile::tempdir().unwrap();
        let torn = |record: Option<&str>, has_lock: bool| {
            let path = dir.path().join("c");
            fs::create_dir(&path).unwrap();
            if let Some(text) = record {
                fs::write(path.join("record.json"), text).unwrap();
            }
            if has_lock {
                fs::write(path.join("lock"), "").unwrap();
            }
            let directory = Directory(path);
            let torn = directory.is_torn();
            directory.remove();
            torn
        };
        assert!(torn(Some(""), true) && torn(Some(r#"{"name": "c", "pi"#), true));
        assert!(torn(None, true));
        assert!(!torn(None, false), "that is not a container's");
        assert!(!torn(Some(r#"{"of": "a later version"}"#), true));
    }

    #[test]
    fn directories_of_others_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        assert!(check_private(&path).is_err());
        fs::create_dir(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        assert!(check_private(&path).is_err());
        fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).unwrap();
        check_private(&path).unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(check_private(&link).is_err());
    }

    #[test]
    fn names_are_single_components() {
        for good in ["a", "web-1", "x.y_z", &"n".repeat(64)] {
            check_name(good).unwrap();
        }
        for bad in ["", ".", "..", "a/b", "-a", ".new-a", "a b", &"n".repeat(65)] {
            assert!(check_name(bad).is_err(), "{bad:?}");
        }
    }
}
