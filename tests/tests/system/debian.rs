//! A real distribution as root file system: Debian's tree, created by debootstrap on the host.
//!
//! Its packages come from the host's package cache; the rig has no network, so the tree is created in advance (`cargo xtask
//! test` does so once and keeps it).

use crate::tool::{run_in, scratch_base, stdout};
use anyhow::{Context, Result, ensure};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

crate::trials![
    apt_and_dpkg_work,
    a_build_gives_the_same_files,
    groups_of_a_container_have_device_rules_of_their_own
];

/// The tree, unpacked once on each host. Tests write only to their own paths, which they clear first.
pub(crate) fn debian() -> Result<PathBuf> {
    let kept = std::env::var("KOYA_TEST_DEBIAN")
        .context("KOYA_TEST_DEBIAN names no tree; `cargo xtask test` makes one")?;
    let version = Path::new(&kept).parent().and_then(Path::file_name);
    let version = version.context("it is in no directory")?.to_string_lossy();
    let base = scratch_base();
    let dir = base.join(format!("debian-{version}"));
    let alone = File::create(base.join(format!("debian-{version}.lock")))?;
    alone.lock()?;
    let whole = base.join(format!("debian-{version}.whole"));
    if !whole.exists() {
        std::fs::create_dir_all(&dir)?;
        let status = Command::new("tar")
            .args(["-xf", &kept, "-C"])
            .arg(&dir)
            .status()?;
        ensure!(status.success(), "cannot unpack {kept}");
        File::create(whole)?;
    }
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
        "rm -rf /repo /build
         mkdir -p /repo /build/DEBIAN /build/usr/bin
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

/// `git clone` and a build of a C project in the tree, by Koya over virtio-fs and by chroot: names, modes, owners, links,
/// sizes and contents are equal.
fn a_build_gives_the_same_files() -> Result<()> {
    let root = debian()?;
    let make = r#"
        rm -rf /srv/origin /srv/inside /srv/outside
        mkdir -p /srv/origin /srv/inside /srv/outside; cd /srv/origin
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
        export HOME=/root GIT_AUTHOR_DATE=2020-01-01T00:00:00Z GIT_COMMITTER_DATE=2020-01-01T00:00:00Z
        git init -q -b main . && git add . && git -c user.name=k -c user.email=k@k commit -qm all"#;
    // git's index and logs contain times and inode numbers.
    let list = "cd project; find . ! -path ./.git/index ! -path './.git/logs*' -printf '%P %m %U:%G %y %l ' \\( -type f -printf '%n %s' \\) -printf '\\n' | sort
        find . -type f ! -path ./.git/index ! -path './.git/logs*' | sort | xargs sha256sum";
    let both = format!(
        "(\numask 022; export HOME=/root
        git clone -q --no-hardlinks /srv/origin project >&2; cd project; make -j2 >&2
        test -z \"$(git status --porcelain --untracked-files=no)\"; git fsck --strict >&2\n)\n{list}"
    );
    let chroot = |script: &str| -> Result<String> {
        let mut command = Command::new("chroot");
        command.arg(&root).args(["/bin/sh", "-ec", script]);
        stdout(command.output()?)
    };
    chroot(make)?;
    let inside = sh(&root, &format!("cd /srv/inside; {both}"))?;
    let outside = chroot(&format!("cd /srv/outside; {both}"))?;
    ensure!(inside.lines().count() > 60, "{inside}");
    ensure!(
        inside == outside,
        "inside:\n{inside}\n---\noutside:\n{outside}"
    );
    // The host sees the same attributes.
    let host = chroot(&format!("cd /srv/inside; {list}"))?;
    ensure!(
        host == inside,
        "the host sees other files:\n{host}\n---\n{inside}"
    );
    Ok(())
}

/// Device programs attached by runc and systemd inside a container: they restrict a group further, and the container's own
/// restrictions remain.
fn groups_of_a_container_have_device_rules_of_their_own() -> Result<()> {
    // A program that denies all devices, and the accesses of a process in its group.
    let script = r#"
        use strict;
        my $number = `uname -m` =~ /x86_64/ ? 321 : 280;
        sub bpf { my ($command, $attributes) = @_; my $got = syscall($number, $command, $attributes, length $attributes);
            die "bpf($command): $!" if $got < 0; $got }
        sub at { unpack "Q", pack "P", $_[0] }
        my $code = pack("CCsl", 0xb7, 0, 0, 0) . pack("CCsl", 0x95, 0, 0, 0);
        my $license = "GPL\0";
        my $program = bpf(5, pack "LLQQLLQLL", 15, 2, at($code), at($license), 0, 0, 0, 0, 0);
        my $group = "/sys/fs/cgroup/own";
        mkdir $group or die "mkdir: $!";
        opendir my $directory, $group or die "open: $!";
        bpf(8, pack "LLLL", fileno $directory, $program, 6, 2);
        print open(my $zero, "<", "/dev/zero") ? "before " : "never ";
        open my $members, ">", "$group/cgroup.procs" or die "enter: $!"; print $members $$; close $members;
        print open(my $again, "<", "/dev/zero") ? "still" : "after: $!";
    "#;
    let root = debian()?;
    let options = ["--memory", "1g", "--privileged"];
    let said = stdout(run_in(&root, &options, &["perl", "-e", script])?)?;
    ensure!(said == "before after: Operation not permitted", "{said}");
    Ok(())
}
