//! FUSE requests.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| koya_fuzz::fs_requests(data));
