//! Buffers and frames of a network.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| koya_fuzz::net_buffers(data));
