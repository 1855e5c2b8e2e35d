//! Shared files, with a guest that learns from the replies.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| koya_fuzz::fs_state(data));
