//! `exec`: adds a process to a container.
//!
//! In the foreground the command itself represents the process; detached, a long-lived process does ([`stub`]): callers get
//! its PID, and it exits with the process's status. It keeps none of the process's streams open.

use crate::cli::ExecArgs;
use crate::console::{self, ConnectedTerminal, Pty, size, spawn};
use crate::create::{KILLED, write_pid};
use crate::ipc::{Request, Response, receive_response};
use crate::pidfd::Receiver;
use crate::preserved::{Count, PreservedFds};
use crate::signal::PASSED;
use crate::state::{Container, Root, Status, Stored};
use crate::{Outcome, capabilities, long_lived, source};
use anyhow::{Context, Result, bail};
use koya_tasks::wire::{Wire, send};
use koya_tasks::{Spec, environment, give_up_privileges};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use signal_hook::consts::SIGWINCH;
use signal_hook::iterator::Signals;
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Component, Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// Interval between checks whether a paused container was resumed.
const LOOK: Duration = Duration::from_millis(50);

/// Request to a stub. Attached: the process's streams, or a connection to a console socket.
#[derive(Serialize, Deserialize)]
struct StubRequest {
    root: PathBuf,
    id: String,
    is_terminal: bool,
    added: ExecSpec,
}

/// A process to be added to a container.
#[derive(Serialize, Deserialize)]
struct ExecSpec {
    process: Value,
    preserved: Count,
    cgroup: Option<String>,
}

impl ExecSpec {
    fn request(&self, is_own_terminal: bool) -> Request {
        Request::Exec {
            process: self.process.clone(),
            is_own_terminal,
            preserved: self.preserved,
            cgroup: self.cgroup.clone(),
        }
    }
}

pub(crate) fn exec(root: &Root, args: &ExecArgs, given: &PreservedFds) -> Outcome {
    let cgroup = cgroup_of(args)?;
    let container = root.find(&args.id)?;
    match container.status() {
        Status::Stopped => bail!("cannot exec in a stopped container"),
        Status::Paused if args.ignore_paused => wait_for_resume(&container)?,
        Status::Paused => bail!("cannot exec in a paused container"),
        Status::Created | Status::Running => {}
    }
    let mut process = process_of(args, &container.stored)?;
    add_environment(&mut process, given.count);
    // A process derived from the container's has them already.
    if args.process.is_some()
        && let Some(groups) = source::kept_groups(&container.stored)
    {
        process["user"]["additionalGids"] = groups.clone();
    }
    capabilities::warn_of_ambient(&process["capabilities"]);
    let is_terminal = process["terminal"] == true;
    check_terminal(is_terminal, args.detach, args.console_socket.is_some())?;
    let console = args.console_socket.as_deref().map(console::connect);
    let pidfd = Receiver::connect(args.pidfd_socket.as_deref())?;
    let added = ExecSpec {
        process,
        preserved: given.count,
        cgroup,
    };
    let added = match args.detach {
        true => detach(root, args, added, console.transpose()?, (given, pidfd)),
        false => {
            if let Some(receiver) = pidfd {
                receiver.send(std::process::id())?;
            }
            foreground(&container, args, &added, given)
        }
    };
    match added {
        // It has ended meanwhile, and its process on the host may have done so before it answered.
        Err(error) if container.status() == Status::Stopped => {
            log::debug!("{error:#}");
            bail!("cannot exec in a stopped container")
        }
        other => other,
    }
}

/// Checks, like runc, that a console socket is for a terminal, and that a detached terminal has one.
fn check_terminal(is_terminal: bool, is_detached: bool, has_socket: bool) -> Result<()> {
    match (is_terminal, has_socket) {
        (true, false) if is_detached => {
            bail!("cannot allocate tty if runc will detach without setting console socket")
        }
        (false, true) => {
            bail!("cannot use console socket if runc will not detach or allocate tty")
        }
        _ => Ok(()),
    }
}

/// Waits until a paused container is resumed. With runc, a process added to it is frozen until then; here it is created
/// then.
fn wait_for_resume(container: &Container) -> Result<()> {
    loop {
        match container.status() {
            Status::Paused => std::thread::sleep(LOOK),
            Status::Stopped => bail!("cannot exec in a stopped container"),
            Status::Created | Status::Running => return Ok(()),
        }
    }
}

/// The requested control group below the container's. Guests have control groups of version 2.
fn cgroup_of(args: &ExecArgs) -> Result<Option<String>> {
    let [group] = args.cgroup.as_slice() else {
        return match args.cgroup.is_empty() {
            true => Ok(None),
            false => bail!("--cgroup: a process can be in one control group of version 2"),
        };
    };
    if group.contains(':') {
        bail!("--cgroup {group}: controllers of version 2 have no groups of their own");
    }
    if Path::new(group)
        .components()
        .any(|part| part == Component::ParentDir)
    {
        bail!("--cgroup {group}: bad sub cgroup path");
    }
    Ok(Some(group.clone()))
}

/// The process to run: from a file, or derived from the container's.
fn process_of(args: &ExecArgs, stored: &Stored) -> Result<Value> {
    if let Some(file) = &args.process {
        let text = fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
        let mut process: Value =
            serde_json::from_slice(&text).with_context(|| file.display().to_string())?;
        if !process.is_object() {
            bail!("{}: a process is a JSON object", file.display());
        }
        if args.tty {
            process["terminal"] = true.into();
        }
        return Ok(process);
    }
    if args.args.is_empty() {
        bail!("process args cannot be empty");
    }
    let mut process = stored.process.clone();
    if process.is_null() {
        // The state of an earlier version.
        let spec = Spec::read(&stored.bundle)?;
        let own = spec.config().process().as_ref();
        process = serde_json::to_value(own.context("the container has no process")?)?;
    }
    process["args"] = json!(args.args);
    process["terminal"] = args.tty.into();
    if let Some(cwd) = &args.cwd {
        process["cwd"] = json!(cwd);
    }
    append(&mut process["env"], &args.env);
    if args.no_new_privs {
        process["noNewPrivileges"] = true.into();
    }
    // As in runc: ambient capabilities are set only if there are inheritable ones.
    let inherits = process["capabilities"]["inheritable"].is_array();
    let sets = ["bounding", "effective", "permitted", "ambient"];
    let sets = &sets[..if inherits { 4 } else { 3 }];
    if !args.cap.is_empty() {
        for set in sets {
            append(&mut process["capabilities"][*set], &args.cap);
        }
    }
    if let Some(user) = &args.user {
        let (uid, gid) = user.split_once(':').unwrap_or((user.as_str(), "0"));
        let number = |text: &str| {
            let number = text.parse::<u32>();
            number.with_context(|| format!("--user {user}: users and groups are numbers here"))
        };
        process["user"]["uid"] = number(uid)?.into();
        if user.contains(':') {
            process["user"]["gid"] = number(gid)?.into();
        }
    }
    append(
        &mut process["user"]["additionalGids"],
        &args.additional_gids,
    );
    Ok(process)
}

/// Appends to an array of the process. A missing one is created.
fn append<T: Clone + Into<Value>>(array: &mut Value, added: &[T]) {
    if added.is_empty() {
        return;
    }
    let added = added.iter().cloned().map(|one| -> Value { one.into() });
    match array.as_array_mut() {
        Some(all) => all.extend(added),
        None => *array = added.collect(),
    }
}

fn add_environment(process: &mut Value, count: Count) {
    append(&mut process["env"], &count.environment());
}

fn console_size(process: &Value) -> Option<(u64, u64)> {
    let size = &process["consoleSize"];
    Some((size["height"].as_u64()?, size["width"].as_u64()?))
}

fn foreground(
    container: &Container,
    args: &ExecArgs,
    added: &ExecSpec,
    given: &PreservedFds,
) -> Outcome {
    let stream = &container.connect()?;
    let process = &added.process;
    let open = || Pty::open(console_size(process));
    let pty = (process["terminal"] == true).then(open).transpose()?;
    if let Some(pty) = pty.as_ref().filter(|_| args.console_socket.is_none()) {
        console::copy_size(&pty.master);
    }
    if let (Some(pty), Some(socket)) = (&pty, &args.console_socket) {
        pty.send_master(&console::connect(socket)?)?;
    }
    let signals = Signals::new(PASSED)?;
    let is_own_terminal = pty.is_some() && args.console_socket.is_none();
    let asked = container.asked(added.request(is_own_terminal));
    let slave = pty.as_ref().map(|pty| pty.slave.as_fd());
    given.send(stream, &asked, slave, None)?;
    let mut wire = Wire::new(stream.try_clone()?);
    receive_response(&mut wire)?;
    write_pid(args.pid_file.as_deref(), std::process::id())?;
    let master = pty.map(|pty| pty.master);
    let own = master.as_ref().filter(|_| is_own_terminal);
    let joined = own.map(ConnectedTerminal::start).transpose()?;
    let terminal = std::io::stdin().as_fd().try_clone_to_owned()?;
    pass_on(signals, stream, joined.is_some().then_some(terminal))?;
    let status = end(&mut wire);
    if let Some(joined) = joined {
        joined.finish();
    }
    Ok(status)
}

/// Forwards signals to the sandbox's process, and the size of a terminal, now and at each change.
pub(crate) fn pass_on(
    mut signals: Signals,
    stream: &UnixStream,
    terminal: Option<OwnedFd>,
) -> Result<()> {
    let stream = stream.try_clone()?;
    spawn("koya-signals", move || {
        let tell_size = || match terminal.as_ref().map_or((0, 0), size) {
            // There is no terminal, or it has no size.
            (0, 0) => Ok(()),
            (rows, columns) => send(&stream, &Request::Resize(rows, columns), &[]),
        };
        let mut told = tell_size();
        let mut signals = signals.forever();
        while told.is_ok()
            && let Some(signal) = signals.next()
        {
            told = match signal {
                SIGWINCH => tell_size(),
                signal => send(&stream, &Request::Signal(signal as u32), &[]),
            };
        }
    })
}

/// The exit status of the process. If its sandbox ends first, it counts as killed.
pub(crate) fn end(wire: &mut Wire) -> u8 {
    match receive_response(wire) {
        Ok(Response::Ended(status)) => status as u8,
        other => {
            log::debug!("the end of a process: {other:?}");
            KILLED as u8
        }
    }
}

fn detach(
    root: &Root,
    args: &ExecArgs,
    added: ExecSpec,
    console: Option<UnixStream>,
    (given, pidfd): (&PreservedFds, Option<Receiver>),
) -> Outcome {
    let (ours, theirs) = UnixStream::pair()?;
    let mut child = Command::new("/proc/self/exe")
        .arg0("koya-runtime")
        .arg("stub")
        .env_clear()
        .envs(environment())
        .stdin(OwnedFd::from(theirs))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("cannot start a process")?;
    let stubbed = StubRequest {
        root: std::path::absolute(&root.path)?,
        id: args.id.clone(),
        is_terminal: console.is_some(),
        added,
    };
    let told = pidfd.map_or(Ok(()), |receiver| receiver.send(child.id()));
    let console = console.as_ref().map(AsFd::as_fd);
    let started = told
        .and_then(|()| given.send(&ours, &stubbed, console, None))
        .and_then(|()| receive_response(&mut Wire::new(ours)))
        .and_then(|_| write_pid(args.pid_file.as_deref(), child.id()));
    if started.is_err() {
        child.kill().ok();
        child.wait().ok();
    }
    started.map(|()| 0)
}

/// The main function of a process that represents an exec process.
pub(crate) fn stub() -> Outcome {
    let stream = long_lived::detach()?;
    let mut wire = Wire::new(stream.try_clone()?);
    give_up_privileges(false)?;
    let Some((stubbed, fds)) = wire.receive::<StubRequest>()? else {
        bail!("no request was received");
    };
    let started = start_in_stub(&stubbed, fds);
    let answer = match &started {
        Ok(_) => Response::Started,
        Err(error) => Response::Failed(format!("{error:#}")),
    };
    send(&stream, &answer, &[]).ok();
    drop((stream, wire));
    let mut sandbox = started?;
    Ok(end(&mut sandbox))
}

/// Starts the process; returns the connection that reports its end.
fn start_in_stub(stubbed: &StubRequest, mut fds: Vec<OwnedFd>) -> Result<Wire> {
    let container = Root::at(stubbed.root.clone()).find(&stubbed.id)?;
    let sandbox = container.connect()?;
    let mut wire = Wire::new(sandbox.try_clone()?);
    let signals = Signals::new(PASSED)?;
    let mut terminal = None;
    if stubbed.is_terminal {
        let first = fds.first_mut().context("no console socket was received")?;
        let pty = Pty::open(console_size(&stubbed.added.process))?;
        console::control(&pty.slave)?;
        let to = std::mem::replace(first, pty.slave.try_clone()?);
        pty.send_master(&to.into())?;
        terminal = Some(pty.slave);
    }
    let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    send(
        &sandbox,
        &container.asked(stubbed.added.request(false)),
        &fds,
    )?;
    receive_response(&mut wire)?;
    pass_on(signals, &sandbox, terminal)?;
    Ok(wire)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use crate::state::tests::stored;
    use clap::Parser;

    /// The process that a command line makes of a container's.
    fn process(own: Value, words: &[&str]) -> Value {
        let words = ["koya-runtime", "exec"].iter().chain(words);
        let Command::Exec(args) = Cli::try_parse_from(words).unwrap().command else {
            panic!("another command");
        };
        let mut stored = stored("c");
        stored.process = own;
        process_of(&args, &stored).unwrap()
    }

    #[test]
    fn what_is_added_needs_nothing_to_be_added_to() {
        let own = json!({"cwd": "/", "args": ["sh"], "user": {"uid": 0, "gid": 0}});
        let made = process(
            own,
            &["-e", "A=b", "-g", "7", "--cap", "CAP_KILL", "c", "x"],
        );
        assert_eq!(made["env"], json!(["A=b"]));
        assert_eq!(made["user"]["additionalGids"], json!([7]));
        assert_eq!(made["capabilities"]["bounding"], json!(["CAP_KILL"]));
        assert!(made["capabilities"]["ambient"].is_null());
    }

    #[test]
    fn groups_and_variables_are_added_to_the_containers() {
        let user = json!({"uid": 0, "gid": 0, "additionalGids": [1, 2]});
        let own = json!({"cwd": "/", "args": ["sh"], "user": user, "env": ["A=a"]});
        let words = ["-g", "3", "-g", "4", "-e", "B=b", "c", "x"];
        let made = process(own.clone(), &words);
        assert_eq!(made["user"]["additionalGids"], json!([1, 2, 3, 4]));
        assert_eq!(made["env"], json!(["A=a", "B=b"]));
        let same = process(own, &["c", "x"]);
        assert_eq!(same["user"]["additionalGids"], json!([1, 2]));
    }

    #[test]
    fn a_console_socket_is_for_a_terminal() {
        for is_detached in [true, false] {
            assert!(check_terminal(false, is_detached, true).is_err());
            assert!(check_terminal(false, is_detached, false).is_ok());
            assert!(check_terminal(true, is_detached, true).is_ok());
        }
        assert!(check_terminal(true, true, false).is_err());
        assert!(check_terminal(true, false, false).is_ok());
    }
}
