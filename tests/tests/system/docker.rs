//! Docker with containerd's shim as a runtime, by its command line: each test with each version of Docker given to the
//! tests.

use crate::daemon::{RUNTIME, ended};
use crate::tool::{architecture, saved_image, scratch, stdout, until};
use anyhow::{Context, Result, ensure};
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError, mpsc};
use std::time::Duration;

const IMAGE: &str = "busybox:test";
/// In the order of the directories in KOYA_TEST_DOCKER. Versions are chosen by `cargo xtask test`.
const VERSIONS: [&str; 2] = ["26", "28"];

type Test = (&'static str, fn(&Docker) -> Result<()>);

/// Each test with each available version.
pub(crate) fn trials() -> Vec<libtest_mimic::Trial> {
    let tests: [Test; 3] = [
        (
            "containers_get_what_was_asked",
            containers_get_what_was_asked,
        ),
        ("a_container_is_looked_after", a_container_is_looked_after),
        ("networks_are_dockers", networks_are_dockers),
    ];
    let all = std::env::var_os("KOYA_TEST_DOCKER").unwrap_or_default();
    let count = std::env::split_paths(&all).filter(|tree| !tree.as_os_str().is_empty());
    let count = count.count();
    let versions = VERSIONS.into_iter().enumerate().take(count);
    versions
        .flat_map(|(index, version)| tests.map(|(name, test)| (index, version, name, test)))
        .map(|(index, version, name, test)| {
            crate::trial(format!("docker::v{version}::{name}"), move || {
                let docker = Docker::start(index, version)?;
                test(&docker).with_context(|| docker.last_words())
            })
        })
        .collect()
}

/// A Docker of this test. Only one runs at a time: its networks are those of the machine.
struct Docker {
    dir: PathBuf,
    path: String,
    daemon: Child,
    _alone: MutexGuard<'static, ()>,
}

impl Docker {
    fn start(index: usize, version: &str) -> Result<Self> {
        static ALONE: Mutex<()> = Mutex::new(());
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let trees = std::env::var_os("KOYA_TEST_DOCKER")
            .context("KOYA_TEST_DOCKER names no directories; `cargo xtask test` makes them")?;
        let tree = std::env::split_paths(&trees).nth(index);
        let tree = tree.context("too few directories")?;
        load_modules()?;
        let dir = scratch("d")?;
        let at = dir.display();
        let config = serde_json::json!({
            "data-root": format!("{at}/root"), "exec-root": format!("{at}/exec"),
            "pidfile": format!("{at}/pid"), "hosts": [format!("unix://{at}/sock")],
            "bip": "10.89.0.1/24", "exec-opts": ["native.cgroupdriver=cgroupfs"],
            "default-address-pools": [{"base": "10.90.0.0/16", "size": 24}],
            "runtimes": {"koya": {"runtimeType": RUNTIME}},
        });
        fs::write(dir.join("daemon.json"), config.to_string())?;
        let tree = tree.display();
        let path = format!("{tree}/usr/sbin:{tree}/usr/bin:{}", std::env::var("PATH")?);
        let log = fs::File::create(dir.join("log"))?;
        let daemon = Command::new("dockerd")
            .arg("--config-file")
            .arg(dir.join("daemon.json"))
            .env("PATH", &path)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("cannot start dockerd")?;
        let docker = Self {
            dir,
            path,
            daemon,
            _alone: alone,
        };
        until("dockerd", || {
            let asked = docker.docker(["version"]).output()?;
            Ok(asked.status.success().then_some(()))
        })
        .with_context(|| docker.last_words())?;
        let about = docker.said(["version", "--format", "{{.Server.Version}}"])?;
        ensure!(about.starts_with(&format!("{version}.")), "{about}");
        docker.said(["load".as_ref(), "-i".as_ref(), image()?.as_os_str()])?;
        Ok(docker)
    }

    fn docker<S: AsRef<std::ffi::OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Command {
        let mut docker = Command::new("docker");
        docker
            .arg("--host")
            .arg(format!("unix://{}/sock", self.dir.display()))
            .args(args)
            .env("PATH", &self.path)
            .env("HOME", &self.dir)
            .stdin(Stdio::null());
        docker
    }

    /// Output of a command that must succeed.
    fn said<S: AsRef<std::ffi::OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Result<String> {
        stdout(self.docker(args).output()?)
    }

    /// `docker run OPTIONS IMAGE COMMAND`
    fn run(&self, options: &[&str], command: &[&str]) -> Command {
        let mut docker = self.docker(["run", "--runtime", "koya"]);
        docker.args(options).arg(IMAGE).args(command);
        docker
    }

    /// Output of a container that runs a script.
    fn sh(&self, options: &[&str], script: &str) -> Result<String> {
        let options = [&["--rm"], options].concat();
        stdout(self.run(&options, &["sh", "-c", script]).output()?)
    }

    /// Checks that a container is refused, with this reason.
    fn refused(&self, options: &[&str], why: &str) -> Result<()> {
        let options = [&["--rm"], options].concat();
        let (code, text) = ended(&self.run(&options, &["true"]).output()?);
        ensure!(code == Some(125) && text.contains(why), "{code:?} {text}");
        Ok(())
    }

    fn inspect(&self, name: &str, what: &str) -> Result<String> {
        self.said(["inspect", "--format", what, name])
    }

    fn wait_for(&self, name: &str, what: &str, value: &str) -> Result<()> {
        until(&format!("{what} of {name} to be {value}"), || {
            Ok((self.inspect(name, what)? == value).then_some(()))
        })
    }

    fn exec(&self, name: &str, script: &str) -> Result<String> {
        self.said(["exec", name, "sh", "-c", script])
    }

    /// Checks that no container and no shim is left.
    fn nothing_is_left(&self) -> Result<()> {
        let left = self.said(["ps", "-aq"])?;
        ensure!(left.is_empty(), "containers: {left}");
        let exec = self.dir.join("exec");
        until("shims that go", || {
            let found = Command::new("pgrep")
                .args(["-f", &format!("containerd-shim.*{}", exec.display())])
                .output()?;
            Ok(found.stdout.is_empty().then_some(()))
        })
    }

    fn last_words(&self) -> String {
        let log = fs::read_to_string(self.dir.join("log")).unwrap_or_default();
        let lines = log.lines().filter(|line| !line.contains("level=info"));
        let lines: Vec<_> = lines.collect();
        lines[lines.len().saturating_sub(30)..].join("\n")
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        if let Ok(all) = self.said(["ps", "-aq"]) {
            self.docker(["rm", "-f"]).args(all.lines()).output().ok();
        }
        // containerd ends with it.
        let pid = self.daemon.id().to_string();
        Command::new("kill").args(["-TERM", &pid]).status().ok();
        let ended = until("dockerd's end", || Ok(self.daemon.try_wait()?));
        if ended.is_err() {
            self.daemon.kill().ok();
            self.daemon.wait().ok();
        }
    }
}

/// The rig has the modules for the networks of Docker and podman in a directory; elsewhere they load them by themselves.
pub(crate) fn load_modules() -> Result<()> {
    let directory = Path::new("/run/koya-rig/modules");
    let Ok(order) = fs::read_to_string(directory.join("docker")) else {
        return Ok(());
    };
    static LOADED: Mutex<bool> = Mutex::new(false);
    let mut is_loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    for name in order.lines().filter(|_| !*is_loaded) {
        let mut insmod = Command::new("/bin/busybox");
        let loaded = insmod.arg("insmod").arg(directory.join(name)).output()?;
        let said = String::from_utf8_lossy(&loaded.stderr);
        ensure!(
            loaded.status.success() || said.contains("exists"),
            "{name}: {said}"
        );
    }
    *is_loaded = true;
    Ok(())
}

/// The tests' image, in the format of `docker save`.
fn image() -> Result<&'static Path> {
    static IMAGE_TAR: Mutex<Option<&Path>> = Mutex::new(None);
    let mut made = IMAGE_TAR.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(path) = *made {
        return Ok(path);
    }
    let path = saved_image(&scratch("image")?, Some(IMAGE), |layer| {
        let layer = format!("sha256:{layer}");
        let config = serde_json::json!({
            "architecture": architecture(), "os": "linux",
            "config": {"Env": ["PATH=/bin"], "Cmd": ["sh"]},
            "rootfs": {"type": "layers", "diff_ids": [layer]},
        });
        config.to_string()
    })?;
    let path: &'static Path = Box::leak(path.into_boxed_path());
    *made = Some(path);
    Ok(path)
}

/// Value of the line `name=` in a script's output.
fn line<'a>(said: &'a str, name: &str) -> Result<&'a str> {
    let mut lines = said.lines().map(str::trim_end);
    let found = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
    found.with_context(|| format!("no {name} in {said}"))
}

/// Options of `docker run`, many in one container.
fn containers_get_what_was_asked(docker: &Docker) -> Result<()> {
    let shared = scratch("volume")?;
    fs::write(shared.join("file"), "of the host")?;
    let volume = format!("{}:/data", shared.display());
    let options = [
        "-v",
        &volume,
        "--tmpfs",
        "/mem:size=5m",
        "--read-only",
        "--user",
        "33:40",
        "--group-add",
        "77",
        "--ulimit",
        "nofile=500:600",
        "--sysctl",
        "net.ipv4.ip_forward=0",
        "--shm-size",
        "9m",
        "--init",
        "--hostname",
        "named",
        "--add-host",
        "other:10.1.2.3",
        "--dns",
        "10.1.2.4",
        "-e",
        "TOLD=a b",
        "-w",
        "/tmp",
        "--cap-drop",
        "ALL",
        "-m",
        "256m",
        "--cpus",
        "1",
        "--pids-limit",
        "50",
        "--device",
        "/dev/null:/dev/nil",
        "--entrypoint",
        "/bin/sh",
    ];
    let script = "echo kernel=$(uname -r); echo file=$(cat /data/file)
        echo mem=$(df -k /mem | tail -n 1 | awk '{print $2}'); touch /no 2>/dev/null || echo root=read-only
        echo user=$(id -u):$(id -g) groups $(id -G); echo files=$(ulimit -Sn) $(ulimit -Hn)
        echo forward=$(cat /proc/sys/net/ipv4/ip_forward)
        echo shm=$(df -k /dev/shm | tail -n 1 | awk '{print $2}')
        echo init=$(cat /proc/1/comm); echo host=$(hostname); echo other=$(grep other /etc/hosts)
        echo dns=$(grep ^nameserver /etc/resolv.conf); echo told=$TOLD; echo cwd=$(pwd)
        echo caps=$(grep CapBnd /proc/self/status); ls -l /dev/nil | cut -c1 | sed 's/^/device=/'
        echo limit=$(cat /sys/fs/cgroup/memory.max) pids $(cat /sys/fs/cgroup/pids.max)
        echo total=$(grep MemTotal /proc/meminfo | tr -dc 0-9); exit 7";
    let options = [&["--rm"], &options[..]].concat();
    let (code, said) = ended(&docker.run(&options, &["-c", script]).output()?);
    ensure!(code == Some(7), "{code:?} {said}");
    let host = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    ensure!(line(&said, "kernel")? != host.trim(), "{said}");
    ensure!(line(&said, "kernel")?.contains("-koya"), "{said}");
    let expected = [
        ("file", "of the host"),
        ("mem", "5120"),
        ("root", "read-only"),
        ("user", "33:40 groups 40 77"),
        ("files", "500 600"),
        ("forward", "0"),
        ("shm", "9216"),
        ("init", "docker-init"),
        ("host", "named"),
        ("other", "10.1.2.3 other"),
        ("dns", "nameserver 10.1.2.4"),
        ("told", "a b"),
        ("cwd", "/tmp"),
        ("caps", "CapBnd: 0000000000000000"),
        ("device", "c"),
        ("limit", "268435456 pids 50"),
    ];
    for (name, value) in expected {
        ensure!(line(&said, name)? == value, "{name} is not {value}: {said}");
    }
    let total: u64 = line(&said, "total")?.parse()?;
    ensure!((200 << 10..400 << 10).contains(&total), "{said}");

    // Exit statuses as with runc: command not found, and not executable.
    for (command, status) in [("/nope", 127), ("nope", 127), ("/etc/passwd", 126)] {
        let (code, text) = ended(&docker.run(&["--rm"], &[command]).output()?);
        ensure!(code == Some(status), "{command}: {code:?} {text}");
    }
    // A terminal, which Docker's client requires on its own standard input.
    let run = docker.run(&["--rm", "-it"], &["sh", "-c", "tty; stty size; exit 4"]);
    let words = std::iter::once(run.get_program()).chain(run.get_args());
    let words: Vec<_> = words
        .map(|word| format!("'{}'", word.to_string_lossy()))
        .collect();
    let script = format!("stty rows 33 cols 77; {}", words.join(" "));
    let mut terminal = Command::new("script");
    terminal
        .args(["-qec", &script, "/dev/null"])
        .env("PATH", &docker.path);
    let (code, text) = ended(&terminal.stdin(Stdio::null()).output()?);
    ensure!(
        code == Some(4) && text.contains("/dev/pts/0"),
        "{code:?} {text}"
    );
    ensure!(text.contains("33 77"), "{text}");
    // A privileged container has the devices of its machine, not those of the host.
    let said = docker.sh(&["--privileged"], "grep CapEff /proc/self/status; ls /dev")?;
    ensure!(said.contains("000001ffffffffff"), "{said}");
    docker.nothing_is_left()
}

/// Requests to a running container.
fn a_container_is_looked_after(docker: &Docker) -> Result<()> {
    let script = "trap 'echo bye; exit 5' INT; echo hello; n=0
        while :; do n=$((n+1)); echo $n > /tmp/m; mv /tmp/m /tmp/n; sleep 0.1; done";
    let check = "test -e /tmp/n";
    let options = [
        "-d",
        "--name",
        "life",
        "-m",
        "256m",
        "--stop-signal",
        "INT",
        "--health-cmd",
        check,
        "--health-interval",
        "1s",
        "--label",
        "a=b",
    ];
    stdout(docker.run(&options, &["sh", "-c", script]).output()?)?;
    let listed = docker.said(["ps", "--format", "{{.Names}} {{.State}}"])?;
    ensure!(listed == "life running", "{listed}");
    until("its output", || {
        Ok((docker.said(["logs", "life"])? == "hello").then_some(()))
    })?;
    let (code, text) = ended(
        &docker
            .docker(["exec", "life", "sh", "-c", "cat /tmp/n; exit 6"])
            .output()?,
    );
    ensure!(
        code == Some(6) && text.parse::<u32>().is_ok(),
        "{code:?} {text}"
    );
    let said = docker.said([
        "exec",
        "-u",
        "33",
        "-e",
        "A=b",
        "-w",
        "/etc",
        "life",
        "sh",
        "-c",
        "echo $(id -u) $A $(pwd)",
    ])?;
    ensure!(said == "33 b /etc", "{said}");
    docker.wait_for("life", "{{.State.Health.Status}}", "healthy")?;

    let stats = docker.said([
        "stats",
        "--no-stream",
        "--format",
        "{{.MemUsage}};{{.PIDs}}",
        "life",
    ])?;
    ensure!(stats.contains("/ 256MiB;"), "{stats}");
    ensure!(
        !stats.starts_with("0B") && !stats.ends_with(";0"),
        "{stats}"
    );
    docker.said(["update", "-m", "200m", "--memory-swap", "200m", "life"])?;
    let limit = docker.exec("life", "cat /sys/fs/cgroup/memory.max")?;
    ensure!(limit == (200 << 20).to_string(), "{limit}");

    docker.said(["pause", "life"])?;
    docker.wait_for("life", "{{.State.Status}}", "paused")?;
    docker.said(["unpause", "life"])?;
    docker.wait_for("life", "{{.State.Status}}", "running")?;
    let before = docker.exec("life", "cat /tmp/n")?;
    until("it to go on", || {
        Ok((docker.exec("life", "cat /tmp/n")? != before).then_some(()))
    })?;

    let file = docker.dir.join("file");
    fs::write(&file, "copied in")?;
    let there = "life:/root/file";
    docker.said(["cp".as_ref(), file.as_os_str(), there.as_ref()])?;
    ensure!(docker.exec("life", "cat /root/file; echo changed > /root/file")? == "copied in");
    docker.said(["cp".as_ref(), there.as_ref(), file.as_os_str()])?;
    ensure!(fs::read_to_string(&file)? == "changed\n");
    ensure!(docker.said(["diff", "life"])?.contains("A /root/file"));
    docker.said(["commit", "life", "committed:test"])?;

    // Its stop signal and exit status; then a new start by the same name.
    docker.said(["stop", "-t", "60", "life"])?;
    ensure!(docker.inspect("life", "{{.State.ExitCode}}")? == "5");
    ensure!(docker.said(["logs", "life"])? == "hello\nbye");
    docker.said(["start", "life"])?;
    ensure!(docker.exec("life", "cat /root/file")? == "changed");
    docker.said(["restart", "-t", "60", "life"])?;
    let wait = docker
        .docker(["wait", "life"])
        .stdout(Stdio::piped())
        .spawn()?;
    docker.said(["kill", "life"])?;
    ensure!(stdout(wait.wait_with_output()?)? == "137");
    docker.said(["rm", "life"])?;
    ensure!(
        docker.sh(&["committed:test"], "").is_err(),
        "an image is no option"
    );
    let mut committed = docker.docker(["run", "--rm", "--runtime", "koya", "committed:test"]);
    ensure!(stdout(committed.args(["cat", "/root/file"]).output()?)? == "changed");

    // A failed container is restarted; standard input is forwarded.
    let again = ["-d", "--name", "again", "--restart", "on-failure:1"];
    stdout(
        docker
            .run(&again, &["sh", "-c", "echo once; exit 3"])
            .output()?,
    )?;
    docker.wait_for("again", "{{.RestartCount}} {{.State.Status}}", "1 exited")?;
    ensure!(docker.said(["logs", "again"])? == "once\nonce");
    docker.said(["rm", "again"])?;
    let mut cat = docker.run(&["--rm", "-i"], &["cat"]);
    let mut cat = cat.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    std::io::Write::write_all(&mut cat.stdin.take().context("a pipe")?, b"typed\n")?;
    ensure!(stdout(cat.wait_with_output()?)? == "typed");
    docker.nothing_is_left()
}

/// Docker's own networks: the default one with a published port, one with names, none; and unsupported options.
fn networks_are_dockers(docker: &Docker) -> Result<()> {
    let script = "mkdir /www; echo pong > /www/index.html; exec httpd -f -p 80 -h /www";
    let serve = |name: &str, options: &[&str]| {
        let options = [&["-d", "--name", name], options].concat();
        stdout(docker.run(&options, &["sh", "-c", script]).output()?)
    };
    serve("web", &["-p", "18080:80"])?;
    // Not by the machine's busybox: its static C library needs shared libraries for name lookups, and may crash.
    let fetch =
        |address: &str| Ok((page(address).unwrap_or_default().ends_with("pong\n")).then_some(()));
    let address = docker.inspect(
        "web",
        "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}",
    )?;
    until("its address to answer", || fetch(&format!("{address}:80")))?;
    until("its port to answer", || fetch("127.0.0.1:18080"))?;
    let said = docker.sh(
        &[],
        &format!("{PAGE}; page {address}; ping -c 1 -W 20 10.89.0.1 >/dev/null && echo out"),
    )?;
    ensure!(said == "pong\nout", "{said}");
    docker.said(["rm", "-f", "web"])?;

    names_are_dockers(docker, serve)?;

    let said = docker.sh(&["--network", "none"], "ls /sys/class/net")?;
    ensure!(said == "lo", "{said}");
    docker.refused(&["--network", "host"], "the host's network can't be")?;
    let mut runc = docker.docker(["run", "-d", "--name", "other", "--runtime", "koya", IMAGE]);
    stdout(runc.args(["sleep", "1000"]).output()?)?;
    docker.refused(
        &["--network", "container:other"],
        "the network of another container can't be shared",
    )?;
    docker.said(["rm", "-f", "other"])?;
    let socket = format!("{}/sock:/var/run/docker.sock", docker.dir.display());
    docker.refused(
        &["-v", &socket],
        "a socket of the host's can't be used in a guest",
    )?;
    docker.nothing_is_left()
}

/// Response of an HTTP server.
pub(crate) fn page(address: &str) -> Result<String> {
    let limit = Duration::from_secs(5);
    let mut stream = TcpStream::connect_timeout(&address.parse()?, limit)?;
    stream.set_read_timeout(Some(limit))?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut said = String::new();
    stream.read_to_string(&mut said)?;
    Ok(said)
}

/// The same in a container's shell.
pub(crate) const PAGE: &str =
    r"page() { printf 'GET / HTTP/1.0\r\n\r\n' | nc -w 20 $1 80 | tail -n 1; }";

/// Names of containers, and external names from another name server in the container's network.
fn names_are_dockers(
    docker: &Docker,
    serve: impl Fn(&str, &[&str]) -> Result<String>,
) -> Result<()> {
    let gateway = "10.91.0.1";
    let create = [
        "network",
        "create",
        "--subnet",
        "10.91.0.0/24",
        "--gateway",
        gateway,
        "names",
    ];
    docker.said(create)?;
    serve("web", &["--network", "names", "--network-alias", "alias"])?;
    let server = UdpSocket::bind((gateway, 53))?;
    server.set_read_timeout(Some(Duration::from_secs(1)))?;
    // Its end ends the thread: the same test with another version needs the address.
    let (asking, asked) = mpsc::channel::<()>();
    let answers = std::thread::spawn(move || answer_names(&server, &asked));
    let script = format!("{PAGE}; grep ^nameserver /etc/resolv.conf
        for name in web alias; do page $(nslookup -type=a $name | sed -n 's/^Address: //p'); done
        nslookup -type=a outside.example | grep 10.1.2.3; nslookup -type=a nowhere.example | grep NXDOMAIN");
    let options = ["--rm", "--network", "names", "--dns", gateway];
    let (code, said) = ended(&docker.run(&options, &["sh", "-c", &script]).output()?);
    let lines: Vec<_> = said.lines().collect();
    let asked = lines.get(..3) == Some(&["nameserver 127.0.0.11", "pong", "pong"]);
    ensure!(code == Some(0) && asked, "{code:?} {said}");
    ensure!(
        said.contains("10.1.2.3") && said.contains("NXDOMAIN"),
        "{said}"
    );
    drop(asking);
    ensure!(answers.join().is_ok(), "the name server panicked");
    docker.said(["rm", "-f", "web"])?;
    docker.said(["network", "rm", "names"])?;
    Ok(())
}

/// A name server for the address of `outside.example` only (RFC 1035, section 4.1).
fn answer_names(socket: &UdpSocket, end: &mpsc::Receiver<()>) {
    let mut question = [0; 512];
    while end.try_recv() != Err(mpsc::TryRecvError::Disconnected) {
        let Ok((len, peer)) = socket.recv_from(&mut question) else {
            continue;
        };
        let asked = &question[..len];
        let is_known = asked.windows(8).any(|label| label == b"\x07outside");
        let (code, count) = if is_known { (0x80, 1) } else { (0x83, 0) };
        // The name, its terminator, type and class; the rest is not answered.
        let end = 12 + asked[12..].iter().position(|byte| *byte == 0).unwrap_or(0) + 5;
        let mut answer = [
            &asked[..2],
            &[0x81, code, 0, 1, 0, count, 0, 0, 0, 0],
            &asked[12..end],
        ]
        .concat();
        if is_known {
            answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 10, 1, 2, 3]);
        }
        socket.send_to(&answer, peer).ok();
    }
}
