//! The privileges that a program keeps while its sandbox runs.
//!
//! A program gives up the others once it has entered its namespaces, while it has one thread: capabilities and
//! `no_new_privs` are per thread, and threads inherit them. Libraries must leave it to the program. Threads that serve the
//! guest keep less than that ([`walls`]).

use crate::security_modules::is_confined_by_apparmor;
use crate::walls;
use rustix::io::Errno;
use rustix::thread::{
    CapabilitySet, capabilities, remove_capability_from_bounding_set, set_no_new_privs,
};
use std::io;

/// A program that holds a sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// `koya run` without a network.
    Run,
    /// `koya run` with a network.
    RunWithNetwork,
    /// A runtime of engines: containerd's shim, and the long-lived process of `koya-runtime`.
    Runtime,
}

/// A capability, and the programs that keep it.
struct Kept {
    /// The name without `CAP_`.
    #[cfg_attr(not(test), allow(dead_code))]
    name: &'static str,
    capability: CapabilitySet,
    programs: &'static [Program],
    /// The requests that need it, for readers of the table.
    #[cfg_attr(not(test), allow(dead_code))]
    reason: &'static str,
}

const ALL: &[Program] = &[Program::Run, Program::RunWithNetwork, Program::Runtime];
const WITH_NETWORKS: &[Program] = &[Program::RunWithNetwork, Program::Runtime];
const RUNTIMES: &[Program] = &[Program::Runtime];

/// Everything that a running sandbox may still ask of the host. `docs/security.md` has the same table.
const KEPT: &[Kept] = &[
    Kept {
        name: "CHOWN",
        capability: CapabilitySet::CHOWN,
        programs: ALL,
        reason: "owners of shared files and of files in images",
    },
    Kept {
        name: "DAC_OVERRIDE",
        capability: CapabilitySet::DAC_OVERRIDE,
        programs: ALL,
        reason: "files of any owner: shares, images, disks attached later, control groups",
    },
    Kept {
        name: "FOWNER",
        capability: CapabilitySet::FOWNER,
        programs: ALL,
        reason: "modes, times and attributes of files of any owner",
    },
    Kept {
        name: "FSETID",
        capability: CapabilitySet::FSETID,
        programs: ALL,
        reason: "set-group-ID bits that a change of a shared file keeps",
    },
    Kept {
        name: "MKNOD",
        capability: CapabilitySet::MKNOD,
        programs: ALL,
        reason: "device nodes in shares and images",
    },
    Kept {
        name: "SETFCAP",
        capability: CapabilitySet::SETFCAP,
        programs: ALL,
        reason: "file capabilities, removed from shared files that the guest changes",
    },
    Kept {
        name: "SYS_CHROOT",
        capability: CapabilitySet::SYS_CHROOT,
        programs: ALL,
        reason: "the root directory of `koya-starter` and `koya-fs`; a container's root for tools of the host",
    },
    Kept {
        name: "SYS_ADMIN",
        capability: CapabilitySet::SYS_ADMIN,
        programs: ALL,
        reason: "detached mounts of shares; mounts of root file systems and overlays, the mount namespace for tools of the \
                 host, network namespaces, the BPF program of a pod's loopback",
    },
    Kept {
        name: "NET_ADMIN",
        capability: CapabilitySet::NET_ADMIN,
        programs: WITH_NETWORKS,
        reason: "taps, addresses, routes, redirections, and their end",
    },
    Kept {
        name: "NET_BIND_SERVICE",
        capability: CapabilitySet::NET_BIND_SERVICE,
        programs: WITH_NETWORKS,
        reason: "ports below 1024 in the sandbox's network namespace: published ports, Docker's name server",
    },
    Kept {
        name: "KILL",
        capability: CapabilitySet::KILL,
        programs: RUNTIMES,
        reason: "the end of hooks and loggers that have become another user",
    },
];

impl Program {
    /// The capabilities that it keeps if it has them.
    pub fn capabilities(self) -> CapabilitySet {
        let kept = KEPT.iter().filter(|kept| kept.programs.contains(&self));
        kept.fold(CapabilitySet::empty(), |all, kept| all | kept.capability)
    }
}

/// Gives up all privileges of this thread, and of those that it creates, that the program does not need: the capabilities
/// that are not on its list, also for programs that it executes, and set-user-ID bits of these (`no_new_privs`).
///
/// A runtime that AppArmor confines does without `no_new_privs`: the kernel would no longer let its threads change to a
/// container's profile.
///
/// # Errors
/// The error from the kernel. Some privileges may be left.
pub fn limit_privileges(program: Program) -> io::Result<()> {
    let kept = program.capabilities();
    reduce_bounding_set(kept)?;
    walls::keep_capabilities(kept)?;
    if program != Program::Runtime || !is_confined_by_apparmor() {
        set_no_new_privs(true)?;
    }
    Ok(())
}

/// Removes all other capabilities from the bounding set of this thread, which limits the programs that it executes.
fn reduce_bounding_set(kept: CapabilitySet) -> io::Result<()> {
    // Without the privilege, programs get no more than this thread has, by `no_new_privs`.
    if !capabilities(None)?
        .effective
        .contains(CapabilitySet::SETPCAP)
    {
        return Ok(());
    }
    let all = (0..u64::BITS).map(|number| CapabilitySet::from_bits_retain(1 << number));
    for capability in all.filter(|capability| !kept.contains(*capability)) {
        match remove_capability_from_bounding_set(capability) {
            Ok(()) => {}
            // The kernel has no more.
            Err(Errno::INVAL) => break,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::walls::Filter;
    use std::collections::BTreeMap;
    use std::fs;
    use std::process::Command;
    use std::thread;

    /// The fields of a `status` file about privileges.
    fn fields(status: &str) -> BTreeMap<String, u64> {
        let fields = status.lines().filter_map(|line| line.split_once(':'));
        let wanted = fields.filter(|(name, _)| name.starts_with("Cap") || *name == "NoNewPrivs");
        wanted
            .map(|(name, value)| {
                (
                    name.to_owned(),
                    u64::from_str_radix(value.trim(), 16).unwrap(),
                )
            })
            .collect()
    }

    fn own() -> BTreeMap<String, u64> {
        fields(&fs::read_to_string("/proc/thread-self/status").unwrap())
    }

    #[test]
    fn programs_keep_what_their_device_threads_need() {
        for program in ALL {
            let kept = program.capabilities();
            for filter in Filter::ALL {
                assert!(
                    kept.contains(filter.capabilities()),
                    "{program:?} {filter:?}"
                );
            }
            assert!(kept.contains(CapabilitySet::SYS_CHROOT), "{program:?}");
            for never in [
                CapabilitySet::SYS_MODULE,
                CapabilitySet::SYS_RAWIO,
                CapabilitySet::SYS_PTRACE,
                CapabilitySet::SYS_BOOT,
                CapabilitySet::DAC_READ_SEARCH,
                CapabilitySet::SETUID,
                CapabilitySet::SETPCAP,
            ] {
                assert!(!kept.intersects(never), "{program:?} {never:?}");
            }
        }
    }

    #[test]
    fn what_is_kept_is_documented() {
        let docs = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/security.md");
        let docs = fs::read_to_string(docs).unwrap();
        let mut table = String::from(
            "| capability | `koya run` | with a network | runtimes | needed for |\n|---|---|---|---|---|\n",
        );
        for kept in KEPT {
            let cells = ALL
                .iter()
                .map(|program| match kept.programs.contains(program) {
                    true => "kept",
                    false => "",
                });
            let cells = cells.collect::<Vec<_>>().join(" | ");
            table += &format!("| {} | {cells} | {} |\n", kept.name, kept.reason);
        }
        println!("{table}");
        assert!(docs.contains(&table), "docs/security.md has another table");
    }

    #[test]
    fn threads_and_programs_inherit_the_limit() {
        let before = own();
        for program in ALL {
            let kept = program.capabilities().bits();
            let of_others = thread::spawn(move || {
                limit_privileges(*program).unwrap();
                let child = thread::spawn(own).join().unwrap();
                let executed = Command::new("cat").arg("/proc/self/status").output();
                let executed = String::from_utf8(executed.unwrap().stdout).unwrap();
                [own(), child, fields(&executed)]
            });
            for after in of_others.join().unwrap() {
                for set in ["CapEff", "CapPrm"] {
                    assert_eq!(after[set], before[set] & kept, "{program:?} {set}");
                }
                assert_eq!((after["CapInh"], after["CapAmb"]), (0, 0), "{program:?}");
                let may_reduce = before["CapEff"] & CapabilitySet::SETPCAP.bits() != 0;
                let bounds = match may_reduce {
                    true => before["CapBnd"] & kept,
                    false => before["CapBnd"],
                };
                assert_eq!(after["CapBnd"], bounds, "{program:?}");
                let is_exempt = *program == Program::Runtime && is_confined_by_apparmor();
                assert_eq!(after["NoNewPrivs"], u64::from(!is_exempt), "{program:?}");
            }
        }
        assert_eq!(own(), before, "other threads are not affected");
    }
}
