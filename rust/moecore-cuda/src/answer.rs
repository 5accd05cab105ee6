//! The answering thread: reads the ring, asks the scheduler, answers the GPU.
//!
//! **No locks, no driver calls, no GIL here.** The GPU may be waiting, and whoever waits for the GPU may hold a lock of
//! the driver or of Python. (The one lock guards the text of an error, and nobody waits while holding it.) Whatever goes wrong ends in an answer: an error or a panic of the scheduler answers with a
//! failure, and so does the end of the thread.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use moecore::scheduler::decisions::{Decisions, DeviceCall, Order, Step};
use moecore::{Error, ErrorKind, Result};

use crate::layout::{MAX_ORDERS, NOTHING, RawOrder, STATUS_ERROR, sequence_after};
use crate::mailbox::{Look, Mailbox, Record};
use crate::stats::Stats;

/// After the last record the thread goes on looking without a pause for this long.
const KEEN: Duration = Duration::from_millis(2);
/// Then it sleeps between looks, longer each time.
const NAPS: (Duration, Duration) = (Duration::from_micros(20), Duration::from_micros(100));
/// Looks between two looks at the clock.
const LOOKS: u32 = 64;

/// One layer's experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layer {
    /// Dense id of expert 0.
    pub first: u32,
    /// Experts.
    pub experts: u32,
    /// Bytes of a row: a multiple of 16.
    pub row_bytes: u64,
}

/// What the thread shares with its engine.
#[derive(Debug, Default)]
pub struct Shared {
    /// Asks the thread to end.
    stop: AtomicBool,
    /// Whether `reason` says something: all that a healthy call looks at.
    failed: AtomicBool,
    /// The first error of the scheduler, told at the caller's next call. Held for a copy of the text only.
    reason: Mutex<String>,
    /// The scheduler has panicked: nothing of it can be trusted any more.
    broken: AtomicBool,
    /// Counters.
    pub stats: Stats,
}

impl Shared {
    /// The first error of the scheduler.
    #[must_use]
    pub fn error(&self) -> Option<String> {
        self.failed.load(Ordering::Acquire).then(|| self.reason().clone())
    }

    /// Forgets the error. False: the scheduler has panicked, and there is no way on.
    pub(crate) fn clear(&self) -> bool {
        let usable = !self.broken.load(Ordering::Acquire);
        if usable {
            self.failed.store(false, Ordering::Release);
        }
        usable
    }

    /// Keeps the first error.
    fn fail(&self, reason: String) {
        let mut kept = self.reason();
        if !self.failed.load(Ordering::Acquire) {
            *kept = reason;
            self.failed.store(true, Ordering::Release);
        }
    }

    fn reason(&self) -> MutexGuard<'_, String> {
        self.reason.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The running thread.
#[derive(Debug)]
pub struct Answering {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Box<dyn Decisions>>>,
}

impl Answering {
    /// Starts answering for `layers` with `slots` slots.
    pub fn start(mailbox: Arc<Mailbox>, layers: Vec<Layer>, slots: u32, decisions: Box<dyn Decisions>) -> Result<Self> {
        let shared = Arc::new(Shared::default());
        let experts = layers.iter().map(|layer| layer.first + layer.experts).max().unwrap_or(0);
        let worker = Worker {
            mailbox,
            shared: Arc::clone(&shared),
            layers,
            slots,
            experts,
            decisions,
            orders: Vec::with_capacity(MAX_ORDERS),
            raw: Vec::with_capacity(MAX_ORDERS),
            seen: 0,
        };
        let thread = std::thread::Builder::new()
            .name("moecore-answer".to_owned())
            .spawn(move || worker.run())
            .map_err(|error| Error::new(ErrorKind::Device, "no thread to answer the GPU").with_source(error))?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// What the thread shares.
    #[must_use]
    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Ends the thread: every wait from now on is answered with a failure. Gives the scheduler back, whose memory the
    /// GPU may still read. A second call does nothing.
    pub fn stop(&mut self) -> Option<Box<dyn Decisions>> {
        self.shared.stop.store(true, Ordering::Release);
        self.thread.take()?.join().ok()
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        self.stop();
    }
}

struct Worker {
    mailbox: Arc<Mailbox>,
    shared: Arc<Shared>,
    layers: Vec<Layer>,
    slots: u32,
    experts: u32,
    decisions: Box<dyn Decisions>,
    orders: Vec<Order>,
    raw: Vec<RawOrder>,
    seen: u64,
}

/// Answers all waits when the thread ends, however it ends.
struct Closing(Arc<Mailbox>);

impl Drop for Closing {
    fn drop(&mut self) {
        self.0.close();
    }
}

impl Worker {
    fn run(mut self) -> Box<dyn Decisions> {
        let _closing = Closing(Arc::clone(&self.mailbox));
        let mut record = Record::default();
        let mut seq = 1;
        let mut last = Instant::now();
        let mut nap = NAPS.0;
        let mut looks = 0_u32;
        loop {
            match self.mailbox.look(seq, &mut record) {
                Look::Record => {
                    last = Instant::now();
                    nap = NAPS.0;
                    self.serve(seq, &mut record, last);
                    seq = sequence_after(seq);
                }
                Look::Overwritten => {
                    self.shared.stats.dropped();
                    self.seen += 1;
                    seq = sequence_after(seq);
                }
                Look::Nothing if self.shared.stop.load(Ordering::Acquire) => return self.decisions,
                Look::Nothing => {
                    looks = looks.wrapping_add(1);
                    if !looks.is_multiple_of(LOOKS) || last.elapsed() < KEEN {
                        std::hint::spin_loop();
                    } else {
                        std::thread::sleep(nap);
                        nap = (nap * 2).min(NAPS.1);
                        looks = looks.wrapping_sub(1);
                    }
                }
            }
        }
    }

    /// One call: the scheduler hears of it, and the GPU gets its answer if it waits.
    fn serve(&mut self, seq: u32, record: &mut Record, arrived: Instant) {
        self.seen += 1;
        self.shared.stats.record();
        let waits = !record.missing.is_empty();
        match catch_unwind(AssertUnwindSafe(|| self.decide(record))) {
            Ok(Ok(())) => {
                if waits {
                    self.mailbox.answer(seq, &self.raw);
                    self.count(record, arrived);
                    // Nobody waits now.
                    let idle = catch_unwind(AssertUnwindSafe(|| self.decisions.idle()));
                    idle.unwrap_or_else(|panic| self.broke_down(panic.as_ref()));
                }
                return;
            }
            Ok(Err(error)) => self.shared.fail(error.to_string()),
            Err(panic) => self.broke_down(panic.as_ref()),
        }
        if waits {
            self.mailbox.fail(seq, STATUS_ERROR);
        }
    }

    fn count(&self, record: &Record, arrived: Instant) {
        let fetched = self.raw.iter().take_while(|order| order.source != 0).count() as u64;
        let installed = self.raw.iter().filter(|order| order.source == 0 && order.expert != NOTHING).count() as u64;
        let bytes = fetched * self.layers[record.layer as usize].row_bytes;
        self.shared.stats.answered(arrived.elapsed(), fetched, bytes, installed);
    }

    /// Keeps what a panic of the scheduler said.
    fn broke_down(&self, panic: &(dyn Any + Send)) {
        let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
        let text = text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
        self.shared.broken.store(true, Ordering::Release);
        self.shared.fail(format!("the scheduler broke down: {text}"));
    }

    /// Fills `raw` with the scheduler's orders, those that copy first.
    fn decide(&mut self, record: &mut Record) -> Result<()> {
        if let Some(error) = self.shared.error() {
            return Err(Error::new(ErrorKind::Device, error));
        }
        let broken =
            |what: &str| Error::new(ErrorKind::Device, format!("{what} (a defect of moecore: please report it)"));
        let layer = self.layers.get(record.layer as usize).copied();
        let Some(layer) = layer.filter(|layer| layer.experts == record.experts) else {
            return Err(broken("the GPU has published a call of an unknown layer"));
        };
        for expert in record.used.iter_mut().chain(&mut record.missing) {
            *expert += layer.first;
        }
        let call = DeviceCall {
            seq: self.seen,
            layer: record.layer,
            phase: record.phase,
            pairs: record.pairs,
            used: &record.used,
            missing: &record.missing,
        };
        self.orders.clear();
        self.decisions.call(&call, &mut self.orders)?;
        self.raw.clear();
        if call.missing.is_empty() {
            return Ok(());
        }
        if self.orders.len() > MAX_ORDERS {
            return Err(broken("more orders than an answer holds"));
        }
        for order in &self.orders {
            if order.evicted.is_some_and(|evicted| evicted >= self.experts || call.used.binary_search(&evicted).is_ok())
            {
                return Err(broken("an order evicts an expert that the call uses"));
            }
            let (source, slot, expert) = match order.step {
                Step::Fetch { expert, slot, source } => (source, slot, expert),
                Step::Install { expert, slot } => (0, slot, expert),
                Step::Retire => (0, NOTHING, NOTHING),
            };
            let fetches = matches!(order.step, Step::Fetch { .. });
            if fetches && (source == 0 || !source.is_multiple_of(16)) {
                return Err(broken("an order copies from an address that no row has"));
            }
            if order.step != Step::Retire && (slot >= self.slots || expert >= self.experts) {
                return Err(broken("an order names a slot or an expert that is not there"));
            }
            let evicted = order.evicted.unwrap_or(NOTHING);
            self.raw.push(RawOrder { source, slot, expert, evicted, reserved: [0; 3] });
        }
        self.raw.sort_by_key(|order| order.source == 0);
        Ok(())
    }
}
