//! What it takes to run a container: the koya command, containerd's shim, the agent in its
//! initramfs, the guest kernel. They are put together in `target/koya` as they would be installed:
//! `bin/koya`, `bin/koya-runtime`, `bin/containerd-shim-koya-v2`, `share/koya/vmlinux`, `share/koya/initramfs`.

use crate::arch::{Arch, ArchArgs};
use crate::archive::Archive;
use crate::{kernel, proc, setup};
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// Whether what runs on this machine is built with musl.
pub(crate) fn has_musl() -> bool {
    let here = Arch::of_this_machine();
    host_target(here) == here.musl()
}

/// What runs on the host is built for: a static program of musl's asks the CPU nothing before main, and each
/// answer is an exit where the host is a virtual machine itself; it holds less memory. Where its library
/// can't be had, what guests have will do.
fn host_target(arch: Arch) -> &'static str {
    static MUSL: [OnceLock<bool>; 2] = [OnceLock::new(), OnceLock::new()];
    let musl = arch.musl();
    let there = MUSL[arch as usize].get_or_init(|| {
        let there = setup::rust_target(musl, "programs for the host");
        if !there {
            eprintln!("build: {musl} can't be had (rustup target add {musl}): building with glibc");
        }
        there
    });
    if *there { musl } else { arch.gnu() }
}

/// What runs on the host.
pub(crate) const PROGRAMS: [&str; 3] = ["koya", "koya-runtime", "containerd-shim-koya-v2"];

/// Where the products are.
pub(crate) struct Products {
    pub(crate) bin: PathBuf,
    pub(crate) share: PathBuf,
}

impl Products {
    /// Where this machine's are once they are built.
    pub(crate) fn places() -> Self {
        Self::places_of(Arch::of_this_machine())
    }

    /// Where those of an architecture are once they are built.
    pub(crate) fn places_of(arch: Arch) -> Self {
        let out = arch.target("koya");
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

#[derive(clap::Args)]
pub(crate) struct BuildArgs {
    #[command(flatten)]
    arch: ArchArgs,
}

/// `cargo xtask build`
pub(crate) fn run(args: &BuildArgs) -> Result<()> {
    let products = ensure_for(args.arch.arch())?;
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
pub(crate) fn install_full(arch: Arch, image: &Path) -> Result<PathBuf> {
    let share = Products::places_of(arch).share;
    fs::create_dir_all(&share)?;
    let full = share.join("vmlinux-full");
    install(image, &full)?;
    Ok(full)
}

/// Builds what is out of date for this machine and returns where it is.
pub(crate) fn ensure() -> Result<Products> {
    ensure_for(Arch::of_this_machine())
}

/// As [`ensure`], for an architecture.
pub(crate) fn ensure_for(arch: Arch) -> Result<Products> {
    setup::ensure()?;
    let kernel = kernel::ensure(arch)?;
    let products = Products::places_of(arch);
    fs::create_dir_all(&products.bin)?;
    fs::create_dir_all(&products.share)?;
    // One name for what guests boot, whatever its format.
    install(&kernel.image, &products.share.join("vmlinux"))?;
    if let Some(compressed) = &kernel.compressed {
        install(compressed, &products.share.join("bzImage"))?;
    }

    eprintln!("building koya");
    for_host(arch, &["koya-cli", "koya-oci", "koya-shim"], &["--bins"])?;
    for program in PROGRAMS {
        install(&released(arch, program), &products.bin.join(program))?;
    }

    eprintln!("building the agent");
    let agent = for_guests(arch, "koya-agent", "koya-agent")?;
    let mut archive = Archive::default();
    // The guest has no terminal: what init and its helpers say goes to the kernel's log.
    archive.node("dev/kmsg", 0o600, (1, 11))?;
    archive.symlink("dev/console", "kmsg")?;
    archive.file(
        "init",
        0o755,
        &fs::read(&agent).with_context(|| format!("cannot read {}", agent.display()))?,
    )?;
    // What libcontainer has write the ranges of a container's users: the agent (`agent/src/mappings.rs`).
    archive.dir("bin")?;
    for program in ["bin/newuidmap", "bin/newgidmap"] {
        archive.symlink(program, "/init")?;
    }
    replace(&products.share.join("initramfs"), &archive.finish()?)?;
    Ok(products)
}

/// The guest's side of the benches' vsock load.
pub(crate) fn vsock_load() -> Result<PathBuf> {
    for_guests(Arch::of_this_machine(), "koya-benches", "vsock_load")
}

/// The monitor's examples, static: what benches of the monitor start. Where they are.
pub(crate) fn examples() -> Result<PathBuf> {
    let arch = Arch::of_this_machine();
    for_host(arch, &["koya-vmm"], &["--examples"])?;
    Ok(released(arch, "examples"))
}

/// A program of the benches for the host, linked as koya is. Where it is.
pub(crate) fn bench(program: &str) -> Result<PathBuf> {
    let arch = Arch::of_this_machine();
    for_host(arch, &["koya-benches"], &["--bin", program])?;
    Ok(released(arch, program))
}

/// What says that a guest is up.
pub(crate) fn up() -> Result<PathBuf> {
    for_guests(Arch::of_this_machine(), "koya-benches", "up")
}

/// Looks for no libraries at its start, and runs on any distribution.
pub(crate) const STATIC: &str = "-C target-feature=+crt-static";
/// What a program for the host relocates of its own is listed by the bit (DT_RELR): else that is half a megabyte
/// to read. Debian 12's linker has it for x86 alone.
const RELOCATIONS: &str = " -C link-arg=-Wl,-z,pack-relative-relocs";
/// A program for guests has nothing to relocate at its start; it aborts on a panic, so nobody unwinds.
const OF_GUESTS: &str = " -C relocation-model=static -C force-unwind-tables=no";

/// A program that runs in any guest.
fn for_guests(arch: Arch, package: &str, program: &str) -> Result<PathBuf> {
    let what = ["--bin", program];
    // With glibc, because the agent's seccomp library is C.
    let (target, flags) = (arch.gnu(), format!("{STATIC}{OF_GUESTS}"));
    linked_static(arch, target, &[package], "agent", &what, &flags)?;
    Ok(linked(target, "agent", program))
}

/// Programs that run on the host; [`released`] says where they are.
fn for_host(arch: Arch, packages: &[&str], what: &[&str]) -> Result<()> {
    let relocations = match arch {
        Arch::X86_64 => RELOCATIONS,
        Arch::Aarch64 => "",
    };
    let flags = format!("{STATIC}{relocations}");
    linked_static(arch, host_target(arch), packages, "release", what, &flags)
}

/// Where a program for the host is.
fn released(arch: Arch, program: &str) -> PathBuf {
    linked(host_target(arch), "release", program)
}

fn linked(target: &str, profile: &str, program: &str) -> PathBuf {
    let out = format!("target/static/{target}/{profile}");
    proc::checkout().join(out).join(program)
}

fn linked_static(
    arch: Arch,
    target: &str,
    packages: &[&str],
    profile: &str,
    what: &[&str],
    flags: &str,
) -> Result<()> {
    let packages = packages.iter().flat_map(|package| ["--package", package]);
    let mut cargo = arch.cargo(target)?;
    link_static(&mut cargo, arch, flags)?;
    proc::run(
        cargo
            .args(["build", "--profile", profile])
            .args(packages)
            .args(what)
            // Always with a target named: else the flag would reach procedural macros.
            .args(["--target", target, "--target-dir"])
            .arg(proc::checkout().join("target/static")),
    )
}

/// Has cargo link programs with these flags and with the static seccomp library.
pub(crate) fn link_static(cargo: &mut Command, arch: Arch, flags: &str) -> Result<()> {
    cargo
        .env("RUSTFLAGS", flags)
        .env("LIBSECCOMP_LINK_TYPE", "static")
        .env("LIBSECCOMP_LIB_PATH", arch.seccomp_library()?);
    Ok(())
}

fn install(from: &Path, to: &Path) -> Result<()> {
    let bytes = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
    replace(to, &bytes)?;
    fs::set_permissions(to, fs::metadata(from)?.permissions())?;
    Ok(())
}

/// Writes a file beside its place and moves it there: never half a file, and never
/// "text file busy". Equal content is left alone.
pub(crate) fn replace(to: &Path, bytes: &[u8]) -> Result<()> {
    if fs::read(to).is_ok_and(|old| old == bytes) {
        return Ok(());
    }
    let new = to.with_extension("new");
    fs::write(&new, bytes).with_context(|| format!("cannot write {}", new.display()))?;
    fs::rename(&new, to)?;
    Ok(())
}
