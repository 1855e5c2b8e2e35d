//! Limits of `koya-runtime` containers in the control group on the host, compared with those of runc.

use crate::oci::{Runtime, bundle, text};
use crate::tool::feed;
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;

crate::trials!(
    limits_of_cpus_and_disks_are_the_hosts_too,
    limits_are_changed_as_by_runc,
    the_lowest_limits_do_not_prevent_a_creation,
    a_guest_grows_with_its_limit_of_memory,
    a_group_is_kept_until_its_container_is_deleted
);

fn group(name: &str) -> std::path::PathBuf {
    Path::new("/sys/fs/cgroup").join(name)
}

fn limit(name: &str, file: &str) -> Result<String> {
    let path = group(name).join(file);
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    Ok(text.trim().to_owned())
}

/// A block device of the host.
fn disk() -> Result<(u64, u64)> {
    let text = fs::read_to_string("/proc/partitions")?;
    let mut lines = text.lines().skip(2);
    let first = lines.next().context("the host has no disk")?;
    let mut words = first.split_whitespace();
    let mut number = || Ok(words.next().context("no number")?.parse()?);
    let number: Result<(u64, u64)> = number().and_then(|major| Ok((major, number()?)));
    number
}

fn limits_of_cpus_and_disks_are_the_hosts_too() -> Result<()> {
    const NAME: &str = "koya-oci-limits";
    let (major, minor) = disk()?;
    let with = |resources: Value| {
        bundle("exec sleep 1000", |config| {
            config["linux"]["cgroupsPath"] = format!("/{NAME}").into();
            config["linux"]["resources"] = resources;
        })
    };
    let rate = |rate: u64| json!([{"major": major, "minor": minor, "rate": rate}]);
    let limited = with(json!({
        "cpu": {"quota": 50_000, "period": 200_000, "shares": 1024},
        "memory": {"limit": 256 << 20},
        "blockIO": {"throttleReadBpsDevice": rate(10_485_760), "throttleWriteIOPSDevice": rate(900)},
    }))?;
    let runtimes = [Runtime::koya()?, Runtime::new("runc")?];
    let mut told = Vec::new();
    for runtime in &runtimes {
        runtime.ok(&["run", "-d", "--bundle", text(&limited)?, "limits-l"])?;
        told.push([limit(NAME, "cpu.max")?, limit(NAME, "io.max")?]);
        if runtime.is_koya() {
            ensure!(limit(NAME, "cpu.weight")? == "100");
            // The overhead of the virtual machine is added.
            ensure!(limit(NAME, "memory.max")?.parse::<u64>()? > 256 << 20);
        }
        runtime.ok(&["delete", "--force", "limits-l"])?;
    }
    ensure!(told[0] == told[1], "{told:?}");
    ensure!(told[0][0] == "50000 200000", "{told:?}");
    ensure!(told[0][1].ends_with("wiops=900"), "{told:?}");

    let named = with(json!({"unified": {
        "cpu.max": "10000 100000", "cpu.weight": "42", "memory.high": "209715200",
        "io.max": format!("{major}:{minor} riops=333\n"),
    }}))?;
    let [koya, _] = &runtimes;
    koya.ok(&["run", "-d", "--bundle", text(&named)?, "limits-n"])?;
    for (file, expected) in [
        ("cpu.max", "10000 100000"),
        ("cpu.weight", "42"),
        ("memory.high", "max"),
    ] {
        let found = limit(NAME, file)?;
        ensure!(found == expected, "{file}: {found}");
    }
    let io = limit(NAME, "io.max")?;
    ensure!(io.contains("riops=333"), "{io}");
    let within = "cat /sys/fs/cgroup/memory.high /sys/fs/cgroup/cpu.max";
    let within = koya.ok(&["exec", "limits-n", "sh", "-c", within])?;
    ensure!(within == "209715200\n10000 100000", "{within}");
    koya.ok(&["delete", "--force", "limits-n"])?;

    // Nothing else would enforce it.
    let absent = json!([{"major": 250, "minor": 99, "rate": 1}]);
    let absent = with(json!({"blockIO": {"throttleReadBpsDevice": absent}}))?;
    // Already by `create`, which has no virtual machine yet.
    for command in ["run", "create"] {
        let refused = koya.call(&[command, "--bundle", text(&absent)?, "limits-a"])?;
        let said = String::from_utf8_lossy(&refused.stderr);
        ensure!(
            !refused.status.success() && said.contains("io.max: 250:99 rbps=1"),
            "{command}: {said}"
        );
        ensure!(!group(NAME).exists(), "{command}: a group is left");
    }
    Ok(())
}

/// opencontainers/runc 4210 and 3509, and cases of its own tests.
fn limits_are_changed_as_by_runc() -> Result<()> {
    const NAME: &str = "koya-oci-changed";
    let changed = bundle("exec sleep 1000", |config| {
        config["linux"]["cgroupsPath"] = format!("/{NAME}").into();
        config["linux"]["resources"] = json!({
            "cpu": {"shares": 100, "quota": 500_000, "period": 1_000_000},
            "memory": {"limit": 64 << 20},
        });
    })?;
    let mut told = Vec::new();
    let runtimes = [Runtime::koya()?, Runtime::new("runc")?];
    for runtime in &runtimes {
        runtime.ok(&["run", "-d", "--bundle", text(&changed)?, "limits-u"])?;
        let mut seen = vec![limit(NAME, "cpu.max")?];
        for words in [
            &["--cpu-period", "900000"][..],
            &["--cpu-quota", "600000"],
            &["--cpu-quota", "-1"],
            &["--cpu-period", "100000", "--cpu-quota", "30000"],
            &["--memory", "100M", "--memory-swap", "150M"],
            &["--memory-swap", "-1"],
        ] {
            runtime.ok(&[&["update"], words, &["limits-u"]].concat())?;
            seen.push(limit(NAME, "cpu.max")?);
        }
        told.push(seen);
    }
    ensure!(told[0] == told[1], "{told:?}");
    let [koya, runc] = &runtimes;
    runc.ok(&["delete", "--force", "limits-u"])?;
    let expected = [
        "500000 1000000",
        "500000 900000",
        "600000 900000",
        "max 900000",
        "30000 100000",
        "30000 100000",
        "30000 100000",
    ];
    ensure!(told[0] == expected, "{told:?}");
    // A third of an emulated CPU would have to plug memory and start the process.
    koya.ok(&["update", "--cpu-quota", "-1", "limits-u"])?;
    let memory = koya.ok(&["exec", "limits-u", "cat", "/sys/fs/cgroup/memory.max"])?;
    ensure!(memory == (100 << 20).to_string(), "{memory}");

    koya.ok(&["update", "--cpu-burst", "20000", "limits-u"])?;
    koya.ok(&["update", "--cpu-idle", "1", "limits-u"])?;
    ensure!(limit(NAME, "cpu.idle")? == "1");
    for bad in ["-1", "2"] {
        let refused = koya.call(&["update", "--cpu-idle", bad, "limits-u"])?;
        ensure!(!refused.status.success(), "--cpu-idle {bad}");
    }
    ensure!(limit(NAME, "cpu.idle")? == "1");
    let refused = koya.call(&["update", "--cpu-rt-runtime", "500", "limits-u"])?;
    let said = String::from_utf8_lossy(&refused.stderr);
    ensure!(said.contains("cgroup v2 has no such limits"), "{said}");

    let low = json!({"memory": {"limit": 1024, "checkBeforeUpdate": true}});
    let update = koya.command(&["update", "--resources", "-", "limits-u"]);
    let refused = feed(update, low.to_string().as_bytes())?;
    let said = String::from_utf8_lossy(&refused.stderr);
    ensure!(
        !refused.status.success() && said.contains("rejecting memory limit 1024 <= usage"),
        "{said}"
    );
    ensure!(koya.is("limits-u", "running")?.is_some(), "it was killed");
    koya.ok(&["delete", "--force", "limits-u"])?;
    Ok(())
}

/// As by runc since 1.4, 0 processes means 1. The limits are set when the container's process waits for its start.
fn the_lowest_limits_do_not_prevent_a_creation() -> Result<()> {
    const NAME: &str = "koya-oci-low";
    let runtime = Runtime::koya()?;
    let read = "/sys/fs/cgroup/pids.max";
    for (limits, expected) in [
        (json!({"pids": {"limit": 0}}), "1"),
        (json!({"unified": {"pids.max": "1"}}), "1"),
        (json!({"pids": {"limit": -1}}), "max"),
        (json!({"pids": {}}), "max"),
    ] {
        let low = bundle("exec sleep 1000", |config| {
            config["linux"]["resources"] = limits.clone();
        })?;
        runtime.ok(&["run", "-d", "--bundle", text(&low)?, "limits-p"])?;
        let found = runtime.ok(&["exec", "limits-p", "cat", read])?;
        ensure!(found == expected, "{limits}: {found}");
        runtime.ok(&["delete", "--force", "limits-p"])?;
    }
    let slow = bundle("exec sleep 1000", |config| {
        config["linux"]["cgroupsPath"] = format!("/{NAME}").into();
        config["linux"]["resources"] = json!({"cpu": {"quota": 3000, "period": 100_000}});
    })?;
    runtime.ok(&["create", "--bundle", text(&slow)?, "limits-s"])?;
    runtime.ok(&["start", "limits-s"])?;
    let set = limit(NAME, "cpu.max")?;
    ensure!(set == "3000 100000", "{set}");
    ensure!(runtime.is("limits-s", "running")?.is_some());
    runtime.ok(&["delete", "--force", "limits-s"])?;
    Ok(())
}

fn a_guest_grows_with_its_limit_of_memory() -> Result<()> {
    const NAME: &str = "koya-oci-grows";
    let runtime = Runtime::koya()?;
    let small = bundle("exec sleep 1000", |config| {
        config["linux"]["cgroupsPath"] = format!("/{NAME}").into();
        config["linux"]["resources"] = json!({"memory": {"limit": 100 << 20}});
    })?;
    runtime.ok(&["run", "-d", "--bundle", text(&small)?, "limits-m"])?;
    runtime.ok(&["update", "--memory", "400M", "limits-m"])?;
    let script = "cat /sys/fs/cgroup/memory.max
        awk '/^MemTotal/ { print ($2 >= 400 * 1024) }' /proc/meminfo
        dd if=/dev/zero of=/dev/null bs=250M count=1 2>/dev/null && echo used";
    let said = runtime.ok(&["exec", "limits-m", "sh", "-c", script])?;
    ensure!(said == format!("{}\n1\nused", 400 << 20), "{said}");
    let hosts: u64 = limit(NAME, "memory.max")?.parse()?;
    ensure!(hosts > 400 << 20, "{hosts}");
    runtime.ok(&["update", "--memory", "100M", "limits-m"])?;
    let said = runtime.ok(&["exec", "limits-m", "cat", "/sys/fs/cgroup/memory.max"])?;
    ensure!(said == (100 << 20).to_string(), "{said}");
    runtime.ok(&["delete", "--force", "limits-m"])?;
    Ok(())
}

fn a_group_is_kept_until_its_container_is_deleted() -> Result<()> {
    const NAME: &str = "koya-oci-kept";
    let short = bundle("exit 3", |config| {
        config["linux"]["cgroupsPath"] = format!("/{NAME}").into();
    })?;
    let runtime = Runtime::koya()?;
    let ran = runtime.call(&["run", "--keep", "--bundle", text(&short)?, "limits-k"])?;
    ensure!(ran.status.code() == Some(3), "{ran:?}");
    ensure!(runtime.is("limits-k", "stopped")?.is_some());
    ensure!(limit(NAME, "cgroup.procs")?.is_empty(), "it is not empty");
    runtime.ok(&["delete", "limits-k"])?;
    ensure!(!group(NAME).exists(), "it is left");
    let ran = runtime.call(&["run", "--bundle", text(&short)?, "limits-r"])?;
    ensure!(ran.status.code() == Some(3), "{ran:?}");
    ensure!(!group(NAME).exists(), "it is left by run");
    Ok(())
}
