//! Programs of OCI hooks, on the host or in the container.
//! (`https://github.com/opencontainers/runtime-spec/blob/v1.2.0/config.md#posix-platform-hooks`)

use oci_spec::runtime::Hook;
use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::time::Duration;

/// A hook's program, and its timeout, in whole seconds from 1. Without `env` it has the environment of
/// this process, as in runc and crun.
///
/// # Errors
/// If its path is not absolute, or its timeout is not positive.
pub fn program(hook: &Hook) -> Result<(Command, Option<Duration>), String> {
    if !hook.path().is_absolute() {
        return Err("its path is not absolute".into());
    }
    let limit = match hook.timeout() {
        None => None,
        Some(seconds) => match u64::try_from(seconds) {
            Ok(seconds @ 1..) => Some(Duration::from_secs(seconds)),
            _ => return Err(format!("a timeout of {seconds} s")),
        },
    };
    let mut command = Command::new(hook.path());
    if let Some([name, args @ ..]) = hook.args().as_deref() {
        command.arg0(name).args(args);
    }
    if let Some(env) = hook.env() {
        let pairs = env.iter().filter_map(|pair| pair.split_once('='));
        command.env_clear().envs(pairs);
    }
    Ok((command, limit))
}

/// Checks hooks of a kind before any of them is run.
///
/// # Errors
/// The first invalid one, as [`failure`], and why.
pub fn check(kind: &str, hooks: &[Hook]) -> Result<(), String> {
    for (index, hook) in hooks.iter().enumerate() {
        program(hook).map_err(|why| format!("{}: {why}", failure(kind, index, hook)))?;
    }
    Ok(())
}

/// The beginning of the error message of a failed hook. Callers match this wording, which is runc's.
pub fn failure(kind: &str, index: usize, hook: &Hook) -> String {
    format!(
        "error running {kind} hook #{index}: {}",
        hook.path().display()
    )
}
