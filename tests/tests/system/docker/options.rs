//! Further options of `docker run`, those that name other containers, terminals and updates.

use super::{Docker, Kind, PAGE, line};
use crate::daemon::ended;
use crate::tool::{scratch, stdout, until};
use anyhow::{Context, Result, ensure};
use std::fs;
use std::io::Write as _;
use std::process::Stdio;

/// What [`super::containers`] leaves out, again many in one container.
pub(super) fn further_options(docker: &Docker) -> Result<()> {
    let shared = scratch("volume")?;
    fs::write(shared.join("file"), "of the host")?;
    fs::write(shared.join("env"), "FILED=of a file\n")?;
    let bind = format!(
        "type=bind,source={},destination=/ro,readonly",
        shared.display()
    );
    let (env, cid) = (shared.join("env"), shared.join("cid"));
    let (env, cid) = (env.display().to_string(), cid.display().to_string());
    let options = [
        &["--ulimit", "core=0", "--ulimit", "memlock=65536:131072"][..],
        &[
            "--sysctl",
            "net.core.somaxconn=512",
            "--sysctl",
            "kernel.msgmax=4096",
        ],
        &["--sysctl", "net.ipv4.ip_local_port_range=2000 3000"],
        &[
            "--tmpfs",
            "/run/x:rw,noexec,nosuid,size=64k,mode=1770,uid=33",
        ],
        &[
            "--mount",
            "type=tmpfs,destination=/mem,tmpfs-size=1m,tmpfs-mode=0700",
        ],
        &[
            "--mount",
            &bind,
            "--mount",
            "type=volume,source=filled,destination=/etc",
        ],
        &["--cpus", "0.5", "--cpu-shares", "512", "--cpuset-cpus", "0"],
        &[
            "-m",
            "300m",
            "--memory-reservation",
            "200m",
            "--memory-swap",
            "300m",
        ],
        &[
            "--oom-score-adj",
            "100",
            "--security-opt",
            "no-new-privileges",
        ],
        &[
            "--cap-drop",
            "ALL",
            "--cap-add",
            "NET_RAW",
            "--cap-add",
            "SETUID",
        ],
        &[
            "--user",
            "web",
            "--group-add",
            "log",
            "--domainname",
            "domain.example",
        ],
        &["--dns-search", "search.example", "--dns-opt", "ndots:3"],
        &[
            "--mac-address",
            "02:42:0a:59:00:77",
            "--ipc",
            "private",
            "--cgroupns",
            "private",
        ],
        &[
            "--device",
            "/dev/fuse:/dev/fused:r",
            "--device-cgroup-rule",
            "c 10:200 rwm",
        ],
        &["--env-file", &env, "--cidfile", &cid, "--stop-timeout", "3"],
        &["--log-driver", "local", "--pull", "never"],
    ];
    let script = "echo ulimits=$(ulimit -c) $(grep 'Max locked' /proc/self/limits | awk '{print $4, $5}')
        cd /proc/sys; echo sysctls=$(cat net/core/somaxconn kernel/msgmax net/ipv4/ip_local_port_range)
        grep -q ' /run/x tmpfs [^ ]*nosuid[^ ]*noexec' /proc/mounts; echo flags=$?
        echo x=$(stat -c '%a %u' /run/x) $(df -k /run/x | tail -n 1 | awk '{print $2}')
        echo mem=$(stat -c %a /mem) $(df -k /mem | tail -n 1 | awk '{print $2}')
        echo ro=$(cat /ro/file); touch /ro/no 2>/dev/null || echo bind=read-only; echo volume=$(grep -c web /etc/passwd)
        cd /sys/fs/cgroup; echo cpu=$(cat cpu.max) $(cat cpu.weight) $(nproc); echo low=$(cat memory.low)
        echo score=$(cat /proc/self/oom_score_adj); cd /proc/self; echo privileges=$(grep NoNewPrivs status | tr -dc 0-9)
        echo bounding=$(grep CapBnd status | cut -f2); echo user=$(id -u) $(id -G | tr ' ' '\\n' | sort -nu)
        echo search=$(grep -v nameserver /etc/resolv.conf | grep -E '^(search|options)' | tr '\\n' ' ')
        echo mac=$(cat /sys/class/net/eth0/address); test -c /dev/fused; echo fuse=$? $FILED";
    let options = options.concat();
    let options = [&["--rm"], &options[..]].concat();
    let (code, said) = ended(&docker.run(&options, &["sh", "-c", script]).output()?);
    ensure!(code == Some(0), "{code:?} {said}");
    let expected = [
        ("ulimits", "0 65536 131072"),
        ("sysctls", "512 4096 2000 3000"),
        ("flags", "0"),
        ("x", "1770 33 64"),
        ("mem", "700 1024"),
        ("ro", "of the host"),
        ("bind", "read-only"),
        ("volume", "1"),
        ("cpu", "50000 100000 59 1"),
        ("low", "209715200"),
        ("score", "100"),
        ("privileges", "1"),
        ("bounding", "0000000000002080"),
        ("user", "33 33 40"),
        ("search", "search search.example options ndots:3"),
        ("mac", "02:42:0a:59:00:77"),
        ("fuse", "0 of a file"),
    ];
    let wrong = expected
        .iter()
        .filter(|(name, value)| !line(&said, name).is_ok_and(|own| own == *value));
    let wrong: Vec<_> = wrong.collect();
    ensure!(wrong.is_empty(), "not {wrong:?}: {said}");
    ensure!(fs::read_to_string(&cid)?.len() == 64);
    docker.said(["volume", "rm", "filled"])?;

    let said = docker.sh(
        &["--ipc", "none"],
        "ls /dev/shm 2>&1; grep -c ' /dev/shm ' /proc/mounts; true",
    )?;
    ensure!(said.ends_with('0'), "{said}");
    // Docker itself leaves this option out, with a warning, since control groups of version 2 lack it.
    let (code, said) = ended(
        &docker
            .run(&["--rm", "--oom-kill-disable", "-m", "200m"], &["true"])
            .output()?,
    );
    ensure!(code == Some(0), "{said}");
    let told = [
        "-d",
        "--name",
        "full",
        "-m",
        "128m",
        "--memory-swap",
        "128m",
    ];
    stdout(
        docker
            .run(&told, &["sh", "-c", "tail /dev/zero; exit $?"])
            .output()?,
    )?;
    docker.wait_for(
        "full",
        "{{.State.Status}} {{.State.ExitCode}}",
        "exited 137",
    )?;
    let killed = docker.inspect("full", "{{.State.OOMKilled}}")?;
    ensure!(
        killed == (docker.kind == Kind::Shim).to_string(),
        "{killed}"
    );
    docker.said(["rm", "full"])?;

    docker.refused(&["--gpus", "all"], "[[gpu]]")?;
    docker.refused(
        &["--device", "/dev/kvm"],
        "/dev/kvm is a device of the host",
    )?;
    docker.nothing_is_left()
}

/// `--pid`, `--ipc`, `--volumes-from` and `--link`.
pub(super) fn options_of_other_containers(docker: &Docker) -> Result<()> {
    docker.serve("other", &["-v", "common:/common", "--ipc", "shareable"])?;
    docker.exec(
        "other",
        "echo theirs > /common/file; echo shm > /dev/shm/file",
    )?;
    let both = ["--volumes-from", "other", "--link", "other:aka"];
    let script =
        format!("{PAGE}; cat /common/file; page $(awk '$2 == \"aka\" {{print $1}}' /etc/hosts)");
    let said = docker.sh(&both, &script)?;
    ensure!(said == "theirs\npong", "{said}");
    let each = [["--pid", "container:other"], ["--ipc", "container:other"]];
    match docker.kind {
        Kind::Shim => {
            docker.refused(
                &each[0],
                "the pid namespace of another container can't be shared",
            )?;
            docker.refused(
                &each[1],
                "the ipc namespace of another container can't be shared",
            )?;
        }
        Kind::Path => {
            for alone in &each {
                docker.refused(alone, "can be shared only with its network")?;
            }
            let all = [&["--network", "container:other"][..], &each[0], &each[1]].concat();
            let said = docker.sh(&all, "ps | grep -c '[h]ttpd'; cat /dev/shm/file")?;
            ensure!(said == "1\nshm", "{said}");
        }
    }
    ensure!(docker.exec("other", "cat /common/file")? == "theirs");
    docker.said(["rm", "-f", "other"])?;
    docker.said(["volume", "rm", "common"])?;
    // Namespaces of the host are those of the guest.
    let said = docker.sh(
        &["--pid", "host", "--ipc", "host"],
        "cat /proc/1/comm; test -d /dev/shm && echo shm",
    )?;
    ensure!(said.ends_with("shm") && !said.contains("systemd"), "{said}");
    docker.nothing_is_left()
}

/// Attaching and detaching, `cp`, `top`, `stats` and `update`.
pub(super) fn terminals_and_updates(docker: &Docker) -> Result<()> {
    let options = ["-dit", "--name", "tty", "-m", "256m"];
    stdout(
        docker
            .run(&options, &["sh", "-c", "echo up; exec cat"])
            .output()?,
    )?;
    let count =
        |text: &str| -> Result<usize> { Ok(docker.said(["logs", "tty"])?.matches(text).count()) };
    // Docker's own keys, and others: the container runs on.
    let keys = [
        ("first", &[][..], b"\x10\x11"),
        ("second", &["--detach-keys", "ctrl-x,q"], b"\x18q"),
    ];
    for (text, option, sequence) in keys {
        let attach = docker.docker([&["attach"], option, &["tty"]].concat());
        let mut client = docker.on_terminal(&attach);
        let mut client = client.stdin(Stdio::piped()).stdout(Stdio::null()).spawn()?;
        let mut typed = client.stdin.take().context("a pipe")?;
        // The terminal's echo and cat's own. The client may not be attached yet.
        until("what was typed", || {
            typed.write_all(format!("{text}\n").as_bytes())?;
            std::thread::sleep(std::time::Duration::from_secs(1));
            Ok((count(text)? > 1).then_some(()))
        })?;
        typed.write_all(sequence)?;
        until("the client's end", || Ok(client.try_wait()?))?;
        ensure!(docker.inspect("tty", "{{.State.Status}}")? == "running");
    }
    let exec = docker.docker([
        "exec",
        "-it",
        "tty",
        "sh",
        "-c",
        "sleep 300 & echo here; exit 3",
    ]);
    let (code, text) = ended(&docker.on_terminal(&exec).output()?);
    ensure!(code == Some(3) && text.contains("here"), "{code:?} {text}");
    let said = docker.said([
        "exec",
        "--privileged",
        "tty",
        "grep",
        "CapEff",
        "/proc/self/status",
    ])?;
    ensure!(said.contains(docker.all_capabilities()), "{said}");

    // Directories, into and out of the container, also a tar archive; no mounts remain on the host.
    let mounts = || fs::read_to_string("/proc/self/mounts");
    let before = mounts()?.lines().count();
    let dir = docker.dir.join("directory");
    fs::create_dir_all(dir.join("sub"))?;
    fs::write(dir.join("sub/file"), "copied")?;
    std::os::unix::fs::symlink("sub/file", dir.join("link"))?;
    docker.said([
        "cp".as_ref(),
        "-a".as_ref(),
        dir.as_os_str(),
        "tty:/root/".as_ref(),
    ])?;
    let said = docker.exec(
        "tty",
        "cat /root/directory/link; echo more > /root/directory/sub/more; ls -A /root",
    )?;
    ensure!(said == "copieddirectory", "{said}");
    let back = docker.dir.join("back");
    docker.said([
        "cp".as_ref(),
        "tty:/root/directory".as_ref(),
        back.as_os_str(),
    ])?;
    ensure!(fs::read_to_string(back.join("sub/more"))? == "more\n");
    ensure!(back.join("link").is_symlink());
    let archive = docker
        .docker(["cp", "tty:/root/directory/sub", "-"])
        .output()?
        .stdout;
    ensure!(
        archive.len() > 1024 && archive.len() % 512 == 0,
        "{}",
        archive.len()
    );
    let (code, said) = ended(&docker.docker(["cp", "tty:/nowhere", "-"]).output()?);
    ensure!(code == Some(1), "{said}");
    ensure!(mounts()?.lines().count() == before, "{}", mounts()?);

    let top = docker.said(["top", "tty", "-o", "pid,comm"])?;
    ensure!(top.lines().count() > 1 && top.contains("PID"), "{top}");
    docker.exec("tty", "ping -c 2 -W 20 10.89.0.1")?;
    let format = "{{.Name}} {{.CPUPerc}};{{.NetIO}};{{.PIDs}}";
    let stats = docker.said(["stats", "--no-stream", "--format", format, "tty"])?;
    let fields: Vec<_> = stats.split(';').collect();
    ensure!(
        fields.len() == 3 && fields[0].starts_with("tty ") && fields[0].ends_with('%'),
        "{stats}"
    );
    ensure!(
        !fields[1].starts_with("0B") && !fields[1].ends_with("/ 0B"),
        "{stats}"
    );

    docker.said([
        "update",
        "--cpus",
        "0.25",
        "--cpu-shares",
        "2048",
        "--pids-limit",
        "77",
        "tty",
    ])?;
    docker.said(["update", "--restart", "on-failure:2", "tty"])?;
    let said = docker.exec(
        "tty",
        "cd /sys/fs/cgroup; echo $(cat cpu.max cpu.weight pids.max)",
    )?;
    ensure!(said == "25000 100000 174 77", "{said}");
    // CPUs that the host lacks: the container runs on.
    let (code, said) = ended(
        &docker
            .docker(["update", "--cpuset-cpus", "900", "tty"])
            .output()?,
    );
    ensure!(code == Some(1) && said.contains("900"), "{code:?} {said}");
    ensure!(docker.exec("tty", "nproc")? == "1");
    docker.said(["rename", "tty", "renamed"])?;
    docker.said(["rm", "-f", "renamed"])?;
    docker.nothing_is_left()
}
