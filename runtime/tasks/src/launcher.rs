//! The privileges of a process that holds a sandbox, and the thread that keeps those of the programs that it starts.
//!
//! Hooks and loggers have the privileges of their caller, as with other runtimes: they may expect all capabilities of root,
//! and be set-user-ID. A process that has given these up could not start them: it could not even open Docker's hook, which is
//! `/proc/PID/exe` of a daemon with more capabilities than its own. Capabilities and `no_new_privs` are per thread, so one
//! thread, which does nothing else, keeps them and passes them on.

use crate::sync::spawn;
use anyhow::{Context, Result, anyhow};
use koya::Settings;
use koya::vmm::host::privileges::{Program, limit_privileges};
use koya::vmm::host::sys::unshare_fs_state;
use nix::sched::{CloneFlags, setns};
use std::fs::{self, File};
use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, Sender, channel};

type Work = Box<dyn FnOnce() + Send>;

/// Requests to the thread, if this process has given up privileges.
static LAUNCHER: OnceLock<Sender<Work>> = OnceLock::new();

/// The mount namespace of the calling thread.
const OWN_MOUNTS: &str = "/proc/thread-self/ns/mnt";

/// Gives up the privileges of this process that no request needs, while it has one thread, in the namespaces of its sandbox.
/// If it `starts_programs`, hooks and loggers of its tasks are started by a thread that keeps their privileges. Without
/// confinement in the host's settings, nothing is given up.
///
/// # Errors
/// The error from the kernel.
pub fn give_up_privileges(starts_programs: bool) -> Result<()> {
    // Invalid settings are the reply to the request that needs them.
    if Settings::load().is_ok_and(|settings| !settings.seccomp) {
        return Ok(());
    }
    if starts_programs {
        let (sender, requests) = channel();
        spawn("koya-launcher", move || serve(requests))?;
        LAUNCHER.set(sender).ok();
    }
    limit_privileges(Program::Runtime).context("cannot give up privileges")
}

fn serve(requests: Receiver<Work>) {
    for work in requests {
        // Several may be in progress. Without a thread the work is dropped, and whoever waits for it is told.
        if let Err(error) = spawn("koya-launch", work) {
            log::warn!("a hook or logger is not started: {error:#}");
        }
    }
}

/// Runs `work`, which starts a program, with the privileges for that: on a new thread, in the mount namespace of this one.
/// In a process that has not given them up, it runs here.
///
/// # Errors
/// The error of the work, or if the host has no thread for it.
pub(crate) fn launch<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    match LAUNCHER.get() {
        Some(launcher) => launch_by(launcher, work),
        None => work(),
    }
}

fn launch_by<T: Send + 'static>(
    launcher: &Sender<Work>,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let (here, mounts) = (fs::read_link(OWN_MOUNTS)?, File::open(OWN_MOUNTS)?);
    let (sender, receiver) = channel();
    let work: Work = Box::new(move || {
        let entered = || -> Result<()> {
            if fs::read_link(OWN_MOUNTS)? != here {
                unshare_fs_state()?;
                setns(&mounts, CloneFlags::CLONE_NEWNS)?;
            }
            Ok(())
        };
        let entered = entered().context("cannot enter the mount namespace");
        sender.send(entered.and_then(|()| work())).ok();
    });
    let ended = || anyhow!("the host has no thread for it");
    launcher.send(work).map_err(|_| ended())?;
    receiver.recv().map_err(|_| ended())?
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    #[test]
    fn work_is_done_here_until_privileges_are_given_up() {
        let here = thread::current().id();
        assert_eq!(launch(|| Ok(thread::current().id())).unwrap(), here);
    }

    #[test]
    fn work_is_done_on_a_thread_of_its_own_and_its_error_told() {
        let here = thread::current().id();
        let (launcher, requests) = channel();
        let serving = thread::spawn(move || serve(requests));
        let there = launch_by(&launcher, || Ok(thread::current().id()));
        assert_ne!(there.unwrap(), here);
        let failed = launch_by(&launcher, || -> Result<()> { Err(anyhow!("no")) });
        assert_eq!(failed.unwrap_err().to_string(), "no");
        // Slow work does not hold up other work.
        let (end, ended) = channel::<()>();
        let (started, slow) = channel();
        let waiting = thread::scope(|scope| {
            let waiting = scope.spawn(|| {
                launch_by(&launcher, move || {
                    started.send(())?;
                    ended.recv().ok();
                    Ok(1)
                })
            });
            slow.recv().unwrap();
            assert_eq!(launch_by(&launcher, || Ok(2)).unwrap(), 2);
            drop(end);
            waiting.join().unwrap()
        });
        assert_eq!(waiting.unwrap(), 1);
        drop(launcher);
        serving.join().unwrap();
    }
}
