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
        /// Experts that were in their slots before the GPU heard of it.
        prefetched: Vec<u32>,
        /// Lets one expert more go at each miss, and fills no slot with it.
        retires: bool,
    }

    impl Lru {
        /// The slot that was used least recently, and not in call `seq`.
        fn oldest(&mut self, seq: u64) -> Option<(u32, &mut (Option<u32>, u64))> {
            (0_u32..).zip(&mut self.slots).filter(|(_, slot)| slot.1 != seq).min_by_key(|(_, slot)| slot.1)
        }
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
                let source = self.rows.address(expert);
                let source = source.ok_or_else(|| Error::new(ErrorKind::Device, "that row is not pinned"))?;
                if let Some((slot, _)) = (0..).zip(&self.slots).find(|(_, place)| place.0 == Some(expert)) {
                    let known = self.prefetched.iter().position(|&one| one == expert);
                    orders.push(match known.map(|at| self.prefetched.swap_remove(at)) {
                        Some(_) => Order::install(expert, slot, None),
                        // After an error the GPU has forgotten all that it had.
                        None => Order::fetch(expert, slot, source, None),
                    });
                    continue;
                }
                let Some((slot, place)) = self.oldest(call.seq) else {
                    return Err(Error::new(ErrorKind::Budget, "fewer slots than one call needs"));
                };
                let evicted = place.0.replace(expert);
                place.1 = call.seq;
                self.prefetched.retain(|&one| Some(one) != evicted);
                orders.push(Order::fetch(expert, slot, source, evicted));
            }
            if self.retires
                && !call.missing.is_empty()
                && let Some(gone) = self.oldest(call.seq).and_then(|(_, place)| place.0.take())
            {
                self.prefetched.retain(|&one| one != gone);
                orders.push(Order::retire(gone));
            }
            Ok(())
        }
    }

    /// Address of an engine's mailbox, for launches that a bench makes itself.
    #[pyfunction]
    fn mailbox(engine: &CudaEngine) -> u64 {
        engine.mailbox()
    }

    /// An engine whose experts lie in `arena`, in order.
    ///
    /// `delay` seconds pass before each answer; at call `fault[0]` the scheduler fails as `fault[1]` says: `error`,
    /// `panic` or `forget`.
    ///
    /// `prefetched` are pairs of an expert and the slot it lies in before the first call. With `retires`, each call with a
    /// miss lets one expert more go.
    #[pyfunction]
    #[pyo3(signature = (device, options, arena, delay = 0.0, fault = None, prefetched = Vec::new(), retires = false))]
    #[expect(unsafe_code, reason = "addresses come from Python")]
    #[expect(clippy::too_many_arguments, reason = "named in Python")]
    fn lru_engine(
        py: Python<'_>,
        device: u32,
        options: &Bound<'_, PyDict>,
        arena: &PinnedArena,
        delay: f64,
        fault: Option<(u64, String)>,
        prefetched: Vec<(u32, usize)>,
        retires: bool,
    ) -> PyResult<CudaEngine> {
        let setup = setup(options)?;
        let rows = Arc::clone(&arena.arena);
        let delay = Duration::from_secs_f64(delay);
        let mut slots = vec![(None, 0); setup.slots as usize];
        for &(expert, slot) in &prefetched {
            slots[slot].0 = Some(expert);
        }
        let prefetched = prefetched.into_iter().map(|(expert, _)| expert).collect();
        let decisions = Lru { rows, slots, delay, fault, prefetched, retires };
        // SAFETY: the tensors that the test keeps alive.
        let made = py.detach(|| unsafe { moecore_cuda::CudaEngine::new(device, setup, Box::new(decisions)) });
        made.and_then(|engine| CudaEngine::wrap(engine, 2)).map_err(|error| to_python(py, &error))
    }
}
