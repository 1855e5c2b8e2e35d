//! Commands that only read stored state.

use super::container_log::LogReader;
use super::output::{self, Output, complain, say};
use super::state::Directory;
use super::{FAILED, Outcome};
use anyhow::{Context, Result, bail};
use clap::Args;
use koya::vmm::guest_text;
use serde_json::json;
use std::io::Write;
use std::time::{Duration, SystemTime};

/// Time limit for a sandbox to end after SIGKILL: its memory is being freed.
const KILL_LIMIT: Duration = Duration::from_secs(30);

/// Polling interval for a followed log, in milliseconds.
const LOG_LOOK_MS: i64 = 100;

#[derive(Args)]
pub(super) struct PsArgs {
    /// Show all containers, including those that have exited
    #[arg(long, short)]
    all: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
pub(super) struct LogsArgs {
    /// Follow the output until the container exits
    #[arg(long, short)]
    follow: bool,
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
        rows.push((record, status, age));
    }
    if args.json {
        let all: Vec<_> = rows
            .iter()
            .map(|(record, status, age)| {
                json!({
                    "name": record.name, "pid": record.pid, "status": status,
                    "age_seconds": age.as_secs(), "command": record.command,
                    "rootfs": record.rootfs,
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
    for (record, status, age) in rows {
        say!(
            "{:<20} {:>8} {:<14} {:>10}  {}",
            record.name,
            record.pid,
            status,
            format_age(age),
            shown_command(&record.command)
        )?;
    }
    Ok(0)
}

/// The command as one line of a terminal: it may be an image's.
fn shown_command(words: &[String]) -> String {
    guest_text::line(words.join(" "))
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
    loop {
        // Checked before the last read, so that nothing written before the end is missed.
        let running = directory.is_running();
        log.copy_new(&mut Output)?;
        Output.flush()?;
        if !args.follow || !running {
            return Ok(0);
        }
        output::wait(LOG_LOOK_MS)?;
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
    fn the_command_of_an_image_is_one_line_without_control_characters() {
        let words = ["sh", "-c", "\x1b]0;title\x07echo\n\u{9b}2Ja\u{202e}b"].map(String::from);
        assert_eq!(shown_command(&words), "sh -c echo ab");
    }
}
