//! The mailbox: the ring of records that the GPU writes, and the answer that it waits for. Plain memory: the tests play
//! the GPU with a thread.
//!
//! Both ways go through cells that carry the call's number, so a record or an answer is there when all its cells are, in
//! whatever order they arrive. Only the list of a long answer has none: the answer's first cell is stored after it, with
//! release order.

use crate::layout::{
    ANSWER, CELL_COUNTS, CELL_EXPERTS, CELL_LAYER, CELL_PAIRS, ERROR, INLINE_ORDERS, MAX_EXPERTS, MAX_ORDERS,
    ORDER_CELLS, ORDERS, RECORD_CELLS, RECORD_HEADER, RING, RING_RECORDS, RawOrder, STATUS_CLOSED, STATUS_OK, TIMEOUT,
    answer_word, cell_word, halves,
};
use crate::sync::{AtomicU64, Ordering, Words};

/// Memory that two sides use as a mailbox.
#[derive(Debug)]
pub struct Mailbox {
    words: Words,
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
    /// The mailbox in [`MAILBOX_BYTES`](crate::layout::MAILBOX_BYTES) of zeros.
    #[must_use]
    pub fn new(words: Words) -> Self {
        Self { words }
    }

    /// Address, for the host and for the GPU.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.words.address()
    }

    /// The word at a byte offset.
    pub(crate) fn word(&self, offset: usize) -> &AtomicU64 {
        debug_assert!(offset.is_multiple_of(8));
        self.words.at(offset / 8)
    }

    /// A cell of a call's record.
    pub(crate) fn cell(&self, seq: u32, cell: usize) -> &AtomicU64 {
        self.word(RING + (seq as usize % RING_RECORDS * RECORD_CELLS + cell) * 8)
    }

    /// Looks for call `seq` and reads it into `record`.
    pub fn look(&self, seq: u32, record: &mut Record) -> Look {
        let read = |cell: usize| {
            let word = self.cell(seq, cell).load(Ordering::Acquire);
            let (tag, content) = halves(word);
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
    ///
    /// # Panics
    /// If there are more than [`MAX_ORDERS`].
    pub fn answer(&self, seq: u32, orders: &[RawOrder]) {
        assert!(orders.len() <= MAX_ORDERS, "more orders than an answer holds");
        let copies = orders.iter().take_while(|order| order.source != 0).count();
        debug_assert!(orders[copies..].iter().all(|order| order.source == 0));
        if orders.len() <= INLINE_ORDERS {
            let contents = orders.iter().flat_map(RawOrder::contents);
            for (cell, content) in (1..=INLINE_ORDERS * ORDER_CELLS).zip(contents) {
                self.word(ANSWER + cell * 8).store(cell_word(seq, content), Ordering::Relaxed);
            }
        } else {
            for (at, word) in orders.iter().flat_map(RawOrder::words).enumerate() {
                self.word(ORDERS + at * 8).store(word, Ordering::Relaxed);
            }
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
        // The GPU writes the call's half first.
        let (seq, status) = halves(self.word(ERROR).load(Ordering::Acquire));
        (status != STATUS_OK).then_some((status, seq))
    }

    /// Forgets the failure. The GPU's own mark of it is in its state.
    pub fn clear_failure(&self) {
        self.word(ERROR).store(0, Ordering::Release);
    }
}
