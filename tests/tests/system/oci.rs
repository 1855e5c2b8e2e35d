//! `koya-runtime`: the command line of OCI runtimes, compared with runc on the same bundles.

use crate::tool::{busybox, feed, kill, scratch, stdout, until};
use anyhow::{Context, Result, ensure};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use serde_json::{Value, json};
use std::fs;
use std::io::{IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

crate::trials!(
    life_is_as_runcs,
    streams_and_statuses,
    execs_have_a_process_of_their_own,
    a_killed_sandbox_is_a_stopped_container,
    a_control_group_that_is_not_free_is_refused,
    hooks_run_on_the_host,
    what_uses_it_is_asked_and_changed,
    a_terminal_is_sent_to_the_console_socket,
    an_exec_may_join_a_control_group_of_the_containers,
);

/// A runtime with its own `--root`.
pub(crate) struct Runtime {
    program: &'static str,
    pub(crate) root: PathBuf,
}

impl Runtime {
    pub(crate) fn new(program: &'static str) -> Result<Self> {
        let root = scratch("oci-root")?;
        Ok(Self { program, root })
    }

    pub(crate) fn koya() -> Result<Self> {
        Self::new("koya-runtime")
    }

    pub(crate) fn is_koya(&self) -> bool {
        self.program == "koya-runtime"
    }

    pub(crate) fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(self.program);
        command.arg("--root").arg(&self.root).args(words);
        command.stdin(Stdio::null());
        command
    }

    /// With standard output and error in files, since remaining processes keep them open.
    pub(crate) fn call(&self, words: &[&str]) -> Result<Output> {
        let dir = scratch("oci-out")?;
        let (out, err) = (dir.join("out"), dir.join("err"));
        let mut command = self.command(words);
        command.stdout(fs::File::create(&out)?);
        let status = command.stderr(fs::File::create(&err)?).status();
        Ok(Output {
            status: status.with_context(|| self.program.to_owned())?,
            stdout: fs::read(out)?,
            stderr: fs::read(err)?,
        })
    }

    pub(crate) fn ok(&self, words: &[&str]) -> Result<String> {
        stdout(self.call(words)?).with_context(|| format!("{words:?}"))
    }

    fn state(&self, id: &str) -> Result<Value> {
        Ok(serde_json::from_str(&self.ok(&["state", id])?)?)
    }

    /// `Some` if the container has this status.
    pub(crate) fn is(&self, id: &str, status: &str) -> Result<Option<()>> {
        Ok((self.state(id)?["status"] == status).then_some(()))
    }
}

/// A bundle that runs a shell script, with a changed configuration.
pub(crate) fn bundle(script: &str, change: impl FnOnce(&mut Value)) -> Result<PathBuf> {
    let dir = scratch("oci-bundle")?;
    busybox(&dir.join("rootfs"))?;
    let made = Command::new("koya-runtime")
        .args(["spec", "--bundle"])
        .arg(&dir)
        .output()?;
    stdout(made)?;
    let file = dir.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&file)?)?;
    // Debian's crun knows no later one.
    config["ociVersion"] = "1.0.2".into();
    config["process"]["terminal"] = false.into();
    config["process"]["args"] = json!(["/bin/sh", "-c", script]);
    change(&mut config);
    fs::write(file, config.to_string())?;
    Ok(dir)
}

/// The options of the mounts at a destination.
pub(crate) fn mount_options<'a>(
    config: &'a mut Value,
    at: &'a str,
) -> impl Iterator<Item = &'a mut Vec<Value>> {
    let mounts = config["mounts"].as_array_mut().into_iter().flatten();
    let there = mounts.filter(move |mount| mount["destination"] == at);
    there.filter_map(|mount| mount["options"].as_array_mut())
}

pub(crate) fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path in UTF-8")
}

/// Exit statuses and states over a container's life cycle.
fn life(runtime: &Runtime, bundle: &Path) -> Result<Vec<String>> {
    let bundle = text(bundle)?;
    let mut told = Vec::new();
    let mut step = |words: &[&str]| -> Result<()> {
        let output = runtime.call(words)?;
        let code = output.status.code().context("a status")?;
        told.push(format!("{words:?}: {code}"));
        if words == ["kill", "c", "KILL"] && code == 0 {
            until("the end", || runtime.is("c", "stopped"))?;
        }
        if let Ok(state) = runtime.state("c") {
            ensure!(state["bundle"] == bundle, "{state}");
            ensure!(state["id"] == "c", "{state}");
            let rootfs = match runtime.program {
                // As in the configuration.
                "crun" => "rootfs".to_owned(),
                _ => format!("{bundle}/rootfs"),
            };
            ensure!(state["rootfs"] == rootfs, "{state}");
            let is_stopped = state["status"] == "stopped";
            ensure!((state["pid"] == 0) == is_stopped, "{state}");
            told.push(format!("is {}", state["status"]));
        }
        Ok(())
    };
    for words in [
        &["state", "c"][..],
        &["start", "c"],
        &["kill", "c", "KILL"],
        &["delete", "c"],
        &["delete", "--force", "c"],
        &["create", "--bundle", bundle, "a/b"],
        &["create", "--bundle", "/nowhere", "c"],
        &["create", "--bundle", bundle, "c"],
        &["create", "--bundle", bundle, "c"],
        &["exec", "absent", "true"],
        &["exec", "c", "true"],
        &["start", "c"],
        &["start", "c"],
        &["delete", "c"],
        &["kill", "c", "NOTHING"],
        &["pause", "c"],
        &["resume", "c"],
        &["resume", "c"],
        &["kill", "c", "KILL"],
        &["kill", "c", "KILL"],
        &["start", "c"],
        &["exec", "c", "true"],
        &["pause", "c"],
        &["delete", "c"],
        &["delete", "c"],
        &["create", "--bundle", bundle, "c"],
        &["delete", "--force", "c"],
    ] {
        step(words).with_context(|| format!("{}: {words:?}", runtime.program))?;
    }
    Ok(told)
}

/// Exit status and resulting state of each command in each state.
fn life_is_as_runcs() -> Result<()> {
    let bundle = bundle("exec sleep 1000", |_| ())?;
    let koya = life(&Runtime::koya()?, &bundle)?;
    let runc = life(&Runtime::new("runc")?, &bundle)?;
    for (koya, runc) in koya.iter().zip(&runc) {
        ensure!(koya == runc, "koya-runtime {koya}, runc {runc}");
    }
    ensure!(koya.len() == runc.len(), "{koya:?}\n{runc:?}");
    let crun = life(&Runtime::new("crun")?, &bundle)?;
    ensure!(koya.len() == crun.len(), "{koya:?}\n{crun:?}");
    let differences: Vec<_> = koya.iter().zip(&crun).filter(|(k, c)| k != c).collect();
    // Requests accepted by crun but not by runc, and crun's status of a failed exec.
    let known = [
        r#"["exec", "absent", "true"]: 1"#,
        r#"["kill", "c", "NOTHING"]: 0"#,
        r#"["resume", "c"]: 0"#,
        r#"["exec", "c", "true"]: 1"#,
    ];
    let crun: Vec<_> = differences.iter().map(|(_, crun)| crun.as_str()).collect();
    ensure!(crun == known, "{differences:?}");
    Ok(())
}

fn streams_and_statuses() -> Result<()> {
    let runtime = Runtime::koya()?;
    let short = bundle("cat; echo err >&2; exit 7", |_| ())?;
    let run = runtime.command(&["run", "--bundle", text(&short)?, "streams-r"]);
    let output = feed(run, b"in")?;
    let said = (
        output.status.code(),
        String::from_utf8_lossy(&output.stdout).into_owned(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    );
    ensure!(said == (Some(7), "in".into(), "err\n".into()), "{said:?}");

    let tty = bundle("echo one; echo two >&2", |config| {
        config["process"]["terminal"] = true.into();
    })?;
    let said = runtime.ok(&["run", "--bundle", text(&tty)?, "streams-t"])?;
    ensure!(said == "one\ntwo", "lines of a terminal: {said:?}");

    let long = bundle("exec sleep 1000", |_| ())?;
    let mut run = runtime.command(&["run", "--bundle", text(&long)?, "streams-k"]);
    let mut child = run.spawn()?;
    until("its start", || {
        Ok(runtime.is("streams-k", "running").unwrap_or(None))
    })?;
    runtime.ok(&["kill", "streams-k", "KILL"])?;
    ensure!(child.wait()?.code() == Some(137), "not as killed");
    for id in ["streams-r", "streams-k"] {
        let state = runtime.call(&["state", id])?;
        ensure!(state.status.code() == Some(1), "{id} is left");
    }
    ensure!(
        fs::read_dir(&runtime.root)?.next().is_none(),
        "something is left"
    );
    Ok(())
}

fn pid_in(file: &Path) -> Result<String> {
    Ok(fs::read_to_string(file)?)
}

fn execs_have_a_process_of_their_own() -> Result<()> {
    let runtime = Runtime::koya()?;
    let bundle = bundle("exec sleep 1000", |_| ())?;
    let pid_file = bundle.join("pid");
    let (directory, pid_path) = (text(&bundle)?, text(&pid_file)?);
    runtime.ok(&[
        "run",
        "-d",
        "--bundle",
        directory,
        "--pid-file",
        pid_path,
        "e",
    ])?;
    let pid = pid_in(&pid_file)?;
    let stated = runtime.state("e")?["pid"].to_string();
    ensure!(stated == pid, "{stated} and not {pid}");
    let own = fs::read_link("/proc/self/ns/net")?;
    ensure!(
        fs::read_link(format!("/proc/{pid}/ns/net"))? != own,
        "the host's network"
    );
    ensure!(
        runtime.ok(&["ps", "--format", "json", "e"])? == format!("[{pid}]"),
        "ps"
    );

    let output = runtime.call(&["exec", "--env", "A=b", "e", "sh", "-c", "echo $A; exit 5"])?;
    ensure!(output.status.code() == Some(5), "{output:?}");
    ensure!(output.stdout == b"b\n", "{output:?}");

    let exec_file = bundle.join("exec-pid");
    let process =
        json!({"args": ["sleep", "1000"], "cwd": "/", "user": {"uid": 0, "gid": 0}, "env": []});
    fs::write(bundle.join("process"), process.to_string())?;
    let (file, process) = (text(&exec_file)?, bundle.join("process"));
    let again_file = bundle.join("exec-again");
    let exec = [
        "exec",
        "--process",
        text(&process)?,
        "--detach",
        "--pid-file",
        file,
        "e",
    ];
    runtime.ok(&exec)?;
    let stub = PathBuf::from(format!("/proc/{}", pid_in(&exec_file)?));
    ensure!(stub.exists(), "no process stands for it");
    let sleeps = || runtime.ok(&["exec", "e", "sh", "-c", "ps | grep -c '[s]leep 1000'"]);
    ensure!(sleeps()? == "2", "the container's and the added one");
    // Clients signal an added process by its pid.
    let mut again = exec.to_vec();
    again[5] = text(&again_file)?;
    for signal in ["-KILL", "-TERM"] {
        runtime.ok(&again)?;
        let pid = pid_in(&again_file)?;
        ensure!(sleeps()? == "3", "before {signal}");
        Command::new("kill").args([signal, &pid]).status()?;
        until("the end of a process whose stub was killed", || {
            Ok((sleeps()? == "2").then_some(()))
        })?;
    }
    runtime.ok(&["kill", "e", "KILL"])?;
    until("the exec process's end", || {
        let status = fs::read_to_string(stub.join("stat"));
        Ok(status
            .map_or(true, |text| text.contains(") Z "))
            .then_some(()))
    })?;
    runtime.ok(&["delete", "--force", "e"])?;
    Ok(())
}

/// In a frozen group the command would wait forever.
fn a_control_group_that_is_not_free_is_refused() -> Result<()> {
    let runtime = Runtime::koya()?;
    let bundle = bundle("true", |config| {
        config["linux"]["cgroupsPath"] = "/koya-oci-used".into();
    })?;
    let group = Path::new("/sys/fs/cgroup/koya-oci-used");
    let refused = || -> Result<String> {
        let run = runtime.call(&["run", "--bundle", text(&bundle)?, "u"])?;
        ensure!(!run.status.success());
        Ok(String::from_utf8_lossy(&run.stderr).into_owned())
    };
    fs::create_dir(group)?;
    fs::write(group.join("cgroup.freeze"), "1")?;
    let said = refused()?;
    ensure!(said.contains("cgroup unexpectedly frozen"), "{said}");
    fs::write(group.join("cgroup.freeze"), "0")?;
    let mut other = Command::new("sleep").arg("1000").spawn()?;
    fs::write(group.join("cgroup.procs"), other.id().to_string())?;
    let said = refused()?;
    other.kill()?;
    other.wait()?;
    ensure!(said.contains("cgroup is not empty"), "{said}");
    until("its end", || Ok(fs::remove_dir(group).ok()))?;
    runtime.ok(&["run", "--bundle", text(&bundle)?, "u"])?;
    Ok(())
}

fn a_killed_sandbox_is_a_stopped_container() -> Result<()> {
    let runtime = Runtime::koya()?;
    let bundle = bundle("exec sleep 1000", |config| {
        config["linux"]["cgroupsPath"] = "/koya-oci-killed".into();
    })?;
    let directory = text(&bundle)?;
    runtime.ok(&["run", "-d", "--bundle", directory, "k"])?;
    let group = Path::new("/sys/fs/cgroup/koya-oci-killed");
    let pid = runtime.state("k")?["pid"].to_string();
    let members = fs::read_to_string(group.join("cgroup.procs"))?;
    ensure!(members.trim() == pid, "in its group: {members}");
    kill(&pid)?;
    until("its end", || runtime.is("k", "stopped"))?;
    let again = runtime.call(&["create", "--bundle", directory, "k"])?;
    let said = String::from_utf8_lossy(&again.stderr).into_owned();
    ensure!(
        said.contains("container with given ID already exists"),
        "{said}"
    );
    runtime.ok(&["delete", "k"])?;
    ensure!(!group.exists(), "its control group is left");
    ensure!(
        fs::read_dir(&runtime.root)?.next().is_none(),
        "something is left"
    );
    Ok(())
}

fn hooks_run_on_the_host() -> Result<()> {
    let runtime = Runtime::koya()?;
    let log = scratch("oci-hooks")?.join("log");
    let hook = |name: &str| {
        let script = format!("echo {name} $(cat) >> {}", log.display());
        json!([{"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/bin:/bin"]}])
    };
    let names = [
        "prestart",
        "createRuntime",
        "createContainer",
        "poststart",
        "poststop",
    ];
    let good = bundle("true", |config| {
        for name in names {
            config["hooks"][name] = hook(name);
        }
    })?;
    runtime.ok(&["run", "--bundle", text(&good)?, "h"])?;
    let said = fs::read_to_string(&log)?;
    let order: Vec<&str> = said
        .lines()
        .filter_map(|line| line.split(' ').next())
        .collect();
    ensure!(order == names, "{said}");
    ensure!(
        said.lines().all(|line| line.contains("\"id\":\"h\"")),
        "{said}"
    );
    let bad = bundle("true", |config| {
        config["hooks"]["createRuntime"] = json!([{"path": "/bin/false"}]);
        config["hooks"]["poststop"] = hook("poststop");
    })?;
    let failed = runtime.call(&["create", "--bundle", text(&bad)?, "b"])?;
    let said = String::from_utf8_lossy(&failed.stderr).into_owned();
    ensure!(
        failed.status.code() == Some(1) && said.contains("createRuntime hook #0"),
        "{said}"
    );
    // Those of the first container, and of this one.
    let ran = fs::read_to_string(&log)?;
    let of_end = ran.lines().filter(|line| line.starts_with("poststop"));
    ensure!(of_end.count() == 2, "{ran}");
    let guests = bundle("cat /dev/hooked", |config| {
        let script = "echo in the guest > /dev/hooked";
        config["hooks"]["startContainer"] =
            json!([{"path": "/bin/sh", "args": ["sh", "-c", script]}]);
    })?;
    let said = runtime.ok(&["run", "--bundle", text(&guests)?, "g"])?;
    ensure!(said.trim() == "in the guest", "{said}");
    let bad = bundle("echo it runs", |config| {
        config["hooks"]["startContainer"] = json!([{"path": "/bin/true"}, {"path": "/bin/false"}]);
    })?;
    let failed = runtime.call(&["run", "--bundle", text(&bad)?, "f"])?;
    let said = String::from_utf8_lossy(&failed.stderr).into_owned();
    ensure!(
        failed.status.code() == Some(1) && said.contains("startContainer hook #1: /bin/false"),
        "{failed:?}"
    );
    ensure!(failed.stdout.is_empty(), "{failed:?}");
    // The specification has a container deleted whose start was followed by such a failure.
    fs::remove_file(&log)?;
    let late = bundle("exec sleep 1000", |config| {
        config["hooks"]["poststart"] = json!([{"path": "/bin/false"}]);
        config["hooks"]["poststop"] = hook("poststop");
    })?;
    runtime.ok(&["create", "--bundle", text(&late)?, "l"])?;
    let failed = runtime.call(&["start", "l"])?;
    let said = String::from_utf8_lossy(&failed.stderr).into_owned();
    ensure!(
        failed.status.code() == Some(1) && said.contains("poststart hook #0"),
        "{said}"
    );
    ensure!(fs::read_to_string(&log)?.starts_with("poststop"));
    ensure!(
        fs::read_dir(&runtime.root)?.next().is_none(),
        "something is left"
    );
    Ok(())
}

fn what_uses_it_is_asked_and_changed() -> Result<()> {
    let runtime = Runtime::koya()?;
    let bundle = bundle("exec sleep 1000", |_| ())?;
    runtime.ok(&["run", "-d", "--bundle", text(&bundle)?, "u"])?;
    let stats = || -> Result<Value> {
        Ok(serde_json::from_str(
            &runtime.ok(&["events", "--stats", "u"])?,
        )?)
    };
    let before = stats()?;
    ensure!(
        before["type"] == "stats" && before["data"]["pids"]["current"] == 1,
        "{before}"
    );
    runtime.ok(&["update", "--pids-limit", "77", "u"])?;
    let after = stats()?;
    ensure!(after["data"]["pids"]["limit"] == 77, "{after}");
    let listed: Value = serde_json::from_str(&runtime.ok(&["list", "--format", "json"])?)?;
    ensure!(
        listed[0]["id"] == "u" && listed[0]["status"] == "running",
        "{listed}"
    );
    runtime.ok(&["delete", "--force", "u"])?;
    ensure!(
        runtime.ok(&["list", "--format", "json"])? == "null",
        "it is left"
    );
    Ok(())
}

/// Receives the descriptor sent by a runtime: a terminal, or a process.
pub(crate) fn receive_descriptor(listener: &UnixListener) -> Result<fs::File> {
    let (stream, _) = listener.accept()?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut name = [0; 64];
    recvmsg(
        &stream,
        &mut [IoSliceMut::new(&mut name)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    let fds = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    Ok(fds.context("no descriptor came")?.into())
}

/// Reads a terminal until its last user has closed it.
fn rest_of(mut terminal: fs::File) -> String {
    let mut bytes = Vec::new();
    // Its end is reported as an error.
    terminal.read_to_end(&mut bytes).ok();
    String::from_utf8_lossy(&bytes).replace("\r\n", "\n")
}

fn a_terminal_is_sent_to_the_console_socket() -> Result<()> {
    let runtime = Runtime::koya()?;
    let script = "stty size; read line; echo got $line; exec sleep 1000";
    let bundle = bundle(script, |config| {
        config["process"]["terminal"] = true.into();
        config["process"]["consoleSize"] = json!({"height": 33, "width": 99});
    })?;
    let directory = text(&bundle)?;
    let refused = runtime.call(&["create", "--bundle", directory, "t"])?;
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(said.contains("without setting console socket"), "{said}");

    let socket = bundle.join("console");
    let listener = UnixListener::bind(&socket)?;
    let console = text(&socket)?;
    runtime.ok(&[
        "create",
        "--bundle",
        directory,
        "--console-socket",
        console,
        "t",
    ])?;
    let mut terminal = receive_descriptor(&listener)?;
    runtime.ok(&["start", "t"])?;
    terminal.write_all(b"words\n")?;
    // Without a user, as written by some clients.
    let process = json!({"args": ["stty", "size"], "cwd": "/", "env": ["PATH=/bin"],
        "terminal": true, "consoleSize": {"height": 7, "width": 70}});
    let file = bundle.join("process");
    fs::write(&file, process.to_string())?;
    let words = [
        "exec",
        "--process",
        text(&file)?,
        "--detach",
        "--console-socket",
        console,
        "t",
    ];
    runtime.ok(&words)?;
    let said = rest_of(receive_descriptor(&listener)?);
    ensure!(said == "7 70\n", "{said:?}");
    let reader = std::thread::spawn(move || rest_of(terminal));
    runtime.ok(&["exec", "t", "sleep", "1"])?;
    runtime.ok(&["delete", "--force", "t"])?;
    let said = reader.join().ok().context("the reader panicked")?;
    ensure!(
        said.contains("33 99\n") && said.contains("got words\n"),
        "{said:?}"
    );
    Ok(())
}

fn an_exec_may_join_a_control_group_of_the_containers() -> Result<()> {
    let runtime = Runtime::koya()?;
    let bundle = bundle("exec sleep 1000", |config| {
        for options in mount_options(config, "/sys/fs/cgroup") {
            options.retain(|option| option != "ro");
        }
    })?;
    runtime.ok(&["run", "-d", "--bundle", text(&bundle)?, "g"])?;
    runtime.ok(&["exec", "g", "mkdir", "/sys/fs/cgroup/sub"])?;
    let group = |words: &[&str]| {
        let whole = [&["exec"], words, &["g", "cat", "/proc/self/cgroup"]].concat();
        runtime.call(&whole)
    };
    for (words, expected) in [
        (&[][..], "0::/"),
        (&["--cgroup", "/"], "0::/"),
        (&["--cgroup", "sub"], "0::/sub"),
    ] {
        let said = stdout(group(words)?)?;
        ensure!(said == expected, "{words:?}: {said}");
    }
    for (path, expected) in [
        ("none", "none/cgroup.procs: No such file"),
        ("../..", "bad sub cgroup path"),
        ("cpu:sub", "have no groups of their own"),
    ] {
        let refused = group(&["--cgroup", path])?;
        let said = String::from_utf8_lossy(&refused.stderr);
        ensure!(
            refused.status.code() == Some(255) && said.contains(expected),
            "{path}: {said}"
        );
    }
    runtime.ok(&["delete", "--force", "g"])?;
    Ok(())
}
