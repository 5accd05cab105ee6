//! The memory that rows are read into. All pointers of this room are here.

#![expect(unsafe_code, reason = "memory of others is written through pointers")]

use std::mem::MaybeUninit;
use std::ptr::NonNull;

/// Memory that an engine may write until the job's [`Done`](super::Done) has been received.
#[derive(Debug)]
pub struct Destination {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: `new` demands memory that nobody else touches, so it makes no difference which thread writes it.
unsafe impl Send for Destination {}

impl Destination {
    /// Memory of `bytes` bytes from `start`. It need not be aligned nor initialised.
    ///
    /// # Safety
    /// Until the job's `Done` was received (or the job was dropped without being submitted), the memory must stay
    /// valid for writes, and nobody else may read or write it. `start` may be null only if `bytes` is 0.
    #[must_use]
    pub unsafe fn new(start: *mut u8, bytes: usize) -> Self {
        debug_assert!(bytes == 0 || !start.is_null(), "no memory at null");
        Self { start: NonNull::new(start).unwrap_or(NonNull::dangling()), bytes }
    }

    /// How many bytes fit.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes as u64
    }

    /// A part of the memory, to be written on its own.
    ///
    /// # Panics
    /// If the part is not inside the memory.
    ///
    /// # Safety
    /// No two windows of one destination may overlap.
    pub(super) unsafe fn window(&self, at: u64, bytes: u64) -> Window {
        let inside = at.checked_add(bytes).is_some_and(|end| end <= self.bytes());
        assert!(inside, "{bytes} bytes at {at} of {}", self.bytes);
        let (at, bytes) = (usize::try_from(at).expect("inside"), usize::try_from(bytes).expect("inside"));
        // SAFETY: `at` is inside the allocation or one past its end, by the check above and the contract of `new`.
        Window { start: unsafe { self.start.add(at) }, bytes }
    }
}

/// A part of a destination that one piece of a job owns.
#[derive(Debug)]
pub(super) struct Window {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: as for `Destination`; windows do not overlap.
unsafe impl Send for Window {}

impl Window {
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether direct reads can go to every multiple of `alignment` in it.
    pub(super) fn is_aligned(&self, alignment: usize) -> bool {
        self.start.addr().get().is_multiple_of(alignment)
    }

    /// The memory itself.
    pub(super) fn memory(&mut self) -> &mut [MaybeUninit<u8>] {
        // SAFETY: valid and unshared until the job's `Done` by the contract of `Destination::new`, and not in any other
        // window by that of `window`. The flight that sends `Done` outlives the piece that holds this window.
        // `MaybeUninit` asks for no initialised bytes.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr().cast(), self.bytes) }
    }

    /// Fills the window.
    ///
    /// # Panics
    /// If `bytes` has another length.
    pub(super) fn write(&mut self, bytes: &[MaybeUninit<u8>]) {
        self.memory().copy_from_slice(bytes);
    }
}
