//! The command's behaviour on its host: signals, descriptors, closed pipes, and errors before a machine is created.

use crate::tool::{Background, koya, run, scratch, sh, shared_rootfs, stdout, until};
use anyhow::{Context, Result, ensure};
use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

crate::trials![
    ignored_signals_stay_ignored,
    a_detached_container_keeps_nothing_of_its_caller,
    a_reader_that_goes_ends_the_command_quietly,
    a_full_disk_is_an_error,
    what_is_missing_is_said_in_one_line,
    images_of_other_formats_are_refused,
    the_clock_follows_the_hosts,
];

/// A script for the host's shell; `$R` is a root file system, `$D` a directory.
fn host(dir: &PathBuf, script: &str) -> Result<Output> {
    let mut shell = Command::new("sh");
    shell.args(["-c", script]).stdin(Stdio::null());
    Ok(shell.env("R", shared_rootfs()).env("D", dir).output()?)
}

fn ignored_signals_stay_ignored() -> Result<()> {
    let dir = scratch("nohup")?;
    let said = stdout(host(
        &dir,
        r#"
        trap '' HUP
        koya run --rootfs $R -v $D:/data -- sh -c '
            trap "echo hup >> /data/said" HUP; trap "echo usr1 >> /data/said; exit 3" USR1
            echo > /data/up; while :; do sleep 0.1; done' & guest=$!
        until [ -e $D/up ]; do kill -0 $guest || exit 1; sleep 0.2; done
        kill -HUP $guest; sleep 1; kill -USR1 $guest
        wait $guest; echo $?; cat $D/said"#,
    )?)?;
    ensure!(said == "3\nusr1", "{said}");
    // Signals ignored by the caller are not ignored in the container. (A shell as PID 1 ignores SIGQUIT.)
    let said = stdout(host(
        &dir,
        r#"trap '' HUP PIPE; koya run --rootfs $R -- grep SigIgn /proc/self/status"#,
    )?)?;
    ensure!(said.ends_with("0000000000000000"), "{said}");
    Ok(())
}

fn a_detached_container_keeps_nothing_of_its_caller() -> Result<()> {
    let (name, dir) = ("line-detached", scratch("line-detached")?);
    let lock = dir.join("lock");
    let started = host(
        &dir,
        &format!(
            "cd $D; exec 3>lock; flock 3; exec 9<lock
             koya run -d --name {name} --rootfs $R -- sleep 1000 | cat"
        ),
    )?;
    let container = Background { name: name.into() };
    ensure!(stdout(started)? == name);
    let process = PathBuf::from(format!("/proc/{}", container.pid()?));
    for open in fs::read_dir(process.join("fd"))?.flatten() {
        let leads = fs::read_link(open.path()).unwrap_or_default();
        ensure!(leads != lock, "{} is still open", open.path().display());
    }
    ensure!(fs::read_link(process.join("cwd"))?.as_os_str() == "/");
    File::open(&lock)?.try_lock().context("the lock is held")?;
    Ok(())
}

fn a_reader_that_goes_ends_the_command_quietly() -> Result<()> {
    let dir = scratch("readers")?;
    let container = Background::start(
        "line-readers",
        &[],
        &["sh", "-c", "yes | head -n 9999; sleep 1000"],
    )?;
    container.wait_until("all its lines", |said| said.len() >= 2 * 9999 - 1)?;
    for command in [
        "ps --all",
        "ps --json",
        "stats",
        "stats --json",
        "env",
        "env --json",
        "--help",
        "run --help",
        "--version",
        "logs line-readers",
        "timeline",
        "timeline --list",
        "timeline --json",
        "timeline --svg -",
        "exec line-readers yes",
    ] {
        // The reader exits before any output.
        let script = format!(
            "{{ sleep 0.5; timeout 100 koya {command} 2> $D/error; echo $? > $D/status; }} | true"
        );
        stdout(host(&dir, &script)?)?;
        let said = fs::read_to_string(dir.join("error"))?;
        let status = fs::read_to_string(dir.join("status"))?;
        // 141: death by SIGPIPE, of the command itself or of the container's program.
        ensure!(
            said.is_empty() && status.trim() == "141",
            "{command}: {status}{said}"
        );
    }
    // A command that follows a log without new lines notices too.
    let follow = "{ timeout 60 koya logs -f line-readers; echo $? > $D/status; } | head -n 1";
    ensure!(stdout(host(&dir, follow)?)? == "y");
    let status = fs::read_to_string(dir.join("status"))?;
    ensure!(status.trim() == "141", "{status}");
    // A container's first process is not killed by SIGPIPE (pid_namespaces(7)): it ends by itself.
    let run =
        "{ timeout 100 koya run --rootfs $R -- yes 2> $D/error; echo $? > $D/status; } | head -n 1";
    ensure!(stdout(host(&dir, run)?)? == "y");
    let status = fs::read_to_string(dir.join("status"))?;
    let said = fs::read_to_string(dir.join("error"))?;
    ensure!(
        status.trim() == "1" && !said.contains("panicked"),
        "{status}{said}"
    );
    Ok(())
}

fn a_full_disk_is_an_error() -> Result<()> {
    let dir = scratch("full")?;
    for command in [
        "ps",
        "env --json",
        "--help",
        "timeline --list",
        "run --rootfs $R -- echo hi",
    ] {
        let output = host(&dir, &format!("koya {command} > /dev/full"))?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.code() == Some(125) && said.contains("No space left"),
            "{command}: {output:?}"
        );
    }
    Ok(())
}

fn what_is_missing_is_said_in_one_line() -> Result<()> {
    let dir = scratch("missing")?;
    let rootfs = shared_rootfs().to_str().context("a path in UTF-8")?;
    for (options, wanted) in [
        (
            ["--rootfs", "/nonexistent", "--read-only"],
            ["rootfs", "/nonexistent"],
        ),
        (
            ["--rootfs", "/etc/passwd", "--read-only"],
            ["rootfs", "/etc/passwd"],
        ),
        (
            ["--rootfs", rootfs, "--volume=/nonexistent:/x"],
            ["volume", "/nonexistent"],
        ),
        (
            ["--rootfs", rootfs, "--disk=/nonexistent"],
            ["disk", "/nonexistent"],
        ),
        (
            ["--rootfs", rootfs, "--user=nobody-of-that-name"],
            ["user", "nobody-of-that-name"],
        ),
        (
            ["--rootfs", rootfs, "--cap-add=nothing"],
            ["capability", "NOTHING"],
        ),
    ] {
        let name = "line-missing";
        let output = koya(["run", "--name", name])
            .args(options)
            .args(["--", "true"])
            .current_dir(&dir)
            .output()?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.code() == Some(125), "{options:?}: {output:?}");
        ensure!(
            said.lines().count() == 1 && wanted.iter().all(|word| said.contains(word)),
            "{options:?}: {said}"
        );
        // There is no timeline of a start that never began.
        let listed = stdout(koya(["timeline", "--list"]).output()?)?;
        ensure!(!listed.contains(name), "{listed}");
    }
    Ok(())
}

fn images_of_other_formats_are_refused() -> Result<()> {
    let dir = scratch("formats")?;
    let path = dir.join("disk.img");
    let mut image = b"QFI\xfb".to_vec();
    image.resize(1 << 20, 0);
    fs::write(&path, image)?;
    let path = path.to_str().context("a path in UTF-8")?;
    let container = Background::start("line-formats", &[], &["sleep", "1000"])?;
    let refused = [
        run(&["--disk", path], &["true"])?,
        koya(["run", "--rootfs", path, "--", "true"]).output()?,
        koya(["disk", "attach", &container.name, path]).output()?,
    ];
    for output in refused {
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.code() == Some(125) && said.contains(path) && said.contains("qcow2"),
            "{output:?}"
        );
    }
    let raw = format!("{path}:raw,ro");
    ensure!(sh(&["--disk", &raw], "head -c 3 /dev/vda")? == "QFI");
    ensure!(stdout(koya(["disk", "attach", &container.name, &raw]).output()?)? == "/dev/vda");
    Ok(())
}

/// Seconds by which the guest's clock is ahead of the host's.
fn ahead(container: &Background) -> Result<i64> {
    let guest: i64 = stdout(container.exec(&[], &["date", "+%s"])?)?.parse()?;
    let host: i64 = stdout(Command::new("date").arg("+%s").output()?)?.parse()?;
    Ok(guest - host)
}

fn the_clock_follows_the_hosts() -> Result<()> {
    let options = ["--cap-add", "sys_time"];
    let container = Background::start("line-clock", &options, &["sleep", "1000"])?;
    let pid = container.pid()?.to_string();
    let wrong = |by: i64| -> Result<()> {
        let script = format!("date -s @$(($(date +%s) + {by}))");
        stdout(container.exec(&[], &["sh", "-c", &script])?)?;
        ensure!(
            (ahead(&container)? - by).abs() < 30,
            "the clock can't be set"
        );
        Ok(())
    };
    let right = |why: &str| until(why, || Ok((ahead(&container)?.abs() <= 3).then_some(())));
    // Sets the host's clock to its own time: the kernel notifies anyway.
    wrong(300)?;
    let set = "date -s @$(date +%s.%N)";
    stdout(Command::new("sh").args(["-c", set]).output()?)?;
    right("after the host's clock was set")?;
    // Stops and continues the sandbox's process.
    wrong(-300)?;
    for signal in ["-STOP", "-CONT"] {
        let sent = Command::new("kill").args([signal, &pid]).status()?;
        ensure!(sent.success(), "kill {signal}");
        std::thread::sleep(std::time::Duration::from_millis(300));
    }
    right("after it was stopped")
}
