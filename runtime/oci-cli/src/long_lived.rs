//! The start of a long-lived process, which represents a container or a process in it until that has ended.

use anyhow::{Context, Result};
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

/// Separates this process from the command that created it, and returns the connection to that command: its standard input.
///
/// # Errors
/// If it was not created by such a command.
pub(crate) fn detach() -> Result<UnixStream> {
    // Shown by ps(1): the process was started through `/proc/self/exe`.
    rustix::thread::set_name(c"koya-runtime").ok();
    let stream = std::io::stdin().as_fd().try_clone_to_owned()?;
    let null = File::options().read(true).write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::process::setsid().context("internal command, run only by koya-runtime itself")?;
    Ok(stream.into())
}
