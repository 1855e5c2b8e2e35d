//! Sockets between guest and host behind their registers.
#![no_main]

libfuzzer_sys::fuzz_target!(init: koya_fuzz::without_sigpipe(), |data: &[u8]| koya_fuzz::life_vsock(data));
