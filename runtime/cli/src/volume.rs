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
    /// From now on a bind mount of PATH is the file system on DEVICE, which the guest mounts itself
    Add {
        /// What containers are given as a volume
        path: PathBuf,
        /// A block device, or an image of one
        device: PathBuf,
        /// The file system on it
        #[arg(long, default_value = "ext4", value_name = "NAME")]
        fstype: String,
        /// An option of the mount, such as ro or noatime; may be repeated
        #[arg(short, long = "option", value_name = "OPTION")]
        options: Vec<String>,
    },
    /// PATH is itself again, for containers that are made later
    Rm {
        /// What was added
        path: PathBuf,
    },
    /// List them
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
        VolumeCommand::Rm { path } => direct_volume::forget(&path)?,
        VolumeCommand::Ls => {
            for (path, volume) in direct_volume::all() {
                let options = volume.options.join(",");
                let (path, device) = (path.display(), volume.device.display());
                say!("{path}\t{device}\t{}\t{options}", volume.fstype)?;
            }
        }
    }
    Ok(0)
}
