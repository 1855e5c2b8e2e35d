//! Containers and their processes.

use crate::Error;
use crate::account::Accounts;
use crate::agent::{self, Agent};
use crate::ends::Mark;
use crate::given::Given;
use crate::mount_points;
use crate::oci::{self, Bundle, SharedPids};
use crate::sandbox::Inner;
use crate::spec::{self, ContainerConfig, Device, ProcessConfig, Root, Stdio};
use crate::stats::ContainerStats;
use crate::streams::Expected;
use crate::sync::lock;
use koya_protocol::messages;
use koya_vmm::DiskConfig;
use koya_vmm::devices::threads;
use oci_spec::runtime::{LinuxResources, Process as OciProcess, Spec};
use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

/// A container of a sandbox. Its first process's streams are in [`process`](Self::process).
pub struct Container {
    process: Process,
    made_of: MadeOf,
    given: Mutex<Given>,
    next_exec: AtomicU64,
    mark: Arc<Mark>,
}

/// What its further processes are made by.
enum MadeOf {
    Config(Box<ContainerConfig>),
    /// The root file system of an OCI bundle.
    Bundle(PathBuf),
}

/// A process of a container: its streams, and what can be done to it.
pub struct Process {
    inner: Arc<Inner>,
    container: String,
    exec: String,
    /// Writes to its standard input; both ways for a terminal. Dropping it is end of file.
    pub stdin: Option<UnixStream>,
    /// Reads its standard output.
    pub stdout: Option<UnixStream>,
    /// Reads its standard error.
    pub stderr: Option<UnixStream>,
}

/// What a finished process left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// The exit code, or 128 and the signal.
    pub status: i32,
    /// All of its standard output.
    pub stdout: Vec<u8>,
    /// All of its standard error.
    pub stderr: Vec<u8>,
}

/// The streams of a process that is about to be made.
struct Plan {
    message: messages::Stdio,
    stdin: Option<Expected>,
    stdout: Option<Expected>,
    stderr: Option<Expected>,
}

impl Plan {
    fn new(inner: &Inner, stdio: Stdio) -> Result<Self, Error> {
        let expect = || {
            inner
                .streams
                .expect()
                .map(Some)
                .map_err(Error::host("make a token"))
        };
        let (stdin, stdout, stderr) = match stdio {
            Stdio::Null => (None, None, None),
            Stdio::Output => (None, expect()?, expect()?),
            Stdio::Pipes => (expect()?, expect()?, expect()?),
            Stdio::Terminal { .. } => (expect()?, None, None),
        };
        let token = |e: &Option<Expected>| e.as_ref().map(|e| e.token.clone()).unwrap_or_default();
        let (terminal, rows, columns) = match stdio {
            Stdio::Terminal { rows, columns } => (true, rows.into(), columns.into()),
            _ => (false, 0, 0),
        };
        Ok(Self {
            message: messages::Stdio {
                stdin: token(&stdin),
                stdout: token(&stdout),
                stderr: token(&stderr),
                terminal,
                rows,
                columns,
                ..Default::default()
            },
            stdin,
            stdout,
            stderr,
        })
    }

    fn finish(self, inner: Arc<Inner>, container: &str, exec: &str) -> Result<Process, Error> {
        let take = |expected: Option<Expected>| {
            expected
                .map(Expected::take)
                .transpose()
                .map_err(Error::host("connect a standard stream"))
        };
        Ok(Process {
            inner,
            container: container.into(),
            exec: exec.into(),
            stdin: take(self.stdin)?,
            stdout: take(self.stdout)?,
            stderr: take(self.stderr)?,
        })
    }
}

/// What a container in the guest needs beyond its configuration.
#[derive(Default)]
pub(crate) struct Needs {
    pub(crate) devices: Vec<messages::BlockDevice>,
    pub(crate) volumes: Vec<messages::EphemeralVolume>,
    pub(crate) direct: Vec<messages::DiskVolume>,
    pub(crate) shared: Vec<messages::SharedVolume>,
    pub(crate) pids: SharedPids,
}

/// Makes a container's first process, which waits to be started.
fn launch(
    inner: &Arc<Inner>,
    id: &str,
    spec: &Spec,
    needs: Needs,
    stdio: Stdio,
) -> Result<Process, Error> {
    let plan = Plan::new(inner, stdio)?;
    let spec =
        serde_json::to_vec(spec).map_err(|e| Error::container("configuration", e.to_string()))?;
    inner.timeline.mark("asked the agent", id);
    inner.agent.create(id, spec, needs, plan.message.clone())?;
    inner.timeline.mark("made in the guest", id);
    let finished = plan.finish(inner.clone(), id, "");
    if finished.is_err() {
        // It is there, and nobody would know it.
        inner.remove_container(id).ok();
    }
    finished
}

impl Container {
    pub(crate) fn create(
        inner: Arc<Inner>,
        id: &str,
        config: &ContainerConfig,
    ) -> Result<Self, Error> {
        let made_of = MadeOf::Config(Box::new(config.clone()));
        Self::make(inner, made_of, id, |inner, given| {
            Self::try_create(inner, id, config, given)
        })
    }

    pub(crate) fn create_oci(
        inner: Arc<Inner>,
        id: &str,
        bundle: &Bundle,
        stdio: Stdio,
    ) -> Result<Self, Error> {
        let made_of = MadeOf::Bundle(bundle.rootfs.clone());
        Self::make(inner, made_of, id, |inner, given| {
            let mut adapted = oci::adapt(id, bundle, &Accounts::read(&bundle.rootfs))?;
            let points = adapted.mount_points.iter();
            let points: Vec<_> = points.map(|(path, file)| (path.as_path(), *file)).collect();
            mount_points::make(&bundle.rootfs, &points)?;
            let shared = given.share(inner, id, adapted.shares, &mut adapted.spec)?;
            let devices = given.attach(inner, adapted.disks)?;
            let needs = Needs {
                devices,
                volumes: adapted.volumes,
                shared,
                direct: given.attach_direct(inner, adapted.direct)?,
                pids: bundle.pids.clone(),
            };
            launch(inner, id, &adapted.spec, needs, stdio)
        })
    }

    fn make(
        inner: Arc<Inner>,
        made_of: MadeOf,
        id: &str,
        make: impl FnOnce(&Arc<Inner>, &mut Given) -> Result<Process, Error>,
    ) -> Result<Self, Error> {
        let mut given = Given::default();
        // It counts among those that live as soon as it is made.
        let mark = inner.ends.add();
        let begun = inner.timeline.begin("create", id);
        match make(&inner, &mut given) {
            Ok(process) => {
                inner.timeline.end(begun);
                Ok(Self {
                    process,
                    made_of,
                    given: Mutex::new(given),
                    next_exec: AtomicU64::new(1),
                    mark,
                })
            }
            Err(error) => {
                let error = inner.explain(error);
                inner.timeline.fail(begun, &error);
                given.take_back(&inner, id);
                Err(error)
            }
        }
    }

    fn try_create(
        inner: &Arc<Inner>,
        id: &str,
        config: &ContainerConfig,
        given: &mut Given,
    ) -> Result<Process, Error> {
        let root = config.check_places()?;
        let accounts = match root {
            Root::Directory => Accounts::read(&config.rootfs),
            Root::Image => {
                let disk = inner.attach_disk(&DiskConfig {
                    read_only: true,
                    ..DiskConfig::new(&config.rootfs)
                })?;
                let name = disk.device().name.clone();
                let (_, is_mounted) = given.image.insert((disk, false));
                inner.agent.mount_image(id, &name)?;
                *is_mounted = true;
                inner.agent.accounts(id)?
            }
        };
        let mut spec = spec::build(id, config, &accounts)?;
        if config.read_only && root == Root::Directory {
            let is_file = |destination: &Path| {
                let volume = config.volumes.iter().find(|v| v.destination == destination);
                volume.is_some_and(|v| v.source.is_file())
            };
            let mounts = spec.mounts().iter().flatten();
            let points: Vec<_> = mounts
                .map(|m| (m.destination().as_path(), is_file(m.destination())))
                .collect();
            mount_points::make(&config.rootfs, &points)?;
        }
        let shared = given.share(inner, id, spec::shares(id, config), &mut spec)?;
        let needs = Needs {
            devices: config.devices.iter().map(agent::block_device).collect(),
            shared,
            ..Needs::default()
        };
        launch(inner, id, &spec, needs, config.process.stdio)
    }

    /// Lets the first process run.
    ///
    /// # Errors
    /// If the guest can't.
    pub fn start(&self) -> Result<(), Error> {
        let inner = &self.process.inner;
        let id = &self.process.container;
        let begun = inner.timeline.begin("start", id);
        let started = inner.agent.start(id).map_err(|e| inner.explain(e));
        if let Err(error) = &started {
            inner.timeline.fail(begun, error);
            return started;
        }
        inner.timeline.end(begun);
        // It runs: nobody waits for it any more.
        inner.timeline.keep();
        Ok(())
    }

    /// What it was made of; none if that is an OCI bundle.
    pub fn config(&self) -> Option<&ContainerConfig> {
        match &self.made_of {
            MadeOf::Config(config) => Some(config),
            MadeOf::Bundle(_) => None,
        }
    }

    /// The first process.
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// The first process, to take its streams.
    pub fn process_mut(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Waits for the first process: the exit code, or 128 and the signal. One that was
    /// [killed](Self::kill) has ended by that, whether the guest said so or the machine ended.
    ///
    /// # Errors
    /// Why the virtual machine ended, if it did.
    pub fn wait(&self) -> Result<i32, Error> {
        let inner = &self.process.inner;
        let ended = self.mark.follow(|| self.process.wait());
        let ended = ended.map_err(|error| match error {
            Error::HungUp { .. } => inner.end_without_agent(error),
            error => error,
        });
        match ended {
            Err(Error::Ended { .. }) if self.mark.is_killed() => Ok(128 + libc::SIGKILL),
            ended => ended,
        }
    }

    /// Ends it: SIGKILL for its first process. This does not wait for the end, nor for long for the guest:
    /// the host notes it. If the guest does not report the end within ten seconds, the virtual machine is
    /// ended, with all of its containers.
    ///
    /// # Errors
    /// If it has ended.
    pub fn kill(&self) -> Result<(), Error> {
        self.kill_some(false)
    }

    /// As [`kill`](Self::kill), with SIGKILL for every process in it.
    ///
    /// # Errors
    /// If it has ended.
    pub fn kill_all(&self) -> Result<(), Error> {
        self.kill_some(true)
    }

    fn kill_some(&self, all: bool) -> Result<(), Error> {
        let inner = &self.process.inner;
        inner.ends.kill(&self.mark, &self.process.container, all)
    }

    /// Waits for the first process, collects its output, and removes the container.
    ///
    /// # Errors
    /// As [`wait`](Self::wait).
    pub fn output(mut self) -> Result<Output, Error> {
        let output = self.process.take_output()?;
        self.remove()?;
        Ok(output)
    }

    /// Runs another process in the container.
    ///
    /// # Errors
    /// If the container has ended, or the program can't be found, or the container is an OCI bundle's
    /// (see [`exec_oci`](Self::exec_oci)).
    pub fn exec(&self, config: &ProcessConfig) -> Result<Process, Error> {
        let inner = &self.process.inner;
        let Some(container) = self.config() else {
            let reason = "a container of an OCI bundle takes OCI processes";
            return Err(Error::container("process", reason));
        };
        let has_image = self.given().image.is_some();
        let accounts = match has_image {
            true => inner.agent.accounts(&self.process.container)?,
            false => Accounts::read(&container.rootfs),
        };
        let process = spec::exec_process(container, &accounts, config)?;
        let number = self.next_exec.fetch_add(1, Ordering::Relaxed);
        self.launch(&format!("exec-{number}"), &process, config.stdio)
    }

    /// Runs another process in the container: an OCI configuration's `process`, under a name that no
    /// other process of the container has.
    ///
    /// # Errors
    /// If the container has ended, or the program can't be found.
    pub fn exec_oci(
        &self,
        name: &str,
        process: &OciProcess,
        stdio: Stdio,
    ) -> Result<Process, Error> {
        let rootfs = match &self.made_of {
            MadeOf::Config(config) => &config.rootfs,
            MadeOf::Bundle(rootfs) => rootfs,
        };
        let mut process = process.clone();
        oci::adapt_process(&mut process, &Accounts::read(rootfs))?;
        self.launch(name, &process, stdio)
    }

    fn launch(&self, exec: &str, process: &OciProcess, stdio: Stdio) -> Result<Process, Error> {
        let inner = &self.process.inner;
        let process =
            serde_json::to_vec(process).map_err(|e| Error::container("process", e.to_string()))?;
        let plan = Plan::new(inner, stdio)?;
        let id = &self.process.container;
        inner
            .agent
            .exec(id, exec, process, plan.message.clone())
            .map_err(|e| inner.explain(e))?;
        plan.finish(inner.clone(), id, exec)
    }

    /// Stops all of its processes where they are.
    ///
    /// # Errors
    /// If the guest can't.
    pub fn pause(&self) -> Result<(), Error> {
        self.ask(|agent, id| agent.pause(id))
    }

    /// Lets them go on.
    ///
    /// # Errors
    /// If the guest can't.
    pub fn resume(&self) -> Result<(), Error> {
        self.ask(|agent, id| agent.resume(id))
    }

    /// What it uses, by its control group.
    ///
    /// # Errors
    /// If the agent does not answer.
    pub fn stats(&self) -> Result<ContainerStats, Error> {
        self.ask(|agent, id| agent.container_stats(id))
    }

    /// Changes its limits: an OCI configuration's `linux.resources`, of which what is there is set.
    /// What only a host has (CPU sets, its disks) is left out.
    ///
    /// # Errors
    /// If the guest can't.
    pub fn update(&self, resources: &LinuxResources) -> Result<(), Error> {
        let mut resources = resources.clone();
        oci::only_the_guests(&mut resources);
        let text = serde_json::to_vec(&resources)
            .map_err(|e| Error::container("resources", e.to_string()))?;
        self.ask(|agent, id| agent.update_container(id, text))
    }

    /// Signals every process in it, by number.
    ///
    /// # Errors
    /// If it has ended.
    pub fn signal_all(&self, number: i32) -> Result<(), Error> {
        self.ask(|agent, id| agent.signal(id, "", number, true))
    }

    fn ask<T>(&self, what: impl FnOnce(&Agent, &str) -> Result<T, Error>) -> Result<T, Error> {
        let inner = &self.process.inner;
        what(&inner.agent, &self.process.container).map_err(|error| inner.explain(error))
    }

    /// Gives the running container a disk of its sandbox's.
    ///
    /// # Errors
    /// If there is no such disk, or something stands where it is to be.
    pub fn add_device(&self, device: &Device) -> Result<(), Error> {
        let inner = &self.process.inner;
        let added = inner.agent.add_device(&self.process.container, device);
        added.map_err(|e| inner.explain(e))
    }

    /// Takes a disk from the running container. A process that has it open keeps it.
    ///
    /// # Errors
    /// If the guest can't.
    pub fn remove_device(&self, device: &Device) -> Result<(), Error> {
        let inner = &self.process.inner;
        let removed = inner.agent.remove_device(&self.process.container, device);
        removed.map_err(|e| inner.explain(e))
    }

    /// Removes the container, killing what still runs in it. Nothing can be done to it after that. As long as
    /// its disks are being written out it is waited for; a guest that says nothing for fifteen seconds is ended.
    ///
    /// # Errors
    /// If the guest can't; what the sandbox holds for the container is given up all the same.
    pub fn remove(&self) -> Result<(), Error> {
        let inner = &self.process.inner;
        let id = &self.process.container;
        let removed = inner.remove_container(id);
        self.mark.end();
        std::mem::take(&mut *self.given()).take_back(inner, id);
        removed.map_err(|e| inner.explain(e))
    }

    fn given(&self) -> MutexGuard<'_, Given> {
        lock(&self.given)
    }
}

impl Process {
    /// Waits for its end: the exit code, or 128 and the signal.
    ///
    /// # Errors
    /// Why the virtual machine ended, if it did.
    pub fn wait(&self) -> Result<i32, Error> {
        let status = self.inner.agent.wait(&self.container, &self.exec);
        status.map_err(|e| self.inner.explain(e))
    }

    /// Sends it a signal, by number.
    ///
    /// # Errors
    /// If it has ended.
    pub fn signal(&self, number: i32) -> Result<(), Error> {
        self.inner
            .agent
            .signal(&self.container, &self.exec, number, false)
    }

    /// Tells its terminal a new size.
    ///
    /// # Errors
    /// If it has no terminal.
    pub fn resize(&self, rows: u16, columns: u16) -> Result<(), Error> {
        let (rows, columns) = (rows.into(), columns.into());
        self.inner
            .agent
            .resize(&self.container, &self.exec, rows, columns)
    }

    /// Closes its input, collects its output, and waits for it.
    ///
    /// # Errors
    /// As [`wait`](Self::wait).
    pub fn take_output(&mut self) -> Result<Output, Error> {
        drop(self.stdin.take());
        let collect = |stream: Option<UnixStream>| {
            threads::spawn("koya-collect", move || -> io::Result<Vec<u8>> {
                let mut bytes = Vec::new();
                if let Some(mut stream) = stream {
                    stream.read_to_end(&mut bytes)?;
                }
                Ok(bytes)
            })
            .map_err(Error::host("start a thread"))
        };
        let stdout = collect(self.stdout.take())?;
        let stderr = collect(self.stderr.take())?;
        let status = self.wait()?;
        let join = |thread: std::thread::JoinHandle<io::Result<Vec<u8>>>| {
            thread
                .join()
                .unwrap_or_else(|_| Err(io::Error::other("a reader panicked")))
                .map_err(Error::host("read the process's output"))
        };
        Ok(Output {
            status,
            stdout: join(stdout)?,
            stderr: join(stderr)?,
        })
    }
}
