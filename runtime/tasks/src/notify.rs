//! Messages of containers to a service manager (sd_notify(3)).

use crate::set::{Task, TaskSet};
use crate::spec::Spec;
use crate::sync::spawn;
use anyhow::Result;
use koya::Notifications;
use koya::oci_spec::runtime::Mount;
use std::fs;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// The variable that names the socket.
const VARIABLE: &str = "NOTIFY_SOCKET=";

/// Time limit for passing on the last messages of a container: a guest that has sent too many loses the others.
const LAST_MESSAGES: Duration = Duration::from_secs(2);

/// A container's socket for messages to a service manager.
#[derive(Clone)]
pub struct NotifySocket {
    /// Its path in the container.
    pub path: String,
    /// Receives each message, on a thread of its own that it may block. They are those of [`Notifications`].
    pub receiver: Arc<dyn Fn(&str) + Send + Sync>,
}

impl Spec {
    /// Where its process expects a service manager's socket that the configuration mounts from the host, by the variable
    /// `NOTIFY_SOCKET` and as podman does: the path in the container, and that on the host.
    pub fn mounted_notify_socket(&self, bundle: &Path) -> Option<(String, PathBuf)> {
        let variables = self.0.process().as_ref()?.env().as_ref()?;
        let mut variables = variables.iter().rev();
        let path = variables.find_map(|variable| variable.strip_prefix(VARIABLE))?;
        let (directory, name) = (Path::new(path).parent()?, Path::new(path).file_name()?);
        let mut mounts = self.0.mounts().iter().flatten();
        let mount = mounts.rfind(|mount: &&Mount| mount.destination() == directory)?;
        let source = bundle.join(mount.source().as_ref()?);
        let socket = source.join(name);
        let found = socket.symlink_metadata().ok()?;
        if !found.file_type().is_socket() {
            return None;
        }
        if fs::read_dir(&source).ok()?.count() != 1 {
            log::warn!(
                "NOTIFY_SOCKET={path}: the container's messages do not leave its guest: for that, {} must have no \
                 other files than the socket",
                source.display()
            );
            return None;
        }
        Some((path.to_owned(), socket))
    }

    /// Gives the container a place for a [`NotifySocket`]: an own mount at the directory of this path, and the variable
    /// `NOTIFY_SOCKET`.
    pub fn set_notify_socket(&mut self, path: &str) {
        const OPTIONS: [&str; 4] = ["nosuid", "nodev", "noexec", "mode=0755"];
        let directory = Path::new(path).parent().unwrap_or(Path::new("/"));
        let mut mount = Mount::default();
        mount
            .set_destination(directory.into())
            .set_typ(Some("tmpfs".into()))
            .set_source(Some("tmpfs".into()))
            .set_options(Some(OPTIONS.map(str::to_owned).into()));
        let mut mounts = self.0.mounts().clone().unwrap_or_default();
        mounts.retain(|other| other.destination() != directory);
        mounts.push(mount);
        self.0.set_mounts(Some(mounts));
        if let Some(process) = self.0.process_mut() {
            let mut all = process.env().clone().unwrap_or_default();
            all.retain(|variable| !variable.starts_with(VARIABLE));
            all.push(format!("{VARIABLE}{path}"));
            process.set_env(Some(all));
        }
    }
}

impl TaskSet {
    /// Passes on the messages of a container until its end.
    ///
    /// # Errors
    /// If the host has no thread left.
    pub(crate) fn relay_notifications(
        self: &Arc<Self>,
        task: &Arc<Task>,
        notifications: Option<Notifications>,
    ) -> Result<()> {
        let (Some(socket), Some(notifications)) = (&task.notify, notifications) else {
            return Ok(());
        };
        let (set, own, receiver) = (self.clone(), task.clone(), socket.receiver.clone());
        self.set_notifying(task, true);
        let spawned = spawn("koya-notify", move || {
            for message in notifications {
                receiver(&message);
            }
            set.set_notifying(&own, false);
        });
        spawned.inspect_err(|_| self.set_notifying(task, false))
    }

    fn set_notifying(&self, task: &Task, is_notifying: bool) {
        self.change(|state| {
            if let Some(entry) = state.entry(task) {
                entry.is_notifying = is_notifying;
            }
        });
    }

    /// Waits until the last messages of an ended container have been passed on: callers may end with it.
    pub(crate) fn await_last_notifications(&self, task: &Task) {
        self.wait_for(LAST_MESSAGES, |state| {
            let is_notifying = state.entry(task).is_some_and(|entry| entry.is_notifying);
            (!is_notifying).then_some(())
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::os::unix::net::UnixDatagram;

    fn spec(dir: &Path, socket: &str) -> Spec {
        let config = json!({
            "ociVersion": "1.0.2",
            "process": {"cwd": "/", "user": {"uid": 0, "gid": 0}, "env": ["A=b", format!("NOTIFY_SOCKET={socket}")]},
            "mounts": [
                {"destination": "/run", "type": "tmpfs", "source": "tmpfs"},
                {"destination": "/run/notify", "type": "bind", "source": "notify", "options": ["rbind"]},
            ],
        });
        fs::write(dir.join("config.json"), config.to_string()).unwrap();
        Spec::read(dir).unwrap()
    }

    #[test]
    fn a_socket_of_the_host_is_found_by_its_variable_and_mount() {
        let dir = tempfile::tempdir().unwrap();
        let notify = dir.path().join("notify");
        fs::create_dir(&notify).unwrap();
        let found = |path: &str| spec(dir.path(), path).mounted_notify_socket(dir.path());
        assert_eq!(found("/run/notify/notify.sock"), None, "it does not exist");
        let socket = notify.join("notify.sock");
        fs::write(&socket, "").unwrap();
        assert_eq!(found("/run/notify/notify.sock"), None, "it is a file");
        fs::remove_file(&socket).unwrap();
        let _bound = UnixDatagram::bind(&socket).unwrap();
        let path = "/run/notify/notify.sock";
        assert_eq!(found(path), Some((path.into(), socket)));
        for other in ["/run/notify.sock", "@notify", "", "/"] {
            assert_eq!(found(other), None, "{other:?}");
        }
        fs::write(notify.join("file"), "").unwrap();
        assert_eq!(found(path), None, "a file would be hidden");
    }

    #[test]
    fn a_container_gets_a_place_for_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let mut spec = spec(dir.path(), "/run/systemd/notify");
        spec.set_notify_socket("/run/notify/notify.sock");
        let mounts = spec.config().mounts().as_ref().unwrap();
        let all: Vec<_> = mounts
            .iter()
            .map(|mount| {
                (
                    mount.destination().to_str().unwrap(),
                    mount.typ().as_deref(),
                )
            })
            .collect();
        let tmpfs = Some("tmpfs");
        assert_eq!(all, [("/run", tmpfs), ("/run/notify", tmpfs)]);
        let process = spec.config().process().as_ref().unwrap();
        let env = process.env().as_ref().unwrap();
        assert_eq!(env, &["A=b", "NOTIFY_SOCKET=/run/notify/notify.sock"]);
    }
}
