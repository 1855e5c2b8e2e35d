//! `koya disk`: disks of a running container.

use super::Outcome;
use super::client;
use super::control::{Answer, Request};
use super::output::say;
use super::parse::parse_disk;
use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use koya::vmm::host::sync::lock;
use koya::{Container, Disk, DiskConfig, Sandbox};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

#[derive(Args)]
pub(super) struct DiskArgs {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Attach a disk to a running container, and print its path in the container
    Attach {
        /// The container
        name: String,
        /// A raw disk image or block device of the host, with the options of `koya run --disk`
        #[arg(value_name = "PATH[:OPTIONS]", value_parser = parse_disk)]
        disk: DiskConfig,
    },
    /// Detach a disk; refused while it is mounted
    Detach {
        /// Detach it even if the guest still uses it after 10 s: unwritten data is lost
        #[arg(long)]
        force: bool,
        /// The container
        name: String,
        /// The path of the disk in the container
        #[arg(value_name = "/dev/vdX")]
        device: PathBuf,
    },
    /// Announce the new size of a disk that has grown
    Refresh {
        /// The container
        name: String,
        /// The path of the disk in the container
        #[arg(value_name = "/dev/vdX")]
        device: PathBuf,
    },
}

/// A request for a running container's disks.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum DiskRequest {
    Attach(DiskConfig),
    Detach { device: PathBuf, force: bool },
    Refresh(PathBuf),
}

/// `koya disk`
pub(super) fn main(args: &DiskArgs) -> Outcome {
    let (name, request) = match &args.command {
        Command::Attach { name, disk } => {
            let path = std::path::absolute(&disk.path)?;
            let disk = DiskConfig {
                path,
                ..disk.clone()
            };
            (name, DiskRequest::Attach(disk))
        }
        Command::Detach {
            name,
            device,
            force,
        } => {
            let (device, force) = (device.clone(), *force);
            (name, DiskRequest::Detach { device, force })
        }
        Command::Refresh { name, device } => (name, DiskRequest::Refresh(device.clone())),
    };
    match client::ask(name, &Request::Disk(request))? {
        Answer::Device(path) => say!("{}", path.display())?,
        Answer::Done(_) => {}
        other => bail!("unexpected reply from container {name}: {other:?}"),
    }
    Ok(0)
}

/// Disks attached to a running container.
#[derive(Default)]
pub(super) struct Disks(Mutex<Vec<Disk>>);

impl Disks {
    /// Executes a request; returns the path of an attached disk in the container.
    pub(super) fn carry_out(
        &self,
        request: &DiskRequest,
        container: &Container,
        sandbox: &Sandbox,
    ) -> Result<Option<PathBuf>> {
        let mut disks = lock(&self.0);
        match request {
            DiskRequest::Attach(config) => {
                let disk = sandbox.attach_disk(config)?;
                if let Err(error) = container.add_device(disk.device()) {
                    if sandbox.detach_disk(&disk).is_err() {
                        // It is in use in the guest: it can be detached by name later.
                        disks.push(disk);
                    }
                    return Err(error.into());
                }
                let path = disk.device().path.clone();
                disks.push(disk);
                Ok(Some(path))
            }
            DiskRequest::Detach {
                device: path,
                force,
            } => {
                let at = disks.iter().position(|disk| disk.device().path == *path);
                let at = at.with_context(|| format!("{} was not attached", path.display()))?;
                match force {
                    true => sandbox.force_detach_disk(&disks[at])?,
                    false => sandbox.detach_disk(&disks[at])?,
                }
                container.remove_device(disks.remove(at).device())?;
                Ok(None)
            }
            DiskRequest::Refresh(path) => {
                let handle = match disks.iter().find(|disk| disk.device().path == *path) {
                    Some(disk) => disk.handle().clone(),
                    None => from_start(container, sandbox, path)?,
                };
                handle.refresh()?;
                Ok(None)
            }
        }
    }
}

/// A disk that was attached at the start.
fn from_start(
    container: &Container,
    sandbox: &Sandbox,
    path: &Path,
) -> Result<koya::vmm::devices::blk::BlockHandle> {
    let devices = container.config().map(|config| config.devices.as_slice());
    let mut devices = devices.unwrap_or_default().iter();
    let index = devices.position(|device| device.path == *path);
    let disk = index.and_then(|index| sandbox.machine().disks().get(index));
    disk.cloned()
        .with_context(|| format!("the container has no disk {}", path.display()))
}
