//! The header parser against the `safetensors` crate: same verdict, same rows, and no panic.

#![no_main]

#[path = "../../rust/moecore/tests/header_oracle/mod.rs"]
mod header_oracle;

libfuzzer_sys::fuzz_target!(|json: &[u8]| {
    header_oracle::compare(json);
});
