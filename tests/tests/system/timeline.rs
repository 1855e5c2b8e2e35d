//! `koya timeline`: the steps of a start and their times, also after a failure.

use crate::tool::{koya, run, scratch, stdout};
use anyhow::{Context, Result, ensure};
use serde_json::Value;

crate::trials![
    a_start_is_kept_and_drawn,
    a_start_that_failed_says_where_and_why,
];

/// The stored timeline of a start.
pub(crate) fn timeline(id: &str) -> Result<Value> {
    let text = stdout(koya(["timeline", id, "--json"]).output()?)?;
    Ok(serde_json::from_str(&text)?)
}

/// Names of steps or marks, in order.
fn names<'t>(timeline: &'t Value, of: &str) -> Vec<&'t str> {
    let all = timeline[of].as_array().into_iter().flatten();
    all.filter_map(|one| one["name"].as_str()).collect()
}

fn a_start_is_kept_and_drawn() -> Result<()> {
    stdout(run(&["--name", "timeline-one"], &["true"])?)?;
    let kept = timeline("timeline-one")?;
    let steps = names(&kept, "steps");
    let expected = [
        "prepare", "devices", "machine", "kernel", "agent", "settings", "create", "start",
    ];
    ensure!(steps == expected, "{kept}");
    // One clock: each step begins at the end of the previous one, or later.
    let steps = kept["steps"].as_array().context("steps")?;
    let time = |step: &Value, name: &str| step[name].as_u64().with_context(|| kept.to_string());
    for two in steps.windows(2) {
        ensure!(
            time(&two[0], "to_us")? <= time(&two[1], "from_us")?,
            "{kept}"
        );
    }
    // Of the builder, exits, drivers, and the agent.
    let marks = names(&kept, "marks");
    let expected = [
        "kernel loaded",
        "first MMIO exit",
        "virtio-fs",
        "virtio-vsock",
        "file systems mounted",
        "shares mounted",
        "made in the guest",
    ];
    for mark in expected {
        ensure!(marks.contains(&mark), "no {mark}: {kept}");
    }
    ensure!(kept["exits"]["mmio"].as_u64() > Some(10), "{kept}");

    // By a prefix of its name, as text, as SVG, and in the list.
    let text = stdout(koya(["timeline", "timeline-on"]).output()?)?;
    ensure!(
        text.contains("\nkernel ") && text.contains("MMIO exits"),
        "{text}"
    );
    let picture = scratch("timeline")?.join("start.svg");
    let file = picture.to_str().context("a path in UTF-8")?;
    stdout(koya(["timeline", "timeline-one", "--svg", file]).output()?)?;
    let svg = std::fs::read_to_string(&picture)?;
    ensure!(
        svg.starts_with("<svg ") && svg.contains(">guest kernel<"),
        "{svg}"
    );
    let list = stdout(koya(["timeline", "--list"]).output()?)?;
    let row = list.lines().find(|row| row.starts_with("timeline-one "));
    ensure!(row.is_some_and(|row| row.ends_with("started")), "{list}");
    let output = koya(["timeline", "nobody"]).output()?;
    ensure!(output.status.code() == Some(125), "{output:?}");
    Ok(())
}

fn a_start_that_failed_says_where_and_why() -> Result<()> {
    let options = [
        "--name",
        "timeline-panic",
        "--kernel-args",
        "quiet rdinit=/nowhere",
    ];
    let output = run(&options, &["true"])?;
    ensure!(output.status.code() == Some(125), "{output:?}");
    let text = stdout(koya(["timeline", "timeline-panic"]).output()?)?;
    ensure!(text.contains("kernel FAILED"), "{text}");
    ensure!(
        text.contains("failed in kernel after") && text.contains("panic"),
        "{text}"
    );
    ensure!(
        names(&timeline("timeline-panic")?, "marks").contains(&"reset"),
        "{text}"
    );

    // A missing root or volume is an error before a start is recorded.
    let missing = "/bin/busybox/timeline";
    let volume = format!("/etc:{missing}");
    let options = ["--name", "timeline-root", "-v", &volume];
    let output = run(&options, &["true"])?;
    ensure!(output.status.code() == Some(125), "{output:?}");
    let kept = timeline("timeline-root")?;
    let last = kept["steps"].as_array().and_then(|steps| steps.last());
    let last = last.context("no steps")?;
    let error = last["error"].as_str().unwrap_or_default();
    ensure!(
        last["name"] == "create" && error.contains(missing),
        "{kept}"
    );
    let svg = stdout(koya(["timeline", "timeline-root", "--svg", "-"]).output()?)?;
    ensure!(svg.contains("failed in create of timeline-root"), "{svg}");
    Ok(())
}
