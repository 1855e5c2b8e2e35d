//! Engines with a daemon, started for the measurement: containerd and Docker.

use crate::Result;
use crate::engines::{Engine, Files, program, succeed};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Time limit for the start of a daemon.
const LIMIT: Duration = Duration::from_secs(120);

/// A daemon's process, killed on drop, and its directory.
struct Daemon {
    dir: PathBuf,
    child: Child,
}

impl Daemon {
    /// Starts `command` with its output in `log`, and waits until `client` succeeds.
    fn start(dir: PathBuf, command: &mut Command, client: &mut Command) -> Result<Self> {
        let log = File::create(dir.join("log"))?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?);
        let child = command.stderr(log).spawn()?;
        let daemon = Self { dir, child };
        let started = Instant::now();
        while !client.stdin(Stdio::null()).output()?.status.success() {
            if started.elapsed() > LIMIT {
                return Err(format!("no answer within {LIMIT:?}: {}", daemon.log()?).into());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(daemon)
    }

    fn log(&self) -> Result<String> {
        Ok(fs::read_to_string(self.dir.join("log"))?)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// PATH with a directory before all others.
fn path_with(directory: &Path) -> Result<String> {
    Ok(format!(
        "{}:{}",
        directory.display(),
        std::env::var("PATH")?
    ))
}

pub(crate) struct Containerd {
    daemon: Daemon,
    bin: PathBuf,
    rootfs: PathBuf,
}

impl Containerd {
    pub(crate) fn start(files: &Files, bin: &Path) -> Result<Self> {
        let dir = files.dir.join("containerd");
        fs::create_dir_all(&dir)?;
        let at = dir.display();
        let config = format!(
            "version = 2\nroot = \"{at}/root\"\nstate = \"{at}/state\"\n\
             disabled_plugins = [\"io.containerd.grpc.v1.cri\", \
             \"io.containerd.internal.v1.opt\"]\n[grpc]\naddress = \"{at}/c.sock\"\n"
        );
        fs::write(dir.join("config.toml"), config)?;
        let mut command = Command::new(bin.join("containerd"));
        command.arg("--config").arg(dir.join("config.toml"));
        command.env("PATH", path_with(bin)?);
        let mut client = ctr(bin, &dir);
        let daemon = Daemon::start(dir, &mut command, client.arg("version"))?;
        Ok(Self {
            daemon,
            bin: bin.into(),
            rootfs: files.rootfs.clone(),
        })
    }

    /// The log of containerd and its shims.
    pub(crate) fn log(&self) -> Result<String> {
        self.daemon.log()
    }
}

fn ctr(bin: &Path, dir: &Path) -> Command {
    let mut ctr = Command::new(bin.join("ctr"));
    ctr.arg("--address").arg(dir.join("c.sock"));
    ctr
}

impl Engine for Containerd {
    fn name(&self) -> &'static str {
        "ctr run"
    }

    fn command(&self, runtime: &str, name: &str, command: &[&str]) -> Command {
        let mut ctr = ctr(&self.bin, &self.daemon.dir);
        ctr.args(["run", "--rm", "--env", "PATH=/bin"]);
        match runtime {
            "koya" => ctr.args(["--runtime", "io.containerd.koya.v2"]),
            other => ctr
                .args(["--runtime", "io.containerd.runc.v2", "--runc-binary"])
                .arg(program(other)),
        };
        ctr.arg("--rootfs")
            .arg(&self.rootfs)
            .arg(name)
            .args(command);
        ctr
    }
}

pub(crate) struct Docker {
    daemon: Daemon,
    path: String,
}

impl Docker {
    pub(crate) fn start(files: &Files, tree: &Path) -> Result<Self> {
        // Short, since socket paths are limited to 107 bytes.
        let dir = files.dir.join("d");
        fs::create_dir_all(&dir)?;
        let at = dir.display();
        let config = serde_json::json!({
            "data-root": format!("{at}/root"), "exec-root": format!("{at}/exec"),
            "pidfile": format!("{at}/pid"), "hosts": [format!("unix://{at}/sock")],
            "exec-opts": ["native.cgroupdriver=cgroupfs"],
            // The containers have no network.
            "bridge": "none", "iptables": false, "ip6tables": false,
            "runtimes": {
                "koya": {"runtimeType": "io.containerd.koya.v2"},
            },
        });
        fs::write(dir.join("daemon.json"), config.to_string())?;
        let path = path_with(&tree.join("usr/bin"))?;
        let path = format!("{}:{path}", tree.join("usr/sbin").display());
        let mut command = Command::new("dockerd");
        command.arg("--config-file").arg(dir.join("daemon.json"));
        command.env("PATH", &path);
        let mut client = docker(&path, &dir);
        let daemon = Daemon::start(dir, &mut command, client.arg("version"))?;
        let docker = Self { daemon, path };
        succeed(
            docker
                .docker()
                .arg("import")
                .arg(files.archive()?)
                .arg("bb"),
        )?;
        Ok(docker)
    }

    fn docker(&self) -> Command {
        docker(&self.path, &self.daemon.dir)
    }
}

fn docker(path: &str, dir: &Path) -> Command {
    let mut docker = Command::new("docker");
    docker
        .arg("--host")
        .arg(format!("unix://{}/sock", dir.display()));
    docker.env("PATH", path).env("HOME", dir);
    docker
}

impl Engine for Docker {
    fn name(&self) -> &'static str {
        "docker run"
    }

    /// Debian 12's crun does not know the version of the configurations.
    fn peers(&self) -> &'static [&'static str] {
        &["runc"]
    }

    fn command(&self, runtime: &str, name: &str, command: &[&str]) -> Command {
        let mut docker = self.docker();
        docker.args(["run", "--rm", "--network", "none", "--name", name]);
        docker.args(["--runtime", runtime, "bb"]).args(command);
        docker
    }
}
