//! Engines that run containers, and those without a daemon: the runtimes themselves, and podman.

use crate::Result;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

/// What each container prints.
const COMMAND: [&str; 2] = ["/bin/echo", "hello"];

/// Something that runs containers.
pub(crate) trait Engine {
    /// Its command, as it is called in the rows.
    fn name(&self) -> &'static str;

    /// What it can run that is compared with Koya.
    fn peers(&self) -> &'static [&'static str] {
        &["runc", "crun"]
    }

    /// The command for a container named `name` under `runtime` (`koya`, `runc`, `crun`), which runs `command` and is removed.
    fn command(&self, runtime: &str, name: &str, command: &[&str]) -> Command;

    /// Runs a container and returns its duration in milliseconds.
    fn run(&self, runtime: &str, name: &str) -> Result<f64> {
        let mut command = self.command(runtime, name, &COMMAND);
        command.stdin(Stdio::null());
        let started = Instant::now();
        let output = command.output()?;
        let took = started.elapsed();
        if output.stdout != b"hello\n" {
            let said = String::from_utf8_lossy(&output.stderr);
            return Err(format!("{}, {name}: {}: {said}", self.name(), output.status).into());
        }
        Ok(took.as_secs_f64() * 1e3)
    }
}

/// Files of the containers and state of the engines, removed on drop.
pub(crate) struct Files {
    pub(crate) dir: PathBuf,
    /// A root file system of busybox.
    pub(crate) rootfs: PathBuf,
}

impl Files {
    pub(crate) fn create() -> Result<Self> {
        // On the rig's disk, if there is one.
        let base = match Path::new("/run/scratch").is_dir() {
            true => PathBuf::from("/run/scratch"),
            false => std::env::temp_dir(),
        };
        let dir = base.join(format!("bench-{}", std::process::id()));
        let rootfs = dir.join("bundle/rootfs");
        for directory in ["bin", "dev", "etc", "proc", "sys", "tmp"] {
            fs::create_dir_all(rootfs.join(directory))?;
        }
        fs::copy("/bin/busybox", rootfs.join("bin/busybox"))?;
        for name in ["sh", "true", "echo"] {
            symlink("busybox", rootfs.join("bin").join(name))?;
        }
        Ok(Self { dir, rootfs })
    }

    /// Packs the root file system, for engines that import images.
    pub(crate) fn archive(&self) -> Result<PathBuf> {
        let archive = self.dir.join("rootfs.tar");
        let mut tar = Command::new("tar");
        tar.arg("-C").arg(&self.rootfs).arg("-cf").arg(&archive);
        succeed(tar.arg("."))?;
        Ok(archive)
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.dir).ok();
    }
}

/// The runtimes by their own command lines, with a bundle.
pub(crate) struct Runtimes {
    bundle: PathBuf,
}

impl Runtimes {
    pub(crate) fn new(files: &Files) -> Result<Self> {
        let bundle = files.dir.join("bundle");
        succeed(Command::new("runc").arg("spec").current_dir(&bundle))?;
        let path = bundle.join("config.json");
        let mut config: serde_json::Value = serde_json::from_slice(&fs::read(&path)?)?;
        config["process"]["terminal"] = false.into();
        config["process"]["args"] = COMMAND.as_slice().into();
        fs::write(path, config.to_string())?;
        Ok(Self { bundle })
    }
}

impl Engine for Runtimes {
    fn name(&self) -> &'static str {
        "runtime run"
    }

    fn command(&self, runtime: &str, name: &str, _: &[&str]) -> Command {
        let mut command = Command::new(program(runtime));
        command
            .args(["run", "--bundle"])
            .arg(&self.bundle)
            .arg(name);
        command
    }
}

/// podman with its own storage.
pub(crate) struct Podman {
    dir: PathBuf,
}

impl Podman {
    pub(crate) fn new(files: &Files) -> Result<Self> {
        let podman = Self {
            dir: files.dir.join("podman"),
        };
        let archive = files.archive()?;
        succeed(podman.podman("runc").arg("import").arg(archive).arg("bb"))?;
        Ok(podman)
    }

    fn podman(&self, runtime: &str) -> Command {
        let mut command = Command::new("podman");
        command.arg("--root").arg(self.dir.join("root"));
        command.arg("--runroot").arg(self.dir.join("run"));
        command.args(["--cgroup-manager", "cgroupfs", "--events-backend", "file"]);
        command.arg("--runtime").arg(program(runtime));
        command
    }
}

impl Engine for Podman {
    fn name(&self) -> &'static str {
        "podman run"
    }

    fn command(&self, runtime: &str, name: &str, command: &[&str]) -> Command {
        let mut podman = self.podman(runtime);
        podman.args(["run", "--rm", "--network", "none", "--name", name, "bb"]);
        podman.args(command);
        podman
    }
}

/// Path of a runtime's program: engines want absolute ones.
pub(crate) fn program(runtime: &str) -> PathBuf {
    let name = match runtime {
        "koya" => "koya-runtime",
        other => other,
    };
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut places = std::env::split_paths(&path).map(|directory| directory.join(name));
    places
        .find(|place| place.exists())
        .unwrap_or_else(|| name.into())
}

/// Runs a command that must succeed.
pub(crate) fn succeed(command: &mut Command) -> Result<()> {
    let output = command.stdin(Stdio::null()).output()?;
    match output.status.success() {
        true => Ok(()),
        false => Err(format!("{command:?}: {}", String::from_utf8_lossy(&output.stderr)).into()),
    }
}
