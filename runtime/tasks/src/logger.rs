//! Loggers: programs that receive the output of a process.

use crate::launcher::launch;
use crate::sync::spawn;
use anyhow::{Context, Result, bail};
use command_fds::{CommandFdExt as _, FdMapping};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use rustix::time::Timespec;
use std::fs::File;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

/// Time limit for a logger to become ready, and to end.
const READY_LIMIT: Duration = Duration::from_secs(10);
const END_LIMIT: Duration = Duration::from_secs(12);

/// A running logger. It is ended with the process that it logs.
pub(crate) struct Logger(Option<Child>);

impl Drop for Logger {
    fn drop(&mut self) {
        if let Some(child) = self.0.take() {
            spawn("koya-logger", move || end(child, END_LIMIT)).ok();
        }
    }
}

/// `binary:///program?key=value`: a program that receives both outputs as descriptors 3 and 4, and closes or writes to 5
/// when it is ready.
pub(crate) fn start(program: &str, name: &str, namespace: &str) -> Result<(File, File, Logger)> {
    let [program, name, namespace] = [program, name, namespace].map(str::to_owned);
    launch(move || start_here(&program, &name, &namespace))
}

fn start_here(program: &str, name: &str, namespace: &str) -> Result<(File, File, Logger)> {
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
    // The child has its own copies of the descriptors; ours would keep the pipes open.
    drop(command);
    let mut polled = [PollFd::new(&ready_reader, PollFlags::IN)];
    let limit = Timespec {
        tv_sec: READY_LIMIT.as_secs() as i64,
        tv_nsec: 0,
    };
    let ready = loop {
        match poll(&mut polled, Some(&limit)) {
            // Interrupted by a signal: the shim is ending.
            Err(Errno::INTR) => {}
            ready => break ready?,
        }
    };
    if ready == 0 {
        bail!("the logger {path} was not ready after {READY_LIMIT:?}");
    }
    Ok((out_writer.into(), err_writer.into(), logger))
}

/// Ends a logger by SIGTERM, and by SIGKILL after `limit`.
fn end(mut logger: Child, limit: Duration) {
    let pid = Pid::from_child(&logger);
    kill_process(pid, Signal::TERM).ok();
    if !has_ended_within(pid, limit) {
        logger.kill().ok();
    }
    logger.wait().ok();
}

/// Waits for the end of a child that has not been waited for yet; false if it is alive after `limit`, or if the host can't
/// tell.
pub(crate) fn has_ended_within(pid: Pid, limit: Duration) -> bool {
    let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else {
        return false;
    };
    let started = Instant::now();
    loop {
        let left = limit.saturating_sub(started.elapsed());
        let left = Timespec {
            tv_sec: left.as_secs() as i64,
            tv_nsec: left.subsec_nanos().into(),
        };
        let mut polled = [PollFd::new(&process, PollFlags::IN)];
        match poll(&mut polled, Some(&left)) {
            Err(Errno::INTR) => {}
            ready => return ready.is_ok_and(|count| count > 0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::io::Write as _;
    use std::os::unix::process::ExitStatusExt as _;

    #[test]
    fn a_logger_gets_its_descriptors_and_names() {
        let dir = tempfile::tempdir().unwrap();
        let (script, log) = (dir.path().join("logger"), dir.path().join("log"));
        let text = "#!/bin/sh\nexec 5>&-\n{ echo $CONTAINER_NAMESPACE/$CONTAINER_ID $1 $2; cat <&3; } > $2\n";
        fs::write(&script, text).unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(&script, mode).unwrap();
        let program = format!("{}?to={}", script.display(), log.display());
        let (mut out, err, mut logger) = start(&program, "c1", "k8s.io").unwrap();
        out.write_all(b"hello\n").unwrap();
        drop((out, err));
        logger.0.take().unwrap().wait().unwrap();
        let text = fs::read_to_string(&log).unwrap();
        assert_eq!(text, format!("k8s.io/c1 to {}\nhello\n", log.display()));
    }

    #[test]
    fn a_logger_that_does_not_end_is_killed() {
        let stubborn = Command::new("sh")
            .args(["-c", "trap '' TERM; echo; read line"])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn();
        let mut stubborn = stubborn.unwrap();
        let pid = Pid::from_child(&stubborn);
        let mut line = [0];
        let out = stubborn.stdout.as_mut().unwrap();
        std::io::Read::read_exact(out, &mut line).unwrap();
        kill_process(pid, Signal::TERM).unwrap();
        assert!(!has_ended_within(pid, Duration::from_millis(50)));
        stubborn.kill().unwrap();
        assert!(has_ended_within(pid, Duration::from_secs(20)));
        assert_eq!(stubborn.wait().unwrap().signal(), Some(9));

        let obedient = Command::new("sleep").arg("1000").spawn().unwrap();
        let started = Instant::now();
        end(obedient, Duration::from_secs(60));
        assert!(started.elapsed() < Duration::from_secs(30));
    }
}
