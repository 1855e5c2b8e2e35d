//! `start`, `kill`, `delete`, `pause`, `resume`.

use crate::cli::{DeleteArgs, KillArgs};
use crate::console::{copy_size, spawn};
use crate::ipc::{Request, send_request};
use crate::notify::Forwarder;
use crate::state::{self, Container, Root, Status, Stored};
use crate::{Outcome, create, signal};
use anyhow::{Context, Result, bail};
use koya::oci_spec::runtime::ContainerState;
use koya_tasks::cgroup;
use koya_tasks::hooks::{self, Kind};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open, pidfd_send_signal};
use signal_hook::consts::SIGWINCH;
use signal_hook::iterator::Signals;
use std::fs;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

/// Time limit for a sandbox to end by itself once its container was killed: the guest flushes its disks meanwhile.
const GONE_LIMIT: Duration = Duration::from_secs(30);
/// Time for which a deletion waits for a container to stop, which takes longer than with a process of the host: callers
/// that have just killed it expect it to be gone.
const STOP_LIMIT: Duration = Duration::from_secs(1);
/// Interval between checks whether it has.
const LOOK: Duration = Duration::from_millis(20);
/// Time limit for the kernel to notice that a control group is empty.
const GROUP_LIMIT: Duration = Duration::from_secs(2);

pub(crate) fn start(root: &Root, id: &str) -> Outcome {
    if let Some(mut messages) = start_and_follow(root, id, false)? {
        messages.until_ready();
    }
    Ok(0)
}

/// Starts a container. Returns its messages to the service manager that has started this command, if there is one;
/// `is_main` says whether this command remains the main process of the service.
pub(crate) fn start_and_follow(root: &Root, id: &str, is_main: bool) -> Result<Option<Forwarder>> {
    // Others may use the container while it is not ready.
    let (container, _lock) = root.lock(id)?;
    let messages = Forwarder::connect(&container, is_main)?;
    create::start_created(&container)?;
    Ok(messages)
}

pub(crate) fn kill(root: &Root, args: &KillArgs) -> Outcome {
    let container = root.find(&args.id)?;
    let signal = signal::parse(&args.signal)?;
    if container.status() == Status::Stopped {
        // Callers that kill all processes of a container expect that none is left.
        if args.all {
            return Ok(0);
        }
        bail!("container not running");
    }
    if signal == 0 {
        return Ok(0);
    }
    let request = Request::Kill {
        signal,
        all: args.all,
    };
    match send_request(&container, request) {
        Err(error) if !args.all && container.status() == Status::Stopped => {
            log::debug!("{error:#}");
            bail!("container not running")
        }
        Err(_) if container.status() == Status::Stopped => Ok(0),
        asked => asked.map(|_| 0),
    }
}

pub(crate) fn pause(root: &Root, id: &str) -> Outcome {
    let (container, _lock) = root.lock(id)?;
    match container.status() {
        Status::Running => send_request(&container, Request::Pause).map(|_| 0),
        status => bail!("container not running: it is {status}"),
    }
}

pub(crate) fn resume(root: &Root, id: &str) -> Outcome {
    let (container, _lock) = root.lock(id)?;
    match container.status() {
        Status::Paused => send_request(&container, Request::Resume).map(|_| 0),
        _ => bail!("container not paused"),
    }
}

pub(crate) fn delete(root: &Root, args: &DeleteArgs) -> Outcome {
    if args.force {
        delete_by_force(root, &args.id)?;
        return Ok(0);
    }
    let (container, _lock) = match root.lock(&args.id) {
        Err(error) => {
            if let Err(left) = remove_leftovers(root, &args.id) {
                log::debug!("{left:#}");
            }
            return Err(error);
        }
        Ok(locked) => locked,
    };
    match settled(|| container.status(), STOP_LIMIT) {
        Status::Stopped | Status::Created => remove(&container)?,
        status => bail!(
            "cannot delete container {} that is not stopped: {status}",
            args.id
        ),
    }
    Ok(0)
}

/// The status of a container, once it does not run any more, or after this time.
fn settled(status: impl Fn() -> Status, limit: Duration) -> Status {
    let started = Instant::now();
    loop {
        match status() {
            Status::Running if started.elapsed() < limit => std::thread::sleep(LOOK),
            status => return status,
        }
    }
}

/// Deletes a container in any state. A missing one is not an error.
pub(crate) fn delete_by_force(root: &Root, id: &str) -> Result<()> {
    state::check_id(id)?;
    match root.lock(id) {
        Ok((container, _lock)) => remove(&container),
        Err(_) => remove_leftovers(root, id),
    }
}

/// Removes what an interrupted command left of a container: a directory without a state.
fn remove_leftovers(root: &Root, id: &str) -> Result<()> {
    state::check_id(id)?;
    if !root.path.join(id).exists() {
        return Ok(());
    }
    let (directory, _lock) = root.make(id)?;
    Ok(fs::remove_dir_all(directory)?)
}

/// Ends the remaining processes, and removes the stored state.
pub(crate) fn remove(container: &Container) -> Result<()> {
    end(container)?;
    if let Some(reason) = koya::confinement::violation(&container.directory) {
        log::warn!("the sandbox ended by a violation: {reason}");
    }
    if let Some(group) = &container.stored.cgroup {
        let started = Instant::now();
        while group.exists() && started.elapsed() < GROUP_LIMIT {
            cgroup::remove(group);
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    fs::remove_dir_all(&container.directory)
        .with_context(|| format!("cannot remove {}", container.directory.display()))?;
    run_poststop_hooks(&container.stored);
    Ok(())
}

/// Runs the poststop hooks of a container that is gone. A failure is only a warning.
pub(crate) fn run_poststop_hooks(stored: &Stored) {
    let ran = state::hook_state(stored, ContainerState::Stopped).and_then(|state| {
        let hooks = Kind::Poststop.of(&stored.hooks);
        Ok(hooks::run_poststop(hooks, &state, stored.place())?)
    });
    if let Err(error) = ran {
        log::warn!("{error:#}");
    }
}

/// Ends its process: by ending the container if possible, otherwise by SIGKILL.
fn end(container: &Container) -> Result<()> {
    let pid = Pid::from_raw(container.stored.pid).context("no pid is stored")?;
    let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else {
        return Ok(());
    };
    // Checked after the pidfd was opened: the PID is not reused while that is open.
    if !container.is_alive() {
        return Ok(());
    }
    let request = Request::Kill {
        signal: 9,
        all: true,
    };
    let limit = match send_request(container, request) {
        Err(error) if container.status() != Status::Stopped => {
            log::debug!("{error:#}");
            Duration::ZERO
        }
        _ => GONE_LIMIT,
    };
    if !has_ended(&process, limit) {
        log::warn!("the process of {} is killed", container.stored.id);
        pidfd_send_signal(&process, Signal::KILL).ok();
        if !has_ended(&process, GONE_LIMIT) {
            bail!("process {pid:?} does not end");
        }
    }
    Ok(())
}

/// Waits for the process of a container that has stopped.
pub(crate) fn wait_for_end(container: &Container) {
    let Some(pid) = Pid::from_raw(container.stored.pid) else {
        return;
    };
    if let Ok(process) = pidfd_open(pid, PidfdFlags::empty())
        && container.status() == Status::Stopped
        && container.is_alive()
        && !has_ended(&process, GONE_LIMIT)
    {
        log::warn!(
            "the process of {} does not end after its start failed",
            container.stored.id
        );
    }
}

fn has_ended(process: &OwnedFd, limit: Duration) -> bool {
    let limit = Timespec {
        tv_sec: limit.as_secs() as i64,
        tv_nsec: limit.subsec_nanos().into(),
    };
    let mut polled = [PollFd::new(process, PollFlags::IN)];
    poll(&mut polled, Some(&limit)).is_ok_and(|count| count > 0)
}

/// Signals to a foreground command, to be forwarded to the container.
pub(crate) struct Forwarded(Signals);

impl Forwarded {
    pub(crate) fn catch() -> Result<Self> {
        Ok(Self(Signals::new(signal::PASSED)?))
    }

    /// Forwards signals to the container's process, and new sizes of the user's terminal to its terminal.
    pub(crate) fn to(mut self, pid: u32, master: Option<OwnedFd>) -> Result<()> {
        spawn("koya-signals", move || {
            for signal in self.0.forever() {
                match (signal, &master) {
                    (SIGWINCH, Some(master)) => copy_size(master),
                    (SIGWINCH, None) => {}
                    (signal, _) => {
                        let pid = Pid::from_raw(pid as i32);
                        if let (Some(pid), Some(signal)) = (pid, Signal::from_named_raw(signal)) {
                            kill_process(pid, signal).ok();
                        }
                    }
                }
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leftovers_are_removed_although_there_is_no_container() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::at(dir.path().join("root"));
        let delete = |id: &str| {
            let args = DeleteArgs {
                force: false,
                id: id.into(),
            };
            delete(&root, &args).unwrap_err().to_string()
        };
        assert_eq!(delete("c"), "container does not exist: c");
        assert!(!root.path.exists(), "nothing is made");
        let (directory, lock) = root.make("c").unwrap();
        fs::write(directory.join("pid"), "").unwrap();
        drop(lock);
        assert_eq!(delete("c"), "container does not exist: c");
        assert!(!directory.exists());
        assert!(delete("..").contains("invalid container ID"));
    }

    #[test]
    fn a_deletion_waits_for_a_container_that_is_stopping() {
        use std::cell::Cell;
        let asked = Cell::new(0);
        let of = |then: Status, limit: u64| {
            asked.set(0);
            let status = || match asked.replace(asked.get() + 1) {
                0..2 => Status::Running,
                _ => then,
            };
            settled(status, Duration::from_millis(limit))
        };
        assert_eq!(of(Status::Stopped, 10_000), Status::Stopped);
        assert_eq!(of(Status::Stopped, 0), Status::Running);
        assert_eq!(asked.get(), 1);
        assert_eq!(of(Status::Paused, 10_000), Status::Paused);
    }

    #[test]
    fn hooks_run_after_the_bundle_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let ran = dir.path().join("ran");
        let script = format!("pwd > {}", ran.display());
        let hook = serde_json::json!({"path": "/bin/sh", "args": ["sh", "-c", script]});
        let mut stored = state::tests::stored("c");
        stored.bundle = dir.path().join("none");
        stored.hooks = serde_json::from_value(serde_json::json!({"poststop": [hook]})).unwrap();
        run_poststop_hooks(&stored);
        assert_eq!(fs::read_to_string(ran).unwrap(), "/\n");
    }
}
