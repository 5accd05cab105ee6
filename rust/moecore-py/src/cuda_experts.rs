//! `HostRows` and `CudaExperts`: the experts of one model on one GPU, over rows in pinned host memory.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use moecore::device::HostMemory;
use moecore::experts::ExpertStore as Store;
use moecore::io::{self, ReadOptions};
use moecore::scheduler::{Call, DeviceScheduler, HostScheduler, Place, Rows};
use moecore::telemetry::{Phase, Telemetry};
use moecore::{Error, ErrorKind, Result};
use moecore_cuda::answer::Layer;
use moecore_cuda::context::Context;
use moecore_cuda::copy::CopyStream;
use moecore_cuda::engine::{CudaEngine as Engine, Setup};
use moecore_cuda::pinned::PinnedArena;
use moecore_cuda::stream::Stream;
use pyo3::prelude::*;

use crate::cuda::CudaEngine;
use crate::errors::to_python;
use crate::experts::ExpertStore;
use crate::policy::parse;
use crate::stats::{Stats, stats};

/// Rows of experts in pinned host memory, over their files.
#[pyclass(frozen, module = "moecore._core")]
pub struct HostRows {
    scheduler: Arc<HostScheduler>,
    memory: Arc<PinnedArena>,
    store: Arc<Store>,
    telemetry: Arc<Telemetry>,
    device: u32,
}

#[pymethods]
impl HostRows {
    #[new]
    #[pyo3(signature = (store, *, device, rows, policy, threads = 8))]
    fn new(
        py: Python<'_>,
        store: &ExpertStore,
        device: u32,
        rows: u32,
        policy: &str,
        threads: usize,
    ) -> PyResult<Self> {
        let store = store.0.clone();
        let telemetry = Arc::new(Telemetry::new(store.layers().len(), store.experts() as usize));
        let start = || {
            let policy = parse(policy)?;
            let memory = Arc::new(PinnedArena::new(&Context::of(device)?, store.slot_bytes(), rows)?);
            let files = store.files().to_vec();
            let options = ReadOptions { threads, ..ReadOptions::default() };
            let reads = Box::new(move |done| io::open(&files, &options, done));
            let scheduler =
                HostScheduler::start(store.clone(), Arc::clone(&memory) as _, policy, telemetry.clone(), reads)?;
            Ok((Arc::new(scheduler), memory))
        };
        let (scheduler, memory) = py.detach(start).map_err(|error: Error| to_python(py, &error))?;
        Ok(Self { scheduler, memory, store, telemetry, device })
    }

    /// Takes an expert from memory: `bytes` bytes at `address`.
    fn put(&self, py: Python<'_>, layer: u32, expert: u32, address: usize, bytes: usize) -> PyResult<()> {
        let put = || {
            let row_bytes = self.memory.row_bytes();
            let id = self.store.id(layer, expert).filter(|_| bytes <= row_bytes);
            let id = id.ok_or_else(|| Error::new(ErrorKind::InvalidConfig, "no such expert, or not its row"))?;
            let write = |row: u32| {
                // SAFETY: Python promises that the source is that long; the row is reserved for us and longer.
                #[expect(unsafe_code, reason = "memory comes as an address")]
                unsafe {
                    std::ptr::copy_nonoverlapping(address as *const u8, self.memory.row(row).as_ptr(), bytes);
                }
            };
            self.scheduler.put(id, write)
        };
        py.detach(put).map_err(|error| to_python(py, &error))
    }

    /// Copies an expert's row to memory: `bytes` bytes at `address`.
    fn copy(&self, py: Python<'_>, layer: u32, expert: u32, address: usize, bytes: usize) -> PyResult<()> {
        let copy = || {
            let row_bytes = self.memory.row_bytes();
            let id = self.store.id(layer, expert).filter(|_| bytes <= row_bytes);
            let id = id.ok_or_else(|| Error::new(ErrorKind::InvalidConfig, "no such expert, or not its row"))?;
            let rows = self.scheduler.hold(layer, &[id])?;
            // SAFETY: Python promises that the target is that long; the row is longer and held.
            #[expect(unsafe_code, reason = "memory comes as an address")]
            unsafe {
                std::ptr::copy_nonoverlapping(self.memory.row(rows.slots()[0]).as_ptr(), address as *mut u8, bytes);
            }
            Ok(())
        };
        py.detach(copy).map_err(|error: Error| to_python(py, &error))
    }

    /// Waits until the memory is pinned, or as much of it as the host gives: rows.
    fn settle(&self, py: Python<'_>) -> u32 {
        py.detach(|| self.memory.settle())
    }

    /// How many rows there are.
    #[getter]
    fn rows(&self) -> u32 {
        self.memory.rows()
    }

    /// Counters of the tier below the device.
    fn stats(&self) -> Stats {
        stats(&self.telemetry)
    }
}

/// The experts of one model on one GPU.
#[pyclass(frozen, module = "moecore._core")]
pub struct CudaExperts {
    engine: Py<CudaEngine>,
    scheduler: DeviceScheduler,
    copies: CopyStream,
    /// Host rows that each half of the ring is being filled from.
    sources: Mutex<Vec<Option<Rows>>>,
    store: Arc<Store>,
    telemetry: Arc<Telemetry>,
    arena: u64,
    /// Owners of the memory.
    _owners: Py<PyAny>,
}

#[pymethods]
impl CudaExperts {
    #[new]
    #[pyo3(signature = (rows, *, arena, slots, table, counts, state, owners, policy))]
    #[expect(clippy::too_many_arguments, reason = "keyword-only in Python")]
    fn new(
        py: Python<'_>,
        rows: &HostRows,
        arena: u64,
        slots: u32,
        table: u64,
        counts: u64,
        state: u64,
        owners: Py<PyAny>,
        policy: &str,
    ) -> PyResult<Self> {
        let store = rows.store.clone();
        let telemetry = Arc::new(Telemetry::new(store.layers().len(), store.experts() as usize));
        let start = || {
            let (below, memory) = (rows.scheduler.clone(), Arc::clone(&rows.memory) as _);
            let scheduler =
                DeviceScheduler::new(store.clone(), slots, parse(policy)?, below, memory, telemetry.clone())?;
            let layers = (0..).zip(store.layers()).map(|(number, layer)| Layer {
                first: store.first(number),
                experts: layer.experts,
                row_bytes: layer.row_bytes.next_multiple_of(16),
            });
            let layers = layers.collect();
            let setup = Setup { arena, slot_bytes: store.slot_bytes(), slots, table, counts, state, layers };
            // SAFETY: Python promises memory of these sizes; `owners` keeps it until the engine is gone.
            #[expect(unsafe_code, reason = "memory comes as addresses")]
            let engine = unsafe { Engine::new(rows.device, setup, Box::new(scheduler.clone())) }?;
            let copies = CopyStream::new(engine.context(), scheduler.ring().halves as usize)?;
            Ok((CudaEngine::wrap(engine, 1)?, scheduler, copies))
        };
        let (engine, scheduler, copies) = py.detach(start).map_err(|error: Error| to_python(py, &error))?;
        let sources = Mutex::new((0..scheduler.ring().halves).map(|_| None).collect());
        let engine = Py::new(py, engine)?;
        Ok(Self { engine, scheduler, copies, sources, store, telemetry, arena, _owners: owners })
    }

    /// Launches of the engine.
    #[getter]
    fn engine(&self, py: Python<'_>) -> Py<CudaEngine> {
        self.engine.clone_ref(py)
    }

    /// First slot of the ring, slots of one half, halves.
    #[getter]
    fn ring(&self) -> (u32, u32, u32) {
        let ring = self.scheduler.ring();
        (ring.first, ring.chunk, ring.halves)
    }

    /// How many experts are on the device.
    #[getter]
    fn resident(&self) -> u32 {
        self.scheduler.resident()
    }

    /// Clears the ring for a prefill: dense ids that the table must forget.
    fn begin_prefill(&self) -> Vec<u32> {
        self.scheduler.begin_prefill()
    }

    /// Gives the ring back. Its copies must be over, or be waited for by the stream that runs the next call.
    fn end_prefill(&self, py: Python<'_>) -> PyResult<bool> {
        let end = || {
            // Rows that are held for a copy of long ago would be missing below.
            let mut sources = self.sources();
            for half in 0..sources.len() {
                self.leave(&mut sources, half)?;
            }
            Ok(self.scheduler.end_prefill())
        };
        py.detach(end).map_err(|error: Error| to_python(py, &error))
    }

    /// Counts a call of a prefill; whether each of its experts is on the device.
    #[expect(clippy::needless_pass_by_value, reason = "extracted from Python")]
    fn prefill(&self, layer: u32, experts: Vec<u32>, tokens: Vec<u32>) -> Vec<bool> {
        let experts = self.ids(layer, &experts);
        let call = Call { layer, phase: Phase::Prefill, experts, tokens };
        self.scheduler.prefill(&call).iter().map(|place| matches!(place, Place::Slot(_))).collect()
    }

    /// Brings experts of a layer into the first slots of a half of the ring, with the copy engine, once `stream` has
    /// come here. Returns when the copies are enqueued.
    #[expect(clippy::needless_pass_by_value, reason = "extracted from Python")]
    fn stage(&self, py: Python<'_>, half: usize, layer: u32, experts: Vec<u32>, stream: u64) -> PyResult<()> {
        py.detach(|| self.stage_now(half, layer, &experts, stream)).map_err(|error| to_python(py, &error))
    }

    /// Makes `stream` wait for what was last staged in a half.
    fn ready(&self, py: Python<'_>, half: usize, stream: u64) -> PyResult<()> {
        py.detach(|| self.copies.hold(half, Stream::from_raw(stream))).map_err(|error| to_python(py, &error))
    }

    /// Gives slots to experts of a layer as long as some are free: (expert, slot). The caller copies them there.
    #[expect(clippy::needless_pass_by_value, reason = "extracted from Python")]
    fn admit(&self, layer: u32, experts: Vec<u32>) -> Vec<(u32, u32)> {
        let first = self.store.first(layer);
        let admitted = self.scheduler.admit(&self.ids(layer, &experts));
        admitted.into_iter().map(|(id, slot)| (id - first, slot)).collect()
    }

    /// The copies of admitted experts of a layer are enqueued.
    #[expect(clippy::needless_pass_by_value, reason = "extracted from Python")]
    fn settle(&self, layer: u32, experts: Vec<u32>) {
        self.scheduler.settle(&self.ids(layer, &experts));
    }

    /// Counters of each layer, prefill and decode, and tokens routed to each expert in prefill.
    fn stats(&self) -> Stats {
        stats(&self.telemetry)
    }

    /// Sets every counter to zero.
    fn reset_stats(&self) {
        self.telemetry.reset();
    }

    /// Ends the engine. Calls after it fail.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        self.engine.get().close(py)?;
        py.detach(|| self.copies.synchronize()).map_err(|error| to_python(py, &error))?;
        self.sources().iter_mut().for_each(|rows| *rows = None);
        Ok(())
    }
}

impl CudaExperts {
    fn sources(&self) -> MutexGuard<'_, Vec<Option<Rows>>> {
        self.sources.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ids(&self, layer: u32, experts: &[u32]) -> Vec<u32> {
        experts.iter().filter_map(|&expert| self.store.id(layer, expert)).collect()
    }

    /// The rows of a half's last copies may be given away when these are over.
    fn leave(&self, sources: &mut [Option<Rows>], half: usize) -> Result<()> {
        while sources[half].is_some() && !self.copies.is_done(half)? {
            std::thread::sleep(std::time::Duration::from_micros(20));
        }
        sources[half] = None;
        Ok(())
    }

    fn stage_now(&self, half: usize, layer: u32, experts: &[u32], stream: u64) -> Result<()> {
        let ids = self.ids(layer, experts);
        let ring = self.scheduler.ring();
        let slot_at = |slot: u32| self.arena + u64::from(slot) * self.store.slot_bytes();
        let mut sources = self.sources();
        self.leave(&mut sources, half)?;
        let places = self.scheduler.places(&ids);
        let below: Vec<u32> =
            ids.iter().zip(&places).filter(|(_, place)| **place == Place::Below).map(|(&id, _)| id).collect();
        let (rows, addresses) = self.scheduler.fetch(layer, &below)?;
        let mut addresses = addresses.into_iter();
        self.copies.after(half, Stream::from_raw(stream))?;
        let first = ring.first + u32::try_from(half).unwrap_or(0) * ring.chunk;
        for ((id, place), slot) in ids.iter().zip(&places).zip(first..) {
            let bytes = self.store.row_bytes(*id);
            // SAFETY: the ring's half is ours until the next `stage`, the slot beside it is resident and no victim while
            // a prefill runs, and host rows stay while `rows` is kept.
            #[expect(unsafe_code, reason = "copies between addresses")]
            unsafe {
                match place {
                    Place::Slot(from) => self.copies.fill_from_device(slot_at(slot), slot_at(*from), bytes)?,
                    Place::Below => {
                        let source = addresses.next().expect("an address for each expert below");
                        self.copies.fill(slot_at(slot), source, bytes)?;
                    }
                }
            }
        }
        self.copies.mark(half)?;
        sources[half] = Some(rows);
        Ok(())
    }
}
