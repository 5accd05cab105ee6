//! The core's one error to Python's exception classes: the only place that knows both.

use moecore::{Error, ErrorKind};
use pyo3::prelude::*;

/// The exception for an error, with its `file` and `tensor`.
pub fn to_python(py: Python<'_>, error: &Error) -> PyErr {
    build(py, error).unwrap_or_else(|failure| failure)
}

/// Name of the class in `moecore.errors`.
pub fn class_name(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::InvalidHeader => "HeaderError",
        ErrorKind::InvalidConfig => "ConfigError",
        ErrorKind::InvalidTarget => "TargetError",
        ErrorKind::NotFound => "NotFoundError",
        ErrorKind::AccessDenied => "AccessError",
        ErrorKind::RateLimited => "RateLimitError",
        ErrorKind::Network | ErrorKind::Protocol => "NetworkError",
        ErrorKind::Offline => "OfflineError",
        ErrorKind::Io => "FileError",
        ErrorKind::Cancelled => "CancelledError",
        ErrorKind::Budget => "BudgetError",
        ErrorKind::Device => "DeviceError",
        _ => "MoecoreError",
    }
}

fn build(py: Python<'_>, error: &Error) -> PyResult<PyErr> {
    let class = py.import("moecore.errors")?.getattr(class_name(error.kind()))?;
    let exception = class.call1((error.to_string(),))?;
    exception.setattr("file", error.file())?;
    exception.setattr("tensor", error.tensor())?;
    Ok(PyErr::from_value(exception))
}
