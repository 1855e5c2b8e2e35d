//! Descriptor chains of a hostile driver, for libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| koya_fuzz::entropy_requests(data));
