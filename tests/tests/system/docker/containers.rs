//! Options of `docker run`, and requests to a running container.

use super::{Docker, Kind, line};
use crate::daemon::ended;
use crate::tool::{scratch, stdout, until};
use anyhow::{Context, Result, ensure};
use std::fs;
use std::process::Stdio;

/// Options of `docker run`, many in one container.
pub(super) fn containers_get_what_was_asked(docker: &Docker) -> Result<()> {
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
    let script = format!("tty; {}stty size; exit 4", docker.until_sized());
    let run = docker.run(&["--rm", "-it"], &["sh", "-c", &script]);
    let (code, text) = ended(&docker.on_terminal(&run).output()?);
    ensure!(
        code == Some(4) && text.contains("/dev/pts/0"),
        "{code:?} {text}"
    );
    ensure!(text.contains("33 77"), "{text}");
    // A privileged container has the devices of its machine, not those of the host.
    let said = docker.sh(&["--privileged"], "grep CapEff /proc/self/status; ls /dev")?;
    ensure!(said.contains(docker.all_capabilities()), "{said}");
    docker.nothing_is_left()
}

/// Requests to a running container.
pub(super) fn a_container_is_looked_after(docker: &Docker) -> Result<()> {
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
    // By path, Docker reads the limit of the control group on the host, which has room for the virtual machine.
    let has_own_limit = stats.contains("/ 256MiB;") || docker.kind == Kind::Path;
    ensure!(has_own_limit, "{stats}");
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
