//! Pinned host memory: rows that the GPU can read by itself, allocated in the background, piece by piece.
//!
//! Pinning costs the kernel about half a second for each GiB, so an arena hands out its first rows while the last are
//! still being pinned.
#![expect(unsafe_code, reason = "driver calls")]

use std::ffi::c_void;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;

use moecore::device::HostMemory;
use moecore::{Error, ErrorKind, Result};

use crate::context::Context;
use crate::driver::OUT_OF_MEMORY;

/// `CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP`: every GPU may read it, at the address the host uses.
/// Not write-combined, because checks and buffered reads read it back.
const FLAGS: u32 = 1 | 2;
/// What one piece of an arena aims at.
const PIECE_BYTES: u64 = 256 << 20;

/// One allocation of pinned memory, filled with zeros.
#[derive(Debug)]
pub struct PinnedBlock {
    context: Arc<Context>,
    base: NonNull<u8>,
    bytes: usize,
}

// SAFETY: plain memory; whoever writes it answers for the order.
unsafe impl Send for PinnedBlock {}
// SAFETY: as above: this type only hands out the address.
unsafe impl Sync for PinnedBlock {}

impl PinnedBlock {
    /// `bytes` of pinned memory, page-aligned.
    pub fn new(context: &Arc<Context>, bytes: usize) -> Result<Self> {
        let _entered = context.enter()?;
        let api = context.api();
        let mut base = std::ptr::null_mut();
        // SAFETY: address of a local.
        let status = unsafe { (api.host_alloc)(&raw mut base, bytes, FLAGS) };
        if status == OUT_OF_MEMORY {
            let message = format!("the host has no {} MiB of memory left that can be pinned", bytes >> 20);
            return Err(Error::new(ErrorKind::Device, message));
        }
        api.check(status, "pinning host memory")?;
        let base = NonNull::new(base.cast::<u8>()).ok_or_else(|| Error::new(ErrorKind::Device, "no pinned memory"))?;
        // SAFETY: the block is `bytes` long and ours alone.
        unsafe { base.write_bytes(0, bytes) };
        Ok(Self { context: Arc::clone(context), base, bytes })
    }

    /// First byte; the GPU uses the same address.
    #[must_use]
    pub fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// Length.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for PinnedBlock {
    fn drop(&mut self) {
        if let Ok(_entered) = self.context.enter() {
            // SAFETY: the owner of a block sees to it that nobody reads it any more, the GPU included.
            unsafe { (self.context.api().host_free)(self.base.as_ptr().cast::<c_void>()) };
        }
    }
}

/// How an arena is cut into pieces of whole rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Cut {
    row_bytes: u64,
    rows: u32,
    rows_per_piece: u32,
}

impl Cut {
    fn new(row_bytes: u64, rows: u32) -> Self {
        let fit = u32::try_from(PIECE_BYTES / row_bytes.max(1)).unwrap_or(u32::MAX);
        Self { row_bytes, rows, rows_per_piece: fit.clamp(1, rows.max(1)) }
    }

    fn pieces(self) -> u32 {
        self.rows.div_ceil(self.rows_per_piece)
    }

    /// Rows of piece `piece`.
    fn rows_of(self, piece: u32) -> u32 {
        self.rows_per_piece.min(self.rows - piece * self.rows_per_piece)
    }

    /// Piece of a row, and the row's offset in it.
    fn place(self, row: u32) -> (usize, u64) {
        ((row / self.rows_per_piece) as usize, u64::from(row % self.rows_per_piece) * self.row_bytes)
    }
}

/// What the arena and its allocating thread share.
#[derive(Debug)]
struct Shared {
    cut: Cut,
    pieces: Box<[OnceLock<PinnedBlock>]>,
    allocated: AtomicU32,
    stop: AtomicBool,
    /// Set once: all pieces are there, or why no more come.
    end: Mutex<Option<Result<(), String>>>,
    changed: Condvar,
}

/// Rows of pinned memory.
#[derive(Debug)]
pub struct PinnedArena {
    context: Arc<Context>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl PinnedArena {
    /// `rows` rows of `row_bytes`, pinned by a thread of its own from now on.
    pub fn new(context: &Arc<Context>, row_bytes: u64, rows: u32) -> Result<Self> {
        if row_bytes == 0 || !row_bytes.is_multiple_of(16) {
            return Err(Error::new(ErrorKind::Device, "a pinned row must have a multiple of 16 bytes"));
        }
        let cut = Cut::new(row_bytes, rows);
        let shared = Arc::new(Shared {
            cut,
            pieces: (0..cut.pieces()).map(|_| OnceLock::new()).collect(),
            allocated: AtomicU32::new(0),
            stop: AtomicBool::new(false),
            end: Mutex::new(None),
            changed: Condvar::new(),
        });
        let (worker, device) = (Arc::clone(&shared), Arc::clone(context));
        let thread = std::thread::Builder::new()
            .name("moecore-pin".to_owned())
            .spawn(move || worker.allocate(&device))
            .map_err(|error| Error::new(ErrorKind::Device, "no thread for pinning memory").with_source(error))?;
        Ok(Self { context: Arc::clone(context), shared, thread: Some(thread) })
    }

    /// Rows that can be used already.
    #[must_use]
    pub fn allocated_rows(&self) -> u32 {
        self.shared.allocated.load(Ordering::Acquire)
    }

    /// Waits until `rows` rows can be used. An error says that the host ran out of memory before.
    pub fn ensure(&self, rows: u32) -> Result<()> {
        if self.allocated_rows() >= rows {
            return Ok(());
        }
        let mut end = self.shared.end.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if self.allocated_rows() >= rows {
                return Ok(());
            }
            if let Some(how) = &*end {
                let why = how.as_ref().err().map_or("the arena is smaller", String::as_str);
                let message = format!("{} of {rows} pinned rows are there: {why}", self.allocated_rows());
                return Err(Error::new(ErrorKind::Device, message));
            }
            end = self.shared.changed.wait(end).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits until all rows are there, or as many as the host can pin: their number.
    #[must_use]
    pub fn settle(&self) -> u32 {
        // What is missing shows in the number.
        let _ = self.ensure(self.shared.cut.rows);
        self.allocated_rows()
    }

    /// Address of a row, for the host and for the GPU; `None` while it is not allocated. Never waits.
    #[must_use]
    pub fn address(&self, row: u32) -> Option<u64> {
        let (piece, offset) = self.shared.cut.place(row);
        let block = self.shared.pieces.get(piece)?.get()?;
        (row < self.shared.cut.rows).then(|| block.base().as_ptr() as u64 + offset)
    }
}

impl Shared {
    fn allocate(&self, context: &Arc<Context>) {
        let mut how = Ok(());
        for (piece, place) in (0..).zip(&self.pieces) {
            if self.stop.load(Ordering::Relaxed) {
                how = Err("the arena was closed".to_owned());
                break;
            }
            let rows = self.cut.rows_of(piece);
            let block = usize::try_from(u64::from(rows) * self.cut.row_bytes)
                .map_err(|_| Error::new(ErrorKind::Device, "a row larger than memory"))
                .and_then(|bytes| PinnedBlock::new(context, bytes));
            match block {
                Ok(block) => {
                    // This thread alone fills the places, each once.
                    let _ = place.set(block);
                    let _order = self.end.lock().unwrap_or_else(PoisonError::into_inner);
                    self.allocated.fetch_add(rows, Ordering::Release);
                    self.changed.notify_all();
                }
                Err(error) => {
                    how = Err(error.to_string());
                    break;
                }
            }
        }
        *self.end.lock().unwrap_or_else(PoisonError::into_inner) = Some(how);
        self.changed.notify_all();
    }
}

// SAFETY: rows are disjoint pieces of blocks that live as long as the arena.
unsafe impl HostMemory for PinnedArena {
    fn rows(&self) -> u32 {
        self.shared.cut.rows
    }

    fn row_bytes(&self) -> usize {
        // A row fits into memory, or it would not have been allocated.
        usize::try_from(self.shared.cut.row_bytes).unwrap_or(usize::MAX)
    }

    /// Waits for the row's piece.
    ///
    /// # Panics
    /// If the host had no memory left for it: ask [`PinnedArena::settle`] first.
    fn row(&self, row: u32) -> NonNull<u8> {
        if let Err(error) = self.ensure(row + 1) {
            panic!("{error}");
        }
        let (piece, offset) = self.shared.cut.place(row);
        let base = self.shared.pieces[piece].get().expect("`ensure` has seen it").base();
        // SAFETY: the row lies inside its piece.
        unsafe { base.add(usize::try_from(offset).unwrap_or(usize::MAX)) }
    }
}

impl Drop for PinnedArena {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic there left rows unallocated, which `ensure` has told.
            let _ = thread.join();
        }
        // The GPU may still read rows. If it has failed, nothing reads any more.
        let _ = self.context.synchronize();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_lie_whole_inside_pieces() {
        let cut = Cut::new(9 << 20, 100);
        assert_eq!((cut.rows_per_piece, cut.pieces()), (28, 4));
        assert_eq!((0..4).map(|piece| cut.rows_of(piece)).sum::<u32>(), 100);
        assert_eq!(cut.place(0), (0, 0));
        assert_eq!(cut.place(27), (0, 27 * (9 << 20)));
        assert_eq!(cut.place(28), (1, 0));
        assert_eq!(cut.place(99), (3, 15 * (9 << 20)));
    }

    #[test]
    fn a_row_larger_than_a_piece_has_its_own() {
        let cut = Cut::new(300 << 20, 3);
        assert_eq!((cut.rows_per_piece, cut.pieces()), (1, 3));
    }

    #[test]
    fn few_small_rows_are_one_piece() {
        let cut = Cut::new(4096, 10);
        assert_eq!((cut.rows_per_piece, cut.pieces(), cut.rows_of(0)), (10, 1, 10));
        assert_eq!(Cut::new(4096, 0).pieces(), 0);
    }
}
