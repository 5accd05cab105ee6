//! Copies by the copy engine on a stream of our own, ordered with torch's stream by events. Nothing here waits on the
//! host: a call only enqueues.
#![expect(unsafe_code, reason = "driver calls")]

use std::ffi::c_void;
use std::sync::Arc;

use moecore::Result;

use crate::context::Context;
use crate::stream::{Event, OwnStream, Stream};

/// A stream of copies, with events that say how far it is.
///
/// A prefill uses one event for each half of its ring: `after(half, compute)` before the half is filled again, `fill`
/// for each expert, `mark(half)`, and `hold(half, compute)` before the half is read.
#[derive(Debug)]
pub struct CopyStream {
    context: Arc<Context>,
    stream: OwnStream,
    filled: Vec<Event>,
    used: Vec<Event>,
}

impl CopyStream {
    /// A stream with `events` pairs of events.
    pub fn new(context: &Arc<Context>, events: usize) -> Result<Self> {
        let make = || (0..events).map(|_| Event::new(context)).collect::<Result<Vec<_>>>();
        Ok(Self { context: Arc::clone(context), stream: OwnStream::new(context)?, filled: make()?, used: make()? })
    }

    /// Copies `bytes` from pinned host memory at `source` to the GPU's `target`.
    ///
    /// # Safety
    /// Both are that long, and stay as they are until the copy is over.
    pub unsafe fn fill(&self, target: u64, source: u64, bytes: u64) -> Result<()> {
        let _entered = self.context.enter()?;
        let api = self.context.api();
        // SAFETY: the caller's promise.
        let status =
            unsafe { (api.copy_to_device_async)(target, source as *const c_void, size(bytes), self.stream.get().0) };
        api.check(status, "copying an expert to the GPU")
    }

    /// Copies `bytes` from one place of the GPU's memory to another.
    ///
    /// # Safety
    /// As [`fill`](Self::fill); the two do not overlap.
    pub unsafe fn fill_from_device(&self, target: u64, source: u64, bytes: u64) -> Result<()> {
        let _entered = self.context.enter()?;
        let api = self.context.api();
        // SAFETY: the caller's promise.
        let status = unsafe { (api.copy_on_device_async)(target, source, size(bytes), self.stream.get().0) };
        api.check(status, "copying an expert on the GPU")
    }

    /// Marks the end of the copies so far as event `event`.
    pub fn mark(&self, event: usize) -> Result<()> {
        self.filled[event].record(self.stream.get())
    }

    /// Makes `stream` wait for the copies before `mark(event)`.
    pub fn hold(&self, event: usize, stream: Stream) -> Result<()> {
        self.filled[event].hold(stream)
    }

    /// Makes the copies from now on wait for what is in `stream` now.
    pub fn after(&self, event: usize, stream: Stream) -> Result<()> {
        self.used[event].record(stream)?;
        self.used[event].hold(self.stream.get())
    }

    /// Whether the copies before `mark(event)` are over.
    pub fn is_done(&self, event: usize) -> Result<bool> {
        self.filled[event].is_done()
    }

    /// Waits for all copies on this thread.
    pub fn synchronize(&self) -> Result<()> {
        self.stream.synchronize()
    }
}

/// Lengths are those of memory that exists.
fn size(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}
