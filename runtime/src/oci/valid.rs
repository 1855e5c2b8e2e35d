//! Configurations that are invalid whatever the guest is like: refused before there is one. Wordings are those of runc,
//! where it has any.

use super::net_devices::net_devices_of;
use super::{namespaces, unified};
use crate::Error;
use oci_spec::runtime::{
    LinuxCpu, LinuxMemory, LinuxNamespaceType, LinuxResources, LinuxSchedulerPolicy, Process, Spec,
};

/// Checks a configuration.
///
/// # Errors
/// The invalid field.
pub(super) fn check(spec: &Spec) -> Result<(), Error> {
    if !spec.version().starts_with("1.") {
        let reason = format!("{:?} is not supported, only 1.x", spec.version());
        return Err(Error::invalid("ociVersion", reason));
    }
    if let Some(process) = spec.process() {
        check_process(process)?;
    }
    check_names(spec)?;
    let Some(linux) = spec.linux() else {
        return Ok(());
    };
    net_devices_of(spec)?;
    check_users(spec)?;
    check_clocks(spec)?;
    check_sysctls(spec)?;
    linux.resources().as_ref().map_or(Ok(()), check_resources)
}

fn has(spec: &Spec, kind: LinuxNamespaceType) -> bool {
    namespaces::all(spec).any(|namespace| namespace.typ() == kind)
}

fn check_process(process: &Process) -> Result<(), Error> {
    const ADJUSTMENTS: std::ops::RangeInclusive<i32> = -1000..=1000;
    let limits = process.rlimits().as_deref().unwrap_or_default();
    for (index, limit) in limits.iter().enumerate() {
        if limits[..index]
            .iter()
            .any(|other| other.typ() == limit.typ())
        {
            let reason = format!("{}: there are two limits of this type", limit.typ());
            return Err(Error::invalid("process.rlimits", reason));
        }
        if limit.soft() > limit.hard() {
            let (kind, soft, hard) = (limit.typ(), limit.soft(), limit.hard());
            let reason = format!("{kind}: the soft limit {soft} is above the hard limit {hard}");
            return Err(Error::invalid("process.rlimits", reason));
        }
    }
    if let Some(adjustment) = process.oom_score_adj()
        && !ADJUSTMENTS.contains(&adjustment)
    {
        let reason = format!("{adjustment} is outside -1000 to 1000");
        return Err(Error::invalid("process.oomScoreAdj", reason));
    }
    if let Some(io) = process.io_priority()
        && !(0..=7).contains(&io.priority())
    {
        let reason = format!("the priority {} is outside 0 to 7", io.priority());
        return Err(Error::invalid("process.ioPriority", reason));
    }
    check_capabilities(process)?;
    check_scheduler(process)
}

/// The rule of capset(2). A set that is not given is empty.
fn check_capabilities(process: &Process) -> Result<(), Error> {
    let Some(sets) = process.capabilities() else {
        return Ok(());
    };
    let permitted = sets.permitted().as_ref();
    let mut effective: Vec<_> = sets.effective().iter().flatten().collect();
    effective.retain(|capability| permitted.is_none_or(|all| !all.contains(capability)));
    // The order of a set is not fixed.
    let Some(capability) = effective.iter().map(ToString::to_string).min() else {
        return Ok(());
    };
    let reason = format!("CAP_{capability} is effective, but not permitted");
    Err(Error::invalid("process.capabilities", reason))
}

/// The rules of sched_setattr(2).
fn check_scheduler(process: &Process) -> Result<(), Error> {
    let Some(scheduler) = process.scheduler() else {
        return Ok(());
    };
    let wrong = |reason: &str| Err(Error::invalid("process.scheduler", reason));
    let policy = *scheduler.policy();
    let is_set = |value: Option<u64>| value.is_some_and(|value| value != 0);
    let has_nice = [
        LinuxSchedulerPolicy::SchedOther,
        LinuxSchedulerPolicy::SchedBatch,
    ];
    let has_priority = [
        LinuxSchedulerPolicy::SchedFifo,
        LinuxSchedulerPolicy::SchedRr,
    ];
    if has_nice.contains(&policy) && !(-20..=19).contains(&scheduler.nice().unwrap_or(0)) {
        return wrong("a nice value is outside -20 to 19");
    }
    if !has_priority.contains(&policy) && scheduler.priority().unwrap_or(0) != 0 {
        return wrong("only SCHED_FIFO and SCHED_RR have a priority");
    }
    let times = [
        scheduler.runtime(),
        scheduler.deadline(),
        scheduler.period(),
    ];
    if policy != LinuxSchedulerPolicy::SchedDeadline && times.into_iter().any(|t| is_set(*t)) {
        return wrong("only SCHED_DEADLINE has a runtime, a deadline and a period");
    }
    match policy == LinuxSchedulerPolicy::SchedDeadline {
        true => check_deadline(times.map(|time| *time)),
        false => Ok(()),
    }
}

/// The rules of sched(7), and the ranges of the kernel (Linux, kernel/sched/deadline.c): times in nanoseconds. A period of 0
/// is that of the deadline. The wording is crun's, since runc has none.
fn check_deadline([runtime, deadline, period]: [Option<u64>; 3]) -> Result<(), Error> {
    const TIMES: std::ops::RangeInclusive<u64> = 1 << 10..=i64::MAX as u64;
    let wrong = |what: String| {
        let reason = format!("sched_setattr: `SCHED_DEADLINE` {what}");
        Err(Error::invalid("process.scheduler", reason))
    };
    let needed = |name: &str, time: Option<u64>| match time {
        None => Err(format!("requires `{name}`")),
        Some(0) => Err(format!("{name} must be greater than 0")),
        Some(time) => Ok(time),
    };
    let both = needed("runtime", runtime).and_then(|r| Ok((r, needed("deadline", deadline)?)));
    let (runtime, deadline) = match both {
        Ok(both) => both,
        Err(what) => return wrong(what),
    };
    let period = period.filter(|period| *period != 0).unwrap_or(deadline);
    if runtime > deadline {
        return wrong(format!(
            "runtime ({runtime}) must be <= deadline ({deadline})"
        ));
    }
    if deadline > period {
        return wrong(format!(
            "deadline ({deadline}) must be <= period ({period})"
        ));
    }
    let all = [
        ("runtime", runtime),
        ("deadline", deadline),
        ("period", period),
    ];
    match all.into_iter().find(|(_, time)| !TIMES.contains(time)) {
        Some((name, time)) => {
            let (least, most) = (TIMES.start(), TIMES.end());
            wrong(format!(
                "{name} ({time}) must be between {least} and {most}"
            ))
        }
        None => Ok(()),
    }
}

fn check_names(spec: &Spec) -> Result<(), Error> {
    let names = [
        ("hostname", spec.hostname().as_deref()),
        ("domainname", spec.domainname().as_deref()),
    ];
    for (field, name) in names {
        if name.is_some() && !has(spec, LinuxNamespaceType::Uts) {
            let reason = format!("unable to set {field} without a private UTS namespace");
            return Err(Error::invalid(field, reason));
        }
    }
    Ok(())
}

fn check_users(spec: &Spec) -> Result<(), Error> {
    let linux = spec.linux().as_ref();
    let lists = [
        (
            "linux.uidMappings",
            linux.and_then(|l| l.uid_mappings().as_ref()),
        ),
        (
            "linux.gidMappings",
            linux.and_then(|l| l.gid_mappings().as_ref()),
        ),
    ];
    let is_mapped = has(spec, LinuxNamespaceType::User);
    // An existing one has been mapped.
    let needs_mappings = is_mapped && !namespaces::is_joined(spec, LinuxNamespaceType::User);
    for (field, list) in lists {
        let is_empty = list.is_none_or(|list| list.is_empty());
        if !is_mapped && !is_empty {
            let reason = "user namespace mappings specified, but user namespace isn't enabled";
            return Err(Error::invalid(field, reason));
        }
        if needs_mappings && is_empty {
            let reason = "a user namespace needs mappings";
            return Err(Error::invalid(field, reason));
        }
    }
    Ok(())
}

fn check_clocks(spec: &Spec) -> Result<(), Error> {
    const FIELD: &str = "linux.timeOffsets";
    let linux = spec.linux().as_ref();
    let offsets = linux.and_then(|linux| linux.time_offsets().as_ref());
    if offsets.is_none_or(|offsets| offsets.is_empty()) {
        return Ok(());
    }
    if !has(spec, LinuxNamespaceType::Time) {
        let reason = "time namespace offsets specified, but time namespace isn't enabled";
        return Err(Error::invalid(FIELD, reason));
    }
    if namespaces::is_joined(spec, LinuxNamespaceType::Time) {
        let reason = "both a time namespace by its path and offsets are specified";
        return Err(Error::invalid(FIELD, reason));
    }
    Ok(())
}

/// Sysctls of an IPC namespace, besides those of message queues (ipc_namespaces(7)).
const IPC: [&str; 8] = [
    "kernel.msgmax",
    "kernel.msgmnb",
    "kernel.msgmni",
    "kernel.sem",
    "kernel.shmall",
    "kernel.shmmax",
    "kernel.shmmni",
    "kernel.shm_rmid_forced",
];

/// A sysctl must be of a namespace that the container has.
fn check_sysctls(spec: &Spec) -> Result<(), Error> {
    let linux = spec.linux().as_ref();
    let all = linux.and_then(|linux| linux.sysctl().as_ref());
    for (name, value) in all.into_iter().flatten() {
        let name = name.replace('/', ".");
        let wrong = |why: &str| {
            let reason = format!("sysctl {name:?} {why}");
            Err(Error::invalid("linux.sysctl", reason))
        };
        if IPC.contains(&name.as_str()) || name.starts_with("fs.mqueue.") {
            if !has(spec, LinuxNamespaceType::Ipc) {
                return wrong("is not allowed in the hosts ipc namespace");
            }
        } else if name.starts_with("user.") {
            if !has(spec, LinuxNamespaceType::User) {
                return wrong("is not allowed without a user namespace");
            }
        } else if name == "kernel.hostname" {
            return wrong("is not allowed as it conflicts with the OCI \"hostname\" field");
        } else if name == "kernel.domainname" {
            if !has(spec, LinuxNamespaceType::Uts) {
                return wrong("is not in a separate kernel namespace");
            }
            let own = spec.domainname().as_deref().filter(|own| !own.is_empty());
            if own.is_some_and(|own| own != value) {
                return wrong("conflicts with the OCI \"domainname\" field");
            }
        } else if !name.starts_with("net.") {
            return wrong("is not in a separate kernel namespace");
        }
    }
    Ok(())
}

/// Checks limits by themselves, those of a configuration and those of an update.
///
/// # Errors
/// The invalid or unsupported limit, by name.
pub fn check_resources(resources: &LinuxResources) -> Result<(), Error> {
    if let Some(memory) = resources.memory() {
        check_memory(memory)?;
    }
    if let Some(cpu) = resources.cpu() {
        check_cpu(cpu)?;
    }
    check_rdma(resources)?;
    unified::check(resources)
}

/// Refuses limits of RDMA devices.
///
/// # Errors
/// The limit, by name.
fn check_rdma(resources: &LinuxResources) -> Result<(), Error> {
    const REASON: &str = "a guest has no RDMA devices";
    if resources.rdma().as_ref().is_some_and(|all| !all.is_empty()) {
        return Err(Error::unsupported("linux.resources.rdma", REASON));
    }
    let mut files = resources.unified().iter().flatten();
    match files.find(|(file, _)| file.starts_with("rdma.")) {
        Some((file, _)) => {
            let reason = format!("{file}: {REASON}");
            Err(Error::unsupported("linux.resources.unified", reason))
        }
        None => Ok(()),
    }
}

fn check_memory(memory: &LinuxMemory) -> Result<(), Error> {
    let wrong = |reason: String| Err(Error::invalid("linux.resources.memory", reason));
    let values = [
        ("limit", memory.limit()),
        ("swap", memory.swap()),
        ("reservation", memory.reservation()),
    ];
    for (name, value) in values {
        if let Some(value) = value.filter(|value| *value < -1) {
            return wrong(format!("{name}: {value} is not an amount"));
        }
    }
    let positive = |value: Option<i64>| value.filter(|value| *value > 0);
    match (positive(memory.limit()), positive(memory.swap())) {
        (Some(limit), Some(swap)) if swap < limit => wrong(format!(
            "memory+swap limit {swap} should be >= memory limit {limit}"
        )),
        (None, Some(_)) if memory.limit() != Some(-1) => {
            wrong("unable to set swap limit without memory limit".into())
        }
        _ => Ok(()),
    }
}

/// The ranges of the kernel, in microseconds (Linux, kernel/sched/core.c).
fn check_cpu(cpu: &LinuxCpu) -> Result<(), Error> {
    const LEAST: u64 = 1000;
    const PERIODS: std::ops::RangeInclusive<u64> = LEAST..=1_000_000;
    let wrong = |reason: String| Err(Error::invalid("linux.resources.cpu", reason));
    if let Some(period) = cpu.period().filter(|period| *period != 0)
        && !PERIODS.contains(&period)
    {
        return wrong(format!("the period {period} is outside 1000 to 1000000 µs"));
    }
    let quota = cpu.quota().and_then(|quota| u64::try_from(quota).ok());
    match quota.filter(|quota| *quota != 0) {
        Some(quota) if quota < LEAST => wrong(format!("the quota {quota} is below 1000 µs")),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    /// What is said of a configuration with this value at a JSON pointer; empty if it is valid.
    fn said(pointer: &str, value: Value) -> String {
        let mut spec = json!({
            "ociVersion": "1.0.2", "hostname": "h", "domainname": "d",
            "process": {"cwd": "/", "user": {"uid": 0, "gid": 0}, "args": ["sh"]},
            "linux": {"resources": {}, "namespaces": [{"type": "uts"}, {"type": "ipc"}, {"type": "mount"}]},
        });
        let (parent, name) = pointer.rsplit_once('/').unwrap();
        spec.pointer_mut(parent).unwrap()[name] = value;
        let spec = serde_json::from_value(spec).unwrap();
        check(&spec).map_or_else(|error| error.to_string(), |()| String::new())
    }

    fn namespaces(kinds: &[&str]) -> Value {
        Value::from_iter(kinds.iter().map(|kind| json!({"type": kind})))
    }

    fn deadline(runtime: u64, deadline: u64, period: u64) -> Value {
        json!({"policy": "SCHED_DEADLINE", "runtime": runtime, "deadline": deadline, "period": period})
    }

    #[test]
    fn what_is_wrong_is_named_before_there_is_a_guest() {
        let limits = |soft: u64| json!([{"type": "RLIMIT_NOFILE", "soft": soft, "hard": 8}]);
        let one = json!([{"containerID": 0, "hostID": 1000, "size": 1}]);
        for (pointer, value, expected) in [
            ("/ociVersion", json!("9.0.0"), "ociVersion: \"9.0.0\""),
            (
                "/process/rlimits",
                limits(9),
                "RLIMIT_NOFILE: the soft limit 9",
            ),
            (
                "/process/rlimits",
                json!([limits(7)[0], limits(8)[0]]),
                "RLIMIT_NOFILE: there are two",
            ),
            ("/process/oomScoreAdj", json!(1001), "1001 is outside"),
            (
                "/process/ioPriority",
                json!({"class": "IOPRIO_CLASS_BE", "priority": 8}),
                "the priority 8",
            ),
            (
                "/process/capabilities",
                json!({"effective": ["CAP_KILL", "CAP_CHOWN"], "permitted": ["CAP_KILL"]}),
                "CAP_CHOWN is effective, but not permitted",
            ),
            (
                "/process/capabilities",
                json!({"effective": ["CAP_KILL"]}),
                "CAP_KILL is effective",
            ),
            (
                "/process/scheduler",
                json!({"policy": "SCHED_OTHER", "nice": 20}),
                "a nice value",
            ),
            (
                "/process/scheduler",
                json!({"policy": "SCHED_OTHER", "priority": 1}),
                "have a priority",
            ),
            (
                "/process/scheduler",
                json!({"policy": "SCHED_FIFO", "priority": 1, "runtime": 1}),
                "only SCHED_DEADLINE",
            ),
            (
                "/process/scheduler",
                deadline(0, 2000, 2000),
                "runtime must be greater than 0",
            ),
            (
                "/process/scheduler",
                deadline(2000, 0, 2000),
                "deadline must be greater than 0",
            ),
            (
                "/process/scheduler",
                json!({"policy": "SCHED_DEADLINE", "deadline": 2000}),
                "sched_setattr: `SCHED_DEADLINE` requires `runtime`",
            ),
            (
                "/process/scheduler",
                json!({"policy": "SCHED_DEADLINE", "runtime": 2000}),
                "requires `deadline`",
            ),
            (
                "/process/scheduler",
                deadline(1023, 2000, 0),
                "runtime (1023) must be between 1024 and 9223372036854775807",
            ),
            (
                "/process/scheduler",
                deadline(3000, 2000, 4000),
                "runtime (3000) must be <= deadline (2000)",
            ),
            (
                "/process/scheduler",
                deadline(1024, 4000, 2000),
                "deadline (4000) must be <= period (2000)",
            ),
            (
                "/process/scheduler",
                deadline(1024, 1 << 63, 0),
                "deadline (9223372036854775808) must be between",
            ),
            (
                "/linux/namespaces",
                namespaces(&["ipc"]),
                "hostname: unable",
            ),
            ("/linux/uidMappings", one, "user namespace isn't enabled"),
            (
                "/linux/namespaces",
                namespaces(&["uts", "user"]),
                "needs mappings",
            ),
            (
                "/linux/timeOffsets",
                json!({"monotonic": {"secs": 1, "nanosecs": 0}}),
                "time namespace isn't enabled",
            ),
            (
                "/linux/sysctl",
                json!({"kernel.foo": "1"}),
                "separate kernel namespace",
            ),
            (
                "/linux/sysctl",
                json!({"kernel/hostname": "a"}),
                "conflicts",
            ),
            (
                "/linux/sysctl",
                json!({"kernel.domainname": "a"}),
                "\"domainname\" field",
            ),
            (
                "/linux/sysctl",
                json!({"user.max_user_namespaces": "1"}),
                "user namespace",
            ),
            (
                "/linux/resources/memory",
                json!({"limit": 20, "swap": 10}),
                "memory+swap limit 10 should be >= memory limit 20",
            ),
            (
                "/linux/resources/memory",
                json!({"swap": 10}),
                "without memory limit",
            ),
            (
                "/linux/resources/memory",
                json!({"limit": -2}),
                "-2 is not an amount",
            ),
            (
                "/linux/resources/cpu",
                json!({"period": 100}),
                "the period 100",
            ),
            (
                "/linux/resources/cpu",
                json!({"quota": 999}),
                "the quota 999",
            ),
            (
                "/linux/resources/rdma",
                json!({"mlx5_1": {"hcaHandles": 3}}),
                "linux.resources.rdma",
            ),
            (
                "/linux/resources/unified",
                json!({"rdma.max": "mlx5_1 hca_handle=3"}),
                "rdma.max: a guest has no",
            ),
        ] {
            let said = said(pointer, value);
            assert!(said.contains(expected), "{pointer}: {said:?}");
        }
    }

    #[test]
    fn what_only_looks_wrong_is_valid() {
        let limits = json!([{"type": "RLIMIT_NOFILE", "soft": 8, "hard": 8}]);
        for (pointer, value) in [
            ("/ociVersion", json!("1.2.1")),
            ("/process/rlimits", limits),
            ("/process/oomScoreAdj", json!(-1000)),
            ("/process/capabilities", json!({"permitted": ["CAP_KILL"]})),
            (
                "/process/scheduler",
                json!({"policy": "SCHED_FIFO", "priority": 1}),
            ),
            (
                "/linux/sysctl",
                json!({"kernel/msgmax": "1", "net.ipv4.ip_forward": "1"}),
            ),
            ("/linux/sysctl", json!({"kernel.domainname": "d"})),
            ("/process/scheduler", deadline(1024, 1024, 1024)),
            ("/process/scheduler", deadline(1024, 2000, 0)),
            ("/linux/timeOffsets", json!({})),
            ("/linux/resources/memory", json!({"limit": 10, "swap": 0})),
            ("/linux/resources/memory", json!({"limit": -1, "swap": -1})),
            ("/linux/resources/memory", json!({"limit": 10, "swap": -1})),
            ("/linux/resources/cpu", json!({"period": 0, "quota": -1})),
            (
                "/linux/resources/cpu",
                json!({"quota": 1000, "period": 1_000_000}),
            ),
            ("/linux/resources/rdma", json!({})),
            ("/linux/resources/unified", json!({"memory.high": "1"})),
        ] {
            assert_eq!(said(pointer, value), "", "{pointer}");
        }
    }
}
