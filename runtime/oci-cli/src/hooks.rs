//! Hooks that are programs of the host: run one after the other, with the container's state on standard input.

use crate::console::spawn;
use anyhow::{Context, Result, bail};
use koya::oci_spec::runtime::{Hook, State};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::mpsc::channel;
use std::time::Duration;

/// A hook that says no time may take long, and not for ever.
const LIMIT: Duration = Duration::from_secs(600);

/// Runs all of a kind: `prestart`, say.
///
/// # Errors
/// Which one failed, in runc's words, and what it said. Those after it are not run.
pub(crate) fn run(kind: &str, hooks: &[Hook], state: &State) -> Result<()> {
    let state = serde_json::to_vec(state)?;
    for (index, hook) in hooks.iter().enumerate() {
        let name = || {
            format!(
                "error running {kind} hook #{index}: {}",
                hook.path().display()
            )
        };
        run_one(hook, &state).with_context(name)?;
    }
    Ok(())
}

fn run_one(hook: &Hook, state: &[u8]) -> Result<()> {
    let mut command = Command::new(hook.path());
    if let Some((name, args)) = hook.args().as_ref().and_then(|args| args.split_first()) {
        command.arg0(name).args(args);
    }
    if let Some(env) = hook.env() {
        let pairs = env.iter().filter_map(|pair| pair.split_once('='));
        command.env_clear().envs(pairs);
    }
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let pid = Pid::from_raw(child.id() as i32).context("a process has a pid")?;
    let process = pidfd_open(pid, PidfdFlags::empty())?;
    if let Some(mut stdin) = child.stdin.take() {
        // One that does not read it may end before.
        stdin.write_all(state).ok();
    }
    let (sender, ended) = channel();
    spawn("koya-hook", move || {
        sender.send(child.wait_with_output()).ok();
    })?;
    let seconds = hook
        .timeout()
        .and_then(|seconds| u64::try_from(seconds).ok());
    let limit = seconds.map_or(LIMIT, Duration::from_secs);
    let Ok(output) = ended.recv_timeout(limit) else {
        pidfd_send_signal(&process, Signal::KILL).ok();
        bail!("it took longer than {limit:?}");
    };
    let output = output?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{}, stderr: {}", output.status, said.trim_end());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn hook(script: &str, timeout: Option<i64>) -> Vec<Hook> {
        let hook = json!({"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["A=b"], "timeout": timeout});
        serde_json::from_value(json!([hook])).unwrap()
    }

    fn state() -> State {
        let state = json!({"ociVersion": "1.0.2", "id": "c", "status": "creating", "pid": 7, "bundle": "/b"});
        serde_json::from_value(state).unwrap()
    }

    #[test]
    fn a_hook_gets_state_and_environment() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("state");
        let script = format!(
            "cat > {0}; echo $A >> {0}; echo \"$HOME\" >> {0}",
            file.display()
        );
        run("prestart", &hook(&script, None), &state()).unwrap();
        let text = std::fs::read_to_string(file).unwrap();
        let (told, rest) = text.split_once('}').unwrap();
        let told: serde_json::Value = serde_json::from_str(&format!("{told}}}")).unwrap();
        assert_eq!((&told["id"], &told["pid"]), (&json!("c"), &json!(7)));
        assert_eq!((told["status"].as_str(), rest), (Some("creating"), "b\n\n"));
    }

    #[test]
    fn one_that_fails_or_takes_too_long_is_named() {
        let said = |script, timeout| {
            let error = run("prestart", &hook(script, timeout), &state()).unwrap_err();
            format!("{error:#}")
        };
        let failed = said("echo no >&2; exit 3", None);
        assert!(
            failed.contains("error running prestart hook #0: /bin/sh: ")
                && failed.ends_with("exit status: 3, stderr: no"),
            "{failed}"
        );
        assert!(said("sleep 60", Some(1)).ends_with("longer than 1s"));
        assert!(run("x", &[], &state()).is_ok());
    }
}
