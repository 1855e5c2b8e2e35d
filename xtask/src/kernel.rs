//! The guest kernel: Debian's Linux source, the patches in `guest-kernel/patches` and the fragments
//! in `guest-kernel/config`.

use crate::{cache, proc, setup};
use anyhow::{Context, Result, bail};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const SOURCE_PACKAGE: &str = "linux-source-6.12";
const SOURCE_TAR: &str = "/usr/src/linux-source-6.12.tar.xz";

const SYMBOLS: &str = "System.map";

/// A built guest kernel.
pub(crate) struct Kernel {
    /// Uncompressed ELF, for the 64-bit boot protocol.
    pub(crate) vmlinux: PathBuf,
    /// Compressed image.
    pub(crate) bzimage: PathBuf,
    /// The addresses of its functions.
    pub(crate) symbols: PathBuf,
}

/// `cargo xtask kernel`
pub(crate) fn run() -> Result<()> {
    setup::ensure()?;
    let kernel = ensure()?;
    for file in [&kernel.vmlinux, &kernel.bzimage] {
        let mib = fs::metadata(file)?.len() as f64 / (1024.0 * 1024.0);
        println!("{} ({mib:.1} MiB)", file.display());
    }
    Ok(())
}

/// Builds the guest kernel if the cache does not have it.
pub(crate) fn ensure() -> Result<Kernel> {
    let source = Source::find(patches()?)?;
    let wanted = fragments()?;
    let compiler = proc::output(Command::new("gcc").arg("-dumpfullversion"))?;
    let key = cache::key([source.identity.as_str(), &text(&wanted), &compiler, SYMBOLS]);
    let dir = cache::ensure("kernel", &key, |dir| build(&source, &wanted, &key, dir))?;
    let file = |prefix: &str| -> Result<PathBuf> {
        fs::read_dir(&dir)?
            .filter_map(|e| e.ok().map(|e| e.path()))
            .find(|p| {
                p.file_name()
                    .is_some_and(|n| n.to_string_lossy().starts_with(prefix))
            })
            .with_context(|| {
                format!(
                    "{} has no {prefix}*; remove it to build anew",
                    dir.display()
                )
            })
    };
    Ok(Kernel {
        vmlinux: file("vmlinux-")?,
        bzimage: file("bzImage-")?,
        symbols: file(SYMBOLS)?,
    })
}

/// A kernel source tree and what identifies it.
struct Source {
    identity: String,
    given: Option<PathBuf>,
    patches: Vec<PathBuf>,
}

impl Source {
    fn find(patches: Vec<PathBuf>) -> Result<Self> {
        let mut source = Self::unpatched()?;
        for patch in &patches {
            source.identity += &fs::read_to_string(patch)?;
        }
        source.patches = patches;
        Ok(source)
    }

    fn unpatched() -> Result<Self> {
        if let Some(dir) = std::env::var_os("KERNEL_SRC") {
            let dir = PathBuf::from(dir);
            let makefile = fs::read_to_string(dir.join("Makefile")).with_context(|| {
                format!("KERNEL_SRC={} is not a kernel source tree", dir.display())
            })?;
            let head: String = makefile.lines().take(6).collect();
            return Ok(Self {
                identity: format!("{}:{head}", dir.display()),
                given: Some(dir),
                patches: Vec::new(),
            });
        }
        let version = source_version()?;
        Ok(Self {
            identity: format!("{SOURCE_PACKAGE}:{version}"),
            given: None,
            patches: Vec::new(),
        })
    }

    fn tree(&self) -> Result<PathBuf> {
        if let Some(dir) = &self.given {
            // Somebody's own tree stays as it is.
            for patch in &self.patches {
                let applied = apply(dir, patch)
                    .args(["--reverse", "--dry-run"])
                    .output()?;
                if !applied.status.success() {
                    bail!(
                        "KERNEL_SRC={} lacks a patch: apply it with `patch -d {0} -p1 -i {}`",
                        dir.display(),
                        patch.display()
                    );
                }
            }
            return Ok(dir.clone());
        }
        let dir = cache::ensure("source", &cache::key([&self.identity]), |dir| {
            proc::long(
                "unpacking the kernel source",
                Command::new("tar")
                    .args(["-xf", SOURCE_TAR, "--strip-components=1", "-C"])
                    .arg(dir),
                &dir.with_extension("log"),
            )?;
            for patch in &self.patches {
                proc::run(&mut apply(dir, patch))?;
            }
            Ok(())
        })?;
        Ok(dir)
    }
}

fn apply(tree: &Path, patch: &Path) -> Command {
    let mut command = Command::new("patch");
    command
        .args(["--strip=1", "--force", "--quiet", "--directory"])
        .arg(tree)
        .arg("--input")
        .arg(patch);
    command
}

/// What is changed in Linux, in the order of the names.
fn patches() -> Result<Vec<PathBuf>> {
    files_with("guest-kernel/patches", "patch")
}

/// A directory's files with this extension, in the order of their names.
fn files_with(directory: &str, extension: &str) -> Result<Vec<PathBuf>> {
    let dir = proc::checkout().join(directory);
    let mut files: Vec<PathBuf> = fs::read_dir(&dir)
        .with_context(|| format!("cannot read {}", dir.display()))?
        .filter_map(|e| e.ok().map(|e| e.path()))
        .filter(|p| p.extension().is_some_and(|e| e == extension))
        .collect();
    files.sort();
    Ok(files)
}

/// The installed version of Debian's kernel source package.
pub(crate) fn source_version() -> Result<String> {
    proc::output(Command::new("dpkg-query").args(["-W", "-f=${Version}", SOURCE_PACKAGE]))
}

/// Every option of the fragments: name to value, where `n` means "must be off".
fn fragments() -> Result<BTreeMap<String, String>> {
    let mut options = BTreeMap::new();
    for file in files_with("guest-kernel/config", "config")? {
        for line in fs::read_to_string(&file)?.lines() {
            let line = line.trim();
            let (name, value) = if let Some(off) = line
                .strip_prefix("# ")
                .and_then(|l| l.strip_suffix(" is not set"))
            {
                (off, "n")
            } else if line.is_empty() || line.starts_with('#') {
                continue;
            } else {
                line.split_once('=')
                    .with_context(|| format!("{}: cannot read `{line}`", file.display()))?
            };
            if let Some(before) = options.insert(name.to_owned(), value.to_owned())
                && before != value
            {
                bail!("{}: {name} was set to {before} before", file.display());
            }
        }
    }
    Ok(options)
}

fn text(options: &BTreeMap<String, String>) -> String {
    options
        .iter()
        .map(|(name, value)| match value.as_str() {
            "n" => format!("# {name} is not set\n"),
            value => format!("{name}={value}\n"),
        })
        .collect()
}

fn build(source: &Source, wanted: &BTreeMap<String, String>, key: &str, out: &Path) -> Result<()> {
    let tree = source.tree()?;
    let objects = out.join("objects");
    fs::create_dir_all(&objects)?;
    let all = objects.join("all.config");
    fs::write(&all, text(wanted))?;
    let log = out.with_extension("log");
    let make = || {
        let mut make = Command::new("make");
        make.arg("-C")
            .arg(&tree)
            .arg(format!("O={}", objects.display()))
            .arg("ARCH=x86_64")
            // The same inputs give the same image.
            .env("KBUILD_BUILD_TIMESTAMP", "2026-01-01")
            .env("KBUILD_BUILD_USER", "koya")
            .env("KBUILD_BUILD_HOST", "koya");
        make
    };
    proc::long(
        "configuring the guest kernel",
        make().arg("allnoconfig").env("KCONFIG_ALLCONFIG", &all),
        &log,
    )?;
    verify(wanted, &fs::read_to_string(objects.join(".config"))?)?;
    let jobs = std::thread::available_parallelism()?.get();
    proc::long(
        "building the guest kernel (10 to 20 minutes on two cores, once)",
        make().arg(format!("-j{jobs}")).args(["vmlinux", "bzImage"]),
        &log,
    )?;
    let release = fs::read_to_string(objects.join("include/config/kernel.release"))?;
    let release = release.trim();
    proc::run(
        Command::new("strip")
            .arg("-s")
            .arg("-o")
            .arg(out.join(format!("vmlinux-{release}-{key}")))
            .arg(objects.join("vmlinux")),
    )?;
    fs::copy(
        objects.join("arch/x86/boot/bzImage"),
        out.join(format!("bzImage-{release}-{key}")),
    )?;
    fs::copy(objects.join(".config"), out.join("config"))?;
    fs::copy(objects.join(SYMBOLS), out.join(SYMBOLS))?;
    fs::remove_dir_all(&objects)?;
    Ok(())
}

/// Kconfig drops what it does not know or cannot satisfy without a word; we do not.
fn verify(wanted: &BTreeMap<String, String>, config: &str) -> Result<()> {
    let mut lost = Vec::new();
    for (name, value) in wanted {
        let set = config
            .lines()
            .find_map(|l| l.strip_prefix(name)?.strip_prefix('='))
            .unwrap_or("n");
        if set != value {
            lost.push(format!("{name}: wanted {value}, got {set}"));
        }
    }
    if !lost.is_empty() {
        bail!(
            "the kernel's configuration did not keep these options:\n{}",
            lost.join("\n")
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_option_that_kconfig_drops_is_an_error() {
        let wanted = BTreeMap::from([("CONFIG_A".into(), "y".into())]);
        assert!(verify(&wanted, "CONFIG_A=y\n").is_ok());
        assert!(verify(&wanted, "CONFIG_AB=y\n").is_err());
    }

    #[test]
    fn an_option_that_must_be_off_is_checked() {
        let wanted = BTreeMap::from([("CONFIG_A".into(), "n".into())]);
        assert!(verify(&wanted, "# CONFIG_A is not set\n").is_ok());
        assert!(verify(&wanted, "CONFIG_A=y\n").is_err());
    }

    #[test]
    fn the_fragments_parse_and_do_not_contradict_each_other() {
        let options = fragments().unwrap();
        assert_eq!(options["CONFIG_VIRTIO_FS"], "y");
        assert_eq!(options["CONFIG_MODULES"], "n");
    }
}
