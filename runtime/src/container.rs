//! Containers and their processes.

use crate::account::Accounts;
use crate::agent::{self, Agent};
use crate::attachments::Attachments;
use crate::container_config::{
    ContainerConfig, Device, ExecOptions, ProcessConfig, ProcessStreams,
};
use crate::guest_resources::GuestResources;
use crate::mount_points;
use crate::notifications::Notifications;
use crate::oci::{self, Bundle, Root};
use crate::pending_streams::{GuestListener, PendingStreams};
use crate::sandbox::Inner;
use crate::stats::ContainerStats;
use crate::sync::lock;
use crate::termination::Termination;
use crate::{Error, Sandbox};
use koya_protocol::messages;
use koya_vmm::DiskConfig;
use koya_vmm::host::threads;
use oci_spec::runtime::{LinuxResources, Process as OciProcess, Spec};
use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

/// A container of a sandbox. [`process`](Self::process) has the streams of its first process.
pub struct Container {
    process: Process,
    /// Its configuration, unless it was created from an OCI bundle.
    config: Option<Box<ContainerConfig>>,
    rootfs: PathBuf,
    /// Its first process, whose privileges apply to added processes.
    first: OciProcess,
    attachments: Mutex<Attachments>,
    next_exec: AtomicU64,
    termination: Arc<Termination>,
}

/// A process of a container, with its streams.
pub struct Process {
    pub(crate) inner: Arc<Inner>,
    pub(crate) container: String,
    pub(crate) exec: String,
    /// Writes to its standard input; both ways for a terminal. Dropping it is end of file.
    pub stdin: Option<UnixStream>,
    /// Reads its standard output.
    pub stdout: Option<UnixStream>,
    /// Reads its standard error.
    pub stderr: Option<UnixStream>,
    /// The host's ends of its descriptors 3 and up.
    pub extra_fds: Vec<UnixStream>,
    /// Its listening sockets among them, in the same order.
    pub listeners: Vec<GuestListener>,
    /// Messages of its container to a service manager, if it has a socket for them.
    pub notifications: Option<Notifications>,
}

/// The result of a finished process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// The exit code, or 128 and the signal.
    pub status: i32,
    /// All of its standard output.
    pub stdout: Vec<u8>,
    /// All of its standard error.
    pub stderr: Vec<u8>,
}

/// Creates a container's first process, which waits to be started.
fn launch_first(
    inner: &Arc<Inner>,
    id: &str,
    spec: &Spec,
    resources: GuestResources,
    streams: &ProcessStreams,
) -> Result<Process, Error> {
    let pending = PendingStreams::new(inner, streams)?;
    let spec = serde_json::to_vec(spec).map_err(Error::invalid_by(
        "configuration",
        "it can't be written as JSON",
    ))?;
    inner.timeline.mark("asked the agent", id);
    inner.agent.create(id, spec, resources, pending.message())?;
    inner.timeline.mark("made in the guest", id);
    let finished = pending.finish(inner.clone(), id, "");
    if finished.is_err() {
        // Otherwise it would exist without an owner.
        inner.remove_container(id).ok();
    }
    finished
}

/// A container being created.
struct ContainerCreation<'a> {
    inner: &'a Arc<Inner>,
    id: &'a str,
    attachments: &'a mut Attachments,
}

impl ContainerCreation<'_> {
    /// The user databases of the root file system; the guest mounts it now unless it is a directory.
    fn accounts(&mut self, root: Root, rootfs: &Path) -> Result<Accounts, Error> {
        if root == Root::Directory {
            return Ok(Accounts::read(rootfs));
        }
        let disk = self.inner.attach_disk(&DiskConfig {
            read_only: true,
            ..DiskConfig::new(rootfs)
        })?;
        let name = disk.device().name.clone();
        let (_, is_mounted) = self.attachments.image.insert((disk, false));
        self.inner.agent.mount_image(self.id, &name)?;
        *is_mounted = true;
        self.inner.agent.accounts(self.id)
    }

    /// Creates the container in the guest, with its first process, which waits to be started; returns that with its
    /// configuration in the guest.
    fn create_in_guest(
        &mut self,
        bundle: Bundle,
        root: Root,
        accounts: &Accounts,
        mut resources: GuestResources,
        streams: &ProcessStreams,
    ) -> Result<(Process, OciProcess), Error> {
        let (inner, id) = (self.inner, self.id);
        let rootfs = bundle.rootfs.clone();
        resources.namespaces = bundle.shared.clone();
        let mut adapted = oci::adapt(id, bundle, root, accounts)?;
        if root == Root::Directory {
            let mounts = adapted.spec.mounts().as_deref().unwrap_or_default();
            mount_points::check_ordinary(&rootfs, mounts)?;
            mount_points::make(&rootfs, &adapted.mount_points)?;
            mount_points::make_links(&rootfs, &adapted.links)?;
            let root = adapted.spec.root().as_ref();
            if root.and_then(|root| root.readonly()) == Some(true) {
                make_optional(&rootfs, &resources.files);
            }
        }
        resources.shared = self
            .attachments
            .share(inner, id, adapted.shares, &mut adapted.spec)?;
        resources
            .devices
            .extend(self.attachments.attach(inner, adapted.disks)?);
        resources.volumes = adapted.volumes;
        resources.direct = self.attachments.attach_direct(inner, adapted.direct)?;
        resources.omit_terminals = adapted.omits_terminals && !resources.guest_devices;
        resources.guest_devices |= adapted.has_guest_devices;
        let process = launch_first(inner, id, &adapted.spec, resources, streams)?;
        let first = adapted.spec.process().clone().unwrap_or_default();
        Ok((process, first))
    }
}

/// Creates the mount points of files that the guest can't create because the root is read-only for it. Failures are ignored:
/// a container runs without them.
fn make_optional(rootfs: &Path, files: &[messages::File]) {
    for file in files {
        if let Err(error) = mount_points::make(rootfs, &[(Path::new(&file.path), Some(true))]) {
            log::debug!("{error}");
        }
    }
}

impl Container {
    pub(crate) fn create(
        inner: Arc<Inner>,
        id: &str,
        config: &ContainerConfig,
    ) -> Result<Self, Error> {
        let own = Some(Box::new(config.clone()));
        Self::try_create(inner, id, own, &config.rootfs, |creation| {
            let root = config.check_places()?;
            let accounts = creation.accounts(root, &config.rootfs)?;
            let accounts = accounts.with(&config.volumes);
            let bundle = oci::from_config::bundle(id, config, &accounts)?;
            let resources = GuestResources {
                devices: config.devices.iter().map(agent::block_device).collect(),
                guest_devices: config.privileged,
                files: oci::from_config::files(id, config)?,
                ..GuestResources::default()
            };
            creation.create_in_guest(
                bundle,
                root,
                &accounts,
                resources,
                &config.process.stdio.into(),
            )
        })
    }

    pub(crate) fn create_oci(
        inner: Arc<Inner>,
        id: &str,
        bundle: &Bundle,
        streams: &ProcessStreams,
    ) -> Result<Self, Error> {
        Self::try_create(inner, id, None, &bundle.rootfs, |creation| {
            let root = Root::of(&bundle.rootfs)?;
            let accounts = creation.accounts(root, &bundle.rootfs)?;
            creation.create_in_guest(
                bundle.clone(),
                root,
                &accounts,
                GuestResources::default(),
                streams,
            )
        })
    }

    /// Creates a container by `create`, and undoes what was done for it if that fails.
    fn try_create(
        inner: Arc<Inner>,
        id: &str,
        config: Option<Box<ContainerConfig>>,
        rootfs: &Path,
        create: impl FnOnce(&mut ContainerCreation<'_>) -> Result<(Process, OciProcess), Error>,
    ) -> Result<Self, Error> {
        let mut attachments = Attachments::default();
        // It counts as alive from its creation on.
        let termination = inner.terminator.add();
        let begun = inner.timeline.begin("create", id);
        let created = create(&mut ContainerCreation {
            inner: &inner,
            id,
            attachments: &mut attachments,
        });
        match created {
            Ok((process, first)) => {
                inner.timeline.end(begun);
                Ok(Self {
                    process,
                    config,
                    rootfs: rootfs.into(),
                    first,
                    attachments: Mutex::new(attachments),
                    next_exec: AtomicU64::new(1),
                    termination,
                })
            }
            Err(error) => {
                let error = inner.explain(error);
                inner.timeline.fail(begun, &error);
                attachments.release(&inner, id);
                Err(error)
            }
        }
    }

    /// Starts the first process.
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
        // Written after the start, so that it does not delay it.
        inner.timeline.keep();
        Ok(())
    }

    /// The configuration; `None` for an OCI bundle.
    pub fn config(&self) -> Option<&ContainerConfig> {
        self.config.as_deref()
    }

    /// The first process.
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// The first process, for taking its streams.
    pub fn process_mut(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Waits for the first process and returns its exit code, or 128 plus the signal number. A process that was
    /// [killed](Self::kill) counts as ended by SIGKILL, whether the guest reported its end or the machine ended.
    ///
    /// # Errors
    /// The reason why the virtual machine ended, if it did.
    pub fn wait(&self) -> Result<i32, Error> {
        let inner = &self.process.inner;
        let ended = self.termination.follow(|| self.process.wait());
        let ended = ended.map_err(|error| match error {
            Error::AgentDisconnected { .. } => inner.end_without_agent(error),
            error => error,
        });
        match ended {
            Err(Error::Ended { .. }) if self.termination.is_killed() => Ok(128 + libc::SIGKILL),
            ended => ended,
        }
    }

    /// Sends SIGKILL to the first process. Does not wait for its end, and only briefly for the guest. If the guest does not
    /// report the end within ten seconds, the virtual machine is ended, with all of its containers.
    ///
    /// # Errors
    /// If it has ended.
    pub fn kill(&self) -> Result<(), Error> {
        self.kill_some(false)
    }

    /// As [`kill`](Self::kill), but sends SIGKILL to every process of the container.
    ///
    /// # Errors
    /// If it has ended.
    pub fn kill_all(&self) -> Result<(), Error> {
        self.kill_some(true)
    }

    fn kill_some(&self, all: bool) -> Result<(), Error> {
        let inner = &self.process.inner;
        inner
            .terminator
            .kill(&self.termination, &self.process.container, all)
    }

    /// Waits for the first process, collects its output, and removes the container. The output is kept in memory, however long
    /// it is: read the streams of a program that is not trusted, with a limit.
    ///
    /// # Errors
    /// As [`wait`](Self::wait).
    pub fn output(mut self) -> Result<Output, Error> {
        let output = self.process.take_output()?;
        self.remove()?;
        Ok(output)
    }

    /// Runs another process in the container, with the privileges of the first one.
    ///
    /// # Errors
    /// If the container has ended, or the program can't be found.
    pub fn exec(&self, config: &ProcessConfig) -> Result<Process, Error> {
        let process = oci::process::with_privileges_of(&self.first, config, &self.accounts()?)?;
        let number = self.next_exec.fetch_add(1, Ordering::Relaxed);
        self.launch_exec(&format!("exec-{number}"), &process, &config.stdio.into())
    }

    /// Runs another process in the container from the `process` of an OCI configuration, under a name that is unique in the
    /// container.
    ///
    /// # Errors
    /// If the container has ended, or the program can't be found.
    pub fn exec_oci(
        &self,
        name: &str,
        process: &OciProcess,
        options: impl Into<ExecOptions>,
    ) -> Result<Process, Error> {
        let mut process = process.clone();
        oci::process::adapt(&mut process, &self.accounts()?)?;
        self.launch_exec(name, &process, &options.into())
    }

    /// The user databases of its root and of volumes over it, as they are now.
    fn accounts(&self) -> Result<Accounts, Error> {
        let has_image = self.attachments().image.is_some();
        let accounts = match has_image {
            true => self.process.inner.agent.accounts(&self.process.container)?,
            false => Accounts::read(&self.rootfs),
        };
        let volumes = self.config.as_ref().map(|config| &*config.volumes);
        Ok(accounts.with(volumes.unwrap_or_default()))
    }

    fn launch_exec(
        &self,
        exec: &str,
        process: &OciProcess,
        options: &ExecOptions,
    ) -> Result<Process, Error> {
        let inner = &self.process.inner;
        let process = serde_json::to_vec(process)
            .map_err(Error::invalid_by("process", "it can't be written as JSON"))?;
        // The container's socket is that of its first process.
        let streams = ProcessStreams {
            notify_socket: None,
            ..options.streams.clone()
        };
        let pending = PendingStreams::new(inner, &streams)?;
        let cgroup = options.cgroup.as_deref().unwrap_or_default();
        let id = &self.process.container;
        inner
            .agent
            .exec(id, exec, process, pending.message(), cgroup)
            .map_err(|e| inner.explain(e))?;
        pending.finish(inner.clone(), id, exec)
    }

    /// Freezes all of its processes.
    ///
    /// # Errors
    /// If the guest fails to.
    pub fn pause(&self) -> Result<(), Error> {
        self.ask(|agent, id| agent.pause(id))
    }

    /// Thaws them.
    ///
    /// # Errors
    /// If the guest fails to.
    pub fn resume(&self) -> Result<(), Error> {
        self.ask(|agent, id| agent.resume(id))
    }

    /// Resource usage of its control group.
    ///
    /// # Errors
    /// If the agent does not answer.
    pub fn stats(&self) -> Result<ContainerStats, Error> {
        self.ask(|agent, id| agent.container_stats(id))
    }

    /// Changes its limits to those in the `linux.resources` of an OCI configuration; absent limits keep their values. Limits
    /// that exist only on a host (its disks, CPUs that the guest does not have) are ignored.
    ///
    /// # Errors
    /// If a limit is invalid or not supported, or the guest fails to.
    pub fn update(&self, resources: &LinuxResources) -> Result<(), Error> {
        oci::check_resources(resources)?;
        let mut resources = resources.clone();
        oci::retain_guest_limits(&mut resources);
        let text = serde_json::to_vec(&resources).map_err(Error::invalid_by(
            "resources",
            "it can't be written as JSON",
        ))?;
        self.ask(|agent, id| agent.update_container(id, text))
    }

    /// Sends a signal, by number, to every process in it.
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

    /// Adds a disk of the sandbox to the running container.
    ///
    /// # Errors
    /// If there is no such disk, or its path exists already.
    pub fn add_device(&self, device: &Device) -> Result<(), Error> {
        let inner = &self.process.inner;
        let added = inner.agent.add_device(&self.process.container, device);
        added.map_err(|e| inner.explain(e))
    }

    /// Removes a disk from the running container. A process that has it open keeps it.
    ///
    /// # Errors
    /// If the guest fails to.
    pub fn remove_device(&self, device: &Device) -> Result<(), Error> {
        let inner = &self.process.inner;
        let removed = inner.agent.remove_device(&self.process.container, device);
        removed.map_err(|e| inner.explain(e))
    }

    /// Removes the container and kills the processes left in it. It is unusable afterwards. Waits while its disks are being
    /// written out; a guest that does not respond for fifteen seconds is ended.
    ///
    /// # Errors
    /// If the guest fails to; the sandbox's resources for the container are released nevertheless.
    pub fn remove(&self) -> Result<(), Error> {
        let inner = &self.process.inner;
        let id = &self.process.container;
        let removed = inner.remove_container(id);
        self.termination.end();
        std::mem::take(&mut *self.attachments()).release(inner, id);
        removed.map_err(|e| inner.explain(e))
    }

    fn attachments(&self) -> MutexGuard<'_, Attachments> {
        lock(&self.attachments)
    }
}

impl Process {
    /// Waits for its end and returns the exit code, or 128 plus the signal number.
    ///
    /// # Errors
    /// The reason why the virtual machine ended, if it did.
    pub fn wait(&self) -> Result<i32, Error> {
        let status = self.inner.agent.wait(&self.container, &self.exec);
        status.map_err(|e| self.inner.explain(e))
    }

    /// Sends a signal, by number.
    ///
    /// # Errors
    /// If it has ended.
    pub fn signal(&self, number: i32) -> Result<(), Error> {
        self.inner
            .agent
            .signal(&self.container, &self.exec, number, false)
    }

    /// Sets the size of its terminal.
    ///
    /// # Errors
    /// If it has no terminal.
    pub fn resize(&self, rows: u16, columns: u16) -> Result<(), Error> {
        let (rows, columns) = (rows.into(), columns.into());
        self.inner
            .agent
            .resize(&self.container, &self.exec, rows, columns)
    }

    /// Closes its input, collects its output, and waits for it. The output is kept in memory, as that of
    /// [`Container::output`].
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

impl Sandbox {
    /// As [`create`](Self::create), for an OCI bundle, whose root file system must be mounted. Missing mount points and a
    /// missing working directory are created in it.
    ///
    /// # Errors
    /// The unsupported part of the configuration, or the reason why the guest could not create the container.
    pub fn create_oci(
        &self,
        id: &str,
        bundle: &Bundle,
        streams: impl Into<ProcessStreams>,
    ) -> Result<Container, Error> {
        Container::create_oci(self.inner.clone(), id, bundle, &streams.into())
    }
}
