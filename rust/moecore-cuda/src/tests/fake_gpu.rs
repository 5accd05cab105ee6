//! What `cuda/fetch.cu` does with the mailbox, step by step, on the host.

#![cfg_attr(moecore_loom, expect(dead_code, reason = "models run no whole calls"))]

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::layout::{
    ANSWER, CELL_COUNTS, CELL_EXPERTS, CELL_LAYER, CELL_PAIRS, ERROR, INLINE_ORDERS, NOTHING, ORDER_CELLS, ORDERS,
    RECORD_HEADER, RawOrder, STATUS_CLOSED, STATUS_MISSING, STATUS_OK, STATUS_TIMEOUT, cell_word, halves,
    sequence_after,
};
use crate::mailbox::Mailbox;
use crate::sync::Ordering;

#[cfg(moecore_loom)]
use loom::{sync::atomic::fence, thread::yield_now};
#[cfg(not(moecore_loom))]
use std::{sync::atomic::fence, thread::yield_now};

/// The GPU's side: its table and its state.
pub(super) struct FakeGpu {
    pub(super) mailbox: Arc<Mailbox>,
    pub(super) seq: u32,
    /// Status of the first failure.
    pub(super) error: u32,
    /// Slot of each expert of the one layer.
    pub(super) table: Vec<Option<u32>>,
    /// Address of the row in each slot.
    pub(super) slots: Vec<u64>,
    /// Looks at the answer before it gives up.
    pub(super) patience: u32,
}

impl FakeGpu {
    pub(super) fn new(mailbox: Arc<Mailbox>, experts: usize, slots: usize) -> Self {
        let (table, slots) = (vec![None; experts], vec![0; slots]);
        Self { mailbox, seq: 1, error: STATUS_OK, table, slots, patience: u32::MAX }
    }

    /// Writes the record of a call whose experts are all below 32 x words.
    pub(super) fn publish(&self, used: &BTreeSet<u32>, missing: &BTreeSet<u32>) {
        let cells = self.cells(used, missing);
        // Backwards: the order must not matter.
        for (cell, content) in cells.into_iter().enumerate().rev() {
            self.mailbox.cell(self.seq, cell).store(cell_word(self.seq, content), Ordering::Relaxed);
        }
    }

    fn cells(&self, used: &BTreeSet<u32>, missing: &BTreeSet<u32>) -> Vec<u32> {
        let words = self.table.len().div_ceil(32);
        let mut cells = vec![0; RECORD_HEADER + 2 * words];
        let count = |set: &BTreeSet<u32>| u32::try_from(set.len()).expect("few");
        cells[CELL_LAYER] = 0;
        cells[CELL_PAIRS] = count(used);
        cells[CELL_COUNTS] = count(used) | count(missing) << 16;
        cells[CELL_EXPERTS] = u32::try_from(self.table.len()).expect("few");
        for (set, begin) in [(used, RECORD_HEADER), (missing, RECORD_HEADER + words)] {
            for &expert in set {
                cells[begin + expert as usize / 32] |= 1 << (expert % 32);
            }
        }
        cells
    }

    /// Waits for the answer to the running call: its orders, or a status.
    pub(super) fn hear(&self) -> Result<Vec<RawOrder>, u32> {
        for _ in 0..self.patience {
            let (tag, head) = halves(self.mailbox.word(ANSWER).load(Ordering::Relaxed));
            if head >> 24 == STATUS_CLOSED {
                return Err(STATUS_CLOSED);
            }
            if tag == self.seq && head >> 24 != STATUS_OK {
                return Err(head >> 24);
            }
            if tag == self.seq
                && let Some(orders) = self.orders(head)
            {
                return Ok(orders);
            }
            yield_now();
        }
        Err(STATUS_TIMEOUT)
    }

    /// The orders of an answer, once they are there, and with them what the host wrote before.
    fn orders(&self, head: u32) -> Option<Vec<RawOrder>> {
        let count = (head & 0xfff) as usize;
        if count > INLINE_ORDERS {
            fence(Ordering::Acquire);
            return Some((0..count).map(|at| self.listed(at)).collect());
        }
        let mut contents = Vec::new();
        for cell in 1..=count * ORDER_CELLS {
            let (tag, content) = halves(self.mailbox.word(ANSWER + cell * 8).load(Ordering::Relaxed));
            contents.push((tag == self.seq).then_some(content)?);
        }
        fence(Ordering::Acquire);
        let order = |part: &[u32]| RawOrder {
            source: cell_word(part[1], part[0]),
            slot: part[2],
            expert: part[3],
            evicted: part[4],
            reserved: [0; 3],
        };
        Some(contents.chunks(ORDER_CELLS).map(order).collect())
    }

    fn listed(&self, at: usize) -> RawOrder {
        let word = |i: usize| self.mailbox.word(ORDERS + (at * 4 + i) * 8).load(Ordering::Relaxed);
        let (expert, slot) = halves(word(1));
        RawOrder { source: word(0), slot, expert, evicted: halves(word(2)).1, reserved: [0; 3] }
    }

    /// One call: slots of the experts, or the status it failed with.
    pub(super) fn acquire(&mut self, experts: &[u32]) -> Result<Vec<u32>, u32> {
        let used: BTreeSet<u32> = experts.iter().copied().collect();
        let missing: BTreeSet<u32> = used.iter().copied().filter(|&e| self.table[e as usize].is_none()).collect();
        if self.error != STATUS_OK {
            return Err(self.error);
        }
        self.publish(&used, &missing);
        let heard = if missing.is_empty() { Ok(Vec::new()) } else { self.hear() };
        let seq = self.seq;
        self.seq = sequence_after(seq);
        let orders = heard.map_err(|status| self.fail(seq, status))?;
        for order in orders {
            if order.source != 0 {
                self.slots[order.slot as usize] = order.source;
            }
            if order.evicted != NOTHING {
                self.table[order.evicted as usize] = None;
            }
            if order.expert != NOTHING {
                self.table[order.expert as usize] = Some(order.slot);
            }
        }
        let slots: Option<Vec<u32>> = experts.iter().map(|&expert| self.table[expert as usize]).collect();
        slots.ok_or_else(|| self.fail(seq, STATUS_MISSING))
    }

    fn fail(&mut self, seq: u32, status: u32) -> u32 {
        self.error = status;
        self.mailbox.word(ERROR).store(cell_word(seq, status), Ordering::Release);
        status
    }
}
