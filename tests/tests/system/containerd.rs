//! `containerd-shim-koya-v2` under the real containerd, by `ctr`: each test with each version of containerd in Debian.

use crate::confinement::{
    an_apparmor_profile_holds, limits_hold_inside_and_outside, users_are_mapped,
};
use crate::daemon::{Containerd, IMAGE, RUNTIME, Test, Use, ended, trials_of};
use crate::hooks::hooks_run;
use crate::kills::Kills;
use crate::privileges::a_shim_has_few_privileges;
use crate::takeover::{
    a_network_is_taken_over, a_tap_is_taken_over, routes_of_every_kind_are_taken_over,
};
use crate::timeline::timeline;
use crate::tool::{LIMIT, scratch, stdout, until};
use anyhow::{Context, Result, bail, ensure};
use std::fs;
use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Every test, for each containerd.
pub(crate) fn trials() -> Vec<libtest_mimic::Trial> {
    let tests: [Test; 16] = [
        ("containers_run_and_end", containers_run_and_end),
        ("a_task_is_looked_after", a_task_is_looked_after),
        ("a_paused_task_is_killed", a_paused_task_is_killed),
        ("a_killed_shim_leaves_nothing", a_killed_shim_leaves_nothing),
        (
            "killed_at_the_worst_moments_nothing_is_left",
            killed_at_the_worst_moments_nothing_is_left,
        ),
        (
            "killed_at_any_point_nothing_is_left",
            killed_at_any_point_nothing_is_left,
        ),
        ("a_network_is_taken_over", a_network_is_taken_over),
        (
            "routes_of_every_kind_are_taken_over",
            routes_of_every_kind_are_taken_over,
        ),
        ("a_tap_is_taken_over", a_tap_is_taken_over),
        ("users_are_mapped", users_are_mapped),
        ("hooks_run", hooks_run),
        ("an_apparmor_profile_holds", an_apparmor_profile_holds),
        ("a_shim_has_few_privileges", a_shim_has_few_privileges),
        ("many_start_at_once", many_start_at_once),
        ("a_pod_is_one_machine", a_pod_is_one_machine),
        (
            "limits_hold_inside_and_outside",
            limits_hold_inside_and_outside,
        ),
    ];
    trials_of("containerd", Use::Ctr, tests)
}

fn containers_run_and_end(containerd: &Containerd) -> Result<()> {
    let shared = scratch("volume")?;
    fs::write(shared.join("file"), "of the host")?;
    let mount = format!(
        "type=bind,src={},dst=/data,options=rbind:rw",
        shared.display()
    );
    let script = "uname -r; cat /data/file; echo of the guest > /data/new; pwd; exit 3";
    let options = ["--rm", "--mount", &mount, "--cwd", "/made/for/it"];
    let out = containerd
        .run(&options, "one", &["sh", "-c", script])
        .output()?;
    let (code, text) = ended(&out);
    ensure!(code == Some(3) && text.contains("-koya"), "{code:?} {text}");
    ensure!(
        text.contains("of the host") && text.ends_with("/made/for/it"),
        "{text}"
    );
    ensure!(fs::read_to_string(shared.join("new"))? == "of the guest\n");
    let start = timeline("one")?;
    let steps = start["steps"].as_array().context("no steps")?;
    let last = steps.last().context("no step")?;
    ensure!(
        last["name"] == "start" && last["container"] == "one",
        "{start}"
    );

    // A slow reader loses no output.
    let script = "i=0; while [ $i -lt 3000 ]; do echo 0123456789012345678901234567890123456789012345678901234567890123; i=$((i+1)); done";
    let mut child = containerd
        .run(&["--rm"], "slow", &["sh", "-c", script])
        .stdout(Stdio::piped())
        .spawn()?;
    let mut out = child.stdout.take().context("a pipe")?;
    std::thread::sleep(Duration::from_secs(3));
    let mut text = String::new();
    out.read_to_string(&mut text)?;
    ensure!(
        child.wait()?.success() && text.len() == 3000 * 65,
        "{} bytes",
        text.len()
    );

    // Standard input and its end are forwarded: after a delay, since ctr 1.6 does not report an end at once.
    let mut cat = containerd.run(&["--rm"], "cat", &["cat"]);
    let mut cat = cat.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let mut stdin = cat.stdin.take().context("a pipe")?;
    stdin.write_all(b"typed\n")?;
    containerd.wait_for("cat", "RUNNING")?;
    std::thread::sleep(Duration::from_secs(1));
    drop(stdin);
    let out = cat.wait_with_output()?;
    ensure!(out.status.success() && out.stdout == b"typed\n", "{out:?}");

    // A terminal, which ctr requires on its own standard input.
    let ctr = containerd.run(
        &["--rm", "-t"],
        "tty",
        &["sh", "-c", "sleep 1; tty; stty size; exit 4"],
    );
    let line: Vec<_> = std::iter::once(ctr.get_program())
        .chain(ctr.get_args())
        .map(|word| format!("'{}'", word.to_string_lossy()))
        .collect();
    let script = format!("stty rows 33 cols 77; {}", line.join(" "));
    let mut terminal = Command::new("script");
    terminal
        .args(["-qec", &script, "/dev/null"])
        .stdin(Stdio::null());
    let (code, text) = ended(&terminal.output()?);
    ensure!(
        code == Some(4) && text.contains("/dev/pts/0") && text.contains("33 77"),
        "{code:?} {text}"
    );

    // An unsupported option is reported in one line, and nothing is left behind.
    let (code, text) = ended(
        &containerd
            .run(&["--rm", "--net-host"], "net", &["true"])
            .output()?,
    );
    ensure!(
        code != Some(0) && text.contains("the host's network"),
        "{text}"
    );
    let (code, text) = ended(&containerd.run(&["--rm"], "nope", &["nope"]).output()?);
    ensure!(code != Some(0) && text.contains("nope"), "{text}");
    let config = shared.join("koya.toml");
    fs::write(&config, "memory_mib = 300\n")?;
    let path = config.to_string_lossy().into_owned();
    let options = ["--rm", "--runtime-config-path", &path];
    let script = "grep MemTotal /proc/meminfo";
    let (code, text) = ended(
        &containerd
            .run(&options, "size", &["sh", "-c", script])
            .output()?,
    );
    let kib = text
        .split_whitespace()
        .nth(1)
        .and_then(|n| n.parse::<u64>().ok())
        .unwrap_or(0);
    ensure!(
        code == Some(0) && (300..=308).contains(&(kib >> 10)),
        "{text}"
    );
    fs::write(&config, "memory_mb = 300\n")?;
    let (code, text) = ended(&containerd.run(&options, "typo", &["true"]).output()?);
    ensure!(code != Some(0) && text.contains("memory_mb"), "{text}");
    containerd.nothing_is_left()
}

fn a_task_is_looked_after(containerd: &Containerd) -> Result<()> {
    let (log, shared) = (scratch("log")?.join("sub/out"), scratch("life")?);
    let uri = format!("file://{}", log.display());
    let mount = format!(
        "type=bind,src={},dst=/data,options=rbind:rw",
        shared.display()
    );
    let script = "n=0; while :; do n=$((n+1)); echo $n > /data/n; [ $n = 1 ] && echo started; sleep 0.1; done";
    let options = ["-d", "--log-uri", &uri, "--mount", &mount];
    stdout(
        containerd
            .run(&options, "life", &["sh", "-c", script])
            .output()?,
    )?;
    let said = || fs::read_to_string(&log).unwrap_or_default();
    until("its output", || Ok((said() == "started\n").then_some(())))?;
    ensure!(containerd.state("life")?.as_deref() == Some("RUNNING"));

    let exec = |id: &str, script: &str| {
        Ok::<_, anyhow::Error>(ended(&containerd.exec("life", id, script).output()?))
    };
    let (code, text) = exec("first", "echo here; cat /proc/1/comm; exit 7")?;
    ensure!(code == Some(7) && text == "here\nsh", "{code:?} {text}");
    let metrics = stdout(containerd.ctr(["task", "metrics", "life"]).output()?)?;
    let value = |name: &str| {
        let line = metrics.lines().find(|line| line.starts_with(name));
        line.and_then(|line| line.split_whitespace().last()?.parse::<u64>().ok())
    };
    ensure!(value("pids.current").is_some_and(|n| n >= 1), "{metrics}");
    ensure!(
        value("memory.usage ").is_some_and(|n| n > 100_000),
        "{metrics}"
    );
    ensure!(value("cpu.usage_usec").is_some_and(|n| n > 0), "{metrics}");

    let count = || {
        Ok::<u64, anyhow::Error>(
            fs::read_to_string(shared.join("n"))?
                .trim()
                .parse()
                .unwrap_or(0),
        )
    };
    stdout(containerd.ctr(["task", "pause", "life"]).output()?)?;
    ensure!(containerd.state("life")?.as_deref() == Some("PAUSED"));
    std::thread::sleep(Duration::from_millis(300));
    let paused = count()?;
    std::thread::sleep(Duration::from_secs(1));
    ensure!(count()? == paused, "it went on");
    stdout(containerd.ctr(["task", "resume", "life"]).output()?)?;
    until("it to go on", || Ok((count()? > paused).then_some(())))?;

    // nerdctl cp reads and writes the container's files below its PID.
    let pid = containerd.pid("life")?;
    let root = format!("/proc/{pid}/root");
    ensure!(fs::read_to_string(format!("{root}/data/n"))? == fs::read_to_string(shared.join("n"))?);
    fs::write(format!("{root}/copied"), "by the host")?;
    let (code, text) = exec("third", "cat /copied")?;
    ensure!(code == Some(0) && text == "by the host", "{code:?} {text}");
    ensure!(!fs::exists("/copied")?, "this is the host's root");

    containerd.kill_and_start_again()?;
    ensure!(containerd.state("life")?.as_deref() == Some("RUNNING"));
    ensure!(containerd.pid("life")? == pid);
    let before = count()?;
    until("it to go on", || Ok((count()? > before).then_some(())))?;
    let (code, text) = exec("second", "echo again")?;
    ensure!(code == Some(0) && text == "again", "{code:?} {text}");

    // A signal without a handler has no effect on the init of a namespace.
    stdout(
        containerd
            .ctr(["task", "kill", "-s", "TERM", "life"])
            .output()?,
    )?;
    let refused = containerd.ctr(["task", "rm", "life"]).output()?;
    ensure!(!refused.status.success());
    stdout(
        containerd
            .ctr(["task", "kill", "-s", "KILL", "life"])
            .output()?,
    )?;
    containerd.wait_for("life", "STOPPED")?;
    let (code, text) = ended(&containerd.ctr(["task", "rm", "life"]).output()?);
    ensure!(code == Some(137) || text.contains("137"), "{code:?} {text}");
    containerd.remove("life")?;
    containerd.nothing_is_left()
}

/// A paused task ends by SIGKILL of the task itself, not of its machine.
fn a_paused_task_is_killed(containerd: &Containerd) -> Result<()> {
    let mut run = containerd.run(&["-d"], "paused", &["sleep", "1000"]);
    stdout(run.output()?)?;
    stdout(containerd.ctr(["task", "pause", "paused"]).output()?)?;
    ensure!(containerd.state("paused")?.as_deref() == Some("PAUSED"));
    let mut kill = containerd.ctr(["task", "kill", "-s", "KILL", "paused"]);
    stdout(kill.output()?)?;
    containerd.wait_for("paused", "STOPPED")?;
    let began = Instant::now();
    let (code, text) = ended(&containerd.ctr(["task", "rm", "paused"]).output()?);
    ensure!(code == Some(137) || text.contains("137"), "{code:?} {text}");
    ensure!(
        began.elapsed() < Duration::from_secs(15),
        "{:?}",
        began.elapsed()
    );
    containerd.remove("paused")?;
    containerd.nothing_is_left()
}

fn a_killed_shim_leaves_nothing(containerd: &Containerd) -> Result<()> {
    stdout(
        containerd
            .run(&["-d"], "hit", &["sleep", "1000"])
            .output()?,
    )?;
    containerd.kill_and_remove("hit")?;
    // The name can be used again.
    let out = containerd
        .run(&["--rm"], "hit", &["echo", "again"])
        .output()?;
    ensure!(stdout(out)? == "again");
    containerd.nothing_is_left()
}

/// Kills the shim, containerd, or both during the creation of a container.
fn killed_at_the_worst_moments_nothing_is_left(containerd: &Containerd) -> Result<()> {
    // Milliseconds after the start of the shim: before its virtual machine, during boot, and later.
    let moments = [
        (true, false, 0),
        (true, false, 700),
        (true, false, 3000),
        (false, true, 0),
        (false, true, 1500),
        (true, true, 500),
    ];
    for (round, (shim, daemon, millis)) in moments.into_iter().enumerate() {
        let name = format!("worst{round}");
        let about = || format!("round {round}: shim {shim}, containerd {daemon}, {millis} ms");
        let mut ctr = containerd.run(&["-d"], &name, &["sleep", "1000"]);
        let ctr = ctr.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let pid = until("a shim", || containerd.shim_of(&name))?;
        std::thread::sleep(Duration::from_millis(millis));
        if shim {
            // The process may have exited already.
            Command::new("kill").args(["-KILL", &pid]).status()?;
        }
        if daemon {
            containerd.kill_and_start_again()?;
        }
        ctr.wait_with_output()?;
        remove_at_last(containerd, &name).with_context(about)?;
    }
    let mut again = containerd.run(&["--rm"], "worst0", &["echo", "again"]);
    ensure!(stdout(again.output()?)? == "again");
    containerd.nothing_is_left()
}

/// Removes whatever containerd knows of a container, as its user would.
fn remove_at_last(containerd: &Containerd, name: &str) -> Result<()> {
    until("its removal", || {
        containerd.ctr(["task", "rm", "-f", name]).output()?;
        containerd.ctr(["container", "rm", name]).output()?;
        let list = stdout(containerd.ctr(["container", "ls", "-q"]).output()?)?;
        Ok((!list.lines().any(|line| line == name)).then_some(()))
    })?;
    containerd.nothing_is_left()
}

/// Kills the shim, containerd, or both while a container is created, started, used and deleted (see [`Kills`]).
fn killed_at_any_point_nothing_is_left(containerd: &Containerd) -> Result<()> {
    let ctr = containerd.ctr::<&str>([]);
    let words = std::iter::once(ctr.get_program()).chain(ctr.get_args());
    let words: Vec<_> = words
        .map(|word| format!("'{}'", word.to_string_lossy()))
        .collect();
    let ctr = words.join(" ");
    let life = |name: &str| {
        let script = format!(
            "{ctr} run --runtime {RUNTIME} -d {IMAGE} {name} sleep 1000 && \
             {ctr} task exec --exec-id e {name} true && {ctr} task kill -s KILL {name} && \
             while {ctr} task ls | grep {name} | grep -vq STOPPED; do sleep 0.1; done && \
             {ctr} task rm {name}; {ctr} task rm -f {name}; {ctr} container rm {name}"
        );
        let mut shell = Command::new("timeout");
        shell
            .args(["100", "sh", "-c", &script])
            .stdin(Stdio::null());
        shell.stdout(Stdio::null()).stderr(Stdio::null()).spawn()
    };
    let began = Instant::now();
    ensure!(life("whole")?.wait()?.success(), "a life without kills");
    let whole = began.elapsed();
    remove_at_last(containerd, "whole")?;
    let kills = Kills::of("containerd")?;
    for turn in kills.turns() {
        let mut chance = kills.chance(turn);
        let (name, after) = (format!("any{turn}"), chance.below(whole));
        let kinds = [
            ("the shim", true, false),
            ("containerd", false, true),
            ("the shim and containerd", true, true),
        ];
        let (killed, shim, daemon) = *chance.one_of(&kinds).context("a kind")?;
        let mut shell = life(&name)?;
        std::thread::sleep(after);
        let pid = containerd.shim_of(&name)?;
        let killed = match pid {
            None if !daemon => "nothing, since there was no shim",
            _ => killed,
        };
        if let Some(pid) = pid.filter(|_| shim) {
            // It may have exited already.
            Command::new("kill").args(["-KILL", &pid]).status()?;
        }
        if daemon {
            containerd.kill_and_start_again()?;
        }
        shell.wait()?;
        remove_at_last(containerd, &name)
            .with_context(|| format!("kill {turn} of {killed} after {after:.2?} of {whole:.2?}"))?;
        kills.passed(turn, killed, after);
    }
    let mut again = containerd.run(&["--rm"], "again", &["echo", "again"]);
    ensure!(stdout(again.output()?)? == "again");
    containerd.nothing_is_left()
}

/// KOYA_TEST_CONTAINERS sets the number (default 3).
fn many_start_at_once(containerd: &Containerd) -> Result<()> {
    let count: usize = std::env::var("KOYA_TEST_CONTAINERS").map_or(Ok(3), |n| n.parse())?;
    let started = Instant::now();
    let mut all = Vec::new();
    for number in 0..count {
        let name = format!("many{number}");
        let command = ["sh", "-c", &format!("echo {number}; exit {number}")];
        let mut ctr = containerd.run(&["--rm"], &name, &command);
        all.push(ctr.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?);
    }
    for (number, child) in all.into_iter().enumerate() {
        let out = child.wait_with_output()?;
        let (code, text) = ended(&out);
        if code != Some(number as i32) || text != number.to_string() {
            bail!("{number}: {code:?} {:?} {text}", out.status.signal());
        }
    }
    eprintln!(
        "containerd: {count} containers at once in {:?} (limit {LIMIT:?} each)",
        started.elapsed()
    );
    containerd.nothing_is_left()
}

/// By annotations, as containerd's CRI plugin creates pods.
fn a_pod_is_one_machine(containerd: &Containerd) -> Result<()> {
    let of = |kind: &str| {
        let pairs = [("container-type", kind), ("sandbox-id", "pod")];
        let words = pairs.map(|(name, value)| format!("io.kubernetes.cri.{name}={value}"));
        words
            .into_iter()
            .flat_map(|word| ["--annotation".to_owned(), word])
            .collect::<Vec<_>>()
    };
    let run = |kind: &str, more: &[&str], name: &str, command: &[&str]| {
        let mut ctr = containerd.ctr(["run", "--runtime", RUNTIME]);
        ctr.args(of(kind))
            .args(more)
            .args([IMAGE, name])
            .args(command);
        ctr
    };
    // The command of a pod's own container is not run.
    stdout(run("sandbox", &["-d"], "pod", &["sh", "-c", "exit 1"]).output()?)?;
    ensure!(containerd.state("pod")?.as_deref() == Some("RUNNING"));
    let script = "mkdir /www; echo pong > /www/index.html; exec httpd -f -p 8080 -h /www";
    stdout(run("container", &["-d"], "web", &["sh", "-c", script]).output()?)?;
    // One process, with a thread for each container.
    let process = |name: &str| -> Result<String> {
        let status = fs::read_to_string(format!("/proc/{}/status", containerd.pid(name)?))?;
        let line = status.lines().find(|line| line.starts_with("Tgid:"));
        Ok(line.context("no process")?.to_owned())
    };
    ensure!(process("web")? == process("pod")?, "two machines");
    ensure!(containerd.pid("web")? != containerd.pid("pod")?);
    // Each shows its own files there.
    let page = |name: &str| {
        Ok::<_, anyhow::Error>(fs::exists(format!(
            "/proc/{}/root/www",
            containerd.pid(name)?
        ))?)
    };
    ensure!(page("web")? && !page("pod")?, "files of another container");
    let script = "until wget -qO- http://127.0.0.1:8080/; do sleep 0.2; done; ls /www";
    let (code, text) =
        ended(&run("container", &["--rm"], "client", &["sh", "-c", script]).output()?);
    ensure!(
        code == Some(1) && text.starts_with("pong"),
        "{code:?} {text}"
    );

    stdout(
        containerd
            .ctr(["task", "kill", "-s", "KILL", "web"])
            .output()?,
    )?;
    containerd.wait_for("web", "STOPPED")?;
    containerd.ctr(["task", "rm", "web"]).output()?;
    containerd.remove("web")?;
    ensure!(containerd.state("pod")?.as_deref() == Some("RUNNING"));
    stdout(
        containerd
            .ctr(["task", "kill", "-s", "KILL", "pod"])
            .output()?,
    )?;
    containerd.wait_for("pod", "STOPPED")?;
    containerd.ctr(["task", "rm", "pod"]).output()?;
    containerd.remove("pod")?;
    containerd.nothing_is_left()
}
