//! The core of moecore: no Python, no CUDA.
//!
//! Arrows point one way: `scan -> header -> dtype`, `memory -> model -> header`.

pub mod dtype;
pub mod error;
pub mod header;
pub mod memory;
pub mod model;
pub mod scan;

pub use error::{Error, ErrorKind, Result};
