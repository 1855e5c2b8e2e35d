//! Descriptors that a process inherits from the caller, 3 and up: first those of systemd's socket activation
//! (sd_listen_fds(3)), then those of `--preserve-fds`.

use crate::cli::Command;
use anyhow::{Context, Result, bail};
use koya_tasks::Preserved;
use koya_tasks::wire::send;
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

/// Number of the first one.
const FIRST: usize = 3;

/// Number of inherited descriptors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Count {
    pub(crate) all: usize,
    /// How many of them are for socket activation.
    activated: usize,
}

impl Count {
    /// The number that a command line asks for.
    fn of(command: &Command, variable: impl Fn(&str) -> Option<String>) -> Self {
        let wanted = match command {
            Command::Create(args) => args.preserve_fds,
            Command::Run(args) => args.create.preserve_fds,
            Command::Exec(args) => args.preserve_fds,
            _ => return Self::default(),
        };
        let number = |name: &str| variable(name)?.parse::<u32>().ok();
        let is_ours = number("LISTEN_PID") == Some(std::process::id());
        let activated = number("LISTEN_FDS").filter(|_| is_ours).unwrap_or(0);
        Self {
            all: wanted as usize + activated as usize,
            activated: activated as usize,
        }
    }

    /// The environment variables of an activated process, as set by runc.
    pub(crate) fn environment(self) -> Vec<String> {
        match self.activated {
            0 => Vec::new(),
            count => vec![format!("LISTEN_FDS={count}"), "LISTEN_PID=1".into()],
        }
    }
}

/// The descriptors given to a command.
#[derive(Debug, Default)]
pub(crate) struct PreservedFds {
    pub(crate) count: Count,
    fds: Vec<OwnedFd>,
}

impl PreservedFds {
    /// Takes them over, before anything is opened that could get their numbers.
    ///
    /// Like crun, it leaves out numbers that are not open; one before an open one is `/dev/null`.
    ///
    /// # Errors
    /// The descriptor that can't be forwarded, or if there are too many.
    pub(crate) fn take(command: &Command) -> Result<Self> {
        let mut count = Count::of(command, |name| std::env::var(name).ok());
        if count.all == 0 {
            return Ok(Self::default());
        }
        let open = open_numbers(FIRST + count.all)?;
        let end = open.last().map_or(FIRST, |last| last + 1);
        count.all = end - FIRST;
        if count.all > Preserved::MAX {
            bail!(
                "--preserve-fds: descriptor {} is open, and a process can have no more than {} of them",
                end - 1,
                Preserved::MAX
            );
        }
        let own = pidfd_open(getpid(), PidfdFlags::empty())?;
        let mut fds = Vec::new();
        for number in FIRST..end {
            let fd = match open.contains(&number) {
                true => pidfd_getfd(&own, number as i32, PidfdGetfdFlags::empty())
                    .with_context(|| format!("descriptor {number} to preserve"))?,
                false => File::open("/dev/null")?.into(),
            };
            // Only a check: it is taken over by the receiving process.
            Preserved::new(number, fd.try_clone()?)?;
            fds.push(fd);
        }
        Ok(Self { count, fds })
    }

    /// Sends a message with the descriptors of a process: a terminal or a connection for one, or else the streams of this
    /// process, followed by the inherited descriptors, and the socket of a service manager.
    pub(crate) fn send(
        &self,
        to: &UnixStream,
        message: &impl Serialize,
        terminal: Option<BorrowedFd<'_>>,
        manager: Option<BorrowedFd<'_>>,
    ) -> Result<()> {
        let (stdin, stdout, stderr) = (std::io::stdin(), std::io::stdout(), std::io::stderr());
        let mut fds = match terminal {
            Some(terminal) => vec![terminal],
            None => vec![stdin.as_fd(), stdout.as_fd(), stderr.as_fd()],
        };
        fds.extend(self.fds.iter().map(AsFd::as_fd));
        fds.extend(manager);
        send(to, message, &fds)
    }
}

/// The numbers of open descriptors, from the first inherited one.
fn open_numbers(below: usize) -> Result<BTreeSet<usize>> {
    const OWN: &str = "/proc/self/fd";
    let entries = fs::read_dir(OWN).context("cannot list the descriptors to preserve")?;
    let numbers = entries.flatten().filter_map(|entry| {
        let number = entry.file_name().to_str()?.parse::<usize>().ok()?;
        (FIRST..below).contains(&number).then_some(number)
    });
    let mut numbers: BTreeSet<_> = numbers.collect();
    // That of the directory itself is closed by now.
    numbers.retain(|number| Path::new(OWN).join(number.to_string()).is_symlink());
    Ok(numbers)
}

/// Splits off the inherited descriptors at the end of a list.
///
/// # Errors
/// If some of them are missing.
pub(crate) fn split(fds: &mut Vec<OwnedFd>, count: Count) -> Result<Vec<Preserved>> {
    let streams = fds.len().checked_sub(count.all);
    let own = fds.split_off(streams.context("not all descriptors came")?);
    let numbered = own.into_iter().enumerate();
    numbered
        .map(|(index, fd)| Preserved::new(FIRST + index, fd))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::Cli;
    use std::os::fd::AsRawFd;

    fn count(line: &str, environment: &[(&str, u32)]) -> Count {
        let words = std::iter::once("koya-runtime").chain(line.split_whitespace());
        let cli = Cli::read(words.map(Into::into)).unwrap();
        Count::of(&cli.command, |name| {
            let found = environment.iter().find(|(known, _)| *known == name);
            found.map(|(_, value)| value.to_string())
        })
    }

    #[test]
    fn those_of_systemd_are_counted_where_they_are_ours() {
        let own = std::process::id();
        let of = |line: &str, pid: u32| count(line, &[("LISTEN_FDS", 2), ("LISTEN_PID", pid)]);
        let both = of("run --preserve-fds 3 c", own);
        assert_eq!((both.all, both.activated), (5, 2));
        assert_eq!(both.environment(), ["LISTEN_FDS=2", "LISTEN_PID=1"]);
        let others = of("exec --preserve-fds 3 c true", own + 1);
        assert_eq!((others.all, others.activated), (3, 0));
        assert!(others.environment().is_empty());
        assert_eq!(of("state c", own).all, 0);
        assert_eq!(count("create --preserve-fds 100 c", &[]).all, 100);
    }

    #[test]
    fn only_open_descriptors_are_found() {
        let open = File::open("/dev/null").unwrap();
        let number = open.as_raw_fd() as usize;
        let all = |below: usize| open_numbers(below).unwrap();
        assert!(all(number + 1).contains(&number));
        assert!(!all(number).contains(&number));
        assert!(all(FIRST).is_empty());
        assert!(!all(usize::MAX).iter().any(|number| *number < FIRST));
    }

    #[test]
    fn those_that_come_last_are_taken() {
        let pipe = || OwnedFd::from(std::io::pipe().unwrap().0);
        let count = Count {
            all: 2,
            activated: 0,
        };
        let mut fds = vec![pipe(), pipe(), pipe()];
        assert_eq!(split(&mut fds, count).unwrap().len(), 2);
        assert_eq!(fds.len(), 1);
        assert!(split(&mut fds, count).is_err());
    }
}
