//! The long-lived process: it detaches from its creator, enters the namespaces of its sandbox and gives up privileges while
//! it is single-threaded, and serves until nothing is left to serve.

use crate::events::Events;
use crate::flags::Flags;
use crate::launch;
use crate::service::{self, Service};
use anyhow::{Context, Result};
use koya::vmm::host::threads;
use koya_tasks::{PidHolder, Spec, TaskSet, TaskSetConfig, cgroup, give_up_privileges};
use rustix::fs::{Mode, OFlags};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// Time for the last reply to reach containerd: there is no notification of that.
const LAST_ANSWER: Duration = Duration::from_millis(50);

/// Time limit for sending the remaining events.
const EVENTS_LIMIT: Duration = Duration::from_secs(2);

/// Time after which a shim without a container ends, and interval of the check.
const FORGOTTEN: Duration = Duration::from_secs(30);
const LOOK: Duration = Duration::from_secs(5);

pub(crate) fn serve(flags: &Flags) -> Result<()> {
    let listener = become_daemon()?;
    let bundle = flags.bundle()?;
    start_log(&bundle, flags.debug);
    if let Err(error) = koya::confinement::report_violations_in(&bundle) {
        log::warn!("a violation would not be the reason of the end: {error}");
    }
    let served = serve_bundle(flags, &bundle, listener);
    if let Err(error) = &served {
        log::error!("{error:#}");
    }
    served
}

fn serve_bundle(flags: &Flags, bundle: &Path, listener: UnixListener) -> Result<()> {
    let spec = Spec::read(bundle)?;
    let host_network = File::open("/proc/self/ns/net").context("the host's network namespace")?;
    // Errors from here on are the reply to Create: containerd already has the address.
    let ready = spec.enter_namespaces().map_err(anyhow::Error::from);
    let ready = ready.and_then(|()| match is_core_scheduling_asked() {
        true => koya::enable_core_scheduling().context("SCHED_CORE"),
        false => Ok(()),
    });
    if let Some(group) = spec.cgroup()
        && let Err(error) = cgroup::enter(&group)
    {
        log::warn!("cannot enter {}: {error}", group.display());
    }
    cgroup::have_all_cpus();
    koya::vmm::devices::fs::raise_descriptor_limit();
    let ready = ready.and_then(|()| give_up_privileges(true));

    PidHolder::lend_first_thread("koya-shim", |first_thread| {
        let config = TaskSetConfig {
            namespace: flags.namespace.clone(),
            log_console: flags.debug,
            unready: ready.err().map(|error| format!("{error:#}")),
            host_network: Some(host_network),
            first_thread: Some(first_thread),
            state: Some(bundle.to_owned()),
        };
        serve_tasks(flags, config, listener, spec.cgroup().as_deref())
    })?
}

/// Ends the process if nothing is left to serve.
fn serve_tasks(
    flags: &Flags,
    config: TaskSetConfig,
    listener: UnixListener,
    cgroup: Option<&Path>,
) -> Result<()> {
    let (end, ended) = channel();
    let events = Arc::new(Events::start(&flags.namespace)?);
    let tasks = TaskSet::new(config, events.clone());
    let service = Service::new(tasks.clone(), end.clone());
    let signalled = tasks.clone();
    let mut caught = signal_hook::iterator::Signals::new([
        signal_hook::consts::SIGTERM,
        signal_hook::consts::SIGINT,
    ])?;
    spawn("koya-signals", move || {
        if caught.forever().next().is_some() {
            log::warn!("asked to end by a signal");
            signalled.stop();
            end.send(()).ok();
        }
    })?;
    spawn("koya-rpc", move || {
        if let Err(error) = service::run(listener, service) {
            log::error!("cannot serve containerd: {error:#}");
        }
    })?;

    // containerd may die before its first request, or before its last one: no other program knows of this process.
    let mut without = None;
    while let Err(RecvTimeoutError::Timeout) = ended.recv_timeout(LOOK) {
        without = match tasks.is_empty() {
            true => without.or_else(|| Some(Instant::now())),
            false => None,
        };
        if without.is_some_and(|since: Instant| since.elapsed() > FORGOTTEN) {
            log::warn!("exiting: no container for {FORGOTTEN:?}");
            break;
        }
    }
    // First of all: the next container with this ID must not find an ending shim.
    fs::remove_file(launch::socket(flags, &flags.id)).ok();
    std::thread::sleep(LAST_ANSWER);
    tasks.finish();
    events.finish(EVENTS_LIMIT);
    if let Some(group) = cgroup {
        cgroup::leave(group);
    }
    // Threads that are still waiting end with the process.
    std::process::exit(0);
}

/// Whether containerd requests core scheduling for all of its shims.
fn is_core_scheduling_asked() -> bool {
    std::env::var_os("SCHED_CORE").is_some_and(|value| !value.is_empty())
}

/// Starts a detached thread.
fn spawn(name: &'static str, work: impl FnOnce() + Send + 'static) -> Result<()> {
    threads::spawn(name, work).context("cannot start a thread")?;
    Ok(())
}

/// Takes the listener from standard input and detaches from the process that started this one.
fn become_daemon() -> Result<UnixListener> {
    let listener = io::stdin().as_fd().try_clone_to_owned()?;
    let null = File::open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    drop(null);
    rustix::process::setsid()?;
    // Descriptors that containerd leaked to its children.
    let open = fs::read_dir("/proc/self/fd")?.flatten();
    let open: Vec<i32> = open
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    for number in open
        .into_iter()
        .filter(|n| *n > 2 && *n != listener.as_raw_fd())
    {
        nix::unistd::close(number).ok();
    }
    Ok(listener.into())
}

/// containerd's FIFO for a shim's log. While containerd is away nothing reads it, and writers must never block: lines are
/// lost then.
struct Log(File);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes).ok();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn start_log(bundle: &Path, debug: bool) {
    let mut open = OpenOptions::new();
    // Read and write, so that it can be opened while containerd is away.
    open.read(true)
        .write(true)
        .custom_flags(OFlags::NONBLOCK.bits() as i32);
    let Ok(fifo) = open.open(bundle.join("log")) else {
        return;
    };
    // Violations are then reported in containerd's log, too, not only by the exit status.
    if let Ok(log) = fifo.try_clone() {
        koya::vmm::host::sys::report_violations_to(log.into());
    }
    rustix::process::umask(Mode::from_raw_mode(0o022));
    let filters = if debug { "debug" } else { "info" };
    env_logger::Builder::new()
        .parse_filters(&std::env::var("KOYA_LOG").unwrap_or_else(|_| filters.into()))
        .filter_module(koya::GUEST_LOG, log::LevelFilter::Off)
        .target(env_logger::Target::Pipe(Box::new(Log(fifo))))
        .try_init()
        .ok();
    // Standard error is not connected, and a panic ends this process.
    std::panic::set_hook(Box::new(|info| {
        let thread = std::thread::current();
        log::error!("thread {}: {info}", thread.name().unwrap_or("unnamed"));
    }));
}
