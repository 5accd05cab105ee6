//! Memory that experts are kept in: rows of equal length at aligned addresses.
//!
//! A device's own work (copies, waiting, kernels) belongs to its crate. The core needs to know one thing of it: where a
//! row lies, so that a read can land there.

use std::ptr::NonNull;

use crate::error::{Error, ErrorKind, Result};
use crate::experts::SLOT_ALIGNMENT;

/// Rows that the host can write: a CPU's slots, or the pinned rows of a machine with a GPU.
///
/// # Safety
/// `row(i)` must point to `row_bytes()` bytes that stay valid and writable while `self` lives, overlap no other row,
/// and are touched by nobody but the owner of this memory.
#[expect(unsafe_code, reason = "reads write to its rows")]
pub unsafe trait HostMemory: std::fmt::Debug + Send + Sync {
    /// How many rows there are.
    fn rows(&self) -> u32;

    /// Length of a row.
    fn row_bytes(&self) -> usize;

    /// First byte of row `row`, which is less than [`rows`](Self::rows).
    fn row(&self, row: u32) -> NonNull<u8>;
}

/// One piece of host memory that somebody else has allocated.
#[derive(Debug)]
pub struct HostDevice {
    base: NonNull<u8>,
    rows: u32,
    row_bytes: usize,
}

// SAFETY: the memory is borrowed from an owner that outlives `self` and leaves it alone (contract of `new`); the struct
// only computes addresses.
#[expect(unsafe_code, reason = "addresses may cross threads")]
unsafe impl Send for HostDevice {}
// SAFETY: as above.
#[expect(unsafe_code, reason = "addresses may cross threads")]
unsafe impl Sync for HostDevice {}

impl HostDevice {
    /// Rows of `row_bytes` in the memory at `base`.
    ///
    /// # Safety
    /// `bytes` bytes from `base` on stay valid, writable and untouched by others while the result lives.
    #[expect(unsafe_code, reason = "memory comes from outside")]
    pub unsafe fn new(base: NonNull<u8>, bytes: u64, row_bytes: u64) -> Result<Self> {
        let aligned = (base.as_ptr() as u64).is_multiple_of(SLOT_ALIGNMENT);
        if !aligned || row_bytes == 0 || !row_bytes.is_multiple_of(SLOT_ALIGNMENT) {
            let message = format!("memory for experts must be aligned to {SLOT_ALIGNMENT} bytes");
            return Err(Error::new(ErrorKind::Device, message));
        }
        let rows =
            u32::try_from(bytes / row_bytes).map_err(|_| Error::new(ErrorKind::Device, "more than 2^32 slots"))?;
        let row_bytes =
            usize::try_from(row_bytes).map_err(|_| Error::new(ErrorKind::Device, "a slot larger than memory"))?;
        Ok(Self { base, rows, row_bytes })
    }
}

// SAFETY: rows are disjoint pieces of memory that is ours by the contract of `new`.
#[expect(unsafe_code, reason = "the trait's promise")]
unsafe impl HostMemory for HostDevice {
    fn rows(&self) -> u32 {
        self.rows
    }

    fn row_bytes(&self) -> usize {
        self.row_bytes
    }

    fn row(&self, row: u32) -> NonNull<u8> {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        // SAFETY: the row lies inside the piece that `new` was given.
        #[expect(unsafe_code, reason = "address of a row")]
        unsafe {
            self.base.add(row as usize * self.row_bytes)
        }
    }
}

#[cfg(test)]
#[expect(unsafe_code, reason = "the contract of `new` is kept by hand")]
mod tests {
    use std::alloc::{Layout, alloc_zeroed, dealloc};

    use super::*;

    #[test]
    fn rows_are_disjoint_and_inside_the_memory() {
        let layout = Layout::from_size_align(3 * 4096 + 100, 4096).unwrap();
        // SAFETY: the layout has a size.
        let base = NonNull::new(unsafe { alloc_zeroed(layout) }).unwrap();
        // SAFETY: freed after the last use below.
        let device = unsafe { HostDevice::new(base, layout.size() as u64, 4096) }.unwrap();
        assert_eq!((device.rows(), device.row_bytes()), (3, 4096));
        for row in 0..3 {
            // SAFETY: the row is ours.
            unsafe { std::slice::from_raw_parts_mut(device.row(row).as_ptr(), 4096) }.fill(u8::try_from(row).unwrap());
        }
        for row in 0..3 {
            // SAFETY: as above.
            let bytes = unsafe { std::slice::from_raw_parts(device.row(row).as_ptr(), 4096) };
            assert!(bytes.iter().all(|&byte| u32::from(byte) == row));
        }
        // SAFETY: alignment is checked before anything is touched.
        assert!(unsafe { HostDevice::new(base.add(1), 4096, 4096) }.is_err());
        // SAFETY: as above.
        assert!(unsafe { HostDevice::new(base, 4096, 100) }.is_err());
        // SAFETY: allocated above with this layout.
        unsafe { dealloc(base.as_ptr(), layout) };
    }

    #[test]
    #[should_panic(expected = "row 1 of 1")]
    fn a_row_outside_is_a_bug() {
        // SAFETY: no row is touched.
        let device = unsafe { HostDevice::new(NonNull::new(4096 as *mut u8).unwrap(), 4096, 4096) }.unwrap();
        let _ = device.row(1);
    }
}
