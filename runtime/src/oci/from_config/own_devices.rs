//! User-defined devices of the guest: nodes and the rules that allow access to them.

use crate::oci::devices::guest_number;
use crate::oci::paths::{absolute, text};
use crate::{ContainerConfig, Error};
use serde_json::{Value, json};
use std::path::Path;

/// The nodes, and the rules of the control group for them.
///
/// # Errors
/// The device that the guest does not have, or the invalid access or path.
pub(super) fn of(config: &ContainerConfig) -> Result<(Vec<Value>, Vec<Value>), Error> {
    let (mut nodes, mut rules) = (Vec::new(), Vec::new());
    for device in &config.guest_devices {
        let (major, minor) = guest_number(&device.node)?;
        let access = &device.access;
        if access.is_empty() || access.contains(|c| !matches!(c, 'r' | 'w' | 'm')) {
            let reason = format!("the access {access:?} is not made of the letters r, w and m");
            return Err(Error::invalid("device", reason));
        }
        let path = koya_rootfs::plain(Path::new(absolute("device", &device.path)?));
        let path = text("device", &path)?;
        if path == "/" || path == "/dev" || nodes.iter().any(|node: &Value| node["path"] == path) {
            let reason = format!("{path} is taken");
            return Err(Error::invalid("device", reason));
        }
        nodes.push(json!({
            "path": path, "type": "c", "major": major, "minor": minor,
            "fileMode": mode_of(&device.node), "uid": 0, "gid": 0,
        }));
        rules.push(json!({
            "allow": true, "type": "c", "major": major, "minor": minor, "access": access,
        }));
    }
    Ok((nodes, rules))
}

/// Access by the users of the container. The kernel's log is root's to write.
fn mode_of(node: &Path) -> u32 {
    match node == Path::new("/dev/kmsg") {
        true => 0o644,
        false => 0o666,
    }
}
