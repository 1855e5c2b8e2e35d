//! Files that the containers of a pod share: what works between processes of one kernel works between them.

use crate::cri::Pod;
use crate::daemon::{Containerd, Test, Use, trials_of};
use crate::debian::debian;
use crate::tool::{stdout, until};
use anyhow::{Context, Result, ensure};
use koya_test_cri::{Cri, v1};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Every test, for each containerd.
pub(crate) fn trials() -> Vec<libtest_mimic::Trial> {
    let tests: [Test; 2] = [
        ("one_file_is_one_file", one_file_is_one_file),
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

/// Two containers that have one volume: the second also a part of it by itself, as the kubelet's subPath
/// mounts it, and all of it once more read-only. The first has a second volume with a link to a file of
/// the other.
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
        let read_only = |mount: v1::Mount| v1::Mount {
            readonly: true,
            ..mount
        };
        let one = pod.run("one", &["sleep", "10000"], |all| {
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

    fn one(&self, script: &str) -> Result<String> {
        self.pod.exec(&self.one, script)
    }

    fn two(&self, script: &str) -> Result<String> {
        self.pod.exec(&self.two, script)
    }

    /// Starts something in the first container, and waits until it says that it is there.
    fn one_goes_on(&self, script: &str) -> Result<()> {
        let ready = self.shared.join("ready");
        fs::remove_file(&ready).ok();
        self.one(&format!("({script}) > /deb/mnt/said 2>&1 < /dev/null &"))?;
        until("what goes on", || Ok(ready.exists().then_some(())))
            .with_context(|| fs::read_to_string(self.shared.join("said")).unwrap_or_default())
    }
}

/// Takes each kind of lock on a file, and says which it got.
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
    // What is held goes with who held it.
    both.one("killall perl")?;
    let tried = both.two(&perl(LOCKS, "/media/l"))?;
    ensure!(tried == "flock got posix got ofd got", "{tried}");

    fresh_names(&both)?;
    write_ahead(&both)?;
    removed_files_leave(containerd, &both)?;
    both.pod.remove()?;
    stdout(Command::new("umount").arg(&both.part).output()?)?;
    containerd.nothing_is_left()
}

/// A name that was not there is there at once when the other container has made it.
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

/// The host has the room of a removed file again, whoever removed it, though the guest remembers it.
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

/// Kubernetes' HostToContainer, beside a volume that stays as it is.
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
    // Nothing there is open, so the host gets it back.
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
