//! Packages of another suite of Debian or another architecture, unpacked into a directory: the machine's own package
//! configuration is not changed.

use crate::arch::Arch;
use crate::{proc, setup};
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Downloads `packages` of `suite` from the mirror of the machine's own Debian packages, and unpacks them into `out`,
/// without their dependencies.
pub(crate) fn unpack(suite: &str, packages: &[&str], out: &Path) -> Result<()> {
    unpack_for(Arch::of_this_machine(), suite, packages, out)
}

/// As [`unpack`], for an architecture.
pub(crate) fn unpack_for(arch: Arch, suite: &str, packages: &[&str], out: &Path) -> Result<()> {
    let apt = Apt::new(arch, suite, out)?;
    let what = format!("downloading {} of {suite} (once)", packages.join(", "));
    apt.run(&what, &[&["download"], packages].concat())?;
    apt.unpack(&apt.own, out)?;
    apt.remove()
}

/// As [`unpack_for`], with all dependencies, as a root file system. The packages are not configured: maintainer scripts do
/// not run.
pub(crate) fn unpack_root(arch: Arch, suite: &str, packages: &[&str], out: &Path) -> Result<()> {
    let apt = Apt::new(arch, suite, out)?;
    let what = format!("downloading programs for {} (once)", arch.name());
    let words = [
        "install",
        "--download-only",
        "--no-install-recommends",
        "-y",
    ];
    apt.run(&what, &[&words, packages].concat())?;
    for directory in ["bin", "sbin", "lib"] {
        fs::create_dir_all(out.join("usr").join(directory))?;
        std::os::unix::fs::symlink(format!("usr/{directory}"), out.join(directory))?;
    }
    apt.unpack(&apt.own.join("cache/archives"), out)?;
    apt.remove()
}

/// An apt with separate lists, cache and sources.
struct Apt {
    own: PathBuf,
    log: PathBuf,
}

impl Apt {
    /// An apt with the lists of `suite`, in a directory of `out`.
    fn new(arch: Arch, suite: &str, out: &Path) -> Result<Self> {
        let own = out.join("apt");
        for dir in ["lists", "cache/archives/partial"] {
            fs::create_dir_all(own.join(dir))?;
        }
        let keys = "/usr/share/keyrings/debian-archive-keyring.gpg";
        let source =
            |suite: &str, mirror: &str| format!("deb [signed-by={keys}] {mirror} {suite} main\n");
        let mut sources = source(suite, &mirror(DEBIAN)?);
        if suite == RELEASE {
            sources += &source(&format!("{suite}-security"), &mirror(SECURITY)?);
        }
        fs::write(own.join("sources.list"), sources)?;
        // No package counts as installed, so that all dependencies are downloaded.
        fs::write(own.join("status"), "")?;
        let text = format!(
            "Dir::State::Lists \"{0}/lists\";\nDir::State::Status \"{0}/status\";\nDir::Cache \"{0}/cache\";\n\
             Dir::Etc::SourceList \"{0}/sources.list\";\nDir::Etc::SourceParts \"-\";\n\
             APT::Sandbox::User \"root\";\nAPT::Architecture \"{1}\";\nAPT::Architectures {{ \"{1}\"; }};\n",
            own.display(),
            arch.debian()
        );
        fs::write(own.join("apt.conf"), text)?;
        let log = out.with_extension("log");
        let apt = Self { own, log };
        apt.run(&format!("the package list of {suite}"), &["update"])?;
        Ok(apt)
    }

    fn run(&self, what: &str, args: &[&str]) -> Result<()> {
        let mut apt = Command::new("apt-get");
        apt.arg("-q").args(args).current_dir(&self.own);
        apt.env("APT_CONFIG", self.own.join("apt.conf"));
        proc::long(what, &mut apt, &self.log)
    }

    /// Unpacks the packages in a directory.
    fn unpack(&self, from: &Path, out: &Path) -> Result<()> {
        for entry in fs::read_dir(from)? {
            let path = entry?.path();
            if path.extension().is_some_and(|e| e == "deb") {
                unpack_package(&path, out)?;
            }
        }
        Ok(())
    }

    fn remove(self) -> Result<()> {
        Ok(fs::remove_dir_all(&self.own)?)
    }
}

/// Unpacks a package like dpkg: an existing link to a directory is kept, such as `bin` for `usr/bin`.
fn unpack_package(package: &Path, out: &Path) -> Result<()> {
    let mut unpacking = Command::new("dpkg-deb");
    unpacking.arg("--fsys-tarfile").arg(package);
    let mut unpacking = unpacking.stdout(Stdio::piped()).spawn()?;
    let files = unpacking.stdout.take().context("a pipe")?;
    let mut tar = Command::new("tar");
    tar.args(["-x", "--keep-directory-symlink", "-C"]).arg(out);
    proc::run(tar.stdin(files))?;
    if !unpacking.wait()?.success() {
        bail!("{} cannot be unpacked", package.display());
    }
    Ok(())
}

/// The machine's own release.
pub(crate) const RELEASE: &str = "bookworm";

/// A component of the machine's package sources: name of the suite, and apt's label for it.
type Part = (&'static str, &'static str);
const DEBIAN: Part = (RELEASE, "Label: Debian");
const SECURITY: Part = ("bookworm-security", "Label: Debian-Security");

/// The address of the mirror of the machine's own Debian packages.
fn mirror((name, label): Part) -> Result<String> {
    setup::package_lists()?;
    let listed = proc::output(Command::new("apt-get").args([
        "indextargets",
        "--format",
        "$(CODENAME) $(REPO_URI)",
        "Created-By: Packages",
        label,
    ]))?;
    listed
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))
        .map(str::to_owned)
        .with_context(|| format!("apt-get names no source of Debian 12 packages ({name})"))
}
