//! Everything that is needed to run a container: the koya command, containerd's shim, the agent in its initramfs, the guest
//! kernel. They are laid out in `target/koya` as in an installation: `bin/koya`, `bin/koya-runtime`,
//! `bin/containerd-shim-koya-v2`, `share/koya/vmlinux`, `share/koya/initramfs`.

use crate::arch::{Arch, ArchArgs};
use crate::archive::Archive;
use crate::{kernel, proc, setup};
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// Whether programs for hosts are built with musl.
pub(crate) fn has_musl(arch: Arch) -> bool {
    host_target(arch) == arch.musl()
}

/// Target of programs for the host: a static musl program executes no CPUID instruction before main, each of which exits if
/// the host is itself a virtual machine; it also uses less memory. Without the musl target, the target of guest programs is
/// used.
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

/// Programs that run on the host.
pub(crate) const PROGRAMS: [&str; 3] = ["koya", "koya-runtime", "containerd-shim-koya-v2"];

/// Paths of the build products.
pub(crate) struct Products {
    pub(crate) bin: PathBuf,
    pub(crate) share: PathBuf,
}

impl Products {
    /// Paths of an architecture's products once they are built.
    pub(crate) fn places_of(arch: Arch) -> Self {
        let out = arch.target("koya");
        Self {
            bin: out.join("bin"),
            share: out.join("share/koya"),
        }
    }

    /// Environment variables by which the products are found.
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

/// Installs the full kernel at the path for `--kernel full`.
pub(crate) fn install_full(arch: Arch, image: &Path) -> Result<PathBuf> {
    let share = Products::places_of(arch).share;
    fs::create_dir_all(&share)?;
    let full = share.join("vmlinux-full");
    install(image, &full)?;
    Ok(full)
}

/// Builds outdated products for this machine and returns their paths.
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
    // The same name for boot images of all formats.
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
    // The guest has no terminal: output of init and its helpers goes to the kernel's log.
    archive.node("dev/kmsg", 0o600, (1, 11))?;
    archive.symlink("dev/console", "kmsg")?;
    archive.file("init", 0o755, &without_unwind_tables(arch, &agent)?)?;
    // libcontainer runs these programs to map several ranges of users; they are the agent (`agent/src/mappings.rs`).
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

/// Builds the static examples of the monitor for this machine, for its benches; returns their directory.
pub(crate) fn examples() -> Result<PathBuf> {
    let arch = Arch::of_this_machine();
    for_host(arch, &["koya-vmm"], &["--examples"])?;
    Ok(released(arch, "examples"))
}

/// Builds one of them, for an architecture; returns its path.
pub(crate) fn example(arch: Arch, name: &str) -> Result<PathBuf> {
    for_host(arch, &["koya-vmm"], &["--example", name])?;
    Ok(released(arch, "examples").join(name))
}

/// Builds a program of the benches for the host, linked like koya; returns its path.
pub(crate) fn bench(arch: Arch, program: &str) -> Result<PathBuf> {
    for_host(arch, &["koya-benches"], &["--bin", program])?;
    Ok(released(arch, program))
}

/// The init that reports that a guest is up.
pub(crate) fn up(arch: Arch) -> Result<PathBuf> {
    for_guests(arch, "koya-benches", "up")
}

/// Static: no libraries are loaded at its start, and it runs on any distribution.
pub(crate) const STATIC: &str = "-C target-feature=+crt-static";
/// Relative relocations of a host program are packed in a bitmap (DT_RELR), which saves half a megabyte of reads. Debian
/// 12's linker supports this only for x86.
const RELOCATIONS: &str = " -C link-arg=-Wl,-z,pack-relative-relocs";
/// A guest program needs no relocation at its start, and aborts on a panic, so no unwind tables are needed.
const OF_GUESTS: &str =
    " -C relocation-model=static -C force-unwind-tables=no -C link-arg=-Wl,--no-eh-frame-hdr";

/// A program of [`for_guests`] without the unwind tables of the standard and C libraries, which are a sixteenth of the agent.
fn without_unwind_tables(arch: Arch, program: &Path) -> Result<Vec<u8>> {
    let (tables, small) = (
        program.with_extension("tables"),
        program.with_extension("small"),
    );
    // A C library may look for the end of the tables at its start: an entry of length zero.
    fs::write(&tables, [0; 256])?;
    let mut objcopy = arch.tool("objcopy");
    objcopy.arg(format!("--update-section=.eh_frame={}", tables.display()));
    proc::run(objcopy.arg(program).arg(&small))?;
    fs::read(&small).with_context(|| format!("cannot read {}", small.display()))
}

/// A program that runs in any guest.
fn for_guests(arch: Arch, package: &str, program: &str) -> Result<PathBuf> {
    let what = ["--bin", program];
    // With glibc, because the agent's seccomp library is C.
    let (target, flags) = (arch.gnu(), format!("{STATIC}{OF_GUESTS}"));
    linked_static(arch, target, &[package], "agent", &what, &flags)?;
    Ok(linked(target, "agent", program))
}

/// Builds programs for the host; [`released`] returns their paths.
fn for_host(arch: Arch, packages: &[&str], what: &[&str]) -> Result<()> {
    let relocations = match arch {
        Arch::X86_64 => RELOCATIONS,
        Arch::Aarch64 => "",
    };
    let flags = format!("{STATIC}{relocations}");
    linked_static(arch, host_target(arch), packages, "release", what, &flags)
}

/// Path of a program for the host.
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
            // Always with an explicit target: otherwise the flag would apply to procedural macros.
            .args(["--target", target, "--target-dir"])
            .arg(proc::checkout().join("target/static")),
    )
}

/// Makes cargo link programs with these flags and with the static seccomp library.
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

/// Writes a file atomically, through a temporary file, which also avoids "text file busy". Equal content is left alone.
pub(crate) fn replace(to: &Path, bytes: &[u8]) -> Result<()> {
    if fs::read(to).is_ok_and(|old| old == bytes) {
        return Ok(());
    }
    let new = to.with_extension("new");
    fs::write(&new, bytes).with_context(|| format!("cannot write {}", new.display()))?;
    fs::rename(&new, to)?;
    Ok(())
}
