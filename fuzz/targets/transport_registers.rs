//! Accesses to a virtio-mmio window.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| koya_fuzz::transport_registers(data));
