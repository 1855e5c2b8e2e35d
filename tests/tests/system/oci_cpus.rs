//! The CPUs of processes that `koya-runtime` adds to a container.

use crate::oci::{Runtime, bundle, text};
use crate::tool::{scratch, stdout};
use anyhow::{Result, ensure};
use serde_json::{Value, json};
use std::fs;

crate::trials!(an_exec_has_the_cpus_that_it_asks_for);

fn an_exec_has_the_cpus_that_it_asks_for() -> Result<()> {
    let runtime = Runtime::koya()?;
    let bundle = bundle("exec sleep 1000", |config| {
        config["process"]["execCPUAffinity"] = json!({"initial": "0", "final": "1"});
        config["linux"]["resources"]["cpu"] = json!({"quota": 200_000, "period": 100_000});
    })?;
    runtime.ok(&["run", "-d", "--bundle", text(&bundle)?, "cpus-c"])?;
    let file = scratch("oci-process")?.join("process.json");
    let exec = |affinity: Value| {
        let args = ["grep", "Cpus_allowed_list", "/proc/self/status"];
        let process = json!({"args": args, "cwd": "/", "execCPUAffinity": affinity});
        fs::write(&file, process.to_string())?;
        runtime.call(&["exec", "--process", text(&file)?, "cpus-c"])
    };
    // The first process may use all.
    let first = runtime.ok(&[
        "exec",
        "cpus-c",
        "grep",
        "Cpus_allowed_list",
        "/proc/1/status",
    ])?;
    ensure!(first.ends_with("\t0-1"), "{first}");
    let like_the_containers = [
        "exec",
        "cpus-c",
        "grep",
        "Cpus_allowed_list",
        "/proc/self/status",
    ];
    let said = runtime.ok(&like_the_containers)?;
    ensure!(said.ends_with("\t1"), "{said}");
    for (affinity, expected) in [
        (Value::Null, "1"),
        (json!({"initial": "0"}), "0"),
        (json!({"initial": "1", "final": "0-1"}), "0-1"),
        (json!({"final": "0,7"}), "0"),
    ] {
        let said = stdout(exec(affinity.clone())?)?;
        ensure!(
            said.ends_with(&format!("\t{expected}")),
            "{affinity}: {said}"
        );
    }
    for (affinity, expected) in [
        (json!({"initial": "7"}), "none of the CPUs 7"),
        (json!({"final": "6-7"}), "none of the CPUs 6-7"),
        (json!({"final": "1-0"}), "has its end first"),
    ] {
        let refused = exec(affinity.clone())?;
        let said = String::from_utf8_lossy(&refused.stderr);
        let names = said.contains("process.execCPUAffinity") && said.contains(expected);
        ensure!(
            !refused.status.success() && names,
            "{affinity}: {refused:?}"
        );
    }
    runtime.ok(&["delete", "--force", "cpus-c"])?;
    Ok(())
}
