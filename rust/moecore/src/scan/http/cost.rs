//! What the fetches cost: counters that anybody may read at any time.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Requests and body bytes of a group of fetches, for example of one repo. Read it while they run for progress.
#[derive(Debug, Default)]
pub struct Cost {
    requests: AtomicU64,
    bytes: AtomicU64,
}

impl Cost {
    /// A counter at zero.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Requests sent, each hop of a redirect and each retry included.
    #[must_use]
    pub fn requests(&self) -> u64 {
        self.requests.load(Relaxed)
    }

    /// Body bytes received, those of redirects and failed attempts included.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Relaxed)
    }

    pub(super) fn add_request(&self) {
        self.requests.fetch_add(1, Relaxed);
    }

    pub(super) fn add_bytes(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Relaxed);
    }
}

/// Totals of a [`Client`](super::Client) since it was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Counters {
    /// Requests sent, each hop of a redirect and each retry included.
    pub requests: u64,
    /// Redirects followed.
    pub redirects: u64,
    /// Body bytes received.
    pub bytes: u64,
    /// Attempts that failed and were made again.
    pub retries: u64,
    /// Answers with status 429, those that Python reported included.
    pub rate_limited: u64,
    /// Milliseconds for which hosts asked everybody to wait; overlapping requests for a pause count once.
    pub paused_ms: u64,
}

/// The counters behind [`Counters`].
#[derive(Debug, Default)]
pub(super) struct Totals {
    pub(super) cost: Cost,
    pub(super) redirects: AtomicU64,
    pub(super) retries: AtomicU64,
    pub(super) rate_limited: AtomicU64,
    pub(super) paused_ms: AtomicU64,
}

impl Totals {
    pub(super) fn read(&self) -> Counters {
        Counters {
            requests: self.cost.requests(),
            redirects: self.redirects.load(Relaxed),
            bytes: self.cost.bytes(),
            retries: self.retries.load(Relaxed),
            rate_limited: self.rate_limited.load(Relaxed),
            paused_ms: self.paused_ms.load(Relaxed),
        }
    }
}
