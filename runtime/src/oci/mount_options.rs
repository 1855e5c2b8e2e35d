//! Options of mounts, in the form that libcontainer understands: it passes unknown words to the file system as its own options,
//! which are refused there.

use crate::Error;
use oci_spec::runtime::Mount;

/// Options that set or clear a mount's flags.
pub(super) const FLAGS: [&str; 20] = [
    "ro",
    "rw",
    "suid",
    "nosuid",
    "dev",
    "nodev",
    "exec",
    "noexec",
    "atime",
    "noatime",
    "diratime",
    "nodiratime",
    "relatime",
    "norelatime",
    "strictatime",
    "nostrictatime",
    "symfollow",
    "nosymfollow",
    "sync",
    "async",
];

/// Words about a whole file system that have no effect in a guest: they concern messages of the kernel, and a version of
/// inodes that no file system here has. runc sets or clears flags for them, which these file systems ignore.
const IGNORED: [&str; 5] = ["silent", "loud", "iversion", "noiversion", "nolazytime"];

/// Adapts the options of a file system that the guest mounts. Flags of the whole file system get a value: libcontainer drops
/// the plain words, but passes options with values to the file system, and the kernel looks only at their names
/// (`vfs_parse_sb_flag`).
pub(super) fn adapt_file_system(mount: &mut Mount) {
    let Some(mut options) = mount.options().clone() else {
        return;
    };
    options.retain(|option| !IGNORED.contains(&option.as_str()));
    for option in &mut options {
        if ["sync", "dirsync", "lazytime"].contains(&option.as_str()) {
            option.push_str("=on");
        }
    }
    mount.set_options(Some(options));
}

/// Options of the cgroup2 file system (Documentation/admin-guide/cgroup-v2.rst).
const CGROUP_OPTIONS: [&str; 6] = [
    "nsdelegate",
    "favordynmods",
    "memory_localevents",
    "memory_recursiveprot",
    "memory_hugetlb_accounting",
    "pids_localevents",
];

/// Other words that are options of every mount.
const COMMON_OPTIONS: [&str; 17] = [
    "acl",
    "iversion",
    "lazytime",
    "loud",
    "noacl",
    "noiversion",
    "nolazytime",
    "remount",
    "silent",
    "defaults",
    "private",
    "shared",
    "slave",
    "unbindable",
    "mand",
    "nomand",
    "dirsync",
];

/// Refuses options of a cgroup mount that its kernel would refuse: libcontainer ignores all of them.
pub(super) fn check_cgroup_options(mount: &Mount) -> Result<(), Error> {
    let is_known = |option: &str| {
        let is_common = |word: &str| FLAGS.contains(&word) || COMMON_OPTIONS.contains(&word);
        is_common(option)
            || option.strip_prefix('r').is_some_and(is_common)
            || CGROUP_OPTIONS.contains(&option)
            // Labels of SELinux, which a guest does not have.
            || option.split_once('=').is_some_and(|(name, _)| name.ends_with("context"))
    };
    let options = mount.options().iter().flatten();
    let mut words = options.flat_map(|option| option.split(','));
    match words.find(|option| !is_known(option)) {
        Some(option) => {
            let destination = mount.destination().display();
            let why = format!("Invalid argument: cgroup2 has no option {option:?}");
            Err(Error::invalid("mounts", format!("{destination}: {why}")))
        }
        None => Ok(()),
    }
}

/// Replaces these options by their recursive forms, the only ones that libcontainer supports.
pub(super) fn make_symfollow_recursive(mount: &mut Mount) {
    let Some(mut options) = mount.options().clone() else {
        return;
    };
    for option in &mut options {
        if option == "symfollow" || option == "nosymfollow" {
            option.insert(0, 'r');
        }
    }
    mount.set_options(Some(options));
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn mount(kind: &str, options: &[&str]) -> Mount {
        let mount = json!({"destination": "/x", "type": kind, "source": kind, "options": options});
        serde_json::from_value(mount).unwrap()
    }

    #[test]
    fn flags_of_a_file_system_in_memory_are_kept() {
        let of = |options: &[&str]| {
            let mut mount = mount("tmpfs", options);
            adapt_file_system(&mut mount);
            mount.options().clone().unwrap()
        };
        let kept = ["nosuid", "sync=on", "dirsync=on", "size=1m"];
        assert_eq!(of(&["nosuid", "sync", "dirsync", "size=1m"]), kept);
        let ignored = [
            "silent",
            "ro",
            "loud",
            "iversion",
            "noiversion",
            "nolazytime",
        ];
        assert_eq!(of(&ignored), ["ro"]);
    }

    #[test]
    fn options_of_control_groups_are_those_of_the_kernel() {
        let said = |kind: &str, options: &[&str]| {
            let checked = check_cgroup_options(&mount(kind, options));
            checked.map_or_else(|error| error.to_string(), |()| String::new())
        };
        for kind in ["cgroup", "cgroup2"] {
            let usual = ["rprivate", "nosuid", "noexec", "nodev", "relatime", "rw"];
            assert_eq!(said(kind, &usual), "");
            assert_eq!(said(kind, &["nsdelegate", "rro", "defaults"]), "");
            assert_eq!(said(kind, &["context=\"a:b\""]), "");
            let said = said(kind, &["ro", "invalid"]);
            assert!(
                said.contains("Invalid argument") && said.contains("\"invalid\""),
                "{said}"
            );
        }
    }
}
