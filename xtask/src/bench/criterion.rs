//! `cargo xtask bench criterion`: code inside the process, measured by criterion on this machine.

use crate::{proc, setup};
use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use std::time::SystemTime;

/// Listed by name: otherwise cargo would pass criterion's options to unit tests too.
const BENCHES: &[&str] = &["virtqueue", "devices", "exits", "monitor"];
/// Directory of criterion's results, below the checkout.
const KEPT: &str = "target/criterion";

/// `cargo xtask bench criterion`
pub(super) fn run(quick: bool) -> Result<Value> {
    setup::ensure()?;
    let (kept, from) = (proc::checkout().join(KEPT), SystemTime::now());
    let mut cargo = proc::cargo();
    cargo.args(["bench", "--package", "koya-benches"]);
    for name in BENCHES {
        cargo.args(["--bench", name]);
    }
    cargo.args(["--", "--noplot"]).env("CRITERION_HOME", &kept);
    if quick {
        cargo.arg("--quick");
    }
    proc::run(&mut cargo)?;
    let mut rows = Vec::new();
    collect(&kept, from, &mut rows)?;
    rows.sort_by_key(|row| row["name"].to_string());
    Ok(Value::Array(rows))
}

/// Adds a row for each bench below `directory` that was measured since `from`: its median, in microseconds.
fn collect(directory: &Path, from: SystemTime, rows: &mut Vec<Value>) -> Result<()> {
    let entries = fs::read_dir(directory).with_context(|| format!("no {}", directory.display()))?;
    for entry in entries {
        let path = entry?.path();
        if !path.is_dir() {
            continue;
        }
        let estimates = path.join("estimates.json");
        let measured = fs::metadata(&estimates).and_then(|data| data.modified());
        if path.ends_with("new") && measured.is_ok_and(|at| at >= from) {
            let read = |file: &Path| -> Result<Value> {
                let text = fs::read(file).with_context(|| format!("no {}", file.display()))?;
                Ok(serde_json::from_slice(&text)?)
            };
            let name = &read(&path.join("benchmark.json"))?["full_id"];
            let median = &read(&estimates)?["median"]["point_estimate"];
            let median = median.as_f64().context("criterion gave no median")?;
            let us = (median / 10.0).round() / 100.0;
            rows.push(json!({"name": name, "unit": "us", "koya": us, "peers": {}, "ratio": {}}));
        } else {
            collect(&path, from, rows)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn rows_are_of_what_was_measured_now() {
        let dir = std::env::temp_dir().join(format!("koya-criterion-{}", std::process::id()));
        let new = dir.join("files/read 4 KiB/new");
        fs::create_dir_all(&new).unwrap();
        let write = |name, value: Value| fs::write(new.join(name), value.to_string()).unwrap();
        write("benchmark.json", json!({"full_id": "files/read 4 KiB"}));
        write(
            "estimates.json",
            json!({"median": {"point_estimate": 27_735.327}}),
        );
        let of = |from| {
            let mut rows = Vec::new();
            collect(&dir, from, &mut rows).unwrap();
            rows
        };
        let hour = Duration::from_secs(3600);
        let (now, later) = (of(SystemTime::now() - hour), of(SystemTime::now() + hour));
        fs::remove_dir_all(&dir).unwrap();
        let row = json!({"name": "files/read 4 KiB", "unit": "us", "koya": 27.74, "peers": {}, "ratio": {}});
        assert_eq!(now, [row]);
        assert!(later.is_empty());
    }
}
