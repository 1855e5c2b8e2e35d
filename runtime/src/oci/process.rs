//! Processes: a container's first one, and those that are added.

use super::from_config::absolute;
use crate::account::{Account, Accounts};
use crate::{Error, ProcessConfig, Stdio};
use koya_protocol::cpus;
use oci_spec::runtime::{LinuxCapabilities, Process, User};
use std::path::Path;

/// Where programs are looked for by a process whose environment has no PATH. One of an OCI configuration has none then.
pub const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A process of `own`'s container: what it may is as that one's, what it is as this configuration says.
///
/// # Errors
/// What is wrong with it, by name.
pub(crate) fn like(
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
    // The user's own group is one of them: a program that changes its group stays in it, and is not let in where
    // a file's mode shuts that group out (CVE-2022-36109).
    let primary = std::iter::once(account.gid);
    user.set_additional_gids(Some(primary.chain(account.groups).collect()));
    let mut process = own.clone();
    process.set_terminal(Some(is_terminal));
    process.set_user(user);
    process.set_args(Some(config.args.clone()));
    process.set_env(Some(env));
    process.set_cwd(absolute("workdir", cwd)?.into());
    let own = own.capabilities().as_ref();
    process.set_capabilities(own.map(|own| capabilities_of(own, account.uid)));
    adapt(&mut process, accounts)?;
    Ok(process)
}

/// A user other than root has what programs give it, not what the container may have.
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

/// One that is empty is none, as for runc.
fn set_home(env: &mut Vec<String>, home: impl FnOnce() -> String) {
    let last = env.iter().rev().find_map(|var| var.strip_prefix("HOME="));
    if last.is_none_or(str::is_empty) {
        env.retain(|variable| !variable.starts_with("HOME="));
        env.push(format!("HOME={}", home()));
    }
}

/// What no process can have, and the guest would stumble over.
fn check_words(process: &Process) -> Result<(), Error> {
    let env = process.env().iter().flatten();
    if let Some(nameless) = env.clone().find(|variable| variable.starts_with('=')) {
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

/// The CPUs are the guest's, which finds out which of them there are.
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

/// What a process has beyond what is said, and what is not the guest's of it.
///
/// # Errors
/// A process without a program, or with words that none can have.
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
    // Without HOME libcontainer would ask the C library, which would load code of the container.
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
