//! `NOTIFY_SOCKET`: containers as services of a service manager, which these tests play (sd_notify(3)).

use crate::oci::{Runtime, bundle, text};
use crate::podman::Podman;
use crate::tool::{LIMIT, scratch, until};
use anyhow::{Context, Result, ensure};
use std::fs;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

crate::trials!(
    a_service_is_ready_when_its_container_is,
    a_foreground_command_is_the_main_process,
    a_guest_that_sends_all_the_time_has_to_wait,
    a_container_runs_without_a_service_manager,
    podman_leaves_notifications_to_the_container,
);

/// The beginning of a script: `say` sends a message. busybox has logger(1), which sends datagrams to `/dev/log`: the first
/// line has a date and a name, the second one is the message.
const SAY: &str =
    "ln -s \"$NOTIFY_SOCKET\" /dev/log; say() { logger \"$(printf 'x\\n%s' \"$1\")\"; }; ";

/// Waits for another process of the container.
const WAIT: &str = "until test -e /dev/shm/go; do sleep 0.1; done; rm /dev/shm/go; ";

/// Goes on after that.
const GO: [&str; 2] = ["touch", "/dev/shm/go"];

/// The socket of a service manager.
struct Manager {
    /// As in the variable.
    name: String,
    socket: UnixDatagram,
}

impl Manager {
    fn by_path() -> Result<Self> {
        let path = scratch("notify")?.join("socket");
        let name = text(&path)?.to_owned();
        Self::new(name, UnixDatagram::bind(path)?)
    }

    /// In the abstract namespace of unix(7).
    fn by_name() -> Result<Self> {
        let name = format!("koya-notify-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name)?;
        Self::new(format!("@{name}"), UnixDatagram::bind_addr(&address)?)
    }

    fn new(name: String, socket: UnixDatagram) -> Result<Self> {
        socket.set_read_timeout(Some(LIMIT))?;
        Ok(Self { name, socket })
    }

    /// The next message. Attached descriptors are closed.
    fn next(&self) -> Result<String> {
        let mut message = [0; 8192];
        let len = self.socket.recv(&mut message).context("no message")?;
        Ok(String::from_utf8(message[..len].to_vec())?)
    }

    fn expect(&self, expected: &str) -> Result<()> {
        let message = self.next()?;
        ensure!(message == expected, "{message:?} instead of {expected:?}");
        Ok(())
    }

    fn expect_nothing(&self) -> Result<()> {
        self.socket.set_nonblocking(true)?;
        let message = self.next();
        self.socket.set_nonblocking(false)?;
        ensure!(message.is_err(), "{message:?} is left");
        Ok(())
    }

    /// `koya-runtime` as a part of a service, without streams: remaining processes keep them open.
    fn command(&self, runtime: &Runtime, words: &[&str]) -> Command {
        let mut command = runtime.command(words);
        command.env("NOTIFY_SOCKET", &self.name);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        command
    }
}

fn a_service_is_ready_when_its_container_is() -> Result<()> {
    let runtime = Runtime::koya()?;
    let script = format!(
        "{SAY} say \"$(printf 'STATUS=at %s\\nMAINPID=1\\nFDSTORE=1' $NOTIFY_SOCKET)\"; say MAINPID=1; {WAIT} \
         say READY=1; {WAIT} say WATCHDOG=1; say WATCHDOG_USEC=1; {WAIT} say STOPPING=1"
    );
    let bundle = bundle(&script, |_| ())?;
    let bundle = text(&bundle)?;
    let (path, name) = (Manager::by_path()?, Manager::by_name()?);
    for (manager, id) in [(&path, "notify-r"), (&name, "notify-s")] {
        let run = match id {
            "notify-r" => ["run", "-d", "--bundle", bundle, id].to_vec(),
            _ => {
                let create = ["create", "--bundle", bundle, id];
                ensure!(manager.command(&runtime, &create).status()?.success());
                ["start", id].to_vec()
            }
        };
        let mut run = manager.command(&runtime, &run).spawn()?;
        manager.expect("STATUS=at /run/notify/notify.sock")?;
        ensure!(run.try_wait()?.is_none(), "{id}: it does not wait");
        // Other commands do not wait for it.
        runtime.ok(&[&["exec", id][..], &GO].concat())?;
        let pid = pid(&runtime, id)?;
        manager.expect(&format!("READY=1\nMAINPID={pid}"))?;
        manager.expect("BARRIER=1")?;
        ensure!(run.wait()?.success(), "{id}");
        // From its process, since the command has gone.
        runtime.ok(&[&["exec", id][..], &GO].concat())?;
        manager.expect("WATCHDOG=1")?;
        runtime.ok(&[&["exec", id][..], &GO].concat())?;
        // The last thing that it does is not lost.
        manager.expect("STOPPING=1")?;
        until("the end of the container", || runtime.is(id, "stopped"))?;
        manager.expect_nothing()?;
        runtime.ok(&["delete", id])?;
    }
    Ok(())
}

fn pid(runtime: &Runtime, id: &str) -> Result<u64> {
    let state: serde_json::Value = serde_json::from_str(&runtime.ok(&["state", id])?)?;
    state["pid"].as_u64().context("no pid")
}

fn a_foreground_command_is_the_main_process() -> Result<()> {
    let runtime = Runtime::koya()?;
    let script = format!("{SAY} say READY=1; say STATUS=done; exit 7");
    let bundle = bundle(&script, |_| ())?;
    let manager = Manager::by_path()?;
    let words = ["run", "--bundle", text(&bundle)?, "notify-f"];
    let mut run = manager.command(&runtime, &words).spawn()?;
    manager.expect(&format!("READY=1\nMAINPID={}", run.id()))?;
    manager.expect("BARRIER=1")?;
    ensure!(run.wait()?.code() == Some(7));
    // It has ended only after that.
    manager
        .socket
        .set_read_timeout(Some(Duration::from_secs(1)))?;
    manager.expect("STATUS=done")?;
    manager.expect_nothing()
}

/// The host takes the first hundred at once, and then ten a second. Messages without end hold up nothing else.
fn a_guest_that_sends_all_the_time_has_to_wait() -> Result<()> {
    let runtime = Runtime::koya()?;
    let script =
        format!("{SAY} yes MAINPID=1 | head -n 150 | logger; say READY=1; yes READY=1 | logger");
    let bundle = bundle(&script, |_| ())?;
    let manager = Manager::by_path()?;
    let words = ["run", "-d", "--bundle", text(&bundle)?, "notify-w"];
    let mut run = manager.command(&runtime, &words).spawn()?;
    let message = manager.next()?;
    ensure!(message.starts_with("READY=1\nMAINPID="), "{message:?}");
    manager.expect("BARRIER=1")?;
    ensure!(run.wait()?.success());
    std::thread::sleep(Duration::from_secs(3));
    manager.expect_nothing()?;
    let began = Instant::now();
    runtime.ok(&["kill", "notify-w", "KILL"])?;
    until("the end of the container", || {
        runtime.is("notify-w", "stopped")
    })?;
    ensure!(began.elapsed() < LIMIT / 2, "it took {:?}", began.elapsed());
    runtime.ok(&["delete", "notify-w"])?;
    Ok(())
}

fn a_container_runs_without_a_service_manager() -> Result<()> {
    let runtime = Runtime::koya()?;
    let bundle = bundle("echo \"[$NOTIFY_SOCKET]\"", |_| ())?;
    for name in ["/none/notify", "@koya-none", "none"] {
        let mut run = runtime.command(&["run", "--bundle", text(&bundle)?, "notify-n"]);
        let output = run.env("NOTIFY_SOCKET", name).output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{name}: {output:?}");
        ensure!(output.stdout.starts_with(b"[]\n"), "{name}: {output:?}");
        let is_told = said.contains(&format!("NOTIFY_SOCKET={name}"));
        ensure!(said.lines().count() == 1 && is_told, "{name}: {said}");
    }
    // Made without one, it has no socket, and its start waits for nothing.
    let manager = Manager::by_path()?;
    runtime.ok(&["create", "--bundle", text(&bundle)?, "notify-n"])?;
    let start = manager.command(&runtime, &["start", "notify-n"]).status()?;
    ensure!(start.success());
    until("the end of the container", || {
        runtime.is("notify-n", "stopped")
    })?;
    manager.expect_nothing()?;
    runtime.ok(&["delete", "notify-n"])?;
    Ok(())
}

/// conmon is the main process; with `container` it passes on what the container says.
fn podman_leaves_notifications_to_the_container() -> Result<()> {
    let podman = Podman::new()?;
    let manager = Manager::by_path()?;
    let run = |mode: &str, name: &str, script: &str| -> Result<()> {
        let mode = format!("--sdnotify={mode}");
        let out = fs::File::create(podman.dir.join("out"))?;
        let words = [
            "run",
            "-d",
            "--name",
            name,
            &mode,
            "--network",
            "none",
            "bb",
            "sh",
            "-c",
            script,
        ];
        let mut run = podman.command(&words);
        let run = run.env("NOTIFY_SOCKET", &manager.name).stdout(out);
        ensure!(run.status()?.success(), "{mode}");
        Ok(())
    };
    let conmon = |name: &str| podman.ok(&["inspect", "--format", "{{.State.ConmonPid}}", name]);

    let script = format!("{SAY} {WAIT} say \"$(printf 'MAINPID=1\\nREADY=1')\"");
    run("container", "own", &script)?;
    manager.expect(&format!("MAINPID={}", conmon("own")?))?;
    manager.expect_nothing()?;
    podman.ok(&[&["exec", "own"][..], &GO].concat())?;
    // conmon passes only that on before version 2.2.
    manager.expect("READY=1")?;
    podman.ok(&["wait", "own"])?;

    let script = format!("echo \"[$NOTIFY_SOCKET]\"; {WAIT}");
    run("conmon", "conmons", &script)?;
    manager.expect(&format!("MAINPID={}\nREADY=1", conmon("conmons")?))?;
    podman.ok(&[&["exec", "conmons"][..], &GO].concat())?;
    podman.ok(&["wait", "conmons"])?;
    ensure!(podman.ok(&["logs", "conmons"])? == "[]");

    run("ignore", "none", "echo \"[$NOTIFY_SOCKET]\"")?;
    podman.ok(&["wait", "none"])?;
    ensure!(podman.ok(&["logs", "none"])? == "[]");
    manager.expect_nothing()
}
