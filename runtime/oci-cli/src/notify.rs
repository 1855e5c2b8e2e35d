//! sd_notify(3): a command passes on a container's messages to the service manager that has started the command, as long
//! as the manager knows only the command. Then it names the container's process as the main one, which continues
//! ([`crate::notifier`]).

use crate::console::{send_descriptor, spawn};
use crate::ipc::{Request, Response, receive_response};
use crate::state::Container;
use anyhow::{Context, Result, bail};
use koya::vmm::host::sockets::with_short_path;
use koya_tasks::Spec;
use koya_tasks::wire::{Wire, send};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

/// The variable that names the socket of a service manager.
pub(crate) const VARIABLE: &str = "NOTIFY_SOCKET";
/// Where a container finds its socket, as with runc.
const PLACE: &str = "/run/notify/notify.sock";
/// Time limit for a service manager to receive a message.
const SEND_LIMIT: Duration = Duration::from_secs(10);
/// Time limit for it to process the messages sent so far, as with runc and crun.
const BARRIER_LIMIT: Timespec = Timespec {
    tv_sec: 30,
    tv_nsec: 0,
};

/// The socket of a service manager.
#[derive(Debug)]
pub(crate) struct Manager(UnixDatagram);

impl Manager {
    /// The manager that the variable names, if it is set. That it can't be reached is only a warning.
    pub(crate) fn of_caller() -> Option<Self> {
        let name = std::env::var_os(VARIABLE).filter(|name| !name.is_empty())?;
        Self::or_warn(&name)
    }

    fn or_warn(name: &OsStr) -> Option<Self> {
        let connected = Self::connect(name).with_context(|| {
            let name = name.display();
            format!("the container's messages to a service manager are dropped: {VARIABLE}={name}")
        });
        connected.inspect_err(|error| log::warn!("{error:#}")).ok()
    }

    /// Connects to a socket by its path, or by its name after `@`.
    fn connect(name: &OsStr) -> Result<Self> {
        let socket = UnixDatagram::unbound()?;
        socket.set_write_timeout(Some(SEND_LIMIT))?;
        match name.as_bytes() {
            [b'@', name @ ..] => {
                socket.connect_addr(&SocketAddr::from_abstract_name(name)?)?;
            }
            // podman's are longer than an address may be.
            [b'/', ..] => with_short_path(Path::new(name), |path| socket.connect(path))?,
            _ => bail!("it is neither a path nor a name that begins with @"),
        }
        Ok(Self(socket))
    }

    /// Sends a message; an error is only a warning.
    fn tell(&self, message: &str) {
        if let Err(error) = self.0.send(message.as_bytes()) {
            log::warn!("cannot notify the service manager: {error}");
        }
    }

    /// Waits until the messages sent so far have been processed: sd_notify_barrier(3).
    fn wait(&self) -> Result<()> {
        let (ours, theirs) = std::io::pipe()?;
        send_descriptor(&self.0, b"BARRIER=1", theirs.as_fd())?;
        drop(theirs);
        // It closes the descriptor, at once if it does not know of barriers.
        let mut polled = [PollFd::new(&ours, PollFlags::IN)];
        match poll(&mut polled, Some(&BARRIER_LIMIT))? {
            0 => bail!("it does not answer"),
            _ => Ok(()),
        }
    }
}

impl AsFd for Manager {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The socket that a container gets: its path there, and where its messages go.
pub(crate) struct Wanted {
    pub(crate) path: String,
    pub(crate) manager: Manager,
}

impl Wanted {
    /// A socket for the caller's manager, or else for one whose socket the configuration mounts, as with podman. `None` if
    /// there is neither.
    pub(crate) fn of(spec: &Spec, bundle: &Path) -> Option<Self> {
        if let Some(manager) = Manager::of_caller() {
            let path = PLACE.to_owned();
            return Some(Self { path, manager });
        }
        let (path, socket) = spec.mounted_notify_socket(bundle)?;
        let manager = Manager::or_warn(socket.as_os_str())?;
        Some(Self { path, manager })
    }
}

/// Whether a container says that it is ready.
pub(crate) fn is_ready(message: &str) -> bool {
    message.lines().any(|line| line == "READY=1")
}

/// The messages of a container on their way through a command.
pub(crate) struct Forwarder {
    manager: Manager,
    wire: Wire,
    /// The main process of the service from when the container is ready.
    main: u32,
}

impl Forwarder {
    /// Follows the messages of a container that is about to be started, if it was created for that. Until it is ready, or
    /// always, for a command that remains the main process.
    ///
    /// # Errors
    /// If its process does not answer.
    pub(crate) fn connect(container: &Container, is_main: bool) -> Result<Option<Self>> {
        if !container.stored.notifies {
            return Ok(None);
        }
        let Some(manager) = Manager::of_caller() else {
            return Ok(None);
        };
        let stream = container.connect()?;
        let request = Request::Notify {
            until_ready: !is_main,
        };
        send(&stream, &container.asked(request), &[manager.as_fd()])?;
        let mut wire = Wire::new(stream);
        receive_response(&mut wire).context("the container's messages")?;
        let main = match is_main {
            true => std::process::id(),
            false => container.stored.pid as u32,
        };
        Ok(Some(Self {
            manager,
            wire,
            main,
        }))
    }

    /// Forwards messages until the container is ready, or has ended.
    pub(crate) fn until_ready(&mut self) {
        while let Some(message) = self.next() {
            if is_ready(&message) {
                // In one message: there is always a main process.
                let main = self.main;
                self.manager.tell(&format!("{message}\nMAINPID={main}"));
                if let Err(error) = self.manager.wait() {
                    log::warn!("the service manager may not know of the container: {error:#}");
                }
                return;
            }
            self.manager.tell(&message);
        }
    }

    /// Forwards messages on a thread until the container has ended, which disconnects the channel.
    ///
    /// # Errors
    /// If the host has no thread left.
    pub(crate) fn until_end_aside(mut self) -> Result<Receiver<()>> {
        let (sender, ended) = channel();
        spawn("koya-notify", move || {
            self.until_ready();
            while let Some(message) = self.next() {
                self.manager.tell(&message);
            }
            drop(sender);
        })?;
        Ok(ended)
    }

    fn next(&mut self) -> Option<String> {
        match self.wire.receive::<Response>() {
            Ok(Some((Response::Notified(message), _))) => Some(message),
            Ok(_) => None,
            Err(error) => {
                log::debug!("the container's messages: {error:#}");
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manager_is_found_by_a_path_of_any_length_or_a_name() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("d".repeat(100));
        std::fs::create_dir(&deep).unwrap();
        let short = dir.path().join("notify");
        let listener = UnixDatagram::bind(&short).unwrap();
        std::fs::rename(&short, deep.join("notify")).unwrap();
        let other = UnixDatagram::bind(&short).unwrap();
        let name = format!("koya-notify-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let named = UnixDatagram::bind_addr(&address).unwrap();
        for (at, socket) in [
            (deep.join("notify").into_os_string(), listener),
            (short.into_os_string(), other),
            (format!("@{name}").into(), named),
        ] {
            Manager::connect(&at).unwrap().tell("READY=1");
            let mut got = [0; 64];
            let len = socket.recv(&mut got).unwrap();
            assert_eq!(&got[..len], b"READY=1");
        }
        for none in ["relative", "vsock:2:1", "/none/notify", "@koya-none"] {
            assert!(Manager::connect(OsStr::new(none)).is_err(), "{none}");
        }
    }

    #[test]
    fn a_barrier_is_a_descriptor_that_is_closed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        let manager = Manager::connect(path.as_os_str()).unwrap();
        let waiting = std::thread::spawn(move || manager.wait());
        let mut got = [0; 64];
        // Received without room for a descriptor, it is closed.
        let len = socket.recv(&mut got).unwrap();
        assert_eq!(&got[..len], b"BARRIER=1");
        waiting.join().unwrap().unwrap();
    }

    #[test]
    fn readiness_is_a_line_of_its_own() {
        assert!(is_ready("STATUS=x\nREADY=1"));
        assert!(!is_ready("STATUS=READY=1") && !is_ready("READY=10"));
    }
}
