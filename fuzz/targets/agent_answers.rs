//! Answers of an agent.
#![no_main]

libfuzzer_sys::fuzz_target!(init: koya_fuzz::without_sigpipe(), |data: &[u8]| koya_fuzz::agent_answers(data));
