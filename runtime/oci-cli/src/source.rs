//! Where a container's configuration comes from, and what the command line changes in it.

use crate::cli::{CgroupManager, CreateArgs, Globals};
use crate::state::Stored;
use anyhow::{Context, Result};
use koya_tasks::{Spec, UserMappings};
use rustix::process::getgroups;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// crun's annotation for `--group-add keep-groups` of podman, also used by distrobox. Any value but 0 is a request.
pub(crate) const KEEP_GROUPS: &str = "run.oci.keep_original_groups";

/// How a container's configuration is read.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Source {
    /// The file, if not `config.json` in the bundle.
    config: Option<PathBuf>,
    /// Whether the sandbox's process stays in the control group of its caller.
    no_cgroup: bool,
    /// The caller's adjustment of its OOM score: that of a process without one of its own, as with runc.
    #[serde(default)]
    oom_score_adj: Option<i32>,
    /// The mappings of the container whose user namespace it joins.
    #[serde(default)]
    pub(crate) users: Option<UserMappings>,
}

impl Source {
    /// # Errors
    /// If the named file does not exist.
    pub(crate) fn of(globals: &Globals, args: &CreateArgs) -> Result<Self> {
        let canonical = |file: &PathBuf| {
            let found = file.canonicalize();
            found.with_context(|| format!("cannot find the configuration {}", file.display()))
        };
        Ok(Self {
            config: args.config.as_ref().map(canonical).transpose()?,
            no_cgroup: globals.cgroup_manager == CgroupManager::Disabled,
            oom_score_adj: own_oom_score_adj(),
            users: None,
        })
    }

    /// Reads the configuration of a container with this bundle.
    ///
    /// # Errors
    /// If it is missing or invalid.
    pub(crate) fn read(&self, bundle: &Path, id: &str) -> Result<Spec> {
        let mut spec = match &self.config {
            Some(file) => Spec::read_file(file),
            None => Spec::read(bundle),
        }?;
        match self.no_cgroup {
            true => spec.drop_cgroup(),
            false => spec.default_cgroup(&format!("koya-runtime/{id}")),
        }
        if let Some(users) = &self.users {
            spec.set_user_mappings(users);
        }
        if let Some(adjustment) = self.oom_score_adj {
            spec.default_oom_score_adj(adjustment);
        }
        if keeps_groups(spec.annotation(KEEP_GROUPS)) {
            let groups = getgroups().context("cannot read the groups of this process")?;
            spec.set_groups(groups.into_iter().map(|gid| gid.as_raw()).collect());
        }
        Ok(spec)
    }
}

/// proc_pid_oom_score_adj(5).
fn own_oom_score_adj() -> Option<i32> {
    let text = std::fs::read_to_string("/proc/self/oom_score_adj").ok()?;
    text.trim().parse().ok()
}

fn keeps_groups(annotation: Option<&str>) -> bool {
    annotation.is_some_and(|value| value != "0")
}

/// The supplementary groups of processes that are added to a container, if they are not those of their own configuration.
pub(crate) fn kept_groups(stored: &Stored) -> Option<&Value> {
    let annotation = stored.annotations.get(KEEP_GROUPS).map(String::as_str);
    let groups = stored.process.pointer("/user/additionalGids");
    groups.filter(|_| keeps_groups(annotation))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use serde_json::json;
    use std::fs;

    fn read(words: &[&str], bundle: &Path) -> Result<Spec> {
        let words = ["koya-runtime"].iter().chain(words).map(Into::into);
        let cli = Cli::read(words).unwrap();
        let Command::Create(args) = &cli.command else {
            panic!("another command");
        };
        Source::of(&cli.globals, args)?.read(bundle, "c")
    }

    fn bundle(config: &Value) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        dir
    }

    #[test]
    fn a_configuration_may_be_elsewhere() {
        let own = bundle(&json!({"ociVersion": "1.2.0", "hostname": "own"}));
        let other = bundle(&json!({"ociVersion": "1.2.0", "hostname": "other"}));
        let path = other.path().join("config.json");
        let named = |words: &[&str]| {
            let spec = read(words, own.path()).unwrap();
            spec.config().hostname().clone().unwrap()
        };
        assert_eq!(named(&["create", "c"]), "own");
        let path = path.to_str().unwrap();
        assert_eq!(named(&["create", "--config", path, "c"]), "other");
        let missing = read(&["create", "-f", "/none/config.json", "c"], own.path());
        let error = missing.err().unwrap().to_string();
        assert!(error.contains("/none/config.json"), "{error}");
    }

    #[test]
    fn a_control_group_may_be_that_of_the_caller() {
        let bundle = bundle(&json!({"ociVersion": "1.2.0", "linux": {"cgroupsPath": "/own"}}));
        let group = |words: &[&str]| {
            let spec = read(&[words, &["create", "c"]].concat(), bundle.path()).unwrap();
            let linux = spec.config().linux().as_ref().unwrap();
            linux.cgroups_path().clone()
        };
        for manager in ["cgroupfs", "systemd"] {
            let group = group(&["--cgroup-manager", manager]);
            assert_eq!(group, Some("/own".into()), "{manager}");
        }
        assert_eq!(group(&[]), Some("/own".into()));
        assert_eq!(group(&["--cgroup-manager=disabled"]), None);
    }

    #[test]
    fn the_callers_oom_score_is_the_default() {
        let adjustment = |process: Value| {
            let config = json!({"ociVersion": "1.2.0", "process": process});
            let spec = read(&["create", "c"], bundle(&config).path()).unwrap();
            spec.config().process().as_ref().unwrap().oom_score_adj()
        };
        let process = json!({"cwd": "/", "args": ["sh"]});
        assert_eq!(adjustment(process.clone()), own_oom_score_adj());
        assert!(own_oom_score_adj().is_some());
        let mut own = process;
        own["oomScoreAdj"] = 77.into();
        assert_eq!(adjustment(own), Some(77));
    }

    #[test]
    fn the_callers_groups_may_be_kept() {
        let groups = |annotations: Value| {
            let user = json!({"uid": 0, "gid": 0, "additionalGids": [4_000_000]});
            let config = json!({"ociVersion": "1.2.0", "annotations": annotations,
                "process": {"cwd": "/", "args": ["sh"], "user": user}});
            let spec = read(&["create", "c"], bundle(&config).path()).unwrap();
            let process = spec.config().process().as_ref().unwrap();
            process.user().additional_gids().clone()
        };
        for none in [json!({}), json!({KEEP_GROUPS: "0"})] {
            assert_eq!(groups(none), Some(vec![4_000_000]));
        }
        let own = getgroups().unwrap().into_iter().map(|gid| gid.as_raw());
        assert_eq!(groups(json!({KEEP_GROUPS: "1"})), Some(own.collect()));
    }
}
