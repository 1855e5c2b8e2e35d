//! Privileges of a sandbox's process on the host: those of the table in `docs/security.md`, and nobody else's variables.

use crate::daemon::Containerd;
use crate::life::koya_as;
use crate::oci::{Runtime, bundle, text};
use crate::tool::{Background, scratch, shared_rootfs, stdout};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::fs;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::process::Stdio;

crate::trials![
    a_container_has_the_privileges_of_its_options,
    a_users_container_has_none,
    a_runtimes_process_has_few_and_its_hooks_all,
];

/// CHOWN, DAC_OVERRIDE, FOWNER, FSETID, MKNOD, SETFCAP, SYS_CHROOT, SYS_ADMIN.
const RUN: u64 = 1 | 1 << 1 | 1 << 3 | 1 << 4 | 1 << 27 | 1 << 31 | 1 << 18 | 1 << 21;
/// NET_ADMIN and NET_BIND_SERVICE.
const WITH_NETWORK: u64 = RUN | 1 << 12 | 1 << 10;
/// KILL.
const RUNTIME: u64 = WITH_NETWORK | 1 << 5;

/// The threads that start programs of others.
const LAUNCHERS: [&str; 3] = ["koya-launcher", "koya-launch", "koya-hook"];

/// The variables that the process of a sandbox may have under engines, beside Koya's own.
const VARIABLES: [&str; 11] = [
    "PATH",
    "HOME",
    "TMPDIR",
    "XDG_DATA_HOME",
    "XDG_RUNTIME_DIR",
    "TTRPC_ADDRESS",
    "SCHED_CORE",
    "RUST_BACKTRACE",
    "LANG",
    "LC_ALL",
    "TZ",
];

struct Thread {
    name: String,
    permitted: u64,
    effective: u64,
    /// Inheritable and ambient ones.
    inherited: u64,
    bounding: u64,
    no_new_privileges: bool,
    root: PathBuf,
}

fn threads(pid: u32) -> Result<Vec<Thread>> {
    let mut found = Vec::new();
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let task = task?.path();
        let status = match fs::read_to_string(task.join("status")) {
            // It has ended.
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(error) if error.raw_os_error() == Some(3) => continue,
            status => status?,
        };
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.map(str::trim).with_context(|| format!("no {name}"))
        };
        let set = |name: &str| Ok::<_, anyhow::Error>(u64::from_str_radix(field(name)?, 16)?);
        found.push(Thread {
            name: field("Name:")?.to_owned(),
            permitted: set("CapPrm:")?,
            effective: set("CapEff:")?,
            inherited: set("CapInh:")? | set("CapAmb:")?,
            bounding: set("CapBnd:")?,
            no_new_privileges: field("NoNewPrivs:")? == "1",
            root: task.join("root"),
        });
    }
    Ok(found)
}

/// The bounding set of this process, which is that of the programs that it starts.
fn own_bounds() -> Result<u64> {
    let own = threads(std::process::id())?;
    Ok(own.first().context("no thread")?.bounding)
}

/// Checks that no thread has more, and that the process's own has all of it.
fn check(pid: u32, kept: u64) -> Result<Vec<Thread>> {
    let threads = threads(pid)?;
    let bounds = own_bounds()?;
    for thread in &threads {
        let name = &thread.name;
        let sets = thread.permitted | thread.effective;
        ensure!(thread.inherited == 0, "{name}: {:#x}", thread.inherited);
        if LAUNCHERS.contains(&name.as_str()) {
            ensure!(
                thread.bounding == bounds && !thread.no_new_privileges,
                "{name}"
            );
        } else {
            ensure!(sets & !kept == 0, "{name} has {sets:#x}");
            ensure!(
                thread.bounding & !kept == 0,
                "{name}: {:#x}",
                thread.bounding
            );
            ensure!(thread.no_new_privileges, "{name}");
        }
    }
    let first = threads.first().context("no threads")?;
    ensure!(first.permitted == kept, "{:#x}", first.permitted);
    Ok(threads)
}

/// Checks that a process has no variables of its caller that it does not need.
fn check_environment(pid: u32) -> Result<()> {
    let variables = fs::read(format!("/proc/{pid}/environ"))?;
    let variables = String::from_utf8_lossy(&variables).into_owned();
    let names = variables.split('\0').filter_map(|one| one.split_once('='));
    for (name, _) in names {
        let is_needed = name.starts_with("KOYA_") || VARIABLES.contains(&name);
        ensure!(is_needed, "{name}");
    }
    ensure!(variables.contains("PATH="), "{variables}");
    Ok(())
}

fn a_container_has_the_privileges_of_its_options() -> Result<()> {
    let of = |name: &str, options: &[&str], kept| -> Result<()> {
        let container = Background::start(name, options, &["sleep", "1000"])?;
        check(container.pid()?, kept).map(drop)
    };
    of("few", &[], RUN)?;
    of("few-with-net", &["--net", "tap"], WITH_NETWORK)
}

/// Without root there are none, except in the user namespace of `--net user`: there file threads have a root directory.
fn a_users_container_has_none() -> Result<()> {
    const USER: u32 = 65534;
    let home = scratch("user-privileges")?;
    std::os::unix::fs::chown(&home, Some(USER), Some(USER))?;
    let as_user = |arguments: &[&str]| -> Result<String> {
        stdout(koya_as(USER, &home).args(arguments).output()?)
    };
    let rootfs = shared_rootfs().to_string_lossy();
    for (network, kept) in [("none", 0), ("user", WITH_NETWORK)] {
        let run = [
            "run", "-d", "--name", "few", "--net", network, "--rootfs", &rootfs,
        ];
        as_user(&[&run[..], &["--", "sleep", "1000"]].concat())?;
        let list: Value = serde_json::from_str(&as_user(&["ps", "--json"])?)?;
        let pid = list[0]["pid"].as_u64().context("no pid")? as u32;
        // Only the bounding set is that of the user's other processes: reducing it takes a privilege.
        let bounds = own_bounds()?;
        for thread in threads(pid)? {
            let name = &thread.name;
            ensure!(thread.permitted & !kept == 0, "{network}: {name}");
            ensure!(thread.no_new_privileges, "{network}: {name}");
            let most = if kept == 0 { bounds } else { kept };
            ensure!(thread.bounding & !most == 0, "{network}: {name}");
            if network == "user" && name == "koya-fs" {
                let files = fs::read_dir(&thread.root)?.flatten();
                let mut names = files.map(|file| file.file_name().display().to_string());
                let other = names.find(|name| name.parse::<u32>().is_err());
                ensure!(other.is_none(), "koya-fs sees {other:?}");
            }
        }
        if network == "none" {
            let host: Value = serde_json::from_str(&as_user(&["env", "--json"])?)?;
            let record = home.join(".local/share/koya/containers/few/walls.json");
            opens_shared_files_only(&host["host"], &fs::read_to_string(record)?)?;
        }
        as_user(&["rm", "--force", "few"])?;
    }
    Ok(())
}

/// Threads that serve files, without a root directory of their own, are limited to shared files if the host has Landlock.
fn opens_shared_files_only(host: &Value, record: &str) -> Result<()> {
    let has_it = host["landlock"]
        .as_i64()
        .is_some_and(|version| version >= 2);
    let record: Value = serde_json::from_str(record)?;
    for (role, wanted) in [
        ("koya-fs", "shared files"),
        ("koya-starter", "shared files"),
        ("koya-vcpu", "no files"),
    ] {
        let is_it = |thread: &&Value| {
            let name = thread["role"].as_str();
            name.is_some_and(|name| name.starts_with(role))
        };
        for listed in [&record["threads"], &host["threads"]] {
            let thread = listed.as_array().and_then(|all| all.iter().find(is_it));
            let thread = thread.with_context(|| format!("no {role} in {listed}"))?;
            ensure!(!has_it || thread["landlock"] == wanted, "{thread}");
        }
    }
    Ok(())
}

fn a_runtimes_process_has_few_and_its_hooks_all() -> Result<()> {
    let runtime = Runtime::koya()?;
    let said = scratch("hook-privileges")?.join("said");
    let script = format!(
        "grep -E '^(CapEff|NoNewPrivs):' /proc/self/status > {}",
        said.display()
    );
    let bundle = bundle("exec sleep 1000", |config| {
        config["hooks"]["createContainer"] = json!([{"path": "/bin/sh",
            "args": ["sh", "-c", script], "env": ["PATH=/usr/bin:/bin"]}]);
    })?;
    let mut run = runtime.command(&["run", "--detach", "--bundle", text(&bundle)?, "few"]);
    run.env("PASSWORD_OF_THE_ENGINE", "secret");
    let ran = run.stdout(Stdio::null()).stderr(Stdio::null()).status()?;
    ensure!(ran.success(), "{ran}");
    let state: Value = serde_json::from_str(&runtime.ok(&["state", "few"])?)?;
    let pid = state["pid"].as_u64().context("no pid")? as u32;
    let threads = check(pid, RUNTIME)?;
    let launchers = threads
        .iter()
        .filter(|thread| thread.name == "koya-launcher");
    ensure!(launchers.count() == 1, "no thread for hooks");
    check_environment(pid)?;
    let hook = fs::read_to_string(said)?;
    let all = format!("CapEff:\t{:016x}\nNoNewPrivs:\t0\n", own_bounds()?);
    ensure!(hook == all, "{hook}");
    runtime.ok(&["delete", "--force", "few"])?;
    Ok(())
}

/// The shim's process; under containerd and Docker, hooks and loggers have all of root's.
pub(crate) fn a_shim_has_few_privileges(containerd: &Containerd) -> Result<()> {
    let run = containerd
        .run(&["-d"], "few", &["sleep", "1000"])
        .output()?;
    stdout(run)?;
    let pid: u32 = containerd.shim_of("few")?.context("no shim")?.parse()?;
    check(pid, RUNTIME)?;
    check_environment(pid)?;
    // A kernel without this controller does not have this file.
    let limit = containerd.groups().join("few/pids.max");
    if limit.exists() {
        let most: u64 = fs::read_to_string(limit)?.trim().parse()?;
        ensure!((4096..32768).contains(&most), "{most}");
    }
    stdout(containerd.ctr(["task", "rm", "-f", "few"]).output()?)?;
    containerd.remove("few")?;
    containerd.nothing_is_left()
}
