//! Descriptors that a process inherits from the caller, 3 and up: first those of systemd's socket activation
//! (sd_listen_fds(3)), then those of `--preserve-fds`.

use crate::cli::Command;
use anyhow::{Context, Result, bail};
use koya_tasks::Preserved;
use koya_tasks::wire::send;
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};
use serde::{Deserialize, Serialize};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

/// Number of the first one.
const FIRST: usize = 3;

/// Number of inherited descriptors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Count {
    pub(crate) all: usize,
    /// Those of socket activation.
    activated: usize,
}

impl Count {
    fn of(command: &Command, variable: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let wanted = match command {
            Command::Create(args) => args.preserve_fds,
            Command::Run(args) => args.create.preserve_fds,
            Command::Exec(args) => args.preserve_fds,
            _ => return Ok(Self::default()),
        };
        let number = |name: &str| variable(name)?.parse::<u32>().ok();
        let is_ours = number("LISTEN_PID") == Some(std::process::id());
        let activated = number("LISTEN_FDS").filter(|_| is_ours).unwrap_or(0);
        let all = wanted as usize + activated as usize;
        if all > Preserved::MAX {
            bail!(
                "--preserve-fds {wanted}: a process can have no more than {} of them",
                Preserved::MAX
            );
        }
        Ok(Self {
            all,
            activated: activated as usize,
        })
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
    /// # Errors
    /// The descriptor that is not open, or can't be forwarded.
    pub(crate) fn take(command: &Command) -> Result<Self> {
        let count = Count::of(command, |name| std::env::var(name).ok())?;
        if count.all == 0 {
            return Ok(Self::default());
        }
        let own = pidfd_open(getpid(), PidfdFlags::empty())?;
        let not_open = own.as_raw_fd();
        let mut fds = Vec::new();
        for number in FIRST..FIRST + count.all {
            let number = number as i32;
            let taken = match number == not_open {
                true => Err(rustix::io::Errno::BADF),
                false => pidfd_getfd(&own, number, PidfdGetfdFlags::empty()),
            };
            let fd = taken.with_context(|| format!("descriptor {number} to preserve"))?;
            // Only a check: it is taken over by the receiving process.
            Preserved::new(number as usize, fd.try_clone()?)?;
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

    fn count(line: &str, environment: &[(&str, u32)]) -> Result<Count> {
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
        let of =
            |line: &str, pid: u32| count(line, &[("LISTEN_FDS", 2), ("LISTEN_PID", pid)]).unwrap();
        let both = of("run --preserve-fds 3 c", own);
        assert_eq!((both.all, both.activated), (5, 2));
        assert_eq!(both.environment(), ["LISTEN_FDS=2", "LISTEN_PID=1"]);
        let others = of("exec --preserve-fds 3 c true", own + 1);
        assert_eq!((others.all, others.activated), (3, 0));
        assert!(others.environment().is_empty());
        assert_eq!(of("state c", own).all, 0);
        assert!(count("create --preserve-fds 65 c", &[]).is_err());
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
