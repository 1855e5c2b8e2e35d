//! Access to KVM, with explanations if it is unavailable.
//!
//! The crate's `unsafe` code is in this directory: memory slots (a mapping must outlive its slot), per-thread
//! signals, and the fields of `kvm_run` that the bindings expose as unions.

pub(crate) mod machine;
pub(crate) mod vcpu;

pub(crate) use machine::Machine;
pub(crate) use vcpu::{Exit, Kicker, Thread, Vcpu};

use crate::arch;
use kvm_bindings::KVM_API_VERSION;
use kvm_ioctls::{Cap, Kvm};
use thiserror::Error;

/// The KVM device file.
pub const DEVICE: &str = "/dev/kvm";

/// KVM capabilities that Koya needs beyond running a guest.
const REQUIRED_CAPS: &[(&str, Cap)] = &[
    ("KVM_CAP_IRQCHIP", Cap::Irqchip),
    ("KVM_CAP_USER_MEMORY", Cap::UserMemory),
    ("KVM_CAP_IOEVENTFD", Cap::Ioeventfd),
    ("KVM_CAP_IRQFD", Cap::Irqfd),
];

/// The reason why KVM is unavailable; each message names the remedy.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum KvmError {
    /// The device file does not exist.
    #[error("{DEVICE} does not exist: {}", arch::NO_KVM)]
    NoDevice,
    /// No permission to open it.
    #[error("no permission for {DEVICE}: join the group that owns it (usually kvm), or ask root")]
    NoPermission,
    /// Another error on opening it.
    #[error("cannot open {DEVICE}")]
    Open(#[source] kvm_ioctls::Error),
    /// Unsupported KVM API version.
    #[error("{DEVICE} has API version {0}, expected {KVM_API_VERSION}")]
    Version(i32),
    /// A required capability is missing.
    #[error("this host's KVM lacks {0}")]
    Missing(&'static str),
}

/// Opens KVM and checks the capabilities that Koya needs. Not needed before a start, which checks by itself.
///
/// # Errors
/// The missing feature and the remedy.
pub fn open() -> Result<Kvm, KvmError> {
    let kvm = open_device()?;
    match missing(&kvm) {
        Some(name) => Err(KvmError::Missing(name)),
        None => Ok(kvm),
    }
}

/// The host's virtualization features, as a sentence for a report; `None` where all hosts have the same.
pub fn host_features(kvm: &Kvm) -> Option<String> {
    arch::host_features(kvm)
}

/// Opens KVM without checking; a start looks for [`missing`] capabilities only when something failed.
pub(crate) fn open_device() -> Result<Kvm, KvmError> {
    let kvm = Kvm::new().map_err(|error| match error.errno() {
        libc::ENOENT | libc::ENXIO | libc::ENODEV => KvmError::NoDevice,
        libc::EACCES | libc::EPERM => KvmError::NoPermission,
        _ => KvmError::Open(error),
    })?;
    let version = kvm.get_api_version();
    if version < 0 {
        return Err(KvmError::Open(kvm_ioctls::Error::last()));
    }
    if version != KVM_API_VERSION as i32 {
        return Err(KvmError::Version(version));
    }
    Ok(kvm)
}

/// The first required capability that this KVM lacks.
pub(crate) fn missing(kvm: &Kvm) -> Option<&'static str> {
    // Cap is neither Copy nor Clone; KVM's interface takes its number.
    let lacks = |cap: &Cap| kvm.check_extension_raw(cap_number(cap)) <= 0;
    let (name, _) = REQUIRED_CAPS.iter().find(|(_, cap)| lacks(cap))?;
    Some(name)
}

fn cap_number(cap: &Cap) -> libc::c_ulong {
    // SAFETY: Cap is a field-less enum with representation u32, so its bytes are its number.
    let number = unsafe { *std::ptr::from_ref(cap).cast::<u32>() };
    number.into()
}
