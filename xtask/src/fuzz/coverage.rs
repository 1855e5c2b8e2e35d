//! `cargo xtask fuzz --coverage`: the lines covered by the kept inputs.
//!
//! The targets are built a second time with the compiler's coverage counters, and run each kept input once. The tools that
//! read the counters come with the compiler: `rustup component add llvm-tools`.

use super::Lines;
use super::record::Record;
use crate::arch::Arch;
use crate::proc;
use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Number of inputs passed to a program at a time.
const BATCH: usize = 2000;

/// Crates whose lines are counted, by path; and whether each device is listed separately.
const SOURCES: [(&str, bool); 5] = [
    ("devices/src/", true),
    ("runtime/image/src/", false),
    ("runtime/src/", false),
    ("agent/protocol/src/", false),
    ("vmm/src/", false),
];

#[derive(Deserialize)]
struct Export {
    data: Vec<Data>,
}

#[derive(Deserialize)]
struct Data {
    files: Vec<SourceFile>,
}

#[derive(Deserialize)]
struct SourceFile {
    filename: String,
    summary: Summary,
}

#[derive(Deserialize)]
struct Summary {
    lines: Lines,
}

/// Builds the targets; runs the kept inputs of these, and prints a table.
pub(super) fn run(targets: &[String], runs: bool) -> Result<()> {
    let tools = tools()?;
    let here = Arch::of_this_machine();
    let directory = here.target("fuzz-coverage");
    let flags = ["--cfg=fuzzing", "-Cinstrument-coverage"];
    proc::run(&mut super::build_command(&directory, &flags)?)?;
    if !runs {
        return Ok(());
    }
    let programs = directory.join(here.gnu()).join("fuzz");
    let profiles = directory.join("profiles");
    if profiles.exists() {
        fs::remove_dir_all(&profiles)?;
    }
    fs::create_dir_all(&profiles)?;
    for target in targets {
        replay(&programs, target, &profiles)?;
    }
    let merged = profiles.join("all");
    let raw = super::files(&profiles)?;
    let mut merge = Command::new(tools.join("llvm-profdata"));
    merge.args(["merge", "--sparse", "--output"]).arg(&merged);
    proc::run(merge.args(raw))?;
    let mut export = Command::new(tools.join("llvm-cov"));
    export.args(["export", "--summary-only", "--instr-profile"]);
    export.arg(&merged);
    for (number, target) in targets.iter().enumerate() {
        if number > 0 {
            export.arg("--object");
        }
        export.arg(programs.join(target));
    }
    let text = proc::output(&mut export)?;
    let export: Export = serde_json::from_str(&text).context("the report of llvm-cov")?;
    let files = export.data.into_iter().flat_map(|data| data.files);
    let files = files.map(|file| (file.filename, file.summary.lines));
    let parts = parts(files, &proc::checkout());
    print!("{}", table(&parts));
    Record::change(|record| record.coverage = parts)?;
    Ok(())
}

/// Runs each kept input of a target once, without fuzzing.
fn replay(programs: &Path, target: &str, profiles: &Path) -> Result<()> {
    let inputs = super::home(target).join("inputs");
    let inputs = match inputs.exists() {
        true => super::files(&inputs)?,
        false => Vec::new(),
    };
    eprintln!("fuzz: {target} runs {} inputs", inputs.len());
    for (number, some) in inputs.chunks(BATCH).enumerate() {
        let profile = profiles.join(format!("{target}-{number}.profraw"));
        let (mut command, _temporary) = super::target_command(programs, target)?;
        let status = command
            .args(some)
            .env("LLVM_PROFILE_FILE", &profile)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .with_context(|| format!("cannot run {target}"))?;
        ensure!(status.success(), "{target} ended with {status}");
    }
    Ok(())
}

/// Directory of the compiler's tools.
fn tools() -> Result<PathBuf> {
    let libraries = proc::output(Command::new("rustc").args(["--print", "target-libdir"]))?;
    let directory = Path::new(libraries.trim()).join("../bin");
    ensure!(
        directory.join("llvm-cov").exists(),
        "there is no llvm-cov in {}: `rustup component add llvm-tools` puts it there",
        directory.display()
    );
    Ok(directory)
}

/// Lines of each device, and of each other crate, from the lines of each file.
fn parts(files: impl Iterator<Item = (String, Lines)>, checkout: &Path) -> BTreeMap<String, Lines> {
    let mut parts: BTreeMap<String, Lines> = BTreeMap::new();
    for (name, lines) in files {
        let Ok(path) = Path::new(&name).strip_prefix(checkout) else {
            continue;
        };
        let path = path.to_string_lossy();
        let found = SOURCES.iter().find(|(prefix, _)| path.starts_with(prefix));
        let Some((prefix, by_device)) = found else {
            continue;
        };
        // A device is a file or a directory.
        let rest = path[prefix.len()..].split('/').next().unwrap_or_default();
        let part = match by_device {
            true => format!("{prefix}{}", rest.trim_end_matches(".rs")),
            false => prefix.trim_end_matches('/').to_owned(),
        };
        // Test utilities are not devices.
        if part.ends_with("test_utils") {
            continue;
        }
        let sum = parts.entry(part).or_default();
        sum.count += lines.count;
        sum.covered += lines.covered;
    }
    parts
}

/// The table of the parts.
pub(super) fn table(parts: &BTreeMap<String, Lines>) -> String {
    let mut text = String::from("| part | lines | reached | % |\n|---|---|---|---|\n");
    for (part, Lines { count, covered }) in parts {
        let percent = (100 * covered).checked_div(*count).unwrap_or(0);
        text += &format!("| {part} | {count} | {covered} | {percent} |\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_summed_by_device() {
        let lines = |count, covered| Lines { count, covered };
        let files = [
            ("/w/devices/src/net/tap.rs", lines(10, 5)),
            ("/w/devices/src/net/mod.rs", lines(30, 25)),
            ("/w/devices/src/balloon.rs", lines(7, 7)),
            ("/w/devices/src/test_utils.rs", lines(9, 9)),
            ("/w/runtime/src/oci/mod.rs", lines(3, 0)),
            ("/elsewhere/devices/src/net/tap.rs", lines(99, 0)),
        ];
        let files = files.map(|(name, lines)| (name.to_owned(), lines));
        let text = table(&parts(files.into_iter(), Path::new("/w")));
        let rows: Vec<&str> = text.lines().skip(2).collect();
        assert_eq!(
            rows,
            [
                "| devices/src/balloon | 7 | 7 | 100 |",
                "| devices/src/net | 40 | 30 | 75 |",
                "| runtime/src | 3 | 0 | 0 |",
            ]
        );
    }

    #[test]
    fn the_report_of_llvm_cov_is_read() {
        let text = r#"{"data": [{"files": [{"filename": "/w/a.rs", "summary":
            {"lines": {"count": 4, "covered": 2, "percent": 50.0}, "branches": {}}}],
            "totals": {}}], "type": "llvm.coverage.json.export", "version": "3.0.1"}"#;
        let export: Export = serde_json::from_str(text).unwrap();
        let file = &export.data[0].files[0];
        assert_eq!(file.summary.lines.covered, 2);
    }
}
