//! podman without root: containers of a user with subordinate IDs (`/etc/subuid`), and networks by slirp4netns.

use crate::podman::{busybox_tar, runtime};
use crate::tool::{scratch, stdout, until};
use anyhow::{Context, Result, ensure};
use std::fs;
use std::os::unix::fs::{MetadataExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

crate::trials!(
    users_run_podmans_containers,
    users_have_pods_volumes_and_builds,
);

/// The user's ID, the first of its subordinate IDs, and its name.
const USER: u32 = 7100;
const FIRST: u32 = 900_000;
const NAME: &str = "koya-test";

/// podman of a user created by the test, with an image called `bb`.
struct Podman {
    dir: PathBuf,
}

impl Podman {
    fn new() -> Result<Self> {
        let podman = Self {
            dir: scratch("rootless")?,
        };
        let dir = &podman.dir;
        let id = USER;
        // Mounted over the files in /etc that podman and newuidmap(1) read, for their processes only.
        let line = |file: &str, line: String| -> Result<()> {
            let there = fs::read_to_string(Path::new("/etc").join(file)).unwrap_or_default();
            Ok(fs::write(dir.join(file), format!("{there}{line}\n"))?)
        };
        let home = dir.join("home");
        line(
            "passwd",
            format!("{NAME}:x:{id}:{id}::{}:/bin/sh", home.display()),
        )?;
        line("group", format!("{NAME}:x:{id}:"))?;
        line("subuid", format!("{NAME}:{FIRST}:65536"))?;
        line("subgid", format!("{NAME}:{FIRST}:65536"))?;
        for file in ["/etc/subuid", "/etc/subgid"] {
            fs::File::options().append(true).create(true).open(file)?;
        }
        for own in ["home", "run", "tmp", "volume"] {
            fs::create_dir(dir.join(own))?;
            chown(dir.join(own), Some(id), Some(id))?;
        }
        let tar = busybox_tar(dir)?;
        podman.ok(&["import", "--quiet", &tar, "bb"])?;
        Ok(podman)
    }

    fn command(&self, words: &[&str]) -> Command {
        let script = format!(
            "for file in passwd group subuid subgid; do mount --bind $0/$file /etc/$file || exit; done
             exec setpriv --reuid {USER} --regid {USER} --init-groups env HOME=$0/home USER={NAME} \
             XDG_RUNTIME_DIR=$0/run TMPDIR=$0/tmp \
             podman --cgroup-manager cgroupfs --events-backend file --runtime \"$@\""
        );
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", &script]);
        command.arg(&self.dir).arg(runtime()).args(words);
        command.current_dir("/").stdin(Stdio::null());
        command
    }

    fn call(&self, words: &[&str]) -> Result<Output> {
        let output = self.command(words).output();
        output.context("unshare(1) is not installed")
    }

    fn ok(&self, words: &[&str]) -> Result<String> {
        stdout(self.call(words)?).with_context(|| format!("podman {words:?}"))
    }

    /// A directory of the user as a volume.
    fn volume(&self) -> String {
        format!("{}:/v", self.dir.join("volume").display())
    }

    fn nothing_is_left(&self) -> Result<()> {
        let left = self.ok(&["ps", "--all", "--quiet"])?;
        ensure!(left.is_empty(), "left: {left}");
        let state = self.dir.join("run/koya-runtime");
        let left = fs::read_dir(&state).map_or(0, Iterator::count);
        ensure!(left == 0, "{} is not empty", state.display());
        Ok(())
    }
}

impl Drop for Podman {
    fn drop(&mut self) {
        self.call(&["rm", "--all", "--force", "--time", "0"]).ok();
        // The process that keeps the user's namespaces.
        if let Ok(pid) = fs::read_to_string(self.dir.join("run/libpod/tmp/pause.pid")) {
            Command::new("kill").arg(pid.trim()).status().ok();
        }
    }
}

/// With a network and a published port, and with the user's own ID in the container.
fn users_run_podmans_containers() -> Result<()> {
    let podman = Podman::new()?;
    let script = "ip -4 address show tap0 | grep -o 'inet [0-9.]*'; ip route
        echo pong > /tmp/index.html; exec httpd -f -p 8080 -h /tmp";
    let words = ["run", "-d", "--name", "web", "-p", "18090:8080", "bb"];
    podman.ok(&[&words[..], &["sh", "-c", script]].concat())?;
    until("its port to answer", || {
        let page = crate::docker::page("127.0.0.1:18090");
        Ok((page.unwrap_or_default().ends_with("pong\n")).then_some(()))
    })
    .with_context(|| podman.ok(&["logs", "web"]).unwrap_or_default())?;
    let said = podman.ok(&["logs", "web"])?;
    let network = said.contains("inet 10.0.2.100") && said.contains("default via 10.0.2.2");
    ensure!(network, "{said}");
    let output = podman.call(&["exec", "web", "sh", "-c", "echo in it; exit 5"])?;
    ensure!(output.status.code() == Some(5), "{output:?}");
    ensure!(output.stdout == b"in it\n", "{output:?}");
    let copied = podman.dir.join("tmp/copied");
    podman.ok(&["cp", "web:/tmp/index.html", &copied.display().to_string()])?;
    let said = fs::read_to_string(copied)?;
    ensure!(said == "pong\n", "{said}");
    podman.ok(&["rm", "--force", "--time", "0", "web"])?;

    let script = "id -u; cat /proc/self/uid_map; echo new > /v/own; ls -ln /v/own; exit 7";
    let words = ["run", "--rm", "--network", "none", "--userns", "keep-id"];
    let volume = ["-v", &podman.volume(), "bb", "sh", "-c", script];
    let output = podman.call(&[&words[..], &volume].concat())?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.code() == Some(7), "{output:?}");
    let own = USER.to_string();
    let mut lines = said.lines();
    ensure!(lines.next() == Some(&own), "{said}");
    let maps: Vec<_> = lines.by_ref().take(3).collect();
    let maps: Vec<Vec<_>> = maps
        .iter()
        .map(|l| l.split_whitespace().collect())
        .collect();
    let after = (USER + 1).to_string();
    ensure!(maps[0] == ["0", "1", &own], "{said}");
    ensure!(maps[1] == [&*own, "0", "1"], "{said}");
    ensure!(maps[2][..2] == [&*after, &after], "{said}");
    let listed = lines.next().unwrap_or_default();
    ensure!(
        listed.split_whitespace().nth(2) == Some(&own),
        "the file is another's: {said}"
    );
    let file = fs::metadata(podman.dir.join("volume/own"))?;
    ensure!(file.uid() == USER, "on the host it is {}", file.uid());
    podman.nothing_is_left()
}

/// Pods, volumes with files of other users of the container, and steps of a build.
fn users_have_pods_volumes_and_builds() -> Result<()> {
    let podman = Podman::new()?;
    let script = "echo new > /v/other && chown 33:34 /v/other; echo a > /named/a; ls -ln /v /named";
    let volume = podman.volume();
    let words = ["run", "--rm", "--network", "none", "-v", &volume];
    let more = ["-v", "named:/named", "bb", "sh", "-c", script];
    podman.ok(&[&words[..], &more].concat())?;
    let file = fs::metadata(podman.dir.join("volume/other"))?;
    let owner = (file.uid(), file.gid());
    ensure!(owner == (FIRST + 32, FIRST + 33), "{owner:?}");
    // `:U` gives it to another user.
    let words = ["run", "--rm", "--network", "none", "-v", "named:/named:U"];
    let script = "echo b >> /named/a; cat /named/a; stat -c %u /named/a";
    let more = ["--user", "33", "bb", "sh", "-c", script];
    let said = podman.ok(&[&words[..], &more].concat())?;
    ensure!(said == "a\nb\n33", "{said}");

    let create = ["pod", "create", "--name", "p", "--network", "none"];
    let infra = ["--infra-image", "bb", "--infra-command", "sleep 1000"];
    podman.ok(&[&create[..], &infra].concat())?;
    let serve = "echo from a | nc -l -p 77; exec sleep 1000";
    podman.ok(&["run", "-d", "--pod", "p", "bb", "sh", "-c", serve])?;
    let ask = "until nc 127.0.0.1 77; do sleep 1; done";
    let said = podman.ok(&["run", "--rm", "--pod", "p", "bb", "sh", "-c", ask])?;
    ensure!(said == "from a", "{said}");
    podman.ok(&["pod", "rm", "--force", "--time", "0", "p"])?;

    let file = podman.dir.join("Dockerfile");
    fs::write(&file, "FROM bb\nRUN uname -r > /kernel\n")?;
    let file = file.to_str().context("a path in UTF-8")?;
    let context = podman.dir.join("volume");
    let context = context.to_str().context("a path in UTF-8")?;
    let words = ["build", "--isolation", "oci", "--network", "none"];
    podman.ok(&[&words[..], &["-t", "built", "-f", file, context]].concat())?;
    let words = ["run", "--rm", "--network", "none", "built"];
    let said = podman.ok(&[&words[..], &["cat", "/kernel"]].concat())?;
    ensure!(said.contains("-koya"), "{said}");
    podman.nothing_is_left()
}
