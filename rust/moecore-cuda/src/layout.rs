//! The bytes that the kernels and this crate share: `cuda/mailbox.cuh` and `cuda/experts.cu`, seen from this side.

/// Records that the ring holds before the oldest is overwritten.
pub const RING_RECORDS: u32 = 4096;
/// 8-byte cells of a record.
pub const RECORD_CELLS: usize = 80;
/// Cells before the bitmaps.
pub const RECORD_HEADER: usize = 4;
/// Pairs of a token and an expert that one call may have.
pub const MAX_PAIRS: u32 = 1024;
/// Experts that a layer may have.
pub const MAX_EXPERTS: u32 = 1024;
/// Orders of one answer.
pub const MAX_ORDERS: usize = 2048;
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

/// Offset of the answer word.
pub const ANSWER: usize = 0;
/// Offset of the watchdog's patience in nanoseconds.
pub const TIMEOUT: usize = 128;
/// Offset of the first failure's status (u32) and its call (u32).
pub const ERROR: usize = 256;
/// Offset of the last call whose orders are done.
pub const APPLIED: usize = 384;
/// Offset of the orders.
pub const ORDERS: usize = 512;
/// Offset of the ring.
pub const RING: usize = ORDERS + MAX_ORDERS * size_of::<RawOrder>();
/// Length of the mailbox.
pub const MAILBOX_BYTES: usize = RING + RING_RECORDS as usize * RECORD_CELLS * 8;
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
}

// The kernels assert the same numbers.
const _: () = assert!(size_of::<RawOrder>() == 32);
const _: () = assert!(MAILBOX_BYTES == 512 + 2048 * 32 + 4096 * 80 * 8);
const _: () = assert!(size_of::<AcquireArgs>() == 96);
const _: () = assert!(size_of::<TableArgs>() == 16 + TABLE_BATCH * 8);
const _: () = assert!(size_of::<ExpertArgs>() == 88);

/// The answer word: everything about an answer that fits one load.
#[must_use]
pub fn answer_word(seq: u32, status: u32, copies: usize, orders: usize) -> u64 {
    debug_assert!(copies <= orders && orders <= MAX_ORDERS && status < 256);
    u64::from(seq) << 32 | u64::from(status) << 24 | (copies as u64) << 12 | orders as u64
}

/// The sequence number after `seq`: 0 is left out, because fresh memory reads as 0.
#[must_use]
pub fn sequence_after(seq: u32) -> u32 {
    if seq == u32::MAX { 1 } else { seq + 1 }
}
