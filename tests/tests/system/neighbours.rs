//! Between sandboxes: one reaches neither the ports nor the sockets, files or processes of another, and other users of the
//! host reach none of them.

use crate::debian::debian;
use crate::oci::{Runtime, bundle, text};
use crate::tool::{Background, koya, scratch, shared_rootfs, stdout, until};
use anyhow::{Context, Result, ensure};
use std::fs::{self, Permissions};
use std::io::Write;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown, symlink};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

crate::trials![
    a_guest_reaches_no_port_of_its_host_or_of_another,
    users_do_not_reach_each_others_sandboxes,
    what_another_user_has_planted_is_refused,
];

/// A container with vsock sockets in the background, which runs a Perl script.
fn guest(name: &str, socket: &Path, script: &str) -> Result<Background> {
    let socket = socket.to_string_lossy();
    let mut run = koya(["run", "-d", "--name", name, "--vsock", &socket, "--rootfs"]);
    run.arg(debian()?).args(["--", "perl", "-e", script]);
    stdout(run.output()?)?;
    Ok(Background { name: name.into() })
}

/// 40 is AF_VSOCK, and the address is `struct sockaddr_vm`.
const LISTENS: &str = r#"
    use Socket; $| = 1;
    socket(my $l, 40, SOCK_STREAM, 0) or die "socket: $!";
    bind($l, pack("SSLLx4", 40, 0, 7000, 0xffffffff)) or die "bind: $!"; listen($l, 9); print "ready\n";
    while (accept(my $c, $l)) { sysread $c, my $line, 99; print "asked $line" }"#;

/// Ports of the host: of the agent's connection, of streams, and one that nobody serves; then the port of another guest, by
/// the addresses that it may have. A connection to the stream port is closed, since it has no token.
const TRIES: &str = r#"
    use Socket; $| = 1; alarm 100;
    for ([2, 1024], [2, 1025], [2, 7000], map { [$_, 7000] } 0, 1, 3, 4, 5, 0xffffffff) {
        my ($cid, $port) = @$_;
        socket(my $s, 40, SOCK_STREAM, 0) or die "socket: $!";
        my $said = "refused";
        if (connect($s, pack("SSLLx4", 40, 0, $port, $cid))) {
            syswrite $s, "0" x 64;
            $said = (sysread $s, my $answer, 99) ? "answered" : "closed";
        }
        print "$cid:$port $said\n";
    }
    print "done\n"; sleep 1000"#;

fn a_guest_reaches_no_port_of_its_host_or_of_another() -> Result<()> {
    let dir = scratch("neighbours")?;
    let socket = dir.join("one.sock");
    let one = guest("neighbour-one", &socket, LISTENS)?;
    one.wait_until("the first guest", |said| said.contains("ready"))?;
    let two = guest("neighbour-two", &dir.join("two.sock"), TRIES)?;
    two.wait_until("the second guest", |said| said.contains("done"))?;
    let said = two.said()?;
    let (closed, refused): (Vec<&str>, Vec<&str>) = said
        .lines()
        .filter(|line| line.contains(':'))
        .partition(|line| line.ends_with("closed"));
    ensure!(closed == ["2:1025 closed"], "{said}");
    let all = refused.iter().all(|line| line.ends_with("refused"));
    ensure!(all && refused.len() == 8, "{said}");
    // The first guest listens all the same.
    let mut host = UnixStream::connect(&socket)?;
    host.write_all(b"CONNECT 7000\nby the host\n")?;
    one.wait_until("the host's line", |said| said.contains("by the host"))?;
    let said = one.said()?;
    ensure!(said.matches("asked").count() == 1, "{said}");
    Ok(())
}

/// A user of the host with access to /dev/kvm; its container is removed on drop.
struct User {
    id: u32,
    home: PathBuf,
}

/// Name of each user's container.
const NAME: &str = "mine";

impl User {
    fn new(id: u32) -> Result<Self> {
        let home = scratch("neighbour")?;
        chown(&home, Some(id), Some(id))?;
        Ok(Self { id, home })
    }

    /// Runs a program as this user, with the home directory of a user.
    fn runs(&self, home: &Path, program: &[&str]) -> Result<Output> {
        let id = self.id.to_string();
        let mut command = Command::new("setpriv");
        command.args(["--reuid", &id, "--regid", &id, "--clear-groups"]);
        command.args(program).env("HOME", home);
        command
            .env_remove("XDG_DATA_HOME")
            .env_remove("XDG_RUNTIME_DIR");
        Ok(command.output()?)
    }

    fn start(&self) -> Result<()> {
        let rootfs = shared_rootfs().to_string_lossy();
        let run = ["koya", "run", "-d", "--name", NAME, "--rootfs", &rootfs];
        let command = ["--", "sleep", "1000"];
        stdout(self.runs(&self.home, &[&run[..], &command].concat())?).map(drop)
    }

    fn containers(&self) -> PathBuf {
        self.home.join(".local/share/koya/containers")
    }

    fn pid(&self) -> Result<u64> {
        let said = stdout(self.runs(&self.home, &["koya", "ps", "--json"])?)?;
        let list: serde_json::Value = serde_json::from_str(&said)?;
        list[0]["pid"].as_u64().context("no pid")
    }

    /// Checks that a shell script of this user fails.
    fn fails(&self, script: &str) -> Result<()> {
        let tried = self.runs(&self.home, &["sh", "-c", script])?;
        let said = String::from_utf8_lossy(&tried.stdout);
        ensure!(!tried.status.success(), "{script}: {said}");
        Ok(())
    }
}

impl Drop for User {
    fn drop(&mut self) {
        self.runs(&self.home, &["koya", "rm", "--force", NAME]).ok();
    }
}

fn entries(directory: &Path) -> Result<Vec<PathBuf>> {
    let all = fs::read_dir(directory).with_context(|| directory.display().to_string())?;
    all.map(|entry| Ok(entry?.path())).collect()
}

/// Checks owner and modes of the directories of containers; returns the sockets in them.
fn sockets(containers: &Path, owner: u32) -> Result<Vec<PathBuf>> {
    let mut sockets = Vec::new();
    for container in entries(containers)? {
        let data = fs::symlink_metadata(&container)?;
        let is_private = data.is_dir() && data.uid() == owner && data.mode() & 0o7777 == 0o700;
        ensure!(is_private, "{}: {data:?}", container.display());
        for path in entries(&container)? {
            let data = fs::symlink_metadata(&path)?;
            ensure!(data.uid() == owner, "{}: {data:?}", path.display());
            if data.file_type().is_socket() {
                ensure!(
                    data.mode() & 0o7777 == 0o600,
                    "{}: {data:?}",
                    path.display()
                );
                sockets.push(path);
            }
        }
    }
    Ok(sockets)
}

fn users_do_not_reach_each_others_sandboxes() -> Result<()> {
    let (one, two) = (User::new(65_534)?, User::new(65_533)?);
    one.start()?;
    // Of the same name.
    two.start()?;
    let runtime = Runtime::koya()?;
    let bundle = bundle("exec sleep 1000", |config| {
        config["linux"]["cgroupsPath"] = "/koya-neighbours/one".into();
    })?;
    runtime.ok(&["create", "--bundle", text(&bundle)?, NAME])?;
    runtime.ok(&["start", NAME])?;
    let places = [
        (one.containers(), one.id, one.pid()?),
        (
            runtime.root.clone(),
            0,
            fs::read(runtime.root.join(NAME).join("state.json"))
                .map(|state| serde_json::from_slice::<serde_json::Value>(&state))??["pid"]
                .as_u64()
                .context("no pid")?,
        ),
    ];
    for (place, owner, pid) in &places {
        let found = sockets(place, *owner)?;
        ensure!(!found.is_empty(), "{} has no socket", place.display());
        let place = place.join(NAME);
        two.fails(&format!("ls {}", place.display()))?;
        for socket in found {
            two.fails(&format!(
                "perl -MIO::Socket::UNIX -e 'IO::Socket::UNIX->new(Peer => $ARGV[0]) or die $!' {}",
                socket.display()
            ))?;
        }
        for script in ["ls /proc/PID/fd", "ls /proc/PID/root/", "kill -0 PID"] {
            two.fails(&script.replace("PID", &pid.to_string()))?;
        }
        two.fails(&format!("head -c 1 /proc/{pid}/mem"))?;
        two.fails(&format!("cat /proc/{pid}/environ"))?;
    }
    let containers = fs::symlink_metadata(one.containers())?;
    ensure!(containers.mode() & 0o7777 == 0o700, "{containers:?}");
    let tried = two.runs(&one.home, &["koya", "exec", NAME, "true"])?;
    ensure!(!tried.status.success(), "{tried:?}");
    // The control: the same things are there for their owner.
    let own = one.pid()?;
    for program in [
        &["koya", "exec", NAME, "true"][..],
        &["ls", &format!("/proc/{own}/fd")],
    ] {
        stdout(one.runs(&one.home, program)?)?;
    }
    runtime.ok(&["delete", "--force", NAME])?;
    until("the control group's end", || {
        fs::remove_dir("/sys/fs/cgroup/koya-neighbours").ok();
        let is_there = Path::new("/sys/fs/cgroup/koya-neighbours").exists();
        Ok((!is_there).then_some(()))
    })
}

/// Directories and links of another user in the place of those of a user or of root.
fn what_another_user_has_planted_is_refused() -> Result<()> {
    let (one, two) = (User::new(65_534)?, User::new(65_533)?);
    let trap = two.home.join("trap");
    fs::create_dir(&trap)?;
    fs::set_permissions(&trap, Permissions::from_mode(0o700))?;
    chown(&trap, Some(two.id), Some(two.id))?;
    let parent = one.containers();
    let parent = parent.parent().context("a parent")?;
    for directory in [
        parent,
        &one.home.join(".local/share"),
        &one.home.join(".local"),
    ] {
        fs::create_dir_all(directory)?;
        chown(directory, Some(one.id), Some(one.id))?;
    }
    symlink(&trap, one.containers())?;
    let rootfs = shared_rootfs().to_string_lossy();
    let run = ["koya", "run", "--rootfs", &rootfs, "--", "true"];
    let tried = one.runs(&one.home, &run)?;
    let said = String::from_utf8_lossy(&tried.stderr).into_owned();
    let is_refused = tried.status.code() == Some(125) && said.contains("must be a directory");
    ensure!(is_refused, "{tried:?}");
    ensure!(entries(&trap)?.is_empty(), "something is in the trap");

    // A directory that everybody may write to, like /tmp.
    let runtime = Runtime::koya()?;
    fs::set_permissions(&runtime.root, Permissions::from_mode(0o1777))?;
    let bundle = bundle("true", |_| ())?;
    let open = runtime.root.join("open");
    fs::create_dir(&open)?;
    chown(&open, Some(two.id), Some(two.id))?;
    symlink(&trap, runtime.root.join("link"))?;
    for name in ["open", "link"] {
        let tried = runtime.call(&["create", "--bundle", text(&bundle)?, name])?;
        ensure!(!tried.status.success(), "{name}: {tried:?}");
    }
    // With a state, whose hooks would be run as root.
    let ran = two.home.join("ran");
    let hook = serde_json::json!({"path": "/bin/touch", "args": ["touch", ran]});
    let state = serde_json::json!({
        "id": "open", "pid": 1, "pid_start": 0, "bundle": "/", "rootfs": "/", "created": "", "uid": 0,
        "annotations": {}, "cgroup": null, "hooks": {"poststop": [hook]},
    });
    fs::write(open.join("state.json"), state.to_string())?;
    let tried = runtime.call(&["delete", "--force", "open"])?;
    ensure!(!tried.status.success() && !ran.exists(), "{tried:?}");
    ensure!(entries(&trap)?.is_empty(), "something is in the trap");
    Ok(())
}
