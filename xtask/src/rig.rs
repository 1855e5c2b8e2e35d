//! The rig: a real KVM anywhere.
//!
//! If the machine has no hardware virtualization, QEMU emulates a host that has it (TCG with nested SVM, Debian's kernel),
//! over the machine's own file system with a temporary overlay. A command runs there as root; its output is streamed here,
//! and its exit status is returned. A host of another architecture has its own programs in between.

mod host;
mod hung;
mod model;
mod platform;

pub(crate) use host::{Host, busybox, programs};
pub(crate) use model::Model;

use crate::arch::{Arch, ArchArgs};
use crate::archive::Archive;
use crate::{build, cache, proc, setup};
use anyhow::{Context, Result, bail};
use clap::Args;
use rustix::pipe::{PipeFlags, pipe_with};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, IsTerminal, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// Size of the scratch disk: sparse, for file-system tests.
const SCRATCH_BYTES: u64 = 10 << 30;

/// Time limit for the rig to become ready, after which it counts as hung.
const READY_LIMIT: Duration = Duration::from_secs(180);

/// Time without a heartbeat of the emulated host, sent every few seconds, after which it counts as hung. Its CPUs share ours
/// with other rigs and with builds.
const SILENCE_LIMIT: Duration = Duration::from_secs(240);

/// The socket of QEMU's monitor, in the directory of a run.
const MONITOR: &str = "monitor";

#[derive(Args)]
pub(crate) struct RigArgs {
    #[command(flatten)]
    arch: ArchArgs,
    #[command(flatten)]
    model: Model,
    /// Select the KVM: `auto` uses that of the machine if it is hardware virtualization
    #[arg(long, default_value = "auto")]
    kvm: Kvm,
    /// Kill the rig after this many seconds
    #[arg(long, default_value_t = 3600)]
    timeout: u64,
    /// Memory of the emulated host, in MiB
    #[arg(long, default_value_t = 6144)]
    memory: u32,
    /// CPUs of the emulated host
    #[arg(long, default_value_t = 2)]
    cpus: u32,
    /// Use the existing build of koya
    #[arg(long)]
    no_build: bool,
    /// The command, run as root (default: a shell)
    #[arg(last = true)]
    command: Vec<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Kvm {
    /// That of the machine if it is hardware virtualization, else the emulated host
    Auto,
    /// /dev/kvm of the machine, of any kind
    Host,
    /// The emulated host
    Emulated,
}

/// `cargo xtask rig`
pub(crate) fn run(args: RigArgs) -> Result<u8> {
    setup::ensure()?;
    let arch = args.arch.arch();
    args.model.check(arch, args.cpus)?;
    let host = match args.kvm {
        Kvm::Auto => !args.model.is_chosen() && hardware_kvm(arch),
        Kvm::Host if args.model.is_chosen() => {
            bail!("--cpu and --gic select an emulated host, not this machine: remove --kvm host")
        }
        Kvm::Host if !arch.is_native() => {
            bail!("this machine's /dev/kvm runs no {} guests", arch.name())
        }
        Kvm::Host => true,
        Kvm::Emulated => false,
    };
    let products = match args.no_build {
        true => build::Products::places_of(arch),
        false => build::ensure_for(arch)?,
    };
    let env = products.env();
    if host {
        eprintln!("rig: this machine's own /dev/kvm");
        return run_here(&args.command, &env);
    }
    let limits = Limits {
        timeout: Duration::from_secs(args.timeout),
        memory_mib: args.memory,
        cpus: args.cpus,
    };
    boot(arch, args.model, &args.command, &env, &limits)
}

/// Limits of a rig.
pub(crate) struct Limits {
    pub(crate) timeout: Duration,
    pub(crate) memory_mib: u32,
    pub(crate) cpus: u32,
}

/// Whether `/dev/kvm` here is hardware virtualization for guests of `arch` (on x86_64, a KVM vendor module on a CPU
/// with VMX or SVM), not a software KVM.
pub(crate) fn hardware_kvm(arch: Arch) -> bool {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = cpuinfo
        .lines()
        .find(|l| l.starts_with("flags"))
        .unwrap_or_default();
    let x86 = flags.split_whitespace().any(|f| f == "vmx" || f == "svm");
    let cpu = x86 || arch == Arch::Aarch64;
    arch.is_native()
        && cpu
        && File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .is_ok()
}

fn run_here(command: &[String], env: &[(String, String)]) -> Result<u8> {
    let shell = vec!["/bin/sh".to_owned()];
    let command = if command.is_empty() { &shell } else { command };
    let status = Command::new(&command[0])
        .args(&command[1..])
        .env("KOYA_RIG", "host")
        .envs(env.iter().cloned())
        .status()
        .with_context(|| format!("cannot start {}", command[0]))?;
    Ok(status.code().map_or(128, |c| c as u8))
}

/// Boots the emulated host and runs `command` in it; returns its exit status.
pub(crate) fn boot(
    arch: Arch,
    model: Model,
    command: &[String],
    env: &[(String, String)],
    limits: &Limits,
) -> Result<u8> {
    let host = Host::ensure_for(arch)?;
    let run = RunDir::create()?;
    let interactive = command.is_empty() && std::io::stdin().is_terminal();
    let initrd = run.path("initrd");
    fs::copy(host.dir.join("initrd"), &initrd)?;
    let mut file = File::options().append(true).open(&initrd)?;
    file.write_all(&job(command, env, interactive)?)?;
    drop(file);
    File::create(run.path("scratch"))?.set_len(SCRATCH_BYTES)?;
    proc::long(
        "formatting the scratch disk",
        Command::new("/sbin/mkfs.ext4")
            .args(["-q", "-F", "-E", "lazy_itable_init=1,lazy_journal_init=1"])
            .arg(run.path("scratch")),
        &run.path("mkfs.log"),
    )?;

    let started = Instant::now();
    let mut qemu = Qemu::start(&host, model, &run, limits, interactive)?;
    let watched = qemu.watch(started, limits.timeout);
    let state = watched.is_err().then(|| hung::look(&run.path(MONITOR)));
    qemu.stop();
    watched.map_err(|error| {
        error.context(format!(
            "the end of the rig's console:\n{}\n{}",
            proc::tail(&run.path("console"), 70),
            state.unwrap_or_default()
        ))
    })
}

/// The archive appended to the initramfs for one run, with the command.
fn job(command: &[String], env: &[(String, String)], interactive: bool) -> Result<Vec<u8>> {
    let mut script = String::from("export HOME=/root LANG=C.UTF-8 KOYA_RIG=emulated\n");
    let path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    script.push_str(&format!("export PATH={path}\n"));
    for (name, value) in env {
        let value = if name == "PATH" {
            format!("{}:{path}", value.split(':').next().unwrap_or_default())
        } else {
            value.clone()
        };
        script.push_str(&format!("export {name}={}\n", quoted(&value)));
    }
    for (name, value) in std::env::vars() {
        let wanted = ["RUST_BACKTRACE", "RUST_LOG", "CI"].contains(&name.as_str());
        if wanted || name.starts_with("KOYA_TEST_") {
            script.push_str(&format!("export {name}={}\n", quoted(&value)));
        }
    }
    let cwd = std::env::current_dir()?;
    script.push_str(&format!("cd {}\n", quoted(&cwd.to_string_lossy())));
    if command.is_empty() {
        // The emulated console does not know the size of this terminal.
        if let Ok(size) = rustix::termios::tcgetwinsize(std::io::stdin()) {
            let (rows, columns) = (size.ws_row, size.ws_col);
            script.push_str(&format!("stty rows {rows} cols {columns}\n"));
        }
        script.push_str("exec /bin/sh -i\n");
    } else {
        let words: Vec<String> = command.iter().map(|w| quoted(w)).collect();
        script.push_str(&format!("exec {}\n", words.join(" ")));
    }
    let mut archive = Archive::default();
    archive.file("job/run", 0o755, script.as_bytes())?;
    if interactive {
        let term = std::env::var("TERM").unwrap_or_else(|_| "linux".into());
        archive.file("job/interactive", 0o644, term.as_bytes())?;
    }
    archive.finish()
}

/// `word` as one word of a POSIX shell.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// A directory for one run. Runs that were killed are cleaned up by the next one.
pub(crate) struct RunDir(PathBuf);

impl RunDir {
    pub(crate) fn create() -> Result<Self> {
        let shelf = cache::root().join("runs");
        fs::create_dir_all(&shelf)?;
        for entry in fs::read_dir(&shelf)?.filter_map(|e| e.ok()) {
            let name = entry.file_name();
            if !Path::new("/proc").join(&name).exists() {
                fs::remove_dir_all(entry.path()).ok();
            }
        }
        let dir = shelf.join(std::process::id().to_string());
        if dir.exists() {
            fs::remove_dir_all(&dir)?;
        }
        fs::create_dir(&dir)?;
        Ok(Self(dir))
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).ok();
    }
}

/// The options of QEMU for sharing a directory with the rig.
fn shared(directory: &Path, tag: &str) -> [String; 2] {
    let how = "security_model=none,readonly=on,multidevs=remap";
    let directory = directory.display();
    [
        "-virtfs".into(),
        format!("local,path={directory},mount_tag={tag},{how}"),
    ]
}

struct Qemu {
    child: Child,
    status: mpsc::Receiver<String>,
    relays: Vec<std::thread::JoinHandle<()>>,
}

impl Qemu {
    fn start(
        host: &Host,
        model: Model,
        run: &RunDir,
        limits: &Limits,
        interactive: bool,
    ) -> Result<Self> {
        // QEMU opens the pipes by their /proc names, whatever our own stdout is.
        let (out_read, out_write) = pipe_with(PipeFlags::CLOEXEC)?;
        let (err_read, err_write) = pipe_with(PipeFlags::CLOEXEC)?;
        let (status_read, status_write) = pipe_with(PipeFlags::CLOEXEC)?;
        let here = std::process::id();
        let pipe = |fd: &OwnedFd| format!("path=/proc/{here}/fd/{}", fd.as_raw_fd());

        let mut command = host.qemu();
        command
            .args(["-accel", "tcg,thread=multi"])
            .args(host.platform.machine(model))
            .args(["-smp", &limits.cpus.to_string()])
            .args(["-m", &limits.memory_mib.to_string()])
            .args(["-nodefaults", "-no-user-config", "-display", "none"])
            .args(["-no-reboot", "-net", "none"])
            .arg("-kernel")
            .arg(host.dir.join("vmlinuz"))
            .arg("-initrd")
            .arg(run.path("initrd"))
            .args(["-append", host.platform.cmdline])
            .arg("-chardev")
            .arg(format!(
                "socket,id=monitor,server=on,wait=off,path={}",
                run.path(MONITOR).display()
            ))
            .args(["-mon", "chardev=monitor"])
            .arg("-serial")
            .arg(format!("file:{}", run.path("console").display()))
            .args(shared("/".as_ref(), "host"))
            .args(
                host.programs
                    .iter()
                    .flat_map(|root| shared(root, "programs")),
            )
            .arg("-drive")
            .arg(format!(
                "if=virtio,format=raw,cache=unsafe,discard=unmap,file={}",
                run.path("scratch").display()
            ))
            .args(["-device", "virtio-serial-pci"])
            .args(["-chardev", "stdio,id=in,signal=off"])
            .arg("-chardev")
            .arg(format!("file,id=status,{}", pipe(&status_write)))
            .args(["-device", "virtserialport,chardev=status,name=status"]);
        if interactive {
            command.args(["-device", "virtconsole,chardev=in"]);
        } else {
            command
                .args(["-device", "virtserialport,chardev=in,name=stdin"])
                .arg("-chardev")
                .arg(format!("file,id=out,{}", pipe(&out_write)))
                .args(["-device", "virtserialport,chardev=out,name=stdout"])
                .arg("-chardev")
                .arg(format!("file,id=err,{}", pipe(&err_write)))
                .args(["-device", "virtserialport,chardev=err,name=stderr"]);
        }
        let virtualization = host.platform.virtualization;
        eprintln!("rig: starting an emulated host (QEMU TCG, {virtualization})");
        let child = command.spawn().context("cannot start QEMU")?;

        let (sender, status) = mpsc::channel();
        let mut relays = vec![
            relay(out_read, std::io::stdout()),
            relay(err_read, std::io::stderr()),
        ];
        relays.push(std::thread::spawn(move || {
            for line in BufReader::new(File::from(status_read)).lines() {
                let Ok(line) = line else { return };
                if sender.send(line).is_err() {
                    return;
                }
            }
        }));
        // Our own write ends keep the pipes open until QEMU has opened them by name.
        let opened = [out_write, err_write, status_write];
        let mut qemu = Self {
            child,
            status,
            relays,
        };
        qemu.release(opened, interactive)?;
        Ok(qemu)
    }

    /// Closes our write ends once QEMU has its own, so that the pipes end with QEMU.
    fn release(&mut self, ends: [OwnedFd; 3], interactive: bool) -> Result<()> {
        let wanted = if interactive { 1 } else { 3 };
        let deadline = Instant::now() + Duration::from_secs(20);
        let names: Vec<PathBuf> = ends
            .iter()
            .filter_map(|e| fs::read_link(format!("/proc/self/fd/{}", e.as_raw_fd())).ok())
            .collect();
        while Instant::now() < deadline {
            // Until it executes QEMU, the child still has our own ends.
            let process = fs::read_to_string(format!("/proc/{}/comm", self.child.id()));
            let is_qemu = process.is_ok_and(|name| name.starts_with("qemu"));
            let held = fs::read_dir(format!("/proc/{}/fd", self.child.id()))
                .map(|fds| {
                    fds.filter_map(|f| fs::read_link(f.ok()?.path()).ok())
                        .filter(|l| names.contains(l))
                        .count()
                })
                .unwrap_or(0);
            if is_qemu && held >= wanted {
                return Ok(());
            }
            if let Some(status) = self.child.try_wait()? {
                bail!("QEMU ended at once ({status})");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        bail!("QEMU did not open its pipes")
    }

    fn watch(&mut self, started: Instant, limit: Duration) -> Result<u8> {
        let mut ready = false;
        loop {
            let silence = if ready { SILENCE_LIMIT } else { READY_LIMIT };
            let left = limit.saturating_sub(started.elapsed());
            match self.status.recv_timeout(left.min(silence)) {
                Ok(line) if line == "alive" => {}
                Ok(line) if line == "ready" => {
                    ready = true;
                    eprintln!("rig: ready after {:.1?}", started.elapsed());
                }
                Ok(line) => match line.strip_prefix("exit ") {
                    Some(code) => return Ok(code.trim().parse().unwrap_or(255)),
                    None => bail!("the rig did not come up: {line}"),
                },
                Err(mpsc::RecvTimeoutError::Timeout) if left <= silence => bail!(
                    "the rig was stopped after {} s (--timeout)",
                    limit.as_secs()
                ),
                Err(mpsc::RecvTimeoutError::Timeout) if ready => {
                    bail!("the rig hangs: no sign of life for {} s", silence.as_secs())
                }
                Err(mpsc::RecvTimeoutError::Timeout) => bail!(
                    "the rig was not ready after {} s",
                    started.elapsed().as_secs()
                ),
                Err(mpsc::RecvTimeoutError::Disconnected) => {
                    bail!("the rig ended before its command did")
                }
            }
        }
    }

    fn stop(&mut self) {
        // It powers itself off after reporting its status; give it a moment.
        let deadline = Instant::now() + Duration::from_secs(5);
        while Instant::now() < deadline && matches!(self.child.try_wait(), Ok(None)) {
            std::thread::sleep(Duration::from_millis(20));
        }
        self.child.kill().ok();
        self.child.wait().ok();
        for relay in self.relays.drain(..) {
            relay.join().ok();
        }
    }
}

fn relay(from: OwnedFd, mut to: impl Write + Send + 'static) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        let mut from = File::from(from);
        let mut buffer = [0; 16384];
        while let Ok(n) = from.read(&mut buffer) {
            if n == 0 || to.write_all(&buffer[..n]).is_err() || to.flush().is_err() {
                return;
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_survive_the_shell() {
        let out = Command::new("/bin/sh")
            .arg("-c")
            .arg(format!("printf %s {}", quoted("it's \"$HOME\" `x` \\")))
            .output()
            .unwrap();
        assert_eq!(out.stdout, b"it's \"$HOME\" `x` \\");
    }
}
