//! OCI configurations and the accounts of images.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| koya_fuzz::oci_configurations(data));
