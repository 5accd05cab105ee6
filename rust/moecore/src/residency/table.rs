//! The slot table: lookups are plain loads, and no slot is overwritten under a reader.
//!
//! Each expert has one word: generation, slot, resident bit. One writer changes words; any thread looks them up, under
//! a [`Lease`]. A lease costs one compare-and-swap and one fence, a lookup in it one load, its end one store, so that a
//! whole call (or a whole step) of lookups is paid for once, and neither side ever waits for the other.
//!
//! # Why a slot is never overwritten under a reader
//!
//! This is RCU with the lease as the read-side section. The steps, in program order:
//!
//! ```text
//! reader                                       writer
//! r1  c = clock.load()                         w1  word.store(absent)                retire
//! r2  lane.compare_exchange(0, c)              w2  clock.store(c + 1, Release)
//! r3  fence(SeqCst)                            w3  fence(SeqCst)
//! r4  word.load(Acquire); use the slot         w4  lane.load(Acquire) of all lanes    is_quiet
//! r5  lane.store(0, Release)                   w5  overwrite the slot; publish the next expert
//! ```
//!
//! A retirement `R = c + 1` is quiet when each lane is 0 or holds a clock of at least `R`. Take a reader whose r4 found
//! the word as it was before w1, and a writer that has reached w5. The fences r3 and w3 have one order:
//!
//! 1. *w3 before r3.* What lies before w3 is seen by what lies after r3: r4 sees w1. A contradiction: there is no such
//!    reader.
//! 2. *r3 before w3.* Then w4 sees r2 of this lane, or a later value.
//!    - It saw r2 itself, so `c >= R`: r1 read what w2 (or a later retirement) stored. That is a release, and r3 makes
//!      r1 an acquire, so w1 happened before r4, which thus sees it. A contradiction again.
//!    - It saw r5: a release and an acquire, so all uses of the slot in r4 happened before w5. That is what we want.
//!    - It saw a later lease's r2 on the same lane. r2 is a read-modify-write, so it stands in the release sequence of
//!      r5, and the acquire in w4 still pairs with r5.
//!
//! An old value of the clock in r1 makes a lease look older than it is; this can delay the writer, never mislead it.
//! Bytes reach readers by the release in [`Writer::publish`] and the acquire in [`Lease::slot_of`].
//!
//! A lease that never ends keeps all later retirements from being quiet: hold experts that must stay for long with
//! [`Residency::hold`](super::Residency::hold) instead.
//!
//! The loom models in `tests/loom.rs` check this, and fail when one of these orderings or fences is weakened.

use std::cell::Cell;
use std::sync::Arc;

use super::sync::{AtomicU64, Ordering, fence, first_lane};

/// Leases that can live at the same time in a table of [`SlotTable::new`].
pub const LANES: usize = 64;

const FREE: u64 = 0;
const RESIDENT: u64 = 1;
const SLOT_SHIFT: u32 = 1;
const GENERATION_SHIFT: u32 = 33;

/// Clock of one lease, or [`FREE`]. As large as the pair of cache lines that x86 fetches together.
#[derive(Debug)]
#[repr(align(128))]
struct Lane(AtomicU64);

impl Lane {
    fn end(&self) {
        // Release: all that was read from slots is read before the writer can see the lane free.
        self.0.store(FREE, Ordering::Release);
    }
}

/// One word an expert, read by anyone under a lease and written by the one [`Writer`].
#[derive(Debug)]
pub struct SlotTable {
    words: Box<[AtomicU64]>,
    lanes: Box<[Lane]>,
    /// Number of the last retirement, plus one: a lane's clock is never [`FREE`].
    clock: AtomicU64,
}

/// Time of a retirement. Later retirements have greater epochs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Epoch(u64);

/// Where a lookup found an expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Found {
    /// The slot that holds the expert's row.
    pub slot: u32,
    /// Counts the expert's publications and retirements, modulo 2^31: while it is the same, the row has not moved.
    pub generation: u32,
}

impl SlotTable {
    /// A table in which no expert is resident, and its one writer.
    #[must_use]
    pub fn new(experts: u32) -> (Arc<Self>, Writer) {
        Self::with_lanes(experts, LANES)
    }

    /// As [`new`](Self::new), for at most `lanes` leases at a time.
    #[must_use]
    pub fn with_lanes(experts: u32, lanes: usize) -> (Arc<Self>, Writer) {
        let table = Arc::new(Self {
            words: (0..experts).map(|_| AtomicU64::new(0)).collect(),
            lanes: (0..lanes).map(|_| Lane(AtomicU64::new(FREE))).collect(),
            clock: AtomicU64::new(1),
        });
        let writer = Writer { table: Arc::clone(&table), quiet: Cell::new(1) };
        (table, writer)
    }

    /// Number of experts.
    #[must_use]
    pub fn experts(&self) -> usize {
        self.words.len()
    }

    /// Begins a lease; none when all lanes are taken.
    ///
    /// Until the lease ends, no slot that it finds is overwritten.
    #[must_use]
    pub fn begin(&self) -> Option<Lease<'_>> {
        let lane = &self.lanes[self.take_lane()?];
        Some(Lease { words: &self.words, lane })
    }

    /// As [`begin`](Self::begin), for a lease that keeps the table alive and can be stored.
    #[must_use]
    pub fn begin_owned(self: &Arc<Self>) -> Option<OwnedLease> {
        let lane = self.take_lane()?;
        Some(OwnedLease { table: Arc::clone(self), lane })
    }

    fn take_lane(&self) -> Option<usize> {
        // Relaxed: the fence below makes it an acquire. Who knows of a retirement also sees the word that it cleared.
        let clock = self.clock.load(Ordering::Relaxed);
        let (count, first) = (self.lanes.len(), first_lane());
        let mut lanes = (0..count).map(|i| (first + i) % count);
        // Relaxed: the fence below orders it; as a read-modify-write it keeps the release sequence of the last lease.
        let lane = lanes.find(|&at| {
            let lane = &self.lanes[at];
            lane.0.load(Ordering::Relaxed) == FREE
                && lane.0.compare_exchange(FREE, clock, Ordering::Relaxed, Ordering::Relaxed).is_ok()
        })?;
        fence(Ordering::SeqCst);
        Some(lane)
    }
}

/// The right to use the slots that are found under it.
#[derive(Debug)]
#[must_use = "slots are safe to read only while the lease lives"]
pub struct Lease<'t> {
    words: &'t [AtomicU64],
    lane: &'t Lane,
}

impl Lease<'_> {
    /// The slot of a resident expert: one load.
    ///
    /// # Panics
    /// When the table has no expert `e`.
    #[must_use]
    pub fn slot_of(&self, e: u32) -> Option<u32> {
        slot_in(read(self.words, e))
    }

    /// The slot of a resident expert with its generation: one load.
    ///
    /// # Panics
    /// When the table has no expert `e`.
    #[must_use]
    pub fn find(&self, e: u32) -> Option<Found> {
        let word = read(self.words, e);
        slot_in(word).map(|slot| Found { slot, generation: generation_in(word) })
    }
}

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        self.lane.end();
    }
}

/// A [`Lease`] that keeps its table alive.
#[derive(Debug)]
#[must_use = "slots are safe to read only while the lease lives"]
pub struct OwnedLease {
    table: Arc<SlotTable>,
    lane: usize,
}

impl OwnedLease {
    /// The slot of a resident expert: one load.
    ///
    /// # Panics
    /// When the table has no expert `e`.
    #[must_use]
    pub fn slot_of(&self, e: u32) -> Option<u32> {
        slot_in(read(&self.table.words, e))
    }
}

impl Drop for OwnedLease {
    fn drop(&mut self) {
        self.table.lanes[self.lane].end();
    }
}

/// The one writer of a [`SlotTable`]: it comes with the table, cannot be cloned, and is not shared between threads.
///
/// ```compile_fail
/// fn shared(_: impl Sync) {}
/// shared(moecore::residency::SlotTable::new(1).1);
/// ```
#[derive(Debug)]
pub struct Writer {
    table: Arc<SlotTable>,
    /// Retirements up to this one are known to be quiet. The `Cell` also keeps the writer from being `Sync`.
    quiet: Cell<u64>,
}

impl Writer {
    /// The table that this writer writes.
    #[must_use]
    pub fn table(&self) -> &Arc<SlotTable> {
        &self.table
    }

    /// Makes an expert resident: its bytes lie in `slot`, and readers may find them.
    ///
    /// # Panics
    /// When the expert is resident already: its old slot would never be retired.
    pub fn publish(&mut self, e: u32, slot: u32) {
        let word = &self.table.words[e as usize];
        let before = word.load(Ordering::Relaxed);
        assert!(slot_in(before).is_none(), "expert {e} is resident: retire it first");
        let after = next_generation(before) | u64::from(slot) << SLOT_SHIFT | RESIDENT;
        // Release: who finds the slot also sees the bytes in it.
        word.store(after, Ordering::Release);
    }

    /// Ends an expert's residency. Its slot may be overwritten once the returned epoch [is quiet](Self::is_quiet).
    ///
    /// # Panics
    /// When the expert is not resident.
    pub fn retire(&mut self, e: u32) -> Epoch {
        let word = &self.table.words[e as usize];
        let before = word.load(Ordering::Relaxed);
        assert!(slot_in(before).is_some(), "expert {e} is not resident");
        // Relaxed: the clock's release carries it.
        word.store(next_generation(before), Ordering::Relaxed);
        let epoch = self.table.clock.load(Ordering::Relaxed) + 1;
        // Release: a lease of this epoch finds the word cleared.
        self.table.clock.store(epoch, Ordering::Release);
        fence(Ordering::SeqCst);
        Epoch(epoch)
    }

    /// Whether no lease that began before the retirement lives. Once true, it stays true.
    #[must_use]
    pub fn is_quiet(&self, epoch: Epoch) -> bool {
        if epoch.0 > self.quiet.get() {
            self.quiet.set(self.oldest());
        }
        epoch.0 <= self.quiet.get()
    }

    /// Clock of the oldest lease, or of now: all retirements up to it are quiet.
    fn oldest(&self) -> u64 {
        let clocks = self.table.lanes.iter().map(|lane| lane.0.load(Ordering::Acquire));
        let now = self.table.clock.load(Ordering::Relaxed);
        clocks.filter(|&clock| clock != FREE).fold(now, u64::min)
    }
}

fn read(words: &[AtomicU64], e: u32) -> u64 {
    // Acquire: with the slot come the bytes in it.
    words[e as usize].load(Ordering::Acquire)
}

fn slot_in(word: u64) -> Option<u32> {
    #[expect(clippy::cast_possible_truncation, reason = "the slot's 32 bits")]
    (word & RESIDENT != 0).then_some((word >> SLOT_SHIFT) as u32)
}

fn generation_in(word: u64) -> u32 {
    u32::try_from(word >> GENERATION_SHIFT).expect("31 bits")
}

/// The word's next generation, neither slot nor resident; the counter drops out at the top when it is full.
fn next_generation(word: u64) -> u64 {
    ((word >> GENERATION_SHIFT) + 1) << GENERATION_SHIFT
}
