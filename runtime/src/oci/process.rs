//! Processes: a container's first one, and those that are added.

use super::from_config::absolute;
use crate::account::{Account, Accounts};
use crate::{Error, ProcessConfig, Stdio};
use oci_spec::runtime::{LinuxCapabilities, Process, User};
use std::path::Path;

const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

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
    if !has(&env, "HOME=") {
        env.push(format!("HOME={}", account.home));
    }
    let cwd = config.cwd.as_deref().unwrap_or(Path::new("/"));
    let mut user = User::default();
    user.set_uid(account.uid);
    user.set_gid(account.gid);
    user.set_additional_gids(Some(account.groups));
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

fn has(env: &[String], name: &str) -> bool {
    env.iter().any(|variable| variable.starts_with(name))
}

/// What a process has beyond what is said, and what is not the guest's of it.
///
/// # Errors
/// A process without a program.
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
    let mut env = process.env().clone().unwrap_or_default();
    if !has(&env, "PATH=") {
        env.push(DEFAULT_PATH.into());
    }
    // Without HOME libcontainer would ask the C library, which would load code of the container.
    if !has(&env, "HOME=") {
        let user = process.user().uid().to_string();
        let home = Account::find(accounts, &user).map_or("/".into(), |account| account.home);
        env.push(format!("HOME={home}"));
    }
    process.set_env(Some(env));
    process.set_exec_cpu_affinity(None);
    // Labels for the host's security modules, which a guest does not have.
    process.set_apparmor_profile(None);
    process.set_selinux_label(None);
    Ok(())
}
