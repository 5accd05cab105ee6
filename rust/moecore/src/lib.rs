//! The core of moecore: no Python, no CUDA.
//!
//! Arrows point one way: `scan -> header -> dtype`, `memory -> model -> header`,
//! `scheduler -> {residency, io, device, telemetry} -> experts`.

pub mod device;
pub mod dtype;
pub mod error;
pub mod experts;
pub mod header;
pub mod io;
pub mod memory;
pub mod model;
pub mod residency;
pub mod scan;
pub mod scheduler;
pub mod telemetry;

pub use error::{Error, ErrorKind, Result};
