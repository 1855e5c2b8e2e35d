//! `koya volume`: direct volumes.

use super::Outcome;
use super::output::say;
use anyhow::ensure;
use clap::{Args, Subcommand};
use koya::direct_volume::{self, DirectVolume};
use std::path::PathBuf;

#[derive(Args)]
pub(super) struct VolumeArgs {
    #[command(subcommand)]
    command: VolumeCommand,
}

#[derive(Subcommand)]
enum VolumeCommand {
    /// Add a direct volume: in containers created later, a bind mount of PATH is the file system on DEVICE
    Add {
        /// The source path of the bind mount
        path: PathBuf,
        /// A block device or a disk image
        device: PathBuf,
        /// The type of the file system
        #[arg(long, default_value = "ext4", value_name = "NAME")]
        fstype: String,
        /// Add a mount option, such as ro or noatime; may be repeated
        #[arg(short, long = "option", value_name = "OPTION")]
        options: Vec<String>,
    },
    /// Remove a direct volume; existing containers keep it
    Rm {
        /// The source path of the bind mount
        path: PathBuf,
    },
    /// List direct volumes
    Ls,
}

pub(super) fn main(args: VolumeArgs) -> Outcome {
    match args.command {
        VolumeCommand::Add {
            path,
            device,
            fstype,
            options,
        } => {
            ensure!(path.is_absolute(), "{} must be absolute", path.display());
            ensure!(device.exists(), "there is no {}", device.display());
            let mut volume = DirectVolume::new(std::path::absolute(device)?, fstype);
            volume.options = options;
            volume.add(&path)?;
        }
        VolumeCommand::Rm { path } => direct_volume::remove(&path)?,
        VolumeCommand::Ls => {
            for (path, volume) in direct_volume::list() {
                let options = volume.options.join(",");
                let (path, device) = (path.display(), volume.device.display());
                say!("{path}\t{device}\t{}\t{options}", volume.fstype)?;
            }
        }
    }
    Ok(0)
}
