//! The mailbox: the ring of records that the GPU writes, and the answer that it waits for. Plain memory: the tests play
//! the GPU with a thread.
//!
//! Each cell of a record carries the call's number, so a record is there when all its cells are, in whatever order they
//! arrive. The answer is one word that is stored last, with release order, so that the orders before it are there.
#![expect(unsafe_code, reason = "memory shared with the GPU")]

use std::any::Any;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::layout::{
    ANSWER, APPLIED, CELL_COUNTS, CELL_EXPERTS, CELL_LAYER, CELL_PAIRS, ERROR, MAILBOX_BYTES, MAX_EXPERTS, MAX_ORDERS,
    ORDERS, RECORD_CELLS, RECORD_HEADER, RING, RING_RECORDS, RawOrder, STATUS_CLOSED, STATUS_OK, TIMEOUT, answer_word,
};

/// Memory that two sides use as a mailbox.
pub struct Mailbox {
    base: NonNull<u8>,
    _owner: Box<dyn Any + Send + Sync>,
}

// SAFETY: all access goes through atomics, but for the orders, which only the answering side writes while the other
// side does not read them (it reads between an answer and its next record).
unsafe impl Send for Mailbox {}
// SAFETY: as above.
unsafe impl Sync for Mailbox {}

impl std::fmt::Debug for Mailbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mailbox").field("base", &self.base).finish_non_exhaustive()
    }
}

/// A call, as its record tells it.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// Layer.
    pub layer: u32,
    /// Experts of the layer.
    pub experts: u32,
    /// Pairs.
    pub pairs: u32,
    /// Phase.
    pub phase: u32,
    /// Experts of the layer that were asked for.
    pub used: Vec<u32>,
    /// Those that had no slot.
    pub missing: Vec<u32>,
}

/// What a look at the ring has found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Look {
    /// The record is not there yet, or not whole.
    Nothing,
    /// It has been read.
    Record,
    /// A later record has taken its place: it came and went while nobody looked. Nobody waits for it.
    Overwritten,
}

impl Mailbox {
    /// The mailbox in [`MAILBOX_BYTES`] of zeros.
    ///
    /// # Safety
    /// `base` is aligned to 128 bytes, and the memory lives as long as `owner`.
    pub unsafe fn new(base: NonNull<u8>, owner: Box<dyn Any + Send + Sync>) -> Self {
        debug_assert!((base.as_ptr() as usize).is_multiple_of(128));
        Self { base, _owner: owner }
    }

    /// Address, for the host and for the GPU.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.base.as_ptr() as u64
    }

    fn word(&self, offset: usize) -> &AtomicU64 {
        debug_assert!(offset.is_multiple_of(8) && offset < MAILBOX_BYTES);
        // SAFETY: inside the mailbox, aligned, and only used as an atomic.
        unsafe { AtomicU64::from_ptr(self.base.as_ptr().add(offset).cast()) }
    }

    fn half(&self, offset: usize) -> &AtomicU32 {
        debug_assert!(offset.is_multiple_of(4) && offset < MAILBOX_BYTES);
        // SAFETY: inside the mailbox, aligned, and only used as an atomic.
        unsafe { AtomicU32::from_ptr(self.base.as_ptr().add(offset).cast()) }
    }

    fn cell(&self, seq: u32, cell: usize) -> &AtomicU64 {
        self.word(RING + ((seq % RING_RECORDS) as usize * RECORD_CELLS + cell) * 8)
    }

    /// Looks for call `seq` and reads it into `record`.
    pub fn look(&self, seq: u32, record: &mut Record) -> Look {
        let read = |cell: usize| {
            let word = self.cell(seq, cell).load(Ordering::Acquire);
            let (tag, content) = ((word >> 32) as u32, (word & u64::from(u32::MAX)) as u32);
            if tag == seq {
                Ok(content)
            } else if tag != 0 && tag.wrapping_sub(seq) < 1 << 31 {
                Err(Look::Overwritten)
            } else {
                Err(Look::Nothing)
            }
        };
        let mut whole = || -> Result<(), Look> {
            record.layer = read(CELL_LAYER)?;
            let pairs = read(CELL_PAIRS)?;
            (record.pairs, record.phase) = (pairs & 0xffff, pairs >> 16);
            read(CELL_COUNTS)?;
            record.experts = read(CELL_EXPERTS)?.min(MAX_EXPERTS);
            let words = record.experts.div_ceil(32);
            for (begin, experts) in [(0, &mut record.used), (words, &mut record.missing)] {
                experts.clear();
                for word in 0..words {
                    let mut bits = read(RECORD_HEADER + (begin + word) as usize)?;
                    while bits != 0 {
                        experts.push(word * 32 + bits.trailing_zeros());
                        bits &= bits - 1;
                    }
                }
            }
            Ok(())
        };
        whole().map_or_else(|look| look, |()| Look::Record)
    }

    /// Answers call `seq` with `orders`, those that copy first. The GPU goes on from here.
    pub fn answer(&self, seq: u32, orders: &[RawOrder]) {
        assert!(orders.len() <= MAX_ORDERS, "more orders than an answer holds");
        let copies = orders.iter().take_while(|order| order.source != 0).count();
        debug_assert!(orders[copies..].iter().all(|order| order.source == 0));
        // SAFETY: the orders' place, long enough; the GPU does not read it before the word below says so.
        unsafe {
            let place = self.base.as_ptr().add(ORDERS).cast::<RawOrder>();
            std::ptr::copy_nonoverlapping(orders.as_ptr(), place, orders.len());
        }
        self.word(ANSWER).store(answer_word(seq, STATUS_OK, copies, orders.len()), Ordering::Release);
    }

    /// Answers call `seq` with a failure.
    pub fn fail(&self, seq: u32, status: u32) {
        self.word(ANSWER).store(answer_word(seq, status, 0, 0), Ordering::Release);
    }

    /// Answers this and every later wait: the engine is closed.
    pub fn close(&self) {
        self.fail(0, STATUS_CLOSED);
    }

    /// How long the GPU waits for an answer.
    pub fn set_timeout(&self, nanoseconds: u64) {
        self.word(TIMEOUT).store(nanoseconds, Ordering::Relaxed);
    }

    /// Status of the first failure that the GPU has met, and its call.
    #[must_use]
    pub fn failure(&self) -> Option<(u32, u32)> {
        match self.half(ERROR).load(Ordering::Acquire) {
            STATUS_OK => None,
            status => Some((status, self.half(ERROR + 4).load(Ordering::Relaxed))),
        }
    }

    /// Forgets the failure. The GPU's own mark of it is in its state.
    pub fn clear_failure(&self) {
        self.half(ERROR).store(STATUS_OK, Ordering::Release);
    }

    /// The last call whose orders the GPU has carried out.
    #[must_use]
    pub fn applied(&self) -> u64 {
        self.word(APPLIED).load(Ordering::Acquire)
    }
}
