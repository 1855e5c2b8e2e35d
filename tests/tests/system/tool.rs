//! Test utilities: a root file system, the `koya` command, waiting for conditions.

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest as _, Sha256};
use std::fs;
use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Time limit for any wait.
pub(crate) const LIMIT: Duration = Duration::from_secs(120);

/// A new directory for each caller: on the rig's ext4 scratch disk, if present.
pub(crate) fn scratch(name: &str) -> Result<PathBuf> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::SeqCst);
    let dir = scratch_base().join(format!("{name}-{}-{number}", std::process::id()));
    fs::create_dir_all(&dir)?;
    Ok(dir)
}

/// Parent of such directories.
pub(crate) fn scratch_base() -> PathBuf {
    match Path::new("/run/scratch").is_dir() {
        true => PathBuf::from("/run/scratch"),
        false => std::env::temp_dir(),
    }
}

/// A tmpfs on the host, unmounted on drop.
pub(crate) struct Mounted<'p>(&'p Path);

impl<'p> Mounted<'p> {
    pub(crate) fn at(path: &'p Path) -> Result<Self> {
        let mut mount = Command::new("mount");
        stdout(mount.args(["-t", "tmpfs", "tmpfs"]).arg(path).output()?)?;
        Ok(Self(path))
    }
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        Command::new("umount").arg(self.0).status().ok();
    }
}

/// The architecture, as named in images.
pub(crate) fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "aarch64" => "arm64",
        _ => "amd64",
    }
}

/// Runs ip(8) and returns its output.
pub(crate) fn ip(words: &[&str]) -> Result<String> {
    stdout(Command::new("ip").args(words).output()?)
}

/// A root file system of a single static busybox; tests that write have one of their own.
pub(crate) fn busybox(at: &Path) -> Result<()> {
    for dir in [
        "bin", "etc", "proc", "sys", "dev", "tmp", "root", "data", "mnt",
    ] {
        fs::create_dir_all(at.join(dir))?;
    }
    fs::copy("/bin/busybox", at.join("bin/busybox")).context("busybox-static is not installed")?;
    fs::write(
        at.join("etc/passwd"),
        "root:x:0:0:root:/root:/bin/sh\nweb:x:33:33::/tmp:/bin/sh\n",
    )?;
    fs::write(at.join("etc/resolv.conf"), "")?;
    fs::write(at.join("etc/group"), "root:x:0:\nweb:x:33:\nlog:x:40:web\n")?;
    let list = Command::new("/bin/busybox").arg("--list").output()?;
    for name in String::from_utf8(list.stdout)?.lines() {
        let link = at.join("bin").join(name);
        if !link.exists() {
            symlink("busybox", link)?;
        }
    }
    Ok(())
}

/// One shared by all tests, which must not write to it.
pub(crate) fn shared_rootfs() -> &'static Path {
    static ROOTFS: OnceLock<PathBuf> = OnceLock::new();
    ROOTFS.get_or_init(|| {
        let dir = scratch("rootfs").expect("a scratch directory");
        busybox(&dir).expect("a root file system");
        dir
    })
}

/// A `koya` command with these arguments.
pub(crate) fn koya<S: AsRef<std::ffi::OsStr>>(args: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new("koya");
    command.args(args).stdin(Stdio::null());
    command
}

/// `koya run OPTIONS --rootfs SHARED -- COMMAND`
pub(crate) fn run(options: &[&str], command: &[&str]) -> Result<Output> {
    run_in(shared_rootfs(), options, command)
}

/// Like [`run`], on another root file system.
///
/// In the emulated rig, a guest kernel sometimes crashes at an arbitrary point (a fault in an interrupt, a triple fault),
/// which was never seen elsewhere. Such a run is repeated once, with a message; on hardware it is a failure.
pub(crate) fn run_in(rootfs: &Path, options: &[&str], command: &[&str]) -> Result<Output> {
    let run = || {
        koya(["run", "--rootfs"])
            .arg(rootfs)
            .args(options)
            .arg("--")
            .args(command)
            .output()
            .context("cannot start koya")
    };
    let output = run()?;
    let emulated = std::env::var("KOYA_RIG").is_ok_and(|rig| rig == "emulated");
    let said = String::from_utf8_lossy(&output.stderr);
    let died = said.contains("triple fault") || said.contains("Fatal exception in interrupt");
    if emulated && died {
        eprintln!("system tests: A GUEST DIED IN THE EMULATED RIG, trying once more:\n{said}");
        return run();
    }
    Ok(output)
}

/// Output of a command that must succeed, without the trailing newline.
pub(crate) fn stdout(output: Output) -> Result<String> {
    ensure!(
        output.status.success(),
        "{}: {}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8(output.stdout)?.trim_end().to_owned())
}

/// Kills a running process.
pub(crate) fn kill(pid: &str) -> Result<()> {
    let killed = Command::new("kill").args(["-KILL", pid]).status()?;
    ensure!(killed.success(), "no process {pid}");
    Ok(())
}

/// Runs a shell script in a container and returns its output.
pub(crate) fn sh(options: &[&str], script: &str) -> Result<String> {
    stdout(run(options, &["sh", "-c", script])?)
}

/// Runs a command with `input` on its standard input, and returns its output.
pub(crate) fn feed(mut command: Command, input: &[u8]) -> Result<Output> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut stdin = child.stdin.take().context("a pipe")?;
    let input = input.to_vec();
    let writer = std::thread::spawn(move || stdin.write_all(&input));
    let output = child.wait_with_output()?;
    writer
        .join()
        .map_err(|_| anyhow::anyhow!("the writer panicked"))??;
    Ok(output)
}

/// Creates a tar in the format of `docker save`, with the tests' root file system. `config` returns the image's
/// configuration for the digest of its layer.
pub(crate) fn saved_image(
    dir: &Path,
    tag: Option<&str>,
    config: impl FnOnce(&str) -> String,
) -> Result<PathBuf> {
    let tar = |name: &str, from: &Path, what: &[&str]| -> Result<PathBuf> {
        let path = dir.join(name);
        let mut tar = Command::new("tar");
        tar.arg("-C").arg(from).arg("-cf").arg(&path).args(what);
        // Files that change during the run of tar are read again.
        let is_whole = (0..5).any(|_| tar.status().is_ok_and(|status| status.success()));
        ensure!(is_whole, "tar -cf {name}");
        Ok(path)
    };
    fs::create_dir_all(dir.join("l"))?;
    let layer = tar("l/layer.tar", shared_rootfs(), &["."])?;
    let digest = Sha256::digest(fs::read(layer)?);
    let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    fs::write(dir.join("c.json"), config(&digest))?;
    let manifest = serde_json::json!([{"Config": "c.json", "RepoTags": tag.map(|tag| [tag]), "Layers": ["l/layer.tar"]}]);
    fs::write(dir.join("manifest.json"), manifest.to_string())?;
    tar("image.tar", dir, &["c.json", "manifest.json", "l"])
}

/// Waits until `look` returns a value.
pub(crate) fn until<T>(what: &str, look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    until_within(LIMIT, what, look)
}

/// Like [`until`], for operations that are slow on a shared emulated CPU.
pub(crate) fn until_within<T>(
    limit: Duration,
    what: &str,
    mut look: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let started = Instant::now();
    while started.elapsed() < limit {
        if let Some(found) = look()? {
            return Ok(found);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    bail!("{what}: not after {limit:?}")
}

/// A container in the background, killed and removed on drop.
pub(crate) struct Background {
    pub(crate) name: String,
}

impl Background {
    pub(crate) fn start(name: &str, options: &[&str], command: &[&str]) -> Result<Self> {
        let mut all = vec!["-d", "--name", name];
        all.extend(options);
        let printed = stdout(run(&all, command)?)?;
        ensure!(printed == name, "printed {printed:?}");
        Ok(Self { name: name.into() })
    }

    /// The output so far: standard output, then standard error.
    pub(crate) fn said(&self) -> Result<String> {
        let logs = koya(["logs", &self.name]).output()?;
        let err = String::from_utf8_lossy(&logs.stderr).into_owned();
        let out = stdout(logs)?;
        let end = if out.is_empty() || err.is_empty() {
            ""
        } else {
            "\n"
        };
        Ok(format!("{out}{end}{}", err.trim_end()))
    }

    /// Waits until `look` accepts the output.
    pub(crate) fn wait_until(&self, what: &str, look: impl Fn(&str) -> bool) -> Result<()> {
        until(what, || Ok(look(&self.said()?).then_some(())))
            .with_context(|| format!("it said {:?}", self.said()))
    }

    pub(crate) fn exec(&self, options: &[&str], command: &[&str]) -> Result<Output> {
        Ok(koya(["exec"])
            .args(options)
            .arg(&self.name)
            .args(command)
            .output()?)
    }

    /// PID of the sandbox on the host.
    pub(crate) fn pid(&self) -> Result<u32> {
        let list: serde_json::Value =
            serde_json::from_str(&stdout(koya(["ps", "--json"]).output()?)?)?;
        let row = list
            .as_array()
            .and_then(|rows| rows.iter().find(|r| r["name"] == self.name.as_str()))
            .context("not in `koya ps`")?;
        Ok(row["pid"].as_u64().context("no pid")? as u32)
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        koya(["rm", "--force", &self.name]).output().ok();
    }
}
