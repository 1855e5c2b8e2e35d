//! A real distribution as root file system: Debian's own tree, made by debootstrap on the host.
//!
//! Its packages come from the host's package cache; in the rig there is no network, so the tree is
//! made before (`cargo xtask test` does it once and keeps it).

use crate::tool::{run_in, scratch, stdout};
use anyhow::{Context, Result, ensure};
use std::path::{Path, PathBuf};
use std::process::Command;

crate::trials![apt_and_dpkg_work, a_build_gives_the_same_files];

/// A copy of the tree, since tests write to it.
fn debian() -> Result<PathBuf> {
    let kept = std::env::var("KOYA_TEST_DEBIAN")
        .context("KOYA_TEST_DEBIAN names no tree; `cargo xtask test` makes one")?;
    let dir = scratch("debian")?;
    let status = Command::new("tar")
        .args(["-xf", &kept, "-C"])
        .arg(&dir)
        .status()?;
    ensure!(status.success(), "cannot unpack {kept}");
    Ok(dir)
}

fn sh(rootfs: &Path, script: &str) -> Result<String> {
    stdout(run_in(
        rootfs,
        &["--memory", "1g", "--tmpfs", "/tmp"],
        &["sh", "-ec", script],
    )?)
}

fn apt_and_dpkg_work() -> Result<()> {
    let root = debian()?;
    let said = sh(
        &root,
        "mkdir -p /repo /build/DEBIAN /build/usr/bin
         printf 'Package: koya-hello\nVersion: 1.0\nArchitecture: all\nMaintainer: K <k@k>\nDescription: hello\n' > /build/DEBIAN/control
         printf '#!/bin/sh\necho hello from a package\n' > /build/usr/bin/koya-hello
         chmod 755 /build/usr/bin/koya-hello
         dpkg-deb --build /build /repo/koya-hello.deb > /dev/null
         cd /repo
         { cat /build/DEBIAN/control; echo 'Filename: ./koya-hello.deb'; echo Size: $(stat -c %s koya-hello.deb); echo SHA256: $(sha256sum koya-hello.deb | cut -d' ' -f1); } > Packages
         echo 'deb [trusted=yes] file:/repo ./' > /etc/apt/sources.list
         apt-get -q update 2>&1
         apt-cache policy koya-hello | grep -q 1.0
         dpkg -i /repo/koya-hello.deb 2>&1
         koya-hello
         dpkg -r koya-hello > /dev/null 2>&1
         dpkg -l | grep -c ^ii",
    )?;
    ensure!(said.contains("hello from a package"), "{said}");
    ensure!(!root.join("usr/bin/koya-hello").exists(), "removed");
    Ok(())
}

/// The same commands inside and outside: names, modes, owners, sizes and content agree.
fn a_build_gives_the_same_files() -> Result<()> {
    let script = "cd /; rm -rf /w; mkdir /w; cd /w; umask 022
        perl -e 'for my $d (1..20) { mkdir \"d$d\"; for my $f (1..30) { open(F, \">\", \"d$d/f$f.c\"); print F \"int f_${d}_$f(void) { return $d * $f; }\\n\" x 5; close F; } }'
        tar -czf all.tgz d*; mkdir copy; tar -xzf all.tgz -C copy
        find copy -name '*.c' | sort | xargs cat | sha256sum > sum
        cp -a d1 d1copy; mv d2 d2moved; ln -s d1 link; ln d3/f1.c hard; chmod 4711 d3/f2.c; chown 33:33 d3/f3.c
        sed -i s/return/RETURN/ d4/*.c; sort -o d5/f1.c d5/f1.c; gzip -n d6/*
        rm all.tgz; find . ! -type l -printf '%P %m %U:%G %y %n %s\\n' | grep -v ' d ' | sort; find . -type f | sort | xargs sha256sum";
    let inside = debian()?;
    let outside = debian()?;
    let in_said = sh(&inside, script)?;
    let output = Command::new("chroot")
        .arg(&outside)
        .args(["sh", "-ec", script])
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .output()?;
    let out_said = stdout(output)?;
    ensure!(in_said.lines().count() > 1000, "{in_said}");
    ensure!(in_said == out_said, "the lists differ");
    // And what the guest says is what the host has.
    let list = "find . ! -type l -printf '%P %m %U:%G %y %n %s\\n' | grep -v ' d ' | sort; find . -type f | sort | xargs sha256sum";
    let host = Command::new("sh")
        .args(["-c", list])
        .current_dir(inside.join("w"))
        .output()?;
    ensure!(stdout(host)? == in_said, "the host sees other files");
    Ok(())
}
