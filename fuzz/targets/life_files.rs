//! Shared files behind their registers.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| koya_fuzz::life_files(data));
