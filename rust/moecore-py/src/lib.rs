//! `moecore._core`: a method parses arguments, lets go of the GIL, calls down, maps the error. Nothing else.

mod errors;
mod scanner;

use pyo3::prelude::*;

/// The Rust core of moecore.
#[pymodule]
mod _core {
    #[pymodule_export]
    use super::scanner::{Cancel, Scanner};

    #[pymodule_export]
    #[allow(non_upper_case_globals, reason = "the name Python uses")]
    const __version__: &str = env!("CARGO_PKG_VERSION");
}
