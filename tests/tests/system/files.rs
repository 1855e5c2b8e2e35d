//! virtio-fs with a real kernel's driver: behaviour that programs rely on, and limits of the guest.
//!
//! Tests that need more than a shell use the machine's own root file system, read-only, with its perl.

use crate::calls::with_numbers;
use crate::tool::{run, run_in, scratch, sh, stdout, until};
use anyhow::{Context, Result, ensure};
use std::fs;
use std::io::Write;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

crate::trials![
    names_links_and_modes,
    open_but_unlinked_files_work,
    owners_and_device_nodes,
    a_file_that_changes_loses_its_privileges,
    extended_attributes_are_mapped,
    sparse_files_and_holes,
    shared_maps_work_under_every_policy,
    links_do_not_lead_out,
    changes_on_the_host_are_seen,
    more_nodes_than_descriptors,
    appends_of_both_sides_are_kept,
    what_the_host_replaces_is_read_whole,
    volumes_that_overlap_are_the_same_files,
    a_tree_survives_tar,
    what_has_no_size_can_be_sent,
    another_file_system_of_the_host_is_another_device,
    names_of_one_file_are_made_while_others_go,
];

/// Runs a script on the machine's own files, with `dir` at /mnt.
fn perl(dir: &Path, options: &[&str], script: &str) -> Result<String> {
    let volume = format!("{}:/mnt", dir.display());
    let mut all = vec!["--read-only", "-v", &volume, "--workdir", "/mnt"];
    all.extend(options);
    // Perl passes numbers by value and strings by address, which must be those of variables.
    let script = with_numbers(script);
    let script = format!("sub sc {{ my ($n, @a) = @_; syscall($n, @a) }}\n{script}");
    stdout(run_in(Path::new("/"), &all, &["perl", "-e", &script])?)
}

/// A file overwritten on the host with a longer text, and one replaced by rename: the guest always reads a complete version.
fn what_the_host_replaces_is_read_whole() -> Result<()> {
    let dir = scratch("replaced")?;
    let texts = ('a'..='j').enumerate().map(|(n, letter)| {
        let line = letter.to_string().repeat(40 * (n + 1));
        format!("{line}\n")
    });
    let texts: Vec<String> = texts.collect();
    for name in ["grown", "replaced"] {
        fs::write(dir.join(name), &texts[0])?;
    }
    // Every text is a multiple of 40 copies of one letter, by its position in the alphabet.
    let script = r#"touch /data/go
        while [ ! -e /data/over ]; do cat /data/grown; cat /data/replaced; done |
        awk '{ letter = substr($0, 1, 1); n = 40 * index("abcdefghij", letter); seen[letter]++
               if (n == 0 || length($0) != n || gsub(letter, "") != n) print "wrong: " letter, length($0), n }
             END { for (l in seen) kinds++; print (kinds > 1 ? "good" : "nothing new") }'"#;
    let (go, over) = (dir.join("go"), dir.join("over"));
    let changes = {
        let dir = dir.clone();
        move || -> Result<()> {
            until("the guest's go", || Ok(go.exists().then_some(())))?;
            for text in &texts {
                fs::File::options()
                    .write(true)
                    .open(dir.join("grown"))?
                    .write_all(text.as_bytes())?;
                fs::write(dir.join("next"), text)?;
                fs::rename(dir.join("next"), dir.join("replaced"))?;
                std::thread::sleep(Duration::from_millis(700));
            }
            Ok(fs::write(over, "")?)
        }
    };
    let host = std::thread::spawn(changes);
    let volume = format!("{}:/data", dir.display());
    let said = stdout(run(&["-v", &volume], &["sh", "-c", script])?)?;
    host.join()
        .map_err(|_| anyhow::anyhow!("the host's side panicked"))??;
    ensure!(said == "good", "{said}");
    Ok(())
}

/// A volume, a subdirectory of it, and the parent of that, in one container.
fn volumes_that_overlap_are_the_same_files() -> Result<()> {
    let dir = scratch("overlap")?;
    fs::create_dir_all(dir.join("one/two"))?;
    let at = dir.display();
    let volumes = [
        format!("{at}/one/two:/mnt"),
        format!("{at}:/data"),
        format!("{at}/one:/root:ro"),
    ];
    let options: Vec<&str> = volumes.iter().flat_map(|v| ["-v", v]).collect();
    let script = "set -e
        echo text > /mnt/file; cat /data/one/two/file; mv /data/one/two/file /data/moved
        test ! -e /mnt/file; test ! -e /root/two/file
        ln /data/moved /data/one/two/linked; stat -c %h /mnt/linked
        test $(stat -c %i /mnt/linked) = $(stat -c %i /root/two/linked)
        touch /root/two/new 2> /dev/null && echo not read-only
        mkfifo /mnt/fifo; echo through > /data/one/two/fifo & cat /root/two/fifo";
    let said = stdout(run(&options, &["sh", "-c", script])?)?;
    ensure!(said == "text\n2\nthrough", "{said}");
    Ok(())
}

fn names_links_and_modes() -> Result<()> {
    let dir = scratch("names")?;
    perl(
        &dir,
        &[],
        r#"
        use Fcntl ':mode';
        open(F, '>', 'a') or die $!; print F 'one'; close F;
        link('a', 'b') or die $!;
        (stat 'a')[1] == (stat 'b')[1] or die 'inode';
        (stat 'a')[3] == 2 or die 'links';
        rename('a', 'c') or die $!;
        -e 'a' and die 'still there';
        symlink('c', 'l') or die $!; readlink('l') eq 'c' or die 'link';
        mkdir 'd', 0750 or die $!; rmdir 'd' or die $!; mkdir 'd' or die $!;
        rename('b', 'd/b') or die $!;
        chmod 04755, 'c' or die $!; S_IMODE((stat 'c')[2]) == 04755 or die 'mode';
        umask 027; open(F, '>', 'u') or die $!; close F; S_IMODE((stat 'u')[2]) == 0640 or die 'umask';
        utime(1000, 2000, 'c') or die $!; (stat 'c')[8] == 1000 && (stat 'c')[9] == 2000 or die 'times';
        truncate('c', 100) or die $!; -s 'c' == 100 or die 'size';
        # RENAME_EXCHANGE and RENAME_NOREPLACE
        sc(SYS_renameat2, -100, 'c', -100, 'u', 2) == 0 or die "exchange $!";
        -s 'u' == 100 or die 'exchanged';
        sc(SYS_renameat2, -100, 'c', -100, 'u', 1) == -1 or die 'noreplace';
        for my $n (1..500) { open(F, '>', "d/$n") or die $!; close F }
        opendir(D, 'd') or die $!; my @e = grep { !/^\./ } readdir D; @e == 501 or die scalar @e;
        my %s; $s{$_}++ for @e; keys %s == 501 or die 'twice';
        "#,
    )?;
    ensure!(
        fs::symlink_metadata(dir.join("l"))?
            .file_type()
            .is_symlink()
    );
    ensure!(fs::metadata(dir.join("u"))?.permissions().mode() & 0o7777 == 0o4755);
    ensure!(fs::metadata(dir.join("c"))?.permissions().mode() & 0o7777 == 0o640);
    ensure!(fs::read_dir(dir.join("d"))?.count() == 501);
    Ok(())
}

/// An idiom that fails on 9p: open, unlink, fstat, read, ftruncate.
fn open_but_unlinked_files_work() -> Result<()> {
    let dir = scratch("unlinked")?;
    perl(
        &dir,
        &[],
        r#"
        open(F, '+>', 'x') or die $!; unlink 'x' or die $!;
        syswrite(F, 'alive') == 5 or die $!;
        my @s = stat F; @s or die "fstat $!"; $s[3] == 0 or die 'links'; $s[7] == 5 or die 'size';
        truncate(F, 3) or die $!; sysseek(F, 0, 0); sysread(F, my $b, 9) == 3 or die $!; $b eq 'ali' or die $b;
        # O_RDWR, then a name by linkat through /proc
        my $fd = sc(SYS_openat, -100, '.', O_TMPFILE | 2, 0600); $fd >= 0 or die "tmpfile $!";
        open(T, '+<&=', $fd) or die $!; syswrite(T, 'named') or die $!;
        sc(SYS_linkat, -100, "/proc/self/fd/$fd", -100, 'named', 0x400) == 0 or die "linkat $!";
        "#,
    )?;
    ensure!(fs::read_to_string(dir.join("named"))? == "named");
    ensure!(!dir.join("x").exists());
    Ok(())
}

fn owners_and_device_nodes() -> Result<()> {
    let dir = scratch("owners")?;
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o777))?;
    perl(
        &dir,
        &["--cap-add", "MKNOD"],
        r#"
        open(F, '>', 'mine') or die $!; close F; chown(33, 40, 'mine') or die $!;
        symlink('x', 'link') or die $!; sc(SYS_fchownat, -100, 'link', 33, 40, 0x100) == 0 or die "lchown $!";
        sc(SYS_mknodat, -100, 'fifo', 010644, 0) == 0 or die "fifo $!";
        sc(SYS_mknodat, -100, 'null', 020666, (1 << 8) | 3) == 0 or die "node $!";
        mkdir 'sgid' or die $!; chown(0, 50, 'sgid') or die $!; chmod 02777, 'sgid' or die $!;
        $) = '40 40'; $> = 33;
        open(F, '>', 'theirs') or die $!; close F;
        mkdir 'theirdir' or die $!; symlink('x', 'theirlink') or die $!;
        open(F, '>', 'sgid/in') or die $!; close F;
        "#,
    )?;
    let owner = |name: &str| -> Result<(u32, u32)> {
        let data = fs::symlink_metadata(dir.join(name))?;
        Ok((data.uid(), data.gid()))
    };
    for name in ["mine", "link", "theirs", "theirdir", "theirlink"] {
        ensure!(owner(name)? == (33, 40), "{name} {:?}", owner(name)?);
    }
    ensure!(owner("sgid/in")? == (33, 50), "{:?}", owner("sgid/in")?);
    ensure!(fs::metadata(dir.join("fifo"))?.file_type().is_fifo());
    let null = fs::metadata(dir.join("null"))?;
    ensure!(null.file_type().is_char_device() && null.rdev() == rustix::fs::makedev(1, 3));
    Ok(())
}

fn a_file_that_changes_loses_its_privileges() -> Result<()> {
    for cache in ["never", "auto", "writeback"] {
        let dir = scratch("privileges")?;
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o777))?;
        perl(
            &dir,
            &["--privileged", "--cache", cache],
            r#"
            sub mode { sprintf '%o', (stat $_[0])[2] & 07777 }
            sub capable { my ($f, $k, $b) = ($_[0], 'security.capability', "\0" x 100); syscall(SYS_getxattr, $f, $k, $b, 100) > 0 }
            # VFS_CAP_REVISION_2 with CAP_NET_RAW
            my $cap = pack('V5', 0x02000000, 1 << 13, 0, 0, 0); my $key = 'security.capability';
            for my $f ('written', 'cut', 'given') {
                open(F, '>', $f) or die $!; print F 'text'; close F; chmod 06777, $f or die $!;
                sc(SYS_setxattr, $f, $key, $cap, length $cap, 0) == 0 or die "set $!"; capable($f) or die 'not set';
            }
            chown(33, 33, 'given') or die $!; capable('given') and die 'given';
            mode('given') eq '777' or die mode('given');
            $) = '40 40'; $> = 33;
            open(F, '+<', 'written') or die $!; syswrite(F, 'new') or die $!; close F;
            truncate('cut', 1) or die $!;
            for my $f ('written', 'cut') { mode($f) eq '777' or die "$f ", mode($f); capable($f) and die "$f is capable"; }
            "#,
        )?;
    }
    Ok(())
}

fn extended_attributes_are_mapped() -> Result<()> {
    let dir = scratch("xattr")?;
    perl(
        &dir,
        &["--privileged"],
        r#"
        open(F, '>', 'f') or die $!; close F;
        sub set { sc(SYS_setxattr, 'f', $_[0], $_[1], length $_[1], $_[2] // 0) }
        sub get { my ($f, $k, $b) = ('f', $_[0], "\0" x 100); my $n = syscall(SYS_getxattr, $f, $k, $b, 100); $n < 0 ? undef : substr($b, 0, $n) }
        set('user.a', 'one') == 0 or die "user $!"; get('user.a') eq 'one' or die 'get';
        set('trusted.b', 'two') == 0 or die "trusted $!"; get('trusted.b') eq 'two' or die 'trusted';
        set('user.a', 'x', 1) == -1 or die 'create'; set('user.none', 'x', 2) == -1 or die 'replace';
        set('user.koya.trusted.b', 'evil') == -1 or die 'the map is open';
        my ($f, $b) = ('f', "\0" x 200); my $n = syscall(SYS_listxattr, $f, $b, 200); join(' ', sort split /\0/, substr($b, 0, $n)) eq 'trusted.b user.a' or die substr($b, 0, $n);
        sc(SYS_removexattr, 'f', 'trusted.b') == 0 or die "remove $!"; defined get('trusted.b') and die 'removed';
        set('trusted.b', 'kept') == 0 or die $!;
        "#,
    )?;
    let mut value = [0; 100];
    let path = dir.join("f");
    ensure!(
        rustix::fs::getxattr(&path, "trusted.b", &mut value).is_err(),
        "reached the host"
    );
    let len = rustix::fs::getxattr(&path, "user.koya.trusted.b", &mut value)?;
    ensure!(&value[..len] == b"kept");
    Ok(())
}

fn sparse_files_and_holes() -> Result<()> {
    let dir = scratch("sparse")?;
    perl(
        &dir,
        &[],
        r#"
        open(F, '+>', 's') or die $!; sysseek(F, 100 << 20, 0); syswrite(F, 'end') or die $!;
        sc(SYS_lseek, fileno F, 0, 3) == 100 << 20 or die "data $!";
        sc(SYS_lseek, fileno F, 0, 4) == 0 or die "hole $!";
        sc(SYS_fallocate, fileno F, 0, 0, 1 << 20) == 0 or die "fallocate $!";
        (stat F)[12] >= 2048 or die 'blocks';
        sc(SYS_fallocate, fileno F, 3, 0, 1 << 20) == 0 or die "punch $!";
        (stat F)[12] < 2048 or die 'punched';
        my ($in, $out) = (pack('q', 100 << 20), pack('q', 0));
        open(G, '+>', 'copy') or die $!;
        sc(SYS_copy_file_range, fileno F, $in, fileno G, $out, 3, 0) == 3 or die "copy $!";
        sysseek(G, 0, 0); sysread(G, my $b, 9); $b eq 'end' or die $b;
        "#,
    )?;
    ensure!(fs::metadata(dir.join("s"))?.blocks() < 100);
    Ok(())
}

fn shared_maps_work_under_every_policy() -> Result<()> {
    for cache in ["never", "auto", "always", "writeback"] {
        let dir = scratch("maps")?;
        perl(
            &dir,
            &["--cache", cache],
            r#"
            open(F, '+>', 'm') or die $!; syswrite(F, "\0" x 8192) or die $!;
            my $p = sc(SYS_mmap, 0, 8192, 3, 1, fileno F, 0); $p > 0 or die "mmap $!";
            my $data = 'mapped'; my $to = pack('q', $p + 5000);
            # process_vm_writev to ourselves stands in for a store through a pointer
            my $from = unpack('q', pack('p', $data));
            my $l = pack('qq', $from, 6); my $r = pack('qq', $p + 5000, 6);
            sc(SYS_process_vm_writev, $$ + 0, $l, 1, $r, 1, 0) == 6 or die "store $!";
            sc(SYS_msync, $p, 8192, 4) == 0 or die "msync $!";
            "#,
        )?;
        let bytes = fs::read(dir.join("m"))?;
        ensure!(&bytes[5000..5006] == b"mapped", "under {cache}");
    }
    Ok(())
}

fn links_do_not_lead_out() -> Result<()> {
    let dir = scratch("links")?;
    let secret = scratch("secret")?;
    fs::write(secret.join("s"), "secret")?;
    symlink(&secret, dir.join("out"))?;
    symlink("../../../../../../../..", dir.join("up"))?;
    let script = format!(
        r#"-e 'out/s' and die 'out'; -e 'up{}/s' and die 'up'; -e '..{}/s' and die 'dots'; print 'kept'"#,
        secret.display(),
        secret.display()
    );
    let volume = format!("{}:/mnt", dir.display());
    // The container has another root, so a link followed in the guest leads nowhere.
    let rootfs = crate::tool::shared_rootfs();
    let shell = format!(
        "cd /mnt; cat out/s up{0}/s ..{0}/s 2>/dev/null; echo $?; cat up/etc/shadow 2>/dev/null; echo $?",
        secret.display()
    );
    let said = stdout(run_in(rootfs, &["-v", &volume], &["sh", "-c", &shell])?)?;
    ensure!(said == "1\n1", "{said} {script}");
    Ok(())
}

fn changes_on_the_host_are_seen() -> Result<()> {
    let dir = scratch("changes")?;
    fs::write(dir.join("f"), "old")?;
    let volume = format!("{}:/data", dir.display());
    let container =
        crate::tool::Background::start("files-changes", &["-v", &volume], &["sleep", "1000"])?;
    ensure!(stdout(container.exec(&[], &["cat", "/data/f"])?)? == "old");
    fs::write(dir.join("f"), "newer")?;
    fs::write(dir.join("g"), "born")?;
    crate::tool::until("the change shows", || {
        let said = stdout(container.exec(&[], &["sh", "-c", "cat /data/f /data/g"])?)?;
        Ok((said == "newerborn").then_some(()))
    })
}

/// A guest that accesses more files than the process may have open.
fn more_nodes_than_descriptors() -> Result<()> {
    let dir = scratch("nodes")?;
    for n in 0..600 {
        fs::write(dir.join(format!("{n}")), n.to_string())?;
    }
    let rootfs = crate::tool::shared_rootfs();
    let script = format!(
        "ulimit -n 300; exec koya run --rootfs {} -v {}:/data -- sh -c \
         'cd /data; ls -l | wc -l; for r in 1 2; do cat $(seq 0 599) | md5sum; done; \
         rm $(seq 0 99); cat $(seq 100 599) | wc -c'",
        rootfs.display(),
        dir.display()
    );
    let output = std::process::Command::new("sh")
        .args(["-c", &script])
        .output()?;
    let said = stdout(output)?;
    let lines: Vec<&str> = said.lines().collect();
    ensure!(
        lines.len() == 4 && lines[0] == "601" && lines[1] == lines[2],
        "{said}"
    );
    let expected: usize = (100..600).map(|n: u32| n.to_string().len()).sum();
    ensure!(lines[3] == expected.to_string(), "{said}");
    ensure!(fs::read_dir(&dir)?.count() == 500);
    Ok(())
}

fn appends_of_both_sides_are_kept() -> Result<()> {
    let dir = scratch("append")?;
    fs::write(dir.join("log"), "host\n")?;
    let volume = format!("{}:/data", dir.display());
    let container =
        crate::tool::Background::start("files-append", &["-v", &volume], &["sleep", "1000"])?;
    for round in 0..5 {
        stdout(container.exec(
            &[],
            &["sh", "-c", &format!("echo guest {round} >> /data/log")],
        )?)?;
        use std::io::Write;
        writeln!(
            fs::File::options().append(true).open(dir.join("log"))?,
            "host {round}"
        )?;
    }
    let text = fs::read_to_string(dir.join("log"))?;
    ensure!(text.lines().count() == 11, "{text}");
    Ok(())
}

/// The same tree, packed inside and outside: names, modes, owners, links and contents.
fn a_tree_survives_tar() -> Result<()> {
    let dir = scratch("tree")?;
    let from = scratch("tree-from")?;
    let make = "mkdir -p a/b/c; for n in $(seq 100); do head -c $((n * 37)) /dev/urandom > a/b/$n; chmod $((400 + n % 8 * 10)) a/b/$n; done; \
                ln a/b/1 a/hard; ln -s ../b a/c-link; mkfifo a/fifo; chown 33:40 a/b/2; touch -d '2001-02-03 04:05:06' a/b/3; tar -cf /tmp/t.tar a || tar -cf t.tar a";
    let script = format!(
        "cd {} && {make} && mv /tmp/t.tar {}/t.tar",
        from.display(),
        dir.display()
    );
    let output = std::process::Command::new("sh")
        .args(["-c", &script])
        .output()?;
    ensure!(output.status.success(), "{output:?}");
    let volume = format!("{}:/data", dir.display());
    let rootfs = crate::tool::shared_rootfs();
    stdout(run_in(
        rootfs,
        &["-v", &volume],
        &["sh", "-c", "cd /data && tar -xf t.tar"],
    )?)?;
    let listing = |root: &Path| -> Result<String> {
        let script = "find a | sort | while read f; do [ -L \"$f\" ] && stat -c '%n %f %u %g %s' \"$f\" || stat -c '%n %f %u %g %s %Y %h' \"$f\"; [ -f \"$f\" ] && sha256sum \"$f\"; done | grep -v '^a/* 41'; true";
        let output = std::process::Command::new("sh")
            .args(["-c", script])
            .current_dir(root)
            .output()?;
        let text = String::from_utf8(output.stdout)?;
        // Sizes and times of directories depend on the file system.
        Ok(text
            .lines()
            .filter(|l| !l.contains(" 41ed "))
            .collect::<Vec<_>>()
            .join("\n"))
    };
    let (inside, outside) = (listing(&dir)?, listing(&from)?);
    ensure!(
        inside == outside && inside.lines().count() > 200,
        "{inside}\n---\n{outside}"
    );
    Ok(())
}

/// Files of the host's /proc; busybox's cat uses sendfile(2).
fn what_has_no_size_can_be_sent() -> Result<()> {
    let volume = ["-v", "/proc:/host/proc:ro"];
    let said = sh(
        &volume,
        "cat /host/proc/sys/kernel/ostype /host/proc/version",
    )?;
    let (first, second) = said.split_once('\n').context("two lines")?;
    ensure!(
        first == "Linux" && second.starts_with("Linux version"),
        "{said}"
    );
    Ok(())
}

/// microsoft/openvmm 3681, podman's `070-build`: a volume from another file system than the root's. Its space is that of
/// removed files at once.
fn another_file_system_of_the_host_is_another_device() -> Result<()> {
    let dir = scratch("another")?;
    let at = dir.to_str().context("a path in UTF-8")?;
    let mount = ["-t", "tmpfs", "-o", "size=3m", "tmpfs", at];
    stdout(Command::new("mount").args(mount).output()?)?;
    let script = "mkdir /data/sub; touch /data/sub/inner
        device() { stat -c %d \"$1\"; }
        test $(device /) != $(device /data) || echo the same device
        test $(device /data) = $(device /data/sub/inner) || echo several devices
        test $(device /) = $(device /bin) || echo another device
        find / -xdev -name inner; find /data -xdev -name inner
        df -k /data | awk 'END { print $2, $6 }'
        for n in 1 2 3 4 5 6 7 8 9 10; do
            head -c 4m /dev/zero > /data/full 2> /dev/null
            rm /data/full; echo $n > /data/new || echo no space
        done; cat /data/new";
    let said = sh(&["-v", &format!("{at}:/data")], script);
    stdout(Command::new("umount").args(["-l", at]).output()?)?;
    let said = said?;
    ensure!(said == "/data/sub/inner\n3072 /data\n10", "{said}");
    Ok(())
}

/// Several processes make and remove names of one file: none finds that it has no name any more, but a removed file
/// gets none.
fn names_of_one_file_are_made_while_others_go() -> Result<()> {
    let dir = scratch("names")?;
    let script = r#"
        open(my $file, ">", "one"); close $file;
        for my $n (1 .. 4) {
            next if fork;
            for (1 .. 100) { link("one", "one$n") && stat("one") && unlink("one$n") && stat("one") or print "$n: $!\n" }
            exit;
        }
        1 while wait != -1;
        open($file, "<", "one"); unlink "one";
        my ($from, $to) = ("/proc/self/fd/" . fileno $file, "two");
        sc(SYS_linkat, -100, $from, -100, $to, 0x400) == 0 ? print "linked\n" : print "$!\n";
        print((stat $file)[3], "\n");"#;
    let said = perl(&dir, &[], script)?;
    ensure!(said == "No such file or directory\n0", "{said}");
    Ok(())
}
