//! Stored state of containers: a directory for each under `--root`, with `state.json` and the socket of its sandbox's
//! process. It survives that process, however it ends.
//!
//! A command that changes a container holds a lock (flock(2)) on its directory. A directory without `state.json` belongs to
//! a container that is being created, or whose creation was interrupted.

use crate::cli::Globals;
use crate::ipc::{ContainerRequest, Request, Response, send_request};
use anyhow::{Context, Result, anyhow, bail};
use koya::oci_spec::runtime::{self as oci, ContainerState, Hooks, StateBuilder};
use koya::vmm::host::sockets::{listen_privately, with_short_path};
use koya_tasks::hooks::HookContext;
use koya_tasks::{UserMappings, is_in_user_namespace, user_name};
use rustix::fs::{FlockOperation, Mode, OFlags, flock, open};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::fs;
use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

const STATE: &str = "state.json";
const SOCKET: &str = "socket";
/// crun's annotations for files that get the output of hooks: standard output, and standard error.
const HOOK_OUTPUT: [&str; 2] = ["run.oci.hooks.stdout", "run.oci.hooks.stderr"];
/// Version of the runtime specification for the state.
pub(crate) const OCI_VERSION: &str = "1.2.0";

/// Status of a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Status {
    Created,
    Running,
    Paused,
    Stopped,
}

impl std::fmt::Display for Status {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str(match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        })
    }
}

/// Stored state of a container.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Stored {
    pub(crate) id: String,
    pub(crate) pid: i32,
    /// Start time of that process from `/proc/PID/stat`, since PIDs are reused.
    pub(crate) pid_start: u64,
    pub(crate) bundle: PathBuf,
    pub(crate) rootfs: PathBuf,
    pub(crate) created: String,
    pub(crate) uid: u32,
    pub(crate) annotations: BTreeMap<String, String>,
    pub(crate) cgroup: Option<PathBuf>,
    pub(crate) hooks: Hooks,
    /// The process of its configuration, which later changes of the file do not affect. Null if it has none.
    #[serde(default)]
    pub(crate) process: serde_json::Value,
    /// The container that owns its virtual machine, if that is another one.
    #[serde(default)]
    pub(crate) owner: Option<String>,
    /// Whether it has a socket for messages to a service manager.
    #[serde(default)]
    pub(crate) notifies: bool,
    /// The mappings of its user namespace, for containers that join that.
    #[serde(default)]
    pub(crate) users: Option<UserMappings>,
}

impl Stored {
    /// The environment of its hooks. This process has not changed its namespaces.
    pub(crate) fn place(&self) -> HookContext<'_> {
        HookContext {
            directory: &self.bundle,
            network: None,
            output: HOOK_OUTPUT.map(|name| self.annotations.get(name).map(Path::new)),
        }
    }
}

/// Directory with the state of all containers.
pub(crate) struct Root {
    pub(crate) path: PathBuf,
    /// Whether it is the default one, which is created with the first container.
    is_default: bool,
}

impl Root {
    pub(crate) fn of(globals: &Globals) -> Self {
        match globals
            .root
            .clone()
            .filter(|root| !root.as_os_str().is_empty())
        {
            Some(path) => Self::at(path),
            None => Self {
                path: parent_of_default(
                    rustix::process::geteuid().is_root(),
                    is_in_user_namespace(),
                    |name| std::env::var_os(name),
                )
                .join("koya-runtime"),
                is_default: true,
            },
        }
    }

    pub(crate) fn at(path: PathBuf) -> Self {
        Self {
            path,
            is_default: false,
        }
    }

    /// The root that contains this directory of a container.
    pub(crate) fn of_container(directory: &Path) -> Result<Self> {
        let path = directory.parent().context("a container's directory")?;
        Ok(Self::at(path.into()))
    }

    /// All created containers.
    pub(crate) fn all(&self) -> Result<Vec<Container>> {
        let entries = match fs::read_dir(&self.path) {
            Err(error) if error.kind() == ErrorKind::NotFound && self.is_default => {
                return Ok(Vec::new());
            }
            entries => entries.with_context(|| format!("cannot read {}", self.path.display()))?,
        };
        let names = entries.flatten().map(|entry| entry.file_name());
        let mut names: Vec<_> = names
            .filter_map(|name| name.to_str().map(String::from))
            .collect();
        names.sort();
        Ok(names.iter().filter_map(|id| self.find(id).ok()).collect())
    }

    /// Finds a created container.
    ///
    /// # Errors
    /// If there is none of this name.
    pub(crate) fn find(&self, id: &str) -> Result<Container> {
        check_id(id)?;
        let directory = self.path.join(id);
        let text = match fs::read(directory.join(STATE)) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                bail!("container does not exist: {id}")
            }
            text => text.with_context(|| format!("cannot read {}", directory.display()))?,
        };
        let stored = serde_json::from_slice(&text);
        let stored = stored.with_context(|| directory.join(STATE).display().to_string())?;
        Ok(Container { directory, stored })
    }

    /// As [`find`](Self::find), with a lock for changes.
    pub(crate) fn lock(&self, id: &str) -> Result<(Container, Lock)> {
        let directory = self.find(id)?.directory;
        // Its state names hooks, which run with the privileges of this user.
        check_own(&directory)?;
        let Some(lock) = Lock::take(&directory)? else {
            bail!("container does not exist: {id}");
        };
        Ok((self.find(id)?, lock))
    }

    /// Creates the directory of a new container.
    ///
    /// # Errors
    /// If there is a container of this name.
    pub(crate) fn make(&self, id: &str) -> Result<(PathBuf, Lock)> {
        check_id(id)?;
        let directory = self.path.join(id);
        let mut builder = fs::DirBuilder::new();
        builder.mode(0o700);
        builder
            .recursive(true)
            .create(&self.path)
            .with_context(|| format!("cannot make {}", self.path.display()))?;
        let cannot = || format!("cannot make {}", directory.display());
        builder.recursive(false);
        loop {
            match builder.create(&directory) {
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                made => made.with_context(cannot)?,
            }
            match Lock::take(&directory)? {
                // It was deleted meanwhile.
                None => {}
                // A leftover without a state belongs to the process that locks it.
                Some(lock) if !directory.join(STATE).exists() => {
                    check_own(&directory)?;
                    return Ok((directory, lock));
                }
                Some(_) => bail!("container with given ID already exists"),
            }
        }
    }
}

/// With the messages of runc, and after them that of crun for a character.
pub(crate) fn check_id(id: &str) -> Result<()> {
    if id.is_empty() {
        bail!("container id cannot be empty");
    }
    let is_usual = |c: &char| c.is_ascii_alphanumeric() || "_+-.".contains(*c);
    if let Some(other) = id.chars().find(|c| !is_usual(c)) {
        bail!(
            "invalid container ID format: invalid character `{other}` in the container ID `{id}`"
        );
    }
    if !koya::is_id(id) {
        bail!("invalid container ID format: {id}");
    }
    Ok(())
}

/// Checks that no other user has made this directory, or can replace what is in it: where several users may write to the
/// directory of all containers, another one can guess the name of the next.
fn check_own(directory: &Path) -> Result<()> {
    koya::directories::check_own(directory, 0o022)
        .map_err(|error| anyhow!("{error}: remove it, or choose another --root"))
}

/// A lock on a container's directory.
pub(crate) struct Lock(#[allow(dead_code)] OwnedFd);

impl Lock {
    /// `None` if the directory was removed before.
    fn take(directory: &Path) -> Result<Option<Self>> {
        let flags = OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let opened = match open(directory, flags, Mode::empty()) {
            Err(rustix::io::Errno::NOENT) => return Ok(None),
            opened => opened?,
        };
        flock(&opened, FlockOperation::LockExclusive)?;
        let own = rustix::fs::fstat(&opened)?.st_ino;
        let is_there = fs::metadata(directory).is_ok_and(|found| found.ino() == own);
        Ok(is_there.then_some(Self(opened)))
    }
}

/// A created container.
pub(crate) struct Container {
    pub(crate) directory: PathBuf,
    pub(crate) stored: Stored,
}

impl Container {
    /// Whether its sandbox's process is alive.
    pub(crate) fn is_alive(&self) -> bool {
        start_of(self.stored.pid) == Some(self.stored.pid_start)
    }

    pub(crate) fn connect(&self) -> Result<UnixStream> {
        connect(&self.directory)
    }

    /// A request for this container, in the form that is sent.
    pub(crate) fn asked(&self, request: Request) -> ContainerRequest {
        ContainerRequest {
            id: self.stored.id.clone(),
            request,
        }
    }

    pub(crate) fn status(&self) -> Status {
        if !self.is_alive() {
            return Status::Stopped;
        }
        match send_request(self, Request::Status) {
            Ok(Response::Status(status)) => status,
            // It is ending, or too busy to reply: then it is running.
            _ if !self.is_alive() || !self.directory.join(SOCKET).exists() => Status::Stopped,
            _ => Status::Running,
        }
    }

    /// The state for output.
    pub(crate) fn state(&self, status: Status) -> State<'_> {
        let stored = &self.stored;
        State {
            oci_version: OCI_VERSION,
            id: &stored.id,
            pid: match status {
                Status::Stopped => 0,
                _ => stored.pid,
            },
            status,
            bundle: &stored.bundle,
            rootfs: &stored.rootfs,
            created: &stored.created,
            annotations: &stored.annotations,
            owner: String::new(),
        }
    }

    /// The state for a list: runc prints the owner only there.
    pub(crate) fn listed(&self) -> State<'_> {
        State {
            owner: owner(self.stored.uid),
            ..self.state(self.status())
        }
    }
}

/// State of a container: the fields of the runtime specification and those of runc, in runc's order.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct State<'a> {
    oci_version: &'a str,
    pub(crate) id: &'a str,
    pub(crate) pid: i32,
    pub(crate) status: Status,
    pub(crate) bundle: &'a Path,
    rootfs: &'a Path,
    pub(crate) created: &'a str,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    annotations: &'a BTreeMap<String, String>,
    pub(crate) owner: String,
}

/// The state passed to hooks.
pub(crate) fn hook_state(stored: &Stored, status: ContainerState) -> Result<oci::State> {
    let mut state = StateBuilder::default();
    if !stored.annotations.is_empty() {
        let annotations = stored.annotations.clone().into_iter();
        state = state.annotations(annotations.collect::<HashMap<_, _>>());
    }
    let state = state
        .version(OCI_VERSION)
        .id(stored.id.as_str())
        .status(status)
        .pid(match status {
            ContainerState::Stopped => 0,
            _ => stored.pid,
        })
        .bundle(&stored.bundle)
        .build();
    state.context("a state for hooks")
}

/// The name of a user, as printed by runc: `#UID` if there is none.
fn owner(uid: u32) -> String {
    let users = fs::read_to_string("/etc/passwd").unwrap_or_default();
    user_name(&users, uid).map_or_else(|| format!("#{uid}"), str::to_owned)
}

/// Start time of a process, unless it is gone or has ended (proc_pid_stat(5)).
pub(crate) fn start_of(pid: i32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = text.rsplit_once(')')?.1.split_whitespace();
    match fields.next()? {
        "Z" | "X" => None,
        _ => fields.nth(18)?.parse().ok(),
    }
}

/// Writes a file atomically.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let name = path.file_name().context("a file has a name")?;
    let new = path.with_file_name(format!(".{}.new", name.to_string_lossy()));
    let written = fs::write(&new, bytes).and_then(|()| fs::rename(&new, path));
    written.with_context(|| format!("cannot write {}", path.display()))
}

pub(crate) fn store(directory: &Path, stored: &Stored) -> Result<()> {
    replace(&directory.join(STATE), &serde_json::to_vec(stored)?)
}

pub(crate) fn listen(directory: &Path) -> Result<UnixListener> {
    with_short_path(&directory.join(SOCKET), listen_privately)
        .with_context(|| format!("cannot listen in {}", directory.display()))
}

fn connect(directory: &Path) -> Result<UnixStream> {
    let socket = directory.join(SOCKET);
    with_short_path(&socket, |path| UnixStream::connect(path))
        .context("the container's process does not answer")
}

/// Makes connections to a container reach the process of another one, which owns its virtual machine.
pub(crate) fn listen_at(directory: &Path, of: &Path) -> Result<()> {
    symlink(of.join(SOCKET), directory.join(SOCKET))
        .with_context(|| format!("cannot make a link in {}", directory.display()))
}

/// The parent of the default directory, with the rule of runc: the root user of a user namespace (podman without root) is not
/// the host's, unless its name says so.
fn parent_of_default(
    is_root: bool,
    is_in_user_namespace: bool,
    variable: impl Fn(&str) -> Option<OsString>,
) -> PathBuf {
    let is_users = || variable("USER").is_none_or(|name| name != "root");
    let is_the_hosts = is_root && !(is_in_user_namespace && is_users());
    let own = variable("XDG_RUNTIME_DIR").filter(|path| !is_the_hosts && !path.is_empty());
    own.map_or("/run".into(), PathBuf::from)
}

/// Prevents further connections.
pub(crate) fn stop_listening(directory: &Path) {
    fs::remove_file(directory.join(SOCKET)).ok();
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn users_have_their_own_directory_also_as_root_of_their_namespace() {
        let of = |is_root, is_in_user_namespace, name: &'static str| {
            let variable = |which: &str| match which {
                "USER" => Some(name.into()),
                _ => Some("/run/user/1000".into()),
            };
            parent_of_default(is_root, is_in_user_namespace, variable)
        };
        let (hosts, users) = (Path::new("/run"), Path::new("/run/user/1000"));
        assert_eq!(of(true, false, "root"), hosts);
        // sudo(8) without a login.
        assert_eq!(of(true, false, "me"), hosts);
        assert_eq!(of(false, false, "me"), users);
        assert_eq!(of(true, true, "me"), users);
        // A container with a user namespace, in which root runs another one.
        assert_eq!(of(true, true, "root"), hosts);
        assert_eq!(parent_of_default(false, false, |_| None), hosts);
    }

    #[test]
    fn a_directory_of_others_is_not_taken_over() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::at(dir.path().into());
        let planted = |name: &str, mode| {
            let path = dir.path().join(name);
            fs::create_dir(&path).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        };
        planted("left", 0o700);
        root.make("left").unwrap();
        planted("open", 0o777);
        let error = root.make("open").err().unwrap();
        assert!(error.to_string().contains("0777"), "{error}");
        symlink("left", dir.path().join("link")).unwrap();
        assert!(root.make("link").is_err());
    }

    #[test]
    fn a_socket_is_its_users_alone() {
        let dir = tempfile::tempdir().unwrap();
        let _listener = listen(dir.path()).unwrap();
        let mode = fs::metadata(dir.path().join(SOCKET)).unwrap().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    pub(crate) fn stored(id: &str) -> Stored {
        let pid = std::process::id() as i32;
        Stored {
            id: id.into(),
            pid,
            pid_start: start_of(pid).unwrap(),
            bundle: "/b".into(),
            rootfs: "/b/rootfs".into(),
            created: "2026-01-01T00:00:00Z".into(),
            uid: 0,
            annotations: Default::default(),
            cgroup: None,
            hooks: Hooks::default(),
            process: serde_json::Value::Null,
            owner: None,
            notifies: false,
            users: None,
        }
    }

    #[test]
    fn owners_without_a_name_are_numbers() {
        let users = "root:x:0:0::/root:/bin/sh\nbroken\nme:x:1000:1000::/:/bin/sh\n";
        assert_eq!(user_name(users, 1000), Some("me"));
        assert_eq!(user_name(users, 1001), None);
        assert_eq!(owner(u32::MAX - 2), format!("#{}", u32::MAX - 2));
    }

    #[test]
    fn names_are_those_of_runc() {
        for id in ["a", "a.b", "_x", "A-1_+.b", ".foo"] {
            assert!(check_id(id).is_ok(), "{id}");
        }
        for id in [".", "..", "foo bar", "this/is", "é"] {
            let said = check_id(id).unwrap_err().to_string();
            assert!(said.starts_with("invalid container ID format: "), "{said}");
        }
        let said = check_id("this/is").unwrap_err().to_string();
        assert!(said.ends_with("invalid character `/` in the container ID `this/is`"));
        assert!(check_id("").is_err());
    }

    #[test]
    fn a_name_is_one_containers() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::at(dir.path().join("root"));
        assert!(
            root.all().is_err(),
            "a root that was named and is not there"
        );
        let error = |result: Result<Container>| result.err().unwrap().to_string();
        assert!(error(root.find("c")).contains("does not exist"));
        let (directory, lock) = root.make("c").unwrap();
        assert!(root.find("c").is_err(), "it has no state yet");
        store(&directory, &stored("c")).unwrap();
        drop(lock);
        let again = root.make("c").err().unwrap().to_string();
        assert_eq!(again, "container with given ID already exists");
        assert_eq!(root.all().unwrap().len(), 1);
        assert!(root.find("c").unwrap().is_alive());
    }

    #[test]
    fn what_was_left_without_a_state_can_be_had() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::at(dir.path().into());
        drop(root.make("c").unwrap());
        assert!(root.make("c").is_ok());
    }

    #[test]
    fn a_pid_that_is_used_again_is_another_process() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::at(dir.path().into());
        let (directory, _lock) = root.make("c").unwrap();
        let mut other = stored("c");
        other.pid_start += 1;
        store(&directory, &other).unwrap();
        let container = root.find("c").unwrap();
        assert_eq!(container.status(), Status::Stopped);
        assert_eq!(container.state(Status::Stopped).pid, 0);
    }

    #[test]
    fn a_socket_may_lie_deep() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("x".repeat(200));
        fs::create_dir(&deep).unwrap();
        let _listener = listen(&deep).unwrap();
        connect(&deep).unwrap();
    }
}
