//! `delete`: containerd's last call for a container, after every end, orderly or not.
//!
//! The shim may have ended, may be about to end, or may serve other containers of its pod: only a shim that belongs to this
//! container and does not reply is killed here. Its mounts disappear with it: it mounts only in its own mount namespace.

use crate::events::timestamp;
use crate::flags::Flags;
use crate::launch::{self, PID_FILE};
use crate::service::SERVED_AS;
use anyhow::Result;
use containerd_shim_protos::api::{ConnectRequest, DeleteResponse, ShutdownRequest};
use containerd_shim_protos::shim_sync::Client;
use koya::confinement::{VIOLATION_STATUS, violation};
use koya_tasks::{Role, Spec, cgroup, hooks};
use protobuf::Message;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

/// Time limit for a shim to reply, and to end.
const ANSWER_LIMIT: Duration = Duration::from_secs(1);
const GONE_LIMIT: Duration = Duration::from_millis(1500);
/// Status of a container whose end was not observed: killed.
const KILLED: u32 = 137;
/// The same, after a violation.
const VIOLATION: u32 = VIOLATION_STATUS as u32;

pub(crate) fn delete(flags: &Flags) -> Result<()> {
    let bundle = flags.bundle()?;
    let socket = launch::socket(flags, &flags.id);
    let shim = shim_of(&bundle);
    let mut is_gone = true;
    if socket.exists() {
        let client = Client::connect(&format!("unix://{}", socket.display())).ok();
        let answers = |client: &Client| request(client, "Connect", &connect(&flags.id));
        match client.filter(answers) {
            // It ends if it has no container left.
            Some(client) => {
                is_gone = false;
                _ = request(&client, "Shutdown", &ShutdownRequest::new());
            }
            None => {
                if let Some(pid) = shim {
                    end(pid);
                }
                fs::remove_file(&socket).ok();
            }
        }
    }
    // A living shim runs them itself.
    if is_gone && let Err(error) = hooks::run_overdue(&flags.id, &bundle) {
        eprintln!("{error}");
    }
    // A process can't remove its own group, and the kernel takes a moment to notice that it has left.
    if let Some(group) = Spec::read(&bundle).ok().and_then(|spec| spec.cgroup()) {
        let started = Instant::now();
        while group.exists() && started.elapsed() < GONE_LIMIT {
            cgroup::remove(&group);
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    // A shim that still serves others has not ended by one.
    let reason = is_gone
        .then(|| reason(&flags.id, &flags.namespace, &bundle))
        .flatten();
    if let Some(reason) = &reason {
        // containerd's log.
        eprintln!("{reason}");
    }
    let response = DeleteResponse {
        pid: shim.map_or(0, |pid| pid.as_raw_nonzero().get() as u32),
        exit_status: reason.map_or(KILLED, |_| VIOLATION),
        exited_at: Some(timestamp(SystemTime::now())).into(),
        ..Default::default()
    };
    Ok(std::io::stdout().write_all(&response.write_to_bytes()?)?)
}

/// The violation that ended the container's sandbox. The sandbox of a pod reports in the bundle of the pod's own container,
/// beside those of the others.
fn reason(id: &str, namespace: &str, bundle: &Path) -> Option<String> {
    let role = || Some(Spec::read_of(bundle, namespace).ok()?.role(id));
    violation(bundle).or_else(|| match role()? {
        Role::Member { sandbox } if koya::is_id(&sandbox) => {
            violation(&bundle.parent()?.join(sandbox))
        }
        _ => None,
    })
}

/// The shim that was started for the container, if the process is still a shim.
fn shim_of(bundle: &Path) -> Option<Pid> {
    let text = fs::read_to_string(bundle.join(PID_FILE)).ok()?;
    let pid = Pid::from_raw(text.trim().parse().ok()?)?;
    let program = fs::read_link(format!("/proc/{}/exe", pid.as_raw_nonzero())).ok()?;
    let name = program.file_name()?.to_str()?;
    // Its file may have been replaced by a newer version.
    name.starts_with("containerd-shim-koya-v2").then_some(pid)
}

fn connect(id: &str) -> ConnectRequest {
    ConnectRequest {
        id: id.into(),
        ..Default::default()
    }
}

/// Sends a request to a shim; true if it replies.
fn request(client: &Client, method: &str, request: &impl Message) -> bool {
    // The crate's own client uses another service name.
    let call = ttrpc::Request {
        service: SERVED_AS.into(),
        method: method.into(),
        payload: request.write_to_bytes().unwrap_or_default(),
        timeout_nano: ANSWER_LIMIT.as_nanos() as i64,
        ..Default::default()
    };
    client.request(call).is_ok()
}

/// Kills the process, and waits for its end.
fn end(pid: Pid) {
    let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else {
        return;
    };
    pidfd_send_signal(&process, Signal::KILL).ok();
    let limit = Timespec {
        tv_sec: GONE_LIMIT.as_secs() as i64,
        tv_nsec: GONE_LIMIT.subsec_nanos().into(),
    };
    poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&limit)).ok();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_violation_in_a_pod_is_the_reason_for_all_of_its_containers() {
        let dir = std::env::temp_dir().join(format!("koya-cleanup-{}", std::process::id()));
        let at = |id: &str| dir.join(id);
        fs::create_dir(&dir).unwrap();
        for (id, kind) in [("pod", "sandbox"), ("one", "container")] {
            fs::create_dir(at(id)).unwrap();
            let config = format!(
                r#"{{"ociVersion": "1.0.2", "root": {{"path": "rootfs"}}, "annotations": {{
                "io.kubernetes.cri.container-type": "{kind}", "io.kubernetes.cri.sandbox-id": "pod"}}}}"#
            );
            fs::write(at(id).join("config.json"), config).unwrap();
        }
        assert_eq!(reason("one", "k8s.io", &at("one")), None);
        fs::write(at("pod").join("violation"), "koya: the thread x\n").unwrap();
        for id in ["pod", "one"] {
            assert_eq!(
                reason(id, "k8s.io", &at(id)).as_deref(),
                Some("the thread x")
            );
        }
        assert_eq!(reason("one", "moby", &at("one")), None);
        assert_eq!(reason("gone", "k8s.io", &at("gone")), None);
        fs::remove_dir_all(&dir).unwrap();
    }
}
