//! A disk behind its registers: set up, used, broken, reset, saved and restored.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| koya_fuzz::life_block(data));
