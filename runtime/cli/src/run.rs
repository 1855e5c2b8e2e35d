//! `koya run`

use super::attach::{ProcessStreams, Pumps, RawTerminal, UserStreams, terminal_size};
use super::container_log::{Lines, LogWriter};
use super::control::Execs;
use super::detach;
use super::log_records::Stream;
use super::mounts::{MountArgs, absolute};
use super::names::{NameArgs, warn_without_place};
use super::net::NetArgs;
use super::parse::{
    Security, parse_cache, parse_device, parse_disk, parse_pids, parse_security, parse_signal,
    parse_sysctl, parse_ulimit,
};
use super::recorder::Recorder;
use super::signals::forwarded_signals;
use super::size::SizeArgs;
use super::state::{self, Directory, Owned, Record};
use super::variables::{EnvArgs, merge_env};
use super::{FAILED, Outcome};
use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use koya::image::{Defaults, Image, Options};
use koya::vmm::host::privileges::{Program, limit_privileges};
use koya::vmm::host::sync::lock;
use koya::vmm::host::threads;
use koya::{
    Cache, Container, ContainerConfig, Device, DiskConfig, GuestDevice, ProcessConfig, Profile,
    Rlimit, Sandbox, SandboxConfig, Seccomp, Stdio, TimelineFile, User,
};
use koya_tasks::{is_network_sysctl, send_signal};
use signal_hook::consts::{SIGHUP, SIGINT, SIGKILL, SIGQUIT, SIGTERM, SIGWINCH};
use signal_hook::iterator::Signals;
use std::io::{IsTerminal, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

/// Number of interrupts after which the sandbox is stopped without asking the container.
const INSIST: u32 = 3;

#[derive(Args)]
pub(super) struct RunArgs {
    /// Use PATH as the root file system: a directory, or a file system image (erofs, ext4)
    #[arg(long, value_name = "PATH", required_unless_present = "image")]
    rootfs: Option<PathBuf>,
    /// Use an image: an OCI image layout (a directory or an archive), or an archive of `docker save` or `podman save`
    #[arg(long, value_name = "PATH", conflicts_with = "rootfs")]
    image: Option<PathBuf>,
    /// Select one of several images in the archive or layout, by name or tag
    #[arg(long, value_name = "NAME", requires = "image")]
    tag: Option<String>,
    #[command(flatten)]
    size: SizeArgs,
    #[command(flatten)]
    mounts: MountArgs,
    /// Attach a raw disk image or block device of the host, as /dev/vda, /dev/vdb, ... in the container. Options,
    /// separated by commas: ro; raw (skip the check for other image formats and compression)
    #[arg(long, value_name = "PATH[:OPTIONS]", value_parser = parse_disk)]
    disk: Vec<DiskConfig>,
    /// Give the container a device of the guest, such as /dev/fuse, /dev/net/tun or /dev/kmsg. ACCESS is made of r, w and m
    #[arg(long, value_name = "NODE[:PATH][:ACCESS]", value_parser = parse_device)]
    device: Vec<GuestDevice>,
    #[command(flatten)]
    net: NetArgs,
    #[command(flatten)]
    names: NameArgs,
    /// Listen on a Unix socket for connections of host processes to vsock ports of the guest (CONNECT PORT); the guest
    /// connects to PATH_PORT on the host. Allows vsock sockets in the container
    #[arg(long, value_name = "PATH")]
    vsock: Option<PathBuf>,
    #[command(flatten)]
    env: EnvArgs,
    /// Set the working directory
    #[arg(long, short, value_name = "DIR")]
    workdir: Option<PathBuf>,
    /// Set the user and group, by name or ID
    #[arg(long, short, value_name = "USER[:GROUP]")]
    user: Option<String>,
    /// Add a supplementary group, by name or ID
    #[arg(long, value_name = "GROUP")]
    group_add: Vec<String>,
    /// Set the container's hostname (default: the container's name)
    #[arg(long, value_name = "NAME")]
    hostname: Option<String>,
    /// Override the entrypoint of the image, with COMMAND as its arguments; an empty string removes it
    #[arg(long, value_name = "PROGRAM")]
    entrypoint: Option<String>,
    /// Set the signal that `koya stop` sends (default: that of the image, or TERM)
    #[arg(long, value_name = "SIGNAL", value_parser = parse_signal)]
    stop_signal: Option<i32>,
    /// Mount the root file system read-only
    #[arg(long)]
    read_only: bool,
    /// Grant all capabilities and devices of the guest
    #[arg(long)]
    privileged: bool,
    /// Add a capability to the default set, or ALL
    #[arg(long, value_name = "CAP")]
    cap_add: Vec<String>,
    /// Drop a capability from the default set, or ALL
    #[arg(long, value_name = "CAP")]
    cap_drop: Vec<String>,
    /// Set a resource limit, by the names of setrlimit(2): nofile=1024:2048, core=unlimited
    #[arg(long, value_name = "NAME=SOFT[:HARD]", value_parser = parse_ulimit)]
    ulimit: Vec<Rlimit>,
    /// Set the maximum number of processes and threads (default: no limit)
    #[arg(long, value_name = "N", value_parser = parse_pids, allow_hyphen_values = true)]
    pids_limit: Option<u32>,
    /// Set a kernel parameter of the container's namespaces, such as kernel.msgmax=65536; those of the
    /// network (net.*) are set for the whole guest
    #[arg(long, value_name = "NAME=VALUE", value_parser = parse_sysctl)]
    sysctl: Vec<(String, String)>,
    /// Set a security option: seccomp=FILE (a profile in Docker's format), seccomp=unconfined, no-new-privileges[=BOOL]
    #[arg(long, value_name = "OPTION", value_parser = parse_security)]
    security_opt: Vec<Security>,
    /// Do not confine the threads on the host that run the guest and serve its devices; by default each has a seccomp
    /// filter, no capabilities except those for serving files, and, if started by root or if the host has Landlock, no
    /// access to files that are not shared. The other threads then keep all capabilities of the caller, too
    #[arg(long)]
    no_seccomp: bool,
    /// Do not share CPU cores with other processes (core scheduling): their hyperthreads run threads of this container or
    /// none
    #[arg(long)]
    core_scheduling: bool,
    /// Set the cache policy of shared files in the guest: never, auto, always, writeback
    #[arg(long, value_name = "POLICY", default_value = "auto", value_parser = parse_cache)]
    cache: Cache,
    /// Run in the background and print the container's name
    #[arg(long, short)]
    detach: bool,
    /// Allocate a terminal
    #[arg(long, short)]
    tty: bool,
    /// Keep standard input open
    #[arg(long, short)]
    interactive: bool,
    /// Set the container's name
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Remove a detached container when it exits (others always are)
    #[arg(long)]
    rm: bool,
    /// Boot another guest kernel: a file, or `full` for the one with network file systems and tracing
    #[arg(long, value_name = "FILE|full")]
    kernel: Option<PathBuf>,
    /// Set kernel parameters of the guest
    #[arg(long, value_name = "PARAMETERS", default_value = "quiet")]
    kernel_args: String,
    /// The command and its arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

impl RunArgs {
    fn stdio(&self) -> Stdio {
        match (self.tty, self.interactive) {
            (true, _) => {
                let (rows, columns) = terminal_size().unwrap_or((0, 0));
                Stdio::Terminal {
                    rows,
                    columns,
                    keep_newlines: false,
                }
            }
            (false, true) => Stdio::Pipes,
            (false, false) => Stdio::Output,
        }
    }

    #[cfg(test)]
    pub(super) fn words(&self) -> &[String] {
        &self.command
    }

    /// The signal sent by `koya stop`.
    fn stop_signal(&self, image: &Defaults) -> Result<i32> {
        match (self.stop_signal, &image.stop_signal) {
            (Some(signal), _) => Ok(signal),
            (None, Some(text)) => {
                parse_signal(text).map_err(|e| anyhow!("the image's StopSignal: {e}"))
            }
            (None, None) => Ok(SIGTERM),
        }
    }

    fn sandbox(&self) -> Result<SandboxConfig> {
        let mut config = SandboxConfig {
            disks: self.disk.clone(),
            networks: self.net.networks(),
            cache: self.cache,
            // Absolute, since the sockets beside it are opened while the container runs.
            vsock: self.vsock.as_deref().map(absolute).transpose()?,
            confined: !self.no_seccomp,
            kernel: self.kernel.clone(),
            cmdline: self.kernel_args.clone(),
            ..SandboxConfig::default()
        };
        // The guest's network is that of the container.
        config.sysctls.extend(self.sysctls(true));
        self.size.set(&mut config);
        Ok(config)
    }

    /// Kernel parameters of the network, or the others.
    fn sysctls(&self, of_network: bool) -> impl Iterator<Item = (String, String)> {
        let all = self.sysctl.iter().cloned();
        all.filter(move |(name, _)| is_network_sysctl(name) == of_network)
    }

    /// Gives up the privileges of this process that its sandbox does not need. pasta, which has a profile of its own under
    /// AppArmor, was started before.
    fn limit_privileges(&self) -> Result<()> {
        let program = match self.net.is_none() {
            true => Program::Run,
            false => Program::RunWithNetwork,
        };
        match self.no_seccomp {
            true => Ok(()),
            false => limit_privileges(program).context("cannot give up privileges"),
        }
    }

    /// Validates all arguments before anything is created.
    fn check(&self) -> Result<()> {
        if let Some(rootfs) = &self.rootfs {
            koya::check_root(rootfs)?;
        }
        self.mounts.check()?;
        Ok(self.sandbox()?.check()?)
    }

    /// Default value of `HOSTNAME`, as with other engines; the image or the user can override it.
    fn host_name_variable(&self, name: &str) -> String {
        let wanted = self.hostname.as_deref().filter(|name| !name.is_empty());
        format!("HOSTNAME={}", wanted.unwrap_or(name))
    }

    /// The container's configuration, from the image's defaults and the user's arguments.
    fn container(&self, record: &Record, image: Defaults) -> Result<ContainerConfig> {
        let rootfs = &*record.rootfs;
        let args = arguments(self.entrypoint.as_deref(), &self.command, &image);
        if args.is_empty() {
            bail!("no command was given, and no image has one; try `koya run --rootfs DIR -- sh`");
        }
        let disks = self.disk.iter().enumerate();
        let devices = disks.map(|(index, disk)| Device::new(index, disk.read_only));
        let devices = devices.collect();
        let env = [vec![self.host_name_variable(&record.name)], image.env].concat();
        let env = merge_env(self.env.read()?, &env);
        let mut config = ContainerConfig {
            rootfs: absolute(rootfs)?,
            process: ProcessConfig {
                args,
                env,
                cwd: self.workdir.clone().or(image.workdir),
                user: User {
                    text: self.user.clone().unwrap_or(image.user),
                    groups: self.group_add.clone(),
                },
                stdio: self.stdio(),
            },
            hostname: self.hostname.clone(),
            devices,
            guest_devices: self.device.clone(),
            read_only: self.read_only,
            privileged: self.privileged,
            capabilities: self.cap_add.clone(),
            dropped_capabilities: self.cap_drop.clone(),
            seccomp: match self.security_opt.iter().rev().find_map(Security::seccomp) {
                Some(Some(path)) => Seccomp::Profile(Profile::read(path)?),
                Some(None) => Seccomp::Unconfined,
                None => Seccomp::Default,
            },
            no_new_privileges: Security::forbids_new(&self.security_opt),
            rlimits: self.ulimit.clone(),
            pids_limit: self.pids_limit.filter(|limit| *limit > 0),
            sysctls: self.sysctls(false).collect(),
            extra_hosts: self.names.hosts(),
            resolver: self.names.resolver(self.net.name_server()),
            ..ContainerConfig::default()
        };
        self.mounts.set(&mut config)?;
        warn_without_place(&config);
        Ok(config)
    }
}

/// The program and its arguments, as in Docker: an entrypoint of the user replaces the image's,
/// including its arguments, and an empty one removes it.
fn arguments(entrypoint: Option<&str>, command: &[String], image: &Defaults) -> Vec<String> {
    match entrypoint {
        Some("") => command.to_vec(),
        Some(program) => [&[program.to_owned()], command].concat(),
        None if command.is_empty() => [&*image.entrypoint, &*image.command].concat(),
        None => [&image.entrypoint, command].concat(),
    }
}

/// Unpacks an image into a root file system for this container only, with the working directories of the image and of the
/// user.
fn unpack(image: &Path, args: &RunArgs, directory: &Directory) -> Result<Defaults> {
    let (root, scratch) = (directory.unpacked(), directory.scratch());
    for dir in [&root, &scratch] {
        std::fs::create_dir(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    }
    let options = Options {
        tag: args.tag.clone(),
        ..Options::default()
    };
    let unpacked = Image::open(image, &scratch, &options).and_then(|image| {
        image.unpack(&root)?;
        Ok(image.defaults())
    });
    std::fs::remove_dir_all(&scratch).ok();
    let defaults = unpacked?;
    koya::prepare_image_root(&root)
        .with_context(|| format!("cannot prepare {}", root.display()))?;
    let workdir = args.workdir.as_ref().or(defaults.workdir.as_ref());
    for dir in workdir.into_iter().chain(&defaults.volumes) {
        koya::image::make_directory(&root, dir)?;
    }
    Ok(defaults)
}

/// Checks that a terminal with input has one on this side.
pub(super) fn check_terminal(tty: bool, interactive: bool) -> Result<()> {
    if tty && interactive && !std::io::stdin().is_terminal() {
        bail!("-t with -i needs a terminal as standard input; leave one of them out");
    }
    Ok(())
}

/// `began` is the start time of this process.
pub(super) fn main(args: &RunArgs, began: Instant) -> Outcome {
    if !args.detach {
        check_terminal(args.tty, args.interactive)?;
    } else if !detach::is_background_process() {
        return detach::start_again();
    }
    args.check()?;
    // The library does not change limits and scheduling; this program may.
    if args.core_scheduling {
        koya::enable_core_scheduling().context("--core-scheduling")?;
    }
    koya::vmm::devices::fs::raise_descriptor_limit();
    let (mut record, owned) = state::create(args.name.as_deref(), |name, directory| Record {
        name: name.to_owned(),
        pid: std::process::id(),
        created: SystemTime::now(),
        command: args.command.clone(),
        rootfs: match &args.rootfs {
            Some(rootfs) => std::path::absolute(rootfs).unwrap_or_else(|_| rootfs.clone()),
            None => directory.unpacked(),
        },
        keep: args.detach && !args.rm,
        confined: !args.no_seccomp,
        status: None,
    })?;
    owned.directory.report_violations();
    let outcome = match start(args, &mut record, &owned, began) {
        Ok(live) => live.finish(),
        Err(error) => {
            owned.directory.remove();
            return Err(error);
        }
    };
    if !record.keep {
        owned.directory.remove();
        return outcome;
    }
    if let Err(error) = &outcome {
        // There is no terminal to print errors to.
        let log = LogWriter::create(&owned.directory.log())?;
        writeln!(Lines::new(log, Stream::Stderr), "koya: {error:#}")?;
    }
    record.status = Some(outcome.as_ref().map_or(FAILED, |status| *status).into());
    owned.directory.write(&record)?;
    outcome
}

/// Time limit for exec processes to end after their container.
const EXEC_LIMIT: Duration = Duration::from_secs(1);

/// A running container.
struct Live {
    _recorder: Option<Recorder>,
    sandbox: Arc<Sandbox>,
    container: Arc<Container>,
    pumps: Pumps,
    raw: Option<RawTerminal>,
    execs: Execs,
    /// The input of a detached container, until its end.
    _stdin: Option<UnixStream>,
}

impl Live {
    /// Waits for its end, and for the last of its output.
    fn finish(self) -> Outcome {
        let status = self.container.wait();
        let delivered = self.pumps.finish();
        drop(self.raw);
        self.execs.wait(EXEC_LIMIT);
        self.sandbox.stop();
        match status? as u8 {
            0 if !delivered => Ok(FAILED),
            status => Ok(status),
        }
    }
}

fn start(args: &RunArgs, record: &mut Record, owned: &Owned, began: Instant) -> Result<Live> {
    // Before any thread exists: namespaces and privileges are per thread, and no signal must be lost.
    args.net.enter()?;
    args.limit_privileges()?;
    let signals = Signals::new(forwarded_signals()).context("cannot catch signals")?;
    signals.add_signal(SIGWINCH)?;
    let running = Running::default();
    forward_signals(signals, running.clone(), owned.directory.clone())?;
    let defaults = match &args.image {
        Some(image) => unpack(image, args, &owned.directory)?,
        None => Defaults::default(),
    };
    let stop_signal = args.stop_signal(&defaults)?;
    let config = args.container(record, defaults)?;
    config.check()?;
    record.command = config.process.args.clone();
    owned.directory.write(record)?;
    let user = match args.detach {
        true => detach::streams(owned)?,
        false => UserStreams::own(args.interactive)?,
    };
    let mut sandbox = args.sandbox()?;
    sandbox.places = Some(config.places());
    sandbox.timeline = Some(TimelineFile {
        id: record.name.clone(),
        began: Some(began),
    });
    let sandbox = Arc::new(Sandbox::start(&sandbox)?);
    args.net.serve_ports(&sandbox)?;
    let mut container = sandbox.create(&record.name, &config)?;
    let streams = ProcessStreams::take(container.process_mut());
    let mut streams = streams.context("it has no streams")?;
    // Nobody can write to a detached container's input, but it does not end.
    let stdin = args.detach.then(|| streams.take_stdin()).flatten();
    let raw = match args.tty && args.interactive && !args.detach {
        true => RawTerminal::enter().ok(),
        false => None,
    };
    let pumps = Pumps::start(streams, user)?;
    let container = Arc::new(container);
    *lock(&running) = Some((container.clone(), sandbox.clone()));
    // A terminal that has just been opened gets its size while the container starts, and nobody was there to be told.
    if let Stdio::Terminal { rows, columns, .. } = config.process.stdio
        && let Some(size) = terminal_size()
        && size != (rows, columns)
    {
        container.process().resize(size.0, size.1).ok();
    }
    let execs = super::control::serve(owned, container.clone(), sandbox.clone(), stop_signal)?;
    container.start()?;
    let recorder = if args.detach {
        owned.directory.record_confinement(record.confined);
        detach::announce(&record.name)?;
        None
    } else {
        Some(Recorder::start(owned.directory.clone(), record.confined)?)
    };
    Ok(Live {
        _recorder: recorder,
        sandbox,
        container,
        pumps,
        raw,
        execs,
        _stdin: stdin,
    })
}

/// The receiver of signals; `None` while the sandbox is still starting.
type Running = Arc<Mutex<Option<(Arc<Container>, Arc<Sandbox>)>>>;

fn forward_signals(mut signals: Signals, running: Running, directory: Directory) -> Result<()> {
    threads::spawn("koya-signals", move || {
        let mut asked = 0;
        for signal in signals.forever() {
            let target = lock(&running).clone();
            let Some((container, sandbox)) = target else {
                if matches!(signal, SIGINT | SIGTERM | SIGHUP | SIGQUIT) {
                    // The machine ends with the process; everything else is in the directory.
                    directory.remove();
                    std::process::exit(128 + signal);
                }
                continue;
            };
            if signal == SIGWINCH {
                if let Some((rows, columns)) = terminal_size() {
                    container.process().resize(rows, columns).ok();
                }
                continue;
            }
            asked += u32::from(matches!(signal, SIGINT | SIGTERM));
            if asked > INSIST {
                sandbox.kill();
                continue;
            }
            // PID 1 ignores signals without a handler.
            let insists = asked == INSIST && matches!(signal, SIGINT | SIGTERM);
            let signal = if insists { SIGKILL } else { signal };
            send_signal(&container, signal).ok();
        }
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_says_what_runs_unless_the_user_does() {
        let words = |text: &str| -> Vec<String> { text.split(' ').map(str::to_owned).collect() };
        let image = Defaults {
            entrypoint: words("e 1"),
            command: words("c 2"),
            ..Defaults::default()
        };
        let cases = [
            (None, vec![], "e 1 c 2"),
            (None, words("u 3"), "e 1 u 3"),
            (Some("p"), vec![], "p"),
            (Some("p"), words("u 3"), "p u 3"),
            (Some(""), words("u 3"), "u 3"),
            (Some(""), vec![], ""),
        ];
        for (entrypoint, command, wanted) in cases {
            let found = arguments(entrypoint, &command, &image).join(" ");
            assert_eq!(found, wanted, "{entrypoint:?} {command:?}");
        }
    }

    fn args(words: &[&str]) -> RunArgs {
        #[derive(clap::Parser)]
        struct Line {
            #[command(flatten)]
            run: RunArgs,
        }
        let line = [&["koya", "--rootfs", "/"], words].concat();
        <Line as clap::Parser>::try_parse_from(line).unwrap().run
    }

    #[test]
    fn programs_find_the_host_name_in_their_environment() {
        assert_eq!(args(&[]).host_name_variable("name"), "HOSTNAME=name");
        let named = args(&["--hostname", "web"]);
        assert_eq!(named.host_name_variable("name"), "HOSTNAME=web");
    }

    #[test]
    fn kernel_parameters_of_the_network_are_the_guests() {
        let run = args(&[
            "--sysctl",
            "net.core.somaxconn=5",
            "--sysctl",
            "kernel.msgmax=6",
        ]);
        let guest = run.sandbox().unwrap().sysctls;
        assert_eq!(guest["net.core.somaxconn"], "5");
        assert!(!guest.contains_key("kernel.msgmax"));
        let value = ("kernel.msgmax".to_owned(), "6".to_owned());
        assert_eq!(run.sysctls(false).collect::<Vec<_>>(), [value]);
    }

    #[test]
    fn a_stop_signal_is_the_users_or_the_images() {
        let image = |signal: &str| Defaults {
            stop_signal: Some(signal.into()),
            ..Defaults::default()
        };
        let plain = args(&[]);
        assert_eq!(plain.stop_signal(&Defaults::default()).unwrap(), SIGTERM);
        assert_eq!(plain.stop_signal(&image("SIGRTMIN+3")).unwrap(), 37);
        let own = args(&["--stop-signal", "USR1"]);
        assert_eq!(
            own.stop_signal(&image("SIGRTMIN+3")).unwrap(),
            libc::SIGUSR1
        );
        let error = plain.stop_signal(&image("NOPE")).unwrap_err().to_string();
        assert!(
            error.contains("StopSignal") && error.contains("NOPE"),
            "{error}"
        );
    }
}
