//! A layout to a [`MemoryReport`]: bytes by role, parameters total and active, KV cache.

pub mod kv;
pub mod report;

pub use kv::{KvOptions, KvReport};
pub use report::MemoryReport;
