//! `replay_policy`: an eviction policy on a trace.

use moecore::residency::replay::{Call, Options, Replay, replay_named};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;

/// Replays calls, each a layer and its experts, from empty slots; returns counts.
#[pyfunction]
#[pyo3(signature = (policy, experts_per_layer, slots, calls, *, warm_up = 0, pinned = Vec::new(), prepare = 0))]
#[expect(clippy::too_many_arguments, clippy::needless_pass_by_value, reason = "extracted from Python")]
pub fn replay_policy<'py>(
    py: Python<'py>,
    policy: &str,
    experts_per_layer: Vec<u32>,
    slots: u32,
    calls: Vec<Call>,
    warm_up: usize,
    pinned: Vec<u32>,
    prepare: usize,
) -> PyResult<Bound<'py, PyDict>> {
    let options = Options { warm_up, pinned, prepare };
    let replay = py.detach(|| replay_named(policy, &experts_per_layer, slots, &calls, &options));
    counts(py, &replay.map_err(|error| PyValueError::new_err(error.to_string()))?)
}

fn counts<'py>(py: Python<'py>, replay: &Replay) -> PyResult<Bound<'py, PyDict>> {
    let counts = PyDict::new(py);
    counts.set_item("lookups", replay.lookups)?;
    counts.set_item("hits", replay.hits)?;
    counts.set_item("misses", replay.misses)?;
    counts.set_item("evictions", replay.evictions)?;
    let per_layer: Vec<_> = replay.per_layer.iter().map(|layer| (layer.lookups, layer.hits)).collect();
    counts.set_item("per_layer", per_layer)?;
    Ok(counts)
}
