//! The bytes that the kernels and this crate share: `cuda/mailbox.cuh` and `cuda/experts.cu`, as seen from this side.

use crate::routing::GateArgs;

/// One of two numbers: loom's models are small.
const fn sized(usual: usize, in_models: usize) -> usize {
    if cfg!(moecore_loom) { in_models } else { usual }
}

/// Records that the ring holds before the oldest is overwritten.
pub const RING_RECORDS: usize = sized(4096, 2);
/// 8-byte cells of a record.
pub const RECORD_CELLS: usize = sized(80, 6);
/// Cells before the bitmaps.
pub const RECORD_HEADER: usize = 4;
/// Pairs of a token and an expert that one call may have.
pub const MAX_PAIRS: u32 = 1024;
/// Experts that a layer may have.
pub const MAX_EXPERTS: u32 = 1024;
/// Orders of one answer.
pub const MAX_ORDERS: usize = sized(2048, 2);
/// 8-byte cells of an answer.
pub const ANSWER_CELLS: usize = sized(64, 6);
/// Cells of an order that lies in the answer itself.
pub const ORDER_CELLS: usize = 5;
/// Orders that the answer itself holds; if there are more, all are in the list.
pub const INLINE_ORDERS: usize = sized(12, 1);
/// Changes of the table in one launch.
pub const TABLE_BATCH: usize = 384;
/// No expert, no slot.
pub const NOTHING: u32 = u32::MAX;

/// Header cell: the layer.
pub const CELL_LAYER: usize = 0;
/// Header cell: pairs, and the phase above bit 16.
pub const CELL_PAIRS: usize = 1;
/// Header cell: used experts, and missing ones above bit 16.
pub const CELL_COUNTS: usize = 2;
/// Header cell: experts of the layer.
pub const CELL_EXPERTS: usize = 3;

/// Offset of the answer's cells.
pub const ANSWER: usize = 0;
/// Offset of the watchdog's patience in nanoseconds.
pub const TIMEOUT: usize = ANSWER_CELLS * 8;
/// Offset of the first failure's status (u32) and its call (u32).
pub const ERROR: usize = TIMEOUT + 128;
/// Offset of the orders.
pub const ORDERS: usize = ERROR + 128;
/// Offset of the ring.
pub const RING: usize = ORDERS + MAX_ORDERS * size_of::<RawOrder>();
/// Length of the mailbox.
pub const MAILBOX_BYTES: usize = RING + RING_RECORDS * RECORD_CELLS * 8;
/// Length of the state in device memory.
pub const STATE_BYTES: usize = 64;

/// The call went well.
pub const STATUS_OK: u32 = 0;
/// The host could not serve the call.
pub const STATUS_ERROR: u32 = 1;
/// The engine is closed.
pub const STATUS_CLOSED: u32 = 2;
/// The GPU waited longer than the watchdog allows.
pub const STATUS_TIMEOUT: u32 = 3;
/// The orders left an expert without a slot.
pub const STATUS_MISSING: u32 = 4;

/// `Order` of the kernels.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RawOrder {
    /// Address of the row, or 0.
    pub source: u64,
    /// Slot, or [`NOTHING`].
    pub slot: u32,
    /// Dense id, or [`NOTHING`].
    pub expert: u32,
    /// Dense id, or [`NOTHING`].
    pub evicted: u32,
    /// Zero.
    pub reserved: [u32; 3],
}

impl RawOrder {
    /// The order as it lies in the list.
    #[must_use]
    pub fn words(&self) -> [u64; 4] {
        let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
        [self.source, pair(self.slot, self.expert), u64::from(self.evicted), 0]
    }

    /// What its cells in an answer hold.
    #[must_use]
    pub fn contents(&self) -> [u32; ORDER_CELLS] {
        let (high, low) = halves(self.source);
        [low, high, self.slot, self.expert, self.evicted]
    }
}

/// `AcquireArgs` of the kernels.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct AcquireArgs {
    pub(crate) ids: u64,
    pub(crate) slots: u64,
    pub(crate) table: u64,
    pub(crate) counts: u64,
    pub(crate) state: u64,
    pub(crate) mailbox: u64,
    pub(crate) arena: u64,
    pub(crate) slot_bytes: u64,
    pub(crate) row_bytes: u64,
    pub(crate) pairs: u32,
    pub(crate) layer: u32,
    pub(crate) first: u32,
    pub(crate) experts: u32,
    pub(crate) phase: u32,
    pub(crate) reserved: u32,
}

/// `GateAcquireArgs` of the kernels.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct GateAcquireArgs {
    pub(crate) acquire: AcquireArgs,
    pub(crate) gate: GateArgs,
}

/// `TableArgs` of the kernels.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct TableArgs {
    pub(crate) table: u64,
    pub(crate) count: u32,
    pub(crate) reserved: u32,
    pub(crate) entry: [[u32; 2]; TABLE_BATCH],
}

/// `ExpertArgs` of the kernels.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct ExpertArgs {
    pub(crate) arena: u64,
    pub(crate) slot_bytes: u64,
    pub(crate) offset: u64,
    pub(crate) bias_offset: u64,
    pub(crate) x: u64,
    pub(crate) slots: u64,
    pub(crate) weights: u64,
    pub(crate) out: u64,
    pub(crate) tokens: u32,
    pub(crate) k: u32,
    pub(crate) inputs: u32,
    pub(crate) outputs: u32,
    pub(crate) act: u32,
    pub(crate) flags: u32,
    pub(crate) slot_count: u32,
    pub(crate) reserved: u32,
}

// The kernels assert the same numbers.
const _: () = assert!(size_of::<RawOrder>() == 32);
const _: () = assert!(cfg!(moecore_loom) || MAILBOX_BYTES == 768 + 2048 * 32 + 4096 * 80 * 8);
const _: () = assert!(INLINE_ORDERS * ORDER_CELLS < ANSWER_CELLS);
const _: () = assert!(size_of::<AcquireArgs>() == 96);
const _: () = assert!(size_of::<GateAcquireArgs>() == 184);
const _: () = assert!(size_of::<TableArgs>() == 16 + TABLE_BATCH * 8);
const _: () = assert!(size_of::<ExpertArgs>() == 96);

/// A cell: what it says, beside the call that it is for.
#[must_use]
pub fn cell_word(seq: u32, content: u32) -> u64 {
    u64::from(seq) << 32 | u64::from(content)
}

/// The upper and the lower half of a word: a cell's call, and what it says.
#[must_use]
#[expect(clippy::cast_possible_truncation, reason = "halves")]
pub const fn halves(word: u64) -> (u32, u32) {
    ((word >> 32) as u32, word as u32)
}

/// The first cell of an answer.
#[must_use]
pub fn answer_word(seq: u32, status: u32, copies: usize, orders: usize) -> u64 {
    debug_assert!(copies <= orders && orders <= MAX_ORDERS && status < 256);
    cell_word(seq, status << 24) | (copies as u64) << 12 | orders as u64
}

/// The sequence number after `seq`: 0 is left out, because fresh memory reads as 0.
#[must_use]
pub fn sequence_after(seq: u32) -> u32 {
    if seq == u32::MAX { 1 } else { seq + 1 }
}
