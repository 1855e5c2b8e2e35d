//! What a container needs in the guest.

use crate::oci::SharedNamespaces;
use koya_protocol::messages;

/// Requirements of a container in the guest beyond its OCI configuration.
#[derive(Default)]
pub(crate) struct GuestResources {
    pub(crate) devices: Vec<messages::BlockDevice>,
    pub(crate) volumes: Vec<messages::EphemeralVolume>,
    pub(crate) direct: Vec<messages::DiskVolume>,
    pub(crate) shared: Vec<messages::SharedVolume>,
    pub(crate) namespaces: SharedNamespaces,
    /// Whether it has a device node for every device of the guest.
    pub(crate) guest_devices: bool,
    /// Whether terminals are not among these.
    pub(crate) omit_terminals: bool,
    pub(crate) files: Vec<messages::File>,
}
