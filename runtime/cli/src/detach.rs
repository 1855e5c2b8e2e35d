//! `koya run --detach`: the command starts itself again, in the background, and waits until the container runs.

use super::attach::UserStreams;
use super::container_log::{Lines, LogWriter};
use super::log_records::Stream;
use super::output::{complain, say};
use super::state::Owned;
use super::{FAILED, Outcome};
use anyhow::{Context, Result};
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::process::Command;

/// Environment variable of the process of a detached container.
const DETACHED: &str = "KOYA_DETACHED";

/// Whether this process is the one in the background.
pub(super) fn is_background_process() -> bool {
    if std::env::var_os(DETACHED).is_none() {
        return false;
    }
    // A new session, so that hanging up the terminal does not end the container. It fails for a group leader, which
    // happens only if the variable was set by hand.
    if let Err(error) = rustix::process::setsid() {
        log::debug!("no session of its own: {error}");
    }
    true
}

/// Starts this command again in the background and waits until it is ready.
pub(super) fn start_again() -> Outcome {
    let (read, write) = std::io::pipe()?;
    let mut child = Command::new(std::env::current_exe()?)
        .args(std::env::args_os().skip(1))
        .env(DETACHED, "1")
        .stdin(std::process::Stdio::null())
        .stdout(write.try_clone()?)
        .stderr(write)
        .spawn()
        .context("cannot start this command again")?;
    let mut said = Vec::new();
    for line in BufReader::new(read).lines() {
        let line = line?;
        if let Some(name) = line.strip_prefix("running ") {
            // Warnings.
            said.iter().for_each(|line| complain!("{line}"));
            say!("{name}")?;
            return Ok(0);
        }
        said.push(line);
    }
    complain!("{}", said.join("\n"));
    let status = child.wait()?;
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(code.filter(|code| *code != 0).unwrap_or(FAILED))
}

/// Notifies the waiting command, and closes its streams and leaves its working directory: all paths that are still used are
/// absolute.
pub(super) fn announce(name: &str) -> Result<()> {
    let mut out = std::io::stdout();
    writeln!(out, "running {name}")?;
    out.flush()?;
    let null = File::options().read(true).write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdout(&null)?;
    rustix::stdio::dup2_stderr(&null)?;
    std::env::set_current_dir("/")?;
    Ok(())
}

/// The streams of a detached container: its log.
pub(super) fn streams(owned: &Owned) -> Result<UserStreams> {
    let log = LogWriter::create(&owned.directory.log())?;
    Ok(UserStreams {
        stdin: None,
        stdout: Box::new(Lines::new(log.clone(), Stream::Stdout)),
        stderr: Box::new(Lines::new(log, Stream::Stderr)),
    })
}
