//! Log of a detached container: its standard output and error, with a size limit.
//!
//! When `log` is full, it replaces `log.old`. Records are written whole, and those that are written at once go to one file.

use super::log_records::{Moment, Stream, append};
use koya::vmm::host::sync::lock;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

/// Maximum size of each of the two files in bytes.
const MAX_FILE: u64 = 16 << 20;

struct State {
    path: PathBuf,
    file: File,
    size: u64,
    limit: u64,
}

/// Writes the log. Clones write to the same log. A full disk loses lines, but does not disturb the
/// container.
#[derive(Clone)]
pub(super) struct LogWriter(Arc<Mutex<State>>);

fn old(path: &Path) -> PathBuf {
    path.with_extension("old")
}

fn open(path: &Path) -> io::Result<File> {
    File::options().create(true).append(true).open(path)
}

impl LogWriter {
    /// A log at `path`.
    pub(super) fn create(path: &Path) -> io::Result<Self> {
        Self::with_limit(path, MAX_FILE)
    }

    fn with_limit(path: &Path, limit: u64) -> io::Result<Self> {
        let file = open(path)?;
        let size = file.metadata()?.len();
        Ok(Self(Arc::new(Mutex::new(State {
            path: path.to_owned(),
            file,
            size,
            limit,
        }))))
    }
}

impl Write for LogWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut state = lock(&self.0);
        if state.size > 0 && state.size + bytes.len() as u64 > state.limit {
            let moved = std::fs::rename(&state.path, old(&state.path));
            if let Ok(file) = moved.and_then(|()| open(&state.path)) {
                state.file = file;
                state.size = 0;
            }
        }
        if state.size + bytes.len() as u64 <= state.limit {
            match state.file.write_all(bytes) {
                Ok(()) => state.size += bytes.len() as u64,
                // A full disk may have taken a part.
                Err(_) => state.size = state.file.metadata().map_or(state.size, |data| data.len()),
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Maximum length of a line that is buffered until its end, in bytes, as in the logs of other engines.
const MAX_LINE: usize = 16 << 10;

/// A stream of a container that is written to the log, such that lines of several streams are not mixed.
pub(super) struct Lines {
    log: LogWriter,
    stream: Stream,
    /// An incomplete line.
    rest: Vec<u8>,
}

impl Lines {
    pub(super) fn new(log: LogWriter, stream: Stream) -> Self {
        let rest = Vec::new();
        Self { log, stream, rest }
    }

    fn log_rest(&mut self) {
        if !self.rest.is_empty() {
            let mut records = Vec::with_capacity(self.rest.len() + 64);
            append(&mut records, &Moment::now(), self.stream, &self.rest);
            self.log.write_all(&records).ok();
            self.rest.clear();
        }
    }
}

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let whole = bytes.iter().rposition(|byte| *byte == b'\n');
        let (whole, rest) = bytes.split_at(whole.map_or(0, |end| end + 1));
        if !whole.is_empty() {
            // In one write: between two, the other stream could be written.
            self.rest.extend_from_slice(whole);
            self.log_rest();
        }
        self.rest.extend_from_slice(rest);
        if self.rest.len() > MAX_LINE {
            self.log_rest();
        }
        Ok(bytes.len())
    }

    /// Logs an incomplete line, too: called when the stream pauses.
    fn flush(&mut self) -> io::Result<()> {
        self.log_rest();
        Ok(())
    }
}

impl Drop for Lines {
    fn drop(&mut self) {
        self.log_rest();
    }
}

/// Reads a log from its beginning, also while it grows and changes files.
pub(super) struct LogReader {
    path: PathBuf,
    current: Option<File>,
}

impl LogReader {
    /// A reader for the log at `path`, which need not exist yet.
    pub(super) fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            current: None,
        }
    }

    /// Copies everything written since the last call.
    pub(super) fn copy_new(&mut self, to: &mut impl Write) -> io::Result<()> {
        if self.current.is_none() {
            self.current = File::open(old(&self.path)).ok();
        }
        // Opened before the previous file is read: once it has been replaced, nothing more is written to the latter.
        let newest = match File::open(&self.path) {
            Ok(file) => Some(file),
            Err(e) if e.kind() == io::ErrorKind::NotFound => None,
            Err(e) => return Err(e),
        };
        if let Some(current) = &mut self.current {
            io::copy(current, to)?;
        }
        let identity = |file: &File| file.metadata().map(|m| (m.dev(), m.ino())).ok();
        if let Some(mut newest) = newest
            && self.current.as_ref().and_then(identity) != identity(&newest)
        {
            io::copy(&mut newest, to)?;
            self.current = Some(newest);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_two_streams_stay_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let log = LogWriter::create(&path).unwrap();
        let mut out = Lines::new(log.clone(), Stream::Stdout);
        let mut err = Lines::new(log, Stream::Stderr);
        // Without their times.
        let read = || {
            let log = std::fs::read_to_string(&path).unwrap();
            let records = log.lines().map(|record| record.split_once(' ').unwrap().1);
            records.map(str::to_owned).collect::<Vec<_>>()
        };
        out.write_all(b"one\ntw").unwrap();
        err.write_all(b"error").unwrap();
        out.write_all(b"o\nthree").unwrap();
        err.write_all(b"s\n").unwrap();
        assert_eq!(read(), ["stdout F one", "stdout F two", "stderr F errors"]);
        // Output without line breaks is read, too, as is a prompt while its process waits for input.
        err.write_all(&[b'.'; MAX_LINE + 1]).unwrap();
        out.flush().unwrap();
        assert_eq!(read()[3].len(), "stderr P ".len() + MAX_LINE + 1);
        assert_eq!(read()[4], "stdout P three");
        out.write_all(b", four").unwrap();
        drop(out);
        assert_eq!(read()[5], "stdout P , four");
    }

    /// A file on a full disk grows, too, by a part of a record.
    #[test]
    fn what_a_full_disk_has_taken_counts() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut writer = LogWriter::with_limit(&path, 100).unwrap();
        writer.write_all(&[b'x'; 60]).unwrap();
        {
            let mut state = writer.0.lock().unwrap();
            // Cannot be written to; it has grown meanwhile.
            std::fs::write(&path, [b'x'; 90]).unwrap();
            state.file = File::open(&path).unwrap();
        }
        writer.write_all(b"lost").unwrap();
        assert_eq!(writer.0.lock().unwrap().size, 90);
        // So the next record begins a new file.
        writer.write_all(&[b'y'; 20]).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), [b'y'; 20]);
        assert_eq!(old(&path).metadata().unwrap().len(), 90);
    }

    #[test]
    fn a_log_is_bounded_and_followed_across_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut writer = LogWriter::with_limit(&path, 100).unwrap();
        let mut reader = LogReader::new(&path);
        let (mut read, mut all) = (Vec::new(), Vec::new());
        for n in 0..50 {
            let line = format!("line {n:03}\n");
            writer.write_all(line.as_bytes()).unwrap();
            all.extend(line.into_bytes());
            if n % 7 == 0 {
                reader.copy_new(&mut read).unwrap();
            }
        }
        reader.copy_new(&mut read).unwrap();
        assert_eq!(
            String::from_utf8_lossy(&read),
            String::from_utf8_lossy(&all)
        );
        let sizes = [path.clone(), old(&path)].map(|p| p.metadata().unwrap().len());
        assert!(sizes.iter().all(|size| *size <= 100), "{sizes:?}");
        // A late reader gets the newest part, from the beginning of a line.
        let mut late = Vec::new();
        LogReader::new(&path).copy_new(&mut late).unwrap();
        assert!(late.len() > 100 && all.ends_with(&late));
    }
}
