//! A container's socket for messages to its service manager (sd_notify(3)): a datagram socket of the agent, alone in a
//! tmpfs that is mounted in the container. Each message goes to the host, which decides what of it the manager gets.
//!
//! Descriptors attached to a message are closed on receipt: a sender that waits for that (sd_notify_barrier(3)) goes on.

use crate::volumes;
use anyhow::{Context, Result};
use koya_protocol::STREAM_PORT;
use koya_protocol::messages::Stdio;
use koya_protocol::notify::{MAX_LEN, frame};
use koya_rootfs::path_of;
use oci_spec::runtime::Spec;
use rustix::fs::{Mode, OFlags, open};
use std::fs::{Permissions, set_permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::Duration;
use tokio::io::{AsyncWrite, AsyncWriteExt as _};
use tokio::net::UnixDatagram;
use tokio::sync::oneshot;
use tokio::task::{JoinHandle, spawn_local};
use tokio::time::timeout;
use tokio_vsock::{VMADDR_CID_HOST, VsockAddr, VsockStream};

/// Options of the tmpfs, whose only file is the socket.
const TMPFS: &str = "size=16k,nr_inodes=8,mode=0755";
/// Options of the container's mount of it, as with runc.
const OPTIONS: [&str; 5] = ["bind", "ro", "nosuid", "nodev", "noexec"];
/// Time limit for the last messages of a container: a host that receives more than it accepts takes them slowly.
const LAST_MESSAGES: Duration = Duration::from_secs(1);

/// A container's socket.
pub(crate) struct NotifySocket {
    forward: JoinHandle<()>,
    end: oneshot::Sender<()>,
}

/// Makes the socket at its path in the container: the mount at its directory becomes one of the socket's tmpfs.
///
/// # Errors
/// If the configuration has no such mount, or the host does not accept the stream.
pub(crate) async fn make(id: &str, spec: &mut Spec, stdio: &Stdio) -> Result<NotifySocket> {
    let path = Path::new(&stdio.notify_path);
    let (directory, name) = path
        .parent()
        .zip(path.file_name())
        .context("the socket for notifications has no path")?;
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    let number = mounts
        .iter()
        .rposition(|mount| mount.destination() == directory)
        .context("there is no mount for the socket for notifications")?;
    let (at, _) = volumes::mount_memory(id, u32::try_from(number)?, &[TMPFS.to_owned()])
        .context("cannot mount a tmpfs for notifications")?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let within = open(&at, flags, Mode::empty())?;
    // By its descriptor: a path with an ID may be longer than that of a socket may be.
    let socket = UnixDatagram::bind(path_of(&within).join(name))
        .context("cannot make a socket for notifications")?;
    set_permissions(at.join(name), Permissions::from_mode(0o777))?;
    let mount = &mut mounts[number];
    mount
        .set_typ(Some("bind".into()))
        .set_source(Some(at))
        .set_options(Some(OPTIONS.map(str::to_owned).into()));
    spec.set_mounts(Some(mounts));
    let mut host = VsockStream::connect(VsockAddr::new(VMADDR_CID_HOST, STREAM_PORT)).await?;
    host.write_all(stdio.notify_token.as_bytes()).await?;
    let (end, ended) = oneshot::channel();
    let forward = spawn_local(async move {
        // An error is the end of the stream: nobody wants the messages any more.
        forward(socket, &mut host, ended).await.ok();
    });
    Ok(NotifySocket { forward, end })
}

/// Forwards messages until the host closes the stream, or nothing is left after the end.
async fn forward(
    socket: UnixDatagram,
    host: &mut (impl AsyncWrite + Unpin),
    mut ended: oneshot::Receiver<()>,
) -> std::io::Result<()> {
    // One byte more, so that a message that is too long is known from one that was cut off.
    let mut buffer = vec![0; MAX_LEN + 1];
    loop {
        let len = tokio::select! {
            received = socket.recv(&mut buffer) => received?,
            _ = &mut ended => break,
        };
        if let Some(frame) = frame(&buffer[..len]) {
            host.write_all(&frame).await?;
        }
    }
    // What has arrived, whether the event loop has noticed it or not.
    let socket = socket.into_std()?;
    while let Ok(len) = socket.recv(&mut buffer) {
        if let Some(frame) = frame(&buffer[..len]) {
            host.write_all(&frame).await?;
        }
    }
    host.shutdown().await
}

impl NotifySocket {
    /// Forwards the last messages, and closes it.
    pub(crate) async fn close(self) {
        let Self { mut forward, end } = self;
        end.send(()).ok();
        if timeout(LAST_MESSAGES, &mut forward).await.is_err() {
            forward.abort();
            // The socket is closed once the task is gone: until then its tmpfs is in use.
            forward.await.ok();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_sent_before_the_end_is_forwarded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = runtime.enable_all().build().unwrap();
        let got = runtime.block_on(async {
            let socket = UnixDatagram::bind(&path).unwrap();
            let sender = std::os::unix::net::UnixDatagram::unbound().unwrap();
            sender.connect(&path).unwrap();
            let too_long = [b'x'; MAX_LEN + 1];
            for message in [&b"READY=1"[..], &too_long, b"", b"STOPPING=1"] {
                sender.send(message).unwrap();
            }
            let (end, ended) = oneshot::channel();
            end.send(()).unwrap();
            let mut host = Vec::new();
            forward(socket, &mut host, ended).await.unwrap();
            host
        });
        let expected = [&b"READY=1"[..], b"STOPPING=1"].map(|message| frame(message).unwrap());
        assert_eq!(got, expected.concat());
    }
}
