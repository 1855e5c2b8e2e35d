//! `update`: changes the limits of a running container.

use crate::Outcome;
use crate::cli::UpdateArgs;
use crate::ipc::{Request, send_request};
use crate::state::{Root, Status};
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::io::Read;

/// Maximum size of the input: larger than any configuration.
const MAX_RESOURCES: u64 = 1 << 20;

pub(crate) fn update(root: &Root, args: &UpdateArgs) -> Outcome {
    let resources = resources(args)?;
    let (container, _lock) = root.lock(&args.id)?;
    if container.status() == Status::Stopped {
        bail!("container not running");
    }
    send_request(&container, Request::Update(resources))?;
    Ok(0)
}

fn resources(args: &UpdateArgs) -> Result<Value> {
    let is_set = |option: &Option<String>| option.as_ref().is_some_and(|text| !text.is_empty());
    // In runc's wording.
    if is_set(&args.l3_cache_schema) {
        bail!("Intel RDT/CAT: l3 cache schema is not enabled");
    }
    if is_set(&args.mem_bw_schema) {
        bail!("Intel RDT/MBA: memory bandwidth schema is not enabled");
    }
    if let Some(file) = &args.resources {
        let mut text = String::new();
        let read = match file.as_str() {
            "-" => std::io::stdin()
                .take(MAX_RESOURCES)
                .read_to_string(&mut text),
            file => std::fs::File::open(file)
                .and_then(|file| file.take(MAX_RESOURCES).read_to_string(&mut text)),
        };
        read.with_context(|| format!("cannot read {file}"))?;
        return serde_json::from_str(&text).with_context(|| format!("{file}: not understood"));
    }
    if args.cpu_rt_period.is_some() || args.cpu_rt_runtime.is_some() {
        bail!("--cpu-rt-period, --cpu-rt-runtime: cgroup v2 has no such limits");
    }
    if args.kernel_memory.is_some() || args.kernel_memory_tcp.is_some() {
        log::warn!("Kernel memory settings are ignored and will be removed");
    }
    let section = |pairs: Vec<(&str, Option<Value>)>| {
        let pairs = pairs.into_iter();
        let pairs = pairs.filter_map(|(name, value)| Some((name.to_owned(), value?)));
        Value::Object(pairs.collect())
    };
    let cpu = section(vec![
        ("quota", args.cpu_quota.map(Value::from)),
        ("period", args.cpu_period.map(Value::from)),
        ("shares", args.cpu_share.map(Value::from)),
        ("burst", args.cpu_burst.map(Value::from)),
        ("idle", args.cpu_idle.map(Value::from)),
        ("cpus", args.cpuset_cpus.clone().map(Value::from)),
        ("mems", args.cpuset_mems.clone().map(Value::from)),
    ]);
    let memory = section(vec![
        ("limit", args.memory.map(Value::from)),
        ("reservation", args.memory_reservation.map(Value::from)),
        ("swap", args.memory_swap.map(Value::from)),
    ]);
    let io = section(vec![("weight", args.blkio_weight.map(Value::from))]);
    let mut all = json!({});
    for (name, section) in [("cpu", cpu), ("memory", memory), ("blockIO", io)] {
        if section
            .as_object()
            .is_some_and(|section| !section.is_empty())
        {
            all[name] = section;
        }
    }
    if let Some(limit) = args.pids_limit {
        all["pids"] = json!({"limit": limit});
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use clap::Parser;

    #[test]
    fn options_are_resources() {
        let parsed = |words: &[&str]| {
            let words = ["koya-runtime", "update"].iter().chain(words).chain(&["c"]);
            match Cli::try_parse_from(words).unwrap().command {
                Command::Update(args) => resources(&args),
                _ => panic!("another command"),
            }
        };
        let of = |words: &[&str]| parsed(words).unwrap();
        assert_eq!(
            of(&[
                "--kernel-memory",
                "50M",
                "--kernel-memory-tcp",
                "-1",
                "--mem-bw-schema",
                ""
            ]),
            json!({})
        );
        for option in ["--l3-cache-schema", "--mem-bw-schema"] {
            let said = parsed(&[option, "L3:0=f"]).unwrap_err().to_string();
            assert!(said.starts_with("Intel RDT/"), "{said}");
        }
        assert_eq!(of(&[]), json!({}));
        assert_eq!(
            of(&[
                "--memory",
                "50M",
                "--memory-swap",
                "-1",
                "--pids-limit",
                "-1",
                "--cpu-share",
                "7"
            ]),
            json!({"memory": {"limit": 50 << 20, "swap": -1}, "pids": {"limit": -1}, "cpu": {"shares": 7}})
        );
        assert_eq!(
            of(&[
                "--cpu-burst",
                "5000",
                "--cpu-idle",
                "-1",
                "--blkio-weight",
                "300"
            ]),
            json!({"cpu": {"burst": 5000, "idle": -1}, "blockIO": {"weight": 300}})
        );
    }
}
