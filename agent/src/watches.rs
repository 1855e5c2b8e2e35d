//! Changes on the host to shared files that the guest watches: makes the kernel fire its watches.

use crate::sys;
use anyhow::{Context, Result};
use koya_protocol::SHARED_DIR;
use koya_protocol::messages::HostEvent;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;

/// Fires each event, in order. Events that are too late for their node are dropped.
pub(crate) fn fire(events: &[HostEvent]) -> Result<()> {
    let root = File::open(SHARED_DIR).with_context(|| format!("cannot open {SHARED_DIR}"))?;
    let mut first = Ok(());
    for event in events {
        let fired = sys::fire_host_event(
            root.as_fd(),
            event.nodeid,
            event.mask,
            event.cookie,
            &event.name,
        );
        match fired {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                let error = Err(error).context("the kernel refuses an event of the host's");
                first = first.and(error);
            }
            _ => {}
        }
    }
    first
}
