//! [`DeviceScheduler`]: which expert lies in which slot of a device whose kernels fetch for themselves.
//!
//! The device publishes what a call uses; [`Decisions::call`] answers where each missing expert goes, whom it displaces
//! and where its bytes are. Rows below come from a [`HostScheduler`] over memory that the device can read.
//!
//! Calls of one device are totally ordered, and so are its changes of residency: the arrival of call `n + 1` proves that
//! everything call `n` used is free, so a victim that call `n + 1` does not use itself may be overwritten at once, and
//! the host rows that call `n` was fetched from may be given away.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::decisions::{Decisions, DeviceCall, Order};
use super::{Call, HostScheduler, Ring, Rows};
use crate::device::HostMemory;
use crate::error::{Error, ErrorKind, Result};
use crate::experts::{ExpertId, ExpertStore};
use crate::residency::{PolicyKind, Residency};
use crate::telemetry::{Phase, Telemetry, add};

/// Victims that are chosen while nobody waits.
const PREPARED: usize = 16;

/// The book of a device's slots. Clones share it.
#[derive(Debug, Clone)]
pub struct DeviceScheduler(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    store: Arc<ExpertStore>,
    rows: Arc<HostScheduler>,
    memory: Arc<dyn HostMemory>,
    telemetry: Arc<Telemetry>,
    ring: Ring,
    /// Held for decisions only, never across a call of the driver or a wait for the device.
    book: Mutex<Book>,
}

#[derive(Debug)]
struct Book {
    residency: Residency,
    /// Host rows that the last call is fetched from.
    sources: Vec<Rows>,
    prefill: bool,
    /// Experts that have a slot whose bytes are still on their way.
    admitted: HashSet<ExpertId>,
}

/// Where the bytes of an expert are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// In a slot of the device.
    Slot(u32),
    /// Not on the device.
    Below,
}

impl DeviceScheduler {
    /// A book of `slots` empty slots over host rows, which lie in `memory`.
    pub fn new(
        store: Arc<ExpertStore>,
        slots: u32,
        policy: PolicyKind,
        rows: Arc<HostScheduler>,
        memory: Arc<dyn HostMemory>,
        telemetry: Arc<Telemetry>,
    ) -> Result<Self> {
        if slots == 0 {
            let message =
                format!("the budget holds no expert; the smallest that works is {} bytes", store.slot_bytes());
            return Err(Error::new(ErrorKind::Budget, message));
        }
        let experts: Vec<u32> = store.layers().iter().map(|layer| layer.experts).collect();
        let residency = Residency::new(&experts, slots, policy);
        let book = Mutex::new(Book { residency, sources: Vec::new(), prefill: false, admitted: HashSet::new() });
        Ok(Self(Arc::new(Shared { store, rows, memory, telemetry, ring: Ring::of(slots), book })))
    }

    /// The slots that prefill passes experts through.
    #[must_use]
    pub fn ring(&self) -> Ring {
        self.0.ring
    }

    /// The host rows below.
    #[must_use]
    pub fn rows(&self) -> &Arc<HostScheduler> {
        &self.0.rows
    }

    /// How many experts are on the device.
    #[must_use]
    pub fn resident(&self) -> u32 {
        self.book().residency.resident()
    }

    /// Clears the ring for a prefill: its experts, which the device must forget before the ring is written.
    ///
    /// Every call that was enqueued before must have ended.
    #[must_use]
    pub fn begin_prefill(&self) -> Vec<ExpertId> {
        let mut book = self.book();
        if book.prefill {
            return Vec::new();
        }
        book.prefill = true;
        let slots = self.0.ring.slots();
        let evicted = slots.filter_map(|slot| book.residency.withdraw(slot).ok().flatten());
        let evicted: Vec<ExpertId> = evicted.collect();
        for &expert in &evicted {
            add(&self.0.telemetry.of(self.0.store.locate(expert).0, Phase::Prefill).evictions, 1);
        }
        evicted
    }

    /// Gives the ring back to decoding, once its copies are over. True if a prefill was under way.
    #[must_use]
    pub fn end_prefill(&self) -> bool {
        let mut book = self.book();
        let was = std::mem::take(&mut book.prefill);
        if was {
            for slot in self.0.ring.slots() {
                book.residency.free(slot);
            }
        }
        was
    }

    /// Counts a call of a prefill, and says where each of its experts is.
    #[must_use]
    pub fn prefill(&self, call: &Call) -> Vec<Place> {
        let mut book = self.book();
        let counters = self.0.telemetry.of(call.layer, call.phase);
        add(&counters.calls, 1);
        add(&counters.lookups, call.experts.len() as u64);
        book.residency.tick();
        let place = |(&expert, &tokens): (&ExpertId, &u32)| {
            book.residency.used(expert, u64::from(tokens));
            self.0.telemetry.routed(expert, u64::from(tokens));
            if let Some(slot) = book.residency.slot_of(expert) {
                add(&counters.hits, 1);
                return Place::Slot(slot);
            }
            add(&counters.misses, 1);
            add(&counters.demand_bytes, self.0.store.row_bytes(expert));
            Place::Below
        };
        call.experts.iter().zip(&call.tokens).map(place).collect()
    }

    /// Where experts are now.
    #[must_use]
    pub fn places(&self, experts: &[ExpertId]) -> Vec<Place> {
        let book = self.book();
        let slot_of = |expert| book.residency.slot_of(expert).filter(|_| !book.admitted.contains(&expert));
        let place = |&expert: &ExpertId| slot_of(expert).map_or(Place::Below, Place::Slot);
        experts.iter().map(place).collect()
    }

    /// Gives slots to experts of one layer as long as some are free and the layer has less than its share; the caller copies them there and tells the device.
    #[must_use]
    pub fn admit(&self, experts: &[ExpertId]) -> Vec<(ExpertId, u32)> {
        let mut book = self.book();
        let cache = self.0.ring.first;
        let share = cache.div_ceil(u32::try_from(self.0.store.layers().len()).unwrap_or(u32::MAX));
        let mut admitted = Vec::new();
        for &expert in experts {
            let layer = self.0.store.locate(expert).0;
            if book.residency.resident() >= cache || book.residency.occupancy(layer) >= share {
                break;
            }
            if book.residency.slot_of(expert).is_none()
                && let Ok(placement) = book.residency.place(expert, |_| false)
            {
                admitted.push((expert, placement.slot));
                book.admitted.insert(expert);
            }
        }
        admitted
    }

    /// The copies of admitted experts are enqueued: from here on they are where the book says.
    pub fn settle(&self, experts: &[ExpertId]) {
        let mut book = self.book();
        for expert in experts {
            book.admitted.remove(expert);
        }
    }

    /// Host rows of some experts of a call, and their addresses; the rows stay while the guard lives.
    pub fn fetch(&self, layer: u32, experts: &[ExpertId]) -> Result<(Rows, Vec<u64>)> {
        self.0.fetch(layer, experts)
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        self.0.book()
    }
}

impl Shared {
    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fetch(&self, layer: u32, experts: &[ExpertId]) -> Result<(Rows, Vec<u64>)> {
        let rows = self.rows.hold(layer, experts)?;
        let addresses = rows.slots().iter().map(|&row| self.memory.row(row).as_ptr() as u64).collect();
        Ok((rows, addresses))
    }

    fn count(&self, call: &DeviceCall<'_>) {
        let counters = self.telemetry.of(call.layer, Phase::Decode);
        add(&counters.calls, 1);
        add(&counters.lookups, call.used.len() as u64);
        add(&counters.hits, (call.used.len() - call.missing.len()) as u64);
        add(&counters.misses, call.missing.len() as u64);
        let bytes: u64 = call.missing.iter().map(|&expert| self.store.row_bytes(expert)).sum();
        add(&counters.demand_bytes, bytes);
    }
}

impl Decisions for DeviceScheduler {
    fn call(&mut self, call: &DeviceCall<'_>, orders: &mut Vec<Order>) -> Result<()> {
        let shared = &*self.0;
        shared.count(call);
        let mut guard = shared.book();
        let book = &mut *guard;
        // This call's arrival says that the one before has been fetched.
        book.sources.clear();
        book.residency.tick();
        for &expert in call.used {
            book.residency.used(expert, 1);
        }
        if call.missing.is_empty() {
            return Ok(());
        }
        let (rows, addresses) = shared.fetch(call.layer, call.missing)?;
        // Nobody evicts an expert of the running call.
        let held: Vec<u32> = call.used.iter().filter_map(|&expert| book.residency.slot_of(expert)).collect();
        for &slot in &held {
            book.residency.hold(slot);
        }
        let mut placed = Vec::with_capacity(call.missing.len());
        let mut failed = None;
        for (&expert, source) in call.missing.iter().zip(addresses) {
            // A device that was told to forget an expert asks again: then its slot is written again.
            let slot = match book.residency.slot_of(expert) {
                Some(slot) => Ok((slot, None)),
                None => book.residency.place(expert, |slot| placed.contains(&slot)).map(|at| (at.slot, at.evicted)),
            };
            let Ok((slot, evicted)) = slot else {
                failed = Some(shared.too_small(call));
                break;
            };
            if evicted.is_some() {
                add(&shared.telemetry.of(call.layer, Phase::Decode).evictions, 1);
            }
            placed.push(slot);
            book.admitted.remove(&expert);
            orders.push(Order::fetch(expert, slot, source, evicted));
        }
        for &slot in &held {
            book.residency.release(slot);
        }
        book.sources.push(rows);
        failed.map_or(Ok(()), Err)
    }

    fn idle(&mut self) {
        self.0.book().residency.prepare_victims(PREPARED);
    }
}

impl Shared {
    fn too_small(&self, call: &DeviceCall<'_>) -> Error {
        let need = call.used.len() as u64 * self.store.slot_bytes();
        let message = format!(
            "one call needs {} experts at once, more than the budget holds; the smallest that works is {need} bytes",
            call.used.len()
        );
        Error::new(ErrorKind::Budget, message)
    }
}

#[cfg(test)]
#[path = "device_tests.rs"]
mod tests;
