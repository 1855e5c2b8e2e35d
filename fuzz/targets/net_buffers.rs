//! Buffers and frames of a network.
#![no_main]

libfuzzer_sys::fuzz_target!(init: koya_fuzz::without_sigpipe(), |data: &[u8]| koya_fuzz::net_buffers(data));
