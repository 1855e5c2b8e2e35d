//! Settings and annotations.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| koya_fuzz::settings(data));
