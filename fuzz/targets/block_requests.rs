//! Requests to a disk.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| koya_fuzz::block_requests(data));
