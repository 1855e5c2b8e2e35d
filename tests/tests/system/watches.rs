//! inotify in the guest, on files changed by the host.

use crate::calls::with_numbers;
use crate::tool::{Background, koya, scratch, stdout};
use anyhow::{Result, ensure};
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

crate::trials![changes_on_the_host_reach_inotify, ends_of_what_is_watched];

/// Watches its arguments for all changes, and prints each event: watched path, kind, entry. Ends with the entry `end`.
const WATCH: &str = r#"
    $| = 1; my %path;
    my $fd = syscall(SYS_inotify_init1, 0); $fd >= 0 or die "inotify: $!";
    open(my $in, '<&=', $fd) or die $!;
    for my $path (@ARGV) {
        my $name = "$path"; my $wd = syscall(SYS_inotify_add_watch, $fd, $name, 0xfce); $wd >= 0 or die "$path: $!";
        $path{$wd} = $path;
    }
    print "ready\n";
    my %kind = (0x2 => 'MODIFY', 0x4 => 'ATTRIB', 0x8 => 'CLOSE_WRITE', 0x40 => 'MOVED_FROM',
        0x80 => 'MOVED_TO', 0x100 => 'CREATE', 0x200 => 'DELETE', 0x400 => 'DELETE_SELF',
        0x800 => 'MOVE_SELF', 0x8000 => 'IGNORED');
    while (sysread($in, my $events, 65536)) {
        while (length $events) {
            my ($wd, $mask, $cookie, $len) = unpack('lLLL', $events);
            my $name = unpack('Z*', substr($events, 16, $len));
            substr($events, 0, 16 + $len) = '';
            my $kind = $kind{$mask & 0xffff} // sprintf('%x', $mask);
            $kind .= ' dir' if $mask & 0x40000000;
            print "$path{$wd}: $kind $name\n";
            print "cookie $cookie\n" if $cookie;
            if ($path{$wd} eq 'file' && $kind eq 'CLOSE_WRITE') {
                open(my $f, '<', 'file') or die $!; print 'text: ', <$f>, "\n";
            }
            if ($name eq 'go' && $kind eq 'CREATE') {
                open(my $f, '>', 'own') or die $!; syswrite($f, 'x') or die $!; close $f; unlink 'own';
            }
            exit 0 if $name eq 'end';
        }
    }
"#;

/// A container that watches these paths of `dir`.
struct Watcher(Background);

impl Watcher {
    fn start(name: &str, dir: &Path, paths: &[&str]) -> Result<Self> {
        let volume = format!("{}:/mnt", dir.display());
        let mut run = koya(["run", "-d", "--name", name, "--rootfs", "/", "--read-only"]);
        run.args(["-v", &volume, "--workdir", "/mnt", "--", "perl", "-e"]);
        stdout(run.arg(with_numbers(WATCH)).args(paths).output()?)?;
        let watcher = Self(Background { name: name.into() });
        watcher.wait_for("ready")?;
        Ok(watcher)
    }

    fn said(&self) -> Result<Vec<String>> {
        let said = self.0.said()?;
        Ok(said
            .lines()
            .map(|line| line.trim_end().to_owned())
            .collect())
    }

    fn wait_for(&self, line: &str) -> Result<()> {
        let there = |said: &str| said.lines().any(|l| l.trim_end() == line);
        self.0.wait_until(line, there)
    }

    /// All output up to the entry `end`.
    fn all(&self, dir: &Path) -> Result<Vec<String>> {
        fs::write(dir.join("end"), "")?;
        self.wait_for(".: CREATE end")?;
        self.said()
    }
}

fn changes_on_the_host_reach_inotify() -> Result<()> {
    let dir = scratch("watches")?;
    fs::write(dir.join("file"), "old")?;
    let watcher = Watcher::start("watches", &dir, &[".", "file"])?;
    // Makes the guest cache the file.
    let seen = watcher.0.exec(&[], &["cat", "/mnt/file"])?;
    ensure!(stdout(seen)? == "old");

    let changed = Instant::now();
    fs::write(dir.join("file"), "new text")?;
    watcher.wait_for("text: new text")?;
    eprintln!(
        "watches: a change on the host was read in the guest after {:?}, asked each 20 ms",
        changed.elapsed()
    );
    fs::create_dir(dir.join("folder"))?;
    fs::rename(dir.join("folder"), dir.join("moved"))?;
    fs::remove_dir(dir.join("moved"))?;
    watcher.wait_for(".: DELETE dir moved")?;
    fs::write(dir.join("go"), "")?;
    watcher.wait_for(".: DELETE own")?;
    // Events caused by the guest's own requests would arrive within this time.
    std::thread::sleep(Duration::from_millis(500));
    let said = watcher.all(&dir)?;
    let count = |line: &str| said.iter().filter(|l| *l == line).count();
    for line in [
        "file: MODIFY",
        ".: MODIFY file",
        "file: CLOSE_WRITE",
        ".: CLOSE_WRITE file",
        ".: CREATE dir folder",
        ".: MOVED_FROM dir folder",
        ".: MOVED_TO dir moved",
        ".: DELETE dir moved",
        ".: CREATE go",
        ".: CREATE own",
        ".: MODIFY own",
        ".: CLOSE_WRITE own",
        ".: DELETE own",
    ] {
        ensure!(count(line) >= 1, "no {line:?} in {said:#?}");
        let once = line.ends_with("own") || line.contains("dir");
        ensure!(!once || count(line) == 1, "{line:?} twice in {said:#?}");
    }
    let cookies: Vec<_> = said.iter().filter(|l| l.starts_with("cookie")).collect();
    ensure!(cookies.len() == 2 && cookies[0] == cookies[1], "{said:#?}");
    Ok(())
}

/// Events for programs that watch one file: it is replaced or removed, and the watch with it.
fn ends_of_what_is_watched() -> Result<()> {
    let dir = scratch("ends")?;
    fs::write(dir.join("file"), "old")?;
    fs::create_dir(dir.join("folder"))?;
    let watcher = Watcher::start("ends", &dir, &[".", "file", "folder"])?;
    fs::write(dir.join("file.new"), "new")?;
    fs::rename(dir.join("file.new"), dir.join("file"))?;
    fs::remove_dir(dir.join("folder"))?;
    for line in [
        ".: MOVED_TO file",
        "file: DELETE_SELF",
        "file: IGNORED",
        "folder: DELETE_SELF",
        "folder: IGNORED",
    ] {
        watcher.wait_for(line)?;
    }
    let text = watcher.0.exec(&[], &["cat", "/mnt/file"])?;
    ensure!(stdout(text)? == "new");
    watcher.all(&dir)?;
    Ok(())
}
