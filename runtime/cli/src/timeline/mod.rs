//! `koya timeline`: the timeline of a start.

mod svg;
mod text;

use super::Outcome;
use super::attach::output_columns;
use super::output::{Output, say};
use anyhow::{Context, Result, bail};
use chrono::DateTime;
use clap::Args;
use koya::Timeline;
use koya::timeline::{Lane, Step, TimelineEvent};
use std::io::Write;
use std::path::PathBuf;

/// Longest idle time within one diagram, in microseconds: later containers of a pod get a separate diagram.
const IDLE_US: u64 = 30_000_000;
/// Number of columns if the width of the terminal is unknown.
const COLUMNS: usize = 80;

#[derive(Args)]
#[command(
    after_help = "The newest 64 starts are kept, by `koya run` and under containerd, also those that \
                  failed: as root in /run/koya/timelines, else in XDG_RUNTIME_DIR or with the user's \
                  data. Times are milliseconds of the host's clock."
)]
pub(super) struct TimelineArgs {
    /// The container or sandbox, or a prefix of its name (default: the latest start)
    id: Option<String>,
    /// Write a diagram: an SVG file, or - for standard output
    #[arg(long, value_name = "FILE", conflicts_with = "json")]
    svg: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// List the recorded starts, latest first
    #[arg(long, conflicts_with_all = ["id", "svg"])]
    list: bool,
}

pub(super) fn main(args: &TimelineArgs) -> Outcome {
    let directory =
        koya::timeline::directory().context("neither XDG_RUNTIME_DIR nor HOME is set")?;
    let cannot = || format!("cannot read {}", directory.display());
    let all = koya::timeline::all().with_context(cannot)?;
    let mut out = Output;
    if args.list {
        match args.json {
            true => say!("{}", serde_json::to_string_pretty(&all)?)?,
            false => out.write_all(text::list(&all).as_bytes())?,
        }
        out.flush()?;
        return Ok(0);
    }
    let timeline = match &args.id {
        Some(id) => find(&all, id)?,
        None => all.first().context("no start is known yet")?,
    };
    let drawn = part(timeline, args.id.as_deref());
    match &args.svg {
        Some(path) if path.as_os_str() == "-" => out.write_all(svg::draw(&drawn).as_bytes())?,
        Some(path) => std::fs::write(path, svg::draw(&drawn))
            .with_context(|| format!("cannot write {}", path.display()))?,
        None if args.json => say!("{}", serde_json::to_string_pretty(timeline)?)?,
        None => {
            let columns = output_columns().unwrap_or(COLUMNS);
            out.write_all(text::draw(&drawn, columns).as_bytes())?;
        }
    }
    out.flush()?;
    Ok(0)
}

/// The start of this sandbox or container; the newest of several with the same name.
fn find<'a>(all: &'a [Timeline], id: &str) -> Result<&'a Timeline> {
    if let Some(found) = all.iter().find(|timeline| timeline.matches_id(id)) {
        return Ok(found);
    }
    let begins = |timeline: &&Timeline| {
        let mut containers = timeline.steps.iter().map(|step| &step.container);
        timeline.id.starts_with(id) || containers.any(|name| name.starts_with(id))
    };
    let found: Vec<&Timeline> = all.iter().filter(begins).collect();
    match found.as_slice() {
        [] => bail!("no start of {id} is known; `koya timeline --list` lists those that are"),
        [one] => Ok(one),
        several => {
            let names: Vec<&str> = several.iter().map(|timeline| &*timeline.id).collect();
            bail!("{id} may be any of {}", names.join(", "))
        }
    }
}

/// The part for one diagram: the start of the sandbox, or that of a container much later, with the events around that time.
/// Times are relative to the start of the part.
fn part(timeline: &Timeline, id: Option<&str>) -> Timeline {
    let end = |step: &Step| step.to_us.unwrap_or(step.from_us);
    let wanted = id
        .filter(|id| !timeline.id.starts_with(*id))
        .and_then(|id| {
            let mut steps = timeline.steps.iter().rev();
            steps.find(|step| step.container.starts_with(id))
        });
    let at = wanted.map_or(0, |step| step.from_us);
    let mut steps: Vec<&Step> = timeline.steps.iter().collect();
    steps.sort_by_key(|step| step.from_us);
    // Start and end of the current part; the scan ends after the wanted one.
    let (mut from, mut to) = (0_u64, 0_u64);
    for step in steps {
        if step.from_us > to.saturating_add(IDLE_US) {
            if at < step.from_us {
                break;
            }
            from = step.from_us;
        }
        to = to.max(end(step));
    }
    let is_in = |us: u64| (from..=to).contains(&us);
    let mut part = timeline.clone();
    part.began_unix_ms = timeline.began_unix_ms.saturating_add(from / 1000);
    part.exits = timeline.exits.filter(|_| from == 0);
    part.steps.retain(|step| is_in(step.from_us));
    part.marks.retain(|mark| is_in(mark.at_us));
    for step in &mut part.steps {
        step.from_us -= from;
        step.to_us = step.to_us.map(|to| to.saturating_sub(from));
    }
    for mark in &mut part.marks {
        mark.at_us -= from;
    }
    part
}

/// Milliseconds: `1520.3`
fn ms(us: u64) -> String {
    format!("{:.1}", us as f64 / 1e3)
}

/// Replaces characters that a terminal or diagram would interpret: the text may come from a guest.
fn shown(c: char) -> char {
    if c.is_control() { '\u{b7}' } else { c }
}

fn plain(text: &str) -> String {
    text.chars().map(shown).collect()
}

/// Truncates to at most `most` characters.
fn shortened(text: &str, most: usize) -> String {
    let text = plain(text);
    match text.chars().count() > most {
        true => text.chars().take(most - 1).chain(['\u{2026}']).collect(),
        false => text,
    }
}

/// `2026-11-22 20:41:01 UTC`
fn date(unix_ms: u64) -> String {
    let date = i64::try_from(unix_ms).ok();
    let date = date.and_then(DateTime::from_timestamp_millis);
    date.unwrap_or_default()
        .format("%Y-%m-%d %H:%M:%S UTC")
        .to_string()
}

/// `131.2 ms in all; agent ready after 105.5 ms, container started after 131.2 ms`
fn summary(timeline: &Timeline) -> String {
    let mut text = format!("{} ms in all", ms(timeline.total_us()));
    let moments = [
        ("agent ready", timeline.ready_us()),
        ("container started", timeline.started_us()),
    ];
    let moments = moments.iter().filter_map(|(name, at)| Some((name, (*at)?)));
    let moments: Vec<_> = moments
        .map(|(name, at)| format!("{name} after {} ms", ms(at)))
        .collect();
    if !moments.is_empty() {
        text += &format!("; {}", moments.join(", "));
    }
    text
}

/// `112 port exits, 270 MMIO exits`, for the step that they belong to.
fn exits_of(timeline: &Timeline, step: &Step) -> Option<String> {
    let exits = timeline.exits.filter(|_| step.lane == Lane::Kernel)?;
    Some(format!(
        "{} port exits, {} MMIO exits",
        exits.port, exits.mmio
    ))
}

/// `failed in kernel after 50.1 ms: REASON`
fn failure(timeline: &Timeline) -> Option<String> {
    let step = timeline.failed()?;
    let error = step.error.as_deref().unwrap_or_default();
    let of = match step.container.is_empty() {
        true => String::new(),
        false => format!(" of {}", step.container),
    };
    let took = ms(step.took().as_micros() as u64);
    Some(format!(
        "failed in {}{of} after {took} ms: {error}",
        step.name
    ))
}

/// A step or a mark.
enum Entry<'a> {
    Step(&'a Step),
    TimelineEvent(&'a TimelineEvent),
}

/// All steps and marks in order of time; a step before the marks within it.
fn entries(timeline: &Timeline) -> Vec<Entry<'_>> {
    let steps = timeline.steps.iter().map(Entry::Step);
    let mut all: Vec<_> = steps
        .chain(timeline.marks.iter().map(Entry::TimelineEvent))
        .collect();
    all.sort_by_key(|entry| match entry {
        Entry::Step(step) => (step.from_us, false),
        Entry::TimelineEvent(mark) => (mark.at_us, true),
    });
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use koya::timeline::{ExitCounts, VERSION};

    pub(super) fn step(name: &'static str, lane: Lane, from: u64, to: u64) -> Step {
        Step {
            name: name.into(),
            lane,
            container: match lane {
                Lane::Container => "web".into(),
                _ => String::new(),
            },
            from_us: from,
            to_us: Some(to),
            error: None,
        }
    }

    pub(super) fn mark(name: &'static str, lane: Lane, at_us: u64) -> TimelineEvent {
        TimelineEvent {
            name: name.into(),
            lane,
            container: String::new(),
            at_us,
        }
    }

    pub(super) fn timeline() -> Timeline {
        Timeline {
            version: VERSION,
            id: "web".into(),
            began_unix_ms: 1_700_000_000_123,
            steps: vec![
                step("prepare", Lane::Host, 0, 2500),
                step("devices", Lane::Host, 2500, 3100),
                step("machine", Lane::Host, 3100, 20_200),
                step("kernel", Lane::Kernel, 20_200, 106_400),
                step("agent", Lane::Agent, 106_400, 107_700),
                step("settings", Lane::Host, 107_700, 108_300),
                step("create", Lane::Container, 108_300, 126_400),
                step("start", Lane::Container, 126_400, 130_100),
            ],
            marks: vec![
                mark("kernel loaded", Lane::Host, 19_000),
                mark("virtio-vsock", Lane::Kernel, 90_000),
                mark("virtio-fs", Lane::Kernel, 90_100),
            ],
            exits: Some(ExitCounts {
                port: 112,
                mmio: 270,
            }),
        }
    }

    pub(super) fn failed() -> Timeline {
        let mut timeline = timeline();
        timeline.steps.truncate(4);
        let reason = "the virtual machine ended: <panic> & \x1b[2J more\nlast words\nof it";
        timeline.steps[3].error = Some(reason.into());
        timeline.exits = None;
        timeline
    }

    pub(super) fn empty() -> Timeline {
        let mut timeline = timeline();
        timeline.steps.clear();
        timeline.marks.clear();
        timeline.exits = None;
        timeline
    }

    #[test]
    fn dates_are_the_calendars() {
        assert_eq!(date(0), "1970-01-01 00:00:00 UTC");
        assert_eq!(date(951_782_399_999), "2000-02-28 23:59:59 UTC");
        assert_eq!(date(951_782_400_000), "2000-02-29 00:00:00 UTC");
        assert_eq!(date(1_798_761_599_000), "2026-12-31 23:59:59 UTC");
    }

    #[test]
    fn what_comes_much_later_is_a_picture_of_its_own() {
        let mut pod = timeline();
        assert_eq!(part(&pod, None), pod);
        let hour = 3_600_000_000;
        for (name, from) in [("create", hour), ("start", hour + 25_000)] {
            let mut late = step(name, Lane::Container, from, from + 20_000);
            late.container = "late".into();
            pod.steps.push(late);
        }
        pod.marks
            .push(mark("virtio-blk", Lane::Kernel, hour + 5_000));
        for id in [None, Some("w"), Some("web")] {
            assert_eq!(part(&pod, id), timeline(), "{id:?}");
        }
        let late = part(&pod, Some("la"));
        let spans: Vec<_> = late.steps.iter().map(|s| (s.from_us, s.to_us)).collect();
        assert_eq!(spans, [(0, Some(20_000)), (25_000, Some(45_000))]);
        assert_eq!((late.marks.len(), late.marks[0].at_us), (1, 5_000));
        assert_eq!(late.began_unix_ms, pod.began_unix_ms + 3_600_000);
        assert_eq!((late.exits, late.started_us()), (None, Some(45_000)));
    }

    #[test]
    fn a_start_is_found_by_name_by_container_and_by_beginning() {
        let mut other = timeline();
        other.id = "0123456789".into();
        other.steps[6].container = "abcdef".into();
        other.steps[7].container = "weber".into();
        let all = [timeline(), other];
        let id = |wanted: &str| find(&all, wanted).map(|found| found.id.clone());
        assert_eq!(id("web").unwrap(), "web");
        assert_eq!(id("weber").unwrap(), "0123456789");
        assert_eq!(id("0123").unwrap(), "0123456789");
        assert_eq!(id("abc").unwrap(), "0123456789");
        let error = id("we").unwrap_err().to_string();
        assert_eq!(error, "we may be any of web, 0123456789");
        assert!(id("nope").is_err());
    }
}
