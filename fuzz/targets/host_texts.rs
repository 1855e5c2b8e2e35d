//! Tables of mounts, lists of CPUs, sizes, and texts of guests.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| koya_fuzz::host_texts(data));
