//! Output of this command itself, on standard output and standard error.
//!
//! If the reader closes standard output (`koya ps | head -1`), the command ends silently, with the status of a program ended
//! by SIGPIPE; any other write error, such as a full disk, is reported. Rust's own macros would panic.

use anyhow::Result;
use koya::vmm::guest_text;
use koya_tasks::BlockingStream;
use rustix::event::{PollFd, PollFlags, poll};
use std::fmt::{self, Arguments};
use std::io::{self, ErrorKind, Write};

/// Status of a command whose reader has closed the output: 128 plus SIGPIPE.
pub(super) const READER_GONE: u8 = 128 + libc::SIGPIPE as u8;

/// The reader of standard output has closed it.
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
        BlockingStream(io::stdout()).write(bytes).map_err(explain)
    }

    fn flush(&mut self) -> io::Result<()> {
        BlockingStream(io::stdout()).flush().map_err(explain)
    }
}

fn explain(error: io::Error) -> io::Error {
    match error.kind() {
        ErrorKind::Interrupted => error,
        ErrorKind::BrokenPipe => io::Error::other(ReaderGone),
        _ => io::Error::other(format!("cannot write to standard output: {error}")),
    }
}

/// Whether the error means that the reader of standard output has closed it.
pub(super) fn is_reader_gone(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        let cause = cause.downcast_ref::<io::Error>();
        cause
            .and_then(io::Error::get_ref)
            .is_some_and(|inner| inner.is::<ReaderGone>())
    })
}

/// Waits for a while between outputs.
///
/// # Errors
/// If the reader closes the output meanwhile.
pub(super) fn wait(milliseconds: i64) -> io::Result<()> {
    let limit = rustix::event::Timespec {
        tv_sec: milliseconds / 1000,
        tv_nsec: milliseconds % 1000 * 1_000_000,
    };
    let stdout = io::stdout();
    // No events are requested: errors are always reported.
    let mut fds = [PollFd::new(&stdout, PollFlags::empty())];
    match poll(&mut fds, Some(&limit)) {
        Ok(0) | Err(rustix::io::Errno::INTR) => Ok(()),
        Ok(_) if fds[0].revents().contains(PollFlags::ERR) => Err(io::Error::other(ReaderGone)),
        Ok(_) => {
            // A terminal that was hung up, for example: writes to it will fail.
            std::thread::sleep(std::time::Duration::from_millis(milliseconds as u64));
            Ok(())
        }
        Err(error) => Err(error.into()),
    }
}

/// Writes all of the text at once.
pub(super) fn print(text: Arguments<'_>) -> Result<()> {
    let mut out = Output;
    out.write_all(text.to_string().as_bytes())?;
    out.flush()?;
    Ok(())
}

/// As [`print`], to standard error. Errors can't be reported anywhere. The text may contain words of an image or a guest,
/// and goes to a terminal: without control characters.
pub(super) fn print_error(text: Arguments<'_>) {
    let line = format!("{}\n", guest_text::sanitize(text.to_string()));
    BlockingStream(io::stderr()).write_all(line.as_bytes()).ok();
}

/// Prints a line to standard output; an error if it can't be written.
macro_rules! say {
    ($($words:tt)*) => {
        $crate::output::print(format_args!("{}\n", format_args!($($words)*)))
    };
}

/// Prints a line to standard error.
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
        // A broken socket is not the reader of standard output.
        let socket = anyhow::Error::from(io::Error::from(ErrorKind::BrokenPipe));
        assert!(!is_reader_gone(&socket));
        let full = anyhow::Error::from(explain(ErrorKind::StorageFull.into()));
        assert!(!is_reader_gone(&full));
        assert!(full.to_string().contains("standard output"), "{full}");
    }
}
