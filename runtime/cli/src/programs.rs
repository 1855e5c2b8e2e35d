//! Programs of the host that a command starts: their location and their environment.

use std::env;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Search path of root's programs, and `PATH` of all programs that are started: root must not run programs from a caller's
/// path.
const SYSTEM_PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/sbin:/usr/local/bin";

/// Location of a program. Users other than root may have it elsewhere, on their own `PATH`.
pub(super) fn find(name: &str) -> Option<PathBuf> {
    let own = env::var_os("PATH").filter(|_| !rustix::process::geteuid().is_root());
    let system = find_in(OsStr::new(SYSTEM_PATH), name);
    system.or_else(|| find_in(&own?, name))
}

/// Location of a program in the directory of this one: the same installation, if it is in it.
pub(super) fn beside(name: &str) -> Option<PathBuf> {
    let own = env::current_exe().ok()?;
    find_in(own.parent()?.as_os_str(), name)
}

fn find_in(path: &OsStr, name: &str) -> Option<PathBuf> {
    let mut places = env::split_paths(path).filter(|dir| dir.is_absolute());
    places.find_map(|dir| Some(dir.join(name)).filter(|place| place.is_file()))
}

/// A command without the environment of this process: variables of the dynamic linker, for example, do not affect this
/// static program, but would affect others.
pub(super) fn command(program: &Path) -> Command {
    let mut command = Command::new(program);
    command.env_clear().env("PATH", SYSTEM_PATH);
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_comes_from_an_absolute_directory() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("koya-test-program");
        std::fs::write(&program, "").unwrap();
        let path = |dirs: &[&Path]| env::join_paths(dirs).unwrap();
        let found = find_in(&path(&[Path::new("."), dir.path()]), "koya-test-program");
        assert_eq!(found, Some(program));
        assert_eq!(
            find_in(&path(&[Path::new(""), Path::new(".")]), "Cargo.toml"),
            None
        );
        assert!(find("sh").is_some_and(|place| place.is_absolute()));
    }

    #[test]
    fn a_program_inherits_nothing() {
        let shell = find("sh").unwrap();
        let said = command(&shell).args(["-c", "set"]).output().unwrap();
        let said = String::from_utf8_lossy(&said.stdout).into_owned();
        // Set by cargo for tests.
        assert!(
            env::var_os("CARGO_MANIFEST_DIR").is_some() && !said.contains("CARGO"),
            "{said}"
        );
        assert!(said.contains(SYSTEM_PATH), "{said}");
    }
}
