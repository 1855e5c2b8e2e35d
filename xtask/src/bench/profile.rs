//! Profile of the instructions of a counted start: QEMU logs each executed instruction, and they are attributed here to the
//! kernels and programs of guest and host, and to the kernels' functions.

use crate::proc;
use anyhow::{Context, Result, bail};
use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// Message of the measuring program on the second serial port, which waits for a reply.
const BEGIN: &str = "begin";
const END: &str = "end";
/// End marker of the log; a partial line may precede it.
const LAST_LINE: &[u8] = b"\nthe end\n";
/// End of each line in which the program names the host function for an address.
const ANSWER: &str = "!";
/// Maximum number of addresses of the host kernel that are looked up, those with the most instructions first.
const ASKED: usize = 4000;

/// Flag of a logged block: it was executed in an SVM guest (QEMU's `HF_GUEST_MASK`).
const IN_GUEST: u32 = 1 << 21;
/// Privilege level (`HF_CPL_MASK`).
const LEVEL: u32 = 3;
/// Number of functions listed.
const SHOWN: usize = 60;
/// Maximum depth, more than a kernel's stack ever has.
const DEEPEST: usize = 256;
/// Time limit for QEMU to open its monitor.
const PATIENCE: Duration = Duration::from_secs(10);

/// A kernel's functions, by their addresses.
#[derive(Default)]
pub(super) struct Symbols {
    starts: Vec<u64>,
    names: Vec<String>,
}

impl Symbols {
    /// Parses a System.map, or the output of nm(1): `ffffffff81000000 T _text`.
    pub(super) fn parse(text: &str) -> Self {
        let mut all: Vec<(u64, String)> = text
            .lines()
            .filter_map(|line| {
                let mut words = line.split_whitespace();
                let (start, kind, name) = (words.next()?, words.next()?, words.next()?);
                let code = matches!(kind, "t" | "T" | "w" | "W");
                let start = u64::from_str_radix(start, 16).ok()?;
                (code && !name.starts_with("__pfx_")).then(|| (start, name.to_owned()))
            })
            .collect();
        all.sort();
        all.dedup_by_key(|symbol| symbol.0);
        let (starts, names) = all.into_iter().unzip();
        Self { starts, names }
    }

    /// Index of the function at this address.
    fn find(&self, address: u64) -> Option<usize> {
        self.starts
            .partition_point(|s| *s <= address)
            .checked_sub(1)
    }
}

/// Instructions executed between two points.
#[derive(Default)]
pub(super) struct Profile {
    host_programs: u64,
    guest_programs: u64,
    guest_kernel: u64,
    /// For each function of the guest kernel: its own instructions, and those including its callees.
    own: HashMap<usize, u64>,
    whole: HashMap<usize, u64>,
    /// Instructions of the host kernel; symbols are looked up at the end, for the most frequent addresses.
    host_kernel_all: u64,
    host_kernel: HashMap<u64, u64>,
    host_symbols: Symbols,
}

/// The call stack, as far as it can be inferred from addresses: an address at the start of a function is a call.
#[derive(Default)]
struct Stack(Vec<(usize, u64)>);

impl Stack {
    fn step(&mut self, function: usize, is_begin: bool, now: u64, whole: &mut HashMap<usize, u64>) {
        let top = self.0.last().map(|entered| entered.0);
        if top == Some(function) && !is_begin {
            return;
        }
        if is_begin && self.0.len() < DEEPEST {
            return self.0.push((function, now));
        }
        // A return, to the nearest caller.
        let depth = self.0.iter().rposition(|entered| entered.0 == function);
        self.leave(depth.map_or(0, |depth| depth + 1), now, whole);
        if depth.is_none() {
            self.0.push((function, now));
        }
    }

    fn leave(&mut self, depth: usize, now: u64, whole: &mut HashMap<usize, u64>) {
        while self.0.len() > depth {
            let Some((function, since)) = self.0.pop() else {
                return;
            };
            // A recursive function counts once, when its first call ends.
            if self.0.iter().all(|entered| entered.0 != function) {
                *whole.entry(function).or_default() += now - since;
            }
        }
    }
}

impl Profile {
    /// Reads a log with one line for each instruction.
    fn read(log: impl Read, symbols: &Symbols) -> Result<Self> {
        let mut log = BufReader::with_capacity(1 << 20, log);
        let (mut all, mut stack, mut line) = (Self::default(), Stack::default(), Vec::new());
        // The function of the last address.
        let mut last = (0..0, 0);
        while log.read_until(b'\n', &mut line)? > 0 {
            if let Some((address, flags)) = block(&line) {
                match (flags & IN_GUEST != 0, flags & LEVEL == 0) {
                    (false, true) => {
                        all.host_kernel_all += 1;
                        *all.host_kernel.entry(address).or_default() += 1;
                    }
                    (false, false) => all.host_programs += 1,
                    (true, false) => all.guest_programs += 1,
                    (true, true) => {
                        all.guest_kernel += 1;
                        if !last.0.contains(&address)
                            && let Some(found) = symbols.find(address)
                        {
                            let end = symbols.starts.get(found + 1);
                            let end = end.copied().unwrap_or(u64::MAX);
                            last = (symbols.starts[found]..end, found);
                        }
                        *all.own.entry(last.1).or_default() += 1;
                        let is_begin = address == last.0.start;
                        stack.step(last.1, is_begin, all.guest_kernel, &mut all.whole);
                    }
                }
            }
            if line == LAST_LINE[1..] {
                break;
            }
            line.clear();
        }
        stack.leave(0, all.guest_kernel, &mut all.whole);
        Ok(all)
    }

    pub(super) fn print(&self, symbols: &Symbols) {
        let mut host = HashMap::new();
        for (address, count) in &self.host_kernel {
            if let Some(function) = self.host_symbols.find(*address) {
                *host.entry(function).or_default() += count;
            }
        }
        for (what, count) in [
            ("the guest's kernel", self.guest_kernel),
            ("the guest's programs", self.guest_programs),
            ("the host's kernel", self.host_kernel_all),
            ("the host's programs", self.host_programs),
        ] {
            println!("{:>9.2} M instr  {what}", millions(count));
        }
        print_table("the guest's kernel: its functions' own", symbols, &self.own);
        print_table(
            "the guest's kernel: with what they called",
            symbols,
            &self.whole,
        );
        print_table(
            "the host's kernel: its functions' own",
            &self.host_symbols,
            &host,
        );
    }
}

fn millions(count: u64) -> f64 {
    count as f64 / 1e6
}

fn print_table(title: &str, symbols: &Symbols, counts: &HashMap<usize, u64>) {
    let mut counts: Vec<_> = counts.iter().map(|(f, count)| (*count, *f)).collect();
    counts.sort_unstable_by(|a, b| b.cmp(a));
    println!("{title}:");
    for (count, function) in counts.into_iter().take(SHOWN) {
        println!(
            "{:>9.2} M instr  {}",
            millions(count),
            symbols.names[function]
        );
    }
}

/// `Trace 0: 0x7f52 [cs/address/flags/cflags] symbol`: returns address and flags.
fn block(line: &[u8]) -> Option<(u64, u32)> {
    let text = std::str::from_utf8(line).ok()?.strip_prefix("Trace ")?;
    let mut fields = text.split_once('[')?.1.split('/').skip(1);
    let address = u64::from_str_radix(fields.next()?, 16).ok()?;
    Some((address, u32::from_str_radix(fields.next()?, 16).ok()?))
}

/// Replies to the measuring program, and makes QEMU log the instructions between its messages.
pub(super) fn watch(
    serial: &Path,
    monitor: &Path,
    log: &Path,
    symbols: &Symbols,
) -> Result<Profile> {
    let mut serial = connect(serial)?;
    let mut monitor = Monitor::connect(monitor)?;
    wait_for(&mut serial, BEGIN)?;
    proc::run(Command::new("mkfifo").arg(log))?;
    let mut profile = std::thread::scope(|scope| {
        let reader = scope.spawn(|| Profile::read(File::open(log)?, symbols));
        monitor.say(&format!("logfile {}", log.display()))?;
        monitor.say("one-insn-per-tb on")?;
        monitor.say("log exec,nochain")?;
        serial.write_all(b"\n")?;
        wait_for(&mut serial, END)?;
        // QEMU may close its log with a delay, possibly only at its end.
        monitor.say("log none")?;
        File::options()
            .write(true)
            .open(log)?
            .write_all(LAST_LINE)?;
        monitor.say("one-insn-per-tb off")?;
        serial.write_all(b"\n")?;
        let profile = reader.join();
        profile.unwrap_or_else(|_| bail!("the log's reader panicked"))
    })?;
    let mut hot: Vec<_> = profile.host_kernel.iter().collect();
    hot.sort_unstable_by(|a, b| b.1.cmp(a.1));
    hot.truncate(ASKED);
    profile.host_kernel = hot.into_iter().map(|(a, count)| (*a, *count)).collect();
    let mut answers = String::new();
    for address in profile.host_kernel.keys() {
        writeln!(serial, "{address:x}")?;
        answers += &wait_for(&mut serial, ANSWER)?;
    }
    writeln!(serial)?;
    profile.host_symbols = Symbols::parse(&answers);
    Ok(profile)
}

fn connect(path: &Path) -> Result<UnixStream> {
    let started = Instant::now();
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => return Ok(stream),
            Err(_) if started.elapsed() < PATIENCE => std::thread::sleep(Duration::from_millis(50)),
            Err(error) => return Err(error).with_context(|| format!("{}", path.display())),
        }
    }
}

/// Reads until this text.
fn wait_for(stream: &mut UnixStream, word: &str) -> Result<String> {
    let (mut said, mut byte) = (String::new(), [0]);
    while !said.ends_with(word) {
        if stream.read(&mut byte)? == 0 {
            bail!("it ended before it said {word:?}: {said:?}");
        }
        said.push(char::from(byte[0]));
    }
    Ok(said)
}

/// QEMU's human monitor.
struct Monitor(UnixStream);

impl Monitor {
    const PROMPT: &str = "(qemu) ";

    fn connect(path: &Path) -> Result<Self> {
        let mut stream = connect(path)?;
        wait_for(&mut stream, Self::PROMPT)?;
        Ok(Self(stream))
    }

    fn say(&mut self, command: &str) -> Result<()> {
        writeln!(self.0, "{command}")?;
        wait_for(&mut self.0, Self::PROMPT)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map() -> Symbols {
        Symbols::parse(
            "0000000000001000 T first\n0000000000001100 t second\n0000000000001100 T alias\n\
             0000000000001200 T third\n0000000000001050 D data\n00000000000010f0 t __pfx_second\n",
        )
    }

    fn log(lines: &[(u64, u32)]) -> String {
        let line = |(address, flags)| format!("Trace 0: 0x7f [0/{address:016x}/{flags:08x}/0] x\n");
        lines.iter().copied().map(line).collect()
    }

    #[test]
    fn instructions_are_put_down_to_who_executed_them() {
        let guest = IN_GUEST;
        let text = log(&[(0x1000, 0), (0x1000, 3), (0x400, guest | 3)])
            + "Stopped execution of TB chain\n\n"
            + &log(&[
                (0x1000, guest),
                (0x1001, guest),
                (0x1100, guest),
                (0x1004, guest),
            ])
            + "Trace 0: 0x7\nthe end\n"
            + &log(&[(0x1000, guest)]);
        let profile = Profile::read(text.as_bytes(), &map()).unwrap();
        let of = (
            profile.host_kernel_all,
            profile.host_programs,
            profile.guest_programs,
        );
        assert_eq!((of, profile.guest_kernel), ((1, 1, 1), 4));
        assert_eq!((profile.own[&0], profile.own[&1]), (3, 1));
    }

    #[test]
    fn what_a_function_calls_is_its_own_too() {
        let guest = IN_GUEST;
        // first, second, third, back to second, back to first; then first again, on its own.
        let path = [
            0x1000, 0x1100, 0x1200, 0x1204, 0x1104, 0x1004, 0x1000, 0x1004,
        ];
        let text = log(&path.map(|address| (address, guest)));
        let profile = Profile::read(text.as_bytes(), &map()).unwrap();
        assert_eq!(profile.own[&0], 4);
        assert_eq!(profile.whole[&2], 2);
        assert_eq!(profile.whole[&1], 4);
        assert_eq!(profile.whole[&0], 7);
    }
}
