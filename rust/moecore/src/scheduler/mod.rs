//! The only writer of residency: decides which expert lies in which slot, and has its bytes brought there.
//!
//! [`HostScheduler`] keeps experts in host memory over the files they come from: the slots of a model that runs on the
//! CPU, or the host rows below a GPU's slots. One thread owns the book, the policy and the queue of reads. Callers find
//! resident experts by plain loads under a [`Lease`](crate::residency::Lease) and talk to the thread only for what is
//! missing, so that callers and reads never block each other.
//!
//! Demands are served in the order in which they came, all of their experts or none, so that two callers who each need
//! what the other holds cannot wait for each other. Demand goes before prefetch. A prefill *streams*: what is
//! resident is used where it lies, free slots are filled, and everything else passes through a ring of a few slots,
//! double-buffered, so that one long prompt does not throw out what decoding has learned to keep.

pub mod decisions;
mod device;
mod message;
mod ring;
mod rows;
mod stream;
mod worker;

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded, unbounded};

use crate::device::HostMemory;
use crate::error::{Error, ErrorKind, Result};
use crate::experts::{ExpertId, ExpertStore};
use crate::io::{Done, ReadEngine};
use crate::residency::{PolicyKind, Residency, SlotTable};
use crate::telemetry::{Phase, Telemetry, add};

pub use device::{DeviceScheduler, Place};
pub use message::Call;
use message::{Answer, Message, Slots, stopped};
pub use rows::Rows;
pub use stream::{Stream, Waited, Wave};
use worker::Worker;

/// Slots that prefill passes experts through: two halves of `chunk` slots at the end of the arena.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ring {
    /// First slot.
    pub first: u32,
    /// Slots of one half.
    pub chunk: u32,
    /// Halves: 2, or 1 where there is one slot.
    pub halves: u32,
}

impl Ring {
    /// The ring of an arena of `slots` slots: 16 experts a half keep a link busy, 1/16 of the arena is not missed.
    #[must_use]
    pub fn of(slots: u32) -> Self {
        let chunk = (slots / 16).clamp(1, 16);
        let halves = if slots > 1 { 2 } else { 1 };
        Self { first: slots - chunk * halves, chunk, halves }
    }

    /// All its slots.
    #[must_use]
    pub fn slots(self) -> std::ops::Range<u32> {
        self.first..self.first + self.chunk * self.halves
    }
}

/// Experts in host memory over their files.
#[derive(Debug)]
pub struct HostScheduler {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    /// The process that has the thread: a fork of it has none.
    process: u32,
}

/// What callers, guards and the thread share.
#[derive(Debug)]
struct Shared {
    store: Arc<ExpertStore>,
    table: Arc<SlotTable>,
    telemetry: Arc<Telemetry>,
    inbox: Sender<Message>,
    ring: Ring,
    slots: u32,
}

/// Opens the reads of a scheduler: tests give a fake.
pub type OpenReads = Box<dyn FnOnce(Sender<Done>) -> Result<Box<dyn ReadEngine>>>;

impl HostScheduler {
    /// Starts the thread. `memory` holds the slots; its rows are [`ExpertStore::slot_bytes`] long.
    pub fn start(
        store: Arc<ExpertStore>,
        memory: Arc<dyn HostMemory>,
        policy: PolicyKind,
        telemetry: Arc<Telemetry>,
        reads: OpenReads,
    ) -> Result<Self> {
        let slots = memory.rows();
        if slots == 0 {
            let message =
                format!("the budget holds no expert; the smallest that works is {} bytes", store.slot_bytes());
            return Err(Error::new(ErrorKind::Budget, message));
        }
        let experts: Vec<u32> = store.layers().iter().map(|layer| layer.experts).collect();
        let (table, writer) = SlotTable::new(store.experts());
        let (inbox, messages) = unbounded();
        let (done, completions) = unbounded();
        let engine = reads(done)?;
        let ring = Ring::of(slots);
        let shared = Arc::new(Shared { store: store.clone(), table, telemetry: telemetry.clone(), inbox, ring, slots });
        let book = Residency::new(&experts, slots, policy);
        let worker = Worker::new(store, memory, book, writer, engine, telemetry, ring, shared.inbox.clone());
        let thread = std::thread::Builder::new()
            .name("moecore-scheduler".into())
            .spawn(move || worker.run(&messages, &completions))
            .map_err(|source| {
                Error::new(ErrorKind::Device, "cannot start a thread; raise the process limit").with_source(source)
            })?;
        Ok(Self { shared, thread: Some(thread), process: std::process::id() })
    }

    /// Makes the experts of a call resident and holds them until the [`Rows`] are dropped.
    ///
    /// Where all are resident nobody is asked and nobody waits.
    pub fn acquire(&self, call: Call) -> Result<Pending> {
        self.check_process()?;
        let counters = self.shared.telemetry.of(call.layer, call.phase);
        add(&counters.calls, 1);
        for (&expert, &tokens) in call.experts.iter().zip(&call.tokens) {
            self.shared.telemetry.routed(expert, u64::from(tokens));
        }
        if let Some(lease) = self.shared.table.begin_owned() {
            let slots: Option<Slots> = call.experts.iter().map(|&expert| lease.slot_of(expert)).collect();
            if let Some(slots) = slots {
                add(&counters.lookups, call.experts.len() as u64);
                add(&counters.hits, call.experts.len() as u64);
                self.shared.send(Message::Used(call))?;
                return Ok(Pending::ready(Rows::leased(slots, lease)));
            }
        }
        self.demand(call)
    }

    /// Asks the thread, whatever is resident.
    fn demand(&self, call: Call) -> Result<Pending> {
        if call.experts.len() > self.shared.slots as usize {
            return Err(self.too_small(call.experts.len()));
        }
        let (reply, answer) = bounded(1);
        let (layer, phase) = (call.layer, call.phase);
        self.shared.send(Message::Demand(call, reply))?;
        let pending = Waiting { shared: self.shared.clone(), answer, since: Instant::now(), layer, phase };
        Ok(Pending(PendingState::Waiting(pending)))
    }

    /// Makes experts of a layer resident, waits for them, and keeps them for as long as it takes; no tokens are counted.
    ///
    /// A lease is for the time of one computation: as long as it lives, no slot that was given up is written again. So
    /// a hold is kept in the book instead, unless every expert has a slot and none is ever given up.
    pub fn hold(&self, layer: u32, experts: &[ExpertId]) -> Result<Rows> {
        self.check_process()?;
        let call = Call { layer, phase: Phase::Decode, experts: experts.to_vec(), tokens: vec![0; experts.len()] };
        let mut pending =
            if self.shared.slots >= self.shared.store.experts() { self.acquire(call)? } else { self.demand(call)? };
        loop {
            match pending.wait(Duration::from_secs(1)) {
                Ok(rows) => return Ok(rows),
                Err(Unfinished::Failed(error)) => return Err(error),
                Err(Unfinished::Waiting(again)) => pending = again,
            }
        }
    }

    /// Streams a layer through the ring: for calls that need more experts than should displace others.
    /// The experts come in waves; those with the most tokens are the first to get slots that are free.
    pub fn stream(&self, call: Call) -> Result<Stream> {
        self.check_process()?;
        Stream::begin(self.shared.clone(), call)
    }

    /// Brings experts where there is room, when the disk has nothing better to do.
    pub fn prefetch(&self, experts: Vec<ExpertId>) -> Result<()> {
        self.shared.send(Message::Prefetch(experts))
    }

    /// Takes an expert whose bytes the caller has: `write` puts them into its slot. An expert without ranges stays for
    /// good, for it could not come back.
    pub fn put(&self, expert: ExpertId, write: impl FnOnce(u32)) -> Result<()> {
        let (reply, answer) = bounded(1);
        self.shared.send(Message::Reserve(expert, reply))?;
        let slots = answer.recv().map_err(|_| stopped())?.map_err(|error| error.to_error())?;
        write(slots[0]);
        self.shared.send(Message::Brought(expert))
    }

    /// How many slots there are.
    #[must_use]
    pub fn slots(&self) -> u32 {
        self.shared.slots
    }

    /// The ring of slots for streaming.
    #[must_use]
    pub fn ring(&self) -> Ring {
        self.shared.ring
    }

    /// How many experts are resident.
    #[must_use]
    pub fn resident(&self) -> usize {
        let Some(lease) = self.shared.table.begin() else { return 0 };
        (0..self.shared.store.experts()).filter(|&expert| lease.slot_of(expert).is_some()).count()
    }

    /// Threads do not survive a fork: nobody would ever answer.
    fn check_process(&self) -> Result<()> {
        if std::process::id() == self.process {
            return Ok(());
        }
        let message = "this process was forked from the one that loaded the model, and has none of its threads; load \
                       the model here, or start processes by spawn";
        Err(Error::new(ErrorKind::Device, message))
    }

    fn too_small(&self, experts: usize) -> Error {
        let need = experts as u64 * self.shared.store.slot_bytes();
        let have = u64::from(self.shared.slots) * self.shared.store.slot_bytes();
        let message = format!(
            "one call needs {experts} experts at once, and the budget of {have} bytes holds {}; the smallest that works \
             is {need} bytes",
            self.shared.slots
        );
        Error::new(ErrorKind::Budget, message)
    }
}

impl Drop for HostScheduler {
    fn drop(&mut self) {
        if self.check_process().is_err() {
            // The thread is in another process; waiting for it here would take for ever.
            std::mem::forget(self.thread.take());
            return;
        }
        // A thread that is gone already has no inbox.
        let _ = self.shared.inbox.send(Message::Close);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn send(&self, message: Message) -> Result<()> {
        self.inbox.send(message).map_err(|_| stopped())
    }
}

/// Rows that may still be on their way.
#[derive(Debug)]
pub struct Pending(PendingState);

#[derive(Debug)]
enum PendingState {
    Ready(Rows),
    Waiting(Waiting),
}

#[derive(Debug)]
struct Waiting {
    shared: Arc<Shared>,
    answer: Receiver<Answer<Rows>>,
    since: Instant,
    layer: u32,
    phase: Phase,
}

impl Pending {
    fn ready(rows: Rows) -> Self {
        Self(PendingState::Ready(rows))
    }

    /// Waits at most `patience`; gives itself back where the rows are not there yet.
    ///
    /// A pending call that is dropped is given up: its experts still come, and are held by nobody.
    pub fn wait(self, patience: Duration) -> Result<Rows, Unfinished> {
        let waiting = match self.0 {
            PendingState::Ready(rows) => return Ok(rows),
            PendingState::Waiting(waiting) => waiting,
        };
        match waiting.answer.recv_timeout(patience) {
            Ok(Ok(rows)) => {
                let stall = u64::try_from(waiting.since.elapsed().as_nanos()).unwrap_or(u64::MAX);
                add(&waiting.shared.telemetry.of(waiting.layer, waiting.phase).stall_ns, stall);
                Ok(rows)
            }
            Ok(Err(error)) => Err(Unfinished::Failed(error.to_error())),
            Err(RecvTimeoutError::Timeout) => Err(Unfinished::Waiting(Self(PendingState::Waiting(waiting)))),
            Err(RecvTimeoutError::Disconnected) => Err(Unfinished::Failed(stopped())),
        }
    }
}

/// Why [`Pending::wait`] has no rows to give.
#[derive(Debug)]
pub enum Unfinished {
    /// They are not there yet.
    Waiting(Pending),
    /// They will not come.
    Failed(Error),
}

#[cfg(test)]
mod tests;
