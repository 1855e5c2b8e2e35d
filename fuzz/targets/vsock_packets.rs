//! vsock packets.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| koya_fuzz::vsock_packets(data));
