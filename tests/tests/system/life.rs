//! Life cycle of a container on the host: processes and files while it runs, and afterwards.

use crate::tool::{Background, koya, run, scratch, shared_rootfs, stdout, until};
use anyhow::{Context, Result, ensure};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

crate::trials![
    one_process_a_sandbox,
    no_root_is_needed,
    a_user_has_users,
    nothing_is_left_after_the_end,
    nothing_is_left_after_a_kill,
    a_detached_container_is_listed_logged_stopped_removed,
    a_detached_container_whose_machine_dies_says_so,
    a_detached_container_that_cannot_start_has_its_status,
    a_sandbox_that_hangs_is_stopped_after_the_limit,
    check_says_that_this_kvm_will_do,
    an_embedders_example_boots,
    the_readmes_five_lines_run,
];

/// Everything that a sandbox could leave: mounts, state files, processes.
fn traces() -> Result<(String, BTreeSet<String>, usize)> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    let files = std::fs::read_dir("/var/lib/koya/containers")
        .map(|d| {
            d.filter_map(|e| Some(e.ok()?.file_name().to_string_lossy().into_owned()))
                .collect()
        })
        .unwrap_or_default();
    Ok((mounts, files, processes("koya")?.len()))
}

/// PIDs of processes with this name.
fn processes(name: &str) -> Result<Vec<u32>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")?.filter_map(|e| e.ok()) {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>() else {
            continue;
        };
        let comm = std::fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        if comm.trim() == name {
            found.push(pid);
        }
    }
    Ok(found)
}

fn children(pid: u32) -> Result<String> {
    let mut all = String::new();
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))?.filter_map(|e| e.ok()) {
        all.push_str(&std::fs::read_to_string(task.path().join("children")).unwrap_or_default());
    }
    Ok(all)
}

fn one_process_a_sandbox() -> Result<()> {
    let container = Background::start("life-one", &["--cpus", "2"], &["sleep", "1000"])?;
    let pid = container.pid()?;
    ensure!(children(pid)?.trim().is_empty(), "{}", children(pid)?);
    Ok(())
}

/// koya, run by a user of the host with access to /dev/kvm.
pub(crate) fn koya_as(user: u32, home: &Path) -> Command {
    let user = user.to_string();
    let mut command = Command::new("setpriv");
    command
        .args(["--reuid", &user, "--regid", &user, "--clear-groups", "koya"])
        .env("HOME", home)
        .env_remove("XDG_DATA_HOME")
        .env_remove("XDG_RUNTIME_DIR");
    command
}

/// A user with access to /dev/kvm: root in the container, itself on the host.
fn no_root_is_needed() -> Result<()> {
    const USER: u32 = 65534;
    let home = scratch("user")?;
    std::os::unix::fs::chown(&home, Some(USER), Some(USER))?;
    let as_user = |arguments: &[&str]| -> Result<String> {
        stdout(koya_as(USER, &home).args(arguments).output()?)
    };
    let rootfs = shared_rootfs().to_string_lossy();
    let volume = format!("{}:/data", home.display());
    let script = "id -u; echo text > /data/file; mkdir /data/dir; ln -s file /data/link; \
                  (umask 333; echo once > /data/once); \
                  chmod 4750 /data/file; cat /data/link; touch /etc/new 2>/dev/null || echo refused";
    let said = as_user(&[
        "run", "--rootfs", &rootfs, "-v", &volume, "--", "sh", "-c", script,
    ])?;
    ensure!(said == "0\ntext\nrefused", "{said}");
    use std::os::unix::fs::MetadataExt;
    let file = home.join("file").metadata()?;
    // No file on the host is set-user-ID.
    ensure!(
        (file.uid(), file.mode() & 0o7777) == (USER, 0o750),
        "{file:?}"
    );
    ensure!(std::fs::read_to_string(home.join("once"))? == "once\n");
    ensure!(as_user(&["ps", "--json"])? == "[]", "nothing runs any more");
    ensure!(as_user(&["timeline"])?.contains("\nkernel "), "no timeline");
    Ok(())
}

/// A container of an unprivileged user has several users: owners, device nodes and modes persist.
fn a_user_has_users() -> Result<()> {
    const USER: u32 = 65534;
    let home = scratch("users")?;
    let rootfs = home.join("rootfs");
    let mut copy = Command::new("cp");
    stdout(copy.arg("-a").arg(shared_rootfs()).arg(&rootfs).output()?)?;
    let owner = format!("{USER}:{USER}");
    stdout(
        Command::new("chown")
            .args(["-hR", &owner])
            .arg(&home)
            .output()?,
    )?;
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    // As in Fedora's images.
    std::fs::set_permissions(rootfs.join("bin"), std::fs::Permissions::from_mode(0o555))?;
    let as_user = |options: &[&str], script: &str| -> Result<String> {
        let mut command = koya_as(USER, &home);
        command.args(["run", "--rootfs"]).arg(&rootfs).args(options);
        stdout(command.args(["--", "sh", "-c", script]).output()?)
    };
    let said = as_user(
        &[],
        "set -e; stat -c %u:%g /bin; mkdir -m 700 /private; echo secret > /private/text; chown -R 33:44 /private; \
         echo run > /program; chmod 6711 /program; mknod -m 666 /null c 1 3; echo gone > /null; \
         mkfifo /pipe; (echo through > /pipe &); cat /pipe; touch /bin/x; ln -s x /link; chown -h 5 /link; \
         stat -c '%u:%g %a' /private/text /program; stat -c '%F %t,%T' /null",
    )?;
    ensure!(
        said == "0:0\nthrough\n33:44 644\n0:0 6711\ncharacter special file 1,3",
        "{said}"
    );
    // Later, in another container.
    let said = as_user(
        &["--user", "33:44"],
        "id -u; cat /private/text; echo more >> /private/text && wc -l < /private/text; touch /new 2>&1; \
         echo gone > /null && cat /null; find / -xdev -maxdepth 1 -type c",
    )?;
    ensure!(
        said == "33\nsecret\n2\ntouch: /new: Permission denied\n/null",
        "{said}"
    );
    let said = as_user(
        &["--user", "34:44"],
        "cat /private/text 2>&1; cat /program 2>&1; true",
    )?;
    ensure!(said.matches("Permission denied").count() == 2, "{said}");
    for name in ["private/text", "program", "null", "pipe"] {
        let data = rootfs.join(name).symlink_metadata()?;
        ensure!(
            data.uid() == USER && data.is_file() && data.mode() & 0o6000 == 0,
            "{name}: {data:?}"
        );
    }
    Ok(())
}

fn nothing_is_left_after_the_end() -> Result<()> {
    let mounts = traces()?.0;
    let name = "life-end";
    stdout(run(&["--name", name], &["true"])?)?;
    let (after, files, _) = traces()?;
    ensure!(mounts == after, "mounts: {after}");
    ensure!(!files.contains(name), "{files:?}");
    Ok(())
}

fn nothing_is_left_after_a_kill() -> Result<()> {
    let mounts = traces()?.0;
    let volume = scratch("killed")?;
    let option = format!("{}:/data", volume.display());
    let mut child = koya(["run", "--name", "life-kill", "-v", &option, "--rootfs"])
        .arg(shared_rootfs())
        .args(["--", "sh", "-c", "echo up > /data/up; sleep 1000"])
        .spawn()?;
    until("the container runs", || {
        Ok(volume.join("up").exists().then_some(()))
    })?;
    child.kill()?;
    child.wait()?;
    // Any next command cleans up.
    stdout(koya(["ps"]).output()?)?;
    let (after, files, _) = traces()?;
    ensure!(mounts == after, "mounts: {after}");
    ensure!(!files.contains("life-kill"), "{files:?}");
    Ok(())
}

fn a_detached_container_is_listed_logged_stopped_removed() -> Result<()> {
    let name = "life-detached";
    let script =
        "trap 'echo bye; echo gone >&2; exit 4' TERM; echo hello; while :; do sleep 0.1; done";
    let container = Background::start(name, &[], &["sh", "-c", script])?;
    let listed = stdout(koya(["ps"]).output()?)?;
    ensure!(
        listed.contains(name) && listed.contains("running"),
        "{listed}"
    );
    until("the log", || {
        let log = stdout(koya(["logs", name]).output()?)?;
        Ok((log == "hello").then_some(()))
    })?;
    let busy = koya(["rm", name]).output()?;
    ensure!(busy.status.code() == Some(125), "{busy:?}");
    // The container has ended when the command returns.
    stdout(koya(["stop", name]).output()?)?;
    let listed = stdout(koya(["ps", "--all"]).output()?)?;
    let line = listed.lines().find(|l| l.starts_with(name));
    ensure!(line.context("listed")?.contains("exited (4)"), "{listed}");
    let logs = koya(["logs", name]).output()?;
    ensure!(logs.stderr == b"gone\n", "{logs:?}");
    ensure!(stdout(logs)? == "hello\nbye");
    let last = koya(["logs", "--timestamps", "--tail", "1", name]).output()?;
    let (time, line) = (&last.stderr[..20], &last.stderr[31..]);
    ensure!(time.starts_with(b"20") && line == b"gone\n", "{last:?}");
    let older = stdout(koya(["logs", "--until", "1h", name]).output()?)?;
    ensure!(older.is_empty(), "{older}");
    stdout(koya(["rm", name]).output()?)?;
    ensure!(!stdout(koya(["ps", "--all"]).output()?)?.contains(name));
    drop(container);
    Ok(())
}

fn a_detached_container_whose_machine_dies_says_so() -> Result<()> {
    let name = "life-dies";
    let script = "echo up; read -t 1 < /dev/zero; sleep 1; echo c > /proc/sysrq-trigger";
    let container = Background::start(name, &["--privileged"], &["sh", "-c", script])?;
    until("the machine dies", || {
        let listed = stdout(koya(["ps", "--all"]).output()?)?;
        Ok(listed.contains("exited (125)").then_some(()))
    })?;
    let log = container.said()?;
    ensure!(
        log.starts_with("up\n") && log.contains("kernel panic"),
        "{log}"
    );
    drop(container);
    Ok(())
}

fn a_detached_container_that_cannot_start_has_its_status() -> Result<()> {
    let output = run(&["-d", "--name", "life-none"], &["/no/such/program"])?;
    ensure!(output.status.code() == Some(127), "{output:?}");
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(said.contains("/no/such/program"), "{said}");
    ensure!(!traces()?.1.contains("life-none"), "its directory is left");
    Ok(())
}

/// The process is stopped by a signal: no reply, and no time limit of its own.
fn a_sandbox_that_hangs_is_stopped_after_the_limit() -> Result<()> {
    let container = Background::start("life-hangs", &[], &["sleep", "1000"])?;
    let pid = container.pid()?.to_string();
    let stopped = Command::new("kill").args(["-STOP", &pid]).status()?;
    ensure!(stopped.success());
    let began = std::time::Instant::now();
    let said = stdout(koya(["stop", "-t", "1", &container.name]).output()?)?;
    ensure!(said == container.name, "{said}");
    let took = began.elapsed();
    // 1 s, and 3 s for the reply; a working process would have 12 s more to end its machine.
    ensure!(took < std::time::Duration::from_secs(12), "{took:?}");
    ensure!(!Path::new(&format!("/proc/{pid}/root")).exists());
    // Listed like any other stopped container, with its log.
    let listed = stdout(koya(["ps", "--all"]).output()?)?;
    let mut lines = listed.lines();
    let line = lines.find(|line| line.starts_with(&container.name));
    ensure!(line.context("listed")?.contains("exited (137)"), "{listed}");
    stdout(koya(["logs", &container.name]).output()?)?;
    Ok(())
}

fn check_says_that_this_kvm_will_do() -> Result<()> {
    let output = koya(["check"]).output()?;
    ensure!(output.status.code() == Some(0), "{output:?}");
    let json: serde_json::Value =
        serde_json::from_str(&stdout(koya(["check", "--json"]).output()?)?)?;
    ensure!(json["ok"] == true, "{json}");
    let env: serde_json::Value = serde_json::from_str(&stdout(koya(["env", "--json"]).output()?)?)?;
    ensure!(env["kernel"]["bytes"].as_u64().unwrap_or(0) > 0, "{env}");
    Ok(())
}

fn an_embedders_example_boots() -> Result<()> {
    let share = std::env::var("KOYA_SHARE")?;
    // The compressed kernel, if there is one.
    let kernels = ["bzImage", "vmlinux"].map(|name| Path::new(&share).join(name));
    let kernel = kernels.into_iter().find(|path| path.exists());
    let output = Command::new(example("console"))
        .arg(kernel.context("a kernel")?)
        .output()?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    // Without an initramfs there is no root: the kernel panics, and the monitor reports the reason.
    ensure!(
        said.contains("Linux version 6.") && said.contains("the guest ended: guest kernel panic"),
        "{said} {output:?}"
    );
    Ok(())
}

/// Path of an example's program: in cargo's directory, or in the given one.
fn example(name: &str) -> PathBuf {
    let cargos = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/debug/examples");
    let directory = std::env::var("KOYA_TEST_EXAMPLES");
    Path::new(&directory.unwrap_or(cargos.into())).join(name)
}

/// The example contains the lines in the README, and runs.
fn the_readmes_five_lines_run() -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let text = std::fs::read_to_string(root.join("runtime/examples/hello.rs"))?;
    let readme = std::fs::read_to_string(root.join("README.md"))?;
    let snippet = readme
        .split("```rust,no_run\n")
        .nth(1)
        .and_then(|rest| rest.split("\n```").next())
        .context("README has a snippet")?;
    for line in snippet.lines().filter(|l| !l.starts_with('#')) {
        ensure!(text.contains(line), "not in the example: {line}");
    }
    let dir = scratch("hello")?;
    std::os::unix::fs::symlink(shared_rootfs(), dir.join("rootfs"))?;
    let output = Command::new(example("hello")).current_dir(&dir).output()?;
    let said = stdout(output)?;
    ensure!(said.contains("-koya"), "{said}");
    Ok(())
}
