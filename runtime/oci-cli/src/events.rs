//! `events`: resource usage of a container, in runc's format.

use crate::Outcome;
use crate::cli::EventsArgs;
use crate::console::spawn;
use crate::ipc::{Request, Response, receive_response, send_request};
use crate::state::{Container, Root, Status};
use crate::values::duration;
use anyhow::{Result, bail};
use koya::ContainerStats;
use koya_tasks::wire::{Wire, send};
use serde::Serialize;
use serde_json::{Value, json};
use std::fs;
use std::io::Write;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

/// Time limit for reporting the last events after the end of the container.
const LAST_EVENT: Duration = Duration::from_secs(2);

pub(crate) fn events(root: &Root, args: &EventsArgs) -> Outcome {
    let interval = duration("--interval", &args.interval)?;
    let container = root.find(&args.id)?;
    if container.status() == Status::Stopped {
        bail!("container with id {} is not running", args.id);
    }
    if args.stats {
        print_stats(&container)?;
        return Ok(0);
    }
    let over = print_ooms(&container)?;
    loop {
        match print_stats(&container) {
            // The end of a container is the end of its events.
            Err(_) if container.status() == Status::Stopped => break,
            printed => printed?,
        }
        if over.recv_timeout(interval) == Err(RecvTimeoutError::Disconnected) {
            break;
        }
    }
    over.recv_timeout(LAST_EVENT).ok();
    Ok(0)
}

/// An event in runc's format.
#[derive(Serialize)]
struct Event<'a> {
    #[serde(rename = "type")]
    kind: &'a str,
    id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<Value>,
}

fn print(kind: &str, id: &str, data: Option<Value>) -> Result<()> {
    let line = serde_json::to_string(&Event { kind, id, data })?;
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}").and_then(|()| out.flush())?;
    Ok(())
}

fn print_stats(container: &Container) -> Result<()> {
    match send_request(container, Request::Stats)? {
        Response::Stats(mut data) => {
            let stored = &container.stored;
            // The group of a container that joined another one's machine has a process that does nothing.
            if let Some(group) = stored.cgroup.as_ref().filter(|_| stored.owner.is_none()) {
                let read = |file: &str| fs::read_to_string(group.join(file)).ok();
                add_pressure(&mut data, &read);
            }
            print("stats", &stored.id, Some(data))
        }
        _ => bail!("the container's process sent an unexpected reply"),
    }
}

/// Prints OOM events on a thread. The receiver is disconnected after the last one.
fn print_ooms(container: &Container) -> Result<Receiver<()>> {
    let stream = container.connect()?;
    send(&stream, &container.asked(Request::Ooms), &[])?;
    let (sender, over) = channel::<()>();
    let id = container.stored.id.clone();
    spawn("koya-ooms", move || {
        let mut wire = Wire::new(stream);
        while let Ok(Response::Oom) = receive_response(&mut wire) {
            if print("oom", &id, None).is_err() {
                break;
            }
        }
        drop(sender);
    })?;
    Ok(over)
}

/// Adds the pressure (Linux, accounting/psi) on the sandbox's control group on the host: guest kernels collect none.
fn add_pressure(data: &mut Value, read: &dyn Fn(&str) -> Option<String>) {
    for (part, file) in [("cpu", "cpu"), ("memory", "memory"), ("blkio", "io")] {
        if let Some(text) = read(&format!("{file}.pressure")) {
            data[part]["psi"] = pressure(&text);
        }
    }
}

/// `some avg10=0.00 avg60=0.00 avg300=0.00 total=0`, and the same for `full`.
fn pressure(text: &str) -> Value {
    let lines = text.lines().filter_map(|line| {
        let (kind, figures) = line.split_once(' ')?;
        let figures = figures.split_whitespace().filter_map(|figure| {
            let (name, value) = figure.split_once('=')?;
            let value = match name {
                "total" => json!(value.parse::<u64>().ok()?),
                _ => json!(value.parse::<f64>().ok()?),
            };
            Some((name.to_owned(), value))
        });
        Some((kind.to_owned(), Value::Object(figures.collect())))
    });
    Value::Object(lines.collect())
}

/// The statistics in the format of go-runc (`Stats`).
pub(crate) fn data(stats: &ContainerStats) -> Value {
    let nanoseconds = |microseconds: u64| microseconds.saturating_mul(1000);
    let cpu = &stats.cpu;
    let huge_pages = stats.huge_pages.iter().map(|(size, pages)| {
        let usage = json!({"usage": pages.usage, "max": 0, "failcnt": pages.failures});
        (size.clone(), usage)
    });
    json!({
        "hugetlb": Value::Object(huge_pages.collect()),
        "cpu": {
            "usage": {
                "total": nanoseconds(cpu.usage),
                "kernel": nanoseconds(cpu.system),
                "user": nanoseconds(cpu.user),
            },
            "throttling": {
                "periods": cpu.periods,
                "throttledPeriods": cpu.throttled_periods,
                "throttledTime": nanoseconds(cpu.throttled),
            },
        },
        "memory": {
            "usage": {"usage": stats.memory, "limit": stats.memory_limit, "max": 0, "failcnt": 0},
            "swap": {"usage": stats.swap, "limit": stats.swap_limit, "max": 0, "failcnt": 0},
            "raw": stats.memory_details,
        },
        "pids": {"current": stats.pids, "limit": pids_limit(stats.pids_limit)},
    })
}

/// Zero means no limit there.
fn pids_limit(limit: u64) -> u64 {
    match limit {
        u64::MAX => 0,
        limit => limit,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pressure_is_that_of_the_hosts_group() {
        let mut stats = data(&ContainerStats::default());
        let before = stats.clone();
        add_pressure(&mut stats, &|_: &str| None);
        assert_eq!(stats, before);
        let text = "some avg10=1.50 avg60=0.00 avg300=0.02 total=123\nfull avg10=0.00 total=9\n";
        add_pressure(&mut stats, &|file: &str| {
            (file != "memory.pressure").then(|| text.to_owned())
        });
        let some = json!({"avg10": 1.5, "avg60": 0.0, "avg300": 0.02, "total": 123});
        assert_eq!(stats["cpu"]["psi"]["some"], some);
        assert_eq!(stats["blkio"]["psi"]["full"]["total"], 9);
        assert!(stats["memory"]["psi"].is_null() && !stats["memory"]["usage"].is_null());
    }

    #[test]
    fn figures_have_runcs_units() {
        let mut stats = ContainerStats {
            pids: 3,
            pids_limit: u64::MAX,
            ..ContainerStats::default()
        };
        stats.cpu.usage = 5;
        let pages = koya::HugePageUse {
            usage: 7,
            failures: 1,
        };
        stats.huge_pages.insert("2MB".into(), pages);
        let data = data(&stats);
        assert_eq!(data["cpu"]["usage"]["total"], 5000);
        let pages = json!({"2MB": {"usage": 7, "max": 0, "failcnt": 1}});
        assert_eq!(data["hugetlb"], pages);
        assert_eq!(data["pids"], json!({"current": 3, "limit": 0}));
    }
}
