//! Models of the emulated Arm host: its CPU and its interrupt controller.

use crate::arch::Arch;
use anyhow::{Result, bail};

/// `--cpu` and `--gic` of the commands that start an emulated aarch64 host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::Args)]
pub(crate) struct Model {
    /// CPU of the emulated aarch64 host [default: max]
    #[arg(long, value_enum, value_name = "CPU")]
    cpu: Option<Cpu>,
    /// Version of its interrupt controller, 2 or 3 [default: 3]; with version 2, hosts and guests have up to 8 CPUs
    #[arg(long, value_name = "VERSION", value_parser = clap::value_parser!(u8).range(2..=3))]
    gic: Option<u8>,
}

/// CPUs of an emulated aarch64 host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
enum Cpu {
    /// All that QEMU emulates, but pointer authentication and 52-bit addresses, which are slow; KVM runs in EL2 (VHE)
    #[default]
    Max,
    /// Armv8.0 with 40-bit addresses; KVM has only a part of it in EL2 (nVHE)
    CortexA53,
    /// Armv8.0 with 44-bit addresses; nVHE
    CortexA72,
    /// Armv8.2 with 48-bit addresses; VHE
    NeoverseN1,
}

/// Maximum number of CPUs that a GICv2 can address.
const MAX_V2_CPUS: u32 = 8;

impl Model {
    /// A host like small boards of some years ago.
    pub(crate) const SMALL: Self = Self {
        cpu: Some(Cpu::CortexA72),
        gic: Some(2),
    };

    /// Whether an option was given.
    pub(crate) fn is_chosen(self) -> bool {
        self != Self::default()
    }

    /// Refuses options that this architecture's host does not have.
    pub(crate) fn check(self, arch: Arch, cpus: u32) -> Result<()> {
        if self.is_chosen() && arch != Arch::Aarch64 {
            bail!(
                "--cpu and --gic select an emulated aarch64 host, not one of {}: add --arch aarch64",
                arch.name()
            );
        }
        if self.gic == Some(2) && cpus > MAX_V2_CPUS {
            bail!("--cpus {cpus}: with --gic 2, a host has at most {MAX_V2_CPUS} CPUs");
        }
        Ok(())
    }

    /// QEMU's options for the machine and its CPU.
    ///
    /// Emulating pointer authentication makes everything three to four times as slow; with LPA2, addresses of guests have
    /// 52 bits instead of 48.
    pub(crate) fn aarch64(self) -> Vec<String> {
        let gic = self.gic.unwrap_or(3);
        let cpu = match self.cpu.unwrap_or_default() {
            Cpu::Max => "max,pauth=off,lpa2=off",
            Cpu::CortexA53 => "cortex-a53",
            Cpu::CortexA72 => "cortex-a72",
            Cpu::NeoverseN1 => "neoverse-n1",
        };
        let machine = format!("virt,virtualization=on,gic-version={gic}");
        ["-M", &machine, "-cpu", cpu].map(str::to_owned).into()
    }

    /// These options again, for a command that starts a rig.
    pub(crate) fn words(self) -> Vec<String> {
        let cpu = self.cpu.and_then(|cpu| {
            let name = clap::ValueEnum::to_possible_value(&cpu)?;
            Some(["--cpu".to_owned(), name.get_name().to_owned()])
        });
        let gic = self.gic.map(|gic| ["--gic".to_owned(), gic.to_string()]);
        cpu.into_iter().chain(gic).flatten().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_is_passed_on_as_it_was_given() {
        assert_eq!(Model::SMALL.words(), ["--cpu", "cortex-a72", "--gic", "2"]);
        assert!(Model::default().words().is_empty());
        let machine = Model::SMALL.aarch64();
        assert_eq!(
            machine,
            [
                "-M",
                "virt,virtualization=on,gic-version=2",
                "-cpu",
                "cortex-a72"
            ]
        );
    }

    #[test]
    fn impossible_hosts_are_refused() {
        assert!(Model::SMALL.check(Arch::Aarch64, 8).is_ok());
        let error = Model::SMALL
            .check(Arch::Aarch64, 9)
            .unwrap_err()
            .to_string();
        assert!(error.contains("at most 8 CPUs"), "{error}");
        let error = Model::SMALL.check(Arch::X86_64, 1).unwrap_err().to_string();
        assert!(error.contains("--arch aarch64"), "{error}");
        assert!(Model::default().check(Arch::X86_64, 64).is_ok());
    }
}
