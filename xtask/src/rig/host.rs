//! The emulated host of a rig: its QEMU, its kernel and its initramfs, made once and kept in the cache.

use crate::archive::Archive;
use crate::{apt, cache, kernel, proc, setup};
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const INIT: &str = include_str!("../rig-init.sh");

/// What the rig's kernel loads, in dependency order found by depmod: KVM, the root file
/// system, the scratch disk, taps, and what redirects the traffic of one interface to another.
const MODULES: &[&str] = &[
    "kvm-amd",
    "9p",
    "9pnet_virtio",
    "overlay",
    "virtio_blk",
    "crc32c_generic",
    "ext4",
    "tun",
    "veth",
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

/// What only Docker's networks need, in a directory of the rig for tests that load it: each module takes its time.
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

/// Where QEMU comes from: Debian 12's own, 7.2, can lose an interrupt of a host that runs virtual
/// machines, and hangs. It stays installed for the libraries that both need.
const QEMU_SUITE: &str = "bookworm-backports";
const QEMU_PACKAGES: &[&str] = &["qemu-system-x86", "qemu-system-data", "seabios"];

/// The emulated host: what emulates it, its kernel and its initramfs.
pub(crate) struct Host {
    /// Where the newer QEMU is unpacked; none means the machine's own.
    qemu: Option<PathBuf>,
    pub(crate) dir: PathBuf,
}

impl Host {
    /// What emulates it, told to end with this process.
    pub(crate) fn qemu(&self) -> Command {
        // setpriv: should we be killed, so is QEMU.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL"]);
        match &self.qemu {
            Some(root) => {
                command
                    .arg(root.join("usr/bin/qemu-system-x86_64"))
                    .arg("-L")
                    .arg(root.join("usr/share/qemu"))
                    .arg("-L")
                    .arg(root.join("usr/share/seabios"))
                    .args(["-L", "/usr/share/qemu"]);
            }
            None => {
                command.arg("qemu-system-x86_64");
            }
        }
        command
    }

    pub(crate) fn ensure() -> Result<Self> {
        // The same Debian version as the guest kernel's source: one number to know.
        let version = kernel::source_version()?;
        let upstream = version
            .split('-')
            .next()
            .context("a Debian version has an upstream part")?;
        let package = format!("linux-image-{upstream}+deb12-amd64-unsigned");
        let modules = [MODULES, DOCKER_MODULES].concat().join(" ");
        let key = cache::key([&package, &version, INIT, &modules]);
        let dir = cache::ensure("rig", &key, |dir| build_host(&package, dir))?;
        let key = cache::key([&[QEMU_SUITE], QEMU_PACKAGES].concat());
        let newer = cache::ensure("qemu", &key, |dir| {
            apt::unpack(QEMU_SUITE, QEMU_PACKAGES, dir)
        });
        let qemu = newer.map(Some).unwrap_or_else(|error| {
            eprintln!("rig: no newer QEMU to be had, so this machine's, which may hang: {error:#}");
            None
        });
        Ok(Self { qemu, dir })
    }
}

fn build_host(package: &str, out: &Path) -> Result<()> {
    let tree = out.join("package");
    fs::create_dir_all(&tree)?;
    setup::package_lists()?;
    let log = out.with_extension("log");
    proc::long(
        &format!("downloading {package} (110 MB, once)"),
        Command::new("apt-get")
            .args(["-q", "-o", "APT::Sandbox::User=root", "download", package])
            .current_dir(out),
        &log,
    )?;
    let deb = fs::read_dir(out)?
        .filter_map(|e| e.ok().map(|e| e.path()))
        .find(|p| p.extension().is_some_and(|e| e == "deb"))
        .context("apt-get downloaded no package")?;
    proc::run(Command::new("dpkg").arg("-x").arg(&deb).arg(&tree))?;
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
    archive.file("bin/busybox", 0o755, &fs::read("/bin/busybox")?)?;
    let mut order = Vec::new();
    let mut packed = 0;
    for (list, modules) in [("order", MODULES), ("docker", DOCKER_MODULES)] {
        for module in modules {
            load_order(module, &dep, &mut order)?;
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
    fs::remove_file(&deb)?;
    Ok(())
}

/// Adds modules, and a list of them in the order in which they are loaded.
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

/// Appends `module` after everything that it needs.
fn load_order(module: &str, dep: &str, order: &mut Vec<String>) -> Result<()> {
    let named = |path: &str| {
        path.rsplit('/')
            .next()
            .is_some_and(|f| f.split('.').next() == Some(module))
    };
    let line = dep
        .lines()
        .find(|l| l.split(':').next().is_some_and(named))
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
