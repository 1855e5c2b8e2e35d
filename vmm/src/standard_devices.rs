//! The devices of a configuration, in the order in which the guest sees those of one kind.

use crate::builder::{StartError, host};
use crate::config::{DiskSpec, Spec};
use crate::hotplug::HotplugSlots;
use crate::kvm::Machine;
use crate::memory;
use koya_devices::balloon::{Balloon, BalloonHandle};
use koya_devices::blk::{Block, BlockHandle};
use koya_devices::mem::MemHandle;
use koya_devices::net::NetHandle;
use koya_devices::rng::{Rng, RngMetrics};
use koya_devices::virtio::{Memory, VirtioDevice};
use koya_devices::vsock::{Ports, UnixSockets, Vsock};
use kvm_ioctls::Kvm;
use std::sync::Arc;

/// Handles of the devices of a running machine.
#[derive(Default)]
pub(crate) struct Handles {
    pub(crate) disks: Vec<BlockHandle>,
    pub(crate) networks: Vec<NetHandle>,
    pub(crate) balloon: Option<BalloonHandle>,
    pub(crate) mem: Option<MemHandle>,
    pub(crate) entropy: Option<Arc<RngMetrics>>,
    pub(crate) hotplug: Option<HotplugSlots>,
}

/// Devices and their handles.
#[derive(Default)]
pub(crate) struct StandardDevices {
    pub(crate) devices: Vec<Box<dyn VirtioDevice>>,
    pub(crate) handles: Handles,
    pub(crate) sockets: Option<UnixSockets>,
}

impl StandardDevices {
    /// Creates the devices of a configuration and takes over its open files.
    ///
    /// # Errors
    /// The error from the host.
    pub(crate) fn make(
        spec: &mut Spec,
        kvm: &Kvm,
        machine: &Arc<Machine>,
        memory: &Arc<Memory>,
    ) -> Result<Self, StartError> {
        let mut all = Self::default();
        for spec in std::mem::take(&mut spec.disks) {
            let disk = make_disk(spec)?;
            all.handles.disks.push(disk.handle());
            all.devices.push(Box::new(disk));
        }
        for network in std::mem::take(&mut spec.networks) {
            all.handles.networks.push(network.handle());
            all.devices.push(Box::new(network));
        }
        if let Some(vsock) = &spec.vsock {
            let ports = Ports::new().map_err(host("make the vsock device"))?;
            let sockets = UnixSockets::listen(&ports, &vsock.socket);
            all.sockets = Some(sockets.map_err(host("listen on the vsock's socket"))?);
            all.devices
                .push(Box::new(Vsock::new(vsock.cid.into(), ports)));
        }
        if spec.balloon {
            let balloon = Balloon::new().map_err(host("make the balloon"))?;
            all.handles.balloon = Some(balloon.handle());
            all.devices.push(Box::new(balloon));
        }
        let mem = memory::device(&spec.memory, kvm, machine, memory);
        if let Some(mem) = mem.map_err(host("make the memory device"))? {
            all.handles.mem = Some(mem.handle());
            all.devices.push(Box::new(mem));
        }
        if spec.entropy {
            let entropy = Rng::default();
            all.handles.entropy = Some(entropy.metrics());
            all.devices.push(Box::new(entropy));
        }
        Ok(all)
    }
}

/// Creates a disk from its configuration.
///
/// # Errors
/// The error from the host.
pub(crate) fn make_disk(spec: DiskSpec) -> Result<Block, StartError> {
    let disk = Block::new(spec.disk, spec.queues).map_err(host("make a disk"))?;
    Ok(disk.with_engine(spec.engine).with_limits(spec.limits))
}
