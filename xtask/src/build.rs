//! What it takes to run a container: the koya command, containerd's shim, the agent in its
//! initramfs, the guest kernel. They are put together in `target/koya` as they would be installed:
//! `bin/koya`, `bin/koya-runtime`, `bin/containerd-shim-koya-v2`, `share/koya/vmlinux`, `share/koya/initramfs`.

use crate::archive::Archive;
use crate::{kernel, proc, setup};
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// What runs in guests is built for: static, with glibc, because the agent's seccomp library is C.
const GUEST_TARGET: &str = "x86_64-unknown-linux-gnu";

/// What [`host_target`] is where its library can be had.
pub(crate) const MUSL: &str = "x86_64-unknown-linux-musl";

/// Whether what runs on the host is built with musl.
pub(crate) fn has_musl() -> bool {
    host_target() == MUSL
}

/// What runs on the host is built for: a static program of musl's asks the CPU nothing before main, and each
/// answer is an exit where the host is a virtual machine itself; it holds less memory. Where its library
/// can't be had, what guests have will do.
fn host_target() -> &'static str {
    static TARGET: OnceLock<&str> = OnceLock::new();
    TARGET.get_or_init(|| {
        if setup::rust_target(MUSL, "programs for the host") {
            return MUSL;
        }
        eprintln!("build: {MUSL} can't be had (rustup target add {MUSL}): building with glibc");
        GUEST_TARGET
    })
}

/// What runs on the host.
const PROGRAMS: [&str; 3] = ["koya", "koya-runtime", "containerd-shim-koya-v2"];

/// Where the products are.
pub(crate) struct Products {
    pub(crate) bin: PathBuf,
    pub(crate) share: PathBuf,
}

impl Products {
    /// Where they are once they are built.
    pub(crate) fn places() -> Self {
        let out = proc::checkout().join("target/koya");
        Self {
            bin: out.join("bin"),
            share: out.join("share/koya"),
        }
    }

    /// The environment in which the products are found.
    pub(crate) fn env(&self) -> Vec<(String, String)> {
        let path = std::env::var("PATH").unwrap_or_default();
        vec![
            ("PATH".into(), format!("{}:{path}", self.bin.display())),
            ("KOYA_SHARE".into(), self.share.display().to_string()),
        ]
    }
}

/// `cargo xtask build`
pub(crate) fn run() -> Result<()> {
    let products = ensure()?;
    let size = |path: PathBuf| -> Result<String> {
        let mib = fs::metadata(&path)?.len() as f64 / (1024.0 * 1024.0);
        Ok(format!("{} ({mib:.1} MiB)", path.display()))
    };
    for program in PROGRAMS {
        println!("{}", size(products.bin.join(program))?);
    }
    println!("{}", size(products.share.join("vmlinux"))?);
    println!("{}", size(products.share.join("initramfs"))?);
    Ok(())
}

/// Puts the full kernel where `--kernel full` looks for it.
pub(crate) fn install_full(vmlinux: &Path) -> Result<PathBuf> {
    let share = Products::places().share;
    fs::create_dir_all(&share)?;
    let full = share.join("vmlinux-full");
    install(vmlinux, &full)?;
    Ok(full)
}

/// Builds what is out of date and returns where it is.
pub(crate) fn ensure() -> Result<Products> {
    setup::ensure()?;
    let kernel = kernel::ensure()?;
    let products = Products::places();
    fs::create_dir_all(&products.bin)?;
    fs::create_dir_all(&products.share)?;
    install(&kernel.vmlinux, &products.share.join("vmlinux"))?;
    install(&kernel.bzimage, &products.share.join("bzImage"))?;

    eprintln!("building koya");
    for_host(&["koya-cli", "koya-oci", "koya-shim"], &["--bins"])?;
    for program in PROGRAMS {
        install(&released(program), &products.bin.join(program))?;
    }

    eprintln!("building the agent");
    let agent = for_guests("koya-agent", "koya-agent")?;
    let mut archive = Archive::default();
    // The guest has no terminal: what init and its helpers say goes to the kernel's log.
    archive.node("dev/kmsg", 0o600, (1, 11))?;
    archive.symlink("dev/console", "kmsg")?;
    archive.file(
        "init",
        0o755,
        &fs::read(&agent).with_context(|| format!("cannot read {}", agent.display()))?,
    )?;
    replace(&products.share.join("initramfs"), &archive.finish()?)?;
    Ok(products)
}

/// The guest's side of the benches' vsock load.
pub(crate) fn vsock_load() -> Result<PathBuf> {
    for_guests("koya-benches", "vsock_load")
}

/// The monitor's examples, static: what benches of the monitor start. Where they are.
pub(crate) fn examples() -> Result<PathBuf> {
    for_host(&["koya-vmm"], &["--examples"])?;
    Ok(released("examples"))
}

/// A program of the benches for the host, linked as koya is. Where it is.
pub(crate) fn bench(program: &str) -> Result<PathBuf> {
    for_host(&["koya-benches"], &["--bin", program])?;
    Ok(released(program))
}

/// What says that a guest is up.
pub(crate) fn up() -> Result<PathBuf> {
    for_guests("koya-benches", "up")
}

/// Neither looks for libraries nor relocates against them at its start, and runs on any distribution. What it
/// relocates of its own is listed by the bit (DT_RELR): else that is half a megabyte to read.
const HOST_FLAGS: &str = "-C target-feature=+crt-static -C link-arg=-Wl,-z,pack-relative-relocs";
/// As that, and nothing to relocate at its start; it aborts on a panic, so nobody unwinds.
const GUEST_FLAGS: &str =
    "-C target-feature=+crt-static -C relocation-model=static -C force-unwind-tables=no";

/// A program that runs in any guest.
fn for_guests(package: &str, program: &str) -> Result<PathBuf> {
    let what = ["--bin", program];
    linked_static(GUEST_TARGET, &[package], "agent", &what, GUEST_FLAGS)?;
    Ok(linked(GUEST_TARGET, "agent", program))
}

/// Programs that run on the host; [`released`] says where they are.
fn for_host(packages: &[&str], what: &[&str]) -> Result<()> {
    linked_static(host_target(), packages, "release", what, HOST_FLAGS)
}

/// Where a program for the host is.
fn released(program: &str) -> PathBuf {
    linked(host_target(), "release", program)
}

fn linked(target: &str, profile: &str, program: &str) -> PathBuf {
    let out = format!("target/static/{target}/{profile}");
    proc::checkout().join(out).join(program)
}

fn linked_static(
    target: &str,
    packages: &[&str],
    profile: &str,
    what: &[&str],
    flags: &str,
) -> Result<()> {
    let packages = packages.iter().flat_map(|package| ["--package", package]);
    proc::run(
        proc::cargo()
            .args(["build", "--profile", profile])
            .args(packages)
            .args(what)
            // Always with a target named: else the flag would reach procedural macros.
            .args(["--target", target, "--target-dir"])
            .arg(proc::checkout().join("target/static"))
            .env("RUSTFLAGS", flags)
            .env("LIBSECCOMP_LINK_TYPE", "static")
            .env("LIBSECCOMP_LIB_PATH", "/usr/lib/x86_64-linux-gnu"),
    )
}

fn install(from: &Path, to: &Path) -> Result<()> {
    let bytes = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
    replace(to, &bytes)?;
    fs::set_permissions(to, fs::metadata(from)?.permissions())?;
    Ok(())
}

/// Writes a file beside its place and moves it there: never half a file, and never
/// "text file busy". Equal content is left alone.
fn replace(to: &Path, bytes: &[u8]) -> Result<()> {
    if fs::read(to).is_ok_and(|old| old == bytes) {
        return Ok(());
    }
    let new = to.with_extension("new");
    fs::write(&new, bytes).with_context(|| format!("cannot write {}", new.display()))?;
    fs::rename(&new, to)?;
    Ok(())
}
