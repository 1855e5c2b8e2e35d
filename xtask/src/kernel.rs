//! The guest kernel: Debian's Linux source, the patches in `guest-kernel/patches` and the fragments
//! in `guest-kernel/config` and in the directory of its architecture; the full one has those in
//! `guest-kernel/config-full` as well.
//! `guest-kernel/README.md` describes how to move to another source.

use crate::arch::{Arch, ArchArgs};
use crate::{build, cache, proc, setup};
use anyhow::{Context, Result, bail};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const SOURCE_PACKAGE: &str = "linux-source-6.12";
const SOURCE_TAR: &str = "/usr/src/linux-source-6.12.tar.xz";
/// The package version for the patches and the goals of the benches.
const PINNED: &str = "6.12.117-1~deb12u1";

/// The fragments of every guest kernel.
const CONFIG: &str = "guest-kernel/config";
/// The additional fragments of the full one.
const FULL: &str = "guest-kernel/config-full";

const SYMBOLS: &str = "System.map";

/// A built guest kernel.
pub(crate) struct Kernel {
    /// The boot image: an uncompressed ELF on x86_64, for the 64-bit boot protocol, an Image on aarch64.
    pub(crate) image: PathBuf,
    /// Compressed image, on x86_64.
    pub(crate) compressed: Option<PathBuf>,
    /// The addresses of its functions.
    pub(crate) symbols: PathBuf,
}

#[derive(clap::Args)]
pub(crate) struct KernelArgs {
    #[command(flatten)]
    arch: ArchArgs,
    /// Build without the patches: the unmodified source with Koya's configuration
    #[arg(long)]
    unpatched: bool,
    /// Build the full kernel: network file systems, tracing and more (docs/guest-kernel.md), for `koya run --kernel full`
    #[arg(long)]
    full: bool,
    /// Use another source tree; it is not modified (patches are applied to a copy)
    #[arg(long, value_name = "DIR")]
    source: Option<PathBuf>,
}

/// `cargo xtask kernel`
pub(crate) fn run(args: &KernelArgs) -> Result<()> {
    setup::ensure()?;
    let arch = args.arch.arch();
    let patches = if args.unpatched {
        Vec::new()
    } else {
        patches()?
    };
    let source = Source::find(args.source.as_deref(), patches)?;
    let kernel = if args.full {
        setup::ensure_these(&[("dwarves", "the types of the full kernel")])?;
        let wanted = with_overrides(options(arch)?, fragments(&[FULL])?);
        of(&source, arch, &wanted)?
    } else {
        of(&source, arch, &options(arch)?)?
    };
    for file in std::iter::once(&kernel.image).chain(&kernel.compressed) {
        let mib = fs::metadata(file)?.len() as f64 / (1024.0 * 1024.0);
        println!("{} ({mib:.1} MiB)", file.display());
    }
    if args.full {
        println!("{}", build::install_full(arch, &kernel.image)?.display());
    }
    Ok(())
}

/// Builds the guest kernel if the cache does not have it.
pub(crate) fn ensure(arch: Arch) -> Result<Kernel> {
    of(&Source::find(None, patches()?)?, arch, &options(arch)?)
}

/// Configuration options of the kernel for an architecture.
fn options(arch: Arch) -> Result<Options> {
    fragments(&[CONFIG, arch.kernel().config])
}

/// The kernel built from this source for this architecture with these options, from the cache if possible.
fn of(source: &Source, arch: Arch, wanted: &Options) -> Result<Kernel> {
    arch.ensure_tools()?;
    let compiler = proc::output(arch.tool("gcc").arg("-dumpfullversion"))?;
    let key = cache::key([source.identity.as_str(), &text(wanted), &compiler, SYMBOLS]);
    let dir = cache::ensure("kernel", &key, |dir| build(source, arch, wanted, &key, dir))?;
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
    let image = |path: &str| file(&format!("{}-", file_name(path)));
    Ok(Kernel {
        image: image(arch.kernel().image)?,
        compressed: arch.kernel().compressed.map(image).transpose()?,
        symbols: file(SYMBOLS)?,
    })
}

fn file_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// A kernel source tree with its identification.
struct Source {
    identity: String,
    given: Option<PathBuf>,
    patches: Vec<PathBuf>,
}

impl Source {
    /// Debian's source, or the tree `given`, with `patches`.
    fn find(given: Option<&Path>, patches: Vec<PathBuf>) -> Result<Self> {
        let mut identity = match given {
            Some(dir) => {
                if !dir.join("Kconfig").exists() {
                    bail!("{} is not a kernel source tree", dir.display());
                }
                format!("{}:{}", dir.display(), state_of(dir)?)
            }
            None => {
                let version = source_version()?;
                if let Some(note) = other_version(&version) {
                    eprintln!("{note}");
                }
                format!("{SOURCE_PACKAGE}:{version}")
            }
        };
        for patch in &patches {
            identity += &fs::read_to_string(patch)?;
        }
        Ok(Self {
            identity,
            given: given.map(Path::to_path_buf),
            patches,
        })
    }

    fn tree(&self) -> Result<PathBuf> {
        cache::ensure("source", &cache::key([&self.identity]), |dir| {
            let mut fill = Command::new(if self.given.is_some() { "cp" } else { "tar" });
            match &self.given {
                // The user's tree is not modified.
                Some(given) => fill.args(["-a", "--reflink=auto"]).arg(given.join(".")),
                None => fill.args(["-xf", SOURCE_TAR, "--strip-components=1", "-C"]),
            };
            proc::long(
                "unpacking the kernel source",
                fill.arg(dir),
                &dir.with_extension("log"),
            )?;
            for patch in &self.patches {
                apply(dir, patch)?;
            }
            Ok(())
        })
    }
}

/// Hash of the names, sizes and times of a tree's files.
fn state_of(tree: &Path) -> Result<String> {
    let files = proc::output(
        Command::new("find")
            .arg(tree)
            .args(["-name", ".git", "-prune", "-o", "-type", "f"])
            .args(["-printf", "%P %s %T@\n"]),
    )?;
    let mut lines: Vec<&str> = files.lines().collect();
    lines.sort_unstable();
    Ok(cache::key(lines))
}

/// Warning if the installed source is not the version that the patches are for.
fn other_version(installed: &str) -> Option<String> {
    (installed != PINNED).then(|| {
        format!(
            "note: {SOURCE_PACKAGE} {installed} is installed, the patches are for {PINNED}; building with \
             what is installed (`apt-get install {SOURCE_PACKAGE}={PINNED}` has the other, as long as an archive does)"
        )
    })
}

/// Applies a patch that fits exactly, or is already applied: an inexact match could change the wrong code.
fn apply(tree: &Path, patch: &Path) -> Result<()> {
    let run = |more: &[&str]| {
        Command::new("patch")
            .args(["--strip=1", "--force", "--fuzz=0", "--directory"])
            .arg(tree)
            .arg("--input")
            .arg(patch)
            .args(more)
            .output()
            .context("cannot start patch")
    };
    let tried = run(&["--dry-run"])?;
    if tried.status.success() {
        let done = run(&["--quiet", "--no-backup-if-mismatch"])?;
        if done.status.success() {
            return Ok(());
        }
    } else if run(&["--reverse", "--dry-run"])?.status.success() {
        return Ok(());
    }
    bail!(
        "{} does not apply to this source exactly (its purpose is in guest-kernel/README.md):\n{}",
        patch.display(),
        String::from_utf8_lossy(&tried.stdout).trim_end()
    )
}

/// The patches for Linux, in the order of their names.
fn patches() -> Result<Vec<PathBuf>> {
    files_with("guest-kernel/patches", "patch")
}

/// The files of a directory with this extension, in the order of their names.
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

/// Options: name to value, where `n` means "must be off".
type Options = BTreeMap<String, String>;

/// All options of the fragments in these directories.
fn fragments(directories: &[&str]) -> Result<Options> {
    let mut options = BTreeMap::new();
    let mut files = Vec::new();
    for directory in directories {
        files.extend(files_with(directory, "config")?);
    }
    for file in files {
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

/// Merges the options of the full kernel, which override the others.
fn with_overrides(mut options: Options, others: Options) -> Options {
    options.extend(others);
    options
}

fn text(options: &Options) -> String {
    options
        .iter()
        .map(|(name, value)| match value.as_str() {
            "n" => format!("# {name} is not set\n"),
            value => format!("{name}={value}\n"),
        })
        .collect()
}

fn build(source: &Source, arch: Arch, wanted: &Options, key: &str, out: &Path) -> Result<()> {
    let tree = source.tree()?;
    let objects = out.join("objects");
    fs::create_dir_all(&objects)?;
    let all = objects.join("all.config");
    fs::write(&all, text(wanted))?;
    let log = out.with_extension("log");
    let how = arch.kernel();
    let make = || {
        let mut make = Command::new("make");
        make.arg("-C")
            .arg(&tree)
            .arg(format!("O={}", objects.display()))
            .arg(format!("ARCH={}", how.arch))
            .arg(format!("CROSS_COMPILE={}", arch.tools()))
            // Makes the image reproducible.
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
    let images = || std::iter::once(how.image).chain(how.compressed);
    proc::long(
        &format!(
            "building the guest kernel for {} (10 to 20 minutes on two cores, once)",
            arch.name()
        ),
        make()
            .arg(format!("-j{jobs}"))
            .args(images().map(file_name)),
        &log,
    )?;
    let release = fs::read_to_string(objects.join("include/config/kernel.release"))?;
    let release = release.trim();
    for image in images() {
        let to = out.join(format!("{}-{release}-{key}", file_name(image)));
        let from = objects.join(image);
        match image {
            // Strips everything that is not loaded.
            "vmlinux" => proc::run(arch.tool("strip").arg("-s").arg("-o").arg(to).arg(from))?,
            _ => fs::copy(from, to).map(|_| ())?,
        }
    }
    fs::copy(objects.join(".config"), out.join("config"))?;
    fs::copy(objects.join(SYMBOLS), out.join(SYMBOLS))?;
    fs::remove_dir_all(&objects)?;
    Ok(())
}

/// Kconfig silently drops options that are unknown or have unmet dependencies; this reports them.
fn verify(wanted: &Options, config: &str) -> Result<()> {
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

    /// A tree of one file with nine lines, and a patch of its fifth whose context begins with `first`.
    fn tree_and_patch(name: &str, first: &str) -> (PathBuf, PathBuf) {
        let dir = std::env::temp_dir().join(format!("koya-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("f"), "1\n2\n3\n4\n5\n6\n7\n8\n9\n").unwrap();
        let patch = dir.join("a.patch");
        let text = format!(
            "why\n\n--- a/f\n+++ b/f\n@@ -2,7 +2,7 @@\n {first}\n 3\n 4\n-5\n+five\n 6\n 7\n 8\n"
        );
        fs::write(&patch, text).unwrap();
        (dir, patch)
    }

    #[test]
    fn a_patch_applies_once_and_is_known_again() {
        let (dir, patch) = tree_and_patch("patch-fits", "2");
        apply(&dir, &patch).unwrap();
        apply(&dir, &patch).unwrap();
        let file = fs::read_to_string(dir.join("f")).unwrap();
        assert_eq!(file, "1\n2\n3\n4\nfive\n6\n7\n8\n9\n");
        fs::remove_dir_all(&dir).unwrap();
    }

    /// `patch` by itself would apply it with only two lines of context.
    #[test]
    fn a_patch_whose_context_changed_is_refused() {
        let (dir, patch) = tree_and_patch("patch-fuzz", "two");
        let error = apply(&dir, &patch).unwrap_err().to_string();
        assert!(
            error.contains("does not apply to this source exactly"),
            "{error}"
        );
        let file = fs::read_to_string(dir.join("f")).unwrap();
        assert_eq!(file, "1\n2\n3\n4\n5\n6\n7\n8\n9\n");
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn another_tree_is_known_by_what_it_holds() {
        let (dir, _) = tree_and_patch("tree-state", "2");
        let before = state_of(&dir).unwrap();
        assert_eq!(state_of(&dir).unwrap(), before);
        fs::write(dir.join("f"), "longer than it was, by a line\n").unwrap();
        assert_ne!(state_of(&dir).unwrap(), before);
        assert!(Source::find(Some(&dir), Vec::new()).is_err());
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn another_version_of_the_source_is_named() {
        assert_eq!(other_version(PINNED), None);
        let note = other_version("6.12.200-1").unwrap();
        assert!(
            note.contains("6.12.200-1") && note.contains(PINNED),
            "{note}"
        );
    }

    #[test]
    fn the_fragments_parse_and_do_not_contradict_each_other() {
        for arch in [Arch::X86_64, Arch::Aarch64] {
            let options = options(arch).unwrap();
            assert_eq!(options["CONFIG_VIRTIO_FS"], "y");
            assert_eq!(options["CONFIG_MODULES"], "n");
            assert_eq!(options["CONFIG_FTRACE"], "n");
            let of_x86_64 = options.contains_key("CONFIG_PVH");
            assert_eq!(of_x86_64, arch == Arch::X86_64);
            let full = with_overrides(options, fragments(&[FULL]).unwrap());
            assert_eq!(full["CONFIG_VIRTIO_FS"], "y");
            assert_eq!(full["CONFIG_FTRACE"], "y");
            assert_eq!(full["CONFIG_FUNCTION_TRACER"], "n");
        }
    }
}
