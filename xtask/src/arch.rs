//! The architectures that Koya is built for, and the differences in their builds and rigs.

use crate::{apt, cache, proc, setup};
use anyhow::{Result, bail};
use std::path::PathBuf;
use std::process::Command;

/// An architecture of hosts and guests, which is always the same for both.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Arch {
    /// 64-bit x86
    #[value(name = "x86_64")]
    X86_64,
    /// 64-bit Arm
    Aarch64,
}

/// `--arch` of the commands that have it.
#[derive(Clone, Copy, clap::Args)]
pub(crate) struct ArchArgs {
    /// The architecture (default: this machine's)
    #[arg(long, value_enum, value_name = "ARCH")]
    arch: Option<Arch>,
}

impl ArchArgs {
    pub(crate) fn arch(self) -> Arch {
        self.arch.unwrap_or_else(Arch::of_this_machine)
    }
}

impl Arch {
    /// The architecture of this machine.
    pub(crate) fn of_this_machine() -> Self {
        match std::env::consts::ARCH {
            "aarch64" => Self::Aarch64,
            _ => Self::X86_64,
        }
    }

    /// Whether programs for it run on this machine.
    pub(crate) fn is_native(self) -> bool {
        self == Self::of_this_machine()
    }

    /// Its name in `uname -m`.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64",
            Self::Aarch64 => "aarch64",
        }
    }

    /// Debian's name for it.
    pub(crate) fn debian(self) -> &'static str {
        match self {
            Self::X86_64 => "amd64",
            Self::Aarch64 => "arm64",
        }
    }

    /// Rust's target with glibc.
    pub(crate) fn gnu(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64-unknown-linux-gnu",
            Self::Aarch64 => "aarch64-unknown-linux-gnu",
        }
    }

    /// Rust's target with musl.
    pub(crate) fn musl(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64-unknown-linux-musl",
            Self::Aarch64 => "aarch64-unknown-linux-musl",
        }
    }

    /// Cache key for a result of these inputs on this architecture; for the native one, that of the inputs alone.
    pub(crate) fn key(self, inputs: &[&str]) -> String {
        let own = (!self.is_native()).then_some(self.name());
        cache::key(inputs.iter().copied().chain(own))
    }

    /// A directory of the checkout's `target` for results of this architecture; for a foreign one, the name includes the
    /// architecture.
    pub(crate) fn target(self, name: &str) -> PathBuf {
        let own = match self.is_native() {
            true => name.to_owned(),
            false => format!("{name}-{}", self.name()),
        };
        proc::checkout().join("target").join(own)
    }

    /// Build parameters of its guest kernel.
    pub(crate) fn kernel(self) -> KernelBuild {
        match self {
            Self::X86_64 => KernelBuild {
                arch: "x86_64",
                image: "vmlinux",
                compressed: Some("arch/x86/boot/bzImage"),
                config: "guest-kernel/config-x86_64",
            },
            Self::Aarch64 => KernelBuild {
                arch: "arm64",
                image: "arch/arm64/boot/Image",
                compressed: None,
                config: "guest-kernel/config-aarch64",
            },
        }
    }

    /// Prefix of the C compiler and its tools; empty for the native ones.
    pub(crate) fn tools(self) -> String {
        if self.is_native() {
            return String::new();
        }
        format!("{}-linux-gnu-", self.name())
    }

    /// A tool of the C compiler.
    pub(crate) fn tool(self, name: &str) -> Command {
        Command::new(format!("{}{name}", self.tools()))
    }

    /// Installs the compiler and the C library for a foreign architecture.
    pub(crate) fn ensure_tools(self) -> Result<()> {
        if self.is_native() {
            return Ok(());
        }
        match self {
            Self::X86_64 => setup::ensure_these(&[
                ("gcc-x86-64-linux-gnu", "linking for x86_64"),
                ("libc6-dev-amd64-cross", "the C library for x86_64"),
            ]),
            Self::Aarch64 => setup::ensure_these(&[
                ("gcc-aarch64-linux-gnu", "the guest kernel, linking"),
                ("libc6-dev-arm64-cross", "the C library for aarch64"),
            ]),
        }
    }

    /// A cargo command that can build for `target`, one of its two; checks that its standard library is installed.
    pub(crate) fn cargo(self, target: &str) -> Result<Command> {
        let mut cargo = proc::cargo();
        if self.is_native() {
            return Ok(cargo);
        }
        self.ensure_tools()?;
        if !setup::rust_target(target, "programs for it") {
            bail!("Rust's library for {target} can't be had (rustup target add {target})");
        }
        let linker = self.tool("gcc");
        let variable = target.replace('-', "_");
        let of_cargo = format!("CARGO_TARGET_{}_LINKER", variable.to_uppercase());
        cargo.env(of_cargo, linker.get_program());
        cargo.env(format!("CC_{variable}"), linker.get_program());
        Ok(cargo)
    }

    /// Directory of the static libseccomp: the machine's own, or Debian's package unpacked.
    pub(crate) fn seccomp_library(self) -> Result<PathBuf> {
        let multiarch = format!("usr/lib/{}-linux-gnu", self.name());
        if self.is_native() {
            return Ok(PathBuf::from("/").join(multiarch));
        }
        const PACKAGE: &str = "libseccomp-dev";
        let key = cache::key([apt::RELEASE, self.debian(), PACKAGE]);
        let dir = cache::ensure("seccomp", &key, |dir| {
            apt::unpack_for(self, apt::RELEASE, &[PACKAGE], dir)
        })?;
        Ok(dir.join(multiarch))
    }
}

/// Build parameters of the guest kernel for an architecture.
pub(crate) struct KernelBuild {
    /// `ARCH`.
    pub(crate) arch: &'static str,
    /// The bootable image, in the build directory.
    pub(crate) image: &'static str,
    /// The compressed image, for loaders that require it.
    pub(crate) compressed: Option<&'static str>,
    /// Additional configuration fragments for this architecture.
    pub(crate) config: &'static str,
}
