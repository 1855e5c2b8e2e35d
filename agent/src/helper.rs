//! The single-threaded process that calls libcontainer: `koya-agent helper OPERATION ...`.
//!
//! Standard streams 0 to 2 are the container's. The result is an [`Outcome`] in a file, which PID 1 reads after the helper
//! has ended.

use crate::affinity::Affinity;
use crate::cgroup;
use crate::configuration;
use crate::executor::{self, Confinement, Program};
use crate::places::{LATE_MOUNTS, PAUSE, READ_ONLY_DEV, WORKING_DIRECTORY, bundle};
use crate::privileges::Privileges;
use crate::refused_options;
use crate::start_hooks::StartHooks;
use crate::user_namespace::UserNamespace;
use anyhow::{Context, Result, anyhow, bail};
use koya_protocol::ErrorReason;
use koya_rootfs::Rootfs;
use libcontainer::container::builder::ContainerBuilder;
use libcontainer::container::{Container, ContainerStatus};
use libcontainer::error::LibcontainerError;
use libcontainer::syscall::syscall::SyscallType;
use oci_spec::runtime::{LinuxIdMapping, Process, Spec};
use rustix::fs::{Gid, Uid};
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, mount_move, unmount,
};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use serde::{Deserialize, Serialize};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

/// Directory of libcontainer's state.
const STATE: &str = "/run/koya/state";
/// Directory of the container states that libcontainer reads for them.
const ENTRIES: &str = "/run/koya/entries";

/// A bundle's configuration.
const CONFIG: &str = "config.json";
/// Directory in the bundle for processes that are added later: with a configuration of its own for libcontainer.
const ADDED: &str = "added";
/// File in there with what these take over from the container: its seccomp filter, the CPUs of processes that name none,
/// and the mapping of its users.
const SHARED: &str = "shared.json";
/// Privileges that the container's own process gives up by itself.
const PRIVILEGES: &str = "privileges.json";

/// Writes a container's bundle, with the data for exec processes.
pub(crate) fn save(id: &str, spec: &Spec) -> Result<()> {
    let added = bundle(id).join(ADDED);
    std::fs::create_dir_all(&added)?;
    let mut own = spec.clone();
    let privileges = Privileges::take(&mut own);
    own.save(bundle(id).join(CONFIG))?;
    std::fs::write(
        bundle(id).join(PRIVILEGES),
        serde_json::to_vec(&privileges)?,
    )?;
    configuration::for_added(spec).save(added.join(CONFIG))?;
    let seccomp = spec.linux().as_ref().and_then(|l| l.seccomp().as_ref());
    let process = spec.process().as_ref();
    let affinity = process.and_then(|process| process.exec_cpu_affinity().as_ref());
    Ok(std::fs::write(
        added.join(SHARED),
        serde_json::to_vec(&(seccomp, affinity, configuration::mapped_uids(spec)))?,
    )?)
}

/// Result of a helper for PID 1.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Outcome {
    /// It has created this process, or succeeded otherwise.
    Made(i32),
    ErrorReason(ErrorReason),
    Failed(String),
}

impl Outcome {
    fn of(result: Result<i32>) -> Self {
        match result.map_err(|error| error.downcast::<ErrorReason>()) {
            Ok(pid) => Self::Made(pid),
            Err(Ok(refused)) => Self::ErrorReason(refused),
            Err(Err(error)) => Self::Failed(format!("{error:#}")),
        }
    }

    /// The process, or the error.
    pub(crate) fn made(self) -> Result<i32> {
        match self {
            Self::Made(pid) => Ok(pid),
            Self::ErrorReason(refused) => Err(refused.into()),
            Self::Failed(text) => Err(anyhow!(text)),
        }
    }
}

/// Runs one operation: `create ID OUTCOME CONSOLE FDS UID`, `start ID OUTCOME`,
/// `exec ID OUTCOME CGROUP TERMINAL CONSOLE FDS PROCESS`, `delete ID OUTCOME`, `pause - OUTCOME`. OUTCOME is the file for
/// the result; TERMINAL are [`console::Settings`](crate::console::Settings) as JSON, for a process that has one; CONSOLE is
/// the path of a socket, or `-`; FDS are the numbers in PID 1 of the process's descriptors 3 and up; PROCESS is the file
/// with the process in OCI form.
pub(crate) fn main(args: &[String]) -> ExitCode {
    crate::sys::reset_signals();
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    if let [WORKING_DIRECTORY, root, path, uid, gid] = args.as_slice() {
        return working_directory(root, path, uid, gid);
    }
    if let [LATE_MOUNTS, root, mounts] = args.as_slice() {
        return hook(|| crate::late_mounts::mount_all(root, mounts));
    }
    if let [READ_ONLY_DEV, root, terminal] = args.as_slice() {
        return hook(|| crate::late_mounts::make_dev_read_only(root, terminal));
    }
    let (outcome, result) = match args.as_slice() {
        ["create", id, outcome, console, extra_fds, uid] => {
            (outcome, create(id, console, extra_fds, uid))
        }
        ["start", id, outcome] => (outcome, start(id)),
        [
            "exec",
            id,
            outcome,
            cgroup,
            terminal,
            console,
            extra_fds,
            process,
        ] => (
            outcome,
            exec(id, cgroup, terminal, console, extra_fds, process),
        ),
        ["delete", id, outcome] => (outcome, delete(id)),
        ["pause", _, outcome] => (outcome, pause()),
        _ => return ExitCode::FAILURE,
    };
    let said = Outcome::of(result);
    let written = serde_json::to_vec(&said).map(|text| std::fs::write(outcome, text));
    match written {
        Ok(Ok(())) => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}

fn console_path(console: &str) -> Option<PathBuf> {
    (console != "-").then(|| PathBuf::from(console))
}

/// Moves the process's descriptors 3 and up to their numbers, before any other is opened; returns their count.
fn take_extra_fds(numbers: &str) -> Result<i32> {
    let numbers = numbers.split(',').filter(|number| !number.is_empty());
    let numbers: Vec<i32> = numbers.map(str::parse).collect::<Result<_, _>>()?;
    if numbers.is_empty() {
        return Ok(0);
    }
    let first = pidfd_open(Pid::INIT, PidfdFlags::empty())?;
    let take = |number: &i32| pidfd_getfd(&first, *number, PidfdGetfdFlags::empty());
    let taken = numbers.iter().map(take).collect::<Result<Vec<_>, _>>()?;
    drop(first);
    crate::sys::leave_open_from(3, taken).context("cannot keep a descriptor")?;
    Ok(i32::try_from(numbers.len())?)
}

fn create(id: &str, console: &str, extra_fds: &str, uid: &str) -> Result<i32> {
    let extra_fds = take_extra_fds(extra_fds)?;
    std::fs::create_dir_all(STATE)?;
    executor::give_streams(uid.parse()?);
    let privileges = serde_json::from_slice(&std::fs::read(bundle(id).join(PRIVILEGES))?)?;
    let (program, reason) = Program::new(None, privileges)?;
    let program = program.after(StartHooks::load(&bundle(id))?);
    let built = ContainerBuilder::new(id.to_owned(), SyscallType::default())
        .with_root_path(STATE)?
        .with_console_socket(console_path(console))
        .with_executor(program)
        .with_preserved_fds(extra_fds)
        .validate_id()?
        .as_init(bundle(id))
        .with_systemd(false)
        .with_detach(true)
        .build();
    let container = built.map_err(|error| {
        let told = reason.read();
        let known = told.or_else(|| no_first_directory(id));
        let known = known.or_else(|| refused_by_the_kernel(id, &error));
        classify_error(error, known)
    })?;
    Ok(container
        .pid()
        .context("the container has no process")?
        .as_raw())
}

/// The reason why libcontainer failed: a known reason, an invalid configuration, or another error.
fn classify_error(error: LibcontainerError, known: Option<ErrorReason>) -> anyhow::Error {
    match (known, error) {
        (Some(refused), _) => refused.into(),
        (None, error @ (LibcontainerError::InvalidSpec(_) | LibcontainerError::MissingSpec(_))) => {
            ErrorReason::Invalid(format!("{:#}", anyhow!(error))).into()
        }
        (None, error) => error.into(),
    }
}

/// Why the kernel refused the container, if the configuration tells: libcontainer's error does not.
fn refused_by_the_kernel(id: &str, error: &LibcontainerError) -> Option<ErrorReason> {
    let spec = Spec::load(bundle(id).join(CONFIG)).ok()?;
    refused_options::find(&spec).or_else(|| too_little_memory(&spec, &format!("{error:?}")))
}

/// A process that is killed before it can report anything has broken its channel.
fn too_little_memory(spec: &Spec, error: &str) -> Option<ErrorReason> {
    let resources = spec.linux().as_ref()?.resources().as_ref()?;
    let limit = resources.memory().as_ref()?.limit().filter(|l| *l > 0)?;
    error.contains("BrokenChannel").then(|| {
        let reason = format!("the limit of {limit} bytes is too low to start a process");
        ErrorReason::Invalid(format!("linux.resources.memory: {reason}"))
    })
}

fn load(id: &str) -> Result<Container> {
    Ok(Container::load(Path::new(STATE).join(id))?)
}

fn start(id: &str) -> Result<i32> {
    let mut container = load(id)?;
    container.start()?;
    Ok(container.pid().map_or(0, |p| p.as_raw()))
}

/// A copy of a container's state for adding a process: with another bundle (see [`configuration::for_added`]), in a separate
/// directory of this helper.
struct Entry(PathBuf);

impl Entry {
    fn make(id: &str) -> Result<Self> {
        let entry = Self(Path::new(ENTRIES).join(std::process::id().to_string()));
        // PIDs are reused, and a helper may have been killed.
        std::fs::remove_dir_all(&entry.0).ok();
        let own = entry.0.join(id);
        std::fs::create_dir_all(&own)?;
        let mut container = load(id)?;
        container.state.bundle = bundle(id).join(ADDED);
        // A container that waits for its start is ready for exec processes, but libcontainer refuses it by its status.
        if container.status() == ContainerStatus::Created {
            container.set_status(ContainerStatus::Running);
        }
        container.root = own;
        container.save()?;
        Ok(entry)
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).ok();
    }
}

fn exec(
    id: &str,
    cgroup: &str,
    terminal: &str,
    console: &str,
    extra_fds: &str,
    process: &str,
) -> Result<i32> {
    let extra_fds = take_extra_fds(extra_fds)?;
    let text = std::fs::read(process).context("cannot read the process")?;
    let mut wanted: Process = serde_json::from_slice(&text)?;
    let shared = std::fs::read(bundle(id).join(ADDED).join(SHARED))?;
    let (seccomp, affinity, mappings): (_, _, Option<Vec<LinuxIdMapping>>) =
        serde_json::from_slice(&shared)?;
    let first = load(id)?.pid().map(|pid| pid.as_raw());
    let uid = configuration::mapped(mappings.as_ref(), wanted.user().uid());
    let users = match (mappings, first) {
        (Some(_), Some(first)) => Some(UserNamespace::take(&mut wanted, first)?),
        _ => None,
    };
    let privileges = Privileges::of_added(&mut wanted, seccomp);
    let affinity = Affinity::take(&mut wanted, affinity);
    affinity.begin()?;
    std::fs::write(process, serde_json::to_vec(&wanted)?)?;
    let confinement = Confinement {
        groups: match cgroup.is_empty() {
            true => cgroup::join_files(id, first)?,
            false => vec![cgroup::join_file(id, cgroup)?],
        },
        affinity,
        uid,
        users,
        terminal: console_path(console)
            .map(|_| serde_json::from_str(terminal))
            .transpose()?,
    };
    let (program, reason) = Program::new(Some(confinement), privileges)?;
    let entry = Entry::make(id)?;
    let built = ContainerBuilder::new(id.to_owned(), SyscallType::default())
        .with_root_path(&entry.0)?
        .with_console_socket(console_path(console))
        .with_executor(program)
        .with_preserved_fds(extra_fds)
        .as_tenant()
        .with_detach(true)
        .with_process(Some(process))
        .build();
    let pid = built.map_err(|error| {
        let told = reason.read();
        classify_error(error, told.or_else(|| no_directory(id, wanted.cwd())))
    })?;
    Ok(pid.as_raw())
}

/// The error for a missing working directory of a process, which libcontainer does not report.
fn no_directory(id: &str, cwd: &Path) -> Option<ErrorReason> {
    let first = load(id).ok()?.pid()?.as_raw();
    let root = Rootfs::open(Path::new(&format!("/proc/{first}/root"))).ok()?;
    not_a_directory(&root, cwd)
}

/// The same for the first process. Directories in mounts are not seen from here.
fn no_first_directory(id: &str) -> Option<ErrorReason> {
    let spec = Spec::load(bundle(id).join(CONFIG)).ok()?;
    let cwd = spec.process().as_ref()?.cwd();
    let mut mounts = spec.mounts().iter().flatten();
    if mounts.any(|mount| cwd.starts_with(mount.destination())) {
        return None;
    }
    let root = Rootfs::open(spec.root().as_ref()?.path()).ok()?;
    not_a_directory(&root, cwd)
}

fn not_a_directory(root: &Rootfs, cwd: &Path) -> Option<ErrorReason> {
    let reason = match root.find(cwd) {
        Ok(_) if root.is_directory(cwd) => return None,
        Ok(_) => "it is not a directory".into(),
        Err(error) => format!("{error:#}"),
    };
    Some(ErrorReason::NotExecutable {
        exit_status: executor::CANNOT_RUN,
        reason: format!("the working directory {}: {reason}", cwd.display()),
    })
}

/// Creates a process in a new pid namespace, which is reparented to PID 1.
fn pause() -> Result<i32> {
    crate::sys::new_pids().context("cannot make a pid namespace")?;
    let mut first = Command::new("/proc/self/exe");
    let first = first.arg0("/pause").arg(PAUSE).spawn();
    Ok(first.context("cannot start a process")?.id() as i32)
}

/// Main function of that process: it reaps its children. It is the first process that containers see, so it has no files and
/// no privileges.
pub(crate) fn pause_main() -> ! {
    crate::sys::collect_children();
    if let Err(error) = isolate() {
        crate::sys::kernel_log(&format!("koya-agent: pause: {error:#}"));
        std::process::exit(1);
    }
    loop {
        std::thread::park();
    }
}

fn isolate() -> Result<()> {
    const NOBODY: u32 = 65_535;
    // If it were killed, the whole namespace would end.
    std::fs::write("/proc/self/oom_score_adj", "-1000")?;
    // Not earlier: the helper still writes its outcome to its mounts.
    crate::sys::new_mounts()?;
    mount_change(
        "/",
        MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
    )?;
    let empty = Path::new("/pause");
    std::fs::create_dir_all(empty)?;
    mount("empty", empty, "tmpfs", MountFlags::RDONLY, c"size=4k")?;
    // Everything below the root of the initramfs, which itself can't be left by pivot_root(2).
    for mounted in ["/run", "/dev", "/sys", "/proc"] {
        unmount(mounted, UnmountFlags::DETACH).with_context(|| mounted.to_owned())?;
    }
    rustix::process::chdir(empty)?;
    mount_move(".", "/")?;
    rustix::process::chroot(".")?;
    rustix::process::chdir("/")?;
    let (uid, gid) = (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY));
    rustix::thread::set_thread_groups(&[])?;
    rustix::thread::set_thread_res_gid(gid, gid, gid)?;
    // This drops the privileges.
    rustix::thread::set_thread_res_uid(uid, uid, uid)?;
    Ok(())
}

/// On failure, the start of the container reports that it can't be entered.
fn working_directory(root: &str, path: &str, uid: &str, gid: &str) -> ExitCode {
    // libcontainer writes the container's state to standard input, and a broken pipe would end it.
    std::io::copy(&mut std::io::stdin(), &mut std::io::sink()).ok();
    if let (Ok(uid), Ok(gid)) = (uid.parse(), gid.parse())
        && let Err(error) = crate::root_setup::make_working_directory(root, path, (uid, gid))
    {
        crate::sys::kernel_log(&format!("koya-agent: no {path}: {error:#}"));
    }
    ExitCode::SUCCESS
}

/// On failure, the container is not created.
fn hook(work: impl FnOnce() -> Result<()>) -> ExitCode {
    // libcontainer writes the container's state to standard input, and a broken pipe would end it.
    std::io::copy(&mut std::io::stdin(), &mut std::io::sink()).ok();
    match work() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            crate::sys::kernel_log(&format!("koya-agent: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn delete(id: &str) -> Result<i32> {
    if !Path::new(STATE).join(id).exists() {
        bail!(ErrorReason::NotFound(format!("no container {id}")));
    }
    // libcontainer removes the container's own group, which must be empty.
    let ended = cgroup::end_nested(id);
    let deleted = load(id)?.delete(true);
    ended?;
    deleted?;
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_memory_limit_that_is_too_low_is_named() {
        let spec = |limit: i64| -> Spec {
            let process = serde_json::json!({"cwd": "/", "user": {"uid": 0, "gid": 0}});
            let resources = serde_json::json!({"memory": {"limit": limit}});
            serde_json::from_value(
                serde_json::json!({"ociVersion": "1.0.2", "process": process,
                "linux": {"resources": resources}}),
            )
            .unwrap()
        };
        let died = r#"Channel(ReceiveError { source: BrokenChannel })"#;
        let named = too_little_memory(&spec(4096), died).map(|reason| reason.to_string());
        assert!(named.unwrap().contains("4096 bytes is too low"));
        assert_eq!(too_little_memory(&spec(4096), "Io"), None);
        assert_eq!(too_little_memory(&spec(-1), died), None);
    }

    #[test]
    fn a_helpers_outcome_keeps_its_kind_whatever_its_text_says() {
        let through = |result: Result<i32>| {
            let text = serde_json::to_vec(&Outcome::of(result)).unwrap();
            serde_json::from_slice::<Outcome>(&text).unwrap().made()
        };
        assert_eq!(through(Ok(7)).unwrap(), 7);
        let refused = ErrorReason::NotExecutable {
            exit_status: 126,
            reason: "pid 1 error\n".into(),
        };
        let error = through(Err(refused.clone().into())).unwrap_err();
        assert_eq!(error.downcast_ref::<ErrorReason>(), Some(&refused));
        let error = through(Err(anyhow!("pid 7").context("refused 127"))).unwrap_err();
        assert!(error.downcast_ref::<ErrorReason>().is_none());
        assert_eq!(error.to_string(), "refused 127: pid 7");
    }
}
