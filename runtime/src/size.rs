//! Size of a guest: the part visible to its programs, and changes while it runs.

use crate::agent::Agent;
use crate::config::SandboxConfig;
use crate::{Error, Sandbox};
use koya_vmm::{VmConfig, VmHandle};
use std::time::{Duration, Instant};

/// Time for which a guest may refuse to turn a CPU off: it may be busy with another change.
const PATIENCE: Duration = Duration::from_secs(3);
/// Time limit for progress towards the requested memory. On a loaded host, the guest kernel takes seconds to initialize a
/// memory block.
const STEP_LIMIT: Duration = Duration::from_secs(8);
/// Maximum number of times at which the guest has come nearer to a size, and has that time again.
const MAX_STEPS: u64 = 32;
/// Polling interval.
const LOOK: Duration = Duration::from_millis(10);
/// Interval between repeated requests to turn a CPU off.
const ASK_AGAIN: Duration = Duration::from_millis(200);

/// The size of a running guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Size {
    /// Number of online CPUs. In a request, `None` leaves it unchanged.
    pub cpus: Option<u32>,
    /// Memory in MiB, counted as in [`SandboxConfig::memory_mib`]. In a request, `None` leaves it unchanged.
    pub memory_mib: Option<u64>,
}

/// Memory that Koya's guest kernel for an architecture keeps for itself besides page descriptors and hash tables: it is not
/// part of `MemTotal`. Another kernel differs in the first figure. The system test `memory::the_guest_has_what_was_asked_for`
/// prints rows for the test below.
struct OwnMemory {
    /// Image without what is freed after the start, tables, panic log, in KiB.
    fixed_kib: u64,
    /// Per-CPU variables, in KiB for each CPU.
    cpu_kib: u64,
    /// Memory that is freed after the hash tables have got their size, in KiB: the initramfs, the kernel's init sections.
    freed_later_kib: u64,
}

/// Measured with 96 MiB to 8 GiB, to the page. The hole of a PC below 1 MiB is included.
const X86_64: OwnMemory = OwnMemory {
    fixed_kib: 12_752 - 176,
    cpu_kib: 176,
    freed_later_kib: 0,
};

/// Measured with 96 MiB to 1 GiB.
const AARCH64: OwnMemory = OwnMemory {
    fixed_kib: 12_800,
    cpu_kib: 76,
    freed_later_kib: 7 << 10,
};

/// Linux's memory section in MiB, and its page descriptors (64 bytes each) in KiB.
const SECTION_MIB: u64 = 128;
const SECTION_KIB: u64 = 2048;
/// Hash tables of names and inodes: bytes for each KiB that would otherwise be free, before rounding up.
const HASHES: u64 = 3;
/// Size from which they grow more slowly, in MiB (ADAPT_SCALE_BASE in mm/mm_init.c).
const SLOWER_MIB: u64 = 64 << 10;

impl OwnMemory {
    /// The memory that the guest kernel of this architecture keeps.
    fn here() -> &'static Self {
        match std::env::consts::ARCH {
            "aarch64" => &AARCH64,
            _ => &X86_64,
        }
    }

    /// `MemTotal` in KiB of a guest with this much memory.
    fn total_kib(&self, ram_mib: u64, cpus: u32) -> u64 {
        let sections = ram_mib.div_ceil(SECTION_MIB);
        let mut slower = 0;
        let mut step = SLOWER_MIB;
        while step < ram_mib {
            slower += 1;
            step <<= 2;
        }
        let kept = self.fixed_kib + self.cpu_kib * u64::from(cpus) + SECTION_KIB * sections;
        let free_kib = (ram_mib * 1024).saturating_sub(kept);
        let at_first_kib = free_kib.saturating_sub(self.freed_later_kib);
        let hashes_kib = (at_first_kib.div_ceil(1024).next_power_of_two() * HASHES / 2) >> slower;
        free_kib.saturating_sub(hashes_kib)
    }

    /// The smallest memory size in MiB, a multiple of `step`, that leaves `total_mib` to the guest.
    fn ram_for(&self, total_mib: u64, cpus: u32, step: u64) -> u64 {
        let mut ram = total_mib.next_multiple_of(step);
        loop {
            let total_kib = self.total_kib(ram, cpus);
            if total_kib >= total_mib.saturating_mul(1024) {
                return ram;
            }
            let missing = (total_mib * 1024 - total_kib).div_ceil(1024);
            ram += missing.next_multiple_of(step);
        }
    }
}

impl SandboxConfig {
    /// Sets the size of the virtual machine such that the guest has the configured size.
    ///
    /// # Errors
    /// [`Error::Size`] if the maximum memory is less than the minimum, or exceeds the limit of guests.
    pub(crate) fn size(&self, machine: &mut VmConfig) -> Result<(), Error> {
        let least = self.memory_mib.min(koya_vmm::MAX_MEMORY_MIB);
        if let Some(max) = self.memory_max_mib
            && !(least..=koya_vmm::MAX_MEMORY_MIB).contains(&max)
        {
            return Err(Error::Size {
                what: "MiB of memory at most",
                asked: max,
                min: least,
                max: koya_vmm::MAX_MEMORY_MIB,
            });
        }
        // Whole huge pages of either kind.
        let step = 2;
        let cpus = self.cpus_max.unwrap_or(self.cpus);
        // Values out of range are refused by the check of the configuration, with the field's name.
        let ram = match self.memory_mib {
            koya_vmm::MIN_MEMORY_MIB..=koya_vmm::MAX_MEMORY_MIB => {
                let ram = OwnMemory::here().ram_for(self.memory_mib, cpus, step);
                ram.min(koya_vmm::MAX_MEMORY_MIB)
            }
            other => other,
        };
        machine.cpus = self.cpus;
        machine.cpus_max = self.cpus_max;
        machine.cpu_pins = self.cpu_pins.clone();
        machine.sve = self.sve;
        machine.memory_mib = ram;
        machine.memory_max_mib = self.memory_max_mib.map(|max| {
            let more = max.saturating_sub(self.memory_mib);
            ram.saturating_add(more).min(koya_vmm::MAX_MEMORY_MIB)
        });
        machine.memory_backing = self.memory_backing;
        machine.huge_pages = self.huge_pages;
        Ok(())
    }
}

impl Sandbox {
    /// Resizes the running guest, and returns the resulting size: a guest gives up only memory that it can do without. If
    /// the CPUs can't be changed, memory may have been.
    ///
    /// Memory above [`SandboxConfig::memory_mib`] is plugged and unplugged (virtio-mem); below it, a
    /// balloon reclaims it.
    ///
    /// The host has the last word on CPUs: removed CPUs stop running, even if the guest has not turned them off a few
    /// seconds after the request. That is an error, and a guest that continues to rely on such a CPU hangs.
    ///
    /// # Errors
    /// [`Error::Size`] outside the configured limits; nothing is changed then. The agent's error for CPUs.
    pub fn update(&self, requested: Size) -> Result<Size, Error> {
        let limits = self.limits();
        if let Some(cpus) = requested.cpus
            && !(1..=limits.cpus_max).contains(&cpus)
        {
            return Err(Error::Size {
                what: "CPUs",
                asked: cpus.into(),
                min: 1,
                max: limits.cpus_max.into(),
            });
        }
        let machine = self.machine();
        if let Some(mib) = requested.memory_mib {
            let least = match machine.balloon() {
                Some(_) => koya_vmm::MIN_MEMORY_MIB.min(limits.memory_mib),
                None => limits.memory_mib,
            };
            if !(least..=limits.memory_max_mib).contains(&mib) {
                return Err(Error::Size {
                    what: "MiB of memory",
                    asked: mib,
                    min: least,
                    max: limits.memory_max_mib,
                });
            }
        }
        if let Some(mib) = requested.memory_mib {
            set_memory(machine, limits.memory_mib, mib);
        }
        if let Some(cpus) = requested.cpus {
            // One at a time: concurrent changes could hold a CPU that the other lets run.
            let _turning = self.turn_cpus();
            let change = Change {
                before: machine.online_cpus(),
                after: cpus,
                patience: PATIENCE,
            };
            let ask = || self.agent().set_online_cpus(cpus);
            let refuses = |error: &Error| matches!(error, Error::Agent { .. });
            change.turn(|count| machine.set_online_cpus(count), ask, refuses)?;
        }
        if requested.memory_mib.is_some() {
            settle(machine);
            if let Some(mem) = machine.mem() {
                // Memory that the guest touched after giving it up.
                mem.discard_unplugged();
            }
        }
        self.size()
    }

    /// Maximum size of the guest.
    pub fn max_size(&self) -> Size {
        let limits = self.limits();
        Size {
            cpus: Some(limits.cpus_max),
            memory_mib: Some(limits.memory_max_mib),
        }
    }

    /// Memory that the guest kernel keeps for itself: MiB of guest memory beyond its size.
    pub fn kernel_mib(&self) -> u64 {
        self.limits().kernel_mib
    }

    /// Memory in MiB that the guest may use on its host, without the part that its kernel keeps: the memory at its start,
    /// plus the amount last requested beyond that, or the larger amount that is still plugged from an earlier request.
    /// Memory in a balloon is included: the guest may take it back.
    pub fn granted_mib(&self) -> u64 {
        let mem = self.machine().mem();
        let plugged = mem.map_or(0, |mem| mem.plugged().max(mem.requested()));
        self.limits().memory_mib + plugged.div_ceil(1 << 20)
    }

    /// Size of the guest.
    ///
    /// # Errors
    /// If the agent does not answer.
    pub fn size(&self) -> Result<Size, Error> {
        let machine = self.machine();
        let plugged = machine.mem().map_or(0, |mem| mem.plugged());
        let given_up = machine.balloon().map_or(0, |balloon| balloon.actual());
        let bytes = (self.limits().memory_mib << 20) + plugged;
        Ok(Size {
            cpus: Some(online_cpus(self.agent())?),
            memory_mib: Some(bytes.saturating_sub(given_up) >> 20),
        })
    }
}

/// Limits of a guest's size.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub(crate) cpus_max: u32,
    pub(crate) memory_mib: u64,
    pub(crate) memory_max_mib: u64,
    /// Memory that the guest kernel keeps for itself.
    pub(crate) kernel_mib: u64,
}

impl Limits {
    pub(crate) fn of(config: &SandboxConfig, ram_mib: u64) -> Self {
        Self {
            cpus_max: config.cpus_max.unwrap_or(config.cpus),
            memory_mib: config.memory_mib,
            memory_max_mib: config.memory_max_mib.unwrap_or(config.memory_mib),
            kernel_mib: ram_mib.saturating_sub(config.memory_mib),
        }
    }
}

fn online_cpus(agent: &Agent) -> Result<u32, Error> {
    Ok(agent.details()?.cpus_online)
}

fn set_memory(machine: &VmHandle, start_mib: u64, wish_mib: u64) {
    if let Some(mem) = machine.mem() {
        mem.set_requested(wish_mib.saturating_sub(start_mib) << 20);
    }
    if let Some(balloon) = machine.balloon() {
        balloon.set_target(start_mib.saturating_sub(wish_mib) << 20);
    }
}

/// A change of the number of online CPUs.
struct Change {
    before: u32,
    after: u32,
    patience: Duration,
}

impl Change {
    /// Additional CPUs run before the guest is asked to turn them on; removed CPUs run until the guest was asked to turn
    /// them off. A guest that does not reply loses them; one that replies with an error keeps them: its kernel would wait
    /// for a CPU that no longer runs.
    fn turn<E>(
        self,
        mut allow: impl FnMut(u32),
        mut ask: impl FnMut() -> Result<(), E>,
        refuses: impl Fn(&E) -> bool,
    ) -> Result<(), E> {
        if self.after >= self.before {
            allow(self.after);
            return ask();
        }
        let since = Instant::now();
        let mut asked = ask();
        // The guest may be busy with another change.
        while asked.is_err() && since.elapsed() < self.patience {
            std::thread::sleep(ASK_AGAIN.min(self.patience));
            asked = ask();
        }
        if !asked.as_ref().is_err_and(refuses) {
            allow(self.after);
        }
        asked
    }
}

/// The guest's approach to a size. The numbers are the guest's: only a certain part of the distance counts as progress, so
/// that it cannot prolong a wait by more than so many steps.
struct Approach {
    step: u64,
    least: u64,
}

impl Approach {
    fn new(distance: u64) -> Self {
        Self {
            step: (distance / MAX_STEPS).max(1),
            least: distance,
        }
    }

    /// Whether this distance is progress.
    fn is_nearer(&mut self, distance: u64) -> bool {
        let is_nearer = distance.saturating_add(self.step) <= self.least;
        if is_nearer {
            self.least = distance;
        }
        is_nearer
    }
}

/// Waits while the guest approaches the requested size.
fn settle(machine: &VmHandle) {
    let look = || {
        let plugged = machine.mem().map(|m| (m.plugged(), m.requested()));
        let given_up = machine.balloon().map(|b| (b.actual(), b.target()));
        [plugged, given_up]
    };
    let distance = || -> u64 {
        let pairs = look().into_iter().flatten();
        pairs.map(|(is, requested)| is.abs_diff(requested)).sum()
    };
    let (mut now, mut nearer) = (distance(), Instant::now());
    let mut approach = Approach::new(now);
    while now > 0 && nearer.elapsed() < STEP_LIMIT && machine.ended().is_none() {
        std::thread::sleep(LOOK);
        now = distance();
        if approach.is_nearer(now) {
            nearer = Instant::now();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_cannot_prolong_a_wait_by_small_steps() {
        // As a guest reports that has given up 16 TiB, and then a page less each time.
        let start = (u64::from(u32::MAX) << 12) + 1;
        let mut approach = Approach::new(start);
        let pages = (0..1_000_000).map(|page| start - (page << 12));
        assert_eq!(pages.filter(|now| approach.is_nearer(*now)).count(), 0);
        let mut approach = Approach::new(start);
        let back_and_forth = (0..1000).flat_map(|n| [start / 1000 * (1000 - n), start]);
        let count = back_and_forth.filter(|now| approach.is_nearer(*now));
        assert!(count.count() <= MAX_STEPS as usize);
        // A small change is complete in one step.
        let mut approach = Approach::new(3);
        assert!(approach.is_nearer(2) && !approach.is_nearer(2) && approach.is_nearer(0));
    }

    #[test]
    fn the_guests_total_is_as_measured() {
        // Memory in MiB, CPUs, and the total reported by a guest.
        let of_x86_64 = [
            (96, 1, 83_312),
            (154, 1, 140_464),
            (304, 1, 291_632),
            (1040, 1, 1_032_240),
            (3048, 1, 3_053_104),
            (8350, 1, 8_377_900),
            (262, 8, 247_772),
        ];
        let of_aarch64 = [
            (112, 1, 99_580),
            (112, 2, 99_504),
            (276, 1, 263_228),
            (276, 2, 263_152),
            (1058, 1, 1_050_552),
            (1058, 2, 1_050_476),
        ];
        for (own, rows) in [(&X86_64, &of_x86_64[..]), (&AARCH64, &of_aarch64[..])] {
            for (ram, cpus, total) in rows {
                let model = own.total_kib(*ram, *cpus);
                assert!(
                    model.abs_diff(*total) < 16,
                    "{ram} MiB: {model}, not {total}"
                );
            }
        }
    }

    /// The actions in order, for a guest that refuses this many times.
    fn turned(before: u32, after: u32, refusals: usize) -> (Result<(), ()>, Vec<String>) {
        turned_by(before, after, refusals, false)
    }

    fn turned_by(
        before: u32,
        after: u32,
        refusals: usize,
        says_no: bool,
    ) -> (Result<(), ()>, Vec<String>) {
        let done = std::cell::RefCell::new(Vec::new());
        let asked = std::cell::Cell::new(0);
        let change = Change {
            before,
            after,
            patience: Duration::from_millis(50),
        };
        let result = change.turn(
            |count| done.borrow_mut().push(format!("allow {count}")),
            || {
                done.borrow_mut().push("ask".to_owned());
                asked.set(asked.get() + 1);
                (asked.get() > refusals).then_some(()).ok_or(())
            },
            |()| says_no,
        );
        (result, done.into_inner())
    }

    #[test]
    fn cpus_run_before_the_guest_turns_them_on_and_until_it_turned_them_off() {
        assert_eq!(
            turned(1, 3, 0),
            (Ok(()), vec!["allow 3".into(), "ask".into()])
        );
        assert_eq!(
            turned(3, 1, 0),
            (Ok(()), vec!["ask".into(), "allow 1".into()])
        );
        let again = vec!["ask".into(), "ask".into(), "allow 1".into()];
        assert_eq!(turned(3, 1, 1), (Ok(()), again));
    }

    #[test]
    fn a_guest_that_says_nothing_loses_a_cpu_and_one_that_says_no_keeps_it() {
        let (result, done) = turned_by(3, 2, usize::MAX, true);
        assert!(result.is_err() && done.iter().all(|what| what == "ask"));
        let (result, done) = turned(3, 2, usize::MAX);
        assert!(result.is_err());
        assert_eq!(done.last().map(String::as_str), Some("allow 2"));
        assert_eq!(done.iter().filter(|what| *what != "ask").count(), 1);
    }

    #[test]
    fn what_is_asked_for_is_there_and_little_more() {
        for total in [
            32, 106, 107, 128, 255, 256, 1000, 4096, 70_000, 300_000, 500_000,
        ] {
            for (own, step) in [(&X86_64, 1), (&X86_64, 2), (&AARCH64, 1), (&AARCH64, 2)] {
                let kib = own.total_kib(own.ram_for(total, 4, step), 4);
                let range = total * 1024..=(total + 8) * 1024;
                assert!(range.contains(&kib), "{total} MiB: {kib} KiB");
            }
        }
    }

    #[test]
    fn room_to_grow_is_kept_and_nonsense_is_passed_on() {
        let size = |memory_mib, memory_max_mib| {
            let config = SandboxConfig {
                memory_mib,
                memory_max_mib,
                ..SandboxConfig::default()
            };
            let mut machine = VmConfig::new("kernel");
            config.size(&mut machine).unwrap();
            (machine.memory_mib, machine.memory_max_mib)
        };
        let (ram, max) = size(256, Some(1256));
        assert!(ram > 256 && max == Some(ram + 1000));
        for max in [100, u64::MAX] {
            let config = SandboxConfig {
                memory_max_mib: Some(max),
                ..SandboxConfig::default()
            };
            let refused = config.size(&mut VmConfig::new("kernel")).unwrap_err();
            assert!(refused.to_string().contains("256 to 524288"), "{refused}");
        }
        assert_eq!(size(u64::MAX, None), (u64::MAX, None));
    }
}
