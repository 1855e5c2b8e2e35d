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

/// `git clone` and a build of a C project, inside on virtio-fs and outside: names, modes, owners,
/// links, sizes and content agree. The compiler is the machine's own.
fn a_build_gives_the_same_files() -> Result<()> {
    let origin = scratch("origin")?;
    let make = r#"
        mkdir -p src include; umask 022
        for n in 1 2 3 4 5 6; do echo "int f$n(int x) { return x * $n; }" > src/f$n.c; done
        { for n in 1 2 3 4 5 6; do echo "int f$n(int);"; done; } > include/f.h
        printf '%s\n' '#include <stdio.h>' '#include "f.h"' \
            'int main(void) { printf("%d\n", f1(f2(f3(f4(f5(f6(1))))))); return 0; }' > src/main.c
        printf '%s\n' 'all: hello install' \
            'OBJECTS := $(patsubst src/%.c,build/%.o,$(wildcard src/*.c))' \
            'build/%.o: src/%.c include/f.h; @mkdir -p build; $(CC) -O1 -Iinclude -c -o $@ $<' \
            'libf.a: $(filter-out build/main.o,$(OBJECTS)); $(AR) rcD $@ $^' \
            'hello: build/main.o libf.a; $(CC) -o $@ $^' \
            'install: hello; install -D -m 4755 -o 33 -g 33 hello out/bin/hello; ln -sf hello out/bin/hi; ln -f hello out/bin/hard; ./hello > out/said' > Makefile
        chmod 755 src/f1.c; ln -s src/main.c main.c
        export HOME=$PWD GIT_AUTHOR_DATE=2020-01-01T00:00:00Z GIT_COMMITTER_DATE=2020-01-01T00:00:00Z
        git init -q -b main . && git add . && git -c user.name=k -c user.email=k@k commit -qm all"#;
    let status = Command::new("sh")
        .args(["-ec", make])
        .current_dir(&origin)
        .status()?;
    ensure!(status.success(), "no project to build");
    // git's index and logs hold times and inode numbers.
    let build = "umask 022; export HOME=/tmp GIT_CONFIG_COUNT=1 GIT_CONFIG_KEY_0=safe.directory GIT_CONFIG_VALUE_0=*
        git clone -q --no-hardlinks $ORIGIN project >&2; cd project; make -j2 >&2
        test -z \"$(git status --porcelain --untracked-files=no)\"; git fsck --strict >&2";
    let list = "cd project; find . ! -path ./.git/index ! -path './.git/logs*' -printf '%P %m %U:%G %y %l ' \\( -type f -printf '%n %s' \\) -printf '\\n' | sort
        find . -type f ! -path ./.git/index ! -path './.git/logs*' | sort | xargs sha256sum";
    let both = format!("(\n{build}\n)\n{list}");
    let (inside, outside) = (scratch("inside")?, scratch("outside")?);
    let volumes = [
        format!("{}:/mnt", inside.display()),
        format!("{}:/media:ro", origin.display()),
    ];
    let [at, from] = &volumes;
    let options = [
        "--read-only",
        "--memory",
        "1g",
        "--tmpfs",
        "/tmp",
        "--workdir",
        "/mnt",
        "-v",
        at,
        "-v",
        from,
        "--env",
        "ORIGIN=/media",
    ];
    let in_said = stdout(run_in(Path::new("/"), &options, &["sh", "-ec", &both])?)?;
    let run = |script: &str, dir: &Path| -> Result<String> {
        let mut command = Command::new("sh");
        command.args(["-ec", script]).current_dir(dir);
        stdout(command.env("ORIGIN", &origin).output()?)
    };
    // The clone's configuration names where it came from.
    let plain = |text: String| {
        let keep = |line: &&str| !line.contains(".git/config");
        text.lines().filter(keep).collect::<Vec<_>>().join("\n")
    };
    let in_said = plain(in_said);
    let out_said = plain(run(&both, &outside)?);
    ensure!(in_said.lines().count() > 60, "{in_said}");
    ensure!(
        in_said == out_said,
        "inside:\n{in_said}\n---\noutside:\n{out_said}"
    );
    // And what the guest says is what the host has.
    let host = plain(run(list, &inside)?);
    ensure!(
        host == in_said,
        "the host sees other files:\n{host}\n---\n{in_said}"
    );
    Ok(())
}
