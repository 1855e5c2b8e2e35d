//! The virtual machine of a pod: made of what its first container says.

use crate::cgroup;
use crate::pod::{Pod, Task};
use crate::size::{bound, together};
use crate::sync::{lock, spawn};
use crate::task::Refusal;
use anyhow::{Context, Result, anyhow, bail};
use koya::vmm::guest_text;
use koya::{HostEnd, Keep, Loopback, NetworkConfig, Sandbox};
use std::sync::Arc;
use std::time::Duration;

/// How long the guest is not asked after it told of a lack of memory.
const OOM_PAUSE: Duration = Duration::from_millis(100);

impl Pod {
    /// The virtual machine, started if it is not there.
    pub(crate) fn boot(self: &Arc<Self>, task: &Task) -> Result<Arc<Sandbox>, Refusal> {
        let mut sandbox = lock(&self.sandbox);
        if let Some(sandbox) = &*sandbox {
            return match sandbox.machine().ended() {
                None => Ok(sandbox.clone()),
                Some(reason) => Err(anyhow!("the sandbox has ended: {reason}").into()),
            };
        }
        let limits = *lock(&task.limits);
        let size = together(&task.settings, &[limits]);
        let mut config = task.settings.sandbox(size, task.is_virtual());
        if task.settings.apparmor {
            config.apparmor_profile = task.spec.apparmor_profile();
        }
        if task.is_virtual() {
            // Its containers have the guest's own namespaces, which nothing else sets up.
            config.hostname = task.spec.0.hostname().clone();
            config.sysctls = task.spec.sysctls();
        }
        config.networks = interfaces()?
            .into_iter()
            .map(|interface| NetworkConfig {
                name: interface.clone(),
                ..NetworkConfig::new(HostEnd::Join { interface })
            })
            .collect();
        config.timeline = Some(Keep {
            id: task.id.clone(),
            began: None,
        });
        let started = Arc::new(Sandbox::start(&config)?);
        if self.debug {
            started.follow_console(ConsoleLog::default());
        }
        if let Some((folder, resources)) = task.spec.cgroup().zip(task.spec.resources()) {
            cgroup::apply(&folder, &cgroup::cpu(resources));
        }
        bound(task, &started, None);
        self.tell_of_ooms(started.clone())?;
        if task.is_virtual() {
            match Loopback::join(&started) {
                Ok(loopback) => *lock(&self.loopback) = Some(loopback),
                Err(error) => log::warn!("no port forward: {:#}", anyhow::Error::from(error)),
            }
        }
        *lock(&self.fitted) = Some(size);
        *sandbox = Some(started.clone());
        Ok(started)
    }

    /// Tells of containers in which the guest's kernel killed processes for their memory.
    fn tell_of_ooms(self: &Arc<Self>, sandbox: Arc<Sandbox>) -> Result<()> {
        let pod = self.clone();
        spawn("koya-oom", move || {
            // A guest that tells of ever more is not listened to all the time.
            while let Ok((id, kills)) = sandbox.next_oom() {
                std::thread::sleep(OOM_PAUSE);
                if let Ok(task) = pod.task(&id) {
                    pod.out_of_memory(&task, kills);
                }
            }
        })
    }
}

/// The interfaces of this process's network namespace, but for the loopback.
fn interfaces() -> Result<Vec<String>> {
    let text = std::fs::read_to_string("/proc/net/dev").context("cannot read /proc/net/dev")?;
    let names = text.lines().skip(2).filter_map(|line| line.split_once(':'));
    let names: Vec<String> = names.map(|(name, _)| name.trim().to_owned()).collect();
    // What the kernel makes by itself in each namespace carries nothing.
    let own = [
        "lo", "tunl0", "gre0", "gretap0", "erspan0", "ip_vti0", "ip6_vti0", "sit0", "ip6tnl0",
        "ip6gre0",
    ];
    let names: Vec<String> = names
        .into_iter()
        .filter(|n| !own.contains(&n.as_str()))
        .collect();
    if names.len() > 8 {
        bail!(
            "{} network interfaces are more than a sandbox takes",
            names.len()
        );
    }
    Ok(names)
}

/// The guest's console, line by line, in the log.
#[derive(Default)]
struct ConsoleLog(Vec<u8>);

impl std::io::Write for ConsoleLog {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        for byte in bytes {
            match byte {
                b'\n' => {
                    log::debug!("guest: {}", guest_text::line(&self.0));
                    self.0.clear();
                }
                _ if self.0.len() < 1024 => self.0.push(*byte),
                _ => {}
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
