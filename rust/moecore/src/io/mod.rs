//! Reads of expert rows from disk into memory that the caller gives.
//!
//! A [`ReadJob`] is one expert row. An engine takes jobs without waiting and answers each with exactly one [`Done`],
//! whatever happens: a fault of the disk, a file changed meanwhile, a panic in a worker, or the end of the engine.
//! Demand goes before prefetch at all times.
//!
//! Engines: threads with `pread` (always there) and `io_uring` (where the kernel lets us and where it is measured to be
//! faster). Both bypass the page cache where the file system allows: the rows are cached by residency, and a second
//! copy in the page cache would take the memory that residency lives in. [`FakeReads`] is for tests.

mod choose;
mod destination;
mod disk;
mod fake;
mod flight;
mod plan;
mod queue;
mod source;
mod threads;
mod transfer;
#[cfg(all(target_os = "linux", feature = "uring"))]
mod uring;

use std::sync::Arc;

use crossbeam_channel::Sender;

use crate::error::{Error, Result};
use crate::experts::{Range, SourceFile};

pub use destination::Destination;
pub use fake::{FakeReads, Fault, fake_byte};

/// One expert row to read.
#[derive(Debug)]
pub struct ReadJob {
    /// Comes back in [`Done`]; engines attach no meaning to it.
    pub tag: u64,
    /// What to read, in any order. Empty ranges are allowed, ranges that overlap in the row are refused.
    pub ranges: Vec<Range>,
    /// Where the row goes.
    pub into: Destination,
}

/// The end of a job. From here on the engine no longer touches the destination.
#[derive(Debug)]
pub struct Done {
    /// The job's tag.
    pub tag: u64,
    /// After an error, what the ranges' places in the destination hold is undefined.
    pub result: Result<(), Error>,
    /// Bytes put in their place: all of the ranges', or 0 after an error.
    pub bytes: u64,
}

/// Who waits for a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Urgency {
    /// A token waits: before every prefetch that is not yet being read.
    Demand,
    /// Nobody waits yet.
    Prefetch,
}

/// Takes jobs and answers each with exactly one [`Done`] on the channel given at opening.
///
/// Dropping an engine finishes the jobs that have been started, answers the others with
/// [`ErrorKind::Cancelled`](crate::ErrorKind::Cancelled), and returns when its threads have ended. With a bounded
/// channel, somebody must receive meanwhile.
pub trait ReadEngine: Send + Sync {
    /// Queues a job. Never waits for the disk, and reports bad ranges through [`Done`] as any other error.
    fn submit(&self, job: ReadJob, urgency: Urgency);

    /// Which engine this is and whether it bypasses the page cache, for logs and reports.
    fn name(&self) -> &'static str;
}

/// Which engine to open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Choice {
    /// `io_uring` where it is faster on these files, measured at opening; threads elsewhere.
    #[default]
    Auto,
    /// Threads with `pread`.
    Threads,
    /// `io_uring` where the kernel allows it; threads elsewhere.
    Uring,
}

/// How to read. The defaults suit local drives.
#[derive(Debug, Clone)]
pub struct ReadOptions {
    /// Which engine.
    pub engine: Choice,
    /// Reading threads of the threads engine, 1 to 256. Prefetch never takes the last quarter of them.
    pub threads: usize,
    /// Rows are cut into reads of at most this many bytes, 64 KiB to 256 MiB. Each thread has a buffer of this size.
    pub piece_bytes: u64,
    /// Bypass the page cache where the file system allows it. Without it, the page cache keeps what was read.
    pub direct: bool,
}

impl Default for ReadOptions {
    fn default() -> Self {
        Self { engine: Choice::Auto, threads: 8, piece_bytes: 4 << 20, direct: true }
    }
}

impl ReadOptions {
    /// Inside the limits that the fields' docs give.
    fn clamped(&self) -> Self {
        Self {
            threads: self.threads.clamp(1, 256),
            piece_bytes: self.piece_bytes.clamp(64 << 10, 256 << 20) / plan::PAGE * plan::PAGE,
            ..*self
        }
    }
}

/// Opens every file once and starts an engine on them.
///
/// A file that was deleted later stays readable; one that is not as it was indexed is an error, here and before each
/// job.
pub fn open(files: &[SourceFile], options: &ReadOptions, done: Sender<Done>) -> Result<Box<dyn ReadEngine>> {
    let options = options.clamped();
    let disks = files.iter().map(|file| disk::Disk::open(file, options.direct)).collect::<Result<Arc<[_]>>>()?;
    choose::start(&disks, &options, done)
}

#[cfg(test)]
mod tests;
