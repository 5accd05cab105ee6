//! `ExpertStore`: where every expert's bytes lie, as Python has asked the model's conversion mapping.

use std::path::PathBuf;
use std::sync::Arc;

use moecore::experts::{ExpertLayer, ExpertStore as Store, Range, SourceFile};
use pyo3::prelude::*;

use crate::errors::to_python;

/// A layer from Python: path of the module, row length, top-k, and (file, offset, bytes, at) for each expert.
type Layer = (String, u64, u32, Vec<Vec<(u32, u64, u64, u64)>>);

/// Where every expert's bytes lie.
#[pyclass(frozen, module = "moecore._core")]
pub struct ExpertStore(pub Arc<Store>);

#[pymethods]
impl ExpertStore {
    #[new]
    fn new(py: Python<'_>, files: Vec<PathBuf>, layers: Vec<Layer>) -> PyResult<Self> {
        let build = || {
            let files = files.into_iter().map(SourceFile::of).collect::<moecore::Result<Vec<_>>>()?;
            Store::new(files, layers.into_iter().map(layer).collect())
        };
        py.detach(build).map(|store| Self(Arc::new(store))).map_err(|error| to_python(py, &error))
    }

    /// Distance between slots in bytes.
    #[getter]
    fn slot_bytes(&self) -> u64 {
        self.0.slot_bytes()
    }

    /// The number of all experts.
    #[getter]
    fn experts(&self) -> u32 {
        self.0.experts()
    }
}

fn layer((name, row_bytes, top_k, experts): Layer) -> ExpertLayer {
    let range = |&(file, offset, bytes, at): &(u32, u64, u64, u64)| Range { file, offset, bytes, at };
    let experts: Vec<Vec<Range>> = experts.iter().map(|ranges| ranges.iter().map(range).collect()).collect();
    ExpertLayer::new(name, row_bytes, top_k, &experts)
}
