//! podman with `koya-runtime`: conmon creates the containers, podman starts, stops and deletes them.

use crate::tool::{ip, scratch, shared_rootfs, stdout, until};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

crate::trials!(
    podman_runs_containers_in_the_foreground,
    podman_keeps_containers_in_the_background,
    a_podman_pod_is_one_virtual_machine,
);

/// Packs the root file system of most containers, and returns the path of the archive, in `dir`.
pub(crate) fn busybox_tar(dir: &Path) -> Result<String> {
    let tar = dir.join("bb.tar");
    let packed = Command::new("tar")
        .arg("-C")
        .arg(shared_rootfs())
        .arg("-cf")
        .arg(&tar)
        .arg(".")
        .status()?;
    ensure!(packed.success(), "tar");
    Ok(tar.to_str().context("a path in UTF-8")?.into())
}

/// podman, with its own storage and an image called `bb`.
pub(crate) struct Podman {
    pub(crate) dir: PathBuf,
}

impl Podman {
    pub(crate) fn new() -> Result<Self> {
        let podman = Self {
            dir: scratch("podman")?,
        };
        let tar = busybox_tar(&podman.dir)?;
        podman.ok(&["import", "--quiet", &tar, "bb"])?;
        Ok(podman)
    }

    pub(crate) fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new("podman");
        command.arg("--root").arg(self.dir.join("root"));
        command.arg("--runroot").arg(self.dir.join("run"));
        command.args(["--cgroup-manager", "cgroupfs", "--events-backend", "file"]);
        // By path: a name is found on PATH only if it is in containers.conf.
        command.arg("--runtime").arg(runtime());
        command.args(words).stdin(Stdio::null());
        command
    }

    pub(crate) fn call(&self, words: &[&str]) -> Result<Output> {
        self.command(words)
            .output()
            .context("podman is not installed")
    }

    pub(crate) fn ok(&self, words: &[&str]) -> Result<String> {
        stdout(self.call(words)?).with_context(|| format!("podman {words:?}"))
    }

    fn inspect(&self, name: &str) -> Result<Value> {
        let text = self.ok(&["inspect", "--format", "{{json .State}}", name])?;
        Ok(serde_json::from_str(&text)?)
    }
}

/// Path of `koya-runtime`.
pub(crate) fn runtime() -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|dir| dir.join("koya-runtime"));
    found
        .into_iter()
        .find(|program| program.exists())
        .unwrap_or_default()
}

/// Output and status of a command on a terminal of 33 rows and 99 columns.
fn on_terminal(command: &Command) -> Result<(Option<i32>, String)> {
    let words: Vec<_> = std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| format!("'{}'", word.to_string_lossy()))
        .collect();
    let script = format!("stty rows 33 cols 99; {}", words.join(" "));
    let output = Command::new("script")
        .args(["--quiet", "--return", "--command", &script, "/dev/null"])
        .env("TERM", "xterm")
        .stdin(Stdio::null())
        .output()
        .context("script(1) is not installed")?;
    let said = String::from_utf8_lossy(&output.stdout).replace("\r\n", "\n");
    Ok((output.status.code(), said))
}

fn podman_runs_containers_in_the_foreground() -> Result<()> {
    let podman = Podman::new()?;
    let script = "echo out; echo err >&2; cat /proc/sys/net/ipv4/ping_group_range; exit 7";
    let output = podman.call(&["run", "--rm", "--network", "none", "bb", "sh", "-c", script])?;
    let said = (
        output.status.code(),
        String::from_utf8_lossy(&output.stdout).into_owned(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    );
    ensure!(
        said == (Some(7), "out\n0\t0\n".into(), "err\n".into()),
        "{said:?}"
    );
    let words = ["run", "-it", "--rm", "--network", "none", "bb", "sh", "-c"];
    let mut run = podman.command(&words);
    run.arg("tty; stty size; exit 4");
    let (status, said) = on_terminal(&run)?;
    ensure!(status == Some(4), "{status:?}: {said}");
    ensure!(said.contains("/dev/pts/0\n33 99\n"), "{said:?}");

    ip(&["netns", "add", "podman"])?;
    let veth = "link add inside netns podman type veth peer name podman0";
    ip(&veth.split(' ').collect::<Vec<_>>())?;
    ip(&[
        "-n",
        "podman",
        "address",
        "add",
        "10.99.0.2/24",
        "dev",
        "inside",
    ])?;
    ip(&["-n", "podman", "link", "set", "inside", "up"])?;
    let network = "--network=ns:/run/netns/podman";
    let said = podman.ok(&[
        "run", "--rm", network, "bb", "ip", "address", "show", "inside",
    ])?;
    ensure!(said.contains("10.99.0.2/24"), "{said}");
    // With its own network namespace the machine is created at `start`, but podman takes the status from `create`.
    for (program, status) in [("no-such-program", 127), ("/etc", 126), ("/none", 127)] {
        let output = podman.call(&["run", "--rm", "--network", "none", "bb", program])?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.code() == Some(status) && said.contains(&format!("{program}: ")),
            "{output:?}"
        );
    }
    let left = podman.ok(&["ps", "--all", "--quiet"])?;
    ensure!(left.is_empty(), "left: {left}");
    Ok(())
}

fn podman_keeps_containers_in_the_background() -> Result<()> {
    let podman = Podman::new()?;
    let script = "trap 'exit 3' TERM; echo begun; while :; do sleep 1; done";
    let words = [
        "run",
        "-d",
        "--name",
        "d",
        "--network",
        "none",
        "bb",
        "sh",
        "-c",
        script,
    ];
    let id = podman.ok(&words)?;
    until("its output", || {
        Ok((podman.ok(&["logs", "d"])? == "begun").then_some(()))
    })?;
    let state = podman.inspect("d")?;
    ensure!(state["Status"] == "running", "{state}");
    let status = std::fs::read_to_string(format!("/proc/{}/comm", state["Pid"]))?;
    ensure!(status.trim() == "koya-runtime", "{status}");

    let output = podman.call(&["exec", "d", "sh", "-c", "echo in it; exit 5"])?;
    ensure!(output.status.code() == Some(5), "{output:?}");
    ensure!(output.stdout == b"in it\n", "{output:?}");
    files_are_copied(&podman, "d")?;
    // Its process on the host.
    let top = podman.ok(&["top", "d", "pid,comm"])?;
    let names: Vec<_> = top.split_whitespace().skip(3).step_by(2).collect();
    ensure!(names == ["koya-runtime"], "{top}");
    podman.ok(&["pause", "d"])?;
    ensure!(podman.inspect("d")?["Status"] == "paused", "not paused");
    podman.ok(&["unpause", "d"])?;

    podman.ok(&["stop", "--time", "60", "d"])?;
    let state = podman.inspect("d")?;
    ensure!(
        state["Status"] == "exited" && state["ExitCode"] == 3,
        "{state}"
    );
    podman.ok(&["start", "d"])?;
    podman.ok(&["kill", "d"])?;
    let status = podman.ok(&["wait", "d"])?;
    ensure!(status == "137", "{status}");
    podman.ok(&["rm", "d"])?;
    let state = Path::new("/run/koya-runtime").join(id);
    ensure!(!state.exists(), "its state is left");
    Ok(())
}

/// Copies files to and from a running container: podman enters the mount namespace of its process on the host for that.
fn files_are_copied(podman: &Podman, name: &str) -> Result<()> {
    const NEW: &str = "/etc/koya-copied-by-podman";
    let [there, back] = ["there", "back"].map(|file| podman.dir.join(file).display().to_string());
    std::fs::write(&there, "from the host")?;
    podman.ok(&["cp", &there, &format!("{name}:{NEW}")])?;
    ensure!(!Path::new(NEW).exists(), "it was copied to the host itself");
    let said = podman.ok(&["exec", name, "cat", NEW])?;
    ensure!(said == "from the host", "{said}");
    podman.ok(&["exec", name, "sh", "-c", &format!("echo back > {NEW}")])?;
    podman.ok(&["cp", &format!("{name}:{NEW}"), &back])?;
    let said = std::fs::read_to_string(&back)?;
    ensure!(said == "back\n", "{said}");
    // The guest's memory is no place for a copy.
    let output = podman.call(&["cp", &there, &format!("{name}:/dev/shm/new")])?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        !output.status.success() && said.contains("read-only"),
        "{output:?}"
    );
    Ok(())
}

/// Recreates the control groups of pods, as created by podman without systemd. podman 4.3 denies all devices in them,
/// even /dev/null, so no runtime can start anything there; the rules are removed with the group.
pub(crate) fn allow_devices_in_pods() -> Result<()> {
    for pod in std::fs::read_dir("/sys/fs/cgroup/libpod_parent")? {
        let group = pod?.path();
        // One with processes is another test's.
        if group.is_dir() && std::fs::remove_dir(&group).is_ok() {
            std::fs::create_dir(&group)?;
        }
    }
    Ok(())
}

fn a_podman_pod_is_one_virtual_machine() -> Result<()> {
    let podman = Podman::new()?;
    let create = ["pod", "create", "--name", "p", "--hostname", "pod"];
    let infra = ["--network", "none", "--infra-image", "bb"];
    let command = ["--infra-command", "sleep 1000"];
    podman.ok(&[&create[..], &infra, &command].concat())?;
    allow_devices_in_pods()?;
    let boot = "/proc/sys/kernel/random/boot_id";
    let serve = "echo from a | nc -l -p 77; exec sleep 1000";
    let first = ["run", "-d", "--pod", "p", "--name", "a", "bb", "sh", "-c"];
    podman.ok(&[&first[..], &[serve]].concat())?;

    let same = format!("cat {boot}; readlink /proc/self/ns/ipc; readlink /proc/self/ns/uts");
    let script =
        format!("until nc 127.0.0.1 77; do sleep 1; done; hostname; {same}; echo $$; exit 9");
    let second = ["run", "--rm", "--pod", "p", "bb", "sh", "-c", &script];
    let output = podman.call(&second)?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.code() == Some(9), "{output:?}");
    let of_the_first = podman.ok(&["exec", "a", "sh", "-c", &same])?;
    // The container has its own pid namespace.
    let wanted = format!("from a\npod\n{of_the_first}\n1\n");
    ensure!(said == wanted, "{said:?} and not {wanted:?}");

    // It has its own process on the host, in the pod's network namespace.
    let infra = podman.ok(&["ps", "--filter", "name=infra", "--quiet"])?;
    let pids = [
        &podman.inspect("a")?["Pid"],
        &podman.inspect(&infra)?["Pid"],
    ]
    .map(Value::to_string);
    ensure!(pids[0] != pids[1], "{pids:?}");
    let network = |pid: &String| std::fs::read_link(format!("/proc/{pid}/ns/net"));
    ensure!(network(&pids[0])? == network(&pids[1])?, "another network");

    files_are_copied(&podman, "a")?;
    let words = ["run", "--rm", "-t", "--pod", "p", "bb", "tty"];
    let (status, said) = on_terminal(&podman.command(&words))?;
    ensure!(
        status == Some(0) && said.contains("/dev/pts/0"),
        "{status:?} {said}"
    );
    podman.ok(&["kill", "a"])?;
    let status = podman.ok(&["wait", "a"])?;
    ensure!(status == "137", "{status}");
    ensure!(
        podman.inspect(&infra)?["Status"] == "running",
        "the pod ended"
    );
    podman.ok(&["pod", "rm", "--force", "--time", "5", "p"])?;
    let left = podman.ok(&["ps", "--all", "--quiet"])?;
    ensure!(left.is_empty(), "left: {left}");
    Ok(())
}
