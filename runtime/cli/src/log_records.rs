//! The format of a container's log, which is that of Kubernetes' CRI: a line for each record, with its time, its stream,
//! whether it is complete (`F`) or only a part of a line (`P`), and its text:
//!
//! `2026-01-02T03:04:05.000000006Z stdout F hello`

use chrono::{DateTime, SecondsFormat};
use koya_tasks::parse_duration;
use std::io::{self, Write};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A stream of a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stream {
    Stdout,
    Stderr,
}

impl Stream {
    fn name(self) -> &'static str {
        match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
        }
    }
}

/// A point in time as records have it. All have the same length, so their order is that of their bytes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Moment(String);

impl Moment {
    /// The present time.
    pub(super) fn now() -> Self {
        Self::at(SystemTime::now())
    }

    fn at(time: SystemTime) -> Self {
        let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        Self::since_epoch(since.as_secs() as i64, since.subsec_nanos())
    }

    fn since_epoch(seconds: i64, nanoseconds: u32) -> Self {
        let time = DateTime::from_timestamp(seconds, nanoseconds).unwrap_or_default();
        Self(time.to_rfc3339_opts(SecondsFormat::Nanos, true))
    }

    /// A time in one of the forms of `docker logs --since`: RFC 3339, seconds since 1970, or an age.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        if let Ok(time) = DateTime::parse_from_rfc3339(text) {
            return Ok(Self::since_epoch(
                time.timestamp(),
                time.timestamp_subsec_nanos(),
            ));
        }
        let unix = text.parse::<f64>().ok();
        let unix = unix.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
        // The last second of the year 9999, after which a year has five digits.
        if let Some(unix) = unix.filter(|unix| unix.as_secs() <= 253_402_300_799) {
            return Ok(Self::at(UNIX_EPOCH + unix));
        }
        let age = parse_duration(text, &UNITS).and_then(|age| SystemTime::now().checked_sub(age));
        age.map(Self::at).ok_or_else(|| {
            format!(
                "{text:?} is not a time (2026-01-02T15:04:05Z), a number of seconds since 1970, or an age (1h30m)"
            )
        })
    }
}

/// Units of an age, in seconds.
const UNITS: [(&str, f64); 5] = [
    ("d", 86_400.0),
    ("h", 3600.0),
    ("m", 60.0),
    ("s", 1.0),
    ("ms", 0.001),
];

/// Appends the records of some output of a stream. A last line without its end becomes a partial record.
pub(super) fn append(records: &mut Vec<u8>, time: &Moment, stream: Stream, output: &[u8]) {
    for line in output.split_inclusive(|byte| *byte == b'\n') {
        let (text, whole) = match line.strip_suffix(b"\n") {
            Some(text) => (text, 'F'),
            None => (line, 'P'),
        };
        records.extend_from_slice(format!("{} {} {whole} ", time.0, stream.name()).as_bytes());
        records.extend_from_slice(text);
        records.push(b'\n');
    }
}

/// A record that has been read.
struct Record<'a> {
    time: &'a [u8],
    stream: Stream,
    whole: bool,
    text: &'a [u8],
}

/// A record of a log, without its line end.
fn parse(line: &[u8]) -> Option<Record<'_>> {
    let mut fields = line.splitn(4, |byte| *byte == b' ');
    let (time, stream, tag) = (fields.next()?, fields.next()?, fields.next()?);
    let stream = match stream {
        b"stdout" => Stream::Stdout,
        b"stderr" => Stream::Stderr,
        _ => return None,
    };
    let whole = match tag {
        b"F" => true,
        b"P" => false,
        _ => return None,
    };
    let text = fields.next()?;
    Some(Record {
        time,
        stream,
        whole,
        text,
    })
}

/// The part of a log that is printed, and how.
#[derive(Debug, Default)]
pub(super) struct Selection {
    /// No record before it.
    pub(super) since: Option<Moment>,
    /// No record after it.
    pub(super) until: Option<Moment>,
    /// Begin each line with its time.
    pub(super) timestamps: bool,
}

impl Selection {
    fn contains(&self, record: &Record<'_>) -> bool {
        let after = |limit: &Moment| record.time >= limit.0.as_bytes();
        let before = |limit: &Moment| record.time <= limit.0.as_bytes();
        self.since.as_ref().is_none_or(after) && self.until.as_ref().is_none_or(before)
    }
}

/// Prints a log that is written to it: the text of each record, to the writer for its stream.
pub(super) struct Printer<O, E> {
    selection: Selection,
    out: O,
    err: E,
    /// The beginning of a record whose end has not been read yet.
    rest: Vec<u8>,
    /// Whether the last record of each stream was partial.
    amid: [bool; 2],
}

impl<O: Write, E: Write> Printer<O, E> {
    pub(super) fn new(selection: Selection, out: O, err: E) -> Self {
        Self {
            selection,
            out,
            err,
            rest: Vec::new(),
            amid: [false; 2],
        }
    }

    fn print(&mut self, line: &[u8]) -> io::Result<()> {
        // The end of a record that a full disk cut off is output, too.
        let Some(record) = parse(line) else {
            return self.out.write_all(line);
        };
        if !self.selection.contains(&record) {
            return Ok(());
        }
        let amid = std::mem::replace(&mut self.amid[record.stream as usize], !record.whole);
        let mut text = Vec::with_capacity(record.time.len() + record.text.len() + 2);
        if self.selection.timestamps && !amid {
            text.extend_from_slice(record.time);
            text.push(b' ');
        }
        text.extend_from_slice(record.text);
        if record.whole {
            text.push(b'\n');
        }
        match record.stream {
            Stream::Stdout => self.out.write_all(&text),
            // As with other messages: a reader of standard error who has gone loses them, and nothing else.
            Stream::Stderr => {
                // Output before it should not appear after it on a terminal.
                self.out.flush()?;
                self.err.write_all(&text).ok();
                Ok(())
            }
        }
    }

    /// The last `lines` lines of a log: the index of the first byte of the first one of them.
    pub(super) fn tail(&self, log: &[u8], lines: usize) -> usize {
        let mut amid = [false; 2];
        let mut starts = Vec::new();
        let mut at = 0;
        for line in log.split_inclusive(|byte| *byte == b'\n') {
            let record = parse(line.strip_suffix(b"\n").unwrap_or(line));
            match record {
                Some(record) if self.selection.contains(&record) => {
                    if !std::mem::replace(&mut amid[record.stream as usize], !record.whole) {
                        starts.push(at);
                    }
                }
                Some(_) => {}
                None => starts.push(at),
            }
            at += line.len();
        }
        match starts.len().checked_sub(lines) {
            _ if lines == 0 => log.len(),
            Some(first) => starts[first],
            None => 0,
        }
    }
}

impl<O: Write, E: Write> Write for Printer<O, E> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for line in bytes.split_inclusive(|byte| *byte == b'\n') {
            self.rest.extend_from_slice(line);
            if self.rest.last() == Some(&b'\n') {
                let mut record = std::mem::take(&mut self.rest);
                record.pop();
                self.print(&record)?;
                record.clear();
                self.rest = record;
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moment(seconds: i64) -> Moment {
        Moment::since_epoch(seconds, 6)
    }

    fn log() -> Vec<u8> {
        let mut log = Vec::new();
        append(&mut log, &moment(0), Stream::Stdout, b"one\ntwo\n");
        append(&mut log, &moment(1), Stream::Stdout, b"name? ");
        append(&mut log, &moment(2), Stream::Stderr, b"\nwarning\n");
        append(&mut log, &moment(3), Stream::Stdout, b"F P stdout \xff\n");
        log
    }

    /// What is printed to each stream, by pieces of the log of this size.
    fn printed(selection: Selection, log: &[u8], size: usize) -> (String, String) {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let mut printer = Printer::new(selection, &mut out, &mut err);
        for piece in log.chunks(size) {
            printer.write_all(piece).unwrap();
        }
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (text(&out), text(&err))
    }

    #[test]
    fn records_are_those_of_the_cri() {
        let log = String::from_utf8_lossy(&log()).into_owned();
        let mut lines = log.lines();
        assert_eq!(
            lines.next(),
            Some("1970-01-01T00:00:00.000000006Z stdout F one")
        );
        assert_eq!(
            lines.nth(1),
            Some("1970-01-01T00:00:01.000000006Z stdout P name? ")
        );
    }

    #[test]
    fn each_stream_is_printed_as_it_was_written() {
        for size in [1, 7, 10_000] {
            let (out, err) = printed(Selection::default(), &log(), size);
            assert_eq!(out, "one\ntwo\nname? F P stdout \u{fffd}\n");
            assert_eq!(err, "\nwarning\n");
        }
        let (out, _) = printed(Selection::default(), b"no record\n", 100);
        assert_eq!(out, "no record");
    }

    #[test]
    fn a_selection_is_of_times() {
        let selection = |since: Option<i64>, until: Option<i64>| Selection {
            since: since.map(moment),
            until: until.map(moment),
            timestamps: false,
        };
        let log = log();
        let print = |since, until| printed(selection(since, until), &log, 10_000);
        assert_eq!(
            print(Some(3), None),
            ("F P stdout \u{fffd}\n".into(), "".into())
        );
        assert_eq!(print(None, Some(0)), ("one\ntwo\n".into(), "".into()));
        assert_eq!(
            print(Some(1), Some(2)),
            ("name? ".into(), "\nwarning\n".into())
        );
        let times = Selection {
            timestamps: true,
            ..Selection::default()
        };
        let (out, err) = printed(times, &log, 10_000);
        let time = |second| format!("1970-01-01T00:00:0{second}.000000006Z ");
        // The rest of a line that was written in two parts has no time of its own.
        let lines = format!("{0}one\n{0}two\n{1}name? F P", time(0), time(1));
        assert!(out.starts_with(&lines), "{out}");
        assert_eq!(err, format!("{0}\n{0}warning\n", time(2)));
    }

    #[test]
    fn the_last_lines_are_counted_in_both_streams() {
        let log = log();
        let tail = |lines, since: Option<i64>| {
            let selection = Selection {
                since: since.map(moment),
                ..Selection::default()
            };
            let printer = Printer::new(selection, io::sink(), io::sink());
            let tail = &log[printer.tail(&log, lines)..];
            printed(Selection::default(), tail, 10_000)
        };
        assert_eq!(tail(0, None), Default::default());
        assert_eq!(tail(1, None).1, "warning\n");
        assert_eq!(tail(3, None).0, "name? F P stdout \u{fffd}\n");
        assert_eq!(tail(4, None).0, "two\nname? F P stdout \u{fffd}\n");
        assert_eq!(tail(99, None).0, "one\ntwo\nname? F P stdout \u{fffd}\n");
        assert_eq!(tail(1, Some(3)).0, "F P stdout \u{fffd}\n");
    }

    #[test]
    fn times_have_the_forms_of_other_engines() {
        let parsed = |text| Moment::parse(text).unwrap().0;
        assert_eq!(
            parsed("1970-01-01T01:00:01+01:00"),
            "1970-01-01T00:00:01.000000000Z"
        );
        assert_eq!(parsed("1.5"), "1970-01-01T00:00:01.500000000Z");
        let age = |text| parse_duration(text, &UNITS);
        assert_eq!(age("1h30m"), Some(Duration::from_secs(5400)));
        assert_eq!(age("1.5s20ms"), Some(Duration::from_millis(1520)));
        assert!(Moment::parse("10m").unwrap() < Moment::now());
        for wrong in [
            "",
            "soon",
            "1x",
            "m",
            "1h3",
            "-1",
            "1e300",
            "99999999999999",
            "1e300h",
            "nan",
        ] {
            assert!(Moment::parse(wrong).is_err(), "{wrong}");
        }
    }
}
