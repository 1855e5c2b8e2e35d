//! SIGKILL at random points of a container's life cycle: the next command or `delete` cleans up in each case. `KOYA_KILLS`
//! is the number of kills of each kind, `KOYA_SEED` the seed of their times. Each kill is printed as a line of JSON; those in
//! the file `KOYA_RECORD`, lines of an earlier run with the same seed, are not repeated.

use crate::oci::{Runtime, bundle, text};
use crate::tool::{kill, koya, scratch, shared_rootfs, stdout, until};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

crate::trials![
    a_run_killed_at_any_point_leaves_nothing,
    a_user_network_killed_at_any_point_leaves_nothing,
    what_a_runtime_leaves_when_killed_at_any_point_is_deleted,
];

const GROUP: &str = "/koya-kills";
/// Name of the container of `koya run`.
const RUN: &str = "kills-of-a-run";
/// And of the one with a network.
const NETWORK: &str = "kills-of-a-network";

/// The value of a variable, or `default`.
pub(crate) fn number(variable: &str, default: u64) -> u64 {
    let text = std::env::var(variable).ok();
    text.and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// A generator of random numbers for one kill.
pub(crate) struct Chance(u64);

impl Chance {
    fn number(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005);
        self.0 = self.0.wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit.max(1)
    }

    pub(crate) fn below(&mut self, limit: Duration) -> Duration {
        let micros = u64::try_from(limit.as_micros()).unwrap_or(u64::MAX);
        Duration::from_micros(self.number(micros))
    }

    pub(crate) fn one_of<'a, T>(&mut self, all: &'a [T]) -> Option<&'a T> {
        all.get(self.number(all.len() as u64) as usize)
    }
}

/// The kills of a test.
pub(crate) struct Kills {
    test: &'static str,
    seed: u64,
    turns: std::ops::Range<u64>,
}

impl Kills {
    /// Those that remain to be done.
    pub(crate) fn of(test: &'static str) -> Result<Self> {
        let seed = number("KOYA_SEED", 1);
        let text = match std::env::var_os("KOYA_RECORD") {
            Some(file) if Path::new(&file).exists() => fs::read_to_string(file)?,
            _ => String::new(),
        };
        // Other lines of the same output are ignored.
        let kills = text
            .lines()
            .filter_map(|l| serde_json::from_str::<Value>(l).ok());
        let own = kills.filter(|kill| kill["test"] == test && kill["seed"] == seed);
        let last = own.filter_map(|kill| kill["turn"].as_u64()).max();
        let turns = last.map_or(0, |last| last + 1)..number("KOYA_KILLS", 3);
        println!("{test}: turns {turns:?} with seed {seed}");
        Ok(Self { test, seed, turns })
    }

    pub(crate) fn turns(&self) -> std::ops::Range<u64> {
        self.turns.clone()
    }

    /// Random numbers of a turn, which do not depend on earlier ones.
    pub(crate) fn chance(&self, turn: u64) -> Chance {
        let mut chance = Chance(self.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ turn);
        chance.number(1);
        chance
    }

    /// Prints that nothing was left after a kill.
    pub(crate) fn passed(&self, turn: u64, killed: &str, after: Duration) {
        let after = u64::try_from(after.as_millis()).unwrap_or(u64::MAX);
        let (test, seed) = (self.test, self.seed);
        let line = json!({
            "test": test, "seed": seed, "turn": turn, "killed": killed, "after_ms": after,
        });
        println!("{line}");
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
    child.kill()?;
    child.wait()?;
    let kills = Kills::of("run")?;
    for turn in kills.turns() {
        // Any next command cleans up.
        stdout(koya(["ps"]).output()?)?;
        nothing_is_left(RUN, &format!("before kill {turn}"))?;
        let after = kills.chance(turn).below(whole + whole / 4);
        child = start()?;
        std::thread::sleep(after);
        child.kill()?;
        child.wait()?;
        stdout(koya(["ps"]).output()?)?;
        nothing_is_left(
            RUN,
            &format!("kill {turn} after {after:.2?} of {whole:.2?}"),
        )?;
        kills.passed(turn, "koya run", after);
    }
    Ok(())
}

/// PID, parent and process group of each process (proc_pid_stat(5)).
fn relations() -> Result<Vec<[i32; 3]>> {
    let mut found = Vec::new();
    for name in names("/proc")? {
        let Ok(pid) = name.parse::<i32>() else {
            continue;
        };
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let Some((_, fields)) = stat.rsplit_once(") ") else {
            continue;
        };
        let mut fields = fields.split(' ').map(str::parse::<i32>);
        // The first one is a letter.
        if let (_, Some(Ok(parent)), Some(Ok(group))) =
            (fields.next(), fields.next(), fields.next())
        {
            found.push([pid, parent, group]);
        }
    }
    Ok(found)
}

/// Whether a process with this name is pasta: it may execute a variant of itself for newer CPUs, `passt.avx2`.
fn is_pasta(name: &str) -> bool {
    name.starts_with("pasta") || name.starts_with("passt")
}

/// pasta and its shell are in a process group of their own, whose first process is a child of `koya run`.
fn a_user_network_killed_at_any_point_leaves_nothing() -> Result<()> {
    let volume = scratch("kills")?;
    let option = format!("{}:/data", volume.display());
    let start = || {
        let mut command = koya(["run", "--name", NETWORK, "--net", "user", "-v", &option]);
        command.arg("--rootfs").arg(shared_rootfs());
        command.args(["--", "sh", "-c", "echo up > /data/up; sleep 1000"]);
        command.stdin(Stdio::null()).spawn()
    };
    // Its helpers, with their names.
    let helpers = |koya: u32| -> Result<Vec<(i32, String)>> {
        let all = relations()?;
        let group = all.iter().find(|[_, parent, _]| *parent == koya as i32);
        let Some([group, ..]) = group else {
            return Ok(Vec::new());
        };
        let of_it = all.iter().filter(|[_, _, of]| of == group);
        let named = of_it.map(|[pid, ..]| {
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            (*pid, name.trim().to_owned())
        });
        Ok(named.collect())
    };
    let began = Instant::now();
    let mut child = start()?;
    until("the container runs", || {
        Ok(volume.join("up").exists().then_some(()))
    })?;
    let whole = began.elapsed();
    let there = helpers(child.id())?;
    ensure!(
        there.iter().any(|(_, name)| is_pasta(name)),
        "no pasta: {there:?}"
    );
    child.kill()?;
    child.wait()?;
    let kills = Kills::of("user network")?;
    for turn in kills.turns() {
        let mut chance = kills.chance(turn);
        // pasta is started early.
        let range = match turn % 2 {
            0 => whole / 4,
            _ => whole + whole / 4,
        };
        let after = chance.below(range);
        child = start()?;
        std::thread::sleep(after);
        let group = helpers(child.id())?;
        let shell = group.iter().map(|(pid, _)| *pid).min();
        let pasta = group.iter().find(|(_, name)| is_pasta(name));
        let pasta = pasta.map(|(pid, _)| *pid);
        let own = Some(child.id() as i32);
        let all: Vec<i32> = own
            .into_iter()
            .chain(group.iter().map(|(pid, _)| *pid))
            .collect();
        let kinds = [
            ("koya run", own.into_iter().collect()),
            ("pasta", pasta.into_iter().collect()),
            ("the shell of pasta", shell.into_iter().collect()),
            ("all", all),
        ];
        let (killed, pids): &(&str, Vec<i32>) = chance.one_of(&kinds).context("a kind")?;
        for pid in pids {
            // It may have ended already.
            kill(&pid.to_string()).ok();
        }
        child.kill()?;
        child.wait()?;
        stdout(koya(["ps"]).output()?)?;
        let of = format!("kill {turn} of {killed} after {after:.2?} of {whole:.2?}");
        nothing_is_left(NETWORK, &of)?;
        until("pasta and its shell are gone", || {
            let left = relations()?.into_iter();
            let mut left = left.filter(|[_, _, of]| Some(*of) == shell);
            Ok(left.next().is_none().then_some(()))
        })
        .with_context(|| of.clone())?;
        kills.passed(turn, killed, after);
    }
    Ok(())
}

/// Kills every process of the runtime under this root and of its sandbox, or one of them; returns their number.
fn kill_some(root: &str, chance: &mut Chance, all: bool) -> Result<usize> {
    let mut pids = processes(root)?;
    if !all {
        pids = chance.one_of(&pids).into_iter().copied().collect();
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
    let kills = Kills::of("koya-runtime")?;
    for turn in kills.turns() {
        let mut chance = kills.chance(turn);
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
        kills.passed(turn, &format!("{killed} processes of koya-runtime"), after);
    }
    fs::remove_dir(&group)?;
    ensure!(!Path::new(&group).exists());
    Ok(())
}
