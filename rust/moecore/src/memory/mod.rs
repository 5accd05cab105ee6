//! A layout to a memory report.
