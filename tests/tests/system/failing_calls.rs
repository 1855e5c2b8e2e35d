//! A host whose system calls fail: whichever call it is, a start ends with an error or goes on, and nothing is left.
//! `KOYA_FAULTS` is the number of occurrences of each call that fail, one at a time.

use crate::kills::{nothing_is_left, number};
use crate::oci::{Runtime, bundle, text};
use crate::tool::{koya, scratch, shared_rootfs, stdout, until_within};
use anyhow::{Context, Result, bail, ensure};
use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

crate::trials![
    a_run_on_a_host_whose_calls_fail_leaves_nothing,
    a_runtime_on_a_host_whose_calls_fail_leaves_nothing,
];

/// The first allocations are those of the C library and of Rust's runtime before `main`, which can only crash.
const FIRST_OF_MAIN: u64 = 16;

/// System calls of a start, and the errors of a host that has no memory, disk space, descriptors, processes or privileges
/// left, or whose disk is broken.
const FAULTS: &[(&str, &str)] = &[
    ("openat", "EMFILE"),
    ("openat2", "EIO"),
    ("open_tree", "EMFILE"),
    ("readlink", "EIO"),
    ("statx", "EIO"),
    ("getdents64", "EIO"),
    ("mkdir", "ENOSPC"),
    ("rename", "ENOSPC"),
    ("unlink", "EIO"),
    ("flock", "EIO"),
    ("fcntl", "EMFILE"),
    ("read", "EIO"),
    ("write", "ENOSPC"),
    ("pread64", "EIO"),
    ("sendmsg", "ENOBUFS"),
    ("recvmsg", "ENOMEM"),
    ("poll", "ENOMEM"),
    ("epoll_ctl", "ENOSPC"),
    ("eventfd2", "EMFILE"),
    ("pipe2", "EMFILE"),
    ("socket", "EMFILE"),
    ("socketpair", "EMFILE"),
    ("bind", "ENOSPC"),
    ("listen", "ENOMEM"),
    ("connect", "EAGAIN"),
    ("memfd_create", "EMFILE"),
    ("mmap", "ENOMEM"),
    ("clone", "EAGAIN"),
    ("clone3", "EAGAIN"),
    ("wait4", "ECHILD"),
    ("unshare", "EPERM"),
    ("setns", "EPERM"),
    ("mount", "ENOMEM"),
    ("umount2", "EBUSY"),
    ("kill", "EPERM"),
    ("ioctl", "ENOMEM"),
];

/// Time limit for a start with one failing call, under strace(1) on an emulated CPU.
const LIMIT: Duration = Duration::from_secs(90);

/// Numbers of starts of one kind of fault.
#[derive(Default)]
struct Outcomes {
    unaffected: u32,
    errors: u32,
    aborts: u32,
}

/// Runs a command with one failing call, and returns its status and what it printed.
fn with_fault(
    command: &Command,
    (call, error): (&str, &str),
    time: u64,
    dir: &Path,
) -> Result<(ExitStatus, String)> {
    let said = dir.join("said");
    let mut strace = Command::new("strace");
    strace.args(["-f", "-qq", "-o", "/dev/null", "--trace", call]);
    // Another call stands in for the one that fails: a filter would see the number -1, which is a violation.
    strace.arg(format!(
        "--inject={call}:error={error}:when={time}:syscall=gettid"
    ));
    strace.arg(command.get_program()).args(command.get_args());
    strace.env_remove("RUST_BACKTRACE").stdin(Stdio::null());
    strace.stdout(File::create(&said)?);
    strace.stderr(File::options().append(true).open(&said)?);
    let mut child = strace.spawn().context("strace is not installed")?;
    let ended = until_within(LIMIT, "the end", || Ok(child.try_wait()?));
    if ended.is_err() {
        child.kill()?;
        child.wait()?;
    }
    let said = fs::read_to_string(&said)?;
    Ok((ended.with_context(|| said.clone())?, said))
}

/// Runs a command with each fault; `words` are in the paths of what it could leave, and `clean` is run after it.
fn try_all(command: &Command, words: &str, clean: impl Fn() -> Result<()>) -> Result<()> {
    let dir = scratch("faults")?;
    println!("| call | error | continued | ended with an error | aborted |\n|---|---|---|---|---|");
    for fault in FAULTS {
        let (call, error) = fault;
        let mut outcomes = Outcomes::default();
        let before = if *call == "mmap" { FIRST_OF_MAIN } else { 0 };
        for time in 1..=number("KOYA_FAULTS", 1) {
            let time = before + time;
            let at = format!("{call}: {error} at {time}");
            let (status, said) =
                with_fault(command, *fault, time, &dir).with_context(|| at.clone())?;
            println!("{at}: {status}: {}", said.trim());
            clean().with_context(|| format!("after {at}: {said}"))?;
            nothing_is_left(words, &format!("{at}: {status}: {said}"))?;
            ensure!(!said.contains("panicked at"), "{at}: {said}");
            match (status.code(), status.signal()) {
                (Some(0), _) => outcomes.unaffected += 1,
                // An allocation without memory.
                (Some(134), _) | (_, Some(6)) => outcomes.aborts += 1,
                // 159 would be a violation of a filter.
                (Some(code), _) if code != 101 && code != 159 => {
                    ensure!(!said.trim().is_empty(), "{at}: {status} without a word");
                    outcomes.errors += 1;
                }
                _ => bail!("{at}: {status}: {said}"),
            }
        }
        let Outcomes {
            unaffected,
            errors,
            aborts,
        } = outcomes;
        println!("| {call} | {error} | {unaffected} | {errors} | {aborts} |");
    }
    Ok(())
}

fn a_run_on_a_host_whose_calls_fail_leaves_nothing() -> Result<()> {
    const NAME: &str = "faults-of-a-run";
    let volume = scratch("faults-volume")?;
    let option = format!("{}:/data", volume.display());
    let mut run = koya(["run", "--name", NAME, "-v", &option, "--rootfs"]);
    run.arg(shared_rootfs());
    run.args(["--", "sh", "-c", "echo up > /data/up && cat /data/up"]);
    // Any next command cleans up.
    try_all(&run, NAME, || stdout(koya(["ps"]).output()?).map(drop))?;
    ensure!(stdout(run.output()?)? == "up", "a run after all that");
    Ok(())
}

fn a_runtime_on_a_host_whose_calls_fail_leaves_nothing() -> Result<()> {
    const ID: &str = "faults-of-a-runtime";
    let runtime = Runtime::koya()?;
    let bundle = bundle("echo up", |config| {
        config["linux"]["cgroupsPath"] = format!("/koya-runtime/{ID}").into();
    })?;
    let run = runtime.command(&["run", "--bundle", text(&bundle)?, ID]);
    let clean = || runtime.ok(&["delete", "--force", ID]).map(drop);
    try_all(&run, text(&runtime.root)?, clean)?;
    let after = runtime.ok(&["run", "--bundle", text(&bundle)?, ID])?;
    ensure!(after == "up", "a run after all that: {after}");
    Ok(())
}
