//! Requests to a balloon.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| koya_fuzz::balloon_requests(data));
