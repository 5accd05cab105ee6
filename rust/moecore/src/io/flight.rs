//! A job on its way: exactly one `Done`, however it ends.

#![expect(unsafe_code, reason = "windows of a row are made here, where it is known that they do not overlap")]

use std::any::Any;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crossbeam_channel::Sender;

use crate::error::{Error, ErrorKind, Result};
use crate::experts::Range;
use crate::io::destination::Window;
use crate::io::plan::{self, PAGE};
use crate::io::source::Source;
use crate::io::{Done, ReadJob};

/// What the pieces of a job share. The last one to let go of it sends the `Done`, so that none is lost or sent twice.
#[derive(Debug)]
pub(super) struct Flight {
    tag: u64,
    bytes: AtomicU64,
    /// Pieces not yet read; 1 before the job has been cut into pieces.
    unread: AtomicUsize,
    failed: AtomicBool,
    failure: Mutex<Option<Error>>,
    done: Sender<Done>,
}

impl Flight {
    /// The first error is the job's; the pieces after it need not be read.
    pub(super) fn fail(&self, error: Error) {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        self.failed.store(true, Ordering::Relaxed);
    }

    pub(super) fn tag(&self) -> u64 {
        self.tag
    }

    pub(super) fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Relaxed)
    }

    /// One piece has been read.
    pub(super) fn landed(&self) {
        self.unread.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        let failure = self.failure.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        let result = match failure {
            Some(error) => Err(error),
            None if *self.unread.get_mut() == 0 => Ok(()),
            None => Err(Error::new(ErrorKind::Cancelled, "the read was cancelled: its engine was closed")),
        };
        let bytes = if result.is_ok() { *self.bytes.get_mut() } else { 0 };
        // A receiver that is gone wants no answers.
        let _ = self.done.send(Done { tag: self.tag, result, bytes });
    }
}

/// A job that nobody has begun.
#[derive(Debug)]
pub(super) struct Job {
    pub flight: Arc<Flight>,
    job: ReadJob,
}

/// One contiguous read of a job.
#[derive(Debug)]
pub(super) struct Piece {
    pub file: u32,
    pub begin: u64,
    pub end: u64,
    pub parts: Vec<Part>,
    /// Dropped after the windows: no window outlives its flight.
    pub flight: Arc<Flight>,
}

/// Bytes of a piece that stay together.
#[derive(Debug)]
pub(super) struct Part {
    pub offset: u64,
    pub window: Window,
}

impl Job {
    pub(super) fn new(job: ReadJob, done: Sender<Done>) -> Self {
        let flight = Flight {
            tag: job.tag,
            bytes: AtomicU64::new(0),
            unread: AtomicUsize::new(1),
            failed: AtomicBool::new(false),
            failure: Mutex::new(None),
            done,
        };
        Self { flight: Arc::new(flight), job }
    }

    /// Checks the job and its files, and cuts it.
    pub(super) fn pieces(self, files: &[impl Source], piece_bytes: u64) -> Result<Vec<Piece>> {
        let Self { flight, job: ReadJob { ranges, into, .. } } = self;
        let bytes = plan::check(&ranges, files, into.bytes())?;
        let align = |file: u32| files[file as usize].direct().map_or(PAGE, |direct| direct.block.max(PAGE));
        let align = ranges.iter().map(|range| align(range.file)).max().unwrap_or(PAGE);
        let spans = plan::spans(ranges, piece_bytes, align);
        let mut verified = None;
        let mut pieces = Vec::with_capacity(spans.len());
        for span in spans {
            // Spans are sorted by file: each is asked once.
            if verified.replace(span.file) != Some(span.file) {
                files[span.file as usize].verify()?;
            }
            let part = |part: Range| Part {
                offset: part.offset,
                // SAFETY: `check` found the ranges to be disjoint in the row, `spans` gives each of their bytes to one
                // part, and `into` is ours and makes no other windows.
                window: unsafe { into.window(part.at, part.bytes) },
            };
            let parts = span.parts.into_iter().map(part).collect();
            let flight = Arc::clone(&flight);
            pieces.push(Piece { file: span.file, begin: span.begin, end: span.end, parts, flight });
        }
        flight.bytes.store(bytes, Ordering::Relaxed);
        flight.unread.store(pieces.len(), Ordering::Relaxed);
        Ok(pieces)
    }
}

/// The error that a panic becomes.
pub(super) fn panicked(panic: &(dyn Any + Send)) -> Error {
    let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
    let message =
        format!("a read panicked ({}); this is a bug in moecore, please report it", text.unwrap_or("no text"));
    Error::new(ErrorKind::Io, message)
}
