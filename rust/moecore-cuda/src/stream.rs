//! Streams and events: torch's streams are borrowed for one call, our own are closed with their owner.
#![expect(unsafe_code, reason = "driver calls")]

use std::sync::Arc;

use moecore::Result;

use crate::context::Context;
use crate::driver::{Handle, NOT_READY};

/// `CU_STREAM_NON_BLOCKING`: no implicit order with the default stream.
const NON_BLOCKING: u32 = 1;
/// `CU_EVENT_DISABLE_TIMING`.
const WITHOUT_TIMING: u32 = 2;

/// Somebody's stream: torch's current one, for the length of a call. It is never destroyed from here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stream(pub(crate) Handle);

// SAFETY: a stream handle may be used from any thread.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl Stream {
    /// The stream whose handle torch calls `cuda_stream`.
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "a handle is a pointer")]
    pub fn from_raw(handle: u64) -> Self {
        Self(handle as usize as Handle)
    }
}

/// A stream of our own.
#[derive(Debug)]
pub struct OwnStream {
    context: Arc<Context>,
    stream: Stream,
}

impl OwnStream {
    /// A new stream that is ordered with no other.
    pub fn new(context: &Arc<Context>) -> Result<Self> {
        let _entered = context.enter()?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: address of a local.
        unsafe {
            context.api().check((context.api().stream_create)(&raw mut handle, NON_BLOCKING), "making a stream")?;
        }
        Ok(Self { context: Arc::clone(context), stream: Stream(handle) })
    }

    /// The stream, for a call.
    #[must_use]
    pub fn get(&self) -> Stream {
        self.stream
    }

    /// Waits for everything that was put into it.
    pub fn synchronize(&self) -> Result<()> {
        let _entered = self.context.enter()?;
        let api = self.context.api();
        // SAFETY: the stream is ours and alive.
        unsafe { api.check((api.stream_synchronize)(self.stream.0), "waiting for a stream") }
    }
}

impl Drop for OwnStream {
    fn drop(&mut self) {
        if let Ok(_entered) = self.context.enter() {
            // SAFETY: the stream is ours; the driver finishes what is in it.
            unsafe { (self.context.api().stream_destroy)(self.stream.0) };
        }
    }
}

/// A point in a stream.
#[derive(Debug)]
pub struct Event {
    context: Arc<Context>,
    handle: Handle,
}

// SAFETY: an event handle may be used from any thread.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    /// A new event, not recorded: waiting for it does nothing.
    pub fn new(context: &Arc<Context>) -> Result<Self> {
        let _entered = context.enter()?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: address of a local.
        unsafe {
            context.api().check((context.api().event_create)(&raw mut handle, WITHOUT_TIMING), "making an event")?;
        }
        Ok(Self { context: Arc::clone(context), handle })
    }

    /// Marks the end of what is in `stream` now.
    pub fn record(&self, stream: Stream) -> Result<()> {
        let _entered = self.context.enter()?;
        let api = self.context.api();
        // SAFETY: both handles are alive.
        unsafe { api.check((api.event_record)(self.handle, stream.0), "recording an event") }
    }

    /// Makes what is put into `stream` from now on wait for the event.
    pub fn hold(&self, stream: Stream) -> Result<()> {
        let _entered = self.context.enter()?;
        let api = self.context.api();
        // SAFETY: both handles are alive.
        unsafe { api.check((api.stream_wait)(stream.0, self.handle, 0), "waiting for an event") }
    }

    /// Whether the event has come.
    pub fn is_done(&self) -> Result<bool> {
        let _entered = self.context.enter()?;
        let api = self.context.api();
        // SAFETY: the event is alive.
        let status = unsafe { (api.event_query)(self.handle) };
        if status == NOT_READY {
            return Ok(false);
        }
        api.check(status, "looking at an event").map(|()| true)
    }

    /// Waits on this thread until the event has come.
    pub fn synchronize(&self) -> Result<()> {
        let _entered = self.context.enter()?;
        let api = self.context.api();
        // SAFETY: the event is alive.
        unsafe { api.check((api.event_synchronize)(self.handle), "waiting for an event") }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if let Ok(_entered) = self.context.enter() {
            // SAFETY: the event is ours.
            unsafe { (self.context.api().event_destroy)(self.handle) };
        }
    }
}
