//! A balloon, a memory device or an entropy device behind its registers.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| koya_fuzz::life_memory(data));
