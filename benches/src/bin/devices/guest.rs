//! The measured guests: the same kernel and the same tools under Koya and under QEMU.

use crate::{Outcome, TAP};
use koya_vmm::devices::fs::passthrough::Options;
use koya_vmm::devices::fs::{Cache, Fs, Shares, raise_descriptor_limit};
use koya_vmm::{DiskConfig, NetConfig, Vm, VmConfig, VsockConfig};
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::Receiver;

/// The first argument of a process that runs one of Koya's guests.
pub(crate) const ARGUMENT: &str = "guest";
/// Option of that process: its threads are unconfined.
const UNCONFINED: &str = "--unconfined";
/// The port of the host that guests connect to by vsock.
pub(crate) const VSOCK_PORT: u32 = 7000;
/// Virtio-fs tags of the share, and of the same share with caching in the guest.
const TAG: &str = "bench";
const WRITEBACK_TAG: &str = "writeback";

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Monitor {
    Koya,
    /// Koya, with unconfined threads.
    Unconfined,
    Qemu,
}

/// Counts of the monitor that are measured instead of times.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Counting {
    /// Exits, which are counted without overhead.
    Exits,
    /// System calls, counted by a tracer: no times are measured then.
    Calls,
}

/// A set of measurements for one guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Set {
    /// A disk through the host's page cache, and a network.
    Cached,
    /// A disk with direct I/O.
    Direct,
    /// Shared files.
    Files,
    /// vsock.
    Sockets,
    /// Memory given back to the host: 1 GiB.
    OneGib,
    /// The same with 4 GiB.
    FourGib,
}

impl Set {
    pub(crate) const ALL: [Self; 6] = [
        Self::Cached,
        Self::Direct,
        Self::Files,
        Self::Sockets,
        Self::OneGib,
        Self::FourGib,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Cached => "disk by the page cache, network",
            Self::Direct => "disk past the page cache",
            Self::Files => "files",
            Self::Sockets => "vsock",
            Self::OneGib => "memory, 1 GiB",
            Self::FourGib => "memory, 4 GiB",
        }
    }

    /// The script that the guest runs (`benches/guest/measure-*.sh`).
    fn script(self) -> &'static str {
        match self {
            Self::Cached | Self::Direct => "disks",
            Self::Files => "files",
            Self::Sockets => "vsock",
            Self::OneGib | Self::FourGib => "memory",
        }
    }

    fn memory_mib(self) -> u64 {
        match self {
            Self::OneGib => 1536,
            Self::FourGib => 5120,
            _ => 512,
        }
    }

    fn cmdline(self, counting: Counting) -> String {
        let gib = match self {
            Self::FourGib => 4,
            _ => 1,
        };
        let wait = match counting {
            Counting::Exits => 0,
            // Attaching a tracer takes a moment.
            Counting::Calls => 4,
        };
        format!("quiet measure={} gib={gib} wait={wait}", self.script())
    }
}

/// Paths for the guests.
pub(crate) struct Places {
    pub(crate) tools: PathBuf,
    pub(crate) data: PathBuf,
    pub(crate) shared: PathBuf,
    /// Directory for sockets.
    pub(crate) run: PathBuf,
}

impl Places {
    /// Socket of the host's end of vsock connections.
    pub(crate) fn vsock(&self) -> PathBuf {
        self.run.join("vsock")
    }
}

/// A running guest, ended on drop.
pub(crate) struct Guest {
    child: Child,
    /// virtiofsd, if it is used.
    server: Option<Child>,
    /// Its console, line by line.
    pub(crate) lines: Receiver<String>,
}

impl Drop for Guest {
    fn drop(&mut self) {
        for child in [Some(&mut self.child), self.server.as_mut()]
            .into_iter()
            .flatten()
        {
            child.kill().ok();
            child.wait().ok();
        }
    }
}

impl Guest {
    pub(crate) fn start(
        monitor: Monitor,
        set: Set,
        counting: Counting,
        places: &Places,
    ) -> Outcome<Self> {
        let (mut command, input, server) = match monitor {
            Monitor::Koya | Monitor::Unconfined => {
                let mut command = Command::new(std::env::current_exe()?);
                command.arg(ARGUMENT);
                if monitor == Monitor::Unconfined {
                    command.arg(UNCONFINED);
                }
                if set == Set::Files {
                    command.arg(&places.shared);
                }
                (
                    command,
                    toml::to_string(&config(set, counting, places))?,
                    None,
                )
            }
            Monitor::Qemu => {
                let server = match set {
                    Set::Files => Some(virtiofsd(places)?),
                    _ => None,
                };
                (qemu(set, counting, places), String::new(), server)
            }
        };
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let out = child.stdout.take().ok_or("no console")?;
        let stdin = child.stdin.take();
        let (sender, lines) = std::sync::mpsc::channel();
        let guest = Self {
            child,
            server,
            lines,
        };
        if monitor != Monitor::Qemu {
            stdin.ok_or("no input")?.write_all(input.as_bytes())?;
        }
        std::thread::spawn(move || {
            for line in BufReader::new(out).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).trim().to_owned();
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Ok(guest)
    }

    /// Counts the system calls of the monitor and its servers until [`Tracer::stop`]. KVM_RUN is not counted: it is covered
    /// by exits.
    pub(crate) fn trace(&self, places: &Places) -> Outcome<Tracer> {
        let table = places.run.join("calls");
        let mut strace = Command::new("strace");
        strace
            .args(["-f", "-c", "-qq", "-e", "trace=!ioctl", "-o"])
            .arg(&table);
        for child in [Some(&self.child), self.server.as_ref()]
            .into_iter()
            .flatten()
        {
            strace.args(["-p", &child.id().to_string()]);
        }
        let strace = strace.stderr(Stdio::null()).spawn()?;
        Ok(Tracer { strace, table })
    }

    /// Resident memory of the monitor's process on the host, including the guest, in bytes.
    pub(crate) fn resident(&self) -> Outcome<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|line| line.split_whitespace().next());
        Ok(kib.ok_or("no VmRSS")?.parse::<u64>()? << 10)
    }
}

/// A running tracer.
pub(crate) struct Tracer {
    strace: Child,
    table: PathBuf,
}

impl Tracer {
    /// Number of calls.
    pub(crate) fn stop(mut self) -> Outcome<f64> {
        let pid = self.strace.id().to_string();
        Command::new("kill").args(["-INT", &pid]).status()?;
        self.strace.wait()?;
        let table = std::fs::read_to_string(&self.table)?;
        // "100.00  0.5  12  4321  7 total": the fourth is the number of calls.
        let total = table.lines().find(|line| line.ends_with(" total"));
        let calls = total.and_then(|line| line.split_whitespace().nth(3));
        Ok(calls.ok_or("strace counted nothing")?.parse()?)
    }
}

/// Main function of a process with one of Koya's guests: its configuration is on standard input, its console on standard
/// output. The last argument is the directory to share, if any.
pub(crate) fn main(arguments: impl Iterator<Item = String>) -> Outcome<()> {
    let mut arguments = arguments.peekable();
    let is_confined = arguments.next_if(|word| word == UNCONFINED).is_none();
    let shared = arguments.next().map(PathBuf::from);
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text)?;
    let spec = VmConfig::from_toml(&text)?.check()?;
    // Like virtiofsd.
    raise_descriptor_limit();
    let mut builder = Vm::builder(spec).confined(is_confined);
    for (tag, cache) in [(TAG, Cache::default()), (WRITEBACK_TAG, Cache::Writeback)] {
        let Some(path) = &shared else { break };
        let shares = Shares::default();
        shares.add("dir", path, false)?;
        let options = Options {
            cache,
            ..Options::default()
        };
        builder = builder.device(Fs::new(tag, shares, options, 1)?);
    }
    let vm = builder.console(std::io::stdout()).start()?;
    eprintln!("koya: {}", vm.wait());
    Ok(())
}

fn kernel() -> PathBuf {
    let share = std::env::var_os("KOYA_SHARE").unwrap_or_else(|| "/usr/share/koya".into());
    Path::new(&share).join("vmlinux")
}

fn config(set: Set, counting: Counting, places: &Places) -> VmConfig {
    let disk = |path: &Path, serial: &str| DiskConfig {
        serial: serial.into(),
        ..DiskConfig::new(path)
    };
    let mut config = VmConfig {
        initramfs: Some(places.tools.join("initrd")),
        cmdline: set.cmdline(counting),
        memory_mib: set.memory_mib(),
        disks: vec![DiskConfig {
            read_only: true,
            ..disk(&places.tools.join("tools.img"), "tools")
        }],
        ..VmConfig::new(kernel())
    };
    if matches!(set, Set::Cached | Set::Direct) {
        config.disks.push(DiskConfig {
            direct: set == Set::Direct,
            ..disk(&places.data, "data")
        });
    }
    if set == Set::Cached {
        config.networks.push(NetConfig {
            tap: TAP.into(),
            ..NetConfig::default()
        });
    }
    if set == Set::Sockets {
        config.vsock = Some(VsockConfig {
            cid: 3,
            socket: places.vsock(),
        });
    }
    config
}

/// QEMU with a microvm as in its documentation, with its fastest option for each device.
fn qemu(set: Set, counting: Counting, places: &Places) -> Command {
    let mut qemu = Command::new("/usr/bin/qemu-system-x86_64");
    let drive = |id: &str, path: &Path, more: &str| {
        format!("id={id},file={},format=raw,if=none,{more}", path.display())
    };
    let memory = set.memory_mib().to_string();
    let machine = "microvm,acpi=off,x-option-roms=off,rtc=off,isa-serial=on";
    let machine = match set {
        // virtiofsd maps the guest's memory.
        Set::Files => format!("{machine},memory-backend=mem"),
        _ => machine.to_owned(),
    };
    qemu.args(["-M", &machine])
        .args(["-accel", "kvm", "-cpu", "host", "-m", &memory, "-smp", "1"])
        .args(["-global", "virtio-mmio.force-legacy=false"])
        .args(["-nodefaults", "-no-user-config", "-nographic", "-no-reboot"])
        .args(["-serial", "stdio", "-object", "iothread,id=io"])
        .arg("-kernel")
        .arg(kernel())
        .arg("-initrd")
        .arg(places.tools.join("initrd"))
        .args([
            "-append",
            &format!(
                "console=ttyS0 reboot=t panic=-1 i8042.noaux {}",
                set.cmdline(counting)
            ),
        ])
        .args([
            "-drive",
            &drive("tools", &places.tools.join("tools.img"), "readonly=on"),
        ])
        .args(["-device", "virtio-blk-device,drive=tools,serial=tools"]);
    match set {
        Set::Cached | Set::Direct => {
            let cache = match set {
                Set::Direct => "cache=none,aio=io_uring",
                _ => "cache=writeback,aio=io_uring",
            };
            qemu.args(["-drive", &drive("data", &places.data, cache)])
                .args([
                    "-device",
                    "virtio-blk-device,drive=data,serial=data,iothread=io",
                ]);
        }
        Set::Files => {
            let object = format!("memory-backend-memfd,id=mem,size={memory}M,share=on");
            let socket = format!("socket,id=fs,path={}", virtiofsd_socket(places).display());
            qemu.args(["-object", &object, "-chardev", &socket]).args([
                "-device",
                &format!("vhost-user-fs-device,chardev=fs,tag={TAG},queue-size=1024"),
            ]);
        }
        Set::Sockets => {
            qemu.args(["-device", "vhost-vsock-device,guest-cid=77"]);
        }
        Set::OneGib | Set::FourGib => {
            qemu.args(["-device", "virtio-balloon-device,free-page-reporting=on"]);
        }
    }
    if set == Set::Cached {
        let tap = format!("tap,id=net,ifname={TAP},script=no,downscript=no,vhost=off");
        qemu.args(["-netdev", &tap, "-device", "virtio-net-device,netdev=net"]);
    }
    qemu
}

fn virtiofsd_socket(places: &Places) -> PathBuf {
    places.run.join("virtiofsd")
}

/// Debian 12's virtiofsd, for one guest, with Koya's default cache policy.
fn virtiofsd(places: &Places) -> Outcome<Child> {
    let socket = virtiofsd_socket(places);
    std::fs::remove_file(&socket).ok();
    // As in Koya: one share below a separate root.
    let source = places.shared.parent().ok_or("no directory")?;
    let child = Command::new("/usr/lib/qemu/virtiofsd")
        .arg(format!("--socket-path={}", socket.display()))
        .args(["-o", &format!("source={}", source.display())])
        .args(["-o", "cache=auto,sandbox=chroot,no_posix_lock,xattr"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    for _ in 0..500 {
        if socket.exists() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    Ok(child)
}
