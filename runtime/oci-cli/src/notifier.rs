//! Where the messages of a container to a service manager (sd_notify(3)) go: to a command that passes them on, as long as
//! the manager knows only that, and then to the manager.

use crate::ipc::Response;
use crate::notify::is_ready;
use anyhow::{Context, Result};
use koya::vmm::host::sync::lock;
use koya_tasks::NotifySocket;
use koya_tasks::wire::send;
use std::collections::HashMap;
use std::io::Read as _;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

/// Time limit for a command to receive a message.
const SEND_LIMIT: Duration = Duration::from_secs(10);
/// Time limit for a command to tell the manager that the container is ready: more than that of a barrier.
const READY_LIMIT: Duration = Duration::from_secs(45);

/// A command that passes on messages.
struct Follower {
    stream: UnixStream,
    until_ready: bool,
}

struct Target {
    follower: Option<Follower>,
    manager: UnixDatagram,
    is_warned: bool,
}

/// The target of a container's messages.
pub(crate) struct Notifier(Mutex<Target>);

impl Notifier {
    /// Sends a message. May block for a while.
    fn tell(&self, message: &str) {
        let mut target = lock(&self.0);
        let notified = Response::Notified(message.to_owned());
        if let Some(mut follower) = target.follower.take()
            && send(&follower.stream, &notified, &[]).is_ok()
        {
            if follower.until_ready && is_ready(message) {
                // It tells the manager of this process, whose messages are accepted from then on, and disconnects.
                follower.stream.read_exact(&mut [0]).ok();
            } else {
                target.follower = Some(follower);
            }
            return;
        }
        if let Err(error) = target.manager.send(message.as_bytes())
            && !std::mem::replace(&mut target.is_warned, true)
        {
            log::warn!("cannot notify the service manager: {error}");
        }
    }
}

/// The notifiers of all containers of a process.
#[derive(Default)]
pub(crate) struct Notifiers(Mutex<HashMap<String, Weak<Notifier>>>);

impl Notifiers {
    /// The socket of a container with this path in it, if it has one. The last descriptor received is the manager's.
    ///
    /// # Errors
    /// If that is missing.
    pub(crate) fn socket(
        &self,
        id: &str,
        path: Option<&str>,
        fds: &mut Vec<OwnedFd>,
    ) -> Result<Option<NotifySocket>> {
        let Some(path) = path else {
            return Ok(None);
        };
        let manager = fds.pop().context("no service manager was received")?;
        let notifier = Arc::new(Notifier(Mutex::new(Target {
            follower: None,
            manager: manager.into(),
            is_warned: false,
        })));
        // The container owns it: a command that follows is disconnected with its end.
        lock(&self.0).insert(id.to_owned(), Arc::downgrade(&notifier));
        Ok(Some(NotifySocket {
            path: path.to_owned(),
            receiver: Arc::new(move |message| notifier.tell(message)),
        }))
    }

    /// Makes a command pass on the messages of a container; those after it go to the manager that the command has.
    ///
    /// # Errors
    /// If the container has no socket.
    pub(crate) fn follow(
        &self,
        id: &str,
        stream: &UnixStream,
        until_ready: bool,
        mut fds: Vec<OwnedFd>,
    ) -> Result<()> {
        let found = lock(&self.0).get(id).and_then(Weak::upgrade);
        let notifier = found.with_context(|| format!("{id} has no socket for notifications"))?;
        let manager = fds.pop().context("no service manager was received")?;
        let stream = stream.try_clone()?;
        stream.set_write_timeout(Some(SEND_LIMIT))?;
        stream.set_read_timeout(Some(READY_LIMIT))?;
        let mut target = lock(&notifier.0);
        target.manager = manager.into();
        target.is_warned = false;
        target.follower = Some(Follower {
            stream,
            until_ready,
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use koya_tasks::wire::Wire;

    fn next(wire: &mut Wire) -> Option<String> {
        match wire.receive().unwrap() {
            Some((Response::Notified(message), _)) => Some(message),
            _ => None,
        }
    }

    #[test]
    fn a_command_passes_messages_on_until_the_container_is_ready() {
        let (first, _) = UnixDatagram::pair().unwrap();
        let (second, manager) = UnixDatagram::pair().unwrap();
        let notifiers = Notifiers::default();
        let socket = notifiers
            .socket("c", Some("/p"), &mut vec![first.into()])
            .unwrap()
            .unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        assert!(notifiers.follow("d", &theirs, true, Vec::new()).is_err());
        notifiers
            .follow("c", &theirs, true, vec![second.into()])
            .unwrap();
        drop(theirs);
        let sender = std::thread::spawn(move || {
            for message in ["STATUS=a", "READY=1", "WATCHDOG=1"] {
                (socket.receiver)(message);
            }
        });
        let mut wire = Wire::new(ours);
        assert_eq!(next(&mut wire).unwrap(), "STATUS=a");
        assert_eq!(next(&mut wire).unwrap(), "READY=1");
        // While the command tells the manager, the others wait.
        std::thread::sleep(Duration::from_millis(50));
        manager.set_nonblocking(true).unwrap();
        assert!(manager.recv(&mut [0; 64]).is_err());
        manager.set_nonblocking(false).unwrap();
        drop(wire);
        let mut got = [0; 64];
        let len = manager.recv(&mut got).unwrap();
        assert_eq!(&got[..len], b"WATCHDOG=1");
        sender.join().unwrap();
        let gone = notifiers.follow("c", &UnixStream::pair().unwrap().0, true, Vec::new());
        assert!(gone.is_err(), "the container has ended");
    }

    #[test]
    fn a_command_that_has_gone_loses_no_message() {
        let (socket, manager) = UnixDatagram::pair().unwrap();
        let notifiers = Notifiers::default();
        let copy = socket.try_clone().unwrap();
        let sent = notifiers
            .socket("c", Some("/p"), &mut vec![socket.into()])
            .unwrap()
            .unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        notifiers
            .follow("c", &theirs, false, vec![copy.into()])
            .unwrap();
        drop((ours, theirs));
        (sent.receiver)("READY=1");
        let mut got = [0; 64];
        let len = manager.recv(&mut got).unwrap();
        assert_eq!(&got[..len], b"READY=1");
    }
}
