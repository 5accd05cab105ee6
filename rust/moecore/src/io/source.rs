//! What engines need of a file.

use std::mem::MaybeUninit;

use rustix::io::Errno;

use crate::error::Result;

/// What direct reads of a file must be aligned to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Alignment {
    /// Offsets and lengths.
    pub block: u64,
    /// Addresses.
    pub memory: usize,
}

/// A file to read from. The tests' own stands for faults that no real disk makes on demand.
pub(super) trait Source: Send + Sync + 'static {
    /// The file's name in errors.
    fn name(&self) -> &str;

    /// The file's length.
    fn bytes(&self) -> u64;

    /// An error if the file is no longer as it was indexed.
    fn verify(&self) -> Result<()>;

    /// Direct reads as long as the file takes them.
    fn direct(&self) -> Option<Alignment>;

    /// The file refused a direct read: buffered reads from here on.
    fn leave_direct(&self);

    /// One read call: reads bytes from `offset` to the beginning of `memory` and says how many.
    fn read_at(&self, memory: &mut [MaybeUninit<u8>], offset: u64) -> Result<usize, Errno>;

    /// These bytes have been read and will not be wanted soon.
    fn release(&self, begin: u64, end: u64);
}

/// The name for files that are read directly, partly so, or not at all.
pub(super) fn name(files: &[impl Source], [direct, mixed, buffered]: [&'static str; 3]) -> &'static str {
    match files.iter().filter(|file| file.direct().is_some()).count() {
        0 => buffered,
        all if all == files.len() => direct,
        _ => mixed,
    }
}
