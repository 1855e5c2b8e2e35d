//! The kernel's log after a panic.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| koya_fuzz::panic_logs(data));
