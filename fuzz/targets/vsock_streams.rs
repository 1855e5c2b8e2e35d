//! Streams between guest and host, over many rounds.
#![no_main]

libfuzzer_sys::fuzz_target!(init: koya_fuzz::without_sigpipe(), |data: &[u8]| koya_fuzz::vsock_streams(data));
