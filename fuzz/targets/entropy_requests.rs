//! Buffers for random bytes.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| koya_fuzz::entropy_requests(data));
