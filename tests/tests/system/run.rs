//! `koya run`: streams, exit statuses, signals, terminals, and options of a container.

use crate::calls::with_numbers;
use crate::tool::{
    architecture, feed, koya, run, run_in, saved_image, scratch, sh, shared_rootfs, stdout,
};
use anyhow::{Context, Result, ensure};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcgetattr, tcsetwinsize};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::Stdio;

crate::trials![
    the_kernel_is_koyas,
    the_exit_status_is_passed_through,
    output_and_error_are_apart,
    a_killed_program_is_128_and_the_signal,
    a_program_that_is_not_there_is_127_with_the_reason,
    a_program_that_cannot_run_is_126,
    standard_input_ends,
    signals_are_forwarded,
    two_hundred_mib_survive_both_ways,
    a_terminal_follows_its_size_and_is_restored,
    every_cpu_is_there,
    scalable_vectors_are_there_on_request,
    memory_is_what_was_asked_for,
    environment_directory_user_and_name,
    volumes_and_tmpfs,
    a_read_only_root_stays,
    capabilities_are_few_and_can_be_added,
    a_disk_is_refused,
    host_modules_are_out_of_reach,
    dangerous_system_calls_are_refused,
    a_profile_in_dockers_format_applies,
    a_call_that_a_profile_does_not_know_is_not_there,
    a_read_only_root_gets_its_mount_points,
    a_panic_is_reported_with_its_text,
    an_agent_that_dies_ends_the_machine,
    a_missing_rootfs_is_named,
    an_image_says_how_it_runs,
];

fn the_kernel_is_koyas() -> Result<()> {
    let release = sh(&[], "uname -r")?;
    ensure!(release.ends_with("-koya"), "{release}");
    Ok(())
}

fn the_exit_status_is_passed_through() -> Result<()> {
    for status in [0, 7, 255] {
        let output = run(&[], &["sh", "-c", &format!("exit {status}")])?;
        ensure!(output.status.code() == Some(status), "{:?}", output);
    }
    Ok(())
}

fn output_and_error_are_apart() -> Result<()> {
    let output = run(&[], &["sh", "-c", "echo out; echo err >&2"])?;
    ensure!(output.stdout == b"out\n", "{output:?}");
    ensure!(output.stderr == b"err\n", "{output:?}");
    Ok(())
}

fn a_killed_program_is_128_and_the_signal() -> Result<()> {
    // The first process of a container does not die by its own signal; a child does, and the shell passes on its status.
    let output = run(&[], &["sh", "-c", "sh -c 'kill -9 $$'; exit $?"])?;
    ensure!(output.status.code() == Some(137), "{output:?}");
    Ok(())
}

fn a_program_that_is_not_there_is_127_with_the_reason() -> Result<()> {
    for program in ["nope", "/nope"] {
        let output = run(&[], &[program])?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.code() == Some(127), "{output:?}");
        ensure!(
            said.contains(program) && said.lines().count() == 1,
            "{said}"
        );
    }
    Ok(())
}

fn a_program_that_cannot_run_is_126() -> Result<()> {
    let output = run(&[], &["/etc/passwd"])?;
    ensure!(output.status.code() == Some(126), "{output:?}");
    Ok(())
}

fn standard_input_ends() -> Result<()> {
    let mut command = koya(["run", "-i", "--rootfs"]);
    command.arg(shared_rootfs()).args(["--", "cat"]);
    let output = feed(command, b"three\nlittle\nwords\n")?;
    ensure!(output.stdout == b"three\nlittle\nwords\n", "{output:?}");
    // Without -i, standard input is empty.
    ensure!(sh(&[], "wc -c")? == "0");
    Ok(())
}

fn signals_are_forwarded() -> Result<()> {
    let script = "trap 'echo got it; exit 3' TERM; echo ready; while :; do sleep 0.1; done";
    let mut child = koya(["run", "--rootfs"])
        .arg(shared_rootfs())
        .args(["--", "sh", "-c", script])
        .stdout(Stdio::piped())
        .spawn()?;
    let mut lines = BufReader::new(child.stdout.take().context("a pipe")?).lines();
    ensure!(lines.next().context("output")?? == "ready");
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
    ensure!(lines.next().context("output")?? == "got it");
    ensure!(child.wait()?.code() == Some(3));
    Ok(())
}

/// Incompressible data without repetition: a random block over and over, with a counter in each copy.
fn noise(len: usize) -> Result<Vec<u8>> {
    const BLOCK: usize = 1 << 20;
    let mut block = vec![0; BLOCK];
    File::open("/dev/urandom")?.read_exact(&mut block)?;
    let mut bytes = Vec::with_capacity(len + BLOCK);
    for number in 0u64.. {
        if bytes.len() >= len {
            break;
        }
        block[..8].copy_from_slice(&number.to_le_bytes());
        bytes.extend_from_slice(&block);
    }
    bytes.truncate(len);
    Ok(bytes)
}

fn hash(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect()
}

fn two_hundred_mib_survive_both_ways() -> Result<()> {
    let bytes = noise(200 << 20)?;
    let expected = hash(&bytes);
    let mut command = koya(["run", "-i", "--rootfs"]);
    command.arg(shared_rootfs()).args(["--", "sha256sum"]);
    let inside = stdout(feed(command, &bytes)?)?;
    ensure!(inside.starts_with(&expected), "in: {inside}");

    let dir = scratch("stream")?;
    std::fs::write(dir.join("noise"), &bytes)?;
    let volume = format!("{}:/data:ro", dir.display());
    let output = run(&["-v", &volume], &["cat", "/data/noise"])?;
    ensure!(
        output.status.success() && hash(&output.stdout) == expected,
        "out"
    );
    Ok(())
}

fn a_terminal_follows_its_size_and_is_restored() -> Result<()> {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let size = |rows, columns| Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    tcsetwinsize(&master, size(33, 77))?;
    let path = ptsname(&master, Vec::new())?;
    let open = || -> Result<File> {
        Ok(File::options()
            .read(true)
            .write(true)
            .open(path.to_str()?)?)
    };
    let before = tcgetattr(&master)?;
    // setsid makes the terminal the command's controlling terminal, for SIGWINCH.
    let mut child = std::process::Command::new("setsid")
        .args(["--ctty", "--wait", "koya", "run", "-it", "--rootfs"])
        .arg(shared_rootfs())
        .args([
            "--",
            "sh",
            "-c",
            "stty size; read x; stty size; tty; exit 5",
        ])
        .stdin(open()?)
        .stdout(open()?)
        .stderr(open()?)
        .spawn()?;
    let again = File::from(rustix::io::dup(&master)?);
    let mut terminal = BufReader::new(File::from(master));
    let mut line = |wanted: &str| -> Result<()> {
        loop {
            let mut text = String::new();
            ensure!(terminal.read_line(&mut text)? > 0, "no {wanted:?}");
            if text.trim() == wanted {
                return Ok(());
            }
        }
    };
    line("33 77")?;
    tcsetwinsize(&again, size(44, 99))?;
    // Time for the new size to arrive before the reply.
    std::thread::sleep(std::time::Duration::from_millis(500));
    (&again).write_all(b"\n")?;
    line("44 99")?;
    line("/dev/pts/0")?;
    ensure!(child.wait()?.code() == Some(5));
    let after = tcgetattr(&again)?;
    ensure!(before.local_modes == after.local_modes, "not restored");
    Ok(())
}

fn every_cpu_is_there() -> Result<()> {
    for cpus in ["1", "4"] {
        ensure!(sh(&["--cpus", cpus], "nproc")? == cpus);
    }
    // A single emulated CPU cannot start 32 CPUs of arm64 within the agent's time limit. The seventeenth is the first of the
    // second cluster there.
    let emulated = std::env::var("KOYA_RIG").is_ok_and(|rig| rig == "emulated");
    let arm = architecture() == "arm64";
    // Whatever else it finds.
    let few = arm && String::from_utf8(koya(["check"]).output()?.stdout)?.contains("GICv2");
    let many = match emulated && arm {
        _ if few => "8",
        true => "17",
        false => "32",
    };
    let all = sh(
        &["--cpus", many, "--memory", "1g"],
        "nproc; grep -c ^processor /proc/cpuinfo",
    )?;
    ensure!(all == format!("{many}\n{many}"), "{all}");
    if few {
        for options in [["--cpus", "9"], ["--cpus-max", "9"]] {
            let output = run(&options, &["true"])?;
            let said = String::from_utf8_lossy(&output.stderr);
            ensure!(output.status.code() == Some(125), "{output:?}");
            let reason =
                "up to 8 CPUs, since its interrupt controller is a GICv2, 9 were asked for";
            ensure!(said.contains(reason) && said.lines().count() == 1, "{said}");
        }
    }
    Ok(())
}

fn scalable_vectors_are_there_on_request() -> Result<()> {
    let find = ["grep", "-w", "-m", "1", "sve", "/proc/cpuinfo"];
    ensure!(run(&[], &find)?.stdout.is_empty());
    let output = run(&["--sve"], &find)?;
    let host = std::fs::read_to_string("/proc/cpuinfo")?;
    if host.split_whitespace().any(|word| word == "sve") {
        ensure!(output.status.success(), "{output:?}");
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.code() == Some(125) && said.contains("`sve` on "),
        "{output:?}"
    );
    Ok(())
}

fn memory_is_what_was_asked_for() -> Result<()> {
    let total: u64 = sh(
        &["--memory", "512m"],
        "awk '/MemTotal/ {print $2}' /proc/meminfo",
    )?
    .parse()?;
    ensure!((440 << 10..=520 << 10).contains(&total), "{total} KiB");
    // Beyond the hole below 4 GiB.
    let total: u64 = sh(
        &["--memory", "5g"],
        "awk '/MemTotal/ {print $2}' /proc/meminfo",
    )?
    .parse()?;
    ensure!(total > 4800 << 10, "{total} KiB");
    Ok(())
}

fn environment_directory_user_and_name() -> Result<()> {
    let options = [
        "--env",
        "A=1 2",
        "--workdir",
        "/tmp",
        "--user",
        "web",
        "--hostname",
        "box",
    ];
    let all = sh(
        &options,
        "echo $A; pwd; id -u; id -g; id -G; hostname; echo $HOME",
    )?;
    ensure!(all == "1 2\n/tmp\n33\n33\n33 40\nbox\n/tmp", "{all}");
    let output = run(&["--user", "nobody"], &["true"])?;
    ensure!(output.status.code() == Some(125), "{output:?}");
    Ok(())
}

fn volumes_and_tmpfs() -> Result<()> {
    let dir = scratch("volume")?;
    std::fs::write(dir.join("in"), "from the host")?;
    let writable = format!("{}:/data", dir.display());
    let read_only = format!("{}:/mnt:ro", dir.display());
    let said = sh(
        &["-v", &writable, "-v", &read_only, "--tmpfs", "/tmp"],
        "cat /data/in; echo; echo from the guest > /data/out; cat /mnt/out; \
         touch /mnt/x 2>&1; stat -f -c %T /tmp",
    )?;
    ensure!(
        said.starts_with("from the host\nfrom the guest\n") && said.ends_with("tmpfs"),
        "{said}"
    );
    ensure!(said.contains("Read-only file system"), "{said}");
    ensure!(std::fs::read_to_string(dir.join("out"))? == "from the guest\n");
    Ok(())
}

fn a_read_only_root_stays() -> Result<()> {
    let output = run(&["--read-only"], &["touch", "/new"])?;
    ensure!(output.status.code() == Some(1), "{output:?}");
    ensure!(!shared_rootfs().join("new").exists());
    Ok(())
}

fn capabilities_are_few_and_can_be_added() -> Result<()> {
    let effective = |options: &[&str]| -> Result<u64> {
        let text = sh(options, "awk '/CapEff/ {print $2}' /proc/self/status")?;
        Ok(u64::from_str_radix(&text, 16)?)
    };
    const SYS_ADMIN: u64 = 1 << 21;
    const NET_ADMIN: u64 = 1 << 12;
    let usual = effective(&[])?;
    ensure!(
        usual.count_ones() == 14 && usual & (SYS_ADMIN | NET_ADMIN) == 0,
        "{usual:x}"
    );
    ensure!(effective(&["--cap-add", "net_admin"])? == usual | NET_ADMIN);
    ensure!(effective(&["--privileged"])? & SYS_ADMIN != 0);
    let web = effective(&["--user", "web"])?;
    ensure!(web == 0, "{web:x}");
    Ok(())
}

/// libcontainer's pure cgroup v2 accepts device rules and ignores them: they are implemented here.
fn a_disk_is_refused() -> Result<()> {
    let rootfs = scratch("devices")?;
    crate::tool::busybox(&rootfs)?;
    let script = "mknod /tmp/disk b 7 0 && dd if=/tmp/disk of=/dev/null count=1; echo $?; \
                  mknod /tmp/kmsg c 1 11 && cat /tmp/kmsg; echo $?; \
                  head -c 4 /dev/zero | wc -c; echo x > /dev/null && echo $?";
    let output = run_in(&rootfs, &[], &["sh", "-c", script])?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let refused = said.matches("Operation not permitted").count();
    ensure!(
        refused == 2 && output.stdout == b"1\n1\n4\n0\n",
        "{output:?}"
    );
    Ok(())
}

fn host_modules_are_out_of_reach() -> Result<()> {
    let said = sh(
        &["--privileged"],
        "lsmod 2>/dev/null | grep -c kvm; rmmod kvm_amd 2>/dev/null; echo $?; uname -r",
    )?;
    let lines: Vec<&str> = said.lines().collect();
    ensure!(
        lines.len() == 3 && lines[0] == "0" && lines[1] == "1",
        "{said}"
    );
    ensure!(lines[2].ends_with("-koya"), "{said}");
    // Kernels for arm64 have KVM built in.
    if architecture() == "amd64"
        && let Ok(modules) = std::fs::read_to_string("/proc/modules")
    {
        ensure!(modules.contains("kvm"), "the host still has its modules");
    }
    Ok(())
}

fn dangerous_system_calls_are_refused() -> Result<()> {
    let seccomp = sh(&[], "awk '/^Seccomp:/ {print $2}' /proc/self/status")?;
    ensure!(seccomp == "2", "{seccomp}");
    let free = sh(
        &["--privileged"],
        "awk '/^Seccomp:/ {print $2}' /proc/self/status",
    )?;
    ensure!(free == "0", "{free}");
    Ok(())
}

fn a_panic_is_reported_with_its_text() -> Result<()> {
    let output = run(
        &["--privileged"],
        &["sh", "-c", "echo c > /proc/sysrq-trigger; sleep 60"],
    )?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.code() == Some(125), "{output:?}");
    ensure!(
        said.contains("guest kernel panic") && said.contains("sysrq"),
        "{said}"
    );
    Ok(())
}

fn an_agent_that_dies_ends_the_machine() -> Result<()> {
    let dir = scratch("agent")?;
    std::fs::write(dir.join("file"), "")?;
    let output = run(&["--kernel-args", "quiet rdinit=/nowhere"], &["true"])?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.code() == Some(125), "{output:?}");
    ensure!(said.contains("the virtual machine ended"), "{said}");
    Ok(())
}

fn a_missing_rootfs_is_named() -> Result<()> {
    let output = run_in("/nonexistent/root".as_ref(), &[], &["true"])?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(
        output.status.code() == Some(125) && said.contains("/nonexistent/root"),
        "{said}"
    );
    Ok(())
}

/// An image in the format of `docker save`, created by hand.
fn an_image_says_how_it_runs() -> Result<()> {
    let dir = scratch("image")?;
    let config = serde_json::json!({"architecture": architecture(), "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": []},
        "config": {"Entrypoint": ["sh", "-c"], "Cmd": ["echo $GREETING; id -u; pwd"],
        "Env": ["GREETING=hello", "PATH=/bin"], "User": "web", "WorkingDir": "/tmp"}});
    let image = saved_image(&dir, None, |_| config.to_string())?;
    let run = |options: &[&str], command: &[&str]| -> Result<String> {
        let mut all = koya(["run", "--image"]);
        all.arg(&image).args(options).arg("--").args(command);
        stdout(all.output()?)
    };
    ensure!(run(&[], &[])? == "hello\n33\n/tmp");
    ensure!(
        run(
            &["-e", "GREETING=bye", "-u", "0"],
            &["echo $GREETING; id -u"]
        )? == "bye\n0"
    );
    ensure!(run(&["--entrypoint", "uname"], &["-r"])?.ends_with("-koya"));
    let containers = std::fs::read_dir("/var/lib/koya/containers")?;
    let left = containers.filter(|c| c.as_ref().is_ok_and(|c| c.path().join("root").exists()));
    ensure!(left.count() == 0, "root file systems are left");
    Ok(())
}

/// podman's default profile, which is Docker's with another default action.
fn a_profile_in_dockers_format_applies() -> Result<()> {
    let script = r#"
        open(S, '<', '/proc/self/status'); print grep { /^(Seccomp|NoNewPrivs):/ } <S>;
        sub try_call { my ($n, @a) = @_; syscall($n, @a) == -1 ? $! + 0 : 0 }
        # personality: PER_LINUX is allowed, PER_BSD gets the default answer, ENOSYS; userfaultfd has an
        # answer of its own, EPERM.
        print join(' ', map { try_call(@$_) } [SYS_personality, 0], [SYS_personality, 6], [SYS_userfaultfd, 1]), "\n";"#;
    let script = with_numbers(script);
    let run = |options: &[&str]| -> Result<String> {
        let all = [&["--read-only"], options].concat();
        stdout(run_in(Path::new("/"), &all, &["perl", "-e", &script])?)
    };
    let profile = "seccomp=/usr/share/containers/seccomp.json";
    let said = run(&[
        "--security-opt",
        profile,
        "--security-opt",
        "no-new-privileges",
    ])?;
    let lines: Vec<&str> = said.lines().collect();
    ensure!(lines[..2] == ["NoNewPrivs:\t1", "Seccomp:\t2"], "{said}");
    ensure!(lines[2] == "0 38 1", "{said}");
    let said = run(&["--security-opt", "seccomp=unconfined"])?;
    ensure!(
        said.contains("Seccomp:\t0") && said.ends_with("0 0 0"),
        "{said}"
    );
    Ok(())
}

/// moby/moby 42680 and others: profiles answer EPERM to unknown system calls, where C libraries would fall back on ENOSYS. A
/// process may do the same with such a profile and without.
fn a_call_that_a_profile_does_not_know_is_not_there() -> Result<()> {
    let text = std::fs::read("/usr/share/containers/seccomp.json")?;
    let mut profile: serde_json::Value = serde_json::from_slice(&text)?;
    let default = profile.as_object_mut().context("no profile")?;
    default.remove("defaultErrnoRet");
    default.remove("defaultErrno");
    let file = scratch("unknown-calls")?.join("profile.json");
    std::fs::write(&file, profile.to_string())?;
    let script = r#"
        sub try_call { my ($n, @a) = @_; syscall($n, @a) == -1 ? $! + 0 : 0 }
        # personality: PER_BSD is not among those that are allowed.
        print join(' ', map { try_call(@$_) } [SYS_personality, 6], [1000]), "\n";
        open(S, '<', '/proc/self/status'); print grep { /^(Uid|Cap|NoNewPrivs)/ } <S>;"#;
    let script = with_numbers(script);
    let profile = format!("seccomp={}", file.display());
    for options in [&[][..], &["-u", "1000"], &["--cap-add", "CAP_SYS_ADMIN"]] {
        let run = |more: &[&str]| -> Result<(String, String)> {
            let all = [&["--read-only"], options, more].concat();
            let said = stdout(run_in(Path::new("/"), &all, &["perl", "-e", &script])?)?;
            let (calls, status) = said.split_once('\n').context("nothing was said")?;
            Ok((calls.to_owned(), status.to_owned()))
        };
        let (calls, status) = run(&["--security-opt", &profile])?;
        ensure!(calls == "1 38", "{options:?}: {calls}");
        let (calls, free) = run(&["--security-opt", "seccomp=unconfined"])?;
        ensure!(calls == "0 38", "{options:?}: {calls}");
        ensure!(status == free, "{options:?}: {status} is not {free}");
    }
    Ok(())
}

fn a_read_only_root_gets_its_mount_points() -> Result<()> {
    let root = scratch("read-only")?;
    crate::tool::busybox(&root)?;
    std::fs::remove_dir(root.join("tmp"))?;
    let options = [
        "--read-only",
        "--tmpfs",
        "/tmp",
        "-v",
        "/etc/hostname:/opt/name:ro",
    ];
    let script = "echo x > /tmp/x && cat /opt/name; touch /new 2>/dev/null || echo refused";
    let said = stdout(run_in(&root, &options, &["sh", "-c", script])?)?;
    ensure!(
        said.ends_with("refused") && root.join("opt/name").is_file(),
        "{said}"
    );
    Ok(())
}
