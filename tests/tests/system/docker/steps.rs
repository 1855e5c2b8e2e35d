//! What people try first with containers in virtual machines.

use super::Docker;
use crate::tool::stdout;
use anyhow::{Context, Result, ensure};
use std::fs;
use std::process::Command;

/// The kernel, a memory limit, a terminal, a container in the background, and the host's files with all privileges.
pub(super) fn first_steps(docker: &Docker) -> Result<()> {
    let of_the_host = stdout(Command::new("uname").arg("-r").output()?)?;
    let own = docker.sh(&[], "uname -r")?;
    ensure!(own != of_the_host && own.contains("koya"), "{own}");

    let said = docker.sh(&["-m", "256m"], "ls /; cat /sys/fs/cgroup/memory.max")?;
    let lines: Vec<_> = said.lines().collect();
    ensure!(lines.contains(&"bin"), "{said}");
    ensure!(lines.last() == Some(&"268435456"), "{said}");

    let script = format!("{}stty size", docker.until_sized());
    let shell = docker.run(&["--rm", "-it"], &["sh", "-c", &script]);
    let said = stdout(docker.on_terminal(&shell).output()?)?;
    // The terminal may echo the end of its own input first.
    ensure!(said.ends_with("33 77"), "{said:?}");

    let script = "trap 'echo bye; exit 0' TERM; echo up; while :; do sleep 1; done";
    stdout(
        docker
            .run(&["-d", "--name", "steps"], &["sh", "-c", script])
            .output()?,
    )?;
    let running = docker.said(["ps", "--format", "{{.Names}} {{.Image}}"])?;
    ensure!(running == format!("steps {}", super::IMAGE), "{running}");
    let in_it = docker.exec("steps", "uname -r; hostname")?;
    ensure!(in_it.starts_with(&own), "{in_it}");
    docker.said(["stop", "--time", "60", "steps"])?;
    ensure!(docker.said(["logs", "steps"])? == "up\nbye");
    ensure!(docker.inspect("steps", "{{.State.ExitCode}}")? == "0");
    docker.said(["rm", "steps"])?;

    let modules = || fs::read_to_string("/proc/modules");
    let before = modules()?;
    let name = before.split_whitespace().next().context("no modules")?;
    let script = format!(
        "test -d /hostFS/etc && echo files; lsmod | grep -c '^{name} '; rmmod {name}; true"
    );
    let said = docker.sh(&["--privileged", "-v", "/:/hostFS"], &script)?;
    ensure!(said.starts_with("files\n0"), "{said}");
    ensure!(
        modules()?.lines().count() == before.lines().count(),
        "the host's modules were changed"
    );
    docker.nothing_is_left()
}
