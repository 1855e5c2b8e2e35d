//! The single-threaded process that calls libcontainer: `koya-agent helper OPERATION ...`.
//!
//! Standard streams 0 to 2 are the container's. The outcome goes to a file, which PID 1 reads
//! when the helper has ended: `pid N`, `error TEXT`, or `refused STATUS TEXT` if the program can't be run, with
//! the status that a shell would exit with.

use crate::cgroup;
use crate::device_rules;
use crate::executor::{Confinement, Program, Reason};
use anyhow::{Context, Result, bail};
use koya_protocol::Refused;
use libcontainer::container::Container;
use libcontainer::container::builder::ContainerBuilder;
use libcontainer::syscall::syscall::SyscallType;
use oci_spec::runtime::{Process, Spec};
use rustix::fs::{Gid, Uid};
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, mount_move, unmount,
};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Arc;

/// The first argument of a helper.
pub(crate) const ARGUMENT: &str = "helper";

/// Where libcontainer keeps what it knows of containers.
const STATE: &str = "/run/koya/state";
/// Where containers' bundles are.
const BUNDLES: &str = "/run/koya/bundles";
/// The cgroup under which containers' cgroups are.
pub(crate) const CGROUPS: &str = "/koya";
/// The cgroup of processes on their way into a container.
pub(crate) const ENTRY_CGROUP: &str = "/koya-entry";
/// Where they have what libcontainer is told of their container.
const ENTRIES: &str = "/run/koya/entries";

/// A container's bundle.
pub(crate) fn bundle(id: &str) -> PathBuf {
    Path::new(BUNDLES).join(id)
}

/// A container's cgroup, as the configuration names it.
pub(crate) fn cgroup(id: &str) -> String {
    format!("{CGROUPS}/{id}")
}

/// The first argument of the first process of the pid namespace that a sandbox's containers share.
pub(crate) const PAUSE: &str = "pause";

/// Runs one operation: `create ID OUTCOME CONSOLE`, `start ID OUTCOME`,
/// `exec ID OUTCOME CONSOLE PROCESS`, `delete ID OUTCOME`, `pause - OUTCOME`. CONSOLE is a socket's
/// path, or `-`.
pub(crate) fn main(args: &[String]) -> ExitCode {
    crate::sys::reset_signals();
    // Lowering it can't fail; a container's own limits come on top.
    crate::limits::restore().ok();
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let (outcome, result) = match args.as_slice() {
        ["create", id, outcome, console] => (outcome, create(id, console)),
        ["start", id, outcome] => (outcome, start(id)),
        ["exec", id, outcome, console, process] => (outcome, exec(id, console, process)),
        ["delete", id, outcome] => (outcome, delete(id)),
        ["pause", _, outcome] => (outcome, pause()),
        _ => return ExitCode::FAILURE,
    };
    let text = match result {
        Ok(pid) => format!("pid {pid}"),
        Err(error) => match error.downcast_ref::<Refused>() {
            Some(Refused::NotExecutable {
                exit_status,
                reason,
            }) => format!("refused {exit_status} {reason}"),
            _ => format!("error {error:#}"),
        },
    };
    match std::fs::write(outcome, text) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn console_path(console: &str) -> Option<PathBuf> {
    (console != "-").then(|| PathBuf::from(console))
}

fn create(id: &str, console: &str) -> Result<i32> {
    std::fs::create_dir_all(STATE)?;
    let (program, reason) = Program::new(None)?;
    let built = ContainerBuilder::new(id.to_owned(), SyscallType::default())
        .with_root_path(STATE)?
        .with_console_socket(console_path(console))
        .with_executor(program)
        .validate_id()?
        .as_init(bundle(id))
        .with_systemd(false)
        .with_detach(true)
        .build();
    let container = built.map_err(|error| why(error.into(), reason))?;
    let spec = Spec::load(bundle(id).join("config.json"))?;
    // libcontainer takes device rules and, without its own BPF feature, ignores them.
    device_rules::apply(id, &spec)?;
    Ok(container
        .pid()
        .context("the container has no process")?
        .as_raw())
}

/// Why libcontainer failed: the program's fault, or another error.
fn why(error: anyhow::Error, reason: Reason) -> anyhow::Error {
    reason.read().map_or(error, Into::into)
}

fn load(id: &str) -> Result<Container> {
    Ok(Container::load(Path::new(STATE).join(id))?)
}

fn start(id: &str) -> Result<i32> {
    let mut container = load(id)?;
    container.start()?;
    Ok(container.pid().map_or(0, |p| p.as_raw()))
}

/// What libcontainer is told of a container by which a process is added to it: as it is, but for the control
/// group. libcontainer forks in there, which the container's own can forbid when it has no process left to
/// give; the program joins that as its last step, which no limit forbids.
struct Entry(PathBuf);

impl Entry {
    fn make(id: &str, mut spec: Spec) -> Result<Self> {
        let entry = Self(Path::new(ENTRIES).join(std::process::id().to_string()));
        // Numbers are used again, and a helper may have been killed.
        std::fs::remove_dir_all(&entry.0).ok();
        let own = entry.0.join(id);
        std::fs::create_dir_all(&own)?;
        if let Some(linux) = spec.linux_mut() {
            linux.set_cgroups_path(Some(ENTRY_CGROUP.into()));
        }
        spec.save(own.join("config.json"))?;
        let mut container = load(id)?;
        container.state.bundle.clone_from(&own);
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

fn exec(id: &str, console: &str, process: &str) -> Result<i32> {
    let spec = Spec::load(bundle(id).join("config.json"))?;
    let text = std::fs::read(process).context("cannot read the process")?;
    let mut wanted: Process = serde_json::from_slice(&text)?;
    // The program drops them itself, after its filter: see `executor`.
    let capabilities = wanted.capabilities().clone();
    wanted.set_capabilities(None);
    std::fs::write(process, serde_json::to_vec(&wanted)?)?;
    let seccomp = spec.linux().as_ref().and_then(|l| l.seccomp().clone());
    let (program, reason) = Program::new(Some(Confinement {
        group: Arc::new(cgroup::door(id)?),
        seccomp,
        capabilities,
    }))?;
    let entry = Entry::make(id, spec)?;
    let built = ContainerBuilder::new(id.to_owned(), SyscallType::default())
        .with_root_path(&entry.0)?
        .with_console_socket(console_path(console))
        .with_executor(program)
        .as_tenant()
        .with_detach(true)
        .with_process(Some(process))
        .build();
    let pid = built.map_err(|error| why(error.into(), reason))?;
    Ok(pid.as_raw())
}

/// A process in a pid namespace of its own, which this one leaves to PID 1.
fn pause() -> Result<i32> {
    crate::sys::new_pids().context("cannot make a pid namespace")?;
    let mut first = Command::new("/proc/self/exe");
    let first = first.arg0("/pause").arg(PAUSE).spawn();
    Ok(first.context("cannot start a process")?.id() as i32)
}

/// What it does: whatever becomes its child is collected. It is the first process that containers see, so
/// it has nothing: no files, no privileges.
pub(crate) fn hold() -> ! {
    crate::sys::collect_children();
    if let Err(error) = let_go() {
        crate::sys::kernel_log(&format!("koya-agent: pause: {error:#}"));
        std::process::exit(1);
    }
    loop {
        std::thread::park();
    }
}

fn let_go() -> Result<()> {
    const NOBODY: u32 = 65_535;
    // With it all of its namespace would end.
    std::fs::write("/proc/self/oom_score_adj", "-1000")?;
    // Not before: the helper still writes to its mounts what it has made.
    crate::sys::new_mounts()?;
    mount_change(
        "/",
        MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
    )?;
    let empty = Path::new("/pause");
    std::fs::create_dir_all(empty)?;
    mount("empty", empty, "tmpfs", MountFlags::RDONLY, c"size=4k")?;
    // All that is below the root of the initramfs, which itself can't be left by pivot_root(2).
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
    // The privileges go with it.
    rustix::thread::set_thread_res_uid(uid, uid, uid)?;
    Ok(())
}

fn delete(id: &str) -> Result<i32> {
    if !Path::new(STATE).join(id).exists() {
        bail!("no container {id}");
    }
    load(id)?.delete(true)?;
    Ok(0)
}
