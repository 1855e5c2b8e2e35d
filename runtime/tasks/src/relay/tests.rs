//! Streams with readers and writers that go, wait or stay.

use super::*;
use crate::stdio::{Input, StdioConfig, StdioPaths};
use rustix::fs::{FileType, Mode, mknodat};
use std::fs;
use std::path::Path;

fn reading_one() -> Shared {
    let shared = Shared::default();
    shared.lock().reading = 1;
    shared
}

fn fifo(dir: &Path, name: &str) -> String {
    let path = dir.join(name);
    let mode = Mode::from_raw_mode(0o600);
    mknodat(rustix::fs::CWD, &path, FileType::Fifo, mode, 0).unwrap();
    path.to_str().unwrap().into()
}

#[test]
fn an_end_waits_for_a_slow_reader_and_nothing_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let path = fifo(dir.path(), "out");
    let reading = path.clone();
    let reader = std::thread::spawn(move || {
        let mut file = File::open(reading).unwrap();
        let (mut all, mut buffer) = (0, [0; 4096]);
        loop {
            match file.read(&mut buffer).unwrap() {
                0 => return all,
                count => all += count,
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    });
    let output = Output::at(&path).unwrap().unwrap();
    let (mut guest, host) = UnixStream::pair().unwrap();
    std::thread::spawn(move || guest.write_all(&[7; 200_000]));
    let waiting = match &output {
        Output::Fifo(writer, _) => writer.try_clone().unwrap(),
        _ => panic!("not a FIFO"),
    };
    relay_output(host, 0, Some(output), &reading_one());
    assert_eq!(rustix::io::ioctl_fionread(&waiting).unwrap(), 0);
    drop(waiting);
    assert_eq!(reader.join().unwrap(), 200_000);
}

#[test]
fn a_reader_that_has_gone_is_not_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let path = fifo(dir.path(), "out");
    let reading = path.clone();
    let reader = std::thread::spawn(move || File::open(reading).unwrap());
    let output = Output::at(&path).unwrap().unwrap();
    drop(reader.join().unwrap());
    let (mut guest, host) = UnixStream::pair().unwrap();
    guest.write_all(b"nobody reads this").unwrap();
    drop(guest);
    let started = Instant::now();
    relay_output(host, 0, Some(output), &reading_one());
    assert!(started.elapsed() < SILENCE);
}

#[test]
fn input_ends_when_the_client_says_so_and_not_when_it_goes() {
    let dir = tempfile::tempdir().unwrap();
    let path = fifo(dir.path(), "in");
    let Input { from, keep } = Input::at(Path::new(&path)).unwrap();
    let (mut guest, to) = UnixStream::pair().unwrap();
    let (_stop, stopped) = UnixStream::pair().unwrap();
    std::thread::spawn(move || relay_input(from, to, &stopped, false));
    fs::write(&path, "one ").unwrap();
    fs::write(&path, "two").unwrap();
    let mut buffer = [0; 7];
    guest.read_exact(&mut buffer).unwrap();
    assert_eq!(&buffer, b"one two");
    drop(keep);
    assert_eq!(guest.read(&mut buffer).unwrap(), 0);
}

/// A guest may say that a process has ended, and neither read its input nor close it.
#[test]
fn input_that_nobody_reads_keeps_no_thread_after_the_end() {
    for (terminal, preserved) in [(false, false), (true, false), (false, true)] {
        an_input_is_closed(terminal, preserved);
    }
}

fn an_input_is_closed(terminal: bool, preserved: bool) {
    let (inputs, mut feed) = std::io::pipe().unwrap();
    let (guest, host) = UnixStream::pair().unwrap();
    let (mut io, mut streams) = (Io::default(), Streams::default());
    io.terminal = terminal;
    if preserved {
        let input = Preserved::new(3, inputs.into()).unwrap();
        io.preserved.push(input);
        streams.extra_fds.push(host);
    } else {
        let from = OwnedFd::from(inputs).into();
        io.stdin = Some(Input { from, keep: None });
        streams.stdin = Some(host);
    }
    if terminal {
        // The process's output is complete.
        guest.shutdown(Shutdown::Write).unwrap();
    }
    let relay = io.connect(streams).unwrap();
    let (sender, fed) = std::sync::mpsc::channel();
    // More than the pipe and the sockets hold.
    std::thread::spawn(move || sender.send(feed.write_all(&vec![7; 16 << 20])));
    while rustix::io::ioctl_fionread(&guest).unwrap() < 64 << 10 {
        std::thread::sleep(Duration::from_millis(1));
    }
    std::thread::sleep(Duration::from_millis(50));
    relay.finish();
    let fed = fed.recv_timeout(Duration::from_secs(20));
    assert!(matches!(fed, Ok(Err(_))), "{fed:?}");
    drop(guest);
}

#[test]
fn a_file_gets_both_streams() {
    let dir = tempfile::tempdir().unwrap();
    let file = format!("file://{}/sub/log", dir.path().display());
    let paths = StdioPaths {
        stdout: file.clone(),
        stderr: file,
        ..StdioPaths::default()
    };
    let io = StdioConfig::Paths(paths).open("c", "default").unwrap();
    for output in [io.stdout, io.stderr].into_iter().flatten() {
        let (mut guest, host) = UnixStream::pair().unwrap();
        guest.write_all(b"line\n").unwrap();
        drop(guest);
        relay_output(host, 0, Some(output), &reading_one());
    }
    assert_eq!(
        fs::read(dir.path().join("sub/log")).unwrap(),
        b"line\nline\n"
    );
}

#[test]
fn preserved_descriptors_are_passed_on_both_ways_and_their_ends_are_heard_of() {
    let ((inputs, mut feed), (mut results, outputs)) =
        (std::io::pipe().unwrap(), std::io::pipe().unwrap());
    let (socket, mut peer) = UnixStream::pair().unwrap();
    let fds: [OwnedFd; 3] = [inputs.into(), outputs.into(), socket.into()];
    let preserved = fds.into_iter().map(|fd| Preserved::new(3, fd).unwrap());
    let io = Io {
        preserved: preserved.collect(),
        ..Io::default()
    };
    let (mut guest, host): (Vec<_>, Vec<_>) = (0..3).map(|_| UnixStream::pair().unwrap()).unzip();
    let streams = Streams {
        extra_fds: host,
        ..Streams::default()
    };
    let relay = io.connect(streams).unwrap();
    let mut text = [0; 4];
    feed.write_all(b"into").unwrap();
    guest[0].read_exact(&mut text).unwrap();
    assert_eq!(&text, b"into");
    drop(feed);
    assert_eq!(guest[0].read(&mut text).unwrap(), 0);
    guest[1].write_all(b"from").unwrap();
    results.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"from");
    // The reader closes its end, which the guest must notice.
    drop(results);
    guest[1].write_all(b"more").unwrap();
    assert_eq!(guest[1].read(&mut text).unwrap(), 0);
    peer.write_all(b"this").unwrap();
    guest[2].read_exact(&mut text).unwrap();
    assert_eq!(&text, b"this");
    guest[2].write_all(b"that").unwrap();
    guest[2].shutdown(Shutdown::Write).unwrap();
    peer.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"that");
    assert_eq!(peer.read(&mut text).unwrap(), 0);
    relay.finish();
}

fn connected(output: std::io::PipeWriter) -> (UnixStream, Relay) {
    let (guest, host) = UnixStream::pair().unwrap();
    let io = Io {
        stdout: Some(Output::Open(OwnedFd::from(output).into())),
        ..Io::default()
    };
    let streams = Streams {
        stdout: Some(host),
        ..Streams::default()
    };
    (guest, io.connect(streams).unwrap())
}

#[test]
fn an_end_is_known_as_soon_as_all_is_written() {
    let (mut read, write) = std::io::pipe().unwrap();
    let (mut guest, relay) = connected(write);
    guest.write_all(b"last words").unwrap();
    drop(guest);
    let started = Instant::now();
    relay.finish();
    assert!(started.elapsed() < LEFT_BEHIND);
    let mut text = String::new();
    read.read_to_string(&mut text).unwrap();
    assert_eq!(text, "last words");
}

#[test]
fn what_a_process_left_behind_is_cut_off() {
    let (_read, write) = std::io::pipe().unwrap();
    let (mut guest, relay) = connected(write);
    let started = Instant::now();
    // It keeps the stream open without writing.
    relay.finish();
    assert!(started.elapsed() >= LEFT_BEHIND);
    assert!(started.elapsed() < LEFT_BEHIND * 5);
    let written = guest.write_all(b"more");
    assert!(written.is_err(), "{written:?}");
}

#[test]
fn a_slow_reader_gets_all_that_the_process_wrote() {
    const LEN: usize = 3 << 18;
    let (mut read, write) = std::io::pipe().unwrap();
    let (mut guest, relay) = connected(write);
    std::thread::scope(|scope| {
        // The guest has more data than fits into the host's sockets, and its process has ended.
        scope.spawn(move || {
            guest.write_all(&vec![7; LEN]).unwrap();
        });
        let reader = scope.spawn(move || {
            let (mut all, mut buffer) = (0, [0; 4096]);
            while let count @ 1.. = read.read(&mut buffer).unwrap() {
                all += count;
                std::thread::sleep(Duration::from_millis(13));
            }
            all
        });
        let started = Instant::now();
        relay.finish();
        assert!(started.elapsed() > LEFT_BEHIND, "the reader was not slow");
        assert_eq!(reader.join().unwrap(), LEN);
    });
}

/// `yes | head -1`: without a reader, a process on the host would be ended by SIGPIPE.
#[test]
fn a_process_notices_that_nobody_reads() {
    let (read, write) = std::io::pipe().unwrap();
    let (mut guest, relay) = connected(write);
    drop(read);
    let started = Instant::now();
    while guest.write_all(b"y\n").is_ok() {
        assert!(
            started.elapsed() < Duration::from_secs(20),
            "it does not notice"
        );
    }
    relay.finish();
}
