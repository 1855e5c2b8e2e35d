//! The interrupt controller, which KVM emulates: GICv3, or GICv2 where the host's hardware has nothing else
//! (Documentation/virt/kvm/devices/arm-vgic-v3.rst and arm-vgic.rst).

use super::super::ArchError;
use super::layout;
use kvm_bindings::{
    KVM_DEV_ARM_VGIC_CTRL_INIT, KVM_DEV_ARM_VGIC_GRP_ADDR, KVM_DEV_ARM_VGIC_GRP_CTRL,
    KVM_DEV_ARM_VGIC_GRP_NR_IRQS, KVM_VGIC_V2_ADDR_TYPE_CPU, KVM_VGIC_V2_ADDR_TYPE_DIST,
    KVM_VGIC_V3_ADDR_TYPE_DIST, KVM_VGIC_V3_ADDR_TYPE_REDIST, kvm_create_device, kvm_device_attr,
    kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V2, kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3,
};
use kvm_ioctls::{DeviceFd, VmFd};

/// The interrupt controller of a machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Interrupts {
    /// GICv2, for up to 8 vCPUs: it addresses them by a byte, one bit per CPU. KVM refuses to create more.
    GicV2,
    /// GICv3.
    #[default]
    GicV3,
}

impl Interrupts {
    /// Creates the version that this host supports. (KVM_CREATE_DEVICE_TEST would only probe, but it returns no descriptor,
    /// and kvm-ioctls would take the number 0 for one and close it.)
    pub(super) fn create(vm: &VmFd) -> Result<(Self, DeviceFd), ArchError> {
        if let Ok(device) = Self::GicV3.device(vm) {
            return Ok((Self::GicV3, device));
        }
        match Self::GicV2.device(vm) {
            Ok(device) => Ok((Self::GicV2, device)),
            Err(_) => Err(ArchError::Unsupported("a host without GICv3 or GICv2")),
        }
    }

    fn device(self, vm: &VmFd) -> Result<DeviceFd, kvm_ioctls::Error> {
        let mut device = kvm_create_device {
            type_: match self {
                Self::GicV2 => kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V2,
                Self::GicV3 => kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3,
            },
            fd: 0,
            flags: 0,
        };
        vm.create_device(&mut device)
    }

    /// Addresses of its register frames, by KVM attribute.
    fn addresses(self) -> [(u32, u64); 2] {
        match self {
            Self::GicV2 => [
                (KVM_VGIC_V2_ADDR_TYPE_DIST, layout::GIC_DISTRIBUTOR),
                (KVM_VGIC_V2_ADDR_TYPE_CPU, layout::GIC_V2_CPU),
            ],
            Self::GicV3 => [
                (KVM_VGIC_V3_ADDR_TYPE_DIST, layout::GIC_DISTRIBUTOR),
                (KVM_VGIC_V3_ADDR_TYPE_REDIST, layout::GIC_REDISTRIBUTORS),
            ],
        }
    }

    /// Initialises the controller for all existing vCPUs. The machine keeps it after its descriptor is closed.
    pub(super) fn initialise(self, device: &DeviceFd) -> Result<(), ArchError> {
        const WHAT: &str = "make the interrupt controller";
        let set = |group: u32, attribute: u32, value: Option<&u64>| {
            let attribute = kvm_device_attr {
                group,
                attr: attribute.into(),
                addr: value.map_or(0, |value| std::ptr::from_ref(value) as u64),
                flags: 0,
            };
            device
                .set_device_attr(&attribute)
                .map_err(ArchError::kvm(WHAT))
        };
        for (attribute, address) in self.addresses() {
            set(KVM_DEV_ARM_VGIC_GRP_ADDR, attribute, Some(&address))?;
        }
        // KVM reads only the lower 32 bits; aarch64 is little-endian.
        let count = u64::from(layout::GIC_INTERRUPTS);
        set(KVM_DEV_ARM_VGIC_GRP_NR_IRQS, 0, Some(&count))?;
        set(KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_VGIC_CTRL_INIT, None)
    }
}
