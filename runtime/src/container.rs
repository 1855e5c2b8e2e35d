//! Containers and their processes.

use crate::Error;
use crate::account::Accounts;
use crate::mount_points;
use crate::sandbox::{Disk, Inner};
use crate::spec::{self, ContainerConfig, Device, ProcessConfig, Root, Stdio};
use crate::streams::Expected;
use koya_protocol::messages;
use koya_vmm::DiskConfig;
use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A container of a sandbox. Its first process's streams are in [`process`](Self::process).
pub struct Container {
    process: Process,
    config: ContainerConfig,
    given: Given,
    next_exec: AtomicU64,
}

/// What the sandbox holds for a container.
#[derive(Default)]
struct Given {
    shares: Vec<String>,
    /// The disk that is its root, and whether the guest has mounted it.
    image: Option<(Disk, bool)>,
}

impl Given {
    fn take_back(self, inner: &Inner, id: &str) {
        for share in self.shares {
            inner.shares.remove(&share);
        }
        if let Some((disk, is_mounted)) = self.image {
            let unmounted = match is_mounted {
                true => inner.agent.unmount_image(id),
                false => Ok(()),
            };
            if let Err(error) = unmounted.and_then(|()| inner.detach_disk(&disk)) {
                // The slot stays taken until the sandbox ends.
                log::warn!("the image of container {id} stays attached: {error}");
            }
        }
    }
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

impl Container {
    pub(crate) fn create(
        inner: Arc<Inner>,
        id: &str,
        config: &ContainerConfig,
    ) -> Result<Self, Error> {
        let mut given = Given::default();
        let made = Self::try_create(&inner, id, config, &mut given);
        match made {
            Ok(process) => Ok(Self {
                process,
                config: config.clone(),
                given,
                next_exec: AtomicU64::new(1),
            }),
            Err(error) => {
                let error = inner.explain(error);
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
        let root = Root::of(&config.rootfs)?;
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
        let spec = spec::build(id, config, &accounts)?;
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
        for (name, path, read_only) in spec::shares(id, config) {
            inner
                .shares
                .add(&name, &path, read_only)
                .map_err(Error::host(format!("share {}", path.display())))?;
            given.shares.push(name);
        }
        let plan = Plan::new(inner, config.process.stdio)?;
        let spec = serde_json::to_vec(&spec)
            .map_err(|e| Error::container("configuration", e.to_string()))?;
        let devices = &config.devices;
        inner
            .agent
            .create(id, spec, devices, plan.message.clone())?;
        plan.finish(inner.clone(), id, "")
    }

    /// Lets the first process run.
    ///
    /// # Errors
    /// If the guest can't.
    pub fn start(&self) -> Result<(), Error> {
        let inner = &self.process.inner;
        let started = inner.agent.start(&self.process.container);
        started.map_err(|e| inner.explain(e))
    }

    /// What it was made of.
    pub fn config(&self) -> &ContainerConfig {
        &self.config
    }

    /// The first process.
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// The first process, to take its streams.
    pub fn process_mut(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Waits for the first process: the exit code, or 128 and the signal.
    ///
    /// # Errors
    /// Why the virtual machine ended, if it did.
    pub fn wait(&self) -> Result<i32, Error> {
        self.process.wait()
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
    /// If the container has ended, or the program can't be found.
    pub fn exec(&self, config: &ProcessConfig) -> Result<Process, Error> {
        let inner = &self.process.inner;
        let accounts = match self.given.image {
            Some(_) => inner.agent.accounts(&self.process.container)?,
            None => Accounts::read(&self.config.rootfs),
        };
        let process = spec::exec_process(&self.config, &accounts, config)?;
        let process =
            serde_json::to_vec(&process).map_err(|e| Error::container("process", e.to_string()))?;
        let number = self.next_exec.fetch_add(1, Ordering::Relaxed);
        let exec = format!("exec-{number}");
        let plan = Plan::new(inner, config.stdio)?;
        let id = &self.process.container;
        inner
            .agent
            .exec(id, &exec, process, plan.message.clone())
            .map_err(|e| inner.explain(e))?;
        plan.finish(inner.clone(), id, &exec)
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

    /// Removes the container, killing what still runs in it.
    ///
    /// # Errors
    /// If the guest can't.
    pub fn remove(self) -> Result<(), Error> {
        let inner = &self.process.inner;
        let id = &self.process.container;
        let removed = inner.agent.remove(id);
        self.given.take_back(inner, id);
        removed.map_err(|e| inner.explain(e))
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
        self.inner.agent.signal(&self.container, &self.exec, number)
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
            std::thread::spawn(move || -> io::Result<Vec<u8>> {
                let mut bytes = Vec::new();
                if let Some(mut stream) = stream {
                    stream.read_to_end(&mut bytes)?;
                }
                Ok(bytes)
            })
        };
        let stdout = collect(self.stdout.take());
        let stderr = collect(self.stderr.take());
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
