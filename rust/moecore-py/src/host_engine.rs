//! `HostEngine`: experts in host memory over their files, for models that run on the CPU.

use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use moecore::device::HostDevice;
use moecore::experts::ExpertStore as Store;
use moecore::io::{self, ReadOptions};
use moecore::scheduler::{Call, HostScheduler, Pending, Rows as HeldRows, Stream as Waves, Unfinished, Waited};
use moecore::telemetry::{Phase, Telemetry};
use moecore::{Error, ErrorKind};
use pyo3::prelude::*;

use crate::errors::to_python;
use crate::experts::ExpertStore;
use crate::policy::parse;
use crate::stats::{Stats, stats};

/// How long to wait before Python may look at its signals: Ctrl-C must end a wait for a disk.
const PATIENCE: Duration = Duration::from_millis(50);

/// Experts in host memory that somebody else has allocated.
#[pyclass(frozen, module = "moecore._core")]
pub struct HostEngine {
    /// First, so that the thread ends before its memory goes. `None` after `close`.
    scheduler: Mutex<Option<Arc<HostScheduler>>>,
    store: Arc<Store>,
    telemetry: Arc<Telemetry>,
    /// Owner of the memory.
    _owner: Py<PyAny>,
}

#[pymethods]
impl HostEngine {
    #[new]
    #[pyo3(signature = (store, *, address, bytes, owner, policy, threads = 8))]
    fn new(
        py: Python<'_>,
        store: &ExpertStore,
        address: usize,
        bytes: u64,
        owner: Py<PyAny>,
        policy: &str,
        threads: usize,
    ) -> PyResult<Self> {
        let store = store.0.clone();
        let telemetry = Arc::new(Telemetry::new(store.layers().len(), store.experts() as usize));
        let start = || {
            let base = NonNull::new(address as *mut u8)
                .ok_or_else(|| Error::new(ErrorKind::Device, "no memory for experts; give an address"))?;
            // SAFETY: Python promises memory of this length that nobody else writes, and `owner` keeps it.
            #[expect(unsafe_code, reason = "memory comes as an address")]
            let memory = unsafe { HostDevice::new(base, bytes, store.slot_bytes()) }?;
            let files = store.files().to_vec();
            let options = ReadOptions { threads, ..ReadOptions::default() };
            let reads = Box::new(move |done| io::open(&files, &options, done));
            HostScheduler::start(store.clone(), Arc::new(memory), parse(policy)?, telemetry.clone(), reads)
        };
        let scheduler = py.detach(start).map_err(|error| to_python(py, &error))?;
        Ok(Self { scheduler: Mutex::new(Some(Arc::new(scheduler))), store, telemetry, _owner: owner })
    }

    /// Makes experts of a layer resident and holds them until the result is released.
    fn acquire(
        &self,
        py: Python<'_>,
        layer: u32,
        experts: Vec<u32>,
        tokens: Vec<u32>,
        prefill: bool,
    ) -> PyResult<Rows> {
        let scheduler = self.open(py)?;
        let call = self.call(py, layer, experts, tokens, prefill)?;
        let mut pending = scheduler.acquire(call).map_err(|error| to_python(py, &error))?;
        loop {
            // Both ends of the wait are here, so nothing is lost between two looks at the signals.
            match py.detach(|| Pending::wait(pending, PATIENCE)) {
                Ok(rows) => return Ok(Rows(Mutex::new(Some(rows)))),
                Err(Unfinished::Failed(error)) => return Err(to_python(py, &error)),
                Err(Unfinished::Waiting(again)) => {
                    pending = again;
                    py.check_signals()?;
                }
            }
        }
    }

    /// Streams experts of a layer in waves.
    fn stream(
        &self,
        py: Python<'_>,
        layer: u32,
        experts: Vec<u32>,
        tokens: Vec<u32>,
        prefill: bool,
    ) -> PyResult<Stream> {
        let scheduler = self.open(py)?;
        let call = self.call(py, layer, experts, tokens, prefill)?;
        let waves = scheduler.stream(call).map_err(|error| to_python(py, &error))?;
        Ok(Stream { waves: Mutex::new(Some(waves)), first: self.store.first(layer) })
    }

    /// Brings experts of a layer where there is room.
    fn prefetch(&self, py: Python<'_>, layer: u32, experts: Vec<u32>) -> PyResult<()> {
        let scheduler = self.open(py)?;
        let ids = experts.into_iter().filter_map(|expert| self.store.id(layer, expert)).collect();
        scheduler.prefetch(ids).map_err(|error| to_python(py, &error))
    }

    /// Slots, and how many of them are one half of the ring.
    #[getter]
    fn slots(&self, py: Python<'_>) -> PyResult<(u32, u32)> {
        let scheduler = self.open(py)?;
        Ok((scheduler.slots(), scheduler.ring().chunk))
    }

    /// How many experts are resident.
    #[getter]
    fn resident(&self, py: Python<'_>) -> PyResult<usize> {
        Ok(self.open(py)?.resident())
    }

    /// Counters of each layer, prefill and decode, and tokens routed to each expert.
    fn stats(&self) -> Stats {
        stats(&self.telemetry)
    }

    /// Sets every counter to zero.
    fn reset_stats(&self) {
        self.telemetry.reset();
    }

    /// Ends the thread and the reads. Calls after it fail.
    fn close(&self, py: Python<'_>) {
        py.detach(|| drop(self.lock().take()));
    }
}

impl HostEngine {
    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Arc<HostScheduler>>> {
        self.scheduler.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open(&self, py: Python<'_>) -> PyResult<Arc<HostScheduler>> {
        let closed = || Error::new(ErrorKind::Device, "the model's experts were closed; load or wrap the model again");
        self.lock().clone().ok_or_else(|| to_python(py, &closed()))
    }

    fn call(&self, py: Python<'_>, layer: u32, experts: Vec<u32>, tokens: Vec<u32>, prefill: bool) -> PyResult<Call> {
        let unknown = |expert: u32| {
            let message = format!("layer {layer} has no expert {expert}");
            to_python(py, &Error::new(ErrorKind::InvalidConfig, message))
        };
        let ids = experts.into_iter().map(|expert| self.store.id(layer, expert).ok_or_else(|| unknown(expert)));
        let phase = if prefill { Phase::Prefill } else { Phase::Decode };
        Ok(Call { layer, phase, experts: ids.collect::<PyResult<_>>()?, tokens })
    }
}

/// Slots that are safe from being overwritten until they are released.
#[pyclass(frozen, module = "moecore._core")]
pub struct Rows(Mutex<Option<HeldRows>>);

#[pymethods]
impl Rows {
    /// The slots, in the order in which their experts were asked for. Empty after `release`.
    #[getter]
    fn slots(&self) -> Vec<u32> {
        let rows = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        rows.as_ref().map_or_else(Vec::new, |rows| rows.slots().to_vec())
    }

    /// Lets the slots go.
    fn release(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}

/// Waves of experts: an iterator of (experts, slots). Asking for a wave says that the work on the one before is over.
#[pyclass(frozen, module = "moecore._core")]
pub struct Stream {
    waves: Mutex<Option<Waves>>,
    first: u32,
}

#[pymethods]
impl Stream {
    fn __iter__(this: PyRef<'_, Self>) -> PyRef<'_, Self> {
        this
    }

    fn __next__(&self, py: Python<'_>) -> PyResult<Option<(Vec<u32>, Vec<u32>)>> {
        loop {
            let wave = py.detach(|| {
                let mut waves = self.waves.lock().unwrap_or_else(PoisonError::into_inner);
                waves.as_mut().map_or(Ok(None), |waves| waves.next(PATIENCE))
            });
            match wave {
                Ok(wave) => {
                    let local = |wave: moecore::scheduler::Wave| {
                        (wave.experts.iter().map(|id| id - self.first).collect(), wave.slots)
                    };
                    return Ok(wave.map(local));
                }
                Err(Waited::Failed(error)) => return Err(to_python(py, &error)),
                Err(Waited::NotYet) => py.check_signals()?,
            }
        }
    }

    /// Gives the ring back, also where waves are left.
    fn close(&self, py: Python<'_>) {
        py.detach(|| drop(self.waves.lock().unwrap_or_else(PoisonError::into_inner).take()));
    }
}
