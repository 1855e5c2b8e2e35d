//! Resources that a sandbox holds for a container: shares of host directories, and disks.

use crate::Error;
use crate::block_volume::GuestVolume;
use crate::oci::{self, HostDisk, Share, SharedPlace};
use crate::ref_counted::Ref;
use crate::sandbox::{Disk, Inner};
use koya_protocol::{SHARED_VOLUMES, VOLUMES_DIR, messages};
use koya_rootfs::says_read_only;
use koya_vmm::DiskConfig;
use oci_spec::runtime::Spec;
use std::collections::HashMap;
use std::os::unix::ffi::OsStringExt;
use std::path::Path;

/// Resources that the sandbox holds for a container.
#[derive(Default)]
pub(crate) struct Attachments {
    /// Names of its shares.
    shares: Vec<String>,
    pub(crate) disks: Vec<Ref<Disk>>,
    /// The disk with its root, and whether the guest has mounted it.
    pub(crate) image: Option<(Disk, bool)>,
}

impl Attachments {
    /// Shares the host paths of a configuration, and sets their guest paths in it. Returns the volumes that the guest must
    /// look up itself, since they lie within shares of other containers.
    pub(crate) fn share(
        &mut self,
        inner: &Inner,
        id: &str,
        shares: Vec<Share>,
        spec: &mut Spec,
    ) -> Result<Vec<messages::SharedVolume>, Error> {
        let mut shared = Vec::new();
        for share in &shares {
            let path = &share.path;
            let one = match share.users.clone() {
                Some(users) => inner.shares.share_mapped(path, share.options, users),
                None => inner.shares.share(path, share.options),
            };
            let one = one.map_err(Error::host(format!("share {}", path.display())))?;
            self.shares.push(one.name.clone());
            shared.push(one);
        }
        let mut places = HashMap::new();
        let mut within = Vec::new();
        for (share, shared) in shares.into_iter().zip(shared) {
            // A later share may contain it.
            let path = inner.shares.locate(&shared.name).unwrap_or(shared.path);
            let path = match path.components().count() {
                1 => oci::guest_path(&path),
                _ => {
                    let number = SHARED_VOLUMES + within.len() as u32;
                    within.push(messages::SharedVolume {
                        path: path.into_os_string().into_vec(),
                        number,
                        name: shared.name,
                        ..Default::default()
                    });
                    Path::new(VOLUMES_DIR).join(id).join(number.to_string())
                }
            };
            let read_only = shared.read_only;
            places.insert(share.name, SharedPlace { path, read_only });
        }
        oci::place_shares(spec, &places);
        Ok(within)
    }

    /// Attaches block devices of the host.
    pub(crate) fn attach(
        &mut self,
        inner: &Inner,
        disks: Vec<HostDisk>,
    ) -> Result<Vec<messages::BlockDevice>, Error> {
        let mut devices = Vec::new();
        for disk in disks {
            let what = || format!("find the host's device for {}", disk.path.display());
            let host = disk.host().map_err(|error| Error::host(what())(error))?;
            let name = self.attach_one(inner, &host, disk.read_only)?;
            devices.push(messages::BlockDevice {
                guest_name: name,
                path: disk.path.to_string_lossy().into_owned(),
                read_only: disk.read_only,
                mode: disk.mode,
                uid: disk.uid,
                gid: disk.gid,
                ..Default::default()
            });
        }
        Ok(devices)
    }

    /// Returns the guest's name of the disk.
    fn attach_one(&mut self, inner: &Inner, host: &Path, read_only: bool) -> Result<String, Error> {
        let attached = inner.share_disk(&DiskConfig {
            read_only,
            // The format is known, and the guest may write bytes there that look like another format.
            raw: true,
            ..DiskConfig::new(host)
        })?;
        let name = attached.device().name.clone();
        self.disks.push(attached);
        Ok(name)
    }

    /// Attaches disks whose file systems the guest mounts.
    pub(crate) fn attach_direct(
        &mut self,
        inner: &Inner,
        volumes: Vec<(u32, GuestVolume)>,
    ) -> Result<Vec<messages::DiskVolume>, Error> {
        let mut messages = Vec::new();
        for (number, volume) in volumes {
            let (volume, _made) = volume.make()?;
            let options = volume.options.iter().flat_map(|options| options.split(','));
            let read_only = says_read_only(&options.map(str::to_owned).collect::<Vec<_>>());
            let group = volume.group()?;
            messages.push(messages::DiskVolume {
                group: group.map(|(group, _)| group),
                trust_root: group.is_some_and(|(_, trusts_root)| trusts_root),
                guest_name: self.attach_one(inner, &volume.device, read_only)?,
                number,
                fstype: volume.fstype,
                options: volume.options,
                ..Default::default()
            });
        }
        Ok(messages)
    }

    pub(crate) fn release(self, inner: &Inner, id: &str) {
        inner
            .shares
            .remove_all(self.shares.iter().map(String::as_str));
        for disk in self.disks {
            if let Err(error) = inner.release_disk(disk) {
                end_if_overdue(inner, id, &error);
                log::warn!("a disk of container {id} stays attached: {error}");
            }
        }
        if let Some((disk, is_mounted)) = self.image {
            let unmounted = match is_mounted {
                true => inner.agent.unmount_image(id),
                false => Ok(()),
            };
            if let Err(error) = unmounted.and_then(|()| inner.force_detach_disk(&disk)) {
                end_if_overdue(inner, id, &error);
                // The slot stays taken until the sandbox ends.
                log::warn!("the image of container {id} stays attached: {error}");
            }
        }
    }
}

/// A guest must not keep the disks of a removed container: one that does not respond is ended.
fn end_if_overdue(inner: &Inner, id: &str, error: &Error) {
    if matches!(error, Error::Timeout { .. }) {
        inner
            .terminator
            .give_up(&format!("a disk of container {id}: {error}"));
    }
}
