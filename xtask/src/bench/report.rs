//! Rows of figures: their file, their goals, and the baseline.

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The option of every benchmark for its rows, which are always printed as a table.
#[derive(Args)]
pub(super) struct Report {
    /// Write the rows, the machine and the versions of the peers to FILE as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

impl Report {
    /// Writes the rows to the requested file, with the versions of these programs.
    pub(super) fn save(&self, rows: &Value, peers: &[(String, PathBuf)]) -> Result<()> {
        let Some(file) = &self.json else {
            eprintln!("(--json FILE keeps the rows)");
            return Ok(());
        };
        let all = json!({"machine": machine(), "versions": versions(peers), "rows": rows});
        save_json(file, &all)
    }

    /// Saves the rows, and fails if a goal is missed and `check` requires them.
    pub(super) fn finish(
        &self,
        rows: &Value,
        peers: &[(String, PathBuf)],
        check: bool,
    ) -> Result<()> {
        self.save(rows, peers)?;
        match check {
            true => check_goals(rows),
            false => Ok(()),
        }
    }
}

/// Writes a requested output file.
pub(super) fn save(file: &Path, content: impl AsRef<[u8]>) -> Result<()> {
    fs::write(file, content).with_context(|| format!("cannot write {}", file.display()))
}

pub(super) fn save_json(file: &Path, value: &Value) -> Result<()> {
    save(file, serde_json::to_string_pretty(value)? + "\n")
}

/// Description of the machine; figures of counted instructions do not depend on it.
fn machine() -> Value {
    let cpus = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpus.lines().find(|line| line.starts_with("model name"));
    let model = model.and_then(|line| line.split_once(": "));
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    json!({"cpu": model.map(|model| model.1), "kernel": kernel.trim()})
}

fn versions(programs: &[(String, PathBuf)]) -> Value {
    let version = |path: &Path| {
        let output = Command::new(path).arg("--version").output().ok()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        Some(text.lines().next()?.to_owned())
    };
    let all = programs
        .iter()
        .map(|(name, path)| (name.clone(), json!(version(path))));
    Value::Object(all.collect())
}

/// Fails if a figure misses its goal, which is listed in the column of a peer.
fn check_goals(rows: &Value) -> Result<()> {
    let goals = rows.as_array().into_iter().flatten().filter_map(|row| {
        let ratio = row["ratio"]["goal"].as_f64()?;
        let text = format!(
            "{}: {} {}, goal {}",
            row["name"].as_str()?,
            row["koya"],
            row["unit"].as_str()?,
            row["peers"]["goal"]
        );
        Some((ratio >= 1.0, text))
    });
    let (met, missed): (Vec<_>, Vec<_>) = goals.partition(|(is_met, _)| *is_met);
    for (_, text) in &met {
        eprintln!("bench: met: {text}");
    }
    if met.is_empty() && missed.is_empty() {
        bail!("no figure has a goal");
    }
    let missed: Vec<_> = missed.into_iter().map(|(_, text)| text).collect();
    match missed.is_empty() {
        true => Ok(()),
        false => bail!("not met:\n{}", missed.join("\n")),
    }
}

/// Tolerance for counts of exits and faults, which vary by this much with the timing of a tick.
const FEW: f64 = 8.0;

/// Fails if a figure is worse than before by more than `share` per cent.
pub(super) fn compare(before: &Value, now: &Value, share: f64) -> Result<()> {
    let figure = |rows: &Value, name: &str| {
        let mut rows = rows.as_array().into_iter().flatten();
        let row = rows.find(|row| row["name"] == name)?;
        row["koya"].as_f64()
    };
    let mut worse = Vec::new();
    for row in before.as_array().into_iter().flatten() {
        let name = row["name"].as_str().unwrap_or_default();
        // Steps are parts of the compared figures.
        let (Some(before), Some(now)) = (row["koya"].as_f64(), figure(now, name)) else {
            bail!("{name}: no such figure any more; --record puts the new ones on record");
        };
        let slack = if row["unit"] == "" { FEW } else { 0.0 };
        if !name.starts_with("step: ") && now > before * (1.0 + share / 100.0) + slack {
            worse.push(format!("{name}: {now} instead of {before}"));
        }
    }
    if worse.is_empty() {
        eprintln!("bench: nothing is worse than on record by more than {share} %");
        return Ok(());
    }
    bail!("worse by more than {share} %:\n{}", worse.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_is_worse_is_named() {
        let rows = |executed: f64, exits: f64| {
            json!([{"name": "executed", "unit": "M instr", "koya": executed},
                {"name": "exits", "unit": "", "koya": exits}])
        };
        let before = rows(100.0, 7.0);
        assert!(compare(&before, &rows(101.9, 9.0), 2.0).is_ok());
        let worse = |now: Value| compare(&before, &now, 2.0).unwrap_err().to_string();
        assert!(worse(rows(102.1, 7.0)).contains("executed: 102.1 instead of 100"));
        assert!(worse(rows(90.0, 17.0)).contains("exits: 17 instead of 7"));
        assert!(worse(json!([])).contains("executed: no such figure"));
    }
}
