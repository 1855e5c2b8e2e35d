//! Files of control groups by their names (`linux.resources.unified`).

use crate::Error;
use oci_spec::runtime::LinuxResources;

/// Controllers of version 2 (Linux, admin-guide/cgroup-v2), and `cgroup` for the files of every group.
const CONTROLLERS: [&str; 11] = [
    "cgroup",
    "cpu",
    "cpuset",
    "dmem",
    "hugetlb",
    "io",
    "memory",
    "misc",
    "perf_event",
    "pids",
    "rdma",
];

/// Checks the names. Whether a controller has such a file is known to the guest, or the host, alone.
///
/// # Errors
/// The name that can't be that of a file. The wording is runc's for slashes, otherwise crun's.
pub(super) fn check(resources: &LinuxResources) -> Result<(), Error> {
    let files = resources.unified().iter().flatten();
    for (file, _) in files {
        let reason = match (file.contains('/'), file.split_once('.')) {
            (true, _) => format!("unified resource {file:?} must be a file name (no slashes)"),
            (false, Some((controller, name))) if !controller.is_empty() && !name.is_empty() => {
                if CONTROLLERS.contains(&controller) {
                    continue;
                }
                format!("{file}: the requested cgroup controller `{controller}` is not available")
            }
            (false, _) => {
                format!("the specified key has not the form CONTROLLER.VALUE `{file}`")
            }
        };
        return Err(Error::invalid("linux.resources.unified", reason));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn names_are_those_of_files_of_controllers() {
        let said = |file: &str| {
            let resources = json!({"unified": {file: "1"}});
            let resources = serde_json::from_value(resources).unwrap();
            check(&resources).map_err(|error| error.to_string())
        };
        for file in ["memory.high", "cgroup.freeze", "hugetlb.2MB.max"] {
            assert_eq!(said(file), Ok(()), "{file}");
        }
        for (file, expected) in [
            ("../memory.max", "must be a file name (no slashes)"),
            ("..", "has not the form CONTROLLER.VALUE `..`"),
            (
                "KEY",
                "the specified key has not the form CONTROLLER.VALUE `KEY`",
            ),
            (
                "foo.bar",
                "the requested cgroup controller `foo` is not available",
            ),
        ] {
            let said = said(file).unwrap_err();
            assert!(said.contains(expected), "{said}");
        }
    }
}
