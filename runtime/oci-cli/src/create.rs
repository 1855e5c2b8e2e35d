//! `create` and `run`: starts the long-lived process ([`crate::serve`]), runs hooks, stores the state.

use crate::cli::{CreateArgs, Globals, RunArgs};
use crate::console::{self, ConnectedTerminal};
use crate::ipc::{Boot, Request, receive_response, send_request};
use crate::pidfd::Receiver;
use crate::preserved::PreservedFds;
use crate::source::Source;
use crate::state::{self, Container, Root, Status, Stored, start_of};
use crate::{Outcome, capabilities, life, logging, member, notify, oom, program};
use anyhow::{Context, Result, bail};
use chrono::SecondsFormat;
use koya::oci_spec::runtime::ContainerState;
use koya_tasks::hooks::{self, Kind};
use koya_tasks::wire::{Wire, send};
use koya_tasks::{Role, SandboxMembership, Spec, cgroup, environment_for};
use nix::sched::{CloneFlags, unshare};
use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::channel;
use std::time::Duration;

pub(crate) fn create(
    root: &Root,
    globals: &Globals,
    args: &CreateArgs,
    given: &PreservedFds,
) -> Outcome {
    let mut wanted = CreateParams::read(root, globals, args)?;
    match (&args.console_socket, wanted.has_terminal()) {
        (None, true) => {
            bail!("cannot allocate tty if runc will detach without setting console socket")
        }
        (Some(_), false) => {
            bail!("cannot use console socket if runc will not detach or allocate tty")
        }
        _ => {}
    }
    let console = args.console_socket.as_deref().map(console::connect);
    wanted.console = console.transpose()?;
    create_container(root, globals, args, wanted, given)?;
    Ok(0)
}

pub(crate) fn run(root: &Root, globals: &Globals, args: &RunArgs, given: &PreservedFds) -> Outcome {
    if args.detach {
        create(root, globals, &args.create, given)?;
        let started = life::start(root, &args.create.id);
        if started.is_err() {
            life::delete_by_force(root, &args.create.id)?;
        }
        return started;
    }
    let mut wanted = CreateParams::read(root, globals, &args.create)?;
    if args.create.console_socket.is_some() {
        bail!("cannot use console socket if runc will not detach or allocate tty");
    }
    let (ours, theirs) = UnixStream::pair()?;
    wanted.is_own_terminal = wanted.has_terminal();
    wanted.console = wanted.is_own_terminal.then_some(theirs);
    let console = wanted.is_own_terminal.then_some(ours);
    // Before any thread exists, so that no thread takes a signal for the container.
    let signals = life::Forwarded::catch()?;
    let mut child = create_container(root, globals, &args.create, wanted, given)?;
    let ran = attend(root, args, &mut child, signals, console);
    if ran.is_err() || !args.keep {
        life::delete_by_force(root, &args.create.id)?;
    }
    ran
}

/// Starts a container in the foreground, and waits for its end. Its terminal arrives over `console`.
fn attend(
    root: &Root,
    args: &RunArgs,
    child: &mut Child,
    signals: life::Forwarded,
    console: Option<UnixStream>,
) -> Outcome {
    let master = console.as_ref().map(console::receive_master).transpose()?;
    if let Some(master) = &master {
        console::copy_size(master);
    }
    // Until the container is ready, and after.
    let messages = life::start_and_follow(root, &args.create.id, true)?;
    let messages = messages
        .map(notify::Forwarder::until_end_aside)
        .transpose()?;
    let joined = master.as_ref().map(ConnectedTerminal::start).transpose()?;
    signals.to(child.id(), master)?;
    let status = child.wait()?;
    if let Some(messages) = messages {
        // The last ones are on their way.
        messages.recv_timeout(LAST_MESSAGES).ok();
    }
    if let Some(joined) = joined {
        joined.finish();
    }
    Ok(status.code().unwrap_or(KILLED) as u8)
}

/// Time limit for passing on the last messages of a container to a service manager.
const LAST_MESSAGES: Duration = Duration::from_secs(2);

/// Status of a container whose sandbox process was killed.
pub(crate) const KILLED: i32 = 137;

/// A container to be created.
struct CreateParams {
    spec: Spec,
    source: Source,
    /// The container whose virtual machine it joins.
    joins: Option<SandboxMembership>,
    /// Connection for its terminal.
    console: Option<UnixStream>,
    /// Connection for a pidfd of its process.
    pidfd: Option<Receiver>,
    /// Whether the terminal is the user's own.
    is_own_terminal: bool,
    /// Its socket for messages to a service manager.
    notify: Option<notify::Wanted>,
}

impl CreateParams {
    fn read(root: &Root, globals: &Globals, args: &CreateArgs) -> Result<Self> {
        state::check_id(&args.id)?;
        let mut source = Source::of(globals, args)?;
        let mut spec = source.read(&args.bundle, &args.id)?;
        if let Some(users) = member::users(root, &spec)? {
            spec.set_user_mappings(&users);
            source.users = Some(users);
        }
        let joins = member::owner(root, &spec)?;
        if joins.is_none() && spec.role(&args.id) != Role::Single {
            bail!(
                "the pods of Kubernetes are not supported by koya-runtime: have containerd use \
                 io.containerd.koya.v2 for them"
            );
        }
        spec.check()?;
        program::check_mount_points(&spec, &args.bundle)?;
        program::check(&spec, &args.bundle)?;
        if let Some(process) = spec.config().process() {
            capabilities::warn_of_ambient(&serde_json::to_value(process.capabilities())?);
        }
        let notify = notify::Wanted::of(&spec, &args.bundle);
        Ok(Self {
            spec,
            source,
            joins,
            console: None,
            pidfd: Receiver::connect(args.pidfd_socket.as_deref())?,
            is_own_terminal: false,
            notify,
        })
    }

    fn has_terminal(&self) -> bool {
        let process = self.spec.config().process().as_ref();
        process.and_then(|process| process.terminal()) == Some(true)
    }
}

/// Creates a container. The long-lived process is a child of this one until this one ends.
fn create_container(
    root: &Root,
    globals: &Globals,
    args: &CreateArgs,
    wanted: CreateParams,
    given: &PreservedFds,
) -> Result<Child> {
    let CreateParams {
        spec,
        source,
        joins,
        console,
        pidfd,
        is_own_terminal,
        notify,
    } = wanted;
    let bundle = fs::canonicalize(&args.bundle)
        .with_context(|| format!("cannot find the bundle {}", args.bundle.display()))?;
    let (directory, lock) = root.make(&args.id)?;
    let directory = fs::canonicalize(directory)?;
    let boot = Boot {
        id: args.id.clone(),
        directory: directory.clone(),
        oom_files: oom::files(&spec, &bundle),
        bundle,
        source,
        is_terminal: console.is_some(),
        is_own_terminal,
        preserved: given.count,
        notify: notify.as_ref().map(|wanted| wanted.path.clone()),
        joins,
        log: logging::Config::of(globals)?,
    };
    let manager = notify.as_ref().map(|wanted| wanted.manager.as_fd());
    let group = spec.cgroup();
    // Only after its ID is reserved: an ID in use is the more helpful error.
    let is_unused = group.as_deref().map_or(Ok(()), cgroup::check_unused);
    let launched = is_unused
        .map_err(anyhow::Error::from)
        .and_then(|()| start_process(&boot, &spec, console, given, manager));
    // A container whose poststop hooks are due if it is not created.
    let mut due = None;
    let made = launched.and_then(|(mut child, stream)| {
        let told = pidfd.map_or(Ok(()), |receiver| receiver.send(child.id()));
        let finished =
            told.and_then(|()| finish_creation(&boot, args, spec, child.id(), &stream, &mut due));
        if finished.is_err() {
            child.kill().ok();
            child.wait().ok();
            if let Some(group) = group {
                cgroup::remove(&group);
            }
        }
        finished.map(|()| child)
    });
    if made.is_err() {
        fs::remove_dir_all(&directory).ok();
        if let Some(stored) = due {
            life::run_poststop_hooks(&stored);
        }
    }
    drop(lock);
    made
}

/// Starts the long-lived process, and sends it the request.
fn start_process(
    boot: &Boot,
    spec: &Spec,
    console: Option<UnixStream>,
    given: &PreservedFds,
    manager: Option<BorrowedFd<'_>>,
) -> Result<(Child, UnixStream)> {
    let (ours, theirs) = UnixStream::pair()?;
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0("koya-runtime")
        .arg("serve")
        // For ps(1) and `podman top`.
        .arg(&boot.id)
        .env_clear()
        .envs(environment_for(spec, &[Kind::CreateContainer]))
        // Not the sandbox's: it is of this command.
        .env_remove(notify::VARIABLE)
        .stdin(OwnedFd::from(theirs))
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let child = match koya_tasks::is_in_user_namespace() {
        true => spawn_with_own_pids(command),
        false => Ok(command.spawn()?),
    };
    let child = child.context("cannot start the container's process")?;
    let console = console.as_ref().map(AsFd::as_fd);
    given.send(&ours, boot, console, manager)?;
    Ok((child, ours))
}

/// Starts a process as the first one of a pid namespace of its own, if possible: `podman cp` enters the pid namespace of a
/// container's process, and a user may not enter the host's.
fn spawn_with_own_pids(mut command: Command) -> Result<Child> {
    let (sender, receiver) = channel();
    console::spawn("koya-spawner", move || {
        // It applies to the children of this thread alone.
        if let Err(error) = unshare(CloneFlags::CLONE_NEWPID) {
            log::debug!("no pid namespace for the container's process: {error}");
        }
        sender.send(command.spawn()).ok();
    })?;
    Ok(receiver.recv()??)
}

/// The hooks before the end of the creation. If it fails after one of them, poststop hooks are due (runtime.md of the
/// specification).
const OF_CREATION: [Kind; 3] = [Kind::Prestart, Kind::CreateRuntime, Kind::CreateContainer];

/// Makes the process create the container, between running hooks and storing the state. `due` is set before the first hook is
/// run.
fn finish_creation(
    boot: &Boot,
    args: &CreateArgs,
    spec: Spec,
    pid: u32,
    stream: &UnixStream,
    due: &mut Option<Stored>,
) -> Result<()> {
    let mut wire = Wire::new(stream.try_clone()?);
    receive_response(&mut wire)?;
    let stored = stored(boot, spec, pid)?;
    let has_hooks = |kind: &Kind| !kind.of(&stored.hooks).is_empty();
    if OF_CREATION.iter().any(has_hooks) {
        *due = Some(stored.clone());
    }
    let state = state::hook_state(&stored, ContainerState::Creating)?;
    for kind in [Kind::Prestart, Kind::CreateRuntime] {
        hooks::run(kind, kind.of(&stored.hooks), &state, stored.place())?;
    }
    send(stream, &Request::Start, &[])?;
    receive_response(&mut wire)?;
    write_pid(args.pid_file.as_deref(), pid)?;
    state::store(&boot.directory, &stored)?;
    // From here on it continues without this command.
    send(stream, &Request::Status, &[])
}

fn stored(boot: &Boot, mut spec: Spec, pid: u32) -> Result<Stored> {
    let hooks = spec.take_host_hooks();
    let users = spec.user_mappings();
    let config = spec.config();
    let root = config.root().as_ref();
    let annotations = config.annotations().iter().flatten();
    let now = logging::now();
    Ok(Stored {
        id: boot.id.clone(),
        pid: pid as i32,
        pid_start: start_of(pid as i32).context("the container's process has ended")?,
        bundle: boot.bundle.clone(),
        rootfs: root
            .map(|root| boot.bundle.join(root.path()))
            .unwrap_or_default(),
        created: now.to_rfc3339_opts(SecondsFormat::Nanos, true),
        uid: rustix::process::geteuid().as_raw(),
        annotations: annotations.map(|(k, v)| (k.clone(), v.clone())).collect(),
        cgroup: spec.cgroup(),
        hooks,
        process: serde_json::to_value(spec.config().process())?,
        owner: boot.joins.as_ref().map(|joins| joins.sandbox.clone()),
        notifies: boot.notify.is_some(),
        users,
    })
}

/// Starts a created container, after the checks that runc makes. If a poststart hook fails, the container is deleted. If the
/// start fails otherwise, the container has stopped, and its process has ended: callers delete it at once, and Docker 20.10
/// keeps what it can't delete.
pub(crate) fn start_created(container: &Container) -> Result<()> {
    match container.status() {
        Status::Created => {}
        Status::Stopped => bail!("cannot start a container that has stopped"),
        Status::Running => bail!("cannot start an already running container"),
        Status::Paused => bail!("cannot start a container in the paused state"),
    }
    if let Err(error) = send_request(container, Request::Start) {
        life::wait_for_end(container);
        return Err(error);
    }
    let state = state::hook_state(&container.stored, ContainerState::Running)?;
    let Stored { hooks, .. } = &container.stored;
    let place = container.stored.place();
    let ran = hooks::run(Kind::Poststart, Kind::Poststart.of(hooks), &state, place);
    if ran.is_err() {
        // Its lifecycle continues as after a deletion (runtime.md of the specification).
        life::remove(container)?;
    }
    Ok(ran?)
}

/// Writes the PID for the caller, if requested.
pub(crate) fn write_pid(file: Option<&Path>, pid: u32) -> Result<()> {
    file.map_or(Ok(()), |file| {
        state::replace(file, pid.to_string().as_bytes())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use crate::ipc::Response;
    use clap::Parser;
    use serde_json::{Value, json};

    /// The end of a creation with these hooks whose process fails once it is asked for the container: the error, and whether
    /// poststop hooks are due.
    fn finished(hooks: Value) -> (String, bool) {
        let dir = tempfile::tempdir().unwrap();
        let config = json!({"ociVersion": "1.2.0", "hooks": hooks});
        fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        let cli = Cli::try_parse_from(["koya-runtime", "create", "c"]).unwrap();
        let Command::Create(args) = &cli.command else {
            panic!("another command");
        };
        let boot = Boot {
            id: "c".into(),
            directory: dir.path().into(),
            bundle: dir.path().into(),
            source: Source::default(),
            is_terminal: false,
            is_own_terminal: false,
            preserved: Default::default(),
            notify: None,
            joins: None,
            oom_files: Vec::new(),
            log: logging::Config::default(),
        };
        let spec = Spec::read(dir.path()).unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        send(&theirs, &Response::Done, &[]).unwrap();
        send(&theirs, &Response::Failed("no machine".into()), &[]).unwrap();
        let mut due = None;
        let finished = finish_creation(&boot, args, spec, std::process::id(), &ours, &mut due);
        (finished.unwrap_err().to_string(), due.is_some())
    }

    #[test]
    fn a_failed_creation_ends_with_poststop_hooks_if_hooks_have_run() {
        let (yes, no) = (
            json!([{"path": "/bin/true"}]),
            json!([{"path": "/bin/false"}]),
        );
        for kind in ["prestart", "createRuntime"] {
            let (said, is_due) = finished(json!({kind: no.clone(), "poststop": yes.clone()}));
            assert!(said.contains(kind) && is_due, "{said}");
        }
        for kind in ["prestart", "createRuntime", "createContainer"] {
            let (said, is_due) = finished(json!({kind: yes.clone(), "poststop": yes.clone()}));
            assert_eq!((said.as_str(), is_due), ("no machine", true), "{kind}");
        }
        let (said, is_due) = finished(json!({"poststart": no, "poststop": yes}));
        assert_eq!((said.as_str(), is_due), ("no machine", false));
    }
}
