//! Guest memory: private mappings, populated only when the guest touches them.
//!
//! The hot-pluggable range is mapped into the process from the start, but registered with KVM slot by slot as
//! blocks are plugged ([`koya_devices::mem`]): until then the guest finds nothing there.

use crate::arch;
use crate::config::{HugePages, MemoryBacking, MemorySpec};
use crate::kvm::Machine;
use koya_devices::mem::{self, Mem, MemorySlots, SlottedRegion};
use koya_devices::sys::Advice;
use koya_devices::virtio::{Memory, MemoryRegion};
use kvm_ioctls::Kvm;
use rustix::fs::{MemfdFlags, memfd_create};
use std::fs::File;
use std::io;
use std::sync::{Arc, Weak};
use thiserror::Error;
use vm_memory::mmap::{MmapRegion, MmapRegionBuilder, MmapRegionError};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};

/// Memory use of a virtual machine on the host, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct MemoryUsage {
    /// Resident pages of guest memory.
    pub guest: u64,
    /// Other private pages of the process: the monitor, its devices and the rest of the program.
    pub overhead: u64,
}

/// Total size in bytes.
pub(crate) fn size(memory: &Memory) -> u64 {
    memory.iter().map(|region| region.len()).sum()
}

/// Reads the memory use of this process from `/proc/self/smaps` (proc(5)).
pub(crate) fn usage(memory: &Memory) -> io::Result<MemoryUsage> {
    usage_of(memory.iter())
}

fn usage_of<'m>(regions: impl Iterator<Item = &'m MemoryRegion>) -> io::Result<MemoryUsage> {
    let guest: Vec<(u64, u64)> = regions
        .filter_map(|region| {
            let start = region.mapping().ok()?.ptr_guard().as_ptr() as u64;
            Some((start, start + region.len()))
        })
        .collect();
    let smaps = std::fs::read_to_string("/proc/self/smaps")?;
    Ok(sum(&smaps, &guest))
}

fn sum(smaps: &str, guest: &[(u64, u64)]) -> MemoryUsage {
    let mut usage = MemoryUsage::default();
    let mut is_guest = false;
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let (Some(name), value) = (words.next(), words.next()) else {
            continue;
        };
        if let Some((start, end)) = name.split_once('-')
            && let (Ok(start), Ok(end)) =
                (u64::from_str_radix(start, 16), u64::from_str_radix(end, 16))
        {
            // The kernel may show one region as several mappings, or two regions as one.
            is_guest = guest
                .iter()
                .any(|(first, last)| start < *last && end > *first);
            continue;
        }
        let bytes = || value.and_then(|v| v.parse::<u64>().ok()).unwrap_or(0) * 1024;
        match name {
            "Rss:" | "Private_Hugetlb:" | "Shared_Hugetlb:" if is_guest => usage.guest += bytes(),
            "Private_Clean:" | "Private_Dirty:" if !is_guest => usage.overhead += bytes(),
            _ => {}
        }
    }
    usage
}

/// The error when guest memory is allocated.
#[derive(Debug, Error)]
#[error("cannot reserve {mib} MiB of guest memory{hint}")]
pub struct MemoryError {
    mib: u64,
    hint: &'static str,
    #[source]
    source: io::Error,
}

/// Size of the host's huge pages in bytes, as used by [`HugePages::Reserved`].
const HUGE_PAGE: u64 = 2 << 20;

/// Reserves guest memory at the architecture's addresses: boot memory, and after it the hot-pluggable range,
/// which is not guest memory until it is plugged. Pages cost nothing until they are touched, except reserved
/// huge pages.
pub(crate) fn reserve(spec: &MemorySpec) -> Result<Memory, MemoryError> {
    let mib = (spec.bytes + spec.hotplug_bytes) >> 20;
    try_reserve(spec).map_err(|source| MemoryError {
        mib,
        hint: match spec.huge_pages {
            HugePages::Reserved => " in huge pages; see HugePages_Free in /proc/meminfo",
            _ => "",
        },
        source,
    })
}

fn try_reserve(spec: &MemorySpec) -> io::Result<Memory> {
    let ranges = arch::layout::memory_ranges(spec.bytes).into_iter();
    let room = (arch::layout::hotplug_start(spec.bytes), spec.hotplug_bytes);
    let room = Some(room).filter(|room| room.1 > 0);
    let ranges = ranges.map(|range| (range, false));
    let ranges = ranges.chain(room.map(|range| (range, true)));
    let file = match spec.backing {
        MemoryBacking::Anonymous => None,
        MemoryBacking::Memfd => Some(Arc::new(memory_file(spec)?)),
    };
    let mut regions = Vec::new();
    let mut offset = 0;
    for ((start, len), is_hotpluggable) in ranges {
        let place = file.clone().map(|file| FileOffset::from_arc(file, offset));
        let mapping = map_aligned(start, len, place, spec.huge_pages)?;
        let region = GuestRegionMmap::new(mapping, GuestAddress(start));
        let region = region.ok_or(io::ErrorKind::InvalidInput)?;
        regions.push(match is_hotpluggable {
            true => MemoryRegion::pluggable(region),
            false => MemoryRegion::new(region),
        });
        offset += len;
    }
    let memory = Memory::from_regions(regions).map_err(io::Error::other)?;
    for region in memory.iter() {
        let slice = region.mapping().map_err(io::Error::other)?;
        // Guest memory would make core dumps huge and disclose the guest's data.
        koya_devices::sys::advise(&slice, Advice::NoDump)?;
        if spec.huge_pages == HugePages::Transparent
            && let Err(error) = koya_devices::sys::advise(&slice, Advice::HugePages)
        {
            log::warn!("the host has no transparent huge pages: {error}");
        }
    }
    Ok(memory)
}

/// Maximum number of memory slots for the hot-pluggable range: KVM supports at least some 500.
const MAX_SLOTS: usize = 256;

/// Creates the virtio-mem device; `None` without a hot-pluggable range.
///
/// # Errors
/// If the device rejects the range.
pub(crate) fn device(
    spec: &MemorySpec,
    kvm: &Kvm,
    machine: &Arc<Machine>,
    memory: &Arc<Memory>,
) -> io::Result<Option<Mem>> {
    if spec.hotplug_bytes == 0 {
        return Ok(None);
    }
    let most = machine.max_slots(kvm).min(MAX_SLOTS);
    let slots = HotplugRange {
        machine: Arc::downgrade(machine),
        start: arch::layout::hotplug_start(spec.bytes),
        len: spec.hotplug_bytes,
        slot_size: mem::slot_size(spec.hotplug_bytes, most),
    };
    let region = SlottedRegion {
        start: slots.start,
        size: slots.len,
        memory_block: arch::layout::memory_block(spec.bytes),
        slot_size: slots.slot_size,
    };
    Mem::with_slots(region, memory, slots).map(Some)
}

/// The hot-pluggable range as memory slots of KVM.
struct HotplugRange {
    /// Weak: handles of the device must not keep guest memory alive after its machine.
    machine: Weak<Machine>,
    start: u64,
    len: u64,
    slot_size: u64,
}

impl HotplugRange {
    fn machine(&self) -> io::Result<Arc<Machine>> {
        let machine = self.machine.upgrade();
        machine.ok_or_else(|| io::Error::other("the virtual machine has ended"))
    }
}

impl MemorySlots for HotplugRange {
    fn add(&self, index: usize) -> io::Result<()> {
        let offset = self.slot_size.saturating_mul(index as u64);
        // The last slot may be smaller.
        let len = self.slot_size.min(self.len.saturating_sub(offset));
        let start = GuestAddress(self.start.saturating_add(offset));
        let mapped = self.machine()?.map_slot(index, start, len);
        mapped.map_err(|error| io::Error::from_raw_os_error(error.errno()))
    }

    fn remove(&self, index: usize) -> io::Result<()> {
        let unmapped = self.machine()?.unmap_slot(index);
        unmapped.map_err(|error| io::Error::from_raw_os_error(error.errno()))
    }
}

fn memory_file(spec: &MemorySpec) -> io::Result<File> {
    let mut flags = MemfdFlags::CLOEXEC;
    if spec.huge_pages == HugePages::Reserved {
        flags |= MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    }
    let file = File::from(memfd_create("koya-guest", flags)?);
    file.set_len(spec.bytes + spec.hotplug_bytes)?;
    Ok(file)
}

/// Maps memory such that huge pages of the host can back huge pages of the guest: both addresses must have
/// the same offset from a huge page boundary. Since 6.7 the kernel does this for mappings of whole, aligned
/// huge pages. Here the misalignment is measured, and a placeholder of that size is mapped, since mappings
/// are placed downwards one after another.
fn map_aligned(
    start: u64,
    len: u64,
    place: Option<FileOffset>,
    huge_pages: HugePages,
) -> io::Result<MmapRegion> {
    let first = map(len, place.clone(), huge_pages)?;
    let beyond =
        |mapping: &MmapRegion| (mapping.as_ptr().addr() as u64).wrapping_sub(start) % HUGE_PAGE;
    if len < HUGE_PAGE || beyond(&first) == 0 {
        return Ok(first);
    }
    let spare = beyond(&first);
    drop(first);
    let _holder = map(spare, None, HugePages::Host)?;
    // If another thread maps memory in between, alignment is lost, which costs only speed.
    map(len, place, huge_pages)
}

fn map(len: u64, place: Option<FileOffset>, huge_pages: HugePages) -> io::Result<MmapRegion> {
    let shared = match place {
        Some(_) => libc::MAP_SHARED,
        None => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
    };
    let kind = match huge_pages {
        // Claimed now: a huge page missing later would raise SIGBUS while the guest runs.
        HugePages::Reserved if place.is_some() => 0,
        HugePages::Reserved => {
            libc::MAP_HUGETLB | (HUGE_PAGE.ilog2() as i32) << libc::MAP_HUGE_SHIFT
        }
        _ => libc::MAP_NORESERVE,
    };
    let mut mapping = MmapRegionBuilder::new(len as usize)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(shared | kind)
        .with_hugetlbfs(huge_pages == HugePages::Reserved);
    if let Some(place) = place {
        mapping = mapping.with_file_offset(place);
    }
    mapping.build().map_err(|error| match error {
        MmapRegionError::Mmap(source) => source,
        other => io::Error::other(other),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_and_overhead_are_told_apart() {
        let smaps = "1000-3000 rw-p 00000000 00:00 0\nRss: 8 kB\nPrivate_Dirty: 8 kB\n\
                     3000-5000 rw-p 00000000 00:00 0 [heap]\nRss: 6 kB\nPrivate_Clean: 1 kB\n\
                     Private_Dirty: 4 kB\n";
        let usage = sum(smaps, &[(0x2000, 0x3000)]);
        assert_eq!((usage.guest, usage.overhead), (8 << 10, 5 << 10));
    }

    /// An address in boot memory, by its offset from the start.
    fn boot_memory(offset: u64) -> GuestAddress {
        GuestAddress(arch::layout::memory_ranges(64 << 20)[0].0 + offset)
    }

    #[test]
    fn touched_memory_is_seen() {
        use vm_memory::Bytes;
        let memory = reserve(&MemorySpec::new(64 << 20)).unwrap();
        let before = usage(&memory).unwrap();
        memory
            .write_slice(&vec![1; 8 << 20], boot_memory(16 << 20))
            .unwrap();
        let after = usage(&memory).unwrap();
        assert!(
            after.guest - before.guest >= 8 << 20,
            "{before:?} {after:?}"
        );
    }

    /// The flags of the mapping at an address, from `/proc/self/smaps`.
    fn mapping_flags(address: u64) -> String {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut inside = false;
        for line in smaps.lines() {
            let range = line.split(' ').next().and_then(|word| word.split_once('-'));
            let hex = |text: &str| u64::from_str_radix(text, 16).ok();
            if let Some((start, end)) = range.and_then(|(a, b)| Some((hex(a)?, hex(b)?))) {
                inside = (start..end).contains(&address);
            } else if let Some(flags) = line.strip_prefix("VmFlags:")
                && inside
            {
                return flags.to_owned();
            }
        }
        panic!("no mapping at {address:#x}");
    }

    #[test]
    fn guest_memory_is_left_out_of_core_dumps() {
        for backing in [MemoryBacking::Anonymous, MemoryBacking::Memfd] {
            let spec = MemorySpec {
                hotplug_bytes: arch::layout::memory_block(0),
                backing,
                ..MemorySpec::new(64 << 20)
            };
            let memory = reserve(&spec).unwrap();
            let own = 0u64;
            assert!(!mapping_flags((&raw const own).addr() as u64).contains(" dd"));
            for region in memory.iter() {
                let slice = region.mapping().unwrap();
                let first = slice.ptr_guard().as_ptr().addr() as u64;
                for address in [first, first + region.len() - 1] {
                    let flags = mapping_flags(address);
                    assert!(flags.split(' ').any(|flag| flag == "dd"), "{flags}");
                }
            }
        }
    }

    #[test]
    fn every_kind_of_memory_is_memory() {
        use vm_memory::Bytes;
        for backing in [MemoryBacking::Anonymous, MemoryBacking::Memfd] {
            for huge_pages in [HugePages::Host, HugePages::Transparent] {
                let spec = MemorySpec {
                    hotplug_bytes: arch::layout::memory_block(0),
                    backing,
                    huge_pages,
                    ..MemorySpec::new(64 << 20)
                };
                let memory = reserve(&spec).unwrap();
                let more = arch::layout::hotplug_start(spec.bytes);
                assert!(memory.write_obj(2u64, GuestAddress(more)).is_err());
                let room = memory.find_region(GuestAddress(more)).unwrap();
                room.set_plugged(0..1, true);
                let boot = boot_memory(16 << 20);
                for (address, word) in [(boot, 1u64), (GuestAddress(more), 2)] {
                    memory.write_obj(word, address).unwrap();
                }
                let word: u64 = memory.read_obj(boot).unwrap();
                assert_eq!(word, 1, "{spec:?}");
            }
        }
    }

    #[test]
    fn huge_pages_that_the_host_does_not_have_are_refused_at_once() {
        let spec = MemorySpec {
            huge_pages: HugePages::Reserved,
            // More than any host.
            ..MemorySpec::new(1 << 46)
        };
        for backing in [MemoryBacking::Anonymous, MemoryBacking::Memfd] {
            let error = reserve(&MemorySpec { backing, ..spec }).unwrap_err();
            assert!(error.to_string().contains("HugePages_Free"), "{error}");
        }
    }

    #[cfg(target_arch = "x86_64")]
    mod guest {
        use super::*;
        use crate::kvm::{Exit, Kicker, Vcpu, open};
        use std::os::unix::fs::MetadataExt;
        use std::sync::atomic::{AtomicBool, Ordering};
        use vm_memory::Bytes;

        /// Accessible in real mode, after boot memory.
        const ROOM: u64 = 0x8_0000;

        /// Writes to the hot-pluggable range, reads it back, and reports the value, in a loop.
        const CODE: &[u8] = &[
            0xb8, 0x00, 0x80, // mov ax, 0x8000
            0x8e, 0xd8, // mov ds, ax
            0xc6, 0x06, 0x00, 0x00, 0x5a, // again: mov byte [0], 0x5a
            0xa0, 0x00, 0x00, // mov al, [0]
            0xe6, 0x99, // out 0x99, al
            0xeb, 0xf4, // jmp again
        ];

        struct Guest {
            vcpu: Vcpu,
            machine: Arc<Machine>,
            room: HotplugRange,
            file: File,
        }

        fn guest() -> Guest {
            let kvm = open().unwrap();
            let file = File::from(memfd_create("room", MemfdFlags::CLOEXEC).unwrap());
            file.set_len(2 << 20).unwrap();
            let place = FileOffset::new(file.try_clone().unwrap(), 0);
            let own = GuestRegionMmap::from_range(GuestAddress(0), ROOM as usize, None);
            let room = GuestRegionMmap::from_range(GuestAddress(ROOM), 2 << 20, Some(place));
            let regions = vec![
                MemoryRegion::new(own.unwrap()),
                MemoryRegion::pluggable(room.unwrap()),
            ];
            let memory = Arc::new(Memory::from_regions(regions).unwrap());
            memory.write_slice(CODE, GuestAddress(0)).unwrap();
            let machine = Arc::new(Machine::new(&kvm, memory).unwrap());
            let mut features = arch::features(&kvm).unwrap();
            arch::prepare_vm(&mut features, machine.fd()).unwrap();
            let vcpu = Vcpu::new(&machine, 0, Kicker::default()).unwrap();
            arch::prepare_vcpu(&features, vcpu.fd(), 0, 1).unwrap();
            arch::set_entry(vcpu.fd(), arch::Entry::Real).unwrap();
            Guest {
                vcpu,
                room: HotplugRange {
                    machine: Arc::downgrade(&machine),
                    start: ROOM,
                    len: 2 << 20,
                    slot_size: 1 << 20,
                },
                machine,
                file,
            }
        }

        impl Guest {
            /// The value read, and the number of accesses that caused exits.
            fn round(&mut self) -> (u8, usize) {
                let mut exits = 0;
                loop {
                    match self.vcpu.run().unwrap() {
                        Exit::MmioWrite(ROOM, [0x5a]) => exits += 1,
                        Exit::MmioRead(ROOM, data) => {
                            data.fill(0xff);
                            exits += 1;
                        }
                        Exit::PortWrite(0x99, [byte]) => return (*byte, exits),
                        other => panic!("{other:?}"),
                    }
                }
            }

            fn is_held(&self) -> bool {
                self.file.metadata().unwrap().blocks() > 0
            }
        }

        #[test]
        fn a_guest_that_touches_what_is_not_plugged_gets_nothing() {
            let mut guest = guest();
            assert_eq!(guest.round(), (0xff, 2));
            assert!(!guest.is_held());
            guest.room.add(0).unwrap();
            assert_eq!(guest.round(), (0x5a, 0));
            assert!(guest.is_held());
            guest.room.remove(0).unwrap();
            let memory = &guest.machine.memory().clone();
            let region = memory.find_region(GuestAddress(ROOM)).unwrap();
            let slice = region.mapping().unwrap();
            koya_devices::sys::advise(&slice, Advice::PunchHole).unwrap();
            assert_eq!(guest.round(), (0xff, 2));
            assert!(!guest.is_held());
        }

        #[test]
        fn slots_come_and_go_while_the_guest_runs() {
            let mut guest = guest();
            let room = HotplugRange {
                machine: guest.room.machine.clone(),
                ..guest.room
            };
            let enough = Arc::new(AtomicBool::new(false));
            let ends = enough.clone();
            let changes = std::thread::spawn(move || {
                while !ends.load(Ordering::SeqCst) {
                    for index in [1, 0] {
                        room.add(index).unwrap();
                    }
                    for index in [1, 0] {
                        room.remove(index).unwrap();
                    }
                }
            });
            let (mut plugged, mut unplugged) = (0, 0);
            // Changes that failed have ended.
            while plugged.min(unplugged) < 20 && !changes.is_finished() {
                match guest.round().0 {
                    // The write found no memory, and the read found a page of zeros.
                    0x5a | 0 => plugged += 1,
                    0xff => unplugged += 1,
                    other => panic!("{other:#x}"),
                }
            }
            enough.store(true, Ordering::SeqCst);
            changes.join().unwrap();
            assert_eq!(guest.round(), (0xff, 2));
        }

        #[test]
        fn slots_that_can_not_be_are_refused() {
            let guest = guest();
            // Outside the range, over an existing slot, and after the end of the machine.
            assert!(guest.room.add(2).is_err());
            guest.room.add(0).unwrap();
            let over = HotplugRange {
                machine: guest.room.machine.clone(),
                start: ROOM - 0x1000,
                ..guest.room
            };
            assert!(over.add(1).is_err());
            let Guest {
                room,
                machine,
                vcpu,
                ..
            } = guest;
            drop((machine, vcpu));
            assert!(room.add(1).is_err() && room.remove(0).is_err());
        }
    }
}
