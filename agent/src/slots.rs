//! MMIO slots of the guest's virtio devices: those of hot-plug slots are probed and released on request.

use anyhow::{Context, Result};
use koya_protocol::ErrorReason;
use std::fs;
use std::path::{Path, PathBuf};

/// Directory of the driver for virtio-mmio slots.
const DRIVER: &str = "/sys/bus/platform/drivers/virtio-mmio";
/// Directory of its slots, among other devices.
const DEVICES: &str = "/sys/bus/platform/devices";

/// The kernel's name of a slot.
pub(crate) fn name(slot: u32) -> Result<String> {
    let entries = fs::read_dir(DEVICES).with_context(|| format!("no {DEVICES}"))?;
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let name = named(slot, names);
    name.ok_or_else(|| ErrorReason::NotFound(format!("the guest has no slot {slot}")).into())
}

/// The name of a slot, found in a list of all devices. With a command line, slots are numbered; with a device tree, they are
/// named by address, in the order of their numbers.
fn named(slot: u32, devices: impl Iterator<Item = String>) -> Option<String> {
    let numbered = format!("virtio-mmio.{slot}");
    let mut placed = Vec::new();
    for name in devices {
        if name == numbered {
            return Some(name);
        }
        if let Some(address) = name.strip_suffix(".virtio_mmio")
            && let Ok(address) = u64::from_str_radix(address, 16)
        {
            placed.push((address, name));
        }
    }
    placed.sort_unstable();
    let (_, name) = placed.into_iter().nth(usize::try_from(slot).ok()?)?;
    Some(name)
}

/// Whether the slot with this name holds a device with a driver.
pub(crate) fn is_bound(slot: &str) -> bool {
    Path::new(DEVICES).join(slot).join("driver").exists()
}

/// The directory of the virtio device in the slot with this name.
pub(crate) fn device(slot: &str) -> Result<PathBuf> {
    let device = first_entry(&Path::new(DEVICES).join(slot), "virtio")?;
    device.context("the slot has no device")
}

/// An entry of a directory whose name begins with `prefix`.
pub(crate) fn first_entry(directory: &Path, prefix: &str) -> Result<Option<PathBuf>> {
    let entries = fs::read_dir(directory);
    let entries = entries.with_context(|| format!("no {}", directory.display()))?;
    let mut paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    Ok(paths.find(|path| {
        let name = path.file_name().unwrap_or_default();
        name.to_string_lossy().starts_with(prefix)
    }))
}

/// Makes the kernel probe a slot that was empty; returns the kernel's name of the slot.
pub(crate) fn probe(slot: u32, what: &str) -> Result<String> {
    let name = name(slot)?;
    fs::write(format!("{DRIVER}/bind"), &name)
        .with_context(|| format!("the kernel finds no {what} in slot {slot}"))?;
    Ok(name)
}

/// Makes the kernel release the device in a slot, whatever it is. An empty slot is not an error.
pub(crate) fn release(slot: u32) -> Result<()> {
    let slot = name(slot)?;
    match is_bound(&slot) {
        true => unbind(&slot),
        false => Ok(()),
    }
}

/// Makes the kernel release the device in the slot with this name.
pub(crate) fn unbind(slot: &str) -> Result<()> {
    fs::write(format!("{DRIVER}/unbind"), slot)
        .with_context(|| format!("the kernel does not release slot {slot}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_found_by_number_or_by_the_order_of_their_addresses() {
        let of = |slot, names: &[&str]| named(slot, names.iter().map(|name| (*name).into()));
        let numbered = ["serial8250", "virtio-mmio.1", "virtio-mmio.10"];
        assert_eq!(of(1, &numbered).as_deref(), Some("virtio-mmio.1"));
        assert_eq!(of(0, &numbered), None);
        let placed = [
            "9000000.serial",
            "100040000.virtio_mmio",
            "40001000.virtio_mmio",
            "40000000.virtio_mmio",
            "timer",
        ];
        assert_eq!(of(0, &placed).as_deref(), Some("40000000.virtio_mmio"));
        assert_eq!(of(2, &placed).as_deref(), Some("100040000.virtio_mmio"));
        assert_eq!(of(3, &placed), None);
    }
}
