//! The rig: a real KVM anywhere.
//!
//! Where the machine has no hardware virtualization, QEMU emulates a host that has it (TCG
//! with nested SVM, Debian's kernel), over the machine's own file system with a throw-away
//! layer on top. A command runs there as root, its output streams here, its exit status is
//! ours.

use crate::{apt, build, cache, kernel, proc, setup};
use anyhow::{Context, Result, bail};
use clap::Args;
use cpio::{NewcBuilder, newc};
use rustix::pipe::{PipeFlags, pipe_with};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, IsTerminal, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::mpsc;
use std::time::{Duration, Instant};

const INIT: &str = include_str!("rig-init.sh");

/// What the rig's kernel loads, in dependency order found by depmod: KVM, the root file
/// system, the scratch disk, taps, and what redirects the traffic of one interface to another.
const MODULES: &[&str] = &[
    "kvm-amd",
    "9p",
    "9pnet_virtio",
    "overlay",
    "virtio_blk",
    "crc32c_generic",
    "ext4",
    "tun",
    "veth",
    "bridge",
    "macvlan",
    "ipvlan",
    "macvtap",
    "sch_ingress",
    "cls_u32",
    "act_mirred",
    "act_gact",
    "vhost_vsock",
    "loop",
    "dm-mod",
    "dm-flakey",
];

/// Size of the scratch disk: sparse, for file-system tests.
const SCRATCH_BYTES: u64 = 10 << 30;

/// Where QEMU comes from: Debian 12's own, 7.2, can lose an interrupt of a host that runs virtual
/// machines, and hangs. It stays installed for the libraries that both need.
const QEMU_SUITE: &str = "bookworm-backports";
const QEMU_PACKAGES: &[&str] = &["qemu-system-x86", "qemu-system-data", "seabios"];

/// How long the rig may take to be ready before it counts as hung.
const READY_LIMIT: Duration = Duration::from_secs(180);

/// The emulated host says each few seconds that it is alive; after a silence as long as this it
/// hangs. Its CPUs share ours with other rigs and with builds.
const SILENCE_LIMIT: Duration = Duration::from_secs(240);

#[derive(Args)]
pub(crate) struct RigArgs {
    /// Which KVM: `auto` takes the machine's own when it is hardware virtualization
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
    /// Do not build koya first; use what is there
    #[arg(long)]
    no_build: bool,
    /// The command, run as root; a shell if there is none
    #[arg(last = true)]
    command: Vec<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Kvm {
    /// The machine's own if it is hardware virtualization, else the emulated host
    Auto,
    /// The machine's own /dev/kvm, whatever it is
    Host,
    /// The emulated host
    Emulated,
}

/// `cargo xtask rig`
pub(crate) fn run(args: RigArgs) -> Result<u8> {
    setup::ensure()?;
    let products = match args.no_build {
        true => build::Products::places(),
        false => build::ensure()?,
    };
    let env = products.env();
    let host = match args.kvm {
        Kvm::Auto => hardware_kvm(),
        Kvm::Host => true,
        Kvm::Emulated => false,
    };
    if host {
        eprintln!("rig: this machine's own /dev/kvm");
        return run_here(&args.command, &env);
    }
    let limits = Limits {
        timeout: Duration::from_secs(args.timeout),
        memory_mib: args.memory,
        cpus: args.cpus,
    };
    boot(&args.command, &env, &limits)
}

/// What a rig may use.
pub(crate) struct Limits {
    pub(crate) timeout: Duration,
    pub(crate) memory_mib: u32,
    pub(crate) cpus: u32,
}

/// Whether `/dev/kvm` here is hardware virtualization (a KVM vendor module on a CPU with
/// VMX or SVM), not a software KVM.
pub(crate) fn hardware_kvm() -> bool {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = cpuinfo
        .lines()
        .find(|l| l.starts_with("flags"))
        .unwrap_or_default();
    let cpu = flags.split_whitespace().any(|f| f == "vmx" || f == "svm");
    cpu && File::options()
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

/// Boots the emulated host and runs `command` in it; its exit status.
pub(crate) fn boot(command: &[String], env: &[(String, String)], limits: &Limits) -> Result<u8> {
    let host = Host::ensure()?;
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
    let mut qemu = Qemu::start(&host, &run, limits, interactive)?;
    let watched = qemu.watch(started, limits.timeout);
    qemu.stop();
    match watched {
        Ok(code) => Ok(code),
        Err(error) => Err(error.context(format!(
            "the end of the rig's console:\n{}",
            proc::tail(&run.path("console"), 70)
        ))),
    }
}

/// The emulated host: what emulates it, its kernel and its initramfs.
pub(crate) struct Host {
    /// Where the newer QEMU is unpacked; none means the machine's own.
    qemu: Option<PathBuf>,
    pub(crate) dir: PathBuf,
}

impl Host {
    /// What emulates it, told to end with this process.
    pub(crate) fn qemu(&self) -> Command {
        // setpriv: should we be killed, so is QEMU.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL"]);
        match &self.qemu {
            Some(root) => {
                command
                    .arg(root.join("usr/bin/qemu-system-x86_64"))
                    .arg("-L")
                    .arg(root.join("usr/share/qemu"))
                    .arg("-L")
                    .arg(root.join("usr/share/seabios"))
                    .args(["-L", "/usr/share/qemu"]);
            }
            None => {
                command.arg("qemu-system-x86_64");
            }
        }
        command
    }

    pub(crate) fn ensure() -> Result<Self> {
        // The same Debian version as the guest kernel's source: one number to know.
        let version = kernel::source_version()?;
        let upstream = version
            .split('-')
            .next()
            .context("a Debian version has an upstream part")?;
        let package = format!("linux-image-{upstream}+deb12-amd64-unsigned");
        let key = cache::key([&package, &version, INIT, &MODULES.join(" ")]);
        let dir = cache::ensure("rig", &key, |dir| build_host(&package, dir))?;
        let key = cache::key([&[QEMU_SUITE], QEMU_PACKAGES].concat());
        let newer = cache::ensure("qemu", &key, |dir| {
            apt::unpack(QEMU_SUITE, QEMU_PACKAGES, dir)
        });
        let qemu = newer.map(Some).unwrap_or_else(|error| {
            eprintln!("rig: no newer QEMU to be had, so this machine's, which may hang: {error:#}");
            None
        });
        Ok(Self { qemu, dir })
    }
}

fn build_host(package: &str, out: &Path) -> Result<()> {
    let tree = out.join("package");
    fs::create_dir_all(&tree)?;
    setup::package_lists()?;
    let log = out.with_extension("log");
    proc::long(
        &format!("downloading {package} (110 MB, once)"),
        Command::new("apt-get")
            .args(["-q", "-o", "APT::Sandbox::User=root", "download", package])
            .current_dir(out),
        &log,
    )?;
    let deb = fs::read_dir(out)?
        .filter_map(|e| e.ok().map(|e| e.path()))
        .find(|p| p.extension().is_some_and(|e| e == "deb"))
        .context("apt-get downloaded no package")?;
    proc::run(Command::new("dpkg").arg("-x").arg(&deb).arg(&tree))?;
    let versions = tree.join("lib/modules");
    let release = fs::read_dir(&versions)?
        .next()
        .context("the kernel package has no modules")??
        .file_name();
    let release = release.to_string_lossy().into_owned();
    proc::run(
        Command::new("/sbin/depmod")
            .arg("-b")
            .arg(&tree)
            .arg(&release),
    )?;
    fs::copy(
        tree.join(format!("boot/vmlinuz-{release}")),
        out.join("vmlinuz"),
    )?;
    let dep = fs::read_to_string(versions.join(&release).join("modules.dep"))?;
    let mut archive = Archive::default();
    for dir in ["bin", "modules", "job"] {
        archive.dir(dir)?;
    }
    archive.file("init", 0o755, INIT.as_bytes())?;
    archive.file("bin/busybox", 0o755, &fs::read("/bin/busybox")?)?;
    let mut order = Vec::new();
    for module in MODULES {
        load_order(module, &dep, &mut order)?;
    }
    let mut names = String::new();
    for path in &order {
        let name = path.rsplit('/').next().unwrap_or(path);
        let name = name.trim_end_matches(".xz");
        let file = versions.join(&release).join(path);
        let out = Command::new("xz").arg("-dc").arg(&file).output()?;
        if !out.status.success() {
            bail!("cannot unpack {}", file.display());
        }
        archive.file(&format!("modules/{name}"), 0o644, &out.stdout)?;
        names.push_str(name);
        names.push('\n');
    }
    archive.file("modules/order", 0o644, names.as_bytes())?;
    fs::write(out.join("initrd"), archive.finish()?)?;
    fs::remove_dir_all(&tree)?;
    fs::remove_file(&deb)?;
    Ok(())
}

/// Appends `module` after everything that it needs.
fn load_order(module: &str, dep: &str, order: &mut Vec<String>) -> Result<()> {
    let named = |path: &str| {
        path.rsplit('/')
            .next()
            .is_some_and(|f| f.split('.').next() == Some(module))
    };
    let line = dep
        .lines()
        .find(|l| l.split(':').next().is_some_and(named))
        .with_context(|| format!("the rig's kernel has no module {module}"))?;
    let (path, needs) = line.split_once(':').context("modules.dep has colons")?;
    // modules.dep lists the deepest dependency last.
    for need in needs.split_whitespace().rev() {
        if !order.iter().any(|o| o == need) {
            order.push(need.to_owned());
        }
    }
    if !order.iter().any(|o| o == path) {
        order.push(path.to_owned());
    }
    Ok(())
}

/// The archive that is appended to the initramfs for one run: what to do.
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
        // The emulated console does not know how large this terminal is.
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

struct Qemu {
    child: Child,
    status: mpsc::Receiver<String>,
    relays: Vec<std::thread::JoinHandle<()>>,
}

impl Qemu {
    fn start(host: &Host, run: &RunDir, limits: &Limits, interactive: bool) -> Result<Self> {
        // QEMU opens the pipes by their /proc names, whatever our own stdout is.
        let (out_read, out_write) = pipe_with(PipeFlags::CLOEXEC)?;
        let (err_read, err_write) = pipe_with(PipeFlags::CLOEXEC)?;
        let (status_read, status_write) = pipe_with(PipeFlags::CLOEXEC)?;
        let here = std::process::id();
        let pipe = |fd: &OwnedFd| format!("path=/proc/{here}/fd/{}", fd.as_raw_fd());

        let mut command = host.qemu();
        command
            .args(["-accel", "tcg,thread=multi", "-cpu", "max", "-M", "q35"])
            .args(["-smp", &limits.cpus.to_string()])
            .args(["-m", &limits.memory_mib.to_string()])
            .args(["-nodefaults", "-no-user-config", "-display", "none"])
            .args(["-no-reboot", "-net", "none"])
            .arg("-kernel")
            .arg(host.dir.join("vmlinuz"))
            .arg("-initrd")
            .arg(run.path("initrd"))
            .args(["-append", "console=ttyS0 quiet panic=-1 mitigations=off"])
            .arg("-serial")
            .arg(format!("file:{}", run.path("console").display()))
            .args([
                "-virtfs",
                "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap",
            ])
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
        eprintln!("rig: starting an emulated host (QEMU TCG, nested SVM)");
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

    /// Closes our write ends once QEMU holds its own, so that its end is the pipes' end.
    fn release(&mut self, ends: [OwnedFd; 3], interactive: bool) -> Result<()> {
        let wanted = if interactive { 1 } else { 3 };
        let deadline = Instant::now() + Duration::from_secs(20);
        let names: Vec<PathBuf> = ends
            .iter()
            .filter_map(|e| fs::read_link(format!("/proc/self/fd/{}", e.as_raw_fd())).ok())
            .collect();
        while Instant::now() < deadline {
            // Until it is QEMU, the child still has our own ends.
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
        // It powers itself off once it has told its status; give it a moment.
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

/// A cpio archive in the form that the kernel unpacks.
#[derive(Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    inodes: u32,
}

impl Archive {
    pub(crate) fn dir(&mut self, name: &str) -> Result<()> {
        self.entry(name, 0o040_755, &[])
    }

    pub(crate) fn file(&mut self, name: &str, mode: u32, content: &[u8]) -> Result<()> {
        self.entry(name, 0o100_000 | mode, content)
    }

    /// A character device.
    pub(crate) fn node(&mut self, name: &str, mode: u32, device: (u32, u32)) -> Result<()> {
        let entry = NewcBuilder::new(name).mode(0o020_000 | mode);
        self.add(entry.rdev_major(device.0).rdev_minor(device.1), &[])
    }

    pub(crate) fn symlink(&mut self, name: &str, to: &str) -> Result<()> {
        self.entry(name, 0o120_777, to.as_bytes())
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) -> Result<()> {
        let name = format!("{name}{}", "\0".repeat(self.padding(name, content)));
        self.add(NewcBuilder::new(&name).mode(mode), content)
    }

    fn add(&mut self, entry: NewcBuilder, content: &[u8]) -> Result<()> {
        self.inodes += 1;
        let entry = entry.ino(self.inodes).nlink(1);
        let mut writer = entry.write(&mut self.bytes, u32::try_from(content.len())?);
        writer.write_all(content)?;
        writer.finish()?;
        Ok(())
    }

    /// How many zeros more than one end the name, for the content to begin on a page: Koya's guest
    /// kernel then takes it where it lies, instead of a copy.
    fn padding(&self, name: &str, content: &[u8]) -> usize {
        /// Of an entry: `Documentation/driver-api/early-userspace/buffer-format.rst`.
        const HEADER: usize = 110;
        const PAGE: usize = 4096;
        /// The longest name that Linux takes, the zero at its end included.
        const PATH_MAX: usize = 4096;
        let named = self.bytes.len() + HEADER + name.len() + 1;
        let padding = named.next_multiple_of(PAGE) - named;
        if content.len() < PAGE || name.len() + 1 + padding > PATH_MAX {
            return 0;
        }
        padding
    }

    pub(crate) fn finish(mut self) -> Result<Vec<u8>> {
        newc::trailer(&mut self.bytes)?;
        // The kernel wants each archive of a row to start on four bytes.
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        Ok(self.bytes)
    }
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

    #[test]
    fn the_content_of_large_files_begins_on_a_page() {
        let mut archive = Archive::default();
        let large = vec![0x5a; 5000];
        archive.file("small", 0o644, b"few").unwrap();
        archive.file("one", 0o755, &large).unwrap();
        archive.file("two", 0o755, &large).unwrap();
        let bytes = archive.finish().unwrap();
        let begins: Vec<usize> = (1..bytes.len())
            .filter(|&at| bytes[at] == 0x5a && bytes[at - 1] != 0x5a)
            .collect();
        assert_eq!(begins, [4096, 12288]);
    }

    #[test]
    fn modules_load_after_what_they_need() {
        let dep = "k/a.ko.xz: k/c.ko.xz k/b.ko.xz\nk/c.ko.xz: k/b.ko.xz\nk/b.ko.xz:\n";
        let mut order = Vec::new();
        load_order("a", dep, &mut order).unwrap();
        assert_eq!(order, ["k/b.ko.xz", "k/c.ko.xz", "k/a.ko.xz"]);
        assert!(load_order("d", dep, &mut order).is_err());
    }
}
