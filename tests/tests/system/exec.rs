//! More than one process in a container.

use crate::tool::{Background, feed, koya, stdout};
use anyhow::{Context, Result, ensure};

crate::trials![
    a_process_joins_the_container,
    an_exec_is_as_its_container_and_ends_with_its_process,
    quick_execs_leave_nothing,
    an_exec_has_the_containers_confinement,
    two_hundred_execs_at_once_have_their_own_output,
    a_container_with_no_process_left_is_entered_and_stopped,
    a_container_with_control_groups_of_its_own_is_entered,
    a_megabyte_of_arguments_and_environment_arrives,
];

fn a_process_joins_the_container() -> Result<()> {
    let container = Background::start("exec-joins", &["--hostname", "inside"], &["sleep", "1000"])?;
    let said = stdout(container.exec(
        &["-u", "web", "-e", "X=y"],
        &[
            "sh",
            "-c",
            "hostname; id -u; echo $X; ps | grep -c 'sleep 1000'",
        ],
    )?)?;
    ensure!(said.starts_with("inside\n33\ny\n"), "{said}");
    let output = container.exec(&[], &["sh", "-c", "echo e >&2; exit 9"])?;
    ensure!(
        output.status.code() == Some(9) && output.stderr == b"e\n",
        "{output:?}"
    );
    let output = container.exec(&[], &["nope"])?;
    ensure!(output.status.code() == Some(127), "{output:?}");
    let mut command = koya(["exec", "-i", "exec-joins", "cat"]);
    command.stdin(std::process::Stdio::piped());
    let output = feed(command, b"through")?;
    ensure!(output.stdout == b"through", "{output:?}");
    Ok(())
}

fn an_exec_is_as_its_container_and_ends_with_its_process() -> Result<()> {
    let options = [
        "--user",
        "web",
        "--env",
        "A=1",
        "--env",
        "B=1",
        "--workdir",
        "/tmp",
    ];
    let container = Background::start("exec-as", &options, &["sleep", "1000"])?;
    let said = stdout(container.exec(&["-e", "B=2"], &["sh", "-c", "id -u; pwd; echo $A$B"])?)?;
    ensure!(said == "33\n/tmp\n12", "{said}");
    // A background process holds the output open, and nothing waits for it.
    let said = stdout(container.exec(&[], &["sh", "-c", "sleep 500 & echo done"])?)?;
    ensure!(said == "done", "{said}");
    // Without `-i`, standard input is not read; a terminal requires it.
    let mut child = std::process::Command::new("sh")
        .args(["-c", "koya exec exec-as true; cat"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()?;
    std::io::Write::write_all(&mut child.stdin.take().context("a pipe")?, b"untouched")?;
    ensure!(child.wait_with_output()?.stdout == b"untouched");
    let refused = container.exec(&["-it"], &["true"])?;
    let why = String::from_utf8_lossy(&refused.stderr);
    ensure!(
        refused.status.code() == Some(125) && why.contains("terminal"),
        "{why}"
    );
    let refused = container.exec(&["-w", "/nowhere"], &["true"])?;
    let why = String::from_utf8_lossy(&refused.stderr);
    ensure!(
        refused.status.code() == Some(126) && why.contains("working directory /nowhere"),
        "{refused:?}"
    );
    // An added process ends with the container, and its command returns the status.
    let mut added = koya(["exec", "exec-as", "sh", "-c", "echo up; sleep 500"])
        .stdout(std::process::Stdio::piped())
        .spawn()?;
    let mut up = [0; 3];
    std::io::Read::read_exact(added.stdout.as_mut().context("a pipe")?, &mut up)?;
    stdout(koya(["stop", "-t", "0", "exec-as"]).output()?)?;
    let status = added.wait()?;
    ensure!(status.code() == Some(137), "{status:?}");
    Ok(())
}

/// Host resources of a process: descriptors, threads, and anonymous memory.
fn held(pid: u32) -> Result<(usize, usize, u64)> {
    let count = |dir: &str| -> Result<usize> {
        Ok(std::fs::read_dir(format!("/proc/{pid}/{dir}"))?.count())
    };
    let rollup = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let anonymous = rollup
        .lines()
        .find_map(|l| l.strip_prefix("RssAnon:"))
        .and_then(|l| l.split_whitespace().next()?.parse().ok())
        .context("RssAnon")?;
    Ok((count("fd")?, count("task")?, anonymous))
}

fn quick_execs_leave_nothing() -> Result<()> {
    let rounds: usize = std::env::var("KOYA_TEST_EXECS").map_or(Ok(50), |n| n.parse())?;
    let container = Background::start("exec-many", &[], &["sleep", "100000"])?;
    let inside = || -> Result<(usize, usize)> {
        let text = stdout(container.exec(
            &[],
            &[
                "sh",
                "-c",
                "ls /proc | grep -c '^[0-9]'; awk '/MemAvailable/ {print $2}' /proc/meminfo",
            ],
        )?)?;
        let (processes, memory) = text.split_once('\n').context("two lines")?;
        Ok((processes.parse()?, memory.parse()?))
    };
    // The first rounds fill caches on both sides.
    for _ in 0..20 {
        stdout(container.exec(&[], &["true"])?)?;
    }
    // The guest caches inodes, and the host keeps a descriptor for each: so all files are accessed once before the count.
    inside()?;
    let (processes, available) = inside()?;
    let pid = container.pid()?;
    let (fds, threads, memory) = held(pid)?;
    for _ in 0..rounds {
        stdout(container.exec(&[], &["true"])?)?;
    }
    let after = crate::tool::until("threads and descriptors go back", || {
        let now = held(pid)?;
        Ok((now.0 <= fds && now.1 <= threads).then_some(now))
    })?;
    let (processes_after, available_after) = inside()?;
    ensure!(
        processes_after == processes,
        "{processes} processes, then {processes_after}"
    );
    // The process's memory includes the guest's, which stays allocated once touched.
    let grown = after.2.saturating_sub(memory);
    ensure!(
        grown < 24 << 10,
        "the host's memory grew by {grown} KiB over {rounds} execs"
    );
    let lost = available.saturating_sub(available_after);
    ensure!(
        lost < 12 << 10,
        "the guest lost {lost} KiB over {rounds} execs"
    );
    Ok(())
}

fn an_exec_has_the_containers_confinement() -> Result<()> {
    let container = Background::start("exec-confined", &[], &["sleep", "1000"])?;
    let script = "awk '/CapEff|^Seccomp:/ {print $2}' /proc/self/status";
    let said = stdout(container.exec(&[], &["sh", "-c", script])?)?;
    ensure!(said == "00000000a80425fb\n2", "{said}");
    Ok(())
}

fn two_hundred_execs_at_once_have_their_own_output() -> Result<()> {
    const EXECS: usize = 200;
    let container = Background::start("exec-burst", &["--memory", "1g"], &["sleep", "100000"])?;
    let mut children = Vec::new();
    for number in 0..EXECS {
        let script = format!("echo out {number}; echo error {number} >&2");
        let child = koya(["exec", &container.name, "sh", "-c", &script])
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .spawn()?;
        children.push((number, child));
    }
    for (number, child) in children {
        let output = child.wait_with_output()?;
        let said = [&output.stdout, &output.stderr].map(|said| String::from_utf8_lossy(said));
        let expected = [format!("out {number}\n"), format!("error {number}\n")];
        ensure!(
            output.status.success() && said == expected,
            "{number}: {output:?}"
        );
    }
    Ok(())
}

/// Processes that fork until the guest's limit is reached, and keep trying.
fn a_container_with_no_process_left_is_entered_and_stopped() -> Result<()> {
    // One try every 30 seconds: an emulated CPU is slow.
    let bomb = "while (1) { fork // select(undef, undef, undef, 30) }";
    // The guest kernel has a limit of 1000.
    let options = [
        "--memory",
        "512m",
        "--kernel-args",
        "quiet sysctl.kernel.pid_max=1000",
    ];
    let mut command = koya(["run", "-d", "--name", "exec-bomb", "--rootfs", "/"]);
    command
        .args(["--read-only", "--tmpfs", "/tmp"])
        .args(options);
    stdout(command.args(["--", "perl", "-e", bomb]).output()?)?;
    let container = Background {
        name: "exec-bomb".into(),
    };
    crate::tool::until("the container has all the processes that it gets", || {
        let stats = stdout(koya(["stats", "--json", &container.name]).output()?)?;
        let stats: serde_json::Value = serde_json::from_str(&stats)?;
        let processes = stats[0]["processes"].as_u64().context("processes")?;
        Ok((processes > 700).then_some(()))
    })?;
    for _ in 0..3 {
        let said = stdout(container.exec(&[], &["/bin/echo", "entered"])?)?;
        ensure!(said == "entered", "{said}");
    }
    let started = std::time::Instant::now();
    stdout(koya(["stop", "-t", "1", &container.name]).output()?)?;
    let took = started.elapsed();
    ensure!(took < std::time::Duration::from_secs(60), "{took:?}");
    let listed = stdout(koya(["ps", "--all"]).output()?)?;
    let mut lines = listed.lines();
    let line = lines.find(|line| line.starts_with(&container.name));
    // The first process ignores SIGTERM and ends by SIGKILL: not with its machine, which would be 125.
    ensure!(line.context("listed")?.contains("exited (137)"), "{listed}");
    Ok(())
}

/// As in docker:dind and with systemd.
fn a_container_with_control_groups_of_its_own_is_entered() -> Result<()> {
    let container = Background::start("exec-nested", &["--privileged"], &["sleep", "1000"])?;
    let script = "cd /sys/fs/cgroup && mkdir -p init/deeper other \
        && while read pid; do echo $pid > init/cgroup.procs || true; done < cgroup.procs 2>/dev/null; \
        echo +memory +pids > cgroup.subtree_control && cat cgroup.subtree_control";
    // The shell itself is moved too; processes added meanwhile are moved by the next try.
    crate::tool::until("the container has enabled controllers", || {
        let said = container.exec(&[], &["sh", "-c", script])?;
        let controllers = String::from_utf8_lossy(&said.stdout).into_owned();
        Ok(controllers.contains("memory").then_some(()))
    })?;
    for options in [&[][..], &["-u", "web"]] {
        let said = stdout(container.exec(options, &["cat", "/proc/self/cgroup"])?)?;
        ensure!(said == "0::/init", "{said}");
    }
    // It still belongs to the container: stopped, counted and ended with it.
    stdout(container.exec(&[], &["sh", "-c", "sleep 2000 & echo started"])?)?;
    let stats = stdout(koya(["stats", "--json", &container.name]).output()?)?;
    let stats: serde_json::Value = serde_json::from_str(&stats)?;
    ensure!(stats[0]["processes"].as_u64() >= Some(2), "{stats}");
    stdout(koya(["stop", "-t", "1", &container.name]).output()?)?;
    Ok(())
}

fn a_megabyte_of_arguments_and_environment_arrives() -> Result<()> {
    let container = Background::start("exec-long", &[], &["sleep", "1000"])?;
    // The kernel's limit for a single argument is 128 KiB, including its terminator.
    let long = "x".repeat((128 << 10) - 16);
    let mut command = koya(["exec", "-e"]);
    command.arg(format!("LONG={long}")).arg(&container.name);
    let script = "n=0; for one; do n=$((n + ${#one})); done; echo $# $n ${#LONG}";
    command
        .args(["sh", "-c", script, "sh"])
        .args(vec![&long; 8]);
    let said = stdout(command.output()?)?;
    ensure!(
        said == format!("8 {} {}", 8 * long.len(), long.len()),
        "{said}"
    );
    Ok(())
}
