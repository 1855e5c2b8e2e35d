//! A start as lines of text: one for each step or mark, with a bar on a common scale.

use super::{Entry, date, entries, exits_of, failure, ms, plain, shortened, summary};
use koya::Timeline;
use koya::timeline::Lane;
use std::fmt::Write;

/// Width of the columns for lane, name, start and duration, and the gaps between them.
const TABLE: usize = 10 + 1 + 24 + 1 + 9 + 1 + 9 + 2;
/// Minimum width of bars.
const MIN_BARS: usize = 12;

pub(super) fn draw(timeline: &Timeline, columns: usize) -> String {
    let mut text = format!(
        "{}, {}: {}\n",
        plain(&timeline.id),
        date(timeline.began_unix_ms),
        summary(timeline)
    );
    let bars = columns.saturating_sub(TABLE).max(MIN_BARS);
    writeln!(
        text,
        "\n{:<10} {:<24} {:>9} {:>9}",
        "WHO", "WHAT", "AT ms", "TOOK ms"
    )
    .ok();
    let total = timeline.total_us();
    for entry in entries(timeline) {
        match entry {
            Entry::Step(step) => {
                let took = step
                    .to_us
                    .map_or_else(String::new, |to| ms(to - step.from_us));
                let (name, bar) = match (&step.error, step.to_us) {
                    (Some(_), _) => (format!("{} FAILED", step.name), '\u{2592}'),
                    (None, None) => (format!("{} (not ended)", step.name), '\u{2592}'),
                    (None, Some(_)) => (step.name.to_string(), '\u{2588}'),
                };
                let to = step.to_us.unwrap_or(total);
                line(
                    &mut text,
                    (&who(step.lane, &step.container), &name),
                    (&ms(step.from_us), &took),
                    &span(step.from_us, to, total, bars, bar),
                );
                if let Some(exits) = exits_of(timeline, step) {
                    writeln!(text, "{:<10}   {exits}", "").ok();
                }
            }
            Entry::TimelineEvent(mark) => line(
                &mut text,
                ("", &format!("  {}", mark.name)),
                (&ms(mark.at_us), ""),
                &span(mark.at_us, mark.at_us, total, bars, '\u{2022}'),
            ),
        }
    }
    if let Some(failure) = failure(timeline) {
        text.push('\n');
        for said in failure.lines() {
            writeln!(text, "{}", plain(said)).ok();
        }
    }
    text
}

fn line(text: &mut String, (who, what): (&str, &str), (at, took): (&str, &str), bar: &str) {
    let (who, what) = (shortened(who, 10), shortened(what, 24));
    let line = format!("{who:<10} {what:<24} {at:>9} {took:>9}  {bar}");
    writeln!(text, "{}", line.trim_end()).ok();
}

fn who(lane: Lane, container: &str) -> String {
    match lane {
        Lane::Host => "host".into(),
        Lane::Kernel => "kernel".into(),
        Lane::Agent => "agent".into(),
        Lane::Container => container.into(),
    }
}

/// A bar of at least one column, at its position.
fn span(from: u64, to: u64, total: u64, columns: usize, of: char) -> String {
    let total = total.max(1) as f64;
    let column = |us: u64| us as f64 / total * columns as f64;
    let first = (column(from) as usize).min(columns - 1);
    let end = (column(to).ceil() as usize).clamp(first + 1, columns.max(first + 1));
    let mut bar = " ".repeat(first);
    // A point takes one column.
    let length = if to == from { 1 } else { end - first };
    bar.extend(std::iter::repeat_n(of, length));
    bar
}

pub(super) fn list(all: &[Timeline]) -> String {
    let mut text = format!(
        "{:<24} {:<23} {:>10} {:>12}  OUTCOME\n",
        "ID", "BEGAN", "READY ms", "STARTED ms"
    );
    for timeline in all {
        let time = |at: Option<u64>| at.map_or_else(|| "-".to_owned(), ms);
        let outcome = match timeline.failed() {
            Some(step) => format!("{} failed", step.name),
            None if timeline.started_us().is_some() => "started".into(),
            None => "no container".into(),
        };
        writeln!(
            text,
            "{:<24} {:<23} {:>10} {:>12}  {outcome}",
            plain(&timeline.id),
            date(timeline.began_unix_ms),
            time(timeline.ready_us()),
            time(timeline.started_us()),
        )
        .ok();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::tests::{empty, failed, timeline};
    use super::*;

    #[test]
    fn every_step_has_a_line_and_no_line_is_too_long() {
        for columns in [80, 200] {
            let text = draw(&timeline(), columns);
            let longest = text.lines().skip(1).map(|l| l.chars().count()).max();
            assert_eq!(longest, Some(columns), "{text}");
            let kernel = text.lines().find(|l| l.starts_with("kernel")).unwrap();
            assert!(kernel.contains("20.2      86.2"), "{kernel}");
            assert!(text.contains("112 port exits, 270 MMIO exits"), "{text}");
        }
        assert!(draw(&timeline(), 3).contains("virtio-fs"));
    }

    #[test]
    fn bars_are_in_their_places() {
        assert_eq!(span(0, 50, 100, 4, '#'), "##");
        assert_eq!(span(50, 100, 100, 4, '#'), "  ##");
        assert_eq!(span(100, 100, 100, 4, '*'), "   *");
        assert_eq!(span(30, 30, 100, 4, '*'), " *");
        assert_eq!(span(99, 100, 100, 4, '#'), "   #");
        assert_eq!(span(0, 0, 0, 4, '*'), "*");
    }

    #[test]
    fn a_failed_start_says_where_and_why_and_commands_no_terminal() {
        let text = draw(&failed(), 80);
        assert!(text.contains("kernel FAILED"), "{text}");
        let said = "failed in kernel after 86.2 ms: the virtual machine ended: <panic> & \u{b7}[2J";
        assert!(text.contains(said), "{text}");
        assert!(text.ends_with("last words\nof it\n"), "{text}");
        assert!(!text.contains('\x1b'));
    }

    #[test]
    fn what_is_empty_is_drawn_and_listed() {
        assert!(draw(&empty(), 80).starts_with("web, 2023-11-14 22:13:20 UTC: 0.0 ms in all"));
        let text = list(&[timeline(), failed(), empty()]);
        let ends: Vec<&str> = text
            .lines()
            .skip(1)
            .map(|l| l.split("  ").last().unwrap())
            .collect();
        assert_eq!(ends, ["started", "kernel failed", "no container"]);
    }
}
