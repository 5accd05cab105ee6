//! Eviction policies by name.

use moecore::residency::policy::{PolicyKind, UnknownPolicy};
use moecore::{Error, ErrorKind, Result};
use pyo3::prelude::*;

use crate::errors::to_python;

/// Raises `TargetError` for a name that is no policy's: to be asked before anything is moved or written.
#[pyfunction]
pub fn check_policy(py: Python<'_>, name: &str) -> PyResult<()> {
    parse(name).map(drop).map_err(|error| to_python(py, &error))
}

/// The policy of that name.
pub fn parse(name: &str) -> Result<PolicyKind> {
    name.parse().map_err(|unknown: UnknownPolicy| Error::new(ErrorKind::InvalidTarget, unknown.to_string()))
}
