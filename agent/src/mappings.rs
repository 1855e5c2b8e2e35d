//! Mappings of users and groups with several ranges.
//!
//! libcontainer writes a single range itself; for more it runs newuidmap(1) and newgidmap(1), found on its PATH. In the
//! guest these are links to the agent, in [`PROGRAMS`]: started by the agent's helper, they are allowed to map all users.

use anyhow::{Context, Result, bail};
use std::fmt::Write as _;
use std::path::Path;
use std::process::ExitCode;

/// Directory of the links, which are created by `xtask/src/build.rs`.
pub(crate) const PROGRAMS: &str = "/bin";

/// The file below `/proc/PID` that the program with this name writes; `None` for any other program.
pub(crate) fn file_of(program: &str) -> Option<&'static str> {
    match Path::new(program).file_name()?.to_str()? {
        "newuidmap" => Some("uid_map"),
        "newgidmap" => Some("gid_map"),
        _ => None,
    }
}

/// Main function of both programs. Arguments: `PID`, and `ID-INSIDE ID-OUTSIDE COUNT` for each range.
pub(crate) fn main(file: &str, args: &[String]) -> ExitCode {
    match write(file, args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            crate::sys::kernel_log(&format!("koya-agent: {file}: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

/// Writes all ranges at once: the kernel accepts only one write (user_namespaces(7)).
fn write(file: &str, args: &[String]) -> Result<()> {
    let (pid, ranges) = args.split_first().context("the process ID is missing")?;
    let pid: u32 = pid.parse().context("the process ID is invalid")?;
    let path = format!("/proc/{pid}/{file}");
    std::fs::write(&path, lines(ranges)?).with_context(|| format!("cannot write {path}"))
}

fn lines(ranges: &[String]) -> Result<String> {
    let (ranges, []) = ranges.as_chunks::<3>() else {
        bail!("a range must have three numbers");
    };
    let mut lines = String::new();
    for range in ranges {
        let numbers = range.each_ref().map(|number| number.parse::<u32>());
        let [Ok(inside), Ok(outside), Ok(count)] = numbers else {
            bail!("{range:?} are not numbers");
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
