//! `state`, `list`, `ps`.

use crate::Outcome;
use crate::cli::{Format, ListArgs, PsArgs};
use crate::state::{Container, Root, State, Status};
use anyhow::{Context, Result, bail};
use serde::Serialize;
use serde_json::Value;
use std::io::Write;
use std::process::Command;

fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout();
    let written = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    written.context("cannot write to standard output")
}

pub(crate) fn print_json(value: &impl Serialize) -> Result<()> {
    print(&format!("{}\n", serde_json::to_string_pretty(value)?))
}

pub(crate) fn state(root: &Root, id: &str) -> Outcome {
    let container = root.find(id)?;
    print_json(&container.state(container.status()))?;
    Ok(0)
}

pub(crate) fn list(root: &Root, args: &ListArgs) -> Outcome {
    let containers = root.all()?;
    if args.quiet {
        let names = containers.iter().map(|one| format!("{}\n", one.stored.id));
        print(&names.collect::<String>())?;
        return Ok(0);
    }
    let states = containers.iter().map(Container::listed);
    let states: Vec<State<'_>> = states.collect();
    if args.format == Format::Json {
        // An empty list is null, as in runc.
        let list = (!states.is_empty()).then_some(states);
        print(&format!("{}\n", serde_json::to_string(&list)?))?;
        return Ok(0);
    }
    let head = ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"].map(String::from);
    let rows = states.iter().map(|state| {
        [
            state.id.to_owned(),
            state.pid.to_string(),
            state.status.to_string(),
            state.bundle.display().to_string(),
            state.created.to_owned(),
            state.owner.clone(),
        ]
    });
    print(&table(std::iter::once(head).chain(rows).collect()))?;
    Ok(0)
}

/// Columns as wide as those of runc: at least 12 characters, 3 of them empty. The last one has no end.
fn table(rows: Vec<[String; 6]>) -> String {
    const LEAST: usize = 12;
    const GAP: usize = 3;
    let length = |row: &[String; 6], column: usize| row[column].chars().count() + GAP;
    let width = |column| rows.iter().map(|row| length(row, column)).max();
    let widths: Vec<usize> = (0..5).map(|c| width(c).unwrap_or(0).max(LEAST)).collect();
    let line = |row: &[String; 6]| {
        let cells = row.iter().zip(&widths);
        let cells: String = cells
            .map(|(cell, width)| format!("{cell:width$}"))
            .collect();
        format!("{cells}{}\n", row[5])
    };
    rows.iter().map(line).collect()
}

pub(crate) fn ps(root: &Root, args: &PsArgs) -> Outcome {
    let container = root.find(&args.id)?;
    let pids = match container.status() {
        Status::Stopped => Vec::new(),
        _ => vec![container.stored.pid],
    };
    if args.format == Format::Json {
        print(&format!("{}\n", Value::from(pids)))?;
        return Ok(0);
    }
    let options = match args.options.is_empty() {
        true => vec!["-ef".to_owned()],
        false => args.options.clone(),
    };
    let output = Command::new("ps")
        .args(&options)
        .output()
        .context("cannot run ps")?;
    if !output.status.success() {
        bail!("ps: {}", String::from_utf8_lossy(&output.stderr).trim_end());
    }
    print(&lines_of(&String::from_utf8_lossy(&output.stdout), &pids)?)?;
    Ok(0)
}

/// The header of ps(1) output, and the lines of these processes.
fn lines_of(text: &str, pids: &[i32]) -> Result<String> {
    let head = text.lines().next().unwrap_or_default();
    let place = head.split_whitespace().position(|title| title == "PID");
    let place = place.context("couldn't find PID field in ps output")?;
    let is_one = |line: &&str| {
        let pid = line.split_whitespace().nth(place);
        pid.and_then(|pid| pid.parse().ok())
            .is_some_and(|pid| pids.contains(&pid))
    };
    let lines = std::iter::once(head).chain(text.lines().skip(1).filter(is_one));
    Ok(lines.map(|line| format!("{line}\n")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_runcs() {
        let row = |cells: [&str; 6]| cells.map(String::from);
        let head = row(["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"]);
        let one = row(["c", "7", "running", "/a/bundle", "now", "root"]);
        let text = table(vec![head, one]);
        let expected = "ID          PID         STATUS      BUNDLE      CREATED     OWNER\n\
                        c           7           running     /a/bundle   now         root\n";
        assert_eq!(text, expected);
        let long = row(["c", "7", "running", "/a/bundles", "now", "root"]);
        assert!(table(vec![long]).contains("/a/bundles   now         root\n"));
    }

    #[test]
    fn ps_shows_the_containers_processes() {
        let text = "UID   PID CMD\nroot  1 init\nroot  12 x\nroot 2 y\n";
        let shown = lines_of(text, &[12]).unwrap();
        assert_eq!(shown, "UID   PID CMD\nroot  12 x\n");
        assert!(lines_of("NAME\n", &[1]).is_err());
    }
}
