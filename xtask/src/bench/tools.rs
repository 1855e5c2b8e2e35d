//! The guest of `cargo xtask bench devices`: its initramfs, and a disk image with its tools.

use super::PACKAGES;
use super::counting::libraries_of;
use crate::archive::Archive;
use crate::{build, cache, proc};
use anyhow::Result;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const INIT: &str = include_str!("../../../benches/guest/init.sh");
/// Scripts for guests, by name.
const SCRIPTS: &[(&str, &str)] = &[
    ("lib.sh", include_str!("../../../benches/guest/lib.sh")),
    (
        "measure-disks.sh",
        include_str!("../../../benches/guest/measure-disks.sh"),
    ),
    (
        "measure-files.sh",
        include_str!("../../../benches/guest/measure-files.sh"),
    ),
    (
        "measure-vsock.sh",
        include_str!("../../../benches/guest/measure-vsock.sh"),
    ),
    (
        "measure-memory.sh",
        include_str!("../../../benches/guest/measure-memory.sh"),
    ),
];

/// The directory with a guest's initramfs and the image of its tools, created once.
pub(super) fn tools() -> Result<PathBuf> {
    let load = build::vsock_load()?;
    let mut inputs = vec![INIT.to_owned()];
    inputs.extend(SCRIPTS.iter().map(|(_, text)| (*text).to_owned()));
    inputs.push(fs::read_to_string(
        proc::checkout().join("benches/src/bin/vsock_load.rs"),
    )?);
    for (package, _) in PACKAGES {
        inputs.push(proc::output(Command::new("dpkg-query").args([
            "-W",
            "-f=${Version}",
            package,
        ]))?);
    }
    let key = cache::key(&inputs);
    cache::ensure("bench", &key, |dir| {
        let mut archive = Archive::default();
        for name in ["bin", "dev", "proc", "sys", "tools"] {
            archive.dir(name)?;
        }
        archive.file("init", 0o755, INIT.as_bytes())?;
        archive.file("bin/busybox", 0o755, &fs::read("/bin/busybox")?)?;
        fs::write(dir.join("initrd"), archive.finish()?)?;

        let root = dir.join("root");
        for name in [
            "bin",
            "lib",
            "lib64",
            "dev",
            "proc",
            "sys",
            "tmp",
            "share",
            "writeback",
        ] {
            fs::create_dir_all(root.join(name))?;
        }
        for (name, text) in SCRIPTS {
            fs::write(root.join(name), text)?;
        }
        source_tree(dir, &root)?;
        fs::copy(&load, root.join("bin/vsock-load"))?;
        fs::copy("/bin/busybox", root.join("bin/busybox"))?;
        let names = proc::output(Command::new("/bin/busybox").arg("--list"))?;
        for name in names.lines().filter(|name| *name != "busybox") {
            std::os::unix::fs::symlink("busybox", root.join("bin").join(name))?;
        }
        for program in ["fio", "iperf3"] {
            let path = Path::new("/usr/bin").join(program);
            fs::copy(&path, root.join("bin").join(program))?;
            copy_libraries(&path, &root)?;
        }
        proc::long(
            "making an image of the benches' tools (once)",
            Command::new("/sbin/mkfs.ext4")
                .args(["-q", "-F", "-m", "0", "-d"])
                .arg(&root)
                .arg(dir.join("tools.img"))
                .arg("224m"),
            &dir.with_extension("log"),
        )?;
        Ok(fs::remove_dir_all(&root)?)
    })
}

/// A tar that resembles a source tree: 2,000 files of 0 to 18 KiB in 100 directories.
fn source_tree(dir: &Path, root: &Path) -> Result<()> {
    let tree = dir.join("tree");
    for directory in 0..100 {
        let directory_path = tree.join(format!("part{}/module{directory}", directory / 10));
        fs::create_dir_all(&directory_path)?;
        for file in 0..20 {
            let lines = (directory * 7 + file * 31) % 600;
            let text = "a line of some thirty letters.\n".repeat(lines);
            fs::write(directory_path.join(format!("file{file}.c")), text)?;
        }
    }
    proc::run(
        Command::new("tar")
            .args(["-cf"])
            .arg(root.join("tree.tar"))
            .args(["-C"])
            .arg(dir)
            .arg("tree"),
    )?;
    Ok(fs::remove_dir_all(&tree)?)
}

/// Copies the libraries of a program, and the loader to its expected path.
fn copy_libraries(program: &Path, root: &Path) -> Result<()> {
    for (to, path) in libraries_of(program)? {
        fs::copy(path, root.join(to))?;
    }
    Ok(())
}
