//! Programs of the host that a command starts: whose they are, and what they inherit.

use std::env;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where root's programs come from, and what is `PATH` for all that are started: what a caller's says must
/// not be root's to run.
const SYSTEM_PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/sbin:/usr/local/bin";

/// Where a program is. Users that are not root may have it elsewhere, by their own `PATH`.
pub(super) fn find(name: &str) -> Option<PathBuf> {
    let own = env::var_os("PATH").filter(|_| !rustix::process::geteuid().is_root());
    let system = find_in(OsStr::new(SYSTEM_PATH), name);
    system.or_else(|| find_in(&own?, name))
}

fn find_in(path: &OsStr, name: &str) -> Option<PathBuf> {
    let mut places = env::split_paths(path).filter(|dir| dir.is_absolute());
    places.find_map(|dir| Some(dir.join(name)).filter(|place| place.is_file()))
}

/// Starts it with nothing of this process's environment: variables of the dynamic linker, say, are nothing
/// to this program, which is static, and orders to others.
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
        // Cargo sets it for tests.
        assert!(
            env::var_os("CARGO_MANIFEST_DIR").is_some() && !said.contains("CARGO"),
            "{said}"
        );
        assert!(said.contains(SYSTEM_PATH), "{said}");
    }
}
