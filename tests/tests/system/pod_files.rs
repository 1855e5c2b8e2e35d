//! Files shared between the containers of a pod: whatever works between processes of one kernel works between them.

use crate::calls::with_numbers;
use crate::daemon::{Containerd, Test, Use, trials_of};
use crate::debian::debian;
use crate::pod::Pod;
use crate::tool::{stdout, until, until_within};
use anyhow::{Context, Result, ensure};
use koya_test_cri::{Cri, v1};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Every test, for each containerd.
pub(crate) fn trials() -> Vec<libtest_mimic::Trial> {
    let tests: [Test; 3] = [
        ("one_file_is_one_file", one_file_is_one_file),
        (
            "containers_work_on_one_volume",
            containers_work_on_one_volume,
        ),
        (
            "mounts_of_the_host_come_later",
            mounts_of_the_host_come_later,
        ),
    ];
    trials_of("pod_files", Use::Cri, tests)
}

fn bind(host: &Path, at: &str) -> v1::Mount {
    v1::Mount {
        host_path: host.to_string_lossy().into_owned(),
        container_path: at.into(),
        ..Default::default()
    }
}

fn mount(words: &[&str], at: &Path) -> Result<()> {
    stdout(Command::new("mount").args(words).arg(at).output()?).map(drop)
}

/// Two containers with a common volume: the second also has a subdirectory of it as a separate mount, like the kubelet's
/// subPath, and the whole volume once more read-only. The first has a second volume with a link to a file of the other.
struct Two<'a> {
    pod: Pod<'a>,
    one: String,
    two: String,
    shared: PathBuf,
    part: PathBuf,
}

impl<'a> Two<'a> {
    fn start(cri: &'a Cri, containerd: &Containerd) -> Result<Self> {
        let deb = debian()?;
        let kubelet = containerd.dir.join("kubelet");
        let shared = kubelet.join("volumes/shared");
        let (side, part) = (kubelet.join("volumes/side"), kubelet.join("subpaths/0"));
        for dir in [&shared.join("part"), &side, &part] {
            fs::create_dir_all(dir)?;
        }
        fs::write(shared.join("part/file"), "text")?;
        fs::hard_link(shared.join("part/file"), side.join("linked"))?;
        mount(&["--bind", &shared.join("part").to_string_lossy()], &part)?;
        let pod = Pod::start(cri, containerd, "files", |_| {})?;
        let may_mount = |all: &mut v1::ContainerConfig| {
            let security = all.linux.as_mut().and_then(|l| l.security_context.as_mut());
            let capabilities = v1::Capability {
                add_capabilities: vec!["SYS_ADMIN".into()],
                ..Default::default()
            };
            security.expect("set by the pod").capabilities = Some(capabilities);
        };
        let read_only = |mount: v1::Mount| v1::Mount {
            readonly: true,
            ..mount
        };
        let one = pod.run("one", &["sleep", "10000"], |all| {
            may_mount(all);
            all.mounts = vec![
                read_only(bind(&deb, "/deb")),
                bind(&shared, "/deb/mnt"),
                bind(&side, "/deb/srv"),
            ];
        })?;
        let two = pod.run("two", &["sleep", "10000"], |all| {
            all.mounts = vec![
                read_only(bind(&deb, "/deb")),
                bind(&part, "/deb/media"),
                bind(&shared, "/deb/mnt"),
                read_only(bind(&shared, "/deb/opt")),
            ];
        })?;
        Ok(Self {
            pod,
            one,
            two,
            shared,
            part,
        })
    }

    /// Runs a script in both at the same time, with the container's name in `$WHO` and its path to the subdirectory in
    /// `$PART`. Returns the output of both after their end.
    fn at_once(&self, script: &str) -> Result<[String; 2]> {
        for (id, who, part) in [
            (&self.one, "one", "/mnt/part"),
            (&self.two, "two", "/media"),
        ] {
            let script = format!(
                "export WHO={who} PART={part} HOME=/tmp; (set -e; {script}) > /deb/mnt/said.{who} 2>&1; \
                 echo $? > /deb/mnt/status.{who}"
            );
            self.pod
                .exec(id, &format!("({script}) < /dev/null > /dev/null 2>&1 &"))?;
        }
        let read =
            |what: &str, who: &str| fs::read_to_string(self.shared.join(format!("{what}.{who}")));
        let limit = Duration::from_secs(220);
        let statuses = until_within(limit, "both containers", || {
            let both = ["one", "two"].map(|who| read("status", who).unwrap_or_default());
            Ok(both.iter().all(|s| s.ends_with('\n')).then_some(both))
        })
        .with_context(|| format!("said {:?}", ["one", "two"].map(|who| read("said", who))))?;
        let said = [read("said", "one")?, read("said", "two")?];
        ensure!(statuses == ["0\n", "0\n"], "{statuses:?} {said:?}");
        for who in ["one", "two"] {
            fs::remove_file(self.shared.join(format!("status.{who}")))?;
        }
        Ok(said)
    }

    fn end(self, containerd: &Containerd) -> Result<()> {
        self.pod.remove()?;
        stdout(Command::new("umount").arg(&self.part).output()?)?;
        containerd.nothing_is_left()
    }

    fn one(&self, script: &str) -> Result<String> {
        self.pod.exec(&self.one, script)
    }

    fn two(&self, script: &str) -> Result<String> {
        self.pod.exec(&self.two, script)
    }

    /// Starts a background process in the first container, and waits for its ready file.
    fn one_goes_on(&self, script: &str) -> Result<()> {
        let ready = self.shared.join("ready");
        fs::remove_file(&ready).ok();
        self.one(&format!("({script}) > /deb/mnt/said 2>&1 < /dev/null &"))?;
        until("what goes on", || Ok(ready.exists().then_some(())))
            .with_context(|| fs::read_to_string(self.shared.join("said")).unwrap_or_default())
    }
}

/// Takes each kind of lock on a file, and prints those acquired.
const LOCKS: &str = r#"use Fcntl qw(:DEFAULT :flock);
    sub try { my ($kind, $got) = @_; print $kind, $got ? " got " : " busy "; }
    my @files = map { open(my $f, "+>>", "$ARGV[0].$_") or die "$_: $!"; $f } 1..3;
    my $lock = pack("s s x4 q q l x4", F_WRLCK, 0, 0, 0, 0);
    try("flock", flock($files[0], LOCK_EX | LOCK_NB));
    try("posix", fcntl($files[1], F_SETLK, my $a = $lock));
    try("ofd", fcntl($files[2], 37, my $b = $lock));
    if ($ARGV[1]) { open(R, ">", $ARGV[1]); close(R); sleep(1000); }"#;

const SERVE: &str = r#"use Socket; socket(S, AF_UNIX, SOCK_STREAM, 0) or die;
    bind(S, pack_sockaddr_un($ARGV[0])) or die "$!"; listen(S, 1);
    open(R, ">", $ARGV[1]); close(R); accept(C, S); print C "from one"; close(C);"#;

const ASK: &str = r#"use Socket; socket(S, AF_UNIX, SOCK_STREAM, 0) or die;
    connect(S, pack_sockaddr_un($ARGV[0])) or die "$!"; print <S>;"#;

fn perl(program: &str, args: &str) -> String {
    format!("chroot /deb perl -e '{program}' {args}")
}

fn one_file_is_one_file(containerd: &Containerd) -> Result<()> {
    let cri = Cri::connect(&containerd.socket())?;
    let both = Two::start(&cri, containerd)?;
    let inode = "stat -c %i:%h";
    let known = both.one(&format!("{inode} /deb/mnt/part/file"))?;
    ensure!(known == both.one(&format!("{inode} /deb/srv/linked"))?);
    ensure!(known == both.two(&format!("{inode} /deb/media/file"))?);
    ensure!(known == both.two(&format!("{inode} /deb/opt/part/file"))?);
    let refused = both.two("touch /deb/opt/part/file 2>&1 || true")?;
    ensure!(refused.contains("Read-only"), "{refused}");

    both.one_goes_on(&perl(SERVE, "/mnt/part/s /mnt/ready"))?;
    let answer = both.two(&perl(ASK, "/media/s"))?;
    ensure!(answer == "from one", "{answer}");
    both.one_goes_on(
        "mkfifo /deb/mnt/part/q; touch /deb/mnt/ready; echo through > /deb/mnt/part/q",
    )?;
    ensure!(both.two("timeout 30 cat /deb/media/q")? == "through");

    both.one_goes_on(&perl(LOCKS, "/mnt/part/l /mnt/ready"))?;
    let tried = both.two(&perl(LOCKS, "/media/l"))?;
    ensure!(tried == "flock busy posix busy ofd busy", "{tried}");
    // Locks are released with their owner.
    both.one("killall perl")?;
    let tried = both.two(&perl(LOCKS, "/media/l"))?;
    ensure!(tried == "flock got posix got ofd got", "{tried}");

    fresh_names(&both)?;
    write_ahead(&both)?;
    removed_files_leave(containerd, &both)?;
    both.end(containerd)
}

fn containers_work_on_one_volume(containerd: &Containerd) -> Result<()> {
    let cri = Cri::connect(&containerd.socket())?;
    let both = Two::start(&cri, containerd)?;
    counters(&both).context("counters")?;
    replaced_names(&both).context("replaced names")?;
    renamed_directories(&both).context("renamed directories")?;
    git(&both).context("Git")?;
    overlays(&both).context("overlays")?;
    both.end(containerd)
}

/// Increments a number in a file, under one kind of lock.
const COUNT: &str = r#"use Fcntl qw(:DEFAULT :flock); my ($file, $kind, $times) = @ARGV;
    for (1..$times) {
        open(my $f, "+<", $file) or die "$!";
        if ($kind eq "flock") { flock($f, LOCK_EX) or die "$!"; }
        else {
            my $command = $kind eq "ofd" ? 38 : F_SETLKW;
            fcntl($f, $command, my $l = pack("s s x4 q q l x4", F_WRLCK, 0, 0, 0, 0)) or die "$!";
        }
        sysread($f, my $text, 100); sysseek($f, 0, 0); syswrite($f, ($text + 1) . "\n"); close($f);
    }"#;

/// Increments under a lock are not lost.
fn counters(both: &Two<'_>) -> Result<()> {
    const EACH: u32 = 40;
    let kinds = ["flock", "posix", "ofd"];
    for kind in kinds {
        both.one(&format!("echo 0 > /deb/mnt/part/{kind}"))?;
    }
    let count = kinds.map(|kind| perl(COUNT, &format!("$PART/{kind} {kind} {EACH}")));
    both.at_once(&count.join("; "))?;
    for kind in kinds {
        let counted = both.two(&format!("cat /deb/media/{kind}"))?;
        ensure!(counted == (2 * EACH).to_string(), "{kind}: {counted}");
    }
    Ok(())
}

/// Replaces a file repeatedly, or reads it meanwhile: it always exists and is complete.
const REPLACE: &str = r#"my ($who, $dir) = @ARGV; my $size = 0; my $end = time + 100;
    if ($who eq "one") {
        for my $n (1..100) {
            open(my $f, ">", "$dir/next") or die "$!"; print $f "$n\n" x ($n * 7); close($f);
            rename("$dir/next", "$dir/now") or die "$!";
        }
        open(my $f, ">", "$dir/over"); close($f);
    } else {
        my $reads = 0;
        until (-e "$dir/over" or time > $end) {
            open(my $f, "<", "$dir/now") or die "read $reads: $!";
            my ($n, @more) = <$f>; $reads++;
            die "$n has " . (1 + @more) . " lines" if 1 + @more != $n * 7 or grep { $_ ne $n } @more;
        }
        print "$reads reads";
    }"#;

fn replaced_names(both: &Two<'_>) -> Result<()> {
    both.one("yes 1 | head -n 7 > /deb/mnt/part/now")?;
    let [_, two] = both.at_once(&perl(REPLACE, "$WHO $PART"))?;
    ensure!(two.ends_with(" reads") && two != "0 reads", "{two}");
    Ok(())
}

/// With RENAME_NOREPLACE and RENAME_EXCHANGE.
const RENAME: &str = r#"my ($from, $to, $flags) = @ARGV;
    print syscall(SYS_renameat2, -100, $from, -100, $to, $flags + 0) == 0 ? "done" : "$!";"#;

/// One container moves a directory: the other's working directory follows, and the new names are visible.
fn renamed_directories(both: &Two<'_>) -> Result<()> {
    both.one("cd /deb/mnt/part; mkdir -p a/deep b; echo a > a/deep/file; echo b > b/file")?;
    let rename = |to: &str, flags: u32| {
        both.one(&perl(
            &with_numbers(RENAME),
            &format!("/mnt/part/a /mnt/part/{to} {flags}"),
        ))
    };
    let looks = "cd /deb/media/a/deep; touch /deb/mnt/ready; \
        until test -e /deb/mnt/moved; do sleep 0.1; done; \
        { cat file; cat ../../c/deep/file; ls -d /deb/media/a /deb/media/c; pwd -P; } > /deb/mnt/seen 2>&1; \
        touch /deb/mnt/looked";
    both.two(&format!("({looks}) > /dev/null 2>&1 < /dev/null &"))?;
    until("the other's look", || {
        Ok(both.shared.join("ready").exists().then_some(()))
    })?;
    let refused = rename("b", 1)?;
    ensure!(refused == "File exists", "{refused}");
    ensure!(rename("c", 1)? == "done");
    both.one("touch /deb/mnt/moved")?;
    until("the other's second look", || {
        Ok(both.shared.join("looked").exists().then_some(()))
    })?;
    let seen = fs::read_to_string(both.shared.join("seen"))?;
    let wanted = [
        "a",
        "a",
        "ls: /deb/media/a: No such file or directory",
        "/deb/media/c",
        "/deb/media/c/deep",
    ];
    ensure!(seen.lines().eq(wanted), "{seen}");

    both.one("mv /deb/mnt/part/c /deb/mnt/part/a")?;
    ensure!(rename("b", 2)? == "done");
    let seen = both.two("cd /deb/media; cat a/file b/deep/file")?;
    ensure!(seen == "b\na", "{seen}");
    // Between volumes it is a cross-mount rename, as between any two.
    let moved = both.one(&perl(&with_numbers(RENAME), "/mnt/part/b /srv/b 0"))?;
    ensure!(moved.contains("cross-device"), "{moved}");
    Ok(())
}

/// Clones of one repository, and concurrent pushes to it.
fn git(both: &Two<'_>) -> Result<()> {
    const EACH: u32 = 1;
    both.one(
        "chroot /deb sh -ec 'cd /mnt/part; export HOME=/mnt/part
            git config --global safe.directory \"*\"; git config --global init.defaultBranch main
            git config --global user.name one; git config --global user.email one@koya
            git config --global commit.gpgsign false; git config --global gc.auto 0
            git init -q --bare repository; git clone -q repository first; cd first
            echo first > first; git add .; git commit -qm first; git push -q origin HEAD' 2>&1",
    )?;
    let work = format!(
        "chroot /deb sh -ec 'export HOME=$PART; cd $PART; git clone -q repository $WHO; cd $WHO
            for n in $(seq {EACH}); do
                echo $n > $WHO.$n; git add .; git commit -qm \"$WHO $n\"
                tries=0
                until git push -q origin HEAD; do
                    tries=$((tries + 1)); test $tries -lt 30; git pull -q --rebase
                done
            done' 2>&1"
    );
    both.at_once(&work)?;
    let count = |path: &str| {
        format!(
            "chroot /deb sh -ec 'export HOME={path}; cd {path}/repository; git fsck --strict --full; \
             git rev-list --count main' 2>&1"
        )
    };
    for seen in [both.one(&count("/mnt/part"))?, both.two(&count("/media"))?] {
        ensure!(
            seen.lines().last() == Some(&(2 * EACH + 1).to_string()),
            "{seen}"
        );
        ensure!(!seen.contains("error"), "{seen}");
    }
    Ok(())
}

/// An overlay with its layers on the volume, while the other container uses the same files.
fn overlays(both: &Two<'_>) -> Result<()> {
    both.one(
        "cd /deb/mnt/part; mkdir -p lower/dir upper work; mkdir /tmp/merged
         echo lower > lower/file; echo other > lower/dir/other; ln lower/file lower/again
         mount -t overlay overlay -o lowerdir=lower,upperdir=upper,workdir=work /tmp/merged",
    )?;
    let seen = both.one(
        "cd /tmp/merged; exec 3< file; echo more >> file; cat file; echo -; cat <&3; cat again
         rm dir/other; ls dir",
    )?;
    ensure!(seen == "lower\nmore\n-\nlower\nmore\nlower", "{seen}");
    let seen = both.two(
        "cd /deb/media; cat lower/file upper/file; test -c upper/dir/other; cat lower/dir/other",
    )?;
    ensure!(seen == "lower\nlower\nmore\nother", "{seen}");
    both.one("umount /tmp/merged; rm -r /deb/mnt/part/upper /deb/mnt/part/work")?;
    Ok(())
}

/// A new file is visible in the other container at once, despite an earlier negative lookup.
fn fresh_names(both: &Two<'_>) -> Result<()> {
    let makes = "mkfifo /deb/mnt/turn; touch /deb/mnt/ready
        for n in $(seq 20); do
            read look < /deb/mnt/turn
            echo $n > /deb/mnt/part/temporary; mv /deb/mnt/part/temporary /deb/mnt/part/new$n
            echo made > /deb/mnt/turn
        done";
    both.one_goes_on(makes)?;
    let looks = "for n in $(seq 20); do
            test -e /deb/media/new$n && echo early
            echo look > /deb/mnt/turn
            read made < /deb/mnt/turn
            cat /deb/media/new$n
        done | tr '\\n' ' '";
    let seen = both.two(looks)?;
    let all: Vec<_> = (1..=20).map(|n: u32| n.to_string()).collect();
    ensure!(seen.trim() == all.join(" "), "{seen}");
    Ok(())
}

/// SQLite's write-ahead log needs shared memory and locks.
fn write_ahead(both: &Two<'_>) -> Result<()> {
    const EACH: u32 = 150;
    both.one(
        "echo 'pragma journal_mode=wal; create table t(who);' | chroot /deb sqlite3 /mnt/part/db",
    )?;
    let fill = |who: &str, db: &str| {
        format!(
            "( (echo .timeout 100000; for n in $(seq {EACH}); do echo \"insert into t values ('{who}');\"; done) \
             | chroot /deb sqlite3 {db}; echo done > /deb/mnt/done.{who}) > /deb/mnt/said.{who} 2>&1 < /dev/null &"
        )
    };
    both.one(&fill("one", "/mnt/part/db"))?;
    both.two(&fill("two", "/media/db"))?;
    let done = |who: &str| both.shared.join(format!("done.{who}")).exists();
    until("both writers", || {
        Ok((done("one") && done("two")).then_some(()))
    })?;
    let count = both.two(
        "echo 'select count(*) from t; pragma integrity_check;' | chroot /deb sqlite3 /media/db",
    )?;
    let said =
        ["one", "two"].map(|who| fs::read_to_string(both.shared.join(format!("said.{who}"))));
    ensure!(count == format!("{}\nok", 2 * EACH), "{count} {said:?}");
    Ok(())
}

/// The host's disk space of a removed file is freed, regardless of who removes it and despite the guest's cache.
fn removed_files_leave(containerd: &Containerd, both: &Two<'_>) -> Result<()> {
    for name in ["big1", "big2"] {
        both.one(&format!("head -c 1000000 /dev/zero > /deb/mnt/part/{name}"))?;
        both.two(&format!(
            "cat /deb/mnt/part/{name} /deb/media/{name} > /dev/null"
        ))?;
    }
    both.two("rm /deb/media/big1")?;
    fs::remove_file(both.shared.join("part/big2"))?;
    let shim = containerd.shim_of(&both.pod.id)?.context("no shim")?;
    let held = || -> Result<Option<()>> {
        let fds = fs::read_dir(format!("/proc/{shim}/fd"))?.flatten();
        let paths = fds.filter_map(|fd| fs::read_link(fd.path()).ok());
        let mut paths = paths.map(|path| path.to_string_lossy().into_owned());
        let is_held = paths.any(|path| path.contains("/big") && path.ends_with("(deleted)"));
        Ok((!is_held).then_some(()))
    };
    until("the files' descriptors", held)
}

/// Kubernetes' HostToContainer, with a second volume without propagation.
fn mounts_of_the_host_come_later(containerd: &Containerd) -> Result<()> {
    let cri = Cri::connect(&containerd.socket())?;
    let base = containerd.dir.join("later");
    let dirs = ["follows", "stays"].map(|name| base.join(name));
    for dir in &dirs {
        fs::create_dir_all(dir.join("late"))?;
        mount(&["--bind", &dir.to_string_lossy()], dir)?;
        mount(&["--make-shared"], dir)?;
    }
    let pod = Pod::start(&cri, containerd, "later", |_| {})?;
    let [follows, stays] = &dirs;
    let id = pod.run("one", &["sleep", "10000"], |all| {
        all.mounts = vec![
            v1::Mount {
                propagation: v1::MountPropagation::PropagationHostToContainer as i32,
                ..bind(follows, "/follows")
            },
            bind(stays, "/stays"),
        ];
    })?;
    pod.exec(&id, "ls /follows/late /stays/late")?;
    for dir in &dirs {
        mount(&["-t", "tmpfs", "later"], &dir.join("late"))?;
        fs::write(dir.join("late/file"), "there")?;
    }
    until("the host's mount", || {
        let seen = pod.exec(&id, "cat /follows/late/file 2>&1 || true")?;
        Ok((seen == "there").then_some(()))
    })?;
    let seen = pod.exec(&id, "ls /stays/late")?;
    ensure!(seen.is_empty(), "{seen}");
    // The mount is not in use, so the host can unmount it.
    until("its end", || {
        let out = Command::new("umount").arg(follows.join("late")).output()?;
        Ok(out.status.success().then_some(()))
    })?;
    until("its end in the guest", || {
        let seen = pod.exec(&id, "ls /follows/late")?;
        Ok(seen.is_empty().then_some(()))
    })?;
    pod.remove()?;
    for dir in &dirs {
        stdout(Command::new("umount").arg("-R").arg(dir).output()?)?;
    }
    containerd.nothing_is_left()
}
