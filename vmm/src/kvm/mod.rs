//! Whether there is KVM to use, and why not.
//!
//! The crate's `unsafe` stands in this directory: memory slots (a promise that a mapping outlives its slot),
//! per-thread signals, and the parts of `kvm_run` that the bindings show as unions.

pub(crate) mod machine;
pub(crate) mod vcpu;

pub(crate) use machine::Machine;
pub(crate) use vcpu::{Exit, Kicker, Thread, Vcpu};

use kvm_bindings::KVM_API_VERSION;
use kvm_ioctls::{Cap, Kvm};
use thiserror::Error;

/// Where the host offers KVM.
pub const DEVICE: &str = "/dev/kvm";

/// What Koya needs of KVM, beyond running a guest.
const NEEDED: &[(&str, Cap)] = &[
    ("KVM_CAP_IRQCHIP", Cap::Irqchip),
    ("KVM_CAP_USER_MEMORY", Cap::UserMemory),
    ("KVM_CAP_IOEVENTFD", Cap::Ioeventfd),
    ("KVM_CAP_IRQFD", Cap::Irqfd),
];

/// Why there is no KVM to use; each says what to do.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum KvmError {
    /// No such device.
    #[error(
        "{DEVICE} does not exist: load the kvm_intel or kvm_amd module, or turn virtualization \
         on in the firmware (in a virtual machine: nested virtualization on its host)"
    )]
    NoDevice,
    /// Not allowed to open it.
    #[error("no permission for {DEVICE}: join the group that owns it (usually kvm), or ask root")]
    NoPermission,
    /// Something else.
    #[error("cannot open {DEVICE}")]
    Open(#[source] kvm_ioctls::Error),
    /// An interface from another age.
    #[error("{DEVICE} speaks version {0} of its interface, not {KVM_API_VERSION}")]
    Version(i32),
    /// A part of it is missing.
    #[error("this host's KVM lacks {0}")]
    Missing(&'static str),
}

/// Opens KVM and checks that it has what Koya needs. A start does so by itself.
///
/// # Errors
/// What is missing and what to do about it.
pub fn open() -> Result<Kvm, KvmError> {
    let kvm = open_device()?;
    match missing(&kvm) {
        Some(name) => Err(KvmError::Missing(name)),
        None => Ok(kvm),
    }
}

/// Opens KVM. A start asks what is [`missing`] only when something failed.
pub(crate) fn open_device() -> Result<Kvm, KvmError> {
    let kvm = Kvm::new().map_err(|error| match error.errno() {
        libc::ENOENT | libc::ENXIO | libc::ENODEV => KvmError::NoDevice,
        libc::EACCES | libc::EPERM => KvmError::NoPermission,
        _ => KvmError::Open(error),
    })?;
    let version = kvm.get_api_version();
    if version != KVM_API_VERSION as i32 {
        return Err(KvmError::Version(version));
    }
    Ok(kvm)
}

/// The first of what Koya needs that this KVM does not have.
pub(crate) fn missing(kvm: &Kvm) -> Option<&'static str> {
    // Cap is neither Copy nor Clone; its number is what KVM takes.
    let lacks = |cap: &Cap| kvm.check_extension_raw(cap_number(cap)) <= 0;
    let (name, _) = NEEDED.iter().find(|(_, cap)| lacks(cap))?;
    Some(name)
}

fn cap_number(cap: &Cap) -> libc::c_ulong {
    // SAFETY: Cap is a field-less enum with representation u32, so its bytes are its number.
    let number = unsafe { *std::ptr::from_ref(cap).cast::<u32>() };
    number.into()
}
