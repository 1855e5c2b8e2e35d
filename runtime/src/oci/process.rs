//! Processes: the first one of a container, and exec processes.

use super::paths::absolute;
use crate::account::{self, Account, Accounts};
use crate::{Error, ProcessConfig, Stdio};
use koya_protocol::cpus;
use oci_spec::runtime::{LinuxCapabilities, Process, User};
use std::path::Path;

/// Search path of programs for a process whose environment has no PATH. In an OCI configuration it is not added to the
/// environment.
pub const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A process with the privileges of `own`, a process of the same container, and the other properties of this configuration.
///
/// # Errors
/// The problem, with the offending field.
pub(crate) fn with_privileges_of(
    own: &Process,
    config: &ProcessConfig,
    accounts: &Accounts,
) -> Result<Process, Error> {
    let account = Account::find(accounts, &config.user.text)?;
    let mut env = config.env.clone();
    let is_terminal = matches!(config.stdio, Stdio::Terminal { .. });
    if is_terminal && !has(&env, "TERM=") {
        env.push("TERM=xterm".into());
    }
    if !has(&env, "PATH=") {
        env.push(format!("PATH={DEFAULT_PATH}"));
    }
    set_home(&mut env, || account.home.clone());
    let cwd = config.cwd.as_deref().unwrap_or(Path::new("/"));
    let mut user = User::default();
    user.set_uid(account.uid);
    user.set_gid(account.gid);
    // The primary group is among them: a program that changes its group stays in it, so a file mode that denies access to
    // that group still applies (CVE-2022-36109).
    let mut groups = vec![account.gid];
    groups.extend(account.groups);
    for group in &config.user.groups {
        let group = account::group_named(accounts, group)?;
        if !groups.contains(&group) {
            groups.push(group);
        }
    }
    user.set_additional_gids(Some(groups));
    let mut process = own.clone();
    process.set_terminal(Some(is_terminal));
    process.set_user(user);
    process.set_args(Some(config.args.clone()));
    process.set_env(Some(env));
    process.set_cwd(koya_rootfs::plain(Path::new(absolute("workdir", cwd)?)));
    let own = own.capabilities().as_ref();
    process.set_capabilities(own.map(|own| capabilities_of(own, account.uid)));
    adapt(&mut process, accounts)?;
    Ok(process)
}

/// A user other than root only has the capabilities of program files, not all that the container may have.
fn capabilities_of(own: &LinuxCapabilities, uid: u32) -> LinuxCapabilities {
    let all = own.bounding().clone().unwrap_or_default();
    let effective = if uid == 0 {
        all.clone()
    } else {
        Default::default()
    };
    let mut capabilities = LinuxCapabilities::default();
    capabilities.set_bounding(Some(all));
    capabilities.set_effective(Some(effective.clone()));
    capabilities.set_permitted(Some(effective));
    capabilities.set_inheritable(None);
    capabilities.set_ambient(None);
    capabilities
}

/// An empty HOME counts as unset, as for runc.
fn set_home(env: &mut Vec<String>, home: impl FnOnce() -> String) {
    let last = env.iter().rev().find_map(|var| var.strip_prefix("HOME="));
    if last.is_none_or(str::is_empty) {
        env.retain(|variable| !variable.starts_with("HOME="));
        env.push(format!("HOME={}", home()));
    }
}

/// Rejects strings that no process can have, which would cause obscure errors in the guest.
fn check_words(process: &Process) -> Result<(), Error> {
    let env = process.env().iter().flatten();
    let is_nameless = |variable: &&String| variable.is_empty() || variable.starts_with('=');
    if let Some(nameless) = env.clone().find(is_nameless) {
        let reason = format!("the variable {nameless:?} has no name");
        return Err(Error::invalid("process.env", reason));
    }
    let mut all = process.args().iter().flatten().chain(env);
    match all.find(|word| word.contains('\0')) {
        Some(word) => Err(Error::invalid(
            "process",
            format!("{word:?} has a NUL in it"),
        )),
        None => Ok(()),
    }
}

/// Affinity refers to the guest's CPUs, and the guest validates it.
fn check_affinity(process: &Process) -> Result<(), Error> {
    let Some(affinity) = process.exec_cpu_affinity() else {
        return Ok(());
    };
    let lists = [affinity.initial(), affinity.cpu_affinity_final()];
    for list in lists.into_iter().flatten() {
        cpus::parse(list).map_err(|why| Error::invalid("process.execCPUAffinity", why))?;
    }
    Ok(())
}

fn has(env: &[String], name: &str) -> bool {
    env.iter().any(|variable| variable.starts_with(name))
}

/// Adds defaults to a process, and removes properties that do not apply in the guest.
///
/// # Errors
/// A process without a program, or with invalid strings.
pub(crate) fn adapt(process: &mut Process, accounts: &Accounts) -> Result<(), Error> {
    if process
        .args()
        .iter()
        .flatten()
        .next()
        .is_none_or(String::is_empty)
    {
        return Err(Error::invalid("process.args", "no command was given"));
    }
    check_words(process)?;
    let mut env = process.env().clone().unwrap_or_default();
    // Without HOME, libcontainer would ask the C library, which would load code from the container.
    let uid = process.user().uid().to_string();
    set_home(&mut env, || {
        Account::find(accounts, &uid).map_or("/".into(), |account| account.home)
    });
    process.set_env(Some(env));
    check_affinity(process)?;
    // Labels for the host's security modules, which a guest does not have.
    process.set_apparmor_profile(None);
    process.set_selinux_label(None);
    Ok(())
}
