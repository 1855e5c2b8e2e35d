//! Lines to a control socket, with descriptors.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| koya_fuzz::control_lines(data));
