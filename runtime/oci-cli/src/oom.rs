//! The sign by which podman learns that a container's processes were killed for want of memory: a file `oom`. Its monitor
//! (conmon) watches the control group on the host, where a container in a virtual machine has no such event.
//!
//! podman 4 looks in the bundle, podman 5 in a directory that it names on the command line of the monitor.

use koya_tasks::Spec;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

const NAME: &str = "oom";
/// The monitor's option for the directory of podman 5.
const DIRECTORY: &[u8] = b"--persist-dir";

/// The files to create if this container has an OOM kill. Called by a command of the monitor, which is its parent.
pub(crate) fn files(spec: &Spec, bundle: &Path) -> Vec<PathBuf> {
    if spec.annotation("io.container.manager") != Some("libpod") {
        return Vec::new();
    }
    let parent = rustix::process::getppid().map_or(0, |pid| pid.as_raw_nonzero().get());
    let words = fs::read(format!("/proc/{parent}/cmdline")).unwrap_or_default();
    let own = persistent_directory(&words);
    let directories = std::iter::once(bundle).chain(own);
    directories.map(|directory| directory.join(NAME)).collect()
}

/// The directory that podman 5 names, from the contents of `/proc/PID/cmdline`.
fn persistent_directory(words: &[u8]) -> Option<&Path> {
    let mut words = words.split(|byte| *byte == 0);
    words.find(|word| *word == DIRECTORY)?;
    let directory = words.next().filter(|word| word.starts_with(b"/"))?;
    Some(Path::new(OsStr::from_bytes(directory)))
}

/// Creates the files. Without them podman only does not know why the container ended.
pub(crate) fn create(files: &[PathBuf]) {
    for file in files {
        if let Err(error) = fs::write(file, "") {
            log::warn!("{}: {error}", file.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn only_podman_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let of = |manager: &str| {
            let annotations = json!({"io.container.manager": manager});
            let config = json!({"ociVersion": "1.2.0", "annotations": annotations});
            fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
            files(&Spec::read(dir.path()).unwrap(), dir.path())
        };
        assert!(of("other").is_empty());
        let files = of("libpod");
        assert_eq!(files[0], dir.path().join("oom"));
        create(&files[..1]);
        assert!(files[0].exists());
    }

    #[test]
    fn podman_5_names_a_directory_of_its_own() {
        let of = |words: &[&str]| {
            let words = words.join("\0");
            persistent_directory(words.as_bytes()).map(Path::to_owned)
        };
        let words = ["conmon", "-b", "/b", "--persist-dir", "/p/ID", "--exit-dir"];
        assert_eq!(of(&words), Some("/p/ID".into()));
        assert_eq!(of(&words[..3]), None);
        assert_eq!(of(&["conmon", "--persist-dir"]), None);
    }
}
