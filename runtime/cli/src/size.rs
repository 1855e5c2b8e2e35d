//! Size of a container's guest: options of `koya run`, and `koya update`.

use super::client;
use super::control::{Answer, Request};
use super::output::{complain, say};
use super::parse::parse_mib;
use super::{FAILED, Outcome};
use anyhow::bail;
use clap::{Args, ValueEnum};
use koya::{HugePages, MemoryBacking, SandboxConfig};

#[derive(Args)]
pub(super) struct SizeArgs {
    /// Set the number of virtual CPUs, 1 to 32
    #[arg(long, value_name = "N", default_value_t = 1)]
    cpus: u32,
    /// Set the maximum number of virtual CPUs for `koya update` (default: that of --cpus)
    #[arg(long, value_name = "N")]
    cpus_max: Option<u32>,
    /// Pin each virtual CPU to a CPU of the host, such as 0,2
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    cpu_pin: Vec<u32>,
    /// Give the guest the Scalable Vector Extension (SVE) of an aarch64 host
    #[arg(long)]
    sve: bool,
    /// Set the memory, in MiB or with a unit (512m, 2g); that of the guest kernel is added
    #[arg(long, short, value_name = "SIZE", default_value = "256m", value_parser = parse_mib)]
    memory: u64,
    /// Set the maximum memory for `koya update` (default: that of --memory)
    #[arg(long, value_name = "SIZE", value_parser = parse_mib)]
    memory_max: Option<u64>,
    /// Set how guest memory is allocated on the host
    #[arg(long, value_name = "KIND", default_value = "anonymous")]
    memory_backing: Backing,
    /// Set the huge pages policy of guest memory
    #[arg(long, value_name = "KIND", default_value = "host")]
    huge_pages: Pages,
}

#[derive(Clone, Copy, ValueEnum)]
enum Backing {
    /// Anonymous memory, private to the process of the sandbox
    Anonymous,
    /// A memory file (memfd), shared
    Memfd,
}

#[derive(Clone, Copy, ValueEnum)]
enum Pages {
    /// The default of the host
    Host,
    /// Transparent huge pages
    Transparent,
    /// Reserved huge pages of the host (vm.nr_hugepages)
    Reserved,
}

impl SizeArgs {
    pub(super) fn set(&self, config: &mut SandboxConfig) {
        config.cpus = self.cpus;
        config.cpus_max = self.cpus_max;
        config.cpu_pins = self.cpu_pin.clone();
        config.sve = self.sve;
        config.memory_mib = self.memory;
        config.memory_max_mib = self.memory_max;
        config.memory_backing = match self.memory_backing {
            Backing::Anonymous => MemoryBacking::Anonymous,
            Backing::Memfd => MemoryBacking::Memfd,
        };
        config.huge_pages = match self.huge_pages {
            Pages::Host => HugePages::Host,
            Pages::Transparent => HugePages::Transparent,
            Pages::Reserved => HugePages::Reserved,
        };
    }
}

#[derive(Args)]
#[group(required = true, multiple = true)]
struct ResizeArgs {
    /// Set the number of online CPUs, up to --cpus-max of `koya run`
    #[arg(long, value_name = "N")]
    cpus: Option<u32>,
    /// Set the memory, up to --memory-max of `koya run`; below its --memory, the balloon takes the rest
    #[arg(long, short, value_name = "SIZE", value_parser = parse_mib)]
    memory: Option<u64>,
}

#[derive(Args)]
pub(super) struct UpdateArgs {
    #[command(flatten)]
    resize: ResizeArgs,
    /// The container
    name: String,
}

/// Granularity of the guest's memory in MiB.
const MEMORY_BLOCK_MIB: u64 = koya::vmm::devices::mem::BLOCK_SIZE >> 20;

/// `koya update`
pub(super) fn update(args: &UpdateArgs) -> Outcome {
    let ResizeArgs { cpus, memory } = args.resize;
    let request = Request::Update {
        cpus,
        memory_mib: memory,
    };
    let (got_cpus, got_memory) = match client::ask(&args.name, &request)? {
        Answer::Size { cpus, memory_mib } => (cpus, memory_mib),
        other => bail!("unexpected reply from container {}: {other:?}", args.name),
    };
    say!("{got_cpus} CPUs, {got_memory} MiB of memory")?;
    let fell_short = cpus.is_some_and(|resize| resize != got_cpus) // Memory is plugged in blocks.
        || memory.is_some_and(|resize| resize.abs_diff(got_memory) >= MEMORY_BLOCK_MIB);
    if fell_short {
        complain!("koya: the guest could not reach the requested size: it still uses the rest");
        return Ok(FAILED);
    }
    Ok(0)
}
