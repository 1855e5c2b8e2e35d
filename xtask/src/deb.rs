//! The Debian package: an installation below `/usr`, packed by cargo-deb.

use crate::arch::{Arch, ArchArgs};
use crate::{cache, deb_try, install, proc, setup};
use anyhow::{Context, Result, ensure};
use std::fs;
use std::io::{Seek, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

const CARGO_DEB: &str = "3.8.0";
/// Drop-in directory of podman's configuration.
const PODMAN: (&str, &str) = (
    "share/doc/koya/examples/podman.conf",
    "etc/containers/containers.conf.d/koya.conf",
);

#[derive(clap::Args)]
pub(crate) struct DebArgs {
    #[command(flatten)]
    arch: ArchArgs,
    /// Pack the full guest kernel as well, which `cargo xtask kernel --full` has built
    #[arg(long)]
    full: bool,
    /// Check the package with lintian afterwards
    #[arg(long)]
    lint: bool,
    /// Try the package on a new Debian 13 with Docker in an emulated host: install it, use it and purge it
    #[arg(long = "try", conflicts_with = "arch")]
    is_tried: bool,
}

/// The list of changes, at its place in other installations, and that of Debian's policy (section 12.7) below `usr`.
const CHANGELOG: (&str, &str) = ("share/doc/koya/CHANGELOG.md", "share/doc/koya/changelog.gz");

/// `cargo xtask deb`
pub(crate) fn run(args: &DebArgs) -> Result<()> {
    let package = make(args.arch.arch(), args.full)?;
    let mib = fs::metadata(&package)?.len() as f64 / (1024.0 * 1024.0);
    println!("{} ({mib:.1} MiB)", package.display());
    if args.lint {
        setup::ensure_these(&[("lintian", "checking the Debian package")])?;
        let mut lintian = Command::new("lintian");
        // Allows a run as root.
        lintian.args(["--allow-root", "--fail-on", "error,warning"]);
        proc::run(lintian.arg(&package))?;
        println!("lintian: nothing but what runtime/packaging/lintian-overrides explains");
    }
    match args.is_tried {
        true => deb_try::run(&package),
        false => Ok(()),
    }
}

/// Builds the package for an architecture, and returns its path.
fn make(arch: Arch, full: bool) -> Result<PathBuf> {
    let work = proc::checkout().join("target/deb");
    let tree = work.join("tree");
    if tree.exists() {
        fs::remove_dir_all(&tree)?;
    }
    let usr = tree.join("usr");
    for file in install::lay_out(arch, Path::new("/usr"))? {
        if file.at.ends_with("/vmlinux-full") && !full {
            continue;
        }
        let mut content = file.content()?;
        let mut at = file.at.as_str();
        if at == CHANGELOG.0 {
            at = CHANGELOG.1;
            content = compress(&content)?;
        }
        if file.at == PODMAN.0 {
            install::write(&tree, PODMAN.1, &content, file.mode)?;
        }
        install::write(&usr, at, &content, file.mode)?;
        if file.at.starts_with("bin/") {
            proc::run(arch.tool("strip").arg(usr.join(&file.at)))?;
        }
    }
    let overrides = install::packaging("lintian-overrides")?;
    let place = "share/lintian/overrides/koya";
    install::write(&usr, place, overrides.as_bytes(), 0o644)?;
    let version = env!("CARGO_PKG_VERSION");
    install::write(&work, "changelog", changelog(version)?.as_bytes(), 0o644)?;

    let package = work.join(format!("koya_{version}_{}.deb", arch.debian()));
    eprintln!("packing {}", package.display());
    let mut cargo = proc::cargo();
    cargo.arg("deb").env("PATH", with_cargo_deb()?);
    cargo.args([
        "--no-build",
        "--no-strip",
        "--quiet",
        "--package",
        "koya-cli",
    ]);
    cargo
        .args(["--target", arch.gnu(), "--output"])
        .arg(&package);
    proc::run(&mut cargo)?;
    Ok(package)
}

/// Compresses a file as Debian's packages do: with nothing in it that depends on the time or the machine.
fn compress(content: &[u8]) -> Result<Vec<u8>> {
    let mut input = tempfile::tempfile()?;
    input.write_all(content)?;
    input.rewind()?;
    let mut gzip = Command::new("gzip");
    let output = gzip.args(["-9", "--no-name"]).stdin(input).output();
    let output = output.context("cannot run gzip")?;
    ensure!(output.status.success(), "gzip failed ({})", output.status);
    Ok(output.stdout)
}

/// CHANGELOG.md in Debian's format; before a release it has no entry for the version.
fn changelog(version: &str) -> Result<String> {
    let mut date = Command::new("git");
    date.args(["log", "-1", "--format=%cD"])
        .current_dir(proc::checkout());
    let date = proc::output(&mut date)?;
    Ok(format!(
        "koya ({version}-1) unstable; urgency=medium\n\n  * What changed is in CHANGELOG.md of the sources.\n\n \
         -- The Koya developers <koya@localhost>  {}\n",
        date.trim()
    ))
}

/// A PATH on which cargo finds `cargo-deb`.
fn with_cargo_deb() -> Result<String> {
    let key = cache::key([CARGO_DEB]);
    let root = cache::ensure("cargo-deb", &key, |out| {
        let mut install = proc::cargo();
        install.args([
            "install",
            "cargo-deb",
            "--version",
            CARGO_DEB,
            "--locked",
            "--root",
        ]);
        install.arg(out).env_remove("RUSTFLAGS");
        let log = out.with_extension("log");
        proc::long("building cargo-deb", &mut install, &log)
    })?;
    let path = std::env::var("PATH").context("PATH is not set")?;
    Ok(format!("{}:{path}", root.join("bin").display()))
}
