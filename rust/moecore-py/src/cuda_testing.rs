//! `_core._testing`: an engine with a plain LRU over pinned rows, for tests and benches of the kernels alone.

use pyo3::prelude::*;

/// Not for use outside the tests.
#[pymodule]
pub mod _testing {
    use std::sync::Arc;
    use std::time::Duration;

    use moecore::scheduler::decisions::{Decisions, DeviceCall, Order};
    use moecore::{Error, ErrorKind};
    use moecore_cuda::pinned::PinnedArena as Rows;
    use pyo3::prelude::*;
    use pyo3::types::PyDict;

    use crate::cuda::{CudaEngine, PinnedArena, setup};
    use crate::errors::to_python;

    /// Least recently used; expert `e` lies in row `e`.
    struct Lru {
        rows: Arc<Rows>,
        /// Expert in each slot, and the call that used it last.
        slots: Vec<(Option<u32>, u64)>,
        delay: Duration,
        fault: Option<(u64, String)>,
    }

    impl Decisions for Lru {
        fn call(&mut self, call: &DeviceCall<'_>, orders: &mut Vec<Order>) -> moecore::Result<()> {
            if let Some((_, kind)) = self.fault.as_ref().filter(|(seq, _)| *seq == call.seq) {
                match kind.as_str() {
                    "panic" => panic!("asked to"),
                    "forget" => return Ok(()),
                    _ => return Err(Error::new(ErrorKind::Io, "the shard is gone")),
                }
            }
            if !call.missing.is_empty() && !self.delay.is_zero() {
                std::thread::sleep(self.delay);
            }
            for (expert, last) in &mut self.slots {
                if expert.is_some_and(|expert| call.used.contains(&expert)) {
                    *last = call.seq;
                }
            }
            for &expert in call.missing {
                let oldest = (0_u32..).zip(&mut self.slots).filter(|(_, slot)| slot.1 != call.seq).min_by_key(|(_, s)| s.1);
                let Some((slot, place)) = oldest else {
                    return Err(Error::new(ErrorKind::Budget, "fewer slots than one call needs"));
                };
                let evicted = place.0.replace(expert);
                place.1 = call.seq;
                let source = self.rows.address(expert);
                let source = source.ok_or_else(|| Error::new(ErrorKind::Device, "that row is not pinned"))?;
                orders.push(Order::fetch(expert, slot, source, evicted));
            }
            Ok(())
        }
    }

    /// An engine whose experts lie in `arena`, in order.
    ///
    /// `delay` seconds pass before each answer; at call `fault[0]` the scheduler fails as `fault[1]` says: `error`,
    /// `panic` or `forget`.
    #[pyfunction]
    #[pyo3(signature = (device, options, arena, delay = 0.0, fault = None))]
    #[expect(unsafe_code, reason = "addresses come from Python")]
    fn lru_engine(
        py: Python<'_>,
        device: u32,
        options: &Bound<'_, PyDict>,
        arena: &PinnedArena,
        delay: f64,
        fault: Option<(u64, String)>,
    ) -> PyResult<CudaEngine> {
        let setup = setup(options)?;
        let rows = Arc::clone(&arena.arena);
        let delay = Duration::from_secs_f64(delay);
        let decisions = Lru { rows, slots: vec![(None, 0); setup.slots as usize], delay, fault };
        // SAFETY: the tensors that the test keeps alive.
        let made = py.detach(|| unsafe { moecore_cuda::CudaEngine::new(device, setup, Box::new(decisions)) });
        made.and_then(|engine| CudaEngine::wrap(engine, 2)).map_err(|error| to_python(py, &error))
    }
}
