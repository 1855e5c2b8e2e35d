//! Layers of an image.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| koya_fuzz::image_layers(data));
