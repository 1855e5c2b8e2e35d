//! Containers that share another container's namespaces, and thus its virtual machine: those of podman's pods, and of
//! `--network container:NAME`.
//!
//! Such a container has its own process, whose PID callers get. It is in the same network namespace, and ends with the
//! container's status; the container itself is in the virtual machine of the other one's process.

use crate::Outcome;
use crate::exec::{end, pass_on};
use crate::ipc::{Boot, ContainerRequest, Create, Request, Response, receive_response};
use crate::serve::{ServerState, descriptors, follow, read_spec, streams};
use crate::signal::PASSED;
use crate::state::{self, Container, Root, Stored};
use anyhow::{Context, Result, bail};
use koya::Settings;
use koya::oci_spec::runtime::LinuxNamespaceType::{self, User};
use koya::vmm::host::sys::unshare_fs_state;
use koya_tasks::wire::{Wire, send};
use koya_tasks::{CreateTask, PidHolder, SandboxMembership, Spec, UserMappings};
use nix::sched::{CloneFlags, setns};
use signal_hook::iterator::Signals;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

/// The owner of the virtual machine that a container joins, if its configuration names namespaces of another container.
///
/// # Errors
/// If these are not all of one virtual machine, or its network is not among them.
pub(crate) fn owner(root: &Root, spec: &Spec) -> Result<Option<SandboxMembership>> {
    let named = spec.named_processes();
    if named.is_empty() || !root.path.exists() {
        return Ok(None);
    }
    let all = root.all()?;
    joins(&named, |pid| {
        let mut found = all.iter().filter(|c| c.is_alive());
        let found = found.find(|container| container.stored.pid == pid as i32);
        found.map(|container| &container.stored)
    })
}

fn joins<'a>(
    named: &[(LinuxNamespaceType, u32)],
    find: impl Fn(u32) -> Option<&'a Stored>,
) -> Result<Option<SandboxMembership>> {
    let mut joins = SandboxMembership::default();
    let mut has_network = false;
    let mut last_kind = LinuxNamespaceType::Network;
    for (kind, pid) in named {
        let Some(stored) = find(*pid) else {
            continue;
        };
        let sandbox = stored.owner.as_ref().unwrap_or(&stored.id);
        if !joins.sandbox.is_empty() && joins.sandbox != *sandbox {
            bail!(
                "the {kind} namespace belongs to {}, others to {}: they are in different virtual machines",
                stored.id,
                joins.sandbox
            );
        }
        joins.sandbox = sandbox.clone();
        let of = Some(stored.id.clone());
        match kind {
            LinuxNamespaceType::Network => has_network = true,
            LinuxNamespaceType::Pid => joins.pids = of,
            LinuxNamespaceType::Ipc => joins.ipc = of,
            LinuxNamespaceType::Uts => joins.uts = of,
            other => bail!("the {other} namespace of {} can't be shared", stored.id),
        }
        last_kind = *kind;
    }
    match (joins.sandbox.is_empty(), has_network) {
        (true, _) => Ok(None),
        (false, true) => Ok(Some(joins)),
        (false, false) => bail!(
            "the {last_kind} namespace of {} can be shared only with its network: containers of one virtual \
             machine have one network",
            joins.sandbox
        ),
    }
}

/// The mappings of the user namespace of a container in another virtual machine, if the configuration names that one. A
/// namespace of a container in the same one is left to [`owner`].
///
/// # Errors
/// If the stored containers can't be read.
pub(crate) fn users(root: &Root, spec: &Spec) -> Result<Option<UserMappings>> {
    let named = spec.named_processes();
    if !root.path.exists() || named.iter().all(|(kind, _)| *kind != User) {
        return Ok(None);
    }
    let all = root.all()?;
    Ok(users_among(&named, |pid| {
        let mut found = all.iter().filter(|c| c.is_alive());
        let found = found.find(|container| container.stored.pid == pid as i32);
        found.map(|container| &container.stored)
    }))
}

fn users_among<'a>(
    named: &[(LinuxNamespaceType, u32)],
    find: impl Fn(u32) -> Option<&'a Stored>,
) -> Option<UserMappings> {
    let is_other = |(kind, pid): &(LinuxNamespaceType, u32)| *kind != User && find(*pid).is_some();
    if named.iter().any(is_other) {
        return None;
    }
    let (_, pid) = named.iter().find(|(kind, _)| *kind == User)?;
    find(*pid)?.users.clone()
}

/// The main function of the process that represents such a container; returns its exit status.
pub(crate) fn run_member(
    boot: &Boot,
    joins: &SandboxMembership,
    spec: &Spec,
    fds: Vec<OwnedFd>,
    stream: &UnixStream,
    wire: &mut Wire,
    first_thread: &PidHolder,
) -> Outcome {
    let signals = Signals::new(PASSED)?;
    send(stream, &Response::Done, &[])?;
    if wire.receive::<Request>()?.is_none() {
        bail!("the creating command ended early");
    }
    let owner = Root::of_container(&boot.directory)?.find(&joins.sandbox)?;
    let (fds, terminal) = streams(boot, spec, fds)?;
    let machine = ask_for(boot, joins, &owner, &fds)?;
    drop(fds);
    let mut end_of = Wire::new(machine.try_clone()?);
    receive_response(&mut end_of)?;
    first_thread.show(spec.files(&boot.bundle));
    pass_on(signals, &machine, terminal)?;
    state::listen_at(&boot.directory, &owner.directory)?;
    send(stream, &Response::Done, &[])?;
    if wire.receive::<Request>()?.is_none() {
        state::stop_listening(&boot.directory);
        // The requesting command has gone, so the container is killed.
        machine.shutdown(std::net::Shutdown::Both).ok();
        bail!("the creating command ended early");
    }
    let status = end(&mut end_of);
    state::stop_listening(&boot.directory);
    Ok(status)
}

fn ask_for(
    boot: &Boot,
    joins: &SandboxMembership,
    owner: &Container,
    fds: &[OwnedFd],
) -> Result<UnixStream> {
    let machine = owner.connect()?;
    let asked = ContainerRequest {
        id: boot.id.clone(),
        request: Request::Create(Box::new(Create {
            directory: boot.directory.clone(),
            bundle: boot.bundle.clone(),
            source: boot.source.clone(),
            joins: joins.clone(),
            is_own_terminal: boot.is_own_terminal,
            preserved: boot.preserved,
            notify: boot.notify.clone(),
            oom_files: boot.oom_files.clone(),
        })),
    };
    let mounts =
        File::open("/proc/thread-self/ns/mnt").context("cannot open the mount namespace")?;
    let mut beside = vec![mounts.as_fd()];
    beside.extend(fds.iter().map(AsFd::as_fd));
    send(&machine, &asked, &beside)?;
    Ok(machine)
}

/// Runs in the process with the virtual machine, on a separate thread: creates the container, and reports its end. If the
/// requesting process goes first, the container is killed.
pub(crate) fn create(
    stream: &UnixStream,
    wire: Wire,
    served: &Arc<ServerState>,
    id: String,
    create: Create,
    mut fds: Vec<OwnedFd>,
) -> Result<Response> {
    let tasks = &served.tasks;
    if fds.is_empty() {
        bail!("no mount namespace was received");
    }
    // Mounts made after the start of this process may be missing in its own mount namespace.
    enter_mounts(&fds.remove(0)).context("cannot enter the mount namespace of the container")?;
    let path = create.notify.as_deref();
    let mut spec = read_spec(&create.source, &create.bundle, &id, create.preserved, path)?;
    let notify = served.notifiers.socket(&id, path, &mut fds)?;
    // Mounted by its own process, whose mount namespace this is.
    if !spec.take_overlays(&create.directory).is_empty() && !create.directory.is_absolute() {
        bail!("mounts: an overlay is not possible beside a process of another version of Koya");
    }
    tasks.create(CreateTask {
        id: id.clone(),
        bundle: create.bundle,
        spec,
        mounts: Vec::new(),
        stdio: descriptors(fds, create.is_own_terminal, create.preserved)?,
        notify,
        joins: Some(create.joins),
        settings: Settings::load()?,
    })?;
    send(stream, &Response::Done, &[]).ok();
    follow(wire, served.clone(), id.clone(), String::new())?;
    let exit = tasks.wait(&id, "");
    served.show_oom(&id, &create.oom_files);
    // Its root must be free once its end is reported.
    if let Err(error) = tasks.delete(&id, "") {
        log::warn!("{id}: {error}");
    }
    Ok(Response::Ended(exit?.status))
}

/// Makes this thread resolve paths in another mount namespace.
fn enter_mounts(namespace: &OwnedFd) -> Result<()> {
    unshare_fs_state()?;
    Ok(setns(namespace, CloneFlags::CLONE_NEWNS)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::tests::stored;
    use LinuxNamespaceType::{Ipc, Network, Pid, Uts};

    #[test]
    fn the_user_namespace_of_another_machine_is_one_with_its_mappings() {
        let linux = serde_json::json!({"namespaces": [{"type": "user"}],
            "uidMappings": [{"containerID": 0, "hostID": 1000, "size": 1}]});
        let config = serde_json::json!({"ociVersion": "1.2.0", "linux": linux});
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        let (mut mapped, plain) = (stored("mapped"), stored("plain"));
        mapped.users = Spec::read(dir.path()).unwrap().user_mappings();
        assert!(mapped.users.is_some());
        let find = |pid| match pid {
            1 => Some(&mapped),
            2 => Some(&plain),
            _ => None,
        };
        let of = |named: &[(LinuxNamespaceType, u32)]| users_among(named, find);
        assert_eq!(of(&[(User, 1)]), mapped.users);
        assert_eq!(of(&[(User, 1), (Network, 9)]), mapped.users);
        // It has none, is not known, or has the other one in the same machine.
        for named in [&[(User, 2)][..], &[(User, 9)], &[(User, 1), (Network, 1)]] {
            assert_eq!(of(named), None, "{named:?}");
        }
    }

    #[test]
    fn whose_virtual_machine_is_joined_is_told_by_pids() {
        let (infra, mut member, other) = (stored("infra"), stored("member"), stored("other"));
        member.owner = Some("infra".into());
        let find = |pid| match pid {
            1 => Some(&infra),
            2 => Some(&member),
            3 => Some(&other),
            _ => None,
        };
        let of = |named: &[(LinuxNamespaceType, u32)]| joins(named, find);
        let pod = of(&[(Network, 1), (Ipc, 1), (Uts, 1), (Pid, 2)]).unwrap();
        let pod = pod.unwrap();
        assert_eq!(pod.sandbox, "infra");
        assert_eq!(pod.ipc.as_deref(), Some("infra"));
        assert_eq!(pod.uts.as_deref(), Some("infra"));
        assert_eq!(pod.pids.as_deref(), Some("member"));
        let network = of(&[(Network, 2)]).unwrap().unwrap();
        assert_eq!(network.sandbox, "infra");
        assert_eq!(network.ipc, None);
        assert!(of(&[(Network, 9)]).unwrap().is_none(), "nobody's we know");
        let error = |named: &[_]| of(named).unwrap_err().to_string();
        assert!(error(&[(Ipc, 1)]).contains("only with its network"));
        assert!(error(&[(Network, 1), (Ipc, 3)]).contains("different virtual machines"));
        assert!(error(&[(Network, 1), (User, 1)]).contains("can't be shared"));
    }
}
