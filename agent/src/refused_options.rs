//! Options that a file system of a container refuses. libcontainer's error names neither the mount nor the option.

use crate::volumes::is_of_mount;
use koya_protocol::ErrorReason;
use oci_spec::runtime::{Mount, Spec};
use rustix::fd::{AsFd as _, OwnedFd};
use rustix::mount::{FsOpenFlags, fsconfig_set_flag, fsconfig_set_string, fsopen};

/// File systems that need no source.
const KINDS: [&str; 5] = ["tmpfs", "proc", "sysfs", "devpts", "mqueue"];

/// Options that libcontainer does not pass to the file system, besides those of mounts.
const OTHERS: [&str; 10] = [
    "bind",
    "rbind",
    "tmpcopyup",
    "iversion",
    "noiversion",
    "symfollow",
    "nosymfollow",
    "nostrictatime",
    "loud",
    "silent",
];

/// The first refused option of the mounts of a configuration.
pub(crate) fn find(spec: &Spec) -> Option<ErrorReason> {
    let reason = spec.mounts().iter().flatten().find_map(refused)?;
    Some(ErrorReason::Invalid(format!("mounts: {reason}")))
}

fn refused(mount: &Mount) -> Option<String> {
    let kind = mount.typ().as_deref().filter(|kind| KINDS.contains(kind))?;
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC).ok()?;
    let given = mount.options().iter().flatten();
    let own = given
        .flat_map(|options| options.split(','))
        .filter(|option| !is_of_mount(option) && !OTHERS.contains(option));
    let mut failed = own.filter_map(|option| Some((option, set(&context, option).err()?)));
    let (option, error) = failed.next()?;
    let at = mount.destination().display();
    Some(format!(
        "{at}: {kind} does not accept the option {option:?}: {error}"
    ))
}

fn set(context: &OwnedFd, option: &str) -> rustix::io::Result<()> {
    match option.split_once('=') {
        Some((key, value)) => fsconfig_set_string(context.as_fd(), key, value),
        None => fsconfig_set_flag(context.as_fd(), option),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_option_and_the_mount_are_named() {
        if fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).is_err() {
            // Without root.
            return;
        }
        let spec = |options: &[&str]| -> Spec {
            let good = serde_json::json!({"destination": "/run", "type": "tmpfs", "source": "t",
                "options": ["ro", "rprivate", "size=1m,nr_inodes=5", "noatime", "tmpcopyup"]});
            let other = serde_json::json!({"destination": "/x", "type": "tmpfs", "source": "t",
                "options": options});
            let process = serde_json::json!({"cwd": "/", "user": {"uid": 0, "gid": 0}});
            let text = serde_json::json!({"ociVersion": "1.0.2", "process": process,
                "mounts": [good, other]});
            serde_json::from_value(text).unwrap()
        };
        assert_eq!(find(&spec(&["mode=700", "uid=5"])), None);
        for option in ["bogus", "mode=999", "size=lots"] {
            let named = find(&spec(&["nosuid", option])).map(|reason| reason.to_string());
            let named = named.unwrap_or_default();
            let expected = format!("/x: tmpfs does not accept the option {option:?}");
            assert!(named.contains(&expected), "{named}");
        }
    }
}
