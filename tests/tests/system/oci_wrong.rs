//! Configurations that are invalid, or only look so: where runc and crun agree whether they accept one, `koya-runtime`
//! does the same. The cases are those of the test suites of runc, crun and youki. Whatever can be known without a guest is
//! refused by `create`, where a container with a new network namespace has no virtual machine yet.

use crate::oci::{Runtime, bundle, text};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::path::Path;

crate::trials!(what_others_refuse_is_refused);

/// Change of a configuration: a JSON pointer (RFC 6901) and the new value; null removes the old one.
type Change = (&'static str, Value);

fn cases() -> Vec<(&'static str, Vec<Change>)> {
    let namespaces = |kinds: &[&str]| {
        let kinds = kinds.iter();
        Value::from_iter(kinds.map(|kind| json!({"type": kind})))
    };
    let most = ["pid", "network", "mount"];
    let with = |more: &[&'static str]| namespaces(&[&most[..], more].concat());
    let mapping = |host: i64| json!([{"containerID": 0, "hostID": host, "size": 1}]);
    let one = |pointer: &'static str, value: Value| vec![(pointer, value)];
    let hook = |hook: Value| one("/hooks/createRuntime", json!([hook]));
    let mount = |mount: Value| one("/mounts/-", mount);
    vec![
        ("as it is", vec![]),
        (
            "an unknown sysctl",
            one("/linux/sysctl", json!({"kernel.foo": "1"})),
        ),
        (
            "a sysctl of no kind",
            one("/linux/sysctl", json!({"bar.baz": "1"})),
        ),
        (
            "the host name by sysctl",
            one("/linux/sysctl", json!({"kernel.hostname": "a"})),
        ),
        (
            "a sysctl of IPC without its namespace",
            vec![
                ("/linux/namespaces", with(&["uts"])),
                ("/linux/sysctl", json!({"kernel.msgmax": "8192"})),
            ],
        ),
        (
            "message queues without a namespace of IPC",
            vec![
                ("/linux/namespaces", with(&["uts"])),
                ("/linux/sysctl", json!({"fs.mqueue.queues_max": "100"})),
            ],
        ),
        (
            "a sysctl of IPC",
            one("/linux/sysctl", json!({"kernel.msgmax": "8192"})),
        ),
        (
            "a host name without its namespace",
            one("/linux/namespaces", with(&["ipc"])),
        ),
        (
            "a namespace of no kind",
            one("/linux/namespaces/-", json!({"type": "koya"})),
        ),
        (
            "a namespace twice",
            one("/linux/namespaces/-", json!({"type": "pid"})),
        ),
        (
            "a namespace that is not there",
            one(
                "/linux/namespaces/-",
                json!({"type": "time", "path": "/proc/none/ns/time"}),
            ),
        ),
        (
            "a mapping to no user",
            vec![
                ("/linux/namespaces/-", json!({"type": "user"})),
                ("/linux/uidMappings", mapping(-1)),
                ("/linux/gidMappings", mapping(-1)),
            ],
        ),
        ("no arguments", one("/process/args", json!([]))),
        ("no process", one("/process", Value::Null)),
        (
            "a relative working directory",
            one("/process/cwd", "tmp".into()),
        ),
        ("no working directory", one("/process/cwd", Value::Null)),
        ("an empty working directory", one("/process/cwd", "".into())),
        (
            "a user of no number",
            one("/process/user/uid", "root".into()),
        ),
        ("a negative user", one("/process/user/uid", (-1).into())),
        (
            "a limit of no kind",
            one(
                "/process/rlimits",
                json!([{"type": "RLIMIT_KOYA", "soft": 1, "hard": 1}]),
            ),
        ),
        (
            "a limit below its own",
            one(
                "/process/rlimits",
                json!([{"type": "RLIMIT_NOFILE", "soft": 9, "hard": 8}]),
            ),
        ),
        (
            "no such adjustment",
            one("/process/oomScoreAdj", 2000.into()),
        ),
        (
            "a root that is not there",
            one("/root", json!({"path": "none"})),
        ),
        ("a root of no path", one("/root", json!({"path": ""}))),
        ("no root", one("/root", Value::Null)),
        (
            "a propagation of no kind",
            one("/linux/rootfsPropagation", "koya".into()),
        ),
        (
            "a personality of no kind",
            one("/linux/personality", json!({"domain": "KOYA"})),
        ),
        (
            "a filter of no kind",
            one("/linux/seccomp", json!({"defaultAction": "SCMP_ACT_KOYA"})),
        ),
        (
            "a filter of an unknown call",
            one(
                "/linux/seccomp",
                json!({"defaultAction": "SCMP_ACT_ALLOW",
                "syscalls": [{"names": ["koya"], "action": "SCMP_ACT_ERRNO"}]}),
            ),
        ),
        (
            "a device of no kind",
            one(
                "/linux/devices",
                json!([{"path": "/dev/x", "type": "k", "major": 1, "minor": 3}]),
            ),
        ),
        (
            "a device at a relative path",
            [
                one(
                    "/linux/devices",
                    json!([{"path": "x", "type": "c", "major": 1, "minor": 3}]),
                ),
                one("/root/readonly", json!(false)),
            ]
            .concat(),
        ),
        (
            "a file system of no kind",
            mount(json!({"destination": "/tmp", "type": "koyafs", "source": "none"})),
        ),
        (
            "a destination with dots",
            mount(
                json!({"destination": "/none/../tmp", "type": "bind", "source": "/tmp", "options": ["bind"]}),
            ),
        ),
        (
            "a program of the working directory by an empty entry of PATH",
            vec![
                ("/process/cwd", "/bin".into()),
                ("/process/env", json!(["PATH=/none:"])),
            ],
        ),
        (
            "a source that is not there",
            mount(
                json!({"destination": "/tmp", "type": "bind", "source": "/none", "options": ["bind"]}),
            ),
        ),
        (
            "a directory at a file",
            mount(
                json!({"destination": "/etc/passwd", "type": "bind", "source": "/tmp", "options": ["bind"]}),
            ),
        ),
        (
            "a file at a directory",
            mount(
                json!({"destination": "/tmp", "type": "bind", "source": "/etc/hosts", "options": ["bind"]}),
            ),
        ),
        (
            "an option of no kind",
            mount(
                json!({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["koya"]}),
            ),
        ),
        (
            "CPUs that the host does not have",
            one("/linux/resources/cpu", json!({"cpus": "0-5000"})),
        ),
        (
            "CPUs of no number",
            one("/linux/resources/cpu", json!({"cpus": "koya"})),
        ),
        ("no user", one("/process/user", Value::Null)),
        ("a filter of nothing", one("/linux/seccomp", json!({}))),
        ("a hook at a relative path", hook(json!({"path": "true"}))),
        (
            "a hook of no time",
            hook(json!({"path": "/bin/true", "timeout": 0})),
        ),
        (
            "a hook of a negative time",
            hook(json!({"path": "/bin/true", "timeout": -1})),
        ),
        ("a hook that is not there", hook(json!({"path": "/none"}))),
        (
            "a path that is masked and not there",
            one("/linux/maskedPaths/-", "/none".into()),
        ),
        (
            "a path that is masked by a relative name",
            one("/linux/maskedPaths/-", "none".into()),
        ),
        (
            "a path that is read-only and not there",
            one("/linux/readonlyPaths/-", "/none".into()),
        ),
        (
            "more swap and memory than memory alone",
            one(
                "/linux/resources/memory",
                json!({"limit": 1 << 26, "swap": 1 << 25}),
            ),
        ),
        (
            "too short a period",
            one("/linux/resources/cpu", json!({"period": 100, "quota": 100})),
        ),
        (
            "a share of none",
            one("/linux/resources/cpu", json!({"shares": 0})),
        ),
        (
            "no limit of processes",
            one("/linux/resources/pids", json!({"limit": -1})),
        ),
        (
            "a limit of no processes",
            one("/linux/resources/pids", json!({"limit": 0})),
        ),
        (
            "a limit of one process",
            one("/linux/resources/pids", json!({"limit": 1})),
        ),
        (
            "a limit of processes without a number",
            one("/linux/resources/pids", json!({})),
        ),
        // Less than a tenth of an emulated CPU would take minutes.
        (
            "the least time of a CPU",
            one(
                "/linux/resources/cpu",
                json!({"quota": 1000, "period": 10_000}),
            ),
        ),
        (
            "swap without a limit of memory",
            one("/linux/resources/memory", json!({"swap": 1 << 26})),
        ),
        (
            "another time without its namespace",
            one(
                "/linux/timeOffsets",
                json!({"monotonic": {"secs": 1, "nanosecs": 0}}),
            ),
        ),
        (
            "a filter that asks a program of the host",
            one(
                "/linux/seccomp",
                json!({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/none",
                "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_NOTIFY"}]}),
            ),
        ),
        (
            "a file of no controller",
            one("/linux/resources/unified", json!({"koya.max": "1"})),
        ),
        (
            "a file that its controller has not",
            one("/linux/resources/unified", json!({"memory.koya": "1"})),
        ),
        (
            "a path among files",
            one("/linux/resources/unified", json!({"../memory.max": "1"})),
        ),
        (
            "an unknown capability",
            one("/process/capabilities/bounding/-", "CAP_KOYA".into()),
        ),
        (
            "a scheduler of no kind",
            one("/process/scheduler", json!({"policy": "SCHED_KOYA"})),
        ),
        ("no version", one("/ociVersion", Value::Null)),
        ("an unknown version", one("/ociVersion", "9.0.0".into())),
        ("what nobody knows", one("/koya", json!({"a": 1}))),
    ]
}

/// Sets or removes a value, or appends to a list (`-`).
fn change(config: &mut Value, (pointer, value): &Change) -> Result<()> {
    let (parent, name) = pointer.rsplit_once('/').context("a pointer")?;
    let mut place = config;
    for part in parent.split('/').skip(1) {
        place = &mut place[part];
    }
    match (place, value) {
        (Value::Array(list), value) => list.push(value.clone()),
        (place @ Value::Null, value) if name == "-" => *place = json!([value]),
        (Value::Object(map), Value::Null) => drop(map.remove(name)),
        (place, value) => place[name] = value.clone(),
    }
    Ok(())
}

/// Cases that the versions in Debian 12 accept, since they do not know the property, and later ones refuse: runc since 1.2
/// (`process.scheduler`, `linux.timeOffsets`).
const LATER_REFUSED: [&str; 2] = [
    "a scheduler of no kind",
    "another time without its namespace",
];

/// Cases that only a guest can judge, those of its file systems and control groups, or that only the kernel of the host can:
/// sets of CPUs are written to the sandbox's control group when there is a guest.
const GUESTS: [&str; 5] = [
    "an option of no kind",
    "a file of no controller",
    "a file that its controller has not",
    "CPUs that the host does not have",
    "CPUs of no number",
];

fn what_others_refuse_is_refused() -> Result<()> {
    let runtimes = ["koya-runtime", "runc", "crun"];
    let runtimes = runtimes.map(Runtime::new);
    let mut differences = Vec::new();
    for (name, changes) in cases() {
        let mut failed = Ok(());
        let bundle = bundle("true", |config| {
            failed = changes.iter().try_for_each(|one| change(config, one));
        })?;
        failed?;
        let mut told = Vec::new();
        for runtime in &runtimes {
            let runtime = runtime
                .as_ref()
                .map_err(|error| anyhow::anyhow!("{error}"))?;
            told.push(run(runtime, &bundle)?);
        }
        let [koya, runc, crun] = told.as_slice() else {
            continue;
        };
        let agreed = (runc.0 == crun.0).then_some(runc.0);
        let expected = match LATER_REFUSED.contains(&name) {
            true => Some(false),
            false => agreed,
        };
        if expected.is_some_and(|expected| koya.0 != expected) {
            differences.push(format!("{name}: {koya:?}, runc {runc:?}, crun {crun:?}"));
        }
        if !koya.0 && !GUESTS.contains(&name) && is_created(&runtimes[0], &bundle)? {
            differences.push(format!("{name}: is refused only at the start: {koya:?}"));
        }
    }
    ensure!(differences.is_empty(), "{}", differences.join("\n"));
    Ok(())
}

/// Whether `create` accepts it.
fn is_created(runtime: &Result<Runtime>, bundle: &Path) -> Result<bool> {
    let runtime = runtime.as_ref();
    let runtime = runtime.map_err(|error| anyhow::anyhow!("{error}"))?;
    let created = runtime.call(&["create", "--bundle", text(bundle)?, "early"])?;
    runtime.call(&["delete", "--force", "early"])?;
    Ok(created.status.success())
}

/// Whether it ran, and its error output.
fn run(runtime: &Runtime, bundle: &Path) -> Result<(bool, String)> {
    let output = runtime.call(&["run", "--bundle", text(bundle)?, "w"])?;
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    let left = std::fs::read_dir(&runtime.root)?.flatten();
    let left = left.filter(|entry| entry.path().join("state.json").exists());
    ensure!(
        !runtime.is_koya() || left.count() == 0,
        "it is left: {said}"
    );
    runtime.call(&["delete", "--force", "w"])?;
    Ok((output.status.success(), said))
}
