//! The emulated host of a rig: its QEMU, its kernel and its initramfs, created once and kept in the cache.

use super::platform::{PROGRAMS, Platform};
use crate::arch::Arch;
use crate::archive::Archive;
use crate::{apt, cache, kernel, proc};
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const INIT: &str = include_str!("../rig-init.sh");

/// Modules loaded by the rig's kernel in addition to those of its platform, with dependencies from depmod: the root file
/// system, the scratch disk, taps, and traffic redirection between interfaces.
const MODULES: &[&str] = &[
    "9p",
    "9pnet_virtio",
    "overlay",
    "virtio_blk",
    "crc32c_generic",
    "ext4",
    "tun",
    "veth",
    "dummy",
    "bridge",
    "macvlan",
    "ipvlan",
    "macvtap",
    "sch_ingress",
    "cls_u32",
    "act_mirred",
    "act_gact",
    "vhost_vsock",
    "loop",
    "dm-mod",
    "dm-flakey",
];

/// Modules for Docker's networks, in a directory of the rig, loaded only by tests that need them, since loading takes time.
const DOCKER_MODULES: &[&str] = &[
    "br_netfilter",
    "nf_conntrack_netlink",
    "nf_tables",
    "nft_compat",
    "nft_chain_nat",
    "xt_addrtype",
    "xt_comment",
    "xt_conntrack",
    "xt_mark",
    "xt_MASQUERADE",
    "xt_nat",
    "xt_tcpudp",
    "xt_set",
    "ip_set_hash_net",
];

/// Source of QEMU: Debian 12's version, 7.2, may lose an interrupt of a host that runs virtual machines, and hang. It stays
/// installed for the libraries that both need.
const QEMU_SUITE: &str = "bookworm-backports";

/// The emulated host: its QEMU, kernel and initramfs.
pub(crate) struct Host {
    pub(super) platform: &'static Platform,
    /// Directory of the newer QEMU; `None` means the machine's own.
    qemu: Option<PathBuf>,
    pub(crate) dir: PathBuf,
    /// Programs of its architecture, laid over the machine's own files.
    pub(super) programs: Option<PathBuf>,
}

impl Host {
    /// The QEMU command, which ends with this process.
    pub(crate) fn qemu(&self) -> Command {
        // setpriv: if this process is killed, so is QEMU.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL"]);
        match &self.qemu {
            Some(root) => {
                command
                    .arg(root.join("usr/bin").join(self.platform.qemu))
                    .arg("-L")
                    .arg(root.join("usr/share/qemu"))
                    .arg("-L")
                    .arg(root.join("usr/share/seabios"))
                    .args(["-L", "/usr/share/qemu"]);
            }
            None => {
                command.arg(self.platform.qemu);
            }
        }
        command
    }

    /// The host of an architecture.
    pub(crate) fn ensure_for(arch: Arch) -> Result<Self> {
        let platform = Platform::of(arch);
        let programs = match arch.is_native() {
            true => None,
            false => Some(programs(arch)?),
        };
        // The same Debian version as the guest kernel's source, so that there is only one.
        let version = kernel::source_version()?;
        let upstream = version
            .split('-')
            .next()
            .context("a Debian version has an upstream part")?;
        let package = format!("linux-image-{upstream}+deb12-{}-unsigned", arch.debian());
        let modules = [platform.modules, MODULES].concat();
        let names = [&modules, DOCKER_MODULES].concat().join(" ");
        let key = cache::key([&package, &version, INIT, &names]);
        let busybox = busybox(arch)?;
        let dir = cache::ensure("rig", &key, |dir| {
            build_host(arch, &package, &modules, &busybox, dir)
        })?;
        let packages = platform.qemu_packages;
        let key = cache::key([&[QEMU_SUITE], packages].concat());
        let newer = cache::ensure("qemu", &key, |dir| apt::unpack(QEMU_SUITE, packages, dir));
        let qemu = newer.map(Some).unwrap_or_else(|error| {
            eprintln!("rig: no newer QEMU to be had, so this machine's, which may hang: {error:#}");
            None
        });
        Ok(Self {
            platform,
            qemu,
            dir,
            programs,
        })
    }
}

/// The directory with the programs of a rig of another architecture, unpacked once.
pub(crate) fn programs(arch: Arch) -> Result<PathBuf> {
    let key = cache::key([&[apt::RELEASE, arch.debian()], PROGRAMS].concat());
    cache::ensure("programs", &key, |dir| {
        apt::unpack_root(arch, apt::RELEASE, PROGRAMS, dir)
    })
}

/// A static busybox for an architecture.
pub(crate) fn busybox(arch: Arch) -> Result<PathBuf> {
    Ok(match arch.is_native() {
        true => "/bin/busybox".into(),
        false => programs(arch)?.join("bin/busybox"),
    })
}

fn build_host(
    arch: Arch,
    package: &str,
    modules: &[&str],
    busybox: &Path,
    out: &Path,
) -> Result<()> {
    let tree = out.join("package");
    fs::create_dir_all(&tree)?;
    apt::unpack_for(arch, apt::RELEASE, &[package], &tree)?;
    let versions = tree.join("lib/modules");
    let release = fs::read_dir(&versions)?
        .next()
        .context("the kernel package has no modules")??
        .file_name();
    let release = release.to_string_lossy().into_owned();
    proc::run(
        Command::new("/sbin/depmod")
            .arg("-b")
            .arg(&tree)
            .arg(&release),
    )?;
    fs::copy(
        tree.join(format!("boot/vmlinuz-{release}")),
        out.join("vmlinuz"),
    )?;
    let dep = fs::read_to_string(versions.join(&release).join("modules.dep"))?;
    let mut archive = Archive::default();
    for dir in ["bin", "modules", "job"] {
        archive.dir(dir)?;
    }
    archive.file("init", 0o755, INIT.as_bytes())?;
    archive.file("bin/busybox", 0o755, &fs::read(busybox)?)?;
    let builtin = fs::read_to_string(versions.join(&release).join("modules.builtin"))?;
    let mut order = Vec::new();
    let mut packed = 0;
    for (list, modules) in [("order", modules), ("docker", DOCKER_MODULES)] {
        for module in modules {
            if !builtin.lines().any(|path| is_named(path, module)) {
                load_order(module, &dep, &mut order)?;
            }
        }
        pack_modules(
            &mut archive,
            list,
            &order[packed..],
            &versions.join(&release),
        )?;
        packed = order.len();
    }
    fs::write(out.join("initrd"), archive.finish()?)?;
    fs::remove_dir_all(&tree)?;
    Ok(())
}

/// Adds modules, and a list of them in load order.
fn pack_modules(archive: &mut Archive, list: &str, paths: &[String], from: &Path) -> Result<()> {
    let mut names = String::new();
    for path in paths {
        let name = path.rsplit('/').next().unwrap_or(path);
        let name = name.trim_end_matches(".xz");
        let file = from.join(path);
        let out = Command::new("xz").arg("-dc").arg(&file).output()?;
        if !out.status.success() {
            bail!("cannot unpack {}", file.display());
        }
        archive.file(&format!("modules/{name}"), 0o644, &out.stdout)?;
        names.push_str(name);
        names.push('\n');
    }
    archive.file(&format!("modules/{list}"), 0o644, names.as_bytes())
}

/// Whether a module's file has this name.
fn is_named(path: &str, module: &str) -> bool {
    path.rsplit('/')
        .next()
        .is_some_and(|f| f.split('.').next() == Some(module))
}

/// Appends `module` after its dependencies.
fn load_order(module: &str, dep: &str, order: &mut Vec<String>) -> Result<()> {
    let line = dep
        .lines()
        .find(|l| {
            l.split(':')
                .next()
                .is_some_and(|path| is_named(path, module))
        })
        .with_context(|| format!("the rig's kernel has no module {module}"))?;
    let (path, needs) = line.split_once(':').context("modules.dep has colons")?;
    // modules.dep lists the deepest dependency last.
    for need in needs.split_whitespace().rev() {
        if !order.iter().any(|o| o == need) {
            order.push(need.to_owned());
        }
    }
    if !order.iter().any(|o| o == path) {
        order.push(path.to_owned());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_load_after_what_they_need() {
        let dep = "k/a.ko.xz: k/c.ko.xz k/b.ko.xz\nk/c.ko.xz: k/b.ko.xz\nk/b.ko.xz:\n";
        let mut order = Vec::new();
        load_order("a", dep, &mut order).unwrap();
        assert_eq!(order, ["k/b.ko.xz", "k/c.ko.xz", "k/a.ko.xz"]);
        assert!(load_order("d", dep, &mut order).is_err());
    }
}
