//! The fuzz targets, as plain functions over bytes.
//!
//! `cargo xtask fuzz` runs them with libFuzzer (one file in `targets` each); the tests below replay inputs of past bugs, and
//! a few thousand random ones, on any machine.

#[cfg(test)]
mod chains;
mod devices;
mod directories;
mod files;
mod host;
mod hosts;
mod images;
mod input;
mod lives;
mod machine;
mod pool;
mod requests;
mod saved;
mod streams;
mod user;

pub use devices::{
    balloon_requests, block_requests, entropy_requests, fs_requests, mem_requests, net_buffers,
    transport_registers, vsock_packets,
};
pub use files::fs_state;
pub use host::{agent_answers, control_lines, host_texts, oci_configurations, settings};
pub use images::{image_files, image_layers};
pub use lives::{life_block, life_files, life_memory, life_net, life_vsock};
pub use machine::{kernel_images, panic_logs, serial_ports};
pub use streams::vsock_streams;

use koya_devices::test_utils::MEMORY_SIZE;
use koya_devices::virtio::Chain;
use pool::Guest;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// Makes writes to a closed socket return an error, as in programs started by Rust's own `main`.
///
/// # Panics
/// If the signal handler cannot be set.
pub fn without_sigpipe() {
    let seen = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register(signal_hook::consts::SIGPIPE, seen).expect("a handler");
}

/// Checks that a text has no control characters.
///
/// # Panics
/// If it has any.
pub(crate) fn assert_plain(text: &str) {
    let is_plain = |char: char| !char.is_control() || char == '\n' || char == '\t';
    assert!(text.chars().all(is_plain), "{text:?}");
}

/// A driver that writes arbitrary descriptors, indirect tables and available rings: the device must end each chain, stay
/// inside memory, and never panic.
///
/// Each 16 bytes are one descriptor as written by the driver, except that addresses are moved near the end of memory, and
/// indices near that of the table, to keep the search effective.
pub fn descriptor_chain(data: &[u8]) {
    const QUEUE: u16 = 16;
    const TABLE: u64 = 0x8000;
    let mut driver = Guest::new(QUEUE);
    let mut entries = Vec::new();
    for bytes in data.chunks_exact(16) {
        let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let address = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes"));
        let len = u32::from_le_bytes(bytes[8..12].try_into().expect("four bytes"));
        let near = address % (MEMORY_SIZE as u64 + 4096);
        let len = if bytes[8] % 4 == 0 { len } else { len % 8192 };
        entries.push((near, len, word(12) & 7, word(14) % (QUEUE + 2)));
        driver.lease().touch(near, len.into());
    }
    for (index, entry) in entries.iter().enumerate().take(QUEUE.into()) {
        driver.set_descriptor(index as u16, entry.0, entry.1, entry.2, entry.3);
    }
    if let Some(rest) = entries.get(usize::from(QUEUE)..)
        && !rest.is_empty()
    {
        driver.lease().touch(TABLE, 16 * rest.len() as u64);
        driver.set_indirect(0, TABLE, rest);
    }
    for head in 0..QUEUE {
        driver.make_available(head);
    }
    if let Some(last) = data.last()
        && last % 8 == 0
    {
        driver.set_available_index(u16::from(*last) * 257);
    }
    let mut queue = driver.queue();
    let memory = driver.memory().clone();
    let mut limit = MOST_COPIED;
    for _ in 0..2 * QUEUE {
        let Ok(Some(chain)) = queue.pop() else { return };
        use_chain(&chain, &memory, &mut limit);
        if queue.complete(chain.head(), chain.writable_len()).is_err() {
            return;
        }
    }
}

/// Maximum number of bytes copied by an input: chains may overlap, and be many.
const MOST_COPIED: u32 = 64 << 10;

/// Reads and writes everything in a checked chain, up to this limit at its start and at its end, and tries to access more.
fn use_chain(chain: &Chain, memory: &koya_devices::virtio::Memory, limit: &mut u32) {
    let mut part = |all: u32| {
        let len = all.min(*limit / 2);
        *limit -= len;
        (len as usize, all - len)
    };
    let (len, at) = part(chain.readable_len());
    let mut bytes = vec![0; len];
    chain.read(memory, 0, &mut bytes).expect("what it offers");
    chain.read(memory, at, &mut bytes).expect("what it offers");
    let (len, at) = part(chain.writable_len());
    let bytes = vec![0x5a; len];
    chain.write(memory, 0, &bytes).expect("what it offers");
    chain.write(memory, at, &bytes).expect("what it offers");
    assert!(chain.read(memory, chain.readable_len(), &mut [0]).is_err());
    assert!(chain.write(memory, chain.writable_len(), &[0]).is_err());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn descriptor(address: u64, len: u32, flags: u16, next: u16) -> Vec<u8> {
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        bytes
    }

    #[test]
    fn known_inputs() {
        let inputs: Vec<Vec<u8>> = vec![
            vec![],
            vec![0; 16],
            vec![0xff; 16 * 40],
            // A chain that points to itself.
            descriptor(0x1000, 1, 1, 0),
            // A buffer that crosses the end of memory, and one that wraps around the address space.
            descriptor(MEMORY_SIZE as u64 - 1, 2, 0, 0),
            descriptor(u64::MAX, 4, 0, 0),
            // A readable descriptor after a writable one.
            [descriptor(0x1000, 8, 3, 1), descriptor(0x2000, 8, 0, 0)].concat(),
        ];
        for input in inputs {
            descriptor_chain(&input);
        }
    }

    /// Calls `target` with `rounds` pseudorandom inputs, the same in each run.
    pub(crate) fn random(rounds: u64, target: fn(&[u8])) {
        let mut state = 0x2545_f491_4f6c_dd1du64;
        for round in 0..rounds {
            let mut input = Vec::new();
            for _ in 0..(round % 48) * 2 {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                input.extend(state.to_le_bytes());
            }
            target(&input);
        }
    }

    #[test]
    fn random_chains() {
        random(3000, descriptor_chain);
    }

    #[test]
    fn random_block_requests() {
        random(400, block_requests);
    }

    #[test]
    fn random_net_buffers() {
        random(400, net_buffers);
    }

    #[test]
    fn random_mem_requests() {
        random(400, mem_requests);
    }

    #[test]
    fn random_entropy_requests() {
        random(200, entropy_requests);
    }

    #[test]
    fn random_fs_requests() {
        random(300, fs_requests);
    }

    #[test]
    fn random_vsock_packets() {
        random(300, vsock_packets);
    }

    #[test]
    fn random_vsock_streams() {
        random(400, vsock_streams);
    }

    #[test]
    fn random_lives() {
        for life in [life_block, life_files, life_memory, life_net, life_vsock] {
            random(150, life);
        }
    }

    #[test]
    fn random_texts() {
        for target in [
            agent_answers,
            control_lines,
            host_texts,
            kernel_images,
            oci_configurations,
            panic_logs,
            serial_ports,
            settings,
        ] {
            random(400, target);
        }
    }

    #[test]
    fn random_requests_about_files() {
        random(300, fs_state);
    }

    #[test]
    fn random_transport_registers() {
        random(400, transport_registers);
    }

    #[test]
    fn random_balloon_requests() {
        random(400, balloon_requests);
    }
}
