//! Bindings of `moecore-cuda`: addresses come as integers, the GIL is let go of around everything that may wait.
#![expect(unsafe_code, reason = "addresses come from Python, whose caller answers for them")]

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use moecore::device::HostMemory;
use moecore::{Error, ErrorKind};
use moecore_cuda::answer::Layer;
use moecore_cuda::context::Context;
use moecore_cuda::copy::CopyStream;
use moecore_cuda::engine::{self, Products, Setup};
use moecore_cuda::kernels::{Format, Product};
use moecore_cuda::routing::GateArgs;
use moecore_cuda::stream::Stream;
use moecore_cuda::{image, nvrtc, pinned};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::errors::to_python;

/// Why there is no GPU to use, or None if there is one.
#[pyfunction]
pub fn cuda_available(py: Python<'_>) -> Option<String> {
    if image::embedded().is_none() {
        // Without NVIDIA's packages, the loader may know the compiler all the same.
        nvrtc::search_in(nvidia_folders(py).unwrap_or_default());
    }
    py.detach(|| moecore_cuda::is_available().err())
}

/// Loads all kernels on a GPU, or finds them loaded. Not while a stream captures: loading ends the capture.
#[pyfunction]
pub fn load_kernels(py: Python<'_>, device: u32) -> PyResult<()> {
    let load = || Context::of(device)?.kernels().map(drop);
    py.detach(load).map_err(|error: Error| to_python(py, &error))
}

/// `lib` of NVIDIA's Python packages, which torch comes with.
fn nvidia_folders(py: Python<'_>) -> PyResult<Vec<PathBuf>> {
    let mut folders = Vec::new();
    for root in py.import("nvidia")?.getattr("__path__")?.try_iter()? {
        let packages = std::fs::read_dir(root?.extract::<PathBuf>()?)?;
        folders.extend(packages.filter_map(Result::ok).map(|package| package.path().join("lib")));
    }
    Ok(folders)
}

fn format(py: Python<'_>, name: &str) -> PyResult<Format> {
    match name {
        "float32" => Ok(Format::F32),
        "bfloat16" => Ok(Format::Bf16),
        "float16" => Ok(Format::F16),
        _ => Err(to_python(py, &Error::new(ErrorKind::Device, format!("no kernels for numbers of type {name}")))),
    }
}

/// Rows of pinned host memory.
#[pyclass(frozen)]
pub struct PinnedArena {
    pub(crate) arena: Arc<pinned::PinnedArena>,
}

#[pymethods]
impl PinnedArena {
    #[new]
    fn new(py: Python<'_>, device: u32, row_bytes: u64, rows: u32) -> PyResult<Self> {
        let made = py.detach(|| pinned::PinnedArena::new(&Context::of(device)?, row_bytes, rows));
        made.map(|arena| Self { arena: Arc::new(arena) }).map_err(|error| to_python(py, &error))
    }

    /// Waits until all rows are there, or as many as the host can pin: their number.
    fn settle(&self, py: Python<'_>) -> u32 {
        py.detach(|| self.arena.settle())
    }

    /// Address of a row, or None while it is not there.
    fn address(&self, row: u32) -> Option<u64> {
        self.arena.address(row)
    }

    /// Rows that were asked for.
    #[getter]
    fn rows(&self) -> u32 {
        self.arena.rows()
    }
}

/// Experts of one model on one GPU.
#[pyclass(frozen)]
pub struct CudaEngine {
    engine: engine::CudaEngine,
    copies: CopyStream,
}

impl CudaEngine {
    /// Wraps an engine; `events` pairs of events for its copies.
    pub fn wrap(engine: engine::CudaEngine, events: usize) -> moecore::Result<Self> {
        let copies = CopyStream::new(engine.context(), events)?;
        Ok(Self { engine, copies })
    }
}

impl CudaEngine {
    /// Address of the mailbox.
    pub fn mailbox(&self) -> u64 {
        self.engine.mailbox()
    }
}

/// Layers whose dense ids follow each other.
pub fn layers(experts: &[u32], row_bytes: &[u64]) -> Vec<Layer> {
    let mut first = 0;
    let layer = |(&experts, &row_bytes): (&u32, &u64)| {
        let layer = Layer { first, experts, row_bytes };
        first += experts;
        layer
    };
    experts.iter().zip(row_bytes).map(layer).collect()
}

/// Memory and shapes from a dictionary of integers and two lists.
pub fn setup(options: &Bound<'_, PyDict>) -> PyResult<Setup> {
    let number = |name: &str| -> PyResult<u64> {
        options.get_item(name)?.ok_or_else(|| pyo3::exceptions::PyKeyError::new_err(name.to_owned()))?.extract()
    };
    let list =
        |name: &str| options.get_item(name)?.ok_or_else(|| pyo3::exceptions::PyKeyError::new_err(name.to_owned()));
    let experts: Vec<u32> = list("experts")?.extract()?;
    let row_bytes: Vec<u64> = list("row_bytes")?.extract()?;
    Ok(Setup {
        arena: number("arena")?,
        slot_bytes: number("slot_bytes")?,
        slots: u32::try_from(number("slots")?)?,
        table: number("table")?,
        counts: number("counts")?,
        state: number("state")?,
        layers: layers(&experts, &row_bytes),
    })
}

#[pymethods]
impl CudaEngine {
    /// Finds the slots of a call's experts and brings those that are missing.
    #[pyo3(signature = (layer, ids, pairs, slots, phase, stream))]
    #[expect(clippy::too_many_arguments, reason = "a launch")]
    fn acquire(
        &self,
        py: Python<'_>,
        layer: u32,
        ids: u64,
        pairs: u32,
        slots: u64,
        phase: u32,
        stream: u64,
    ) -> PyResult<()> {
        // SAFETY: the caller's tensors.
        let launched =
            py.detach(|| unsafe { self.engine.acquire(layer, ids, pairs, slots, phase, Stream::from_raw(stream)) });
        launched.map_err(|error| to_python(py, &error))
    }

    /// The same, with ids that the kernel chooses by the router's logits, and writes as int64.
    #[pyo3(signature = (
        layer, logits_format, logits, stride, tokens, experts, k, groups, top_groups, scoring, flags, bias, weights,
        weights_format, ids, scale, eps, slots, phase, stream,
    ))]
    #[expect(clippy::too_many_arguments, reason = "a launch")]
    fn gate_acquire(
        &self,
        py: Python<'_>,
        layer: u32,
        logits_format: u32,
        logits: u64,
        stride: u64,
        tokens: u32,
        experts: u32,
        k: u32,
        groups: u32,
        top_groups: u32,
        scoring: u32,
        flags: u32,
        bias: u64,
        weights: u64,
        weights_format: u32,
        ids: u64,
        scale: f32,
        eps: f32,
        slots: u64,
        phase: u32,
        stream: u64,
    ) -> PyResult<()> {
        let gate = GateArgs {
            logits,
            bias,
            weights,
            ids,
            valid: 0,
            stride,
            tokens,
            experts,
            k,
            groups,
            top_groups,
            scoring,
            flags,
            weights_format,
            scale,
            eps,
        };
        let Some(format) = Format::from_number(logits_format) else {
            let message = format!("gate: there is no number format {logits_format}");
            return Err(to_python(py, &Error::new(ErrorKind::Device, message)));
        };
        let stream = Stream::from_raw(stream);
        // SAFETY: the caller's tensors.
        let launched = py.detach(|| unsafe { self.engine.gate_acquire(layer, format, gate, slots, phase, stream) });
        launched.map_err(|error| to_python(py, &error))
    }

    /// h[p] = act(gate) * up for each pair, over concatenated weights.
    #[pyo3(signature = (dtype, offset, x, slots, out, tokens, k, hidden, intermediate, act, stream))]
    #[expect(clippy::too_many_arguments, reason = "a launch")]
    fn expert_up(
        &self,
        py: Python<'_>,
        dtype: &str,
        offset: u64,
        x: u64,
        slots: u64,
        out: u64,
        tokens: u32,
        k: u32,
        hidden: u32,
        intermediate: u32,
        act: u32,
        stream: u64,
    ) -> PyResult<()> {
        let what = Products {
            product: Product::Up,
            format: format(py, dtype)?,
            offset,
            bias_offset: None,
            x,
            slots,
            weights: 0,
            out,
            tokens,
            k,
            inputs: hidden,
            outputs: intermediate,
            act,
            flags: 0,
        };
        self.product(py, &what, stream)
    }

    /// out[t] = sum over k of weight * down(h[t, k]).
    #[pyo3(signature = (dtype, offset, x, slots, weights, weights_float32, out, tokens, k, intermediate, hidden, stream))]
    #[expect(clippy::too_many_arguments, reason = "a launch")]
    fn expert_down(
        &self,
        py: Python<'_>,
        dtype: &str,
        offset: u64,
        x: u64,
        slots: u64,
        weights: u64,
        weights_float32: bool,
        out: u64,
        tokens: u32,
        k: u32,
        intermediate: u32,
        hidden: u32,
        stream: u64,
    ) -> PyResult<()> {
        let what = Products {
            product: Product::Down,
            format: format(py, dtype)?,
            offset,
            bias_offset: None,
            x,
            slots,
            weights,
            out,
            tokens,
            k,
            inputs: intermediate,
            outputs: hidden,
            act: 0,
            flags: u32::from(weights_float32),
        };
        self.product(py, &what, stream)
    }

    /// y[p] = W[slot] x (+ bias[slot]).
    #[pyo3(signature = (dtype, offset, bias_offset, transposed, row_per_pair, x, slots, out, tokens, k, inputs, outputs, stream))]
    #[expect(clippy::too_many_arguments, reason = "a launch")]
    fn slot_linear(
        &self,
        py: Python<'_>,
        dtype: &str,
        offset: u64,
        bias_offset: Option<u64>,
        transposed: bool,
        row_per_pair: bool,
        x: u64,
        slots: u64,
        out: u64,
        tokens: u32,
        k: u32,
        inputs: u32,
        outputs: u32,
        stream: u64,
    ) -> PyResult<()> {
        let what = Products {
            product: if transposed { Product::LinearTransposed } else { Product::Linear },
            format: format(py, dtype)?,
            offset,
            bias_offset,
            x,
            slots,
            weights: 0,
            out,
            tokens,
            k,
            inputs,
            outputs,
            act: 0,
            flags: u32::from(row_per_pair) << 1,
        };
        self.product(py, &what, stream)
    }

    /// Changes the table in `stream`: (expert, slot or None).
    #[expect(clippy::needless_pass_by_value, reason = "extracted from Python")]
    fn update_table(&self, py: Python<'_>, entries: Vec<(u32, Option<u32>)>, stream: u64) -> PyResult<()> {
        // SAFETY: the caller has ordered the copies before.
        let launched = py.detach(|| unsafe { self.engine.update_table(&entries, Stream::from_raw(stream)) });
        launched.map_err(|error| to_python(py, &error))
    }

    /// Copies a pinned row into a slot with the copy engine.
    fn fill(&self, py: Python<'_>, slot: u32, source: u64, bytes: u64) -> PyResult<()> {
        let setup = self.engine.setup();
        let target = setup.arena + u64::from(slot) * setup.slot_bytes;
        // SAFETY: a slot of ours and a row that the caller keeps.
        py.detach(|| unsafe { self.copies.fill(target, source, bytes) }).map_err(|error| to_python(py, &error))
    }

    /// Copies one slot into another with the copy engine.
    fn fill_from_slot(&self, py: Python<'_>, slot: u32, source: u32, bytes: u64) -> PyResult<()> {
        let setup = self.engine.setup();
        let at = |slot: u32| setup.arena + u64::from(slot) * setup.slot_bytes;
        // SAFETY: two slots of ours.
        let copied = py.detach(|| unsafe { self.copies.fill_from_device(at(slot), at(source), bytes) });
        copied.map_err(|error| to_python(py, &error))
    }

    /// Marks the end of the copies so far as event `event`.
    fn mark(&self, py: Python<'_>, event: usize) -> PyResult<()> {
        py.detach(|| self.copies.mark(event)).map_err(|error| to_python(py, &error))
    }

    /// Makes `stream` wait for the copies before `mark(event)`.
    fn hold(&self, py: Python<'_>, event: usize, stream: u64) -> PyResult<()> {
        py.detach(|| self.copies.hold(event, Stream::from_raw(stream))).map_err(|error| to_python(py, &error))
    }

    /// Makes later copies wait for what is in `stream` now.
    fn after(&self, py: Python<'_>, event: usize, stream: u64) -> PyResult<()> {
        py.detach(|| self.copies.after(event, Stream::from_raw(stream))).map_err(|error| to_python(py, &error))
    }

    /// What has failed, or None.
    fn error(&self) -> Option<String> {
        self.engine.error()
    }

    /// Raises what has failed.
    fn check(&self, py: Python<'_>) -> PyResult<()> {
        self.engine.check().map_err(|error| to_python(py, &error))
    }

    /// Goes on after an error: waits for the GPU, forgets the error and which experts are resident.
    fn clear_error(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.engine.clear_error()).map_err(|error| to_python(py, &error))
    }

    /// Changes how long the GPU waits for an answer, in seconds.
    fn set_patience(&self, seconds: f64) -> PyResult<()> {
        let patience = Duration::try_from_secs_f64(seconds)
            .map_err(|error| pyo3::exceptions::PyValueError::new_err(error.to_string()))?;
        self.engine.set_patience(patience);
        Ok(())
    }

    /// Counters of the answering thread.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let stats = self.engine.stats();
        let dict = PyDict::new(py);
        dict.set_item("records", stats.records)?;
        dict.set_item("dropped", stats.dropped)?;
        dict.set_item("waits", stats.waits)?;
        dict.set_item("fetched", stats.fetched)?;
        dict.set_item("fetched_bytes", stats.fetched_bytes)?;
        dict.set_item("installed", stats.installed)?;
        dict.set_item("latency_ns_log2", stats.latency)?;
        Ok(dict)
    }

    /// Ends the engine; a second call does nothing.
    pub(crate) fn close(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.engine.close()).map_err(|error| to_python(py, &error))
    }
}

impl CudaEngine {
    fn product(&self, py: Python<'_>, what: &Products, stream: u64) -> PyResult<()> {
        // SAFETY: the caller's tensors and offsets.
        let launched = py.detach(|| unsafe { self.engine.product(what, Stream::from_raw(stream)) });
        launched.map_err(|error| to_python(py, &error))
    }
}
