//! A pod as created by the kubelet, and its containers.

use crate::daemon::{Containerd, IMAGE};
use crate::tool::until;
use anyhow::{Result, ensure};
use koya_test_cri::{Cri, v1};
use std::fs;
use std::path::PathBuf;

/// A pod, with its client.
pub(crate) struct Pod<'a> {
    cri: &'a Cri,
    pub(crate) id: String,
    config: v1::PodSandboxConfig,
    logs: PathBuf,
}

impl<'a> Pod<'a> {
    pub(crate) fn start(
        cri: &'a Cri,
        containerd: &Containerd,
        name: &str,
        change: impl FnOnce(&mut v1::PodSandboxConfig),
    ) -> Result<Self> {
        Self::start_by("koya", cri, containerd, name, change)
    }

    /// With another handler, as named by a RuntimeClass.
    pub(crate) fn start_by(
        handler: &str,
        cri: &'a Cri,
        containerd: &Containerd,
        name: &str,
        change: impl FnOnce(&mut v1::PodSandboxConfig),
    ) -> Result<Self> {
        let logs = containerd.dir.join(format!("logs-{name}"));
        fs::create_dir_all(&logs)?;
        let mut config = v1::PodSandboxConfig {
            metadata: Some(v1::PodSandboxMetadata {
                name: name.into(),
                uid: format!("uid-{name}"),
                namespace: "default".into(),
                attempt: 0,
            }),
            hostname: name.into(),
            log_directory: logs.to_string_lossy().into_owned(),
            linux: Some(v1::LinuxPodSandboxConfig {
                cgroup_parent: format!("/{}", containerd.group),
                security_context: Some(v1::LinuxSandboxSecurityContext {
                    namespace_options: Some(own_pids()),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        change(&mut config);
        Ok(Self {
            id: cri.run_pod(&config, handler)?,
            cri,
            config,
            logs,
        })
    }

    /// The same pod, with a client of the restarted containerd.
    pub(crate) fn by(self, cri: &Cri) -> Pod<'_> {
        Pod {
            cri,
            id: self.id,
            config: self.config,
            logs: self.logs,
        }
    }

    /// Creates and starts a container, with a configuration like the kubelet's.
    pub(crate) fn run(
        &self,
        name: &str,
        command: &[&str],
        change: impl FnOnce(&mut v1::ContainerConfig),
    ) -> Result<String> {
        let mut config = v1::ContainerConfig {
            metadata: Some(v1::ContainerMetadata {
                name: name.into(),
                attempt: 0,
            }),
            image: Some(v1::ImageSpec {
                image: IMAGE.into(),
                ..Default::default()
            }),
            command: command.iter().map(|word| (*word).into()).collect(),
            log_path: format!("{name}.log"),
            linux: Some(v1::LinuxContainerConfig {
                security_context: Some(v1::LinuxContainerSecurityContext {
                    namespace_options: Some(own_pids()),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        change(&mut config);
        let id = self.cri.create(&self.id, &self.config, config)?;
        self.cri.start(&id)?;
        Ok(id)
    }

    /// Log of a container, in the kubelet's format without time, stream and tag.
    pub(crate) fn log(&self, name: &str) -> Result<String> {
        let text = fs::read_to_string(self.logs.join(format!("{name}.log")))?;
        let lines = text
            .lines()
            .map(|line| line.splitn(4, ' ').nth(3).unwrap_or(line));
        Ok(lines.collect::<Vec<_>>().join("\n"))
    }

    pub(crate) fn wait_for_end(&self, container: &str) -> Result<v1::ContainerStatus> {
        until("its end", || {
            let status = self.cri.status(container)?;
            let has_ended = status.state() == v1::ContainerState::ContainerExited;
            Ok(has_ended.then_some(status))
        })
    }

    /// Output of a command that must succeed.
    pub(crate) fn exec(&self, container: &str, script: &str) -> Result<String> {
        let out = self.cri.exec_sync(container, &["sh", "-c", script])?;
        let stdout = String::from_utf8_lossy(&out.stdout).trim_end().to_owned();
        let stderr = String::from_utf8_lossy(&out.stderr).into_owned();
        ensure!(out.exit_code == 0, "{}: {stdout} {stderr}", out.exit_code);
        Ok(stdout)
    }

    pub(crate) fn remove(self) -> Result<()> {
        self.cri.remove_pod(&self.id)
    }
}

/// Namespace options for unshared processes.
fn own_pids() -> v1::NamespaceOption {
    v1::NamespaceOption {
        pid: v1::NamespaceMode::Container as i32,
        ..Default::default()
    }
}

/// The Linux section of a container's configuration.
pub(crate) fn linux(config: &mut v1::ContainerConfig) -> &mut v1::LinuxContainerConfig {
    config.linux.get_or_insert_default()
}
