//! Commands that only read stored state.

use super::container_log::LogReader;
use super::log_records::{Moment, Printer, Selection};
use super::output::{self, Output, complain, say};
use super::state::Directory;
use super::{FAILED, Outcome};
use anyhow::{Context, Result, bail};
use clap::Args;
use koya::vmm::guest_text;
use koya_tasks::BlockingStream;
use serde_json::json;
use std::io::{self, Write};
use std::time::{Duration, SystemTime};

/// Time limit for a sandbox to end after SIGKILL: its memory is being freed.
const KILL_LIMIT: Duration = Duration::from_secs(30);

/// Polling interval for a followed log and for an end, in milliseconds.
const LOG_LOOK_MS: i64 = 100;

#[derive(Args)]
pub(super) struct PsArgs {
    /// Show all containers, including those that have exited
    #[arg(long, short)]
    all: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Print only names
    #[arg(long, short, conflicts_with = "json")]
    quiet: bool,
}

#[derive(Args)]
pub(super) struct WaitArgs {
    /// The containers
    #[arg(required = true)]
    names: Vec<String>,
}

#[derive(Args)]
pub(super) struct LogsArgs {
    /// Follow the output until the container exits
    #[arg(long, short)]
    follow: bool,
    /// Begin with the last LINES lines (default: all)
    #[arg(long, short = 'n', value_name = "LINES", value_parser = parse_tail)]
    tail: Option<usize>,
    /// Omit what was written before TIME: 2026-01-02T15:04:05Z, seconds since 1970, or an age such as 1h30m
    #[arg(long, value_name = "TIME", value_parser = Moment::parse)]
    since: Option<Moment>,
    /// Omit what was written after TIME
    #[arg(long, value_name = "TIME", value_parser = Moment::parse)]
    until: Option<Moment>,
    /// Begin each line with the time at which it was written
    #[arg(long, short)]
    timestamps: bool,
    /// The container
    name: String,
}

#[derive(Args)]
pub(super) struct RmArgs {
    /// Kill running containers first
    #[arg(long, short)]
    force: bool,
    /// The containers
    #[arg(required = true)]
    names: Vec<String>,
}

pub(super) fn ps(args: &PsArgs) -> Outcome {
    let mut rows = Vec::new();
    for directory in Directory::all()? {
        let Ok(record) = directory.read() else {
            continue;
        };
        let running = directory.is_running();
        if !running && !args.all {
            continue;
        }
        let status = match (running, record.status) {
            (true, _) => "running".to_owned(),
            (false, Some(status)) => format!("exited ({status})"),
            (false, None) => "killed".to_owned(),
        };
        let age = SystemTime::now()
            .duration_since(record.created)
            .unwrap_or_default();
        // Before its end, a process that an attacker controls may have written anything there.
        let reason = (!running).then(|| directory.violation()).flatten();
        rows.push((record, status, age, reason));
    }
    if args.quiet {
        return rows
            .iter()
            .try_for_each(|(record, ..)| say!("{}", record.name))
            .map(|()| 0);
    }
    if args.json {
        let all: Vec<_> = rows
            .iter()
            .map(|(record, status, age, reason)| {
                json!({
                    "name": record.name, "pid": record.pid, "status": status, "reason": reason,
                    "age_seconds": age.as_secs(), "command": record.command,
                    "rootfs": record.rootfs, "confined": record.confined,
                })
            })
            .collect();
        say!("{}", serde_json::to_string_pretty(&all)?)?;
        return Ok(0);
    }
    say!(
        "{:<20} {:>8} {:<14} {:>10}  COMMAND",
        "NAME",
        "PID",
        "STATUS",
        "AGE"
    )?;
    for (record, mut status, age, _) in rows {
        if !record.confined {
            status += " (no seccomp)";
        }
        say!(
            "{:<20} {:>8} {:<14} {:>10}  {}",
            record.name,
            record.pid,
            status,
            format_age(age),
            format_command(&record.command)
        )?;
    }
    Ok(0)
}

/// A command in one line of a terminal; it may be an image's. Control characters are escaped, others that change what is
/// shown are left out.
fn format_command(words: &[String]) -> String {
    let escape = |c: char| match c.is_control() {
        true => c.escape_default().to_string(),
        false => c.to_string(),
    };
    let escaped: String = words.join(" ").chars().map(escape).collect();
    guest_text::sanitize_line(escaped)
}

fn format_age(age: Duration) -> String {
    let seconds = age.as_secs();
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min", seconds / 60),
        3600..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    }
}

pub(super) fn logs(args: &LogsArgs) -> Outcome {
    let directory = Directory::find(&args.name)?;
    if !directory.log().exists() {
        bail!(
            "container {} writes to its own terminal and has no log",
            args.name
        );
    }
    let mut log = LogReader::new(&directory.log());
    let selection = Selection {
        since: args.since.clone(),
        until: args.until.clone(),
        timestamps: args.timestamps,
    };
    let mut printer = Printer::new(selection, Output, BlockingStream(io::stderr()));
    if let Some(lines) = args.tail {
        // The size of a log is limited.
        let mut all = Vec::new();
        log.copy_new(&mut all)?;
        printer.write_all(&all[printer.tail(&all, lines)..])?;
    }
    loop {
        // Checked before the last read, so that nothing written before the end is missed.
        let over = args.until.as_ref().is_some_and(|end| *end < Moment::now());
        let running = directory.is_running();
        log.copy_new(&mut printer)?;
        printer.flush()?;
        if !args.follow || !running || over {
            return Ok(0);
        }
        output::wait(LOG_LOOK_MS)?;
    }
}

/// Waits for each container in turn, and prints its exit status.
pub(super) fn wait(args: &WaitArgs) -> Outcome {
    let mut worst = 0;
    for name in &args.names {
        match wait_for(name) {
            Ok(status) => say!("{status}")?,
            Err(error) => {
                complain!("koya: {error:#}");
                worst = FAILED;
            }
        }
    }
    Ok(worst)
}

/// The exit status of a container that is kept, once it has ended.
fn wait_for(name: &str) -> Result<i32> {
    let directory = Directory::find(name)?;
    while directory.is_running() {
        output::wait(LOG_LOOK_MS)?;
    }
    // It is removed at its end, or was killed before its program ran.
    directory.clear_away();
    let record = directory.read();
    let status = record.ok().and_then(|record| record.status);
    status.with_context(|| format!("container {name} ended without leaving its status"))
}

/// A number of lines, or `all`, as for other engines.
fn parse_tail(text: &str) -> Result<usize, String> {
    match text {
        "all" => Ok(usize::MAX),
        number => number
            .parse()
            .map_err(|_| format!("{text:?} is not a number of lines, or \"all\"")),
    }
}

pub(super) fn rm(args: &RmArgs) -> Outcome {
    let (mut worst, mut said) = (0, Ok(()));
    for name in &args.names {
        match rm_one(name, args.force) {
            Ok(true) => said = said.and(say!("{name}")),
            Ok(false) => {}
            Err(error) => {
                complain!("koya: {error:#}");
                worst = FAILED;
            }
        }
    }
    said?;
    Ok(worst)
}

/// Removes a container; returns whether it existed.
fn rm_one(name: &str, force: bool) -> Result<bool> {
    // As in Docker, it need not exist with --force.
    if force && Directory::look_for(name)?.is_none() {
        return Ok(false);
    }
    let directory = Directory::find(name)?;
    if directory.is_running() {
        if !force {
            bail!("container {name} is running; stop it, or use --force");
        }
        let killed = directory.kill(KILL_LIMIT);
        killed.with_context(|| format!("cannot end container {name}"))?;
    }
    directory.remove();
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_one_line_of_a_table() {
        let words = ["sh", "-c", "a\nb \u{1b}[2J ü\\n\u{9b}1\u{202e}"].map(str::to_owned);
        assert_eq!(format_command(&words), r"sh -c a\nb \u{1b}[2J ü\n\u{9b}1");
    }

    #[test]
    fn a_number_of_lines_may_be_all() {
        assert_eq!(parse_tail("all"), Ok(usize::MAX));
        assert_eq!(parse_tail("10"), Ok(10));
        assert!(parse_tail("-1").is_err() && parse_tail("").is_err());
    }
}
