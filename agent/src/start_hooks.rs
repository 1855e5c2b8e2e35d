//! startContainer hooks: programs of the container that run before its own program, in the same process.
//!
//! libcontainer would run them at the same point, but does not report which one failed.

use anyhow::{Context, Result, bail};
use koya_protocol::hook;
use oci_spec::runtime::{ContainerState, Hook, Spec, State};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{ErrorKind, Write as _};
use std::path::Path;
use std::process::{Child, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// File beside a bundle's configuration.
const NAME: &str = "start-hooks.json";

/// Polling interval for a hook with a timeout.
const LOOK: Duration = Duration::from_millis(5);

/// The hooks of a container, with the state for their standard input.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct StartHooks {
    hooks: Vec<Hook>,
    state: State,
}

impl StartHooks {
    /// Removes them from a container's configuration, if it has any.
    pub(crate) fn take(spec: &mut Spec, id: &str, bundle: &Path) -> Option<Self> {
        let mut all = spec.hooks().clone()?;
        let hooks = all.start_container().clone()?;
        if hooks.is_empty() {
            return None;
        }
        all.set_start_container(None);
        spec.set_hooks(Some(all));
        let mut state = State::default();
        state
            .set_version(spec.version().clone())
            .set_id(id.into())
            .set_status(ContainerState::Created)
            .set_bundle(bundle.into())
            .set_annotations(spec.annotations().clone());
        Some(Self { hooks, state })
    }

    /// Stores them for the process that will run them.
    pub(crate) fn save(&self, bundle: &Path) -> Result<()> {
        Ok(std::fs::write(
            bundle.join(NAME),
            serde_json::to_vec(self)?,
        )?)
    }

    /// The hooks stored in a bundle, if any.
    pub(crate) fn load(bundle: &Path) -> Result<Option<Self>> {
        match File::open(bundle.join(NAME)) {
            Ok(file) => Ok(Some(serde_json::from_reader(file)?)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Runs them one after the other. Hooks without an environment inherit that of this process.
    ///
    /// # Errors
    /// The hook that fails, with its number and path.
    pub(crate) fn run(&self) -> Result<()> {
        let mut state = self.state.clone();
        state.set_pid(i32::try_from(std::process::id()).ok());
        let state = serde_json::to_vec(&state)?;
        for (index, hook) in self.hooks.iter().enumerate() {
            let name = || hook::failure("startContainer", index, hook);
            run_one(hook, &state).with_context(name)?;
        }
        Ok(())
    }
}

fn run_one(hook: &Hook, state: &[u8]) -> Result<()> {
    let (mut command, limit) = hook::program(hook).map_err(anyhow::Error::msg)?;
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()?;
    let mut input = child.stdin.take().context("it has no standard input")?;
    // A hook need not read it.
    match input.write_all(state) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            child.kill().ok();
            child.wait().ok();
            return Err(error.into());
        }
        _ => drop(input),
    }
    let status = match limit {
        None => child.wait()?,
        Some(limit) => within(&mut child, limit)?,
    };
    match status.success() {
        true => Ok(()),
        false => bail!("{status}"),
    }
}

fn within(child: &mut Child, limit: Duration) -> Result<ExitStatus> {
    let begun = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if begun.elapsed() >= limit {
            child.kill()?;
            child.wait()?;
            bail!("it did not end within {} s", limit.as_secs());
        }
        std::thread::sleep(LOOK);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn hooks(list: Value) -> Option<StartHooks> {
        let spec = json!({"ociVersion": "1.2.0", "annotations": {"a": "b"}, "hooks": {"startContainer": list}});
        let mut spec = serde_json::from_value(spec).unwrap();
        let taken = StartHooks::take(&mut spec, "c", Path::new("/bundle"));
        let left = spec
            .hooks()
            .as_ref()
            .and_then(|h| h.start_container().clone());
        assert!(left.is_none_or(|left| left.is_empty()));
        taken
    }

    #[test]
    fn a_hook_that_fails_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let first = format!("cat > {}; echo $0 $A >> {0}", out.display());
        let all = hooks(json!([
            {"path": "/bin/sh", "args": ["sh", "-c", first, "name"], "env": ["A=b"]},
            {"path": "/bin/false"},
        ]));
        let all = all.unwrap();
        all.save(dir.path()).unwrap();
        let kept = StartHooks::load(dir.path()).unwrap().unwrap();
        assert_eq!(kept, all);
        let error = format!("{:#}", kept.run().unwrap_err());
        assert!(
            error.starts_with("error running startContainer hook #1: /bin/false: exit status: 1"),
            "{error}"
        );
        let text = std::fs::read_to_string(out).unwrap();
        let (state, words) = text.split_at(text.rfind('}').unwrap() + 1);
        assert_eq!(words, "name b\n");
        let state: Value = serde_json::from_str(state).unwrap();
        assert_eq!(
            (&state["id"], &state["status"]),
            (&"c".into(), &"created".into())
        );
        assert_eq!(state["pid"], std::process::id());
        assert_eq!(state["annotations"]["a"], "b");
    }

    #[test]
    fn a_hook_ends_within_its_timeout() {
        let slow = json!([{"path": "/bin/sleep", "args": ["sleep", "60"], "timeout": 1}]);
        let error = format!("{:#}", hooks(slow).unwrap().run().unwrap_err());
        assert!(error.ends_with("it did not end within 1 s"), "{error}");
        let quick = json!([{"path": "/bin/true", "timeout": 60}]);
        hooks(quick).unwrap().run().unwrap();
        let zero = json!([{"path": "/bin/true", "timeout": 0}]);
        assert!(hooks(zero).unwrap().run().is_err());
    }

    #[test]
    fn most_containers_have_none() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(StartHooks::load(dir.path()).unwrap(), None);
        assert_eq!(hooks(json!([])), None);
    }
}
