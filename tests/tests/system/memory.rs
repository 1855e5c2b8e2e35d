//! Memory and CPU as guest and host see them.

use crate::tool::{Background, koya, stdout, until};
use anyhow::{Context, Result, ensure};
use serde_json::Value;

crate::trials![
    freed_memory_goes_back_to_the_host,
    stats_name_each_container
];

const MIB: u64 = 1 << 20;

fn stats(name: &str) -> Result<Value> {
    let printed = stdout(koya(["stats", "--json", name]).output()?)?;
    let rows: Value = serde_json::from_str(&printed)?;
    let row = rows.as_array().and_then(|rows| rows.first());
    row.cloned().context("no row")
}

fn number(row: &Value, key: &str) -> Result<u64> {
    row[key]
        .as_u64()
        .with_context(|| format!("no {key} in {row}"))
}

fn freed_memory_goes_back_to_the_host() -> Result<()> {
    let options = ["--memory", "1g", "--tmpfs", "/tmp"];
    let container = Background::start("memory-back", &options, &["sleep", "1000"])?;
    let on_host = || -> Result<u64> { number(&stats("memory-back")?, "host_guest") };
    let before = on_host()?;
    let fill = "head -c 419430400 /dev/zero > /tmp/file";
    let filled = container.exec(&[], &["sh", "-c", fill])?;
    ensure!(filled.status.success(), "{filled:?}");
    let full = on_host()?;
    ensure!(full >= before + 380 * MIB, "{before}, then {full}");
    container.exec(&[], &["rm", "/tmp/file"])?;
    until("nine tenths are back", || {
        Ok((on_host()? <= before + 40 * MIB).then_some(()))
    })
}

fn stats_name_each_container() -> Result<()> {
    let _first = Background::start("stats-1", &[], &["sleep", "1000"])?;
    let _second = Background::start("stats-2", &["--memory", "512m"], &["sleep", "1000"])?;
    let table = stdout(koya(["stats"]).output()?)?;
    ensure!(
        table.contains("stats-1") && table.contains("stats-2"),
        "{table}"
    );
    let row = stats("stats-2")?;
    let total = number(&row, "guest_total")?;
    ensure!((450 * MIB..=512 * MIB).contains(&total), "{row}");
    let (overhead, guest) = (number(&row, "host_overhead")?, number(&row, "host_guest")?);
    ensure!(
        overhead > 0 && overhead < 64 * MIB && guest < 512 * MIB,
        "{row}"
    );
    ensure!(
        number(&row, "cpu_ms")? > 0 && number(&row, "processes")? > 1,
        "{row}"
    );
    let missing = koya(["stats", "nobody"]).output()?;
    ensure!(missing.status.code() == Some(125), "{missing:?}");
    Ok(())
}
