//! Users of a user namespace, where they come in more than one range.
//!
//! libcontainer writes one range by itself, and has newuidmap(1) and newgidmap(1) write more, which it looks for on its
//! PATH. In the guest these are links to the agent, in [`PROGRAMS`]: its helper may map all users.

use anyhow::{Context, Result, bail};
use std::fmt::Write as _;
use std::path::Path;
use std::process::ExitCode;

/// Where the links are (`xtask/src/build.rs`).
pub(crate) const PROGRAMS: &str = "/bin";

/// What this program is called as one of them: which file it writes.
pub(crate) fn file_of(program: &str) -> Option<&'static str> {
    match Path::new(program).file_name()?.to_str()? {
        "newuidmap" => Some("uid_map"),
        "newgidmap" => Some("gid_map"),
        _ => None,
    }
}

/// The whole program: `PID` and for each range `ID-INSIDE ID-OUTSIDE COUNT`.
pub(crate) fn main(file: &str, args: &[String]) -> ExitCode {
    match write(file, args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            crate::sys::kernel_log(&format!("koya-agent: {file}: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

/// The kernel takes them all in one write, and only once (user_namespaces(7)).
fn write(file: &str, args: &[String]) -> Result<()> {
    let (pid, ranges) = args.split_first().context("there is no process")?;
    let pid: u32 = pid.parse().context("this is no process")?;
    let path = format!("/proc/{pid}/{file}");
    std::fs::write(&path, lines(ranges)?).with_context(|| format!("cannot write {path}"))
}

fn lines(ranges: &[String]) -> Result<String> {
    let (ranges, []) = ranges.as_chunks::<3>() else {
        bail!("a range is three numbers");
    };
    let mut lines = String::new();
    for range in ranges {
        let numbers = range.each_ref().map(|number| number.parse::<u32>());
        let [Ok(inside), Ok(outside), Ok(count)] = numbers else {
            bail!("{range:?} are no numbers");
        };
        writeln!(lines, "{inside} {outside} {count}")?;
    }
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_is_told_by_its_name() {
        assert_eq!(file_of("/bin/newuidmap"), Some("uid_map"));
        assert_eq!(file_of("newgidmap"), Some("gid_map"));
        assert_eq!(file_of("/init"), None);
    }

    #[test]
    fn each_range_is_a_line() {
        let of = |text: &str| {
            let words = text.split_whitespace().map(str::to_owned);
            lines(&words.collect::<Vec<_>>())
        };
        let three = of("0 1 1000 1000 0 1 1001 1001 64536").unwrap();
        assert_eq!(three, "0 1 1000\n1000 0 1\n1001 1001 64536\n");
        for bad in ["0 1", "0 1 x", "0 1 -5"] {
            assert!(of(bad).is_err(), "{bad}");
        }
    }
}
