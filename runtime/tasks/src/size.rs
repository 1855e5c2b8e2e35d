//! Size of a sandbox for its containers.

use koya::oci_spec::runtime as oci;
use koya::{Settings, Size};

/// Memory for the agent and tables in the guest, added to that of the containers.
const ROOM_MIB: u64 = 32;
/// Minimum memory of a guest.
const LEAST_MIB: u64 = 64;

/// Limits of a container: bytes of memory, and CPU time in thousandths of a CPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Limits {
    pub(crate) memory: Option<u64>,
    pub(crate) milli_cpus: Option<u64>,
}

impl Limits {
    /// Fills in missing limits from a container's configuration.
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

/// The kernel's default quota period, in microseconds.
pub(crate) const PERIOD: u64 = 100_000;

/// Thousandths of a CPU; `None` without a limit.
pub(crate) fn milli_cpus(quota: i64, period: u64) -> Option<u64> {
    let quota = u64::try_from(quota).ok().filter(|quota| *quota > 0)?;
    (quota.saturating_mul(1000)).div_ceil(period.max(1)).into()
}

/// The CPUs of a container's set, in thousandths, if it has one.
pub(crate) fn milli_cpus_of_set(resources: &oci::LinuxResources) -> Option<u64> {
    let own = resources.cpu().as_ref().and_then(|cpu| cpu.cpus().as_ref());
    let files = resources.unified().as_ref();
    // The file of this name is written last.
    let set = files.and_then(|files| files.get("cpuset.cpus")).or(own)?;
    let cpus = koya::cpus::parse(set).ok()?;
    Some(cpus.len() as u64 * 1000)
}

/// Sum of these limits, with the defaults of the settings for containers without a limit.
pub(crate) fn sum_of_limits(settings: &Settings, all: &[Limits]) -> Size {
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

/// The larger of two sizes, part by part.
pub(crate) fn larger(one: Size, other: Size) -> Size {
    Size {
        cpus: one.cpus.max(other.cpus),
        memory_mib: one.memory_mib.max(other.memory_mib),
    }
}

/// Size of a sandbox that started with `first`, and whose containers may use `all` together.
pub(crate) fn target(first: Size, all: Size, most: Size) -> Size {
    // The kernel's page tables for plugged memory are in the initial memory.
    const TABLES: u64 = 64;
    let (first_mib, mut mib) = (first.memory_mib.unwrap_or(0), all.memory_mib.unwrap_or(0));
    mib += mib.saturating_sub(first_mib).div_ceil(TABLES);
    // The part for the agent and tables may be reduced, but not the containers' limits.
    let most_mib = most.memory_mib.unwrap_or(u64::MAX);
    if mib > most_mib && mib.saturating_sub(ROOM_MIB) <= most_mib {
        mib = most_mib;
    }
    Size {
        cpus: all.cpus.min(most.cpus),
        memory_mib: Some(mib),
    }
}

/// As much memory of what is wanted as there can be.
pub(crate) fn at_most(size: Size, most: Size) -> Size {
    let most = most.memory_mib.unwrap_or(u64::MAX);
    Size {
        memory_mib: size.memory_mib.map(|mib| mib.min(most)),
        ..size
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containers_that_join_have_what_there_is() {
        let size = |memory_mib| Size {
            cpus: Some(2),
            memory_mib,
        };
        let wanted = size(Some(610));
        assert_eq!(at_most(wanted, size(Some(512))), size(Some(512)));
        assert_eq!(at_most(wanted, size(Some(1024))), wanted);
        assert_eq!(at_most(wanted, size(None)), wanted);
    }

    #[test]
    fn there_is_room_for_all_containers() {
        let settings = Settings::default();
        let size = |all: &[Limits]| {
            let size = sum_of_limits(&settings, all);
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
        // A container without limits counts as it would alone.
        assert_eq!(size(&[limits(400, 700), Limits::default()]), (2, 944));
    }

    #[test]
    fn a_sandbox_is_as_large_as_it_can_and_must_be() {
        let size = |cpus, mib| Size {
            cpus: Some(cpus),
            memory_mib: Some(mib),
        };
        let most = size(4, 4096);
        assert_eq!(larger(size(1, 512), size(2, 100)), size(2, 512));
        assert_eq!(target(size(1, 512), size(1, 512), most), size(1, 512));
        // A limit was lowered.
        assert_eq!(target(size(1, 512), size(1, 100), most), size(1, 100));
        assert_eq!(target(size(1, 512), size(8, 1152), most), size(4, 1162));
        // The containers' limits fit, but not all of the overhead.
        assert_eq!(
            target(size(1, 512), size(1, 532), size(1, 512)),
            size(1, 512)
        );
        assert_eq!(
            target(size(1, 512), size(1, 600), size(1, 512)),
            size(1, 602)
        );
    }

    #[test]
    fn a_set_of_cpus_counts_as_many() {
        let of = |text: &str| milli_cpus_of_set(&serde_json::from_str(text).unwrap());
        assert_eq!(of(r#"{"cpu": {"cpus": "0-2,7"}}"#), Some(4000));
        let both = r#"{"cpu": {"cpus": "0"}, "unified": {"cpuset.cpus": "0-1"}}"#;
        assert_eq!(of(both), Some(2000));
        for none in ["{}", r#"{"cpu": {"cpus": ""}}"#, r#"{"cpu": {"quota": 5}}"#] {
            assert_eq!(of(none), None, "{none}");
        }
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
