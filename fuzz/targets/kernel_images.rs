//! Kernel images and initial RAM disks.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| koya_fuzz::kernel_images(data));
