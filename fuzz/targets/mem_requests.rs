//! Requests to plug and unplug memory.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| koya_fuzz::mem_requests(data));
