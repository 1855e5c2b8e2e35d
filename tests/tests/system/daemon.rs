//! A containerd for each test, of any of the tested versions.

use crate::RIG;
use crate::tool::{architecture, kill, saved_image, scratch, stdout, until};
use crate::trial;
use anyhow::{Context, Result, ensure};
use libtest_mimic::{Arguments, Trial};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Image of the test containers.
pub(crate) const IMAGE: &str = "docker.io/library/busybox:test";
pub(crate) const RUNTIME: &str = "io.containerd.koya.v2";
/// In the order of the directories in KOYA_TEST_CONTAINERD.
const VERSIONS: [&str; 3] = ["1.6", "1.7", "2"];

/// The client of a containerd.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Use {
    /// `ctr`.
    Ctr,
    /// Kubernetes' Container Runtime Interface.
    Cri,
}

/// A test, with its name.
pub(crate) type Test = (&'static str, fn(&Containerd) -> Result<()>);

/// Tests for every version, since they depend on containerd itself. The others depend on requests to the shim that are the
/// same in all versions: in a complete run they are only for the newest version.
const OF_EVERY_VERSION: [&str; 2] = ["containers_run_and_end", "a_pod_lives"];

/// Removes tests not needed with older versions, unless a filter is given, and prints a note.
pub(crate) fn select(arguments: &Arguments, trials: &mut Vec<Trial>) {
    if arguments.filter.is_some() {
        return;
    }
    let older = VERSIONS.split_last().map_or(&[][..], |(_, older)| older);
    let is_left_out = |trial: &Trial| {
        let mut parts = trial.name().rsplit("::");
        let (name, version) = (parts.next().unwrap_or_default(), parts.next());
        let version = version.and_then(|version| version.strip_prefix('v'));
        version.is_some_and(|version| older.contains(&version)) && !OF_EVERY_VERSION.contains(&name)
    };
    let all = trials.len();
    trials.retain(|trial| !is_left_out(trial));
    eprintln!(
        "system tests: {} tests with containerd {} are left to the newest version; \
         `cargo xtask test containerd`, `cri` and `pod_files` run them",
        all - trials.len(),
        older.join(" and ")
    );
}

/// Each test with each version.
pub(crate) fn trials_of<const N: usize>(module: &str, kind: Use, tests: [Test; N]) -> Vec<Trial> {
    let versions = VERSIONS.into_iter().enumerate();
    versions
        .flat_map(|(index, version)| tests.map(|(name, test)| (index, version, name, test)))
        .map(|(index, version, name, test)| {
            let name = format!("{module}::v{version}::{name}");
            trial(name, move || {
                let containerd = Containerd::start(index, version, kind)?;
                test(&containerd).with_context(|| containerd.last_words())
            })
        })
        .collect()
}

/// A containerd of this test.
pub(crate) struct Containerd {
    pub(crate) dir: PathBuf,
    bin: PathBuf,
    /// Namespace of the containers.
    namespace: String,
    /// Parent of the containers' control groups on the host: other tests run at the same time.
    pub(crate) group: String,
    /// Unique number on this machine.
    pub(crate) number: usize,
    daemon: std::sync::Mutex<Child>,
}

impl Containerd {
    pub(crate) fn start(index: usize, version: &str, kind: Use) -> Result<Self> {
        let directories = std::env::var_os("KOYA_TEST_CONTAINERD")
            .context("KOYA_TEST_CONTAINERD names no directories; `cargo xtask test` makes them")?;
        let bin = std::env::split_paths(&directories)
            .nth(index)
            .context("too few directories")?;
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        // Rigs on one machine have separate ranges of numbers.
        let rig: usize = std::env::var(RIG).map_or(Ok(0), |number| number.parse())?;
        let number = rig * 80 + NEXT.fetch_add(1, Ordering::SeqCst);
        // Short, since socket paths are limited to 107 bytes.
        let dir = scratch("c")?;
        fs::write(dir.join("config.toml"), config(&dir, kind))?;
        let group = format!("koya-test{number}");
        if kind == Use::Cri {
            let bridge = format!("koya-br{number}");
            write_network(
                &dir,
                number,
                &serde_json::json!({
                    "type": "bridge", "bridge": bridge, "isGateway": true,
                }),
            )?;
        }
        // Settings of the second handler's pods.
        fs::write(
            dir.join("koya.toml"),
            "cmdline = \"quiet loglevel=3\"\nannotations = [\"memory_mib\"]\n",
        )?;
        let containerd = Self {
            daemon: std::sync::Mutex::new(launch(&bin, &dir)?),
            namespace: match kind {
                Use::Ctr => group.clone(),
                Use::Cri => "k8s.io".into(),
            },
            group,
            number,
            dir,
            bin,
        };
        containerd.wait_until_ready()?;
        let about = stdout(containerd.ctr(["version"]).output()?)?;
        ensure!(about.contains(&format!("Version:  {version}.")), "{about}");
        stdout(containerd.ctr(["image", "import"]).arg(image()?).output()?)?;
        Ok(containerd)
    }

    /// Sets another network for the pods, from the next start on.
    pub(crate) fn set_network(&self, plugin: &serde_json::Value) -> Result<()> {
        write_network(&self.dir, self.number, plugin)
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.join("c.sock")
    }

    pub(crate) fn wait_until_ready(&self) -> Result<()> {
        until("containerd", || {
            let asked = self.ctr(["version"]).output()?;
            Ok(asked.status.success().then_some(()))
        })
    }

    pub(crate) fn ctr<S: AsRef<std::ffi::OsStr>>(
        &self,
        args: impl IntoIterator<Item = S>,
    ) -> Command {
        let mut ctr = Command::new(self.bin.join("ctr"));
        ctr.arg("--address")
            .arg(self.socket())
            .args(["--namespace", &self.namespace])
            .args(args)
            .stdin(Stdio::null());
        ctr
    }

    /// `ctr run OPTIONS IMAGE NAME COMMAND`
    pub(crate) fn run(&self, options: &[&str], name: &str, command: &[&str]) -> Command {
        let mut ctr = self.ctr(["run", "--runtime", RUNTIME]);
        ctr.args(options).args([IMAGE, name]).args(command);
        ctr
    }

    /// `ctr task exec --exec-id ID NAME sh -c SCRIPT`
    pub(crate) fn exec(&self, name: &str, id: &str, script: &str) -> Command {
        self.ctr(["task", "exec", "--exec-id", id, name, "sh", "-c", script])
    }

    /// Process on the host and state of a container, from `ctr task ls`.
    fn task(&self, name: &str) -> Result<Option<(String, String)>> {
        let list = stdout(self.ctr(["task", "ls"]).output()?)?;
        let words = list.lines().map(|line| line.split_whitespace());
        let mut own = words.filter_map(|mut words| {
            let is_own = words.next() == Some(name);
            is_own.then_some((words.next()?.to_owned(), words.next()?.to_owned()))
        });
        Ok(own.next())
    }

    pub(crate) fn state(&self, name: &str) -> Result<Option<String>> {
        Ok(self.task(name)?.map(|(_, state)| state))
    }

    pub(crate) fn wait_for(&self, name: &str, state: &str) -> Result<()> {
        until(&format!("{name} to be {state}"), || {
            Ok((self.state(name)?.as_deref() == Some(state)).then_some(()))
        })
    }

    /// PID of a container on the host.
    pub(crate) fn pid(&self, name: &str) -> Result<String> {
        Ok(self.task(name)?.context("no such task")?.0)
    }

    /// PID of a container's shim, without the short-lived `start` process.
    pub(crate) fn shim_of(&self, name: &str) -> Result<Option<String>> {
        let mine = self.socket();
        let id = format!("-id {name} ");
        let shims = processes_with("containerd-shim-koya-v2")?;
        let mut shims = shims
            .into_iter()
            .filter(|line| line.contains(&*mine.to_string_lossy()) && line.contains(&id));
        let own = shims.find(|line| !line.trim_end().ends_with(" start"));
        Ok(own.and_then(|line| Some(line.split(' ').next()?.to_owned())))
    }

    /// Kills the process of a container on the host, and deletes task and container in containerd.
    pub(crate) fn kill_and_remove(&self, name: &str) -> Result<()> {
        kill(&self.pid(name)?)?;
        until("its end", || {
            let state = self.state(name)?;
            Ok(state.is_none_or(|state| state == "STOPPED").then_some(()))
        })?;
        // containerd may still have the task, as stopped.
        self.ctr(["task", "rm", "-f", name]).output()?;
        self.remove(name)
    }

    pub(crate) fn remove(&self, name: &str) -> Result<()> {
        stdout(self.ctr(["container", "rm", name]).output()?).map(drop)
    }

    /// Simulates an OOM kill of containerd.
    pub(crate) fn kill_and_start_again(&self) -> Result<()> {
        let mut daemon = self
            .daemon
            .lock()
            .map_err(|_| anyhow::anyhow!("poisoned"))?;
        daemon.kill()?;
        daemon.wait()?;
        *daemon = launch(&self.bin, &self.dir)?;
        drop(daemon);
        self.wait_until_ready()
    }

    /// Checks that no shims, mounts or control groups of this containerd are left.
    pub(crate) fn nothing_is_left(&self) -> Result<()> {
        let mine = self.socket();
        let mine = mine.to_string_lossy();
        until("shims that go", || {
            let shims = processes_with("containerd-shim-koya-v2")?;
            let left = shims.iter().any(|line| line.contains(&*mine));
            Ok((!left).then_some(()))
        })?;
        until("control groups that go", || {
            let groups = fs::read_dir(self.groups()).into_iter().flatten().flatten();
            let left = groups.filter(|entry| entry.path().is_dir()).count();
            Ok((left == 0).then_some(()))
        })?;
        // The shim's mounts must not propagate to other namespaces.
        let mounts = fs::read_to_string("/proc/self/mounts")?;
        let state = self.dir.join("state/io.containerd.runtime.v2.task");
        let left = mounts
            .lines()
            .find(|line| line.contains(&*state.to_string_lossy()));
        ensure!(left.is_none(), "still mounted: {left:?}");
        Ok(())
    }

    /// Parent directory of the containers' control groups.
    pub(crate) fn groups(&self) -> PathBuf {
        Path::new("/sys/fs/cgroup").join(&self.group)
    }

    pub(crate) fn last_words(&self) -> String {
        let log = fs::read_to_string(self.dir.join("log")).unwrap_or_default();
        let lines: Vec<_> = log
            .lines()
            .filter(|l| !l.contains("loading plugin"))
            .collect();
        lines[lines.len().saturating_sub(30)..].join("\n")
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        if let Ok(daemon) = self.daemon.get_mut() {
            daemon.kill().ok();
            daemon.wait().ok();
        }
        // The bridge plugin's interface, for all pods.
        let bridge = format!("koya-br{}", self.number);
        let mut ip = Command::new("ip");
        ip.args(["link", "del", &bridge]).stderr(Stdio::null());
        ip.status().ok();
        let mine = self.socket();
        for line in processes_with("containerd-shim-koya-v2").unwrap_or_default() {
            if line.contains(&*mine.to_string_lossy())
                && let Some(pid) = line.split(' ').next()
            {
                Command::new("kill").args(["-KILL", pid]).status().ok();
            }
        }
    }
}

/// Configuration without plugins not needed by the tests.
fn config(dir: &Path, kind: Use) -> String {
    let at = dir.display();
    let unused = match kind {
        Use::Ctr => "\"io.containerd.grpc.v1.cri\", ",
        Use::Cri => "",
    };
    let cri = "[plugins.\"io.containerd.grpc.v1.cri\"";
    format!(
        "version = 2\nroot = \"{at}/root\"\nstate = \"{at}/state\"\n\
         disabled_plugins = [{unused}\"io.containerd.internal.v1.opt\", \
         \"io.containerd.nri.v1.nri\"]\n[grpc]\naddress = \"{at}/c.sock\"\n\
         {cri}]\nsandbox_image = \"{IMAGE}\"\n\
         {cri}.cni]\nbin_dir = \"/usr/lib/cni\"\nconf_dir = \"{at}/cni\"\n\
         {cri}.containerd]\ndefault_runtime_name = \"koya\"\n\
         {cri}.containerd.runtimes.koya]\nruntime_type = \"{RUNTIME}\"\n\
         {cri}.containerd.runtimes.koya-set]\nruntime_type = \"{RUNTIME}\"\n\
         pod_annotations = [\"io.koya.*\"]\n\
         {cri}.containerd.runtimes.koya-set.options]\nConfigPath = \"{at}/koya.toml\"\n"
    )
}

/// Network of the pods, by a plugin of the Container Network Interface (CNI): IPv4 and IPv6.
fn write_network(dir: &Path, number: usize, plugin: &serde_json::Value) -> Result<()> {
    let range = |subnet: String| serde_json::json!([{ "subnet": subnet }]);
    let mut plugin = plugin.clone();
    plugin["ipam"] = serde_json::json!({
        "type": "host-local", "dataDir": dir.join("ipam"),
        "ranges": [range(format!("10.88.{number}.0/24")), range(format!("fd00:88:{number}::/64"))],
        "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
    });
    let list = serde_json::json!({
        "cniVersion": "0.4.0", "name": "pods", "plugins": [plugin],
    });
    let directory = dir.join("cni");
    fs::create_dir_all(&directory)?;
    Ok(fs::write(
        directory.join("10-pods.conflist"),
        list.to_string(),
    )?)
}

fn launch(bin: &Path, dir: &Path) -> Result<Child> {
    let log = fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(dir.join("log"))?;
    let path = std::env::var("PATH")?;
    Command::new(bin.join("containerd"))
        .arg("--config")
        .arg(dir.join("config.toml"))
        .env("PATH", format!("{}:{path}", bin.display()))
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .context("cannot start containerd")
}

/// `PID arguments` of each process of a program with this name.
fn processes_with(name: &str) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let pid = entry.file_name().to_string_lossy().into_owned();
        let Ok(line) = fs::read(entry.path().join("cmdline")) else {
            continue;
        };
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        if line
            .split(' ')
            .next()
            .is_some_and(|program| program.ends_with(name))
        {
            found.push(format!("{pid} {line}"));
        }
    }
    Ok(found)
}

/// A tar in the format of `docker save`, with the tests' root file system.
fn image() -> Result<&'static Path> {
    static IMAGE_TAR: OnceLock<Option<PathBuf>> = OnceLock::new();
    let made = IMAGE_TAR.get_or_init(|| make_image().inspect_err(|e| eprintln!("{e:#}")).ok());
    made.as_deref().context("no image")
}

fn make_image() -> Result<PathBuf> {
    saved_image(&scratch("image")?, Some(IMAGE), |layer| {
        let layer = format!("sha256:{layer}");
        let config = serde_json::json!({
            "architecture": architecture(), "os": "linux",
            "config": {"Env": ["PATH=/bin"], "Cmd": ["sh"]},
            "rootfs": {"type": "layers", "diff_ids": [layer]},
        });
        config.to_string()
    })
}

/// Exit code and all output.
pub(crate) fn ended(output: &Output) -> (Option<i32>, String) {
    let text = [&output.stdout[..], &output.stderr[..]].concat();
    (
        output.status.code(),
        String::from_utf8_lossy(&text).trim_end().replace('\r', ""),
    )
}
