//! Hooks of an OCI configuration that run on the host: prestart, createRuntime, createContainer, poststart,
//! poststop.
//!
//! They run in the host's network namespace (a hook may set up the container's, and talks to daemons), and in the
//! mount namespace of the sandbox's process, which sees the container's root as well as the host's mounts. Only
//! createContainer hooks run in the container's network namespace. In a process that has given up privileges a thread that
//! has kept them starts the hooks (`launcher`).
//!
//! The output of a hook goes to memory files instead of pipes: a background process of the hook would keep a pipe open, and
//! the wait for its end would block.

use crate::Error;
use crate::launcher::launch;
use crate::logger::has_ended_within;
use crate::set::{Task, TaskSet};
use crate::spec::Spec;
use anyhow::{Context, Result, anyhow, bail};
use koya::hook;
use koya::oci_spec::runtime::{ContainerState, Hook, Hooks, State};
use koya::vmm::host::threads;
use nix::sched::{CloneFlags, setns};
use rustix::fs::MemfdFlags;
use rustix::process::{Pid, Signal, kill_process_group};
use std::fs::{self, File};
use std::io::{ErrorKind, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::FileExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus};
use std::time::Duration;

/// Maximum number of bytes of a failed hook's output in the error: the end of it.
const TAIL: u64 = 2048;

/// File in the bundle while a container's poststop hooks are pending.
const POSTSTOP_DUE: &str = "koya-poststop";

/// Kind of a hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// After the container's namespaces have been created, before its program is started.
    Prestart,
    /// As [`Prestart`](Self::Prestart), after those hooks.
    CreateRuntime,
    /// As [`CreateRuntime`](Self::CreateRuntime), after those hooks, in the container's namespaces on the host.
    CreateContainer,
    /// After its program has been started.
    Poststart,
    /// After it has been deleted.
    Poststop,
}

impl Kind {
    /// All kinds, in the order in which their hooks run.
    pub const ALL: [Self; 5] = [
        Self::Prestart,
        Self::CreateRuntime,
        Self::CreateContainer,
        Self::Poststart,
        Self::Poststop,
    ];

    /// Name in the configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Prestart => "prestart",
            Self::CreateRuntime => "createRuntime",
            Self::CreateContainer => "createContainer",
            Self::Poststart => "poststart",
            Self::Poststop => "poststop",
        }
    }

    /// The hooks of this kind.
    pub fn of(self, hooks: &Hooks) -> &[Hook] {
        let list = match self {
            Self::Prestart => hooks.prestart(),
            Self::CreateRuntime => hooks.create_runtime(),
            Self::CreateContainer => hooks.create_container(),
            Self::Poststart => hooks.poststart(),
            Self::Poststop => hooks.poststop(),
        };
        list.as_deref().unwrap_or_default()
    }

    fn status(self) -> ContainerState {
        match self {
            Self::Prestart | Self::CreateRuntime | Self::CreateContainer => {
                ContainerState::Creating
            }
            Self::Poststart => ContainerState::Running,
            Self::Poststop => ContainerState::Stopped,
        }
    }
}

/// Environment in which hooks run.
#[derive(Clone, Copy, Debug)]
pub struct HookContext<'a> {
    /// Working directory: the container's bundle, or its root for createContainer hooks, as with runc.
    pub directory: &'a Path,
    /// The network namespace, if not that of the calling thread.
    pub network: Option<&'a File>,
    /// Files to which standard output and standard error are appended. Otherwise both are part of the error of a hook that
    /// fails.
    pub output: [Option<&'a Path>; 2],
}

/// Checks hooks before any of them is run. Those of poststop are not: they are run even where one of them fails.
///
/// # Errors
/// The invalid hook.
pub(crate) fn check(hooks: &Hooks) -> Result<(), Error> {
    let kinds = [
        Kind::Prestart,
        Kind::CreateRuntime,
        Kind::CreateContainer,
        Kind::Poststart,
    ];
    for kind in kinds {
        hook::check(kind.name(), kind.of(hooks)).map_err(|why| anyhow!(why))?;
    }
    Ok(())
}

/// Runs hooks one after the other until one fails. Each gets the container's state on its standard input.
///
/// # Errors
/// A hook that can't be run, fails, or exceeds its timeout (then it and its process group are killed).
pub fn run(
    kind: Kind,
    hooks: &[Hook],
    state: &State,
    context: HookContext<'_>,
) -> Result<(), Error> {
    each(kind, hooks, state, context, |failed| failed)
}

/// Runs all poststop hooks, even if some of them fail, or the directory is gone: the bundle may be removed before the
/// container.
///
/// # Errors
/// If no hook can be run at all.
pub fn run_poststop(hooks: &[Hook], state: &State, context: HookContext<'_>) -> Result<(), Error> {
    let directory = match context.directory.is_dir() {
        true => context.directory,
        false => Path::new("/"),
    };
    let context = HookContext {
        directory,
        ..context
    };
    each(Kind::Poststop, hooks, state, context, |ran| {
        if let Err(error) = ran {
            log::warn!("{}", poststop_failure(&error));
        }
        Ok(())
    })
}

/// A hook that ended with an error, and the end of its output.
#[derive(Debug, thiserror::Error)]
#[error("{status}{output}")]
struct Failed {
    status: ExitStatus,
    output: String,
}

/// The warning about a poststop hook, which begins as crun's.
fn poststop_failure(error: &anyhow::Error) -> String {
    let failed = error.downcast_ref::<Failed>();
    match failed.and_then(|failed| failed.status.code()) {
        Some(code) => format!("poststop hook failed with exit code {code}: {error:#}"),
        None => format!("{error:#}"),
    }
}

fn each(
    kind: Kind,
    hooks: &[Hook],
    state: &State,
    context: HookContext<'_>,
    judge: fn(Result<()>) -> Result<()>,
) -> Result<(), Error> {
    if hooks.is_empty() {
        return Ok(());
    }
    let state = serde_json::to_vec(state).context("cannot write the container's state")?;
    let network = context.network.map(File::try_clone).transpose();
    let list = HookList {
        kind,
        hooks: hooks.to_vec(),
        state,
        directory: context.directory.to_owned(),
        output: context.output.map(|file| file.map(Path::to_owned)),
        network: network.context("the host's network namespace")?,
        judge,
    };
    Ok(launch(move || list.run())?)
}

/// Hooks to run one after the other.
struct HookList {
    kind: Kind,
    hooks: Vec<Hook>,
    /// The container's state, as text.
    state: Vec<u8>,
    directory: PathBuf,
    output: [Option<PathBuf>; 2],
    network: Option<File>,
    judge: fn(Result<()>) -> Result<()>,
}

impl HookList {
    fn run(&self) -> Result<()> {
        let Some(network) = &self.network else {
            return self.run_here();
        };
        // Network namespaces are per thread.
        std::thread::scope(|scope| {
            let entered = || {
                setns(network, CloneFlags::CLONE_NEWNET)
                    .context("cannot enter the host's network")?;
                self.run_here()
            };
            let thread = threads::spawn_scoped(scope, "koya-hook", entered);
            let thread = thread.context("cannot start a thread")?;
            thread
                .join()
                .map_err(|_| anyhow!("a hook's thread ended"))?
        })
    }

    fn run_here(&self) -> Result<()> {
        let context = HookContext {
            directory: &self.directory,
            network: self.network.as_ref(),
            output: self.output.each_ref().map(Option::as_deref),
        };
        self.hooks.iter().enumerate().try_for_each(|(index, hook)| {
            let name = || hook::failure(self.kind.name(), index, hook);
            (self.judge)(run_one(hook, &self.state, context).with_context(name))
        })
    }
}

/// Runs the pending poststop hooks of a container whose sandbox was killed. Does nothing if they have already run, or are
/// not due.
///
/// # Errors
/// If they can't be run.
pub fn run_overdue(id: &str, bundle: &Path) -> Result<(), Error> {
    let due = bundle.join(POSTSTOP_DUE);
    if !due.exists() {
        return Ok(());
    }
    let mut spec = Spec::read(bundle)?;
    let hooks = spec.take_host_hooks();
    let state = spec.state(id, bundle, Kind::Poststop.status(), None);
    let context = HookContext {
        directory: bundle,
        network: None,
        output: [None; 2],
    };
    run_poststop(Kind::Poststop.of(&hooks), &state, context)?;
    Ok(fs::remove_file(due).context("the bundle")?)
}

impl TaskSet {
    /// Runs a task's hooks.
    ///
    /// # Errors
    /// The hook that fails.
    pub(crate) fn run_hooks(&self, task: &Task, kinds: &[Kind]) -> Result<(), Error> {
        kinds.iter().try_for_each(|kind| {
            let state = self.state_for(task, *kind);
            let root = task.spec.root(&task.bundle);
            let context = self.place_of(task, root.as_deref(), *kind);
            run(*kind, kind.of(&task.hooks), &state, context)
        })
    }

    /// Runs the hooks before a task's start; from now on its poststop hooks are due.
    ///
    /// # Errors
    /// The hook that fails.
    pub(crate) fn run_hooks_of_creation(&self, task: &Task) -> Result<(), Error> {
        if !Kind::Poststop.of(&task.hooks).is_empty() {
            let due = poststop_marker(task);
            fs::write(&due, "").with_context(|| format!("cannot write {}", due.display()))?;
        }
        self.run_hooks(
            task,
            &[Kind::Prestart, Kind::CreateRuntime, Kind::CreateContainer],
        )
    }

    /// Runs poststop hooks, if they are due.
    pub(crate) fn run_poststop_hooks(&self, task: &Task) {
        let due = poststop_marker(task);
        if Kind::Poststop.of(&task.hooks).is_empty() || !due.exists() {
            return;
        }
        let state = self.state_for(task, Kind::Poststop);
        let hooks = Kind::Poststop.of(&task.hooks);
        if let Err(error) = run_poststop(hooks, &state, self.place_of(task, None, Kind::Poststop)) {
            log::warn!("{error}");
        }
        match fs::remove_file(&due) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                log::warn!("{}: {error}", due.display());
            }
            _ => {}
        }
    }

    /// createContainer hooks start in the container's root, if it is a directory, and in its network namespace.
    fn place_of<'a>(
        &'a self,
        task: &'a Task,
        root: Option<&'a Path>,
        kind: Kind,
    ) -> HookContext<'a> {
        let is_inside = kind == Kind::CreateContainer;
        let root = root.filter(|root| is_inside && root.is_dir());
        HookContext {
            directory: root.unwrap_or(&task.bundle),
            network: self.config.host_network.as_ref().filter(|_| !is_inside),
            output: [None; 2],
        }
    }

    fn state_for(&self, task: &Task, kind: Kind) -> State {
        let pid = (kind != Kind::Poststop).then(|| task.pid());
        task.spec.state(&task.id, &task.bundle, kind.status(), pid)
    }
}

fn poststop_marker(task: &Task) -> PathBuf {
    task.bundle.join(POSTSTOP_DUE)
}

fn run_one(hook: &Hook, state: &[u8], context: HookContext<'_>) -> Result<()> {
    let (mut command, limit) = hook::program(hook).map_err(anyhow::Error::msg)?;
    let (mut input, output) = (memory("hook-in")?, memory("hook-out")?);
    input.write_all(state)?;
    input.seek(SeekFrom::Start(0))?;
    let mut child = command
        .process_group(0)
        .current_dir(context.directory)
        .stdin(input)
        .stdout(appended(context.output[0], &output)?)
        .stderr(appended(context.output[1], &output)?)
        .spawn()
        .context("cannot be run")?;
    let Some(status) = wait(&mut child, limit)? else {
        let limit = limit.unwrap_or_default();
        bail!("did not end within {limit:?}{}", tail(&output));
    };
    if !status.success() {
        let output = tail(&output);
        return Err(Failed { status, output }.into());
    }
    Ok(())
}

/// A file for the output of a hook: the named one, or `other`.
fn appended(file: Option<&Path>, other: &File) -> Result<File> {
    let Some(path) = file else {
        return Ok(other.try_clone()?);
    };
    let opened = File::options().append(true).create(true).open(path);
    opened.with_context(|| format!("cannot open {}", path.display()))
}

/// Waits for a hook's end; `None` if it took longer than `limit` and was killed.
fn wait(child: &mut Child, limit: Option<Duration>) -> Result<Option<ExitStatus>> {
    let group = Pid::from_child(child);
    let is_late = limit.is_some_and(|limit| !has_ended_within(group, limit));
    if is_late {
        kill_process_group(group, Signal::KILL).ok();
    }
    let status = child.wait()?;
    Ok((!is_late).then_some(status))
}

fn memory(name: &str) -> Result<File> {
    let file = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC);
    Ok(file.context("cannot make a file in memory")?.into())
}

/// The end of the output, to be appended to an error.
fn tail(output: &File) -> String {
    let length = output.metadata().map_or(0, |metadata| metadata.len());
    let mut bytes = vec![0; length.min(TAIL) as usize];
    let start = length - bytes.len() as u64;
    if output.read_exact_at(&mut bytes, start).is_err() {
        return String::new();
    }
    let text = String::from_utf8_lossy(&bytes);
    match text.trim() {
        "" => String::new(),
        text => format!(": {}", text.replace('\n', "; ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::time::Instant;

    fn state(id: &str) -> State {
        let state = json!({"ociVersion": "1.2.0", "id": id, "status": "creating", "pid": 4242, "bundle": "/b"});
        serde_json::from_value(state).unwrap()
    }

    fn sh(script: &str) -> serde_json::Value {
        json!({"path": "/bin/sh", "args": ["sh", "-c", script]})
    }

    fn hook(value: serde_json::Value) -> Hook {
        serde_json::from_value(value).unwrap()
    }

    fn here() -> HookContext<'static> {
        HookContext {
            directory: Path::new("/tmp"),
            network: None,
            output: [None; 2],
        }
    }

    fn error(value: serde_json::Value) -> String {
        let error = run(Kind::Prestart, &[hook(value)], &state("c1"), here());
        error.unwrap_err().to_string()
    }

    fn is_there(path: &Path) -> bool {
        fs::exists(path).unwrap()
    }

    #[test]
    fn output_may_go_to_files() {
        let dir = tempfile::tempdir().unwrap();
        let [out, err] = ["out", "err"].map(|name| dir.path().join(name));
        let context = HookContext {
            directory: dir.path(),
            network: None,
            output: [Some(out.as_path()), Some(err.as_path())],
        };
        let hooks = [hook(sh("echo one; echo other >&2"))];
        for _ in 0..2 {
            run(Kind::Prestart, &hooks, &state("c"), context).unwrap();
        }
        assert_eq!(fs::read_to_string(&out).unwrap(), "one\none\n");
        assert_eq!(fs::read_to_string(&err).unwrap(), "other\nother\n");
        let nowhere = dir.path().join("none/out");
        let context = HookContext {
            output: [Some(nowhere.as_path()), None],
            ..context
        };
        let error = run(Kind::Prestart, &hooks, &state("c"), context).unwrap_err();
        assert!(format!("{error:#}").contains("none/out"), "{error:#}");
    }

    #[test]
    fn a_hook_gets_the_state_its_name_and_its_environment() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let mut one = sh("{ echo $0 $1 A=$A PATH=$PATH HOME=$HOME; pwd; cat; } > $OUT");
        one["args"] = json!(["sh", "-c", one["args"][2], "setkey", "-exec-root=/run"]);
        one["env"] = json!([
            format!("OUT={}", out.display()),
            "A=b=c",
            "PATH=/usr/bin:/bin"
        ]);
        run(Kind::Prestart, &[hook(one)], &state("c1"), here()).unwrap();
        let text = fs::read_to_string(out).unwrap();
        let (line, rest) = text.split_once('\n').unwrap();
        let (directory, json) = rest.split_once('\n').unwrap();
        assert_eq!(directory, "/tmp");
        assert_eq!(
            line,
            "setkey -exec-root=/run A=b=c PATH=/usr/bin:/bin HOME="
        );
        let got: serde_json::Value = serde_json::from_str(json).unwrap();
        assert_eq!((&got["id"], &got["pid"]), (&json!("c1"), &json!(4242)));
        assert_eq!(got["status"], "creating");
    }

    #[test]
    fn the_first_hook_that_fails_is_the_last_that_runs() {
        let dir = tempfile::tempdir().unwrap();
        let touch = |name: &str| hook(sh(&format!("touch {}", dir.path().join(name).display())));
        let hooks = [
            touch("one"),
            hook(sh("echo no room >&2; exit 3")),
            touch("two"),
        ];
        let error = run(Kind::CreateRuntime, &hooks, &state("c1"), here()).unwrap_err();
        let error = error.to_string();
        assert_eq!(
            error,
            "error running createRuntime hook #1: /bin/sh: exit status: 3: no room"
        );
        assert!(is_there(&dir.path().join("one")));
        assert!(!is_there(&dir.path().join("two")));
    }

    #[test]
    fn a_hook_that_takes_too_long_is_killed_with_its_children() {
        let dir = tempfile::tempdir().unwrap();
        let alive = dir.path().join("alive");
        fs::create_dir(&alive).unwrap();
        let script = "echo waiting; (cd ALIVE && exec sleep 1000) & wait";
        let mut slow = sh(&script.replace("ALIVE", alive.to_str().unwrap()));
        slow["timeout"] = json!(1);
        let started = Instant::now();
        assert!(error(slow).ends_with("did not end within 1s: waiting"));
        assert!(started.elapsed() < Duration::from_secs(100));
        let lives = || {
            let processes = fs::read_dir("/proc").unwrap().flatten();
            processes
                .filter_map(|process| fs::read_link(process.path().join("cwd")).ok())
                .any(|directory| directory == alive)
        };
        while lives() {
            assert!(started.elapsed() < Duration::from_secs(100));
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// A pipe would be full, or kept open by a background process of the hook.
    #[test]
    fn neither_much_input_nor_output_nor_a_daemon_is_waited_for() {
        let started = Instant::now();
        let hooks = [
            hook(sh("sleep 30 & exit 0")),
            hook(sh("head -c 300000 /dev/zero")),
            hook(json!({"path": "/bin/true"})),
        ];
        run(
            Kind::Poststart,
            &hooks,
            &state(&"x".repeat(300_000)),
            here(),
        )
        .unwrap();
        assert!(started.elapsed() < Duration::from_secs(25));
    }

    #[test]
    fn the_exit_code_of_a_poststop_hook_is_told() {
        let ran = |script: &str| {
            let ran = run_one(&hook(sh(script)), b"{}", here()).context("a hook");
            poststop_failure(&ran.unwrap_err())
        };
        let said = ran("echo why; exit 3");
        assert_eq!(
            said,
            "poststop hook failed with exit code 3: a hook: exit status: 3: why"
        );
        assert!(ran("kill -9 $$").starts_with("a hook: signal: 9"));
    }

    #[test]
    fn every_poststop_hook_runs() {
        let dir = tempfile::tempdir().unwrap();
        let two = format!("touch {}", dir.path().join("two").display());
        let hooks = [hook(sh("exit 1")), hook(sh(&two))];
        run_poststop(&hooks, &state("c1"), here()).unwrap();
        assert!(is_there(&dir.path().join("two")));
        // The bundle is gone.
        fs::remove_file(dir.path().join("two")).unwrap();
        let gone = HookContext {
            directory: Path::new("/no/such"),
            network: None,
            output: [None; 2],
        };
        run_poststop(&hooks, &state("c1"), gone).unwrap();
        assert!(is_there(&dir.path().join("two")));
    }

    #[test]
    fn what_is_no_hook_is_refused() {
        assert!(error(json!({"path": "bin/true"})).contains("not absolute"));
        assert!(error(json!({"path": "/bin/true", "timeout": 0})).contains("a timeout of 0 s"));
        assert!(error(json!({"path": "/bin/true", "timeout": -1})).contains("a timeout of -1 s"));
        assert!(error(json!({"path": "/no/such"})).contains("cannot be run: No such file"));
        assert!(error(sh("kill -9 $$")).contains("signal: 9"));
        let long = error(sh("head -c 9000 /dev/zero | tr '\\0' x; exit 1"));
        assert!(long.len() < 2200 && long.ends_with("xx"), "{}", long.len());
    }
}
