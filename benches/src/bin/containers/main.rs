//! Duration of a container that prints a line, under Koya, runc and crun, alternating: by the runtime's own command line, by
//! `ctr run` with the steps of Koya's start, by `podman run` and by `docker run`.
//!
//! `containers ROUNDS CONTAINERD DOCKER`: CONTAINERD and DOCKER are directories with their programs. Run by `cargo xtask bench
//! containers`, in the rig. Rows are printed as JSON on standard output, and a table on standard error.

mod daemons;
mod engines;

use daemons::{Containerd, Docker};
use engines::{Engine, Files, Podman, Runtimes};
use koya_benches::{median, print_table, row};
use serde_json::Value;
use std::error::Error;
use std::path::Path;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// The steps reported by the shim, in order.
const STEPS: &[&str] = &[
    "devices", "machine", "kernel", "agent", "settings", "create", "start",
];

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().collect();
    let [_, rounds, containerd, docker] = args.as_slice() else {
        return Err("say ROUNDS CONTAINERD DOCKER".into());
    };
    let rounds: u32 = rounds.parse()?;
    let files = Files::create()?;
    let mut rows = Vec::new();
    rows.push(compare(&Runtimes::new(&files)?, rounds)?.0);
    {
        let containerd = Containerd::start(&files, Path::new(containerd))?;
        let (whole, median) = compare(&containerd, rounds)?;
        rows.push(whole);
        rows.extend(steps(&containerd.log()?, median));
    }
    rows.push(compare(&Podman::new(&files)?, rounds)?.0);
    let docker = Docker::start(&files, Path::new(docker))?;
    rows.push(compare(&docker, rounds)?.0);
    print_table(&rows);
    println!("{}", serde_json::to_string_pretty(&rows)?);
    Ok(())
}

/// A row with the medians of `rounds` containers of each runtime, and Koya's median.
fn compare(engine: &impl Engine, rounds: u32) -> Result<(Value, f64)> {
    let mut koya = Vec::new();
    let peers = engine.peers().iter().map(|peer| (*peer, Vec::new()));
    let mut peers: Vec<_> = peers.collect();
    for round in 0..=rounds {
        let all = std::iter::once(("koya", &mut koya));
        for (runtime, times) in all.chain(peers.iter_mut().map(|(name, times)| (*name, times))) {
            let took = engine.run(runtime, &format!("{runtime}-{round}"))?;
            // The first of each fills caches.
            if round > 0 {
                eprintln!("round {round}: {}, {runtime}: {took:.1} ms", engine.name());
                times.push(took);
            }
        }
    }
    let beside = peers.iter();
    let beside = beside.map(|(name, times)| ((*name).to_owned(), median(times)));
    let name = format!("{}: to its end", engine.name());
    let koya = median(&koya);
    Ok((row(&name, "ms", true, koya, beside), koya))
}

/// Rows for the steps of Koya's starts in the shim's log, and for the rest of the median `whole`.
fn steps(log: &str, whole: f64) -> Vec<Value> {
    let mut rows = Vec::new();
    let mut known = 0.0;
    for step in STEPS {
        // The first start is not counted, as in `compare`.
        let values: Vec<f64> = step_times(log, step).skip(1).collect();
        if !values.is_empty() {
            let median = median(&values);
            known += median;
            rows.push(row(&format!("of it {step}"), "ms", true, median, []));
        }
    }
    let rest = "of it ctr, containerd, the shim, and the end";
    rows.push(row(rest, "ms", true, whole - known, []));
    rows
}

/// Parses the shim's log line: `the start of NAME: devices 3.1 ms, machine 20.4 ms, ...`.
fn step_times<'a>(log: &'a str, step: &'a str) -> impl Iterator<Item = f64> + 'a {
    let lines = log
        .lines()
        .filter_map(|line| line.split_once("the start of "));
    let parts = lines.flat_map(|(_, rest)| rest.split_once(": ").into_iter());
    let parts = parts.flat_map(|(_, parts)| parts.split(", "));
    parts.filter_map(move |part| {
        let value = part.strip_prefix(step)?.trim().strip_suffix(" ms")?;
        value.parse().ok()
    })
}
