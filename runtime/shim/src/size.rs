//! How large a sandbox is to be, as its containers come and go.

use crate::cgroup;
use crate::pod::{Pod, Task};
use crate::sync::{lock, spawn};
use crate::task::Refusal;
use koya::oci_spec::runtime as oci;
use koya::{Sandbox, Settings, Size};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// What the agent and tables take in the guest is not the containers'.
const ROOM_MIB: u64 = 32;
/// Less than this much memory is no guest.
const LEAST_MIB: u64 = 64;

/// What a container may have: bytes of memory, and CPU time in thousandths of a CPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Limits {
    pub(crate) memory: Option<u64>,
    pub(crate) milli_cpus: Option<u64>,
}

impl Limits {
    /// As a container's configuration says, where these do not.
    pub(crate) fn or(self, resources: Option<&oci::LinuxResources>) -> Self {
        let own = || resources?.memory().as_ref()?.limit();
        let memory = self.memory.or_else(|| u64::try_from(own()?).ok());
        let cpu = resources.and_then(|resources| resources.cpu().as_ref());
        let quota = cpu.and_then(|cpu| milli_cpus(cpu.quota()?, cpu.period().unwrap_or(PERIOD)));
        Self {
            memory: memory.filter(|bytes| *bytes > 0),
            milli_cpus: self.milli_cpus.or(quota),
        }
    }
}

/// The kernel's default, in microseconds.
pub(crate) const PERIOD: u64 = 100_000;

/// Thousandths of a CPU; none without a limit.
pub(crate) fn milli_cpus(quota: i64, period: u64) -> Option<u64> {
    let quota = u64::try_from(quota).ok().filter(|quota| *quota > 0)?;
    (quota.saturating_mul(1000)).div_ceil(period.max(1)).into()
}

/// Room for all of these: as much as they may have together, and what the settings say for those without
/// a limit.
pub(crate) fn together(settings: &Settings, all: &[Limits]) -> Size {
    let (mut mib, mut milli_cpus) = (0_u64, 0_u64);
    for limits in all {
        let memory = limits.memory.map_or(0, |bytes| bytes.div_ceil(1 << 20));
        mib = mib.saturating_add(memory);
        milli_cpus = milli_cpus.saturating_add(limits.milli_cpus.unwrap_or(0));
    }
    if all.iter().any(|limits| limits.memory.is_some()) {
        mib = mib.max(LEAST_MIB).saturating_add(ROOM_MIB);
    }
    if all.iter().any(|limits| limits.memory.is_none()) {
        mib = mib.saturating_add(settings.memory_mib);
    }
    if all.iter().any(|limits| limits.milli_cpus.is_none()) {
        milli_cpus = milli_cpus.saturating_add(u64::from(settings.cpus) * 1000);
    }
    let cpus = u32::try_from(milli_cpus.div_ceil(1000)).unwrap_or(u32::MAX);
    Size {
        cpus: Some(cpus.max(1)),
        memory_mib: Some(mib),
    }
}

/// How long a pod keeps the room of a container that has ended: longer than kubelet's first two restarts
/// of one that crashes take (at once, then after 10 s), since to plug memory again costs more than to keep it.
const SETTLED: Duration = Duration::from_secs(15);

impl Pod {
    /// Fits the virtual machine to its containers, where they are not what they were.
    ///
    /// # Errors
    /// If it can't be made as large.
    pub(crate) fn fit(&self) -> Result<(), Refusal> {
        let Some(sandbox) = lock(&self.sandbox).clone() else {
            return Ok(());
        };
        if self.is_stopping.load(Ordering::SeqCst) {
            return Ok(());
        }
        // One at a time.
        let mut fitted = lock(&self.fitted);
        let tasks: Vec<_> = lock(&self.tasks).values().cloned().collect();
        let Some(first) = tasks.iter().find(|task| !task.is_member()) else {
            return Ok(());
        };
        let limits = |task: &Arc<Task>| *lock(&task.limits);
        let members: Vec<Limits> = tasks.iter().filter(|t| t.is_member()).map(limits).collect();
        let own = together(&first.settings, &[limits(first)]);
        let wish = wish(own, together(&first.settings, &members), sandbox.max_size());
        if *fitted == Some(wish) {
            return Ok(());
        }
        *fitted = None;
        let now = sandbox.size()?;
        let grows = wish.memory_mib > now.memory_mib;
        // Before the guest has more, and after it has less.
        if grows {
            bound(first, &sandbox, wish.memory_mib);
        }
        let got = match sandbox.update(wish) {
            Ok(got) => got,
            Err(error) => {
                bound(first, &sandbox, None);
                return Err(error.into());
            }
        };
        log::info!("the guest has {got:?}; wished was {wish:?}");
        bound(first, &sandbox, None);
        if grows && got.memory_mib < wish.memory_mib {
            let text = format!(
                "the guest has {} MiB, and did not take the {} that its containers may have",
                got.memory_mib.unwrap_or(0),
                wish.memory_mib.unwrap_or(0)
            );
            return Err(anyhow::anyhow!(text).into());
        }
        *fitted = Some(wish);
        Ok(())
    }

    /// The same behind whoever made room.
    pub(crate) fn fit_behind(self: &Arc<Self>) {
        let pod = self.clone();
        spawn("koya-fit", move || pod.fit_or_tell()).ok();
    }

    /// The same when a container has ended that may be started again soon.
    pub(crate) fn fit_later(self: &Arc<Self>) {
        let is_awaited = lock(&self.last_end).replace(Instant::now()).is_some();
        if is_awaited {
            return;
        }
        let pod = Arc::downgrade(self);
        let fit = move || {
            while let Some(pod) = pod.upgrade() {
                let Some(left) = pod.unsettled() else {
                    return pod.fit_or_tell();
                };
                drop(pod);
                std::thread::sleep(left);
            }
        };
        if spawn("koya-settle", fit).is_err() {
            *lock(&self.last_end) = None;
            self.fit_behind();
        }
    }

    /// How long the room of the container that ended last is still kept. None: no longer, and whoever asked
    /// is to fit the pod.
    fn unsettled(&self) -> Option<Duration> {
        let mut last_end = lock(&self.last_end);
        let left = SETTLED.checked_sub((*last_end)?.elapsed());
        if left.is_none() {
            *last_end = None;
        }
        left
    }

    fn fit_or_tell(&self) {
        if let Err(error) = self.fit() {
            log::warn!("{error}");
        }
    }
}

/// What a sandbox is to have that started with `own`, and whose containers may have `all` together.
fn wish(own: Size, all: Size, most: Size) -> Size {
    // The kernel's tables of memory that is plugged are in the memory that was there before.
    const TABLES: u64 = 64;
    let (own_mib, all_mib) = (own.memory_mib.unwrap_or(0), all.memory_mib.unwrap_or(0));
    let mut mib = own_mib.max(all_mib);
    mib += (mib - own_mib).div_ceil(TABLES);
    // What is for the agent and tables can do with less, the containers' limits can't.
    let most_mib = most.memory_mib.unwrap_or(u64::MAX);
    if mib > most_mib && mib - ROOM_MIB <= most_mib {
        mib = most_mib;
    }
    Size {
        // What was said of a pod as a whole is there from its start.
        cpus: own.cpus.max(all.cpus).min(most.cpus),
        memory_mib: Some(mib),
    }
}

/// Sets the host's limit for a sandbox whose guest may have so much memory, but never less than it was granted:
/// what it is slow to give back, or to take, it may still use.
pub(crate) fn bound(task: &Task, sandbox: &Sandbox, mib: Option<u64>) {
    match task.spec.cgroup() {
        Some(folder) => {
            let mib = mib.unwrap_or(0).max(sandbox.granted_mib());
            cgroup::bound(&folder, mib, sandbox.kernel_mib());
        }
        None => log::debug!("no limit of memory: no control group of version 2"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_room_for_all_containers() {
        let settings = Settings::default();
        let size = |all: &[Limits]| {
            let size = together(&settings, all);
            (size.cpus.unwrap(), size.memory_mib.unwrap())
        };
        let limits = |mib: u64, milli_cpus| Limits {
            memory: Some(mib << 20),
            milli_cpus: Some(milli_cpus),
        };
        assert_eq!(size(&[Limits::default()]), (1, 512));
        assert_eq!(size(&[limits(256, 500)]), (1, 288));
        assert_eq!(size(&[limits(1, 1)]), (1, 96));
        assert_eq!(size(&[limits(400, 700), limits(600, 700)]), (2, 1032));
        // One without limits has what it would have alone.
        assert_eq!(size(&[limits(400, 700), Limits::default()]), (2, 944));
    }

    #[test]
    fn a_sandbox_is_as_large_as_it_can_and_must_be() {
        let size = |cpus, mib| Size {
            cpus: Some(cpus),
            memory_mib: Some(mib),
        };
        let most = size(4, 4096);
        assert_eq!(wish(size(1, 512), size(1, 100), most), size(1, 512));
        assert_eq!(wish(size(1, 512), size(8, 1152), most), size(4, 1162));
        // The containers' limits fit, if not all that is beside them.
        assert_eq!(wish(size(1, 512), size(1, 532), size(1, 512)), size(1, 512));
        assert_eq!(wish(size(1, 512), size(1, 600), size(1, 512)), size(1, 602));
    }

    #[test]
    fn limits_are_the_configurations() {
        let of = |text: &str| {
            let resources: oci::LinuxResources = serde_json::from_str(text).unwrap();
            let limits = Limits::default().or(Some(&resources));
            (limits.memory, limits.milli_cpus)
        };
        let both = r#"{"memory": {"limit": 4096}, "cpu": {"quota": 250000, "period": 100000}}"#;
        assert_eq!(of(both), (Some(4096), Some(2500)));
        let endless = r#"{"memory": {"limit": -1}, "cpu": {"quota": -1, "period": 100000}}"#;
        assert_eq!(of(endless), (None, None));
        assert_eq!(of("{}"), (None, None));
    }
}
