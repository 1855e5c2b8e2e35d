//! `cargo xtask runc-tests`: runc's own integration tests (bats) with `koya-runtime` in runc's place, as root and
//! without systemd.

use crate::arch::Arch;
use crate::bats::{self, BatsArgs, Project, copy, pack};
use crate::{apt, cache, demo, proc, setup, suite};
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The suite with a Go that is new enough for runc's test programs, and the packages.
const GO_SUITE: &str = "forky";
const GO: [&str; 2] = ["golang-1.27-go", "golang-1.27-src"];

/// Go programs of runc that its tests use.
const PROGRAMS: [&str; 4] = ["recvtty", "remap-rootfs", "fs-idmap", "pidfd-kill"];

const PACKAGES: [(&str, &str); 1] = [("gawk", "is what they read tables with")];

/// Replaces the script that downloads root file systems.
const IMAGES: &str = "#!/bin/sh
here=$(dirname \"$(readlink -f \"$0\")\")/testdata
echo \"BUSYBOX_IMAGE=$here/busybox.tar HELLO_IMAGE=$here/busybox.tar DEBIAN_IMAGE=$here/debian.tar\"
";

/// Parts of the Debian of Koya's own tests that runc's tests do not use: they unpack it for each test, and go through all of
/// its files.
const UNUSED: [&str; 13] = [
    "perl*",
    "lib*san.so*",
    "libperl*",
    "*gprofng*",
    "*.a",
    "./usr/bin/*-linux-gnu-*",
    "./usr/bin/git*",
    "./usr/bin/scalar",
    "./usr/include/*",
    "./usr/lib/*/gconv/*",
    "./usr/lib/g*/*",
    "./usr/share/*",
    "./var/*/*",
];

/// Preparation in the rig: the tests require a program named runc.
const RUN: &str = "mkdir -p /run/scratch/bin /run/scratch/tmp
ln -s \"$(command -v koya-runtime)\" /run/scratch/bin/runc
export PATH=/run/scratch/bin:$PATH RUNC=/run/scratch/bin/runc TMPDIR=/run/scratch/tmp
";

pub(crate) fn run(args: &BatsArgs) -> Result<()> {
    setup::ensure_these(&bats::PACKAGES)?;
    setup::ensure_these(&PACKAGES)?;
    let project = Project {
        name: "runc-tests",
        tests: tests(&args.source)?,
        files: bats::BATS,
        script: RUN,
        further: &|_| Vec::new(),
    };
    project.run(args)
}

/// runc's tests with everything that they need, built once.
fn tests(source: &Path) -> Result<PathBuf> {
    let version = fs::read_to_string(source.join("VERSION"))
        .with_context(|| format!("{} is no checkout of runc", source.display()))?;
    let debian = suite::debian()?;
    let go = go()?;
    let key = cache::key([version.trim(), IMAGES, &GO.join(" "), &UNUSED.concat()]);
    let dir = cache::ensure("runc-tests", &key, |dir| {
        copy(&source.join("tests"), dir)?;
        let programs = dir.join("tests/cmd/_bin");
        fs::create_dir_all(&programs)?;
        proc::long(
            "building the programs of runc's tests (once)",
            Command::new(go.join("bin/go"))
                .args(["build", "-mod=vendor", "-o"])
                .arg(&programs)
                .args(PROGRAMS.map(|name| format!("./tests/cmd/{name}")))
                .current_dir(source)
                .env("GOROOT", &go)
                .env("GOTOOLCHAIN", "local")
                .env("GOPATH", dir.join("go"))
                .env("GOCACHE", dir.join("go/cache")),
            &dir.with_extension("log"),
        )?;
        let integration = dir.join("tests/integration");
        fs::write(integration.join("get-images.sh"), IMAGES)?;
        let rootfs = dir.join("rootfs");
        demo::make_busybox_rootfs(Arch::of_this_machine(), &rootfs)?;
        // runc's image lacks these directories, and the tests put links there.
        for name in ["proc", "sys"] {
            fs::remove_dir(rootfs.join(name))?;
        }
        let busybox = integration.join("testdata/busybox.tar");
        pack(&rootfs, &busybox)?;
        let used = dir.join("debian");
        fs::create_dir(&used)?;
        let mut unpack = Command::new("tar");
        unpack.args(UNUSED.map(|pattern| format!("--exclude={pattern}")));
        proc::run(unpack.arg("-C").arg(&used).arg("-xf").arg(&debian))?;
        pack(&used, &integration.join("testdata/debian.tar"))?;
        fs::remove_dir_all(used)?;
        Ok(fs::remove_dir_all(dir.join("go"))?)
    })?;
    Ok(dir.join("tests/integration"))
}

/// The directory of a Go toolchain, unpacked once.
fn go() -> Result<PathBuf> {
    let key = cache::key([&[GO_SUITE], &GO[..]].concat());
    let dir = cache::ensure("go", &key, |dir| apt::unpack(GO_SUITE, &GO, dir))?;
    let version = GO[0].trim_start_matches("golang-").trim_end_matches("-go");
    Ok(dir.join(format!("usr/lib/go-{version}")))
}
