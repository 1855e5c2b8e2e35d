//! The record of all runs: executions add up, until the directory in the cache is removed.

use super::Lines;
use crate::cache;
use anyhow::{Context, Result};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// What is known of a target.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[serde(default)]
pub(super) struct Target {
    /// Executions in all runs.
    pub(super) executions: u64,
    /// Seconds of all runs.
    pub(super) seconds: u64,
    /// Edges reached by the kept inputs, and all edges of the program.
    pub(super) edges: u64,
    pub(super) all_edges: u64,
    /// Kept inputs, and failing ones: a failing input is open until its file is removed.
    pub(super) inputs: u64,
    pub(super) crashes: u64,
}

/// The record.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[serde(default)]
pub(super) struct Record {
    pub(super) targets: BTreeMap<String, Target>,
    /// Lines of each part, from the last run with `--coverage`.
    pub(super) coverage: BTreeMap<String, Lines>,
}

impl Record {
    fn path() -> PathBuf {
        cache::root().join("fuzz/record.json")
    }

    /// The record of earlier runs, if there is one.
    pub(super) fn read() -> Result<Self> {
        read(&Self::path())
    }

    /// Changes the record; other processes wait.
    pub(super) fn change(change: impl FnOnce(&mut Self)) -> Result<Self> {
        change_at(&Self::path(), change)
    }

    /// Executions of a target in all runs.
    pub(super) fn executions(&self, target: &str) -> u64 {
        self.targets
            .get(target)
            .map_or(0, |target| target.executions)
    }

    /// The table for `--status`, with a row for each of these targets.
    pub(super) fn table(&self, targets: &[String]) -> String {
        let mut text = String::from(
            "| target | executions | seconds | per second | edges | inputs kept | crashes |\n|---|---|---|---|---|---|---|\n",
        );
        let mut sum = Target::default();
        for name in targets {
            let target = self.targets.get(name).cloned().unwrap_or_default();
            text += &row(&format!("`{name}`"), &target);
            sum.executions += target.executions;
            sum.seconds += target.seconds;
            sum.inputs += target.inputs;
            sum.crashes += target.crashes;
        }
        text += &row("all", &sum);
        text
    }
}

fn row(name: &str, target: &Target) -> String {
    let Target {
        executions,
        seconds,
        edges,
        all_edges,
        inputs,
        crashes,
    } = target;
    let rate = executions.checked_div(*seconds).unwrap_or(0);
    let edges = match all_edges {
        0 => String::new(),
        all => format!("{edges} of {all}"),
    };
    format!("| {name} | {executions} | {seconds} | {rate} | {edges} | {inputs} | {crashes} |\n")
}

fn read(path: &Path) -> Result<Record> {
    match fs::read_to_string(path) {
        Ok(text) => serde_json::from_str(&text).with_context(|| format!("{}", path.display())),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(Record::default()),
        Err(error) => Err(error).with_context(|| format!("{}", path.display())),
    }
}

fn change_at(path: &Path, change: impl FnOnce(&mut Record)) -> Result<Record> {
    let directory = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(directory)?;
    let lock = File::create(path.with_extension("lock"))?;
    flock(&lock, FlockOperation::LockExclusive)?;
    let mut record = read(path)?;
    change(&mut record);
    // Replaced as a whole: a run may be killed at any time.
    let new = path.with_extension("new");
    fs::write(&new, serde_json::to_string_pretty(&record)? + "\n")?;
    fs::rename(&new, path)?;
    Ok(record)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn executions_add_up_over_runs() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fuzz/record.json");
        for run in 1..=3 {
            let record = change_at(&path, |record| {
                let target = record.targets.entry("one".into()).or_default();
                target.executions += 100;
                target.seconds += 2;
            });
            assert_eq!(record.unwrap().executions("one"), 100 * run);
        }
        let record = read(&path).unwrap();
        let table = record.table(&["one".into(), "two".into()]);
        let rows: Vec<&str> = table.lines().skip(2).collect();
        assert_eq!(
            rows,
            [
                "| `one` | 300 | 6 | 50 |  | 0 | 0 |",
                "| `two` | 0 | 0 | 0 |  | 0 | 0 |",
                "| all | 300 | 6 | 50 |  | 0 | 0 |",
            ]
        );
    }

    #[test]
    fn a_record_that_is_not_json_is_not_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("record.json");
        fs::write(&path, "{").unwrap();
        assert!(change_at(&path, |_| ()).is_err());
        assert_eq!(fs::read_to_string(&path).unwrap(), "{");
    }
}
