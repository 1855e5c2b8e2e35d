//! Docker by its command line, with both kinds of runtimes: the shim of containerd, and `koya-runtime` by its path. Each test
//! runs with each version of Docker given to the tests.

mod builder;
mod compose;
mod containers;
mod networks;
mod options;
mod steps;

pub(crate) use networks::{PAGE, page};

use crate::daemon::{RUNTIME, ended};
use crate::podman::runtime;
use crate::tool::{architecture, saved_image, scratch, stdout, until};
use anyhow::{Context, Result, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

const IMAGE: &str = "busybox:test";
/// The kinds of runtimes that each version is tested with.
const VERSIONS: [(&str, &[Kind]); 3] = [
    ("20", &[Kind::Path]),
    ("26", &[Kind::Shim, Kind::Path]),
    ("28", &[Kind::Shim, Kind::Path]),
];

/// How Docker calls Koya.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// A shim of containerd (`runtimeType`), in Docker 23 and later.
    Shim,
    /// The command line of OCI runtimes (`path`), in all versions.
    Path,
}

impl Kind {
    /// Its part of a test's name.
    fn suffix(self) -> &'static str {
        match self {
            Self::Shim => "",
            Self::Path => "_path",
        }
    }

    /// Its entry in `runtimes` of daemon.json.
    fn runtime(self) -> serde_json::Value {
        match self {
            Self::Shim => serde_json::json!({"runtimeType": RUNTIME}),
            Self::Path => serde_json::json!({"path": runtime()}),
        }
    }
}

type Test = (&'static str, fn(&Docker) -> Result<()>);

const TESTS: [Test; 10] = [
    (
        "containers_get_what_was_asked",
        containers::containers_get_what_was_asked,
    ),
    (
        "a_container_is_looked_after",
        containers::a_container_is_looked_after,
    ),
    ("networks_are_dockers", networks::networks_are_dockers),
    ("networks_come_and_go", networks::networks_come_and_go),
    ("first_steps", steps::first_steps),
    ("services_are_composed", compose::services_are_composed),
    ("images_are_built", builder::images_are_built),
    ("further_options", options::further_options),
    (
        "options_of_other_containers",
        options::options_of_other_containers,
    ),
    ("terminals_and_updates", options::terminals_and_updates),
];

/// Each test with each given version of Docker and its kinds of runtimes.
pub(crate) fn trials() -> Vec<libtest_mimic::Trial> {
    let all = std::env::var_os("KOYA_TEST_DOCKER").unwrap_or_default();
    let trees = std::env::split_paths(&all).filter(|tree| !tree.as_os_str().is_empty());
    trees.flat_map(|tree| trials_of(&tree)).collect()
}

fn trials_of(tree: &Path) -> Vec<libtest_mimic::Trial> {
    let (version, kinds) = match version(tree) {
        Ok(known) => known,
        Err(error) => {
            let wrong = format!("{error:#}");
            return vec![crate::trial("docker::versions", move || {
                anyhow::bail!("{wrong}")
            })];
        }
    };
    let all = kinds
        .iter()
        .flat_map(|kind| TESTS.map(|test| (*kind, test)));
    all.map(|(kind, (name, test))| {
        let tree = tree.to_path_buf();
        let name = format!("docker::v{version}{}::{name}", kind.suffix());
        crate::trial(name, move || {
            let docker = Docker::start(&tree, version, kind)?;
            test(&docker).with_context(|| docker.last_words())
        })
    })
    .collect()
}

/// The version of the Docker in a directory by `cargo xtask test`, and its kinds of runtimes.
fn version(tree: &Path) -> Result<(&'static str, &'static [Kind])> {
    let file = tree.join("version");
    let about = || {
        format!(
            "KOYA_TEST_DOCKER: {}: directories by `cargo xtask test` have this file",
            file.display()
        )
    };
    let own = fs::read_to_string(&file).with_context(about)?;
    let known = VERSIONS.into_iter().find(|(version, _)| *version == own);
    known.with_context(|| format!("KOYA_TEST_DOCKER: Docker {own} is not a tested version"))
}

/// A Docker of this test. Only one runs at a time: its networks are those of the machine.
struct Docker {
    dir: PathBuf,
    /// Where its files are.
    tree: PathBuf,
    path: String,
    version: &'static str,
    kind: Kind,
    daemon: Child,
    _alone: MutexGuard<'static, ()>,
}

impl Docker {
    fn start(tree: &Path, version: &'static str, kind: Kind) -> Result<Self> {
        static ALONE: Mutex<()> = Mutex::new(());
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        load_modules()?;
        let dir = scratch("d")?;
        let at = dir.display();
        let config = serde_json::json!({
            "data-root": format!("{at}/root"), "exec-root": format!("{at}/exec"),
            "pidfile": format!("{at}/pid"), "hosts": [format!("unix://{at}/sock")],
            "bip": "10.89.0.1/24", "exec-opts": ["native.cgroupdriver=cgroupfs"],
            "default-address-pools": [{"base": "10.90.0.0/16", "size": 24}],
            "runtimes": {"koya": kind.runtime()},
            "default-runtime": "koya",
        });
        fs::write(dir.join("daemon.json"), config.to_string())?;
        let at = tree.display();
        let path = format!("{at}/usr/sbin:{at}/usr/bin:{}", std::env::var("PATH")?);
        let log = fs::File::create(dir.join("log"))?;
        let daemon = Command::new("dockerd")
            .arg("--config-file")
            .arg(dir.join("daemon.json"))
            .env("PATH", &path)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("cannot start dockerd")?;
        let docker = Self {
            dir,
            tree: tree.to_path_buf(),
            path,
            version,
            kind,
            daemon,
            _alone: alone,
        };
        until("dockerd", || {
            let asked = docker.docker(["version"]).output()?;
            Ok(asked.status.success().then_some(()))
        })
        .with_context(|| docker.last_words())?;
        let about = docker.said(["version", "--format", "{{.Server.Version}}"])?;
        ensure!(about.starts_with(&format!("{version}.")), "{about}");
        docker.said(["load".as_ref(), "-i".as_ref(), image()?.as_os_str()])?;
        Ok(docker)
    }

    fn docker<S: AsRef<std::ffi::OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Command {
        let mut docker = Command::new("docker");
        docker
            .arg("--host")
            .arg(format!("unix://{}/sock", self.dir.display()))
            .args(args)
            .env("PATH", &self.path)
            .env("HOME", &self.dir)
            .stdin(Stdio::null());
        docker
    }

    /// Output of a command that must succeed.
    fn said<S: AsRef<std::ffi::OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Result<String> {
        stdout(self.docker(args).output()?)
    }

    /// `docker run OPTIONS IMAGE COMMAND`
    fn run(&self, options: &[&str], command: &[&str]) -> Command {
        let mut docker = self.docker(["run", "--runtime", "koya"]);
        docker.args(options).arg(IMAGE).args(command);
        docker
    }

    /// Output of a container that runs a script.
    fn sh(&self, options: &[&str], script: &str) -> Result<String> {
        let options = [&["--rm"], options].concat();
        stdout(self.run(&options, &["sh", "-c", script]).output()?)
    }

    /// Checks that a container is refused, with this reason in a single line.
    fn refused(&self, options: &[&str], why: &str) -> Result<()> {
        let options = [&["--rm"], options].concat();
        let (code, text) = ended(&self.run(&options, &["true"]).output()?);
        let count = text.lines().filter(|line| line.contains(why)).count();
        ensure!(code == Some(125) && count == 1, "{code:?} {text}");
        Ok(())
    }

    /// A web server in a container in the background, whose page is `pong`.
    fn serve(&self, name: &str, options: &[&str]) -> Result<()> {
        let script = "mkdir -p /www; echo pong > /www/index.html; exec httpd -f -p 80 -h /www";
        let options = [&["-d", "--name", name], options].concat();
        stdout(self.run(&options, &["sh", "-c", script]).output()?)?;
        Ok(())
    }

    /// A command on a terminal of 33 rows and 77 columns, which Docker's client requires on its own standard input.
    fn on_terminal(&self, command: &Command) -> Command {
        let words = std::iter::once(command.get_program()).chain(command.get_args());
        let words: Vec<_> = words
            .map(|word| format!("'{}'", word.to_string_lossy()))
            .collect();
        let script = format!("stty rows 33 cols 77; {}", words.join(" "));
        let mut terminal = Command::new("script");
        terminal
            .args(["-qec", &script, "/dev/null"])
            .env("PATH", &self.path)
            .env("HOME", &self.dir)
            .stdin(Stdio::null());
        terminal
    }

    /// All capabilities, in `/proc/PID/status`: Docker 20.10 knows only the first 38.
    fn all_capabilities(&self) -> &'static str {
        match self.version {
            "20" => "0000003fffffffff",
            _ => "000001ffffffffff",
        }
    }

    /// Start of a script that needs the size of its terminal: the client of Docker 20.10 sets it after the start (docker/cli
    /// 3554).
    fn until_sized(&self) -> &'static str {
        match self.version {
            "20" => "until stty size > /dev/null 2>&1; do sleep 0.1; done; ",
            _ => "",
        }
    }

    fn inspect(&self, name: &str, what: &str) -> Result<String> {
        self.said(["inspect", "--format", what, name])
    }

    fn wait_for(&self, name: &str, what: &str, value: &str) -> Result<()> {
        until(&format!("{what} of {name} to be {value}"), || {
            Ok((self.inspect(name, what)? == value).then_some(()))
        })
    }

    fn exec(&self, name: &str, script: &str) -> Result<String> {
        self.said(["exec", name, "sh", "-c", script])
    }

    /// Checks that no container, no shim and no process of a container is left.
    fn nothing_is_left(&self) -> Result<()> {
        let left = self.said(["ps", "-aq"])?;
        ensure!(left.is_empty(), "containers: {left}");
        let exec = self.dir.join("exec");
        until("shims that go", || {
            let found = Command::new("pgrep")
                .args([
                    "-f",
                    &format!("(containerd-shim|koya-runtime).*{}", exec.display()),
                ])
                .output()?;
            Ok(found.stdout.is_empty().then_some(()))
        })
    }

    fn last_words(&self) -> String {
        let log = fs::read_to_string(self.dir.join("log")).unwrap_or_default();
        let lines = log.lines().filter(|line| !line.contains("level=info"));
        let lines: Vec<_> = lines.collect();
        lines[lines.len().saturating_sub(30)..].join("\n")
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        if let Ok(all) = self.said(["ps", "-aq"]) {
            self.docker(["rm", "-f"]).args(all.lines()).output().ok();
        }
        // containerd ends with it.
        let pid = self.daemon.id().to_string();
        Command::new("kill").args(["-TERM", &pid]).status().ok();
        let ended = until("dockerd's end", || Ok(self.daemon.try_wait()?));
        if ended.is_err() {
            self.daemon.kill().ok();
            self.daemon.wait().ok();
        }
    }
}

/// The rig has the modules for the networks of Docker and podman in a directory; elsewhere they load them by themselves.
pub(crate) fn load_modules() -> Result<()> {
    let directory = Path::new("/run/koya-rig/modules");
    let Ok(order) = fs::read_to_string(directory.join("docker")) else {
        return Ok(());
    };
    static LOADED: Mutex<bool> = Mutex::new(false);
    let mut is_loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    for name in order.lines().filter(|_| !*is_loaded) {
        let mut insmod = Command::new("/bin/busybox");
        let loaded = insmod.arg("insmod").arg(directory.join(name)).output()?;
        let said = String::from_utf8_lossy(&loaded.stderr);
        ensure!(
            loaded.status.success() || said.contains("exists"),
            "{name}: {said}"
        );
    }
    *is_loaded = true;
    Ok(())
}

/// The tests' image, in the format of `docker save`.
fn image() -> Result<&'static Path> {
    static IMAGE_TAR: Mutex<Option<&Path>> = Mutex::new(None);
    let mut made = IMAGE_TAR.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(path) = *made {
        return Ok(path);
    }
    let path = saved_image(&scratch("image")?, Some(IMAGE), |layer| {
        let layer = format!("sha256:{layer}");
        let config = serde_json::json!({
            "architecture": architecture(), "os": "linux",
            "config": {"Env": ["PATH=/bin"], "Cmd": ["sh"]},
            "rootfs": {"type": "layers", "diff_ids": [layer]},
        });
        config.to_string()
    })?;
    let path: &'static Path = Box::leak(path.into_boxed_path());
    *made = Some(path);
    Ok(path)
}

/// Value of the line `name=` in a script's output.
fn line<'a>(said: &'a str, name: &str) -> Result<&'a str> {
    let mut lines = said.lines().map(str::trim_end);
    let found = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
    found.with_context(|| format!("no {name} in {said}"))
}
