#![no_main]

#[path = "../src/fuzzer.rs"]
mod fuzzer;

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzzer::run("safetensors", data));
