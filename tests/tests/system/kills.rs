//! SIGKILL at random points of a container's life cycle: the next command or `delete` cleans up in each case. `KOYA_KILLS`
//! is the number of kills of each kind, `KOYA_SEED` the seed of their times.

use crate::oci::{Runtime, bundle, text};
use crate::tool::{kill, koya, scratch, shared_rootfs, stdout, until};
use anyhow::{Context, Result, ensure};
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

crate::trials![
    a_run_killed_at_any_point_leaves_nothing,
    what_a_runtime_leaves_when_killed_at_any_point_is_deleted,
];

const GROUP: &str = "/koya-kills";
/// Name of the container of `koya run`.
const RUN: &str = "kills-of-a-run";

/// The value of a variable, or `default`.
pub(crate) fn number(variable: &str, default: u64) -> u64 {
    let text = std::env::var(variable).ok();
    text.and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// A generator of random times.
struct Chance(u64);

impl Chance {
    fn below(&mut self, limit: Duration) -> Duration {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005);
        self.0 = self.0.wrapping_add(1_442_695_040_888_963_407);
        let micros = u64::try_from(limit.as_micros()).unwrap_or(u64::MAX).max(1);
        Duration::from_micros((self.0 >> 33) % micros)
    }
}

fn names(directory: &str) -> Result<BTreeSet<String>> {
    let entries = fs::read_dir(directory).map(|all| all.flatten().collect::<Vec<_>>());
    let names = entries.unwrap_or_default().into_iter();
    Ok(names
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect())
}

/// PIDs of processes with these words in their command line or environment: those of other tests run at the same time.
fn processes(words: &str) -> Result<Vec<i32>> {
    let numbers = names("/proc")?.into_iter();
    let numbers = numbers.filter_map(|name| name.parse::<i32>().ok());
    let is_meant = |pid: &i32| {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        let is_own = ["cmdline", "environ"].iter().any(|file| {
            let text = fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
            String::from_utf8_lossy(&text).contains(words)
        });
        name.starts_with("koya") && is_own
    };
    Ok(numbers.filter(is_meant).collect())
}

/// Everything that the sandboxes of a test could leave on the host, by words in its paths and command lines: mounts, named
/// sockets, control groups, directories of containers, processes.
fn traces(words: &str) -> Result<Vec<(&'static str, BTreeSet<String>)>> {
    let lines = |file: &str| -> Result<BTreeSet<String>> {
        let all = fs::read_to_string(file)?;
        let own = all.lines().filter(|line| line.contains(words));
        Ok(own.map(str::to_owned).collect())
    };
    let own_names = |directory: &str| -> Result<BTreeSet<String>> {
        let own = names(directory)?.into_iter();
        Ok(own.filter(|name| name.contains(words)).collect())
    };
    let group = format!("/sys/fs/cgroup{GROUP}");
    let is_group = |name: &String| Path::new(&group).join(name).is_dir();
    let processes = processes(words)?.iter().map(i32::to_string).collect();
    Ok(vec![
        ("mounts", lines("/proc/self/mountinfo")?),
        ("sockets", lines("/proc/net/unix")?),
        (
            "control groups",
            names(&group)?.into_iter().filter(is_group).collect(),
        ),
        ("containers", own_names("/var/lib/koya/containers")?),
        ("processes", processes),
    ])
}

/// Waits until a sandbox has left nothing (see [`traces`]).
pub(crate) fn nothing_is_left(words: &str, of: &str) -> Result<()> {
    // A killed process takes a moment to disappear.
    let mut last = None;
    let gone = until("nothing is left", || {
        let mut now = traces(words)?.into_iter();
        last = now.find(|(_, left)| !left.is_empty());
        Ok(last.is_none().then_some(()))
    });
    gone.with_context(|| format!("{of}: {last:?}"))
}

fn a_run_killed_at_any_point_leaves_nothing() -> Result<()> {
    let volume = scratch("kills")?;
    let option = format!("{}:/data", volume.display());
    let start = || {
        let mut command = koya(["run", "--name", RUN, "-v", &option, "--rootfs"]);
        command.arg(shared_rootfs());
        command.args(["--", "sh", "-c", "echo up > /data/up; sleep 1000"]);
        command.stdin(Stdio::null()).spawn()
    };
    nothing_is_left(RUN, "before the first")?;
    // Duration of a start on this machine; the first kill may also come after its end.
    let began = Instant::now();
    let mut child = start()?;
    until("the container runs", || {
        Ok(volume.join("up").exists().then_some(()))
    })?;
    let whole = began.elapsed();
    let mut chance = Chance(number("KOYA_SEED", 1));
    for turn in 0..number("KOYA_KILLS", 3) {
        child.kill()?;
        child.wait()?;
        // Any next command cleans up.
        stdout(koya(["ps"]).output()?)?;
        nothing_is_left(RUN, &format!("kill {turn}"))?;
        child = start()?;
        let after = chance.below(whole + whole / 4);
        std::thread::sleep(after);
        println!("kill {turn} after {after:.2?} of {whole:.2?}");
    }
    child.kill()?;
    child.wait()?;
    stdout(koya(["ps"]).output()?)?;
    nothing_is_left(RUN, "the last kill")
}

/// Kills every process of the runtime under this root and of its sandbox, or one of them; returns their number.
fn kill_some(root: &str, chance: &mut Chance, all: bool) -> Result<usize> {
    let mut pids = processes(root)?;
    if !all && !pids.is_empty() {
        let chosen = chance.below(Duration::from_micros(pids.len() as u64));
        pids = vec![pids[chosen.as_micros() as usize]];
    }
    for pid in &pids {
        // The process may have ended already.
        kill(&pid.to_string()).ok();
    }
    Ok(pids.len())
}

fn what_a_runtime_leaves_when_killed_at_any_point_is_deleted() -> Result<()> {
    let runtime = Runtime::koya()?;
    let bundle = bundle("exec sleep 1000", |config| {
        config["linux"]["cgroupsPath"] = format!("{GROUP}/one").into();
    })?;
    let (directory, root) = (text(&bundle)?, text(&runtime.root)?);
    let group = format!("/sys/fs/cgroup{GROUP}");
    fs::create_dir_all(&group)?;
    let life = |id: &str| {
        let script = format!(
            "r='koya-runtime --root {root}'; $r create --bundle {directory} {id} && $r start {id} && \
             $r exec {id} true && $r kill {id} KILL && sleep 0.2; $r delete --force {id}"
        );
        let mut shell = Command::new("sh");
        shell.args(["-c", &script]).env("KOYA_TEST_ROOT", root);
        shell.stdin(Stdio::null());
        shell.stdout(Stdio::null()).stderr(Stdio::null()).spawn()
    };
    let began = Instant::now();
    ensure!(life("whole")?.wait()?.success(), "a life without kills");
    let whole = began.elapsed();
    nothing_is_left(root, "a life without kills")?;
    let mut chance = Chance(number("KOYA_SEED", 1));
    for turn in 0..number("KOYA_KILLS", 3) {
        let id = format!("k{turn}");
        let mut shell = life(&id)?;
        let after = chance.below(whole);
        std::thread::sleep(after);
        shell.kill()?;
        shell.wait()?;
        let killed = kill_some(root, &mut chance, turn % 2 == 0)?;
        let deleted = runtime.call(&["delete", "--force", &id])?;
        let said = String::from_utf8_lossy(&deleted.stderr).into_owned();
        println!(
            "kill {turn} after {after:.2?} of {whole:.2?}: {killed} processes; {}",
            said.trim()
        );
        ensure!(deleted.status.success(), "delete: {said}");
        nothing_is_left(root, &id)?;
        ensure!(
            fs::read_dir(&runtime.root)?.next().is_none(),
            "{id} is left in {root}"
        );
    }
    fs::remove_dir(&group)?;
    ensure!(!Path::new(&group).exists());
    Ok(())
}
