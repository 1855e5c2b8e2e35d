//! Platform-specific parts of the emulated hosts.

use super::model::Model;
use crate::arch::Arch;

/// The emulated host of an architecture.
pub(super) struct Platform {
    /// Its QEMU program.
    pub(super) qemu: &'static str,
    /// Debian packages of that program.
    pub(super) qemu_packages: &'static [&'static str],
    /// QEMU's options for its machine and CPU.
    machine: fn(Model) -> Vec<String>,
    /// Parameters of its kernel.
    pub(super) cmdline: &'static str,
    /// Additional modules of its kernel.
    pub(super) modules: &'static [&'static str],
    /// Name of its virtualization.
    pub(super) virtualization: &'static str,
}

impl Platform {
    pub(super) fn of(arch: Arch) -> &'static Self {
        match arch {
            Arch::X86_64 => &X86_64,
            Arch::Aarch64 => &AARCH64,
        }
    }

    /// QEMU's options for its machine and CPU.
    pub(super) fn machine(&self, model: Model) -> Vec<String> {
        (self.machine)(model)
    }
}

/// On CPUs with fast string instructions, kernels clear and copy pages byte by byte, which is slow in an emulator; worse,
/// each byte is a slow store while the page contains translated code, as do most pages used by a guest. Five-level page
/// tables make page walks longer. Without both, a container starts in half the time.
const X86_64: Platform = Platform {
    qemu: "qemu-system-x86_64",
    qemu_packages: &["qemu-system-x86", "qemu-system-data", "seabios"],
    machine: |_| {
        let cpu = "max,-erms,-fsrm,-fsrs,-fzrm,-la57";
        ["-M", "q35", "-cpu", cpu].map(str::to_owned).into()
    },
    // A hung rig is sent an NMI, so that its kernel prints a backtrace.
    cmdline: "console=ttyS0 quiet panic=-1 unknown_nmi_panic=1 mitigations=off",
    modules: &["kvm-amd"],
    virtualization: "nested SVM",
};

/// KVM is built into its kernel, which starts in EL2.
const AARCH64: Platform = Platform {
    qemu: "qemu-system-aarch64",
    qemu_packages: &["qemu-system-arm", "qemu-system-data"],
    machine: Model::aarch64,
    cmdline: "console=ttyAMA0 quiet panic=-1 mitigations=off",
    modules: &["virtio_pci", "virtio_console"],
    virtualization: "EL2",
};

/// Debian packages that a rig of another architecture needs in its own version: their programs are laid over the machine's
/// own. `cargo xtask setup` lists the purpose of each.
pub(super) const PROGRAMS: &[&str] = &[
    "aardvark-dns",
    "apparmor",
    "base-files",
    "bash",
    "bsdutils",
    "busybox-static",
    "catatonit",
    "conmon",
    "containerd",
    "containernetworking-plugins",
    "coreutils",
    "crun",
    "dash",
    "diffutils",
    "dmsetup",
    "e2fsprogs",
    "erofs-utils",
    "findutils",
    "grep",
    "gzip",
    "hostname",
    "iproute2",
    "iptables",
    "kmod",
    "libc-bin",
    "mawk",
    "mount",
    "ncurses-bin",
    "netavark",
    "netbase",
    "passt",
    "perl-base",
    "podman",
    "procps",
    "python3-minimal",
    "runc",
    "sed",
    "slirp4netns",
    "socat",
    "squashfs-tools",
    "strace",
    "stress-ng",
    "tar",
    "uidmap",
    "umoci",
    "util-linux",
    "xz-utils",
    "zstd",
];
