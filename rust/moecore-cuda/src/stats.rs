//! Counters of the answering thread: plain atomics that it adds to and anybody may read.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Powers of two of nanoseconds that latencies are sorted into.
pub const LATENCY_BUCKETS: usize = 40;

/// What the answering thread has done.
#[derive(Debug)]
pub struct Stats {
    records: AtomicU64,
    dropped: AtomicU64,
    waits: AtomicU64,
    fetched: AtomicU64,
    fetched_bytes: AtomicU64,
    installed: AtomicU64,
    latency: [AtomicU64; LATENCY_BUCKETS],
}

/// [`Stats`] at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Records that were read.
    pub records: u64,
    /// Records that were overwritten before they were read: calls without a miss that no policy has seen.
    pub dropped: u64,
    /// Calls that waited for an answer.
    pub waits: u64,
    /// Experts that calls have fetched.
    pub fetched: u64,
    /// Their bytes.
    pub fetched_bytes: u64,
    /// Experts that a prefetch had brought before.
    pub installed: u64,
    /// Answers by the time from the record's arrival to the answer: place `i` counts those below `2^(i+1)` ns.
    pub latency: Vec<u64>,
}

impl Default for Stats {
    fn default() -> Self {
        Self {
            records: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
            waits: AtomicU64::new(0),
            fetched: AtomicU64::new(0),
            fetched_bytes: AtomicU64::new(0),
            installed: AtomicU64::new(0),
            latency: [const { AtomicU64::new(0) }; LATENCY_BUCKETS],
        }
    }
}

impl Stats {
    pub(crate) fn record(&self) {
        self.records.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn dropped(&self) {
        self.dropped.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn answered(&self, took: Duration, fetched: u64, bytes: u64, installed: u64) {
        self.waits.fetch_add(1, Ordering::Relaxed);
        self.fetched.fetch_add(fetched, Ordering::Relaxed);
        self.fetched_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.installed.fetch_add(installed, Ordering::Relaxed);
        let bucket = took.as_nanos().max(1).ilog2() as usize;
        self.latency[bucket.min(LATENCY_BUCKETS - 1)].fetch_add(1, Ordering::Relaxed);
    }

    /// All counters.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Snapshot {
            records: read(&self.records),
            dropped: read(&self.dropped),
            waits: read(&self.waits),
            fetched: read(&self.fetched),
            fetched_bytes: read(&self.fetched_bytes),
            installed: read(&self.installed),
            latency: self.latency.iter().map(read).collect(),
        }
    }
}
