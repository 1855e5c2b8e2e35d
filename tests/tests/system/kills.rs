//! SIGKILL at random points of a container's life: whatever was killed, the next command or `delete` clears the rest away.
//! `KOYA_KILLS` is how many there are of each kind, `KOYA_SEED` where they fall.

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

fn number(variable: &str, default: u64) -> u64 {
    let text = std::env::var(variable).ok();
    text.and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// Points in time.
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

/// What sandboxes could leave on the host: mounts, interfaces, sockets with a name, named namespaces, control groups,
/// processes.
fn traces() -> Result<Vec<(&'static str, BTreeSet<String>)>> {
    let lines = |file: &str| -> Result<BTreeSet<String>> {
        Ok(fs::read_to_string(file)?
            .lines()
            .map(str::to_owned)
            .collect())
    };
    let sockets = lines("/proc/net/unix")?.into_iter();
    let sockets = sockets.filter_map(|line| Some(line.split_once(" /")?.1.to_owned()));
    let group = format!("/sys/fs/cgroup{GROUP}");
    let is_group = |name: &String| Path::new(&group).join(name).is_dir();
    let groups = names(&group)?.into_iter().filter(is_group).collect();
    let mut processes = BTreeSet::new();
    for pid in names("/proc")?
        .iter()
        .filter(|name| name.parse::<u32>().is_ok())
    {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        if name.starts_with("koya") || name.starts_with("pasta") {
            processes.insert(format!("{pid} {}", name.trim()));
        }
    }
    Ok(vec![
        ("mounts", lines("/proc/self/mountinfo")?),
        ("interfaces", names("/sys/class/net")?),
        ("sockets", sockets.collect()),
        ("namespaces", names("/run/netns")?),
        ("control groups", groups),
        ("containers", names("/var/lib/koya/containers")?),
        ("processes", processes),
    ])
}

fn nothing_is_left(before: &[(&'static str, BTreeSet<String>)], of: &str) -> Result<()> {
    // A process that was killed takes a moment to be gone.
    let mut last = None;
    let gone = until("nothing is left", || {
        let now = traces()?;
        let left = now
            .into_iter()
            .zip(before)
            .find(|(now, before)| now != *before);
        last = left.map(|(now, _)| now);
        Ok(last.is_none().then_some(()))
    });
    gone.with_context(|| format!("{of}: {last:?}"))
}

fn a_run_killed_at_any_point_leaves_nothing() -> Result<()> {
    let volume = scratch("kills")?;
    let option = format!("{}:/data", volume.display());
    let start = || {
        let mut command = koya(["run", "--name", "kills", "-v", &option, "--rootfs"]);
        command.arg(shared_rootfs());
        command.args(["--", "sh", "-c", "echo up > /data/up; sleep 1000"]);
        command.stdin(Stdio::null()).spawn()
    };
    stdout(koya(["ps"]).output()?)?;
    let before = traces()?;
    // How long a start takes here; the first also falls behind its end.
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
        // Whatever command comes next clears the rest away.
        stdout(koya(["ps"]).output()?)?;
        nothing_is_left(&before, &format!("kill {turn}"))?;
        child = start()?;
        let after = chance.below(whole + whole / 4);
        std::thread::sleep(after);
        println!("kill {turn} after {after:.2?} of {whole:.2?}");
    }
    child.kill()?;
    child.wait()?;
    stdout(koya(["ps"]).output()?)?;
    nothing_is_left(&before, "the last kill")
}

/// Kills every process of the runtime and its sandbox, or one of them; returns how many.
fn kill_some(chance: &mut Chance, all: bool) -> Result<usize> {
    let mut pids = Vec::new();
    for pid in names("/proc")?
        .iter()
        .filter_map(|name| name.parse::<i32>().ok())
    {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        if name.trim() == "koya-runtime" {
            pids.push(pid);
        }
    }
    if !all && !pids.is_empty() {
        let chosen = chance.below(Duration::from_micros(pids.len() as u64));
        pids = vec![pids[chosen.as_micros() as usize]];
    }
    for pid in &pids {
        // It may have ended meanwhile.
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
    let before = traces()?;
    let life = |id: &str| {
        let script = format!(
            "r='koya-runtime --root {root}'; $r create --bundle {directory} {id} && $r start {id} && \
             $r exec {id} true && $r kill {id} KILL && sleep 0.2; $r delete --force {id}"
        );
        let mut shell = Command::new("sh");
        shell.args(["-c", &script]).stdin(Stdio::null());
        shell.stdout(Stdio::null()).stderr(Stdio::null()).spawn()
    };
    let began = Instant::now();
    ensure!(life("whole")?.wait()?.success(), "a life without kills");
    let whole = began.elapsed();
    nothing_is_left(&before, "a life without kills")?;
    let mut chance = Chance(number("KOYA_SEED", 1));
    for turn in 0..number("KOYA_KILLS", 3) {
        let id = format!("k{turn}");
        let mut shell = life(&id)?;
        let after = chance.below(whole);
        std::thread::sleep(after);
        shell.kill()?;
        shell.wait()?;
        let killed = kill_some(&mut chance, turn % 2 == 0)?;
        let deleted = runtime.call(&["delete", "--force", &id])?;
        let said = String::from_utf8_lossy(&deleted.stderr).into_owned();
        println!(
            "kill {turn} after {after:.2?} of {whole:.2?}: {killed} processes; {}",
            said.trim()
        );
        ensure!(deleted.status.success(), "delete: {said}");
        nothing_is_left(&before, &id)?;
        ensure!(
            fs::read_dir(&runtime.root)?.next().is_none(),
            "{id} is left in {root}"
        );
    }
    fs::remove_dir(&group)?;
    ensure!(!Path::new(&group).exists());
    Ok(())
}
