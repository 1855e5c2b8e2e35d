//! Serial ports on a bus.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| koya_fuzz::serial_ports(data));
