//! `start`: creates the shim's process, or finds that of the container's pod, and prints its address.

use crate::flags::Flags;
use crate::selinux;
use anyhow::{Context, Result, bail};
use koya::Settings;
use koya::vmm::host::security_modules::has_selinux;
use koya::vmm::host::sockets::listen_privately;
use koya_tasks::hooks::Kind;
use koya_tasks::{Role, Spec, environment_for};
use sha2::{Digest, Sha256};
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Directory of the sockets of all containerd shims.
const SOCKETS: &str = "/run/containerd/s";
/// File in the bundle with the PID of the shim, for `delete`.
pub(crate) const PID_FILE: &str = "shim.pid";
const ADDRESS_FILE: &str = "address";

/// Socket of the shim of a container, or of its pod.
pub(crate) fn socket(flags: &Flags, group: &str) -> PathBuf {
    let name = format!("{}/{}/{group}", flags.address, flags.namespace);
    let hash = Sha256::digest(name.as_bytes());
    let hash: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
    Path::new(SOCKETS).join(hash)
}

pub(crate) fn start(flags: &Flags) -> Result<()> {
    let bundle = flags.bundle()?;
    let spec = Spec::read_of(&bundle, &flags.namespace)?;
    let note = |socket: &Path| -> Result<String> {
        let address = format!("unix://{}", socket.display());
        let new = bundle.join(".address");
        fs::write(&new, &address)?;
        fs::rename(&new, bundle.join(ADDRESS_FILE))?;
        Ok(address)
    };
    let address = match spec.role(&flags.id) {
        Role::Member { sandbox } => {
            let socket = socket(flags, &sandbox);
            UnixStream::connect(&socket)
                .with_context(|| format!("the pod's sandbox {sandbox} does not run"))?;
            note(&socket)?
        }
        Role::Single | Role::Sandbox => {
            let socket = socket(flags, &flags.id);
            // Before the process is created: nothing cleans up after a failed start.
            let address = note(&socket)?;
            launch(flags, &bundle, &socket, &spec)?;
            address
        }
    };
    // Understood by every version of containerd.
    print!("{address}");
    Ok(())
}

fn launch(flags: &Flags, bundle: &Path, socket: &Path, spec: &Spec) -> Result<()> {
    let Some(listener) = listen(socket)? else {
        // It is already running: containerd repeats the call after a failure of its own.
        return Ok(());
    };
    let launched = label_process(spec.selinux_label());
    let launched = launched.and_then(|()| spawn(flags, bundle, spec, listener));
    if launched.is_err() {
        fs::remove_file(socket).ok();
    }
    launched
}

/// Sets the SELinux label of the long-lived process, if the host has SELinux and the host's settings enable it.
fn label_process(label: Option<&str>) -> Result<()> {
    match label {
        Some(label) if has_selinux() && Settings::load()?.selinux => {
            selinux::label_next_exec(label)
        }
        _ => Ok(()),
    }
}

/// Listens on the socket; `None` if another process does.
fn listen(socket: &Path) -> Result<Option<UnixListener>> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(SOCKETS)?;
    let listener = match listen_privately(socket) {
        Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {
            if UnixStream::connect(socket).is_ok() {
                return Ok(None);
            }
            fs::remove_file(socket)?;
            listen_privately(socket)
        }
        other => other,
    };
    let listener = listener.with_context(|| format!("cannot listen on {}", socket.display()))?;
    Ok(Some(listener))
}

/// Starts the long-lived process. Its standard input is the listener; containerd reads our output to its end, so it inherits
/// none of it. containerd may connect before it is ready: the backlog holds the connection.
fn spawn(flags: &Flags, bundle: &Path, spec: &Spec, listener: UnixListener) -> Result<()> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["-namespace", &flags.namespace]);
    command.args(["-address", &flags.address]);
    command.args(["-id", &flags.id]);
    if flags.debug {
        command.arg("-debug");
    }
    let mut child = command
        .arg("serve")
        .env_clear()
        .envs(environment_for(spec, &Kind::ALL))
        .current_dir(bundle)
        .stdin(OwnedFd::from(listener))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("cannot start the shim")?;
    let noted = fs::write(bundle.join(PID_FILE), child.id().to_string())
        .map_err(anyhow::Error::from)
        .and_then(|()| protect_containerd(child.id()));
    if noted.is_err() {
        child.kill().ok();
        child.wait().ok();
    }
    noted
}

/// If memory runs out, the shim is to be killed before containerd.
fn protect_containerd(shim: u32) -> Result<()> {
    let parent = rustix::process::getppid().map_or(1, |pid| pid.as_raw_nonzero().get());
    let score = fs::read_to_string(format!("/proc/{parent}/oom_score_adj"))?;
    let score: i32 = score.trim().parse().context("oom_score_adj")?;
    let path = format!("/proc/{shim}/oom_score_adj");
    if let Err(error) = fs::write(&path, (score + 1).min(1000).to_string()) {
        bail!("{path}: {error}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_socket_is_where_containerds_own_shims_have_it() {
        let flags = Flags {
            address: "/run/containerd/containerd.sock".into(),
            namespace: "default".into(),
            ..Flags::default()
        };
        let path = socket(&flags, "foo");
        // sha256 of "/run/containerd/containerd.sock/default/foo"
        let expected = Sha256::digest(b"/run/containerd/containerd.sock/default/foo");
        let first = format!("{:02x}{:02x}", expected[0], expected[1]);
        let name = path.file_name().unwrap().to_str().unwrap();
        assert!(name.starts_with(&first) && name.len() == 64);
        assert!(path.as_os_str().len() <= 106);
    }
}
