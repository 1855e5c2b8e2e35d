//! Parts of the library, for fuzz targets. Not part of the API: they change without notice.

use crate::account::Accounts;
use crate::agent::Agent;
use crate::oci::{Root, adapt};
use crate::sync::lock;
use crate::{Bundle, Error};
use std::collections::VecDeque;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// The guest's configuration of a container as JSON, and the host directories that it shares. `passwd` and `groups` are the
/// contents of `/etc/passwd` and `/etc/group` in its root.
///
/// # Errors
/// The unsupported part of the bundle.
pub fn adapted(
    id: &str,
    bundle: Bundle,
    passwd: String,
    groups: String,
) -> Result<(String, Vec<PathBuf>), Error> {
    let adapted = adapt(id, bundle, Root::Directory, &Accounts { passwd, groups })?;
    let text = serde_json::to_string(&adapted.spec);
    let shares = adapted.shares.into_iter().map(|share| share.path);
    let text = text.map_err(Error::invalid_by("config.json", "it can't be written"))?;
    Ok((text, shares.collect()))
}

/// The in-memory volume that contains a path, according to a mount table, and the path within it.
pub fn volume_in_memory(table: &str, source: &Path) -> Option<(PathBuf, PathBuf)> {
    let (_, volume, within) = crate::ephemeral::find(table, source)?;
    Some((volume, within))
}

/// Sends the agent at the other end of `stream` a sequence of requests, selected by these numbers, until one fails because
/// the agent has hung up. Returns the error messages of the others.
pub fn ask_agent(stream: UnixStream, what: &[u8]) -> Vec<String> {
    let Ok((agent, _connection)) = Agent::connect(stream) else {
        return Vec::new();
    };
    // The reader in ttrpc's client uses its descriptor by number, possibly even after the last client has closed it: it
    // would then take bytes of the next connection.
    static RECENT: Mutex<VecDeque<Agent>> = Mutex::new(VecDeque::new());
    let mut recent = lock(&RECENT);
    recent.push_back(agent.clone());
    let surplus = recent.len().saturating_sub(64);
    recent.drain(..surplus);
    drop(recent);
    let mut refusals = Vec::new();
    for number in what {
        let id = "container";
        let answer = match number % 16 {
            0 => agent.details().map(drop),
            1 => agent.start(id),
            2 => agent.signal(id, "", 9, true),
            3 => agent.pause(id),
            4 => agent.container_stats(id).map(drop),
            5 => agent.wait(id, "exec").map(drop),
            6 => agent.has_ended(id),
            7 => agent.resize(id, "", 24, 80),
            8 => agent.set_time().map(drop),
            9 => agent.clock().map(drop),
            10 => agent.accounts(id).map(drop),
            11 => agent.attach_disk(1).map(drop),
            12 => agent.next_oom().map(drop),
            13 => agent.update_container(id, b"{}".to_vec()),
            14 => agent.set_online_cpus(2),
            _ => agent.remove(id),
        };
        match answer {
            Ok(()) => {}
            Err(Error::AgentDisconnected { .. }) => break,
            Err(error) => refusals.push(error.to_string()),
        }
    }
    refusals
}
