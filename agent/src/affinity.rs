//! CPU affinity of exec processes (`process.execCPUAffinity`).

use anyhow::{Context, Result};
use koya_protocol::{ErrorReason, cpus};
use oci_spec::runtime::{ExecCPUAffinity, Process};
use rustix::io::Errno;
use rustix::thread::{CpuSet, sched_setaffinity};

/// CPUs before the process joins the container's control group, and afterwards.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Affinity {
    initial: Option<String>,
    last: Option<String>,
}

impl Affinity {
    /// Takes it from the configuration of a process; the default is the container's.
    pub(crate) fn take(process: &mut Process, containers: Option<ExecCPUAffinity>) -> Self {
        let own = process.exec_cpu_affinity().clone();
        process.set_exec_cpu_affinity(None);
        let found = own.or(containers).unwrap_or_default();
        Self {
            initial: found.initial().clone(),
            last: found.cpu_affinity_final().clone(),
        }
    }

    /// Sets the initial affinity for this process and those that it starts.
    pub(crate) fn begin(&self) -> Result<()> {
        self.initial.as_deref().map_or(Ok(()), set)
    }

    /// Sets the final affinity for this process, which is in the container's control group.
    pub(crate) fn end(&self) -> Result<()> {
        self.last.as_deref().map_or(Ok(()), set)
    }
}

fn set(list: &str) -> Result<()> {
    let invalid = |why: String| ErrorReason::Invalid(format!("process.execCPUAffinity: {why}"));
    let mut wanted = CpuSet::new();
    for cpu in cpus::parse(list).map_err(invalid)? {
        wanted.set(cpu);
    }
    match sched_setaffinity(None, &wanted) {
        Err(Errno::INVAL) => {
            let why = format!("none of the CPUs {list} is one that the process may have");
            Err(invalid(why).into())
        }
        set => set.context("cannot set the CPUs of a process"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::thread::sched_getaffinity;
    use serde_json::json;

    fn process(affinity: serde_json::Value) -> Process {
        let process =
            json!({"cwd": "/", "user": {"uid": 0, "gid": 0}, "execCPUAffinity": affinity});
        serde_json::from_value(process).unwrap()
    }

    #[test]
    fn a_process_has_its_own_or_the_containers() {
        let container = process(json!({"initial": "0", "final": "1"}));
        let container = || container.exec_cpu_affinity().clone();
        let mut own = process(json!({"final": "2-3"}));
        let found = Affinity::take(&mut own, container());
        assert_eq!(
            (found.initial.as_deref(), found.last.as_deref()),
            (None, Some("2-3"))
        );
        assert!(own.exec_cpu_affinity().is_none());
        let found = Affinity::take(&mut own, container());
        assert_eq!(
            (found.initial.as_deref(), found.last.as_deref()),
            (Some("0"), Some("1"))
        );
        assert_eq!(Affinity::take(&mut own, None), Affinity::default());
    }

    #[test]
    fn cpus_that_are_not_there_are_refused_by_name() {
        let thread = std::thread::spawn(|| {
            let allowed = sched_getaffinity(None).unwrap();
            let first = (0..cpus::MAX_CPUS)
                .find(|cpu| allowed.is_set(*cpu))
                .unwrap();
            set(&format!("{first},1023")).unwrap();
            assert_eq!(sched_getaffinity(None).unwrap().count(), 1);
            set("1023").unwrap_err().to_string()
        });
        let said = thread.join().unwrap();
        assert!(
            said.contains("execCPUAffinity") && said.contains("1023"),
            "{said}"
        );
    }
}
