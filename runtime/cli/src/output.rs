//! What this command says itself, on standard output and standard error.
//!
//! A reader that goes away (`koya ps | head -1`) ends the command quietly, with the status of a program that
//! SIGPIPE ended; any other failure to write, such as a full disk, is an error. Rust's own macros panic then.

use anyhow::Result;
use koya_tasks::Patient;
use rustix::event::{PollFd, PollFlags, poll};
use std::fmt::{self, Arguments};
use std::io::{self, ErrorKind, Write};

/// The status of a command whose reader has gone: 128 and SIGPIPE.
pub(super) const READER_GONE: u8 = 128 + libc::SIGPIPE as u8;

/// Nobody reads standard output any more.
#[derive(Debug)]
struct ReaderGone;

impl fmt::Display for ReaderGone {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("nobody reads standard output")
    }
}

impl std::error::Error for ReaderGone {}

/// Standard output.
pub(super) struct Output;

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Patient(io::stdout()).write(bytes).map_err(explain)
    }

    fn flush(&mut self) -> io::Result<()> {
        Patient(io::stdout()).flush().map_err(explain)
    }
}

fn explain(error: io::Error) -> io::Error {
    match error.kind() {
        ErrorKind::Interrupted => error,
        ErrorKind::BrokenPipe => io::Error::other(ReaderGone),
        _ => io::Error::other(format!("cannot write to standard output: {error}")),
    }
}

/// Whether an error is that the reader of standard output has gone.
pub(super) fn is_reader_gone(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        let cause = cause.downcast_ref::<io::Error>();
        cause
            .and_then(io::Error::get_ref)
            .is_some_and(|inner| inner.is::<ReaderGone>())
    })
}

/// Waits a moment for more to say.
///
/// # Errors
/// If the reader goes meanwhile.
pub(super) fn wait(milliseconds: i64) -> io::Result<()> {
    let limit = rustix::event::Timespec {
        tv_sec: milliseconds / 1000,
        tv_nsec: milliseconds % 1000 * 1_000_000,
    };
    let stdout = io::stdout();
    // Nothing is asked for: an error is told of in any case.
    let mut fds = [PollFd::new(&stdout, PollFlags::empty())];
    match poll(&mut fds, Some(&limit)) {
        Ok(0) | Err(rustix::io::Errno::INTR) => Ok(()),
        Ok(_) if fds[0].revents().contains(PollFlags::ERR) => Err(io::Error::other(ReaderGone)),
        Ok(_) => {
            // A terminal that was hung up, say: writes to it fail by themselves.
            std::thread::sleep(std::time::Duration::from_millis(milliseconds as u64));
            Ok(())
        }
        Err(error) => Err(error.into()),
    }
}

/// Writes it all at once, to the last byte.
pub(super) fn print(text: Arguments<'_>) -> Result<()> {
    let mut out = Output;
    out.write_all(text.to_string().as_bytes())?;
    out.flush()?;
    Ok(())
}

/// As [`print`], to standard error. Nobody is left who could be told that it failed.
pub(super) fn print_error(text: Arguments<'_>) {
    let line = format!("{text}\n");
    Patient(io::stderr()).write_all(line.as_bytes()).ok();
}

/// A line for standard output; an error if it can't be written.
macro_rules! say {
    ($($words:tt)*) => {
        $crate::output::print(format_args!("{}\n", format_args!($($words)*)))
    };
}

/// A line for standard error.
macro_rules! complain {
    ($($words:tt)*) => {
        $crate::output::print_error(format_args!($($words)*))
    };
}

pub(super) use {complain, say};

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    #[test]
    fn a_reader_that_goes_is_told_from_other_failures() {
        let gone = explain(ErrorKind::BrokenPipe.into());
        assert!(is_reader_gone(&anyhow::Error::from(gone)));
        let gone: Result<()> = Err(explain(ErrorKind::BrokenPipe.into())).context("list");
        assert!(is_reader_gone(&gone.unwrap_err()));
        // That of a socket is no reader of ours.
        let socket = anyhow::Error::from(io::Error::from(ErrorKind::BrokenPipe));
        assert!(!is_reader_gone(&socket));
        let full = anyhow::Error::from(explain(ErrorKind::StorageFull.into()));
        assert!(!is_reader_gone(&full));
        assert!(full.to_string().contains("standard output"), "{full}");
    }
}
