//! Converts events of tasks to containerd's.

use crate::events::{Events, timestamp};
use containerd_shim_protos::api::Mount;
use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskIO, TaskOOM, TaskPaused,
    TaskResumed, TaskStart,
};
use containerd_shim_protos::topics;
use koya_tasks::{Event, EventSink, Exit};

impl EventSink for Events {
    fn send(&self, event: Event) {
        match event {
            event @ Event::Created { .. } => {
                self.publish(topics::TASK_CREATE_EVENT_TOPIC, &created(event));
            }
            Event::Started { id, pid } => {
                self.publish(topics::TASK_START_EVENT_TOPIC, &started(id, pid));
            }
            Event::Exited {
                id,
                exec_id,
                pid,
                exit,
            } => {
                let event = exited(id, exec_id, pid, exit);
                self.publish(topics::TASK_EXIT_EVENT_TOPIC, &event);
            }
            Event::Deleted { id, pid, exit } => {
                self.publish(topics::TASK_DELETE_EVENT_TOPIC, &deleted(id, pid, exit));
            }
            Event::OutOfMemory { id } => {
                let mut event = TaskOOM::new();
                event.container_id = id;
                self.publish(topics::TASK_OOM_EVENT_TOPIC, &event);
            }
            Event::Paused { id } => {
                let mut event = TaskPaused::new();
                event.container_id = id;
                self.publish(topics::TASK_PAUSED_EVENT_TOPIC, &event);
            }
            Event::Resumed { id } => {
                let mut event = TaskResumed::new();
                event.container_id = id;
                self.publish(topics::TASK_RESUMED_EVENT_TOPIC, &event);
            }
            Event::ExecAdded { id, exec_id } => {
                let mut event = TaskExecAdded::new();
                (event.container_id, event.exec_id) = (id, exec_id);
                self.publish(topics::TASK_EXEC_ADDED_EVENT_TOPIC, &event);
            }
            Event::ExecStarted { id, exec_id, pid } => {
                let mut event = TaskExecStarted::new();
                (event.container_id, event.exec_id, event.pid) = (id, exec_id, pid);
                self.publish(topics::TASK_EXEC_STARTED_EVENT_TOPIC, &event);
            }
        }
    }
}

fn created(event: Event) -> TaskCreate {
    let Event::Created {
        id,
        bundle,
        mounts,
        stdio,
        pid,
    } = event
    else {
        return TaskCreate::new();
    };
    let mounts = mounts.into_iter().map(|mount| Mount {
        type_: mount.kind,
        source: mount.source,
        target: mount.target,
        options: mount.options,
        ..Default::default()
    });
    let io = TaskIO {
        stdin: stdio.stdin,
        stdout: stdio.stdout,
        stderr: stdio.stderr,
        terminal: stdio.terminal,
        ..Default::default()
    };
    TaskCreate {
        container_id: id,
        bundle: bundle.to_string_lossy().into_owned(),
        rootfs: mounts.collect(),
        io: Some(io).into(),
        pid,
        ..Default::default()
    }
}

fn started(id: String, pid: u32) -> TaskStart {
    TaskStart {
        container_id: id,
        pid,
        ..Default::default()
    }
}

/// In containerd, the ID of the init process is that of its container.
fn exited(id: String, exec_id: String, pid: u32, exit: Exit) -> TaskExit {
    let name = match exec_id.is_empty() {
        true => id.clone(),
        false => exec_id,
    };
    TaskExit {
        container_id: id,
        id: name,
        pid,
        exit_status: exit.status,
        exited_at: Some(timestamp(exit.at)).into(),
        ..Default::default()
    }
}

fn deleted(id: String, pid: u32, exit: Exit) -> TaskDelete {
    TaskDelete {
        container_id: id,
        pid,
        exit_status: exit.status,
        exited_at: Some(timestamp(exit.at)).into(),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, SystemTime};

    #[test]
    fn an_exit_names_its_process() {
        let exit = Exit {
            status: 137,
            at: SystemTime::UNIX_EPOCH + Duration::from_secs(7),
        };
        let init = exited("c".into(), String::new(), 5, exit);
        assert_eq!((init.container_id.as_str(), init.id.as_str()), ("c", "c"));
        assert_eq!((init.pid, init.exit_status), (5, 137));
        assert_eq!(init.exited_at.seconds, 7);
        assert_eq!(exited("c".into(), "e".into(), 5, exit).id, "e");
    }

    #[test]
    fn a_creation_has_the_mounts_as_they_came() {
        let event = created(Event::Created {
            id: "c".into(),
            bundle: "/b".into(),
            mounts: vec![koya_tasks::Mount {
                kind: "overlay".into(),
                options: vec!["ro".into()],
                ..Default::default()
            }],
            stdio: koya_tasks::StdioPaths {
                terminal: true,
                ..Default::default()
            },
            pid: 5,
        });
        assert_eq!(event.bundle, "/b");
        assert_eq!(event.rootfs[0].type_, "overlay");
        assert_eq!(event.rootfs[0].options, ["ro"]);
        assert!(event.io.terminal);
    }
}
