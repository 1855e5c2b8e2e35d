//! Images: their documents, archives and layers.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| koya_fuzz::image_files(data));
