//! Linux security modules of the host: AppArmor and SELinux.

use std::fs;
use std::path::{Path, PathBuf};

/// The name of AppArmor for no profile.
pub const UNCONFINED: &str = "unconfined";

/// Whether the host has an SELinux policy, enforcing or permissive.
pub fn has_selinux() -> bool {
    Path::new("/sys/fs/selinux/enforce").exists()
}

/// Whether the kernel has AppArmor enabled.
pub fn has_apparmor() -> bool {
    let enabled = fs::read_to_string("/sys/module/apparmor/parameters/enabled");
    enabled.is_ok_and(|text| text.trim() == "Y")
}

/// The file by which the calling thread reads and changes its AppArmor profile: AppArmor's own since Linux 5.8, before that
/// the one shared by security modules.
pub fn apparmor_file() -> PathBuf {
    let thread = Path::new("/proc/thread-self/attr");
    let own = thread.join("apparmor/current");
    match own.exists() {
        true => own,
        false => thread.join("current"),
    }
}

/// Whether an AppArmor profile confines the calling thread.
pub fn is_confined_by_apparmor() -> bool {
    has_apparmor() && fs::read_to_string(apparmor_file()).is_ok_and(|profile| confines(&profile))
}

/// Whether this profile, as the kernel writes it, confines a process. Profiles with the flag `unconfined` do not.
fn confines(profile: &str) -> bool {
    let profile = profile.trim_end_matches(['\n', '\0']);
    !profile.is_empty() && profile != UNCONFINED && !profile.ends_with("(unconfined)")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_profile_confines_unless_it_says_that_it_does_not() {
        for confined in [
            "docker-default (enforce)\n",
            "snap.docker.dockerd (complain)",
        ] {
            assert!(confines(confined), "{confined}");
        }
        for free in ["unconfined\n", "", "runc (unconfined)\n", "unconfined\0"] {
            assert!(!confines(free), "{free}");
        }
    }
}
