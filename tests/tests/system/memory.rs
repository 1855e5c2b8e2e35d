//! Memory and CPUs as seen by guest and host.

use crate::tool::{Background, koya, sh, stdout, until};
use anyhow::{Context, Result, ensure};
use serde_json::Value;

crate::trials![
    freed_memory_goes_back_to_the_host,
    the_guest_has_what_was_asked_for,
    a_guest_grows_and_shrinks,
    memory_comes_and_goes_again,
    memory_may_be_a_files,
    cpus_are_turned_on_and_off,
    time_that_others_had_is_stolen_time,
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

const MEM_TOTAL: &str = "awk '/MemTotal/ { print $2 }' /proc/meminfo";

fn the_guest_has_what_was_asked_for() -> Result<()> {
    // All memory of the machine, as the guest kernel has printed it.
    let all = r"dmesg | sed -n 's|.*Memory: [0-9]*K/\([0-9]*\)K available.*|\1|p'";
    for (memory, cpus) in [(128u64, "1"), (300, "2"), (3500, "4")] {
        let size = memory.to_string();
        let options = ["--memory", &size, "--cpus", cpus, "--privileged"];
        let said = sh(&options, &format!("{MEM_TOTAL}; {all}"))?;
        let mut numbers = said.lines().map(|line| line.parse::<u64>());
        let kib = numbers.next().context("no MemTotal")??;
        if let Some(Ok(ram)) = numbers.next() {
            let ram = ram.div_ceil(1024);
            eprintln!("memory: ({ram}, {cpus}, {kib}), a row for runtime/src/size.rs");
        }
        let range = memory * 1024..=(memory + 8) * 1024;
        ensure!(range.contains(&kib), "{memory} MiB asked for: {kib} KiB");
    }
    Ok(())
}

fn a_guest_grows_and_shrinks() -> Result<()> {
    let name = "memory-grows";
    let options = ["--memory", "256m", "--memory-max", "1g"];
    let container = Background::start(name, &options, &["sleep", "1000"])?;
    let total = || -> Result<u64> {
        let said = stdout(container.exec(&[], &["sh", "-c", MEM_TOTAL])?)?;
        Ok(said.parse::<u64>()? / 1024)
    };
    let update = |size: &str| koya(["update", "--memory", size, name]).output();
    ensure!(stdout(update("1g")?)? == "1 CPUs, 1024 MiB of memory");
    ensure!((1024..=1032).contains(&total()?), "{}", total()?);
    // The memory is usable: it holds more than the initial size.
    let fill = "dd if=/dev/zero bs=400M count=1 | md5sum";
    let sum = stdout(container.exec(&[], &["sh", "-c", fill])?)?;
    ensure!(sum.starts_with("61eabaf2bf278703738b433ff884c91f"), "{sum}");
    ensure!(stdout(update("512m")?)? == "1 CPUs, 512 MiB of memory");
    ensure!((512..=520).contains(&total()?), "{}", total()?);
    // Below the initial size, a balloon takes the rest.
    ensure!(stdout(update("160m")?)? == "1 CPUs, 160 MiB of memory");
    until("the rest is the host's", || {
        Ok((number(&stats(name)?, "host_guest")? < 170 * MIB).then_some(()))
    })?;
    ensure!(stdout(update("256m")?)? == "1 CPUs, 256 MiB of memory");
    let refused = update("2g")?;
    let said = String::from_utf8_lossy(&refused.stderr);
    ensure!(said.contains("32 to 1024"), "{said}");
    Ok(())
}

/// Each round adds memory slots to the running guest and removes them.
fn memory_comes_and_goes_again() -> Result<()> {
    let name = "memory-again";
    let options = ["--memory", "192m", "--memory-max", "900m"];
    let container = Background::start(name, &options, &["sleep", "1000"])?;
    let update = |size: &str| stdout(koya(["update", "--memory", size, name]).output()?);
    let on_host = || -> Result<u64> { number(&stats(name)?, "host_guest") };
    for round in 0..3 {
        let said = update("900m")?;
        ensure!(said == "1 CPUs, 900 MiB of memory", "{round}: {said}");
        let fill = "dd if=/dev/zero bs=400M count=1 | md5sum";
        let sum = stdout(container.exec(&[], &["sh", "-c", fill])?)?;
        ensure!(sum.starts_with("61eabaf2bf278703738b433ff884c91f"), "{sum}");
        // The guest kernel may keep some blocks that it can't migrate.
        let out = koya(["update", "--memory", "192m", name]).output()?;
        let said = String::from_utf8_lossy(&out.stdout);
        let left = said
            .split(' ')
            .nth(2)
            .and_then(|mib| mib.parse::<u64>().ok());
        ensure!(left.is_some_and(|mib| mib <= 224), "{round}: {said}");
        until("what was plugged is the host's", || {
            Ok((on_host()? < 252 * MIB).then_some(()))
        })?;
    }
    Ok(())
}

fn memory_may_be_a_files() -> Result<()> {
    let name = "memory-file";
    let options = [
        "--memory-backing",
        "memfd",
        "--memory",
        "512m",
        "--memory-max",
        "1g",
        "--tmpfs",
        "/tmp",
        "--huge-pages",
        "transparent",
    ];
    let container = Background::start(name, &options, &["sleep", "1000"])?;
    stdout(koya(["update", "--memory", "1g", name]).output()?)?;
    let on_host = || -> Result<u64> { number(&stats(name)?, "host_guest") };
    let before = on_host()?;
    let fill = "head -c 209715200 /dev/zero > /tmp/file";
    stdout(container.exec(&[], &["sh", "-c", fill])?)?;
    ensure!(on_host()? >= before + 190 * MIB);
    container.exec(&[], &["rm", "/tmp/file"])?;
    until("nine tenths are back", || {
        Ok((on_host()? <= before + 20 * MIB).then_some(()))
    })
}

fn cpus_are_turned_on_and_off() -> Result<()> {
    let name = "cpus";
    let options = ["--cpus", "1", "--cpus-max", "3", "--cpu-pin", "0,0,0"];
    let container = Background::start(name, &options, &["sleep", "1000"])?;
    let online = || stdout(container.exec(&[], &["nproc"])?);
    ensure!(online()? == "1", "{}", online()?);
    for count in ["3", "2", "1", "3"] {
        let said = stdout(koya(["update", "--cpus", count, name]).output()?)?;
        ensure!(said.starts_with(&format!("{count} CPUs")), "{said}");
        ensure!(online()? == count, "{}", online()?);
    }
    let refused = koya(["update", "--cpus", "4", name]).output()?;
    let said = String::from_utf8_lossy(&refused.stderr);
    ensure!(said.contains("1 to 3"), "{said}");
    Ok(())
}

/// Two vCPUs that never sleep share one CPU of the host.
fn time_that_others_had_is_stolen_time() -> Result<()> {
    let script = "yes > /dev/null & yes > /dev/null & sleep 5; \
                  awk '/^cpu / { print $5, $9 }' /proc/stat";
    let said = sh(&["--cpus", "2", "--cpu-pin", "0,0"], script)?;
    let (idle, stolen) = said.split_once(' ').context("no times")?;
    let (idle, stolen): (u64, u64) = (idle.parse()?, stolen.parse()?);
    // In hundredths of a second: some 500 of 1000.
    ensure!(stolen >= 100, "stolen: {stolen}, idle: {idle}");
    Ok(())
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
    ensure!((512 * MIB..=520 * MIB).contains(&total), "{row}");
    let (overhead, guest) = (number(&row, "host_overhead")?, number(&row, "host_guest")?);
    ensure!(
        overhead > 0 && overhead < 64 * MIB && guest < 540 * MIB,
        "{row}"
    );
    ensure!(
        number(&row, "cpu_ms")? > 0 && number(&row, "processes")? > 1,
        "{row}"
    );
    // busybox itself was read.
    ensure!(number(&row, "file_requests")? > 10, "{row}");
    ensure!(number(&row, "file_read")? > 100_000, "{row}");
    let missing = koya(["stats", "nobody"]).output()?;
    ensure!(missing.status.code() == Some(125), "{missing:?}");
    Ok(())
}
